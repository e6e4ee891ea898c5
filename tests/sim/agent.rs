//! The agent: the real session core and the real batch building, driven by hand.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use farshore_agent::batch::FeedOptions;
use farshore_agent::session::{
    Action, Event, Faults, FeedFailure, Jitter, LinkFailure, Session, SessionConfig, VolumeFacts,
    VolumeMemory,
};
use farshore_agent::spool::{Spool, SpoolFaults, SpoolOwner};
use farshore_agent::supply::{Pressure, Supply};
use farshore_extent::{BlockSizes, CaptureOrder, Lsn, Problem, VolumeId, VolumeName};
use farshore_protocol::message::FromTarget;

use crate::coverage::{Coverage, Seen};
use crate::disk::Disk;
use crate::link::{Link, ToTarget};
use crate::rng::Rng;
use crate::source::Source;
use crate::spool::SimSpool;

/// The media of the spools; they survive the agent.
pub type Spools = BTreeMap<VolumeId, SimSpool>;

/// What survives the agent's death.
pub type Memory = BTreeMap<VolumeId, VolumeMemory>;

/// One run of the agent.
pub struct Agent {
    session: Session,
    feeds: BTreeMap<VolumeId, Running>,
    actions: Vec<Action>,
    /// The pool looks fuller by this factor, so that outages need not be long.
    pool_divisor: u64,
    /// The spool is nearly full.
    merges: bool,
}

/// What holds the batches of a volume, and those asked of it.
struct Running {
    /// Of the feed that the session asked for.
    number: Option<u64>,
    supply: Supply<SimSpool>,
    disk: SimSpool,
    pulls: VecDeque<Lsn>,
}

fn trouble(why: &str) -> Problem {
    Problem::harmless(5999, "simulated", why, "nothing")
}

fn facts(disk: &Disk) -> VolumeFacts {
    VolumeFacts {
        volume: disk.id,
        name: VolumeName::new("disk").expect("name"),
        size: disk.size,
        blocks: BlockSizes::E512,
        point_interval_ms: None,
    }
}

impl Agent {
    pub fn new(
        rng: &mut Rng,
        (faults, spool_faults): (Faults, SpoolFaults),
        memory: &Memory,
        source: &Source,
        spools: &Spools,
    ) -> Self {
        let config = SessionConfig {
            window_bytes: 16 << 10,
            max_batches: 1 + rng.index(6),
            faults,
            ..SessionConfig::default()
        };
        let mut agent = Self {
            session: Session::new(config),
            feeds: BTreeMap::new(),
            actions: Vec::new(),
            pool_divisor: 1 << rng.below(5),
            merges: rng.chance(500),
        };
        let options = FeedOptions {
            batch_bytes: 512 + rng.index(8 << 10),
            zstd_level: rng.chance(100).then_some(1),
            divide_number: faults.divide_number,
        };
        let segment_bytes = (3 + rng.below(16)) * 4096;
        for disk in &source.disks {
            let owner = SpoolOwner {
                volume: disk.id,
                size: disk.size,
                blocks: BlockSizes::E512,
                segment_bytes,
            };
            let medium = spools[&disk.id].clone();
            let spool = Spool::open(medium.clone(), owner, spool_faults).ok();
            let mut supply = Supply::new(disk.id, options, spool, spool_faults);
            supply.begin(memory.get(&disk.id).copied().unwrap_or_default());
            let running = Running { number: None, supply, disk: medium, pulls: VecDeque::new() };
            agent.feeds.insert(disk.id, running);

            let (captured, released) = source.watermarks(disk.id);
            let memory = memory.get(&disk.id).copied().unwrap_or_default();
            let event = Event::VolumeAdded { facts: facts(disk), memory, captured, released };
            agent.session.step(Duration::ZERO, event, &mut agent.actions);
        }
        agent
    }

    fn now(source: &Source) -> Duration {
        Duration::from_millis(source.now().mono_ms)
    }

    /// Looks at filterd's watermarks and lets time pass.
    pub fn tick(&mut self, source: &Source) {
        for disk in &source.disks {
            let (captured, released) = source.watermarks(disk.id);
            let known = self.session.volume(disk.id).is_some_and(|v| *v.facts() == facts(disk));
            let event = if known {
                Event::VolumeSeen { volume: disk.id, captured, released }
            } else {
                let memory = VolumeMemory::default(); // what the session remembers is newer
                Event::VolumeAdded { facts: facts(disk), memory, captured, released }
            };
            self.session.step(Self::now(source), event, &mut self.actions);
        }
        self.session.step(Self::now(source), Event::Tick, &mut self.actions);
    }

