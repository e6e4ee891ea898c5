//! Ends and starts of filterd: killed, without power, or in order; and the intent maps that tell the
//! next start what to send.

use farshore_blkfilter::core::{Attach, CaptureCore, Event, IntentStart};
use farshore_extent::{BlockSizes, CaptureOrder, ChunkSize, Lsn, Seq};

use crate::coverage::{Coverage, Seen};
use crate::rng::Rng;
use crate::source::Source;

impl Source {
    /// Attaches every volume as what its state file says allows; the power may go while that is
    /// written.
    pub fn attach(&mut self, rng: &mut Rng, coverage: &mut Coverage) {
        let now = self.now();
        for disk in &mut self.disks {
            let plan = disk.begin(rng, self.epoch, coverage);
            let intent = IntentStart { set: plan.set, cap: disk.cap };
            let attach = Attach {
                volume: disk.id,
                size: disk.size,
                blocks: BlockSizes::E512,
                chunk: ChunkSize::tiny(2048),
                pool_bytes: disk.pool.len() as u64,
                start: plan.start,
                intent: Some(intent),
            };
            disk.key = Some(self.core.attach(now, attach, &mut self.actions).expect("attach"));
            disk.copying = false;
            disk.copy_wanted = true;
            disk.intent_wanted = true;
        }
        self.actions.clear();
    }

    /// filterd is killed, or the power is cut. What was applied stays on the medium, as far as it
    /// keeps what was not flushed; a new run sends what its state file says.
    pub fn crash(&mut self, rng: &mut Rng, coverage: &mut Coverage) {
        coverage.saw(Seen::SourceCrash);
        for disk in self.disks.iter_mut().filter(|d| d.commit.is_none()) {
            let key = disk.key();
            disk.commit = rng.chance(500).then(|| self.core.take_intent(key)).flatten();
        }
        if self.disks.iter().any(|d| d.commit.is_some()) {
            coverage.saw(Seen::CrashBetweenMarkAndWrite);
        }
        for index in 0..self.in_flight.len() {
            if !self.in_flight[index].applied && rng.chance(500) {
                self.apply(index, rng);
            }
        }
        let power = rng.chance(500);
        for disk in &mut self.disks {
            disk.crash(rng, power, coverage);
        }
        self.start_again(rng, coverage);
    }

    /// filterd is stopped in order and started again, when nothing is under way.
    pub fn restart(&mut self, rng: &mut Rng, coverage: &mut Coverage) {
        if !self.is_idle() || self.held.is_some() {
            return;
        }
        for disk in &mut self.disks {
            let status = self.core.status(disk.key()).expect("attached");
            let missing = self.core.missing(disk.key());
            let quiet = status.order == CaptureOrder::Ordered && status.captured == status.durable;
            // Markers have no extent: without this one they would be forgotten in an ordered
            // stretch.
            let none_left = missing.is_empty() && !quiet;
            let set = self.core.intent_map(disk.key()).expect("kept");
            disk.stop(status.released, (!none_left).then_some(missing), &set, coverage);
        }
        self.start_again(rng, coverage);
    }

    fn start_again(&mut self, rng: &mut Rng, coverage: &mut Coverage) {
        self.in_flight.clear();
        self.asked.clear();
        self.spares.clear();
        self.held = None;
        self.epoch = self.epoch.next();
        self.core = CaptureCore::new(self.epoch, self.limits.clone());
        self.attach(rng, coverage);
        for disk in &mut self.disks {
            let image = disk.medium.clone();
            disk.oracle.replace(Lsn::new(self.epoch, Seq::new(1)), image);
        }
    }

    /// The thread that keeps the intent maps does something: takes a commit, writes it, or looks
    /// whether the state disk works again.
    pub fn keep_intent(&mut self, rng: &mut Rng, coverage: &mut Coverage) {
        let index = rng.index(self.disks.len());
        let (now, disk) = (self.now(), &mut self.disks[index]);
        let key = disk.key();
        if let Some(commit) = disk.commit.take() {
            let end = disk.write_intent(&commit, rng, coverage);
            self.step(Event::IntentDone { volume: key, end }, coverage);
        } else if disk.lost {
            if disk.works_again(rng) {
                coverage.saw(Seen::IntentResumed);
                let mut actions = std::mem::take(&mut self.actions);
                self.core.resume_intent(now, key, &mut actions);
                self.carry_out(&mut actions, coverage);
                self.actions = actions;
            }
        } else if disk.intent_wanted {
            disk.intent_wanted = false;
            disk.commit = self.core.take_intent(key);
        }
    }

    /// No more faults of the state disk.
    pub fn heal(&mut self) {
        for disk in &mut self.disks {
            disk.heal();
        }
    }
}