    /// Carries out what the session has decided.
    pub fn act(
        &mut self,
        source: &mut Source,
        link: &mut Link,
        memory: &mut Memory,
        coverage: &mut Coverage,
    ) {
        let mut actions = std::mem::take(&mut self.actions);
        for action in actions.drain(..) {
            match action {
                Action::Connect => {
                    link.connect();
                    let event = if link.is_up() {
                        Event::Connected
                    } else {
                        let failure = LinkFailure { problem: trouble("down"), retry: true };
                        Event::Disconnected { failure, jitter: Jitter(128) }
                    };
                    self.session.step(Self::now(source), event, &mut self.actions);
                }
                Action::Disconnect { .. } => link.cut(),
                Action::SendOpen(open) => link.send(ToTarget::Open(open)),
                Action::SendClose { .. } => {}
                Action::SendBatch { volume, batch } => {
                    if link.sent_before(batch.header.last()) {
                        coverage.saw(Seen::Resent);
                    }
                    link.send(ToTarget::Batch(volume, batch));
                }
                Action::StartFeed { volume, feed, resume, recopy } => {
                    if let Some(reason) = &recopy {
                        source.recopy(volume, reason, coverage);
                    }
                    let Some(running) = self.feeds.get_mut(&volume) else { continue };
                    running.number = Some(feed);
                    running.pulls.clear();
                    match running.supply.start(resume, recopy.is_some()) {
                        Ok(true) if running.supply.has_unread() => coverage.saw(Seen::SpoolFound),
                        Ok(_) => {}
                        Err(error) => self.damaged(volume, &error.to_string(), source),
                    }
                }
                Action::StopFeed { volume } => {
                    if let Some(running) = self.feeds.get_mut(&volume) {
                        running.number = None;
                        running.pulls.clear();
                        running.supply.drop_feed();
                    }
                }
                Action::Pull { volume, feed, durable } => {
                    let running = self.feeds.get_mut(&volume);
                    if let Some(running) = running.filter(|r| r.number == Some(feed)) {
                        running.pulls.push_back(durable);
                    }
                }
                Action::Release { volume, upto } => {
                    self.with_supply(volume, |supply| supply.trim(upto));
                    source.release(volume, upto, coverage);
                }
                Action::Compared { volume, upto, answer } => {
                    source.compared(volume, upto, &answer, coverage);
                }
                Action::Remember { volume, memory: kept } => {
                    memory.insert(volume, kept);
                    self.with_supply(volume, |supply| supply.remembered(kept));
                }
            }
        }
    }

    fn with_supply(&mut self, volume: VolumeId, tell: impl FnOnce(&mut Supply<SimSpool>)) {
        if let Some(running) = self.feeds.get_mut(&volume) {
            tell(&mut running.supply);
        }
    }

    fn damaged(&mut self, volume: VolumeId, why: &str, source: &Source) {
        let Some(running) = self.feeds.get_mut(&volume) else { return };
        running.supply.drop_feed();
        running.pulls.clear();
        if let Some(feed) = running.number.take() {
            let failure = FeedFailure::Damaged(trouble(why));
            let event = Event::FeedFailed { volume, feed, failure };
            self.session.step(Self::now(source), event, &mut self.actions);
        }
    }

    /// One volume does what its thread would do: hands out, decides, builds, syncs.
    pub fn feed(
        &mut self,
        rng: &mut Rng,
        source: &mut Source,
        link: &Link,
        coverage: &mut Coverage,
    ) {
        let which = rng.index(source.disks.len());
        let volume = source.disks[which].id;
        let divisor = self.pool_divisor;
        let Some(running) = self.feeds.get_mut(&volume) else { return };
        if rng.chance(300) {
            let now = pressure(rng, source, volume, link, divisor);
            if running.supply.decide(&now).is_err() {
                coverage.saw(Seen::SpoolFailed);
            }
        }
        if self.merges && rng.chance(500) {
            running.merge(rng, coverage);
        }
        if !running.pulls.is_empty() {
            match running.supply.take() {
                Ok(Some(batch)) => {
                    let Some(feed) = running.number else { return };
                    if running.disk.holds(&batch.header) {
                        coverage.saw(Seen::SpoolSent);
                        if running.supply.merged().is_some() {
                            coverage.saw(Seen::MergedSent);
                        }
                    }
                    running.pulls.pop_front();
                    let event = Event::BatchReady { volume, feed, batch };
                    self.session.step(Self::now(source), event, &mut self.actions);
                    return;
                }
                Ok(None) => {}
                Err(error) => return self.damaged(volume, &error.to_string(), source),
            }
        }
        if running.pulls.is_empty() && !running.supply.is_spooling() {
            return;
        }
        let most = 1 + rng.index(24);
        match running.build(volume, source, most) {
            Ok(None) => {}
            Ok(Some(batch)) => {
                let spooling = running.supply.is_spooling();
                match running.supply.push(batch) {
                    Ok(()) if spooling => coverage.saw(Seen::Spooled),
                    Ok(()) => {}
                    Err(_) => coverage.saw(Seen::SpoolFailed),
                }
            }
            Err(why) => return self.damaged(volume, &why, source),
        }
        if rng.chance(250) && running.supply.sync().is_err() {
            coverage.saw(Seen::SpoolFailed);
        }
        if let Some(upto) = running.supply.kept() {
            assert!(
                !running.disk.could_lose(upto),
                "filterd let go of {upto}, which a power cut would take from the spool"
            );
            source.spooled(volume, upto, coverage);
        }
    }

    /// A message of the target.
    pub fn hear(&mut self, message: FromTarget, source: &Source) {
        if let Ok(event) = Event::from_target(message, Jitter(128)) {
            self.session.step(Self::now(source), event, &mut self.actions);
        }
    }

    pub fn disconnected(&mut self, source: &Source) {
        let failure = LinkFailure { problem: trouble("cut"), retry: true };
        let event = Event::Disconnected { failure, jitter: Jitter(128) };
        self.session.step(Self::now(source), event, &mut self.actions);
    }

    pub fn problems(&self) -> Vec<String> {
        self.session
            .volumes()
            .filter_map(|v| v.problem().map(|p| format!("{p} ({})", p.why)))
            .collect()
    }

    pub fn state(&self) -> String {
        format!(
            "{:?} {:?}",
            self.session.link(),
            self.session.volumes().map(|v| (v.phase(), v.window_len())).collect::<Vec<_>>()
        )
    }
}

impl Running {
    fn merge(&mut self, rng: &mut Rng, coverage: &mut Coverage) {
        let before = self.supply.merged().map_or(0, |m| m.points);
        for _ in 0..rng.below(40) {
            match self.supply.merge(1 << 20) {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => {
                    coverage.saw(Seen::SpoolFailed);
                    break;
                }
            }
        }
        if self.supply.merged().is_some_and(|m| m.points > before) {
            coverage.saw(Seen::Merged);
        }
    }

    fn build(
        &mut self,
        volume: VolumeId,
        source: &Source,
        most: usize,
    ) -> Result<Option<farshore_changelog::EncodedBatch>, String> {
        let Some(feed) = self.supply.feed() else { return Ok(None) };
        let durable = self.pulls.front().copied().unwrap_or_default();
        let mut records = Vec::new();
        source.fetch(volume, feed.place(), most, &mut records)?;
        for record in &records {
            let added = feed.add(source.epoch(), record, source.pool(volume), durable);
            let before = added.map_err(|e| e.to_string())?;
            if before.is_some() {
                return Ok(before);
            }
        }
        // A fetch may end in the middle of a number only when the number has more records than
        // were asked for; the next fetch begins after the number, so they must not be cut.
        Ok(feed.finish(durable))
    }
}

fn pressure(
    rng: &mut Rng,
    source: &Source,
    volume: VolumeId,
    link: &Link,
    divisor: u64,
) -> Pressure {
    let (pool_used, pool_bytes, copy_remaining) = source.pressure(volume);
    Pressure {
        pool_used,
        pool_bytes: pool_bytes / divisor,
        ordered: source.order(volume) == CaptureOrder::Ordered,
        copy_remaining,
        streaming: link.is_up(),
        room: if rng.chance(100) { 0 } else { 1 << 20 },
    }
}
