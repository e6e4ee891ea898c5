//! Every short history of one volume, and at each of its steps every crash: what the intent map
//! leaves out is the same on the medium and with whoever the next start accepts as a reader.
//!
//! A history is any order of: two writes of two regions, a guest's flush, the ends of operations
//! of the backing (also overtaking each other), the taking and the writing of a commit, a copied
//! chunk, the release by the target, and a kill. A crash may lose each write that no flush has
//! covered, and each sector of the state file that was not synced, wholly or in part.

#![allow(clippy::unwrap_used)] // what cannot fail here fails the test

use std::collections::BTreeMap;
use std::io;

use farshore_blkfilter::backing::{FileIdentity, Identity};
use farshore_blkfilter::control::DescriptorBody;
use farshore_blkfilter::core::{
    Action, Attach, Backing, Buffer, CaptureCore, Event, Faults, IntentCommit, IntentStart, IoKey,
    Limits, NewPart, Now, Outcome, QueueId, RegionMap, Start, Token, VolumeKey,
};
use farshore_blkfilter::volume_state::{Begin, Geometry, Medium, Plan, StateFile, plan};
use farshore_extent::{BlockSizes, ChunkSize, Epoch, Extent, Lsn, SECTOR, VolumeId, VolumeSize};

/// A region is one chunk here; of each only the first sector is used.
const REGION: u64 = 2048;
const REGIONS: usize = 3;
/// Until the volume grows.
const REGIONS_AT_FIRST: usize = 2;
const VOLUME: VolumeId = VolumeId::from_bytes([9; 16]);

/// Content of the first sector of each region.
type Image = [u64; REGIONS];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Write(usize),
    Flush,
    /// The operation at this place of those in flight ends.
    End(usize),
    Take,
    Commit,
    Copy,
    Release,
    /// The disk gets its last region, with content, and the volume takes it over.
    Grow,
    /// filterd is killed and starts again.
    Kill,
}

/// Sectors that were written and not synced, by place in bytes.
type Unsynced = Vec<(usize, Vec<u8>)>;

/// The disk of the state file: what is durable, and sectors written since.
#[derive(Debug, Clone, Default)]
struct StateDisk {
    durable: Vec<u8>,
    unsynced: Unsynced,
    /// As it was before and after each write and sync: where the power may go.
    moments: Vec<(Vec<u8>, Unsynced)>,
}

fn put(bytes: &mut Vec<u8>, at: usize, sector: &[u8]) {
    let end = at + sector.len();
    bytes.resize(bytes.len().max(end), 0);
    bytes[at..end].copy_from_slice(sector);
}

impl StateDisk {
    fn of(durable: Vec<u8>) -> Self {
        Self { durable, ..Self::default() }
    }

    fn note(&mut self) {
        self.moments.push((self.durable.clone(), self.unsynced.clone()));
    }

    /// Everything that was written, as a kill leaves it.
    fn written(&self) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        self.unsynced.iter().for_each(|(at, sector)| put(&mut bytes, *at, sector));
        bytes
    }
}

/// What may be on the disk: of each unsynced sector nothing, a part, or all.
fn crashed(durable: &[u8], unsynced: &[(usize, Vec<u8>)]) -> Vec<Vec<u8>> {
    let mut all = vec![durable.to_vec()];
    for (at, sector) in unsynced {
        let before = all.clone();
        for part in [44, sector.len()] {
            all.extend(before.iter().cloned().map(|mut bytes| {
                put(&mut bytes, *at, &sector[..part]);
                bytes
            }));
        }
    }
    all
}

impl Medium for StateDisk {
    fn read(&self) -> io::Result<Vec<u8>> {
        Ok(self.written())
    }

    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        for (index, sector) in bytes.chunks(512).enumerate() {
            self.unsynced.push((at + index * 512, sector.to_vec()));
        }
        self.note();
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.durable = self.written();
        self.unsynced.clear();
        self.note();
        Ok(())
    }

    fn read_ranges(&self) -> io::Result<Vec<u8>> {
        Ok(Vec::new())
    }

    fn write_ranges(&mut self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// An operation that the backing has been given, and applied.
#[derive(Debug)]
struct Running {
    io: IoKey,
    what: Backing,
    value: u64,
    /// Writes that a flush that began here makes durable.
    covers: Vec<u64>,
}

struct World {
    core: CaptureCore,
    key: Option<VolumeKey>,
    regions: usize,
    epoch: Epoch,
    faults: Faults,
    state: StateFile<StateDisk>,
    commit: Option<IntentCommit>,
    intent_wanted: bool,
    running: Vec<Running>,
    /// Values of requests by token.
    values: BTreeMap<Token, u64>,
    medium: Image,
    kept: Image,
    /// (region, value, completed): not covered by a flush yet.
    cache: Vec<(usize, u64, bool)>,
    /// What a reader has at each place.
    replica: BTreeMap<Lsn, Image>,
    next: u64,
    /// This step is looked at; the ones before it have been.
    looks: bool,
}

fn size(regions: usize) -> VolumeSize {
    VolumeSize::new(REGION * regions as u64).unwrap()
}

fn geometry(regions: usize) -> Geometry {
    Geometry { volume: VOLUME, size: size(regions), blocks: BlockSizes::E512, region: REGION }
}

fn identity() -> Identity {
    Identity::File(FileIdentity { dev: 1, ino: 2, size: 3, mtime_ns: 0, ctime_ns: 0 })
}

fn plan_of(bytes: Vec<u8>, regions: usize) -> Plan {
    let found = StateFile::new(StateDisk::of(bytes)).load(VOLUME);
    plan(&found, &geometry(regions), Some(&identity()))
}

fn region_of(extent: Extent) -> usize {
    usize::try_from(extent.offset() / REGION).unwrap()
}

fn first_sector(region: usize) -> Extent {
    Extent::new(region as u64 * REGION, SECTOR).unwrap()
}

impl World {
    /// A volume that the target has, ordered.
    fn new(faults: Faults) -> Self {
        let released = Lsn::new(Epoch::new(1), farshore_extent::Seq::new(7));
        let state = StateFile::new(StateDisk::default());
        let mut world = Self {
            core: CaptureCore::new(Epoch::new(1), Limits::default()),
            key: None,
            regions: REGIONS_AT_FIRST,
            epoch: Epoch::new(1),
            faults,
            state,
            commit: None,
            intent_wanted: true,
            running: Vec::new(),
            values: BTreeMap::new(),
            // What lies behind the end was never the volume's.
            medium: [0, 0, 77],
            kept: [0, 0, 77],
            cache: Vec::new(),
            replica: BTreeMap::from([(released, [0; REGIONS])]),
            next: 1,
            looks: false,
        };
        let set = RegionMap::new(size(REGIONS_AT_FIRST), REGION);
        world.start(Plan { start: Start::Continues { last: released }, set, released });
        world
    }

    fn start(&mut self, plan: Plan) {
        self.epoch = self.epoch.next();
        let (epoch, set, released) = (self.epoch, &plan.set, plan.released);
        let geometry = geometry(self.regions);
        let begin = Begin { geometry, epoch, identity: Some(identity()), set, released };
        self.state.begin(&begin).unwrap();
        let limits = Limits { faults: self.faults, pool_align: SECTOR, ..Limits::default() };
        self.core = CaptureCore::new(epoch, limits);
        let attach = Attach {
            volume: VOLUME,
            size: size(self.regions),
            blocks: BlockSizes::E512,
            chunk: ChunkSize::tiny(REGION),
            pool_bytes: 64 << 10,
            start: plan.start,
            intent: Some(IntentStart { set: plan.set, cap: 1 }),
        };
        let mut out = Vec::new();
        self.key = Some(self.core.attach(Now::default(), attach, &mut out).unwrap());
        (self.commit, self.intent_wanted) = (None, true);
        self.running.clear();
        self.values.clear();
        self.act(out);
        self.record(0);
    }

    fn key(&self) -> VolumeKey {
        self.key.unwrap()
    }

    /// What can happen next.
    fn steps(&self, past: &[Step]) -> Vec<Step> {
        let count = |wanted: fn(&Step) -> bool| past.iter().filter(|s| wanted(s)).count();
        let mut steps = Vec::new();
        if count(|s| matches!(s, Step::Write(_))) < 3 {
            steps.extend([Step::Write(0), Step::Write(1)]);
            let marked = self.core.status(self.key()).unwrap().intent.unwrap().durable_size;
            if self.regions == REGIONS && marked == size(REGIONS) {
                steps.push(Step::Write(2));
            }
        }
        if self.regions < REGIONS && past.len() < 4 {
            steps.push(Step::Grow);
        }
        let flushing = self.running.iter().any(|r| r.what == Backing::Flush);
        if count(|s| *s == Step::Flush) < 1 && !flushing && !self.cache.is_empty() {
            steps.push(Step::Flush);
        }
        steps.extend((0..self.running.len().min(2)).map(Step::End));
        if self.commit.is_some() {
            steps.push(Step::Commit);
        } else if self.intent_wanted {
            steps.push(Step::Take);
        }
        let status = self.core.status(self.key()).unwrap();
        if status.captured > status.released {
            steps.push(Step::Release);
        }
        if status.dirty_bytes > 0 && past.last() != Some(&Step::Copy) {
            steps.push(Step::Copy);
        }
        if count(|s| *s == Step::Kill) < 1 && past.last() == Some(&Step::Commit) {
            steps.push(Step::Kill);
        }
        steps
    }

    fn take(&mut self, step: Step) -> Result<(), String> {
        let (queue, volume, token) = (QueueId(1), self.key(), Token(self.next));
        self.next += 1;
        match step {
            Step::Write(region) => {
                self.values.insert(token, self.next);
                let slot = self.core.reserve(volume, 512).unwrap();
                let (extent, buffer) = (first_sector(region), Buffer::Pool(slot));
                let pieces = Vec::new();
                let (crc, fua) = (0, false);
                self.step(Event::Write { queue, token, volume, extent, buffer, crc, pieces, fua });
            }
            Step::Flush => self.step(Event::Flush { queue, token, volume }),
            Step::End(at) => {
                let running = self.running.remove(at);
                self.end(&running, Outcome::Done);
            }
            Step::Take => {
                self.intent_wanted = false;
                self.commit = self.core.take_intent(volume);
            }
            Step::Commit => {
                let commit = self.commit.take().unwrap();
                let end = self.state.commit(&commit);
                // What waits for it is not on its way to the medium yet.
                self.check()?;
                self.step(Event::IntentDone { volume, end });
            }
            Step::Copy => {
                self.step(Event::Copy { queue, token, volume, hole: None });
                let read = |r: &Running| matches!(r.what, Backing::Read { .. });
                let Some(at) = self.running.iter().position(read) else { return Ok(()) };
                let mut running = self.running.remove(at);
                let Backing::Read { extent, .. } = running.what else { return Ok(()) };
                running.value = self.medium[region_of(extent)];
                self.end(&running, Outcome::Data { crc: 0 });
            }
            Step::Release => {
                let upto = self.core.status(volume).unwrap().captured;
                let mut out = Vec::new();
                self.core.release(Now::default(), volume, upto, &mut out).unwrap();
                self.act(out);
            }
            Step::Grow => {
                self.regions = REGIONS;
                let (size, mut out) = (size(REGIONS), Vec::new());
                let part = NewPart::Unknown;
                self.core.grow(Now::default(), volume, size, part, &mut out).unwrap();
                self.act(out);
                self.record(0);
            }
            Step::Kill => {
                // The reader has what was released; what was on its way to the medium is there.
                let has = self.core.status(volume).unwrap().released;
                self.replica.retain(|at, _| *at <= has);
                self.cache.iter_mut().for_each(|write| write.2 = true);
                let medium = std::mem::take(self.state.medium_mut());
                let plan = plan_of(medium.written(), self.regions);
                self.state = StateFile::new(medium);
                self.state.load(VOLUME);
                self.start(plan);
            }
        }
        self.check()
    }

    fn end(&mut self, running: &Running, outcome: Outcome) {
        match running.what {
            Backing::Write { extent, .. } => {
                let (region, value) = (region_of(extent), running.value);
                let same = |w: &&mut (usize, u64, bool)| w.0 == region && w.1 == value;
                self.cache.iter_mut().find(same).unwrap().2 = true;
            }
            Backing::Flush => {
                for (region, value, _) in &self.cache {
                    if running.covers.contains(value) {
                        self.kept[*region] = *value;
                    }
                }
                self.cache.retain(|(_, value, _)| !running.covers.contains(value));
            }
            Backing::Zero { .. }
            | Backing::Read { .. }
            | Backing::Digest { .. }
            | Backing::CheckHole { .. } => {}
        }
        self.step(Event::BackingDone { io: running.io, outcome });
        self.record(running.value);
    }

    fn step(&mut self, event: Event) {
        let mut out = Vec::new();
        self.core.step(Now::default(), event, &mut out);
        self.act(out);
    }

    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Backing { token, io, what, .. } => self.begin(io, what, token),
                Action::FlushWanted { io, .. } => self.begin(io, Backing::Flush, Token(0)),
                Action::IntentWanted { .. } => self.intent_wanted = true,
                Action::Answer { .. }
                | Action::CopyDone { .. }
                | Action::Recorded { .. }
                | Action::CopyWanted { .. }
                | Action::HoldBroken { .. } => {}
            }
        }
    }

    /// A write reaches the medium's cache at once: a crash decides whether it stays.
    fn begin(&mut self, io: IoKey, what: Backing, token: Token) {
        let value = self.values.get(&token).copied().unwrap_or(0);
        if let Backing::Write { extent, .. } = what {
            self.cache.push((region_of(extent), value, false));
            self.medium[region_of(extent)] = value;
        }
        let completed = self.cache.iter().filter(|w| w.2).map(|w| w.1);
        let covers = if what == Backing::Flush { completed.collect() } else { Vec::new() };
        self.running.push(Running { io, what, value, covers });
    }

    /// Applies new records, all made of `value`, to what a reader has.
    fn record(&mut self, value: u64) {
        let (mut at, mut image) = self.replica.last_key_value().map(|(l, i)| (*l, *i)).unwrap();
        let mut records = Vec::new();
        self.core.fetch(self.key(), at, 100, u64::MAX, &mut records).unwrap();
        for record in records {
            at = Lsn::new(self.epoch, record.seq);
            if let DescriptorBody::Write { extent, .. } | DescriptorBody::Copy { extent, .. } =
                record.body
            {
                image[region_of(extent)] = value;
            }
            self.replica.insert(at, image);
        }
    }

    /// Every crash that may happen now, or happened during the last step.
    fn check(&mut self) -> Result<(), String> {
        let disk = self.state.medium_mut();
        disk.note();
        let moments = std::mem::take(&mut disk.moments);
        if !self.looks {
            return Ok(());
        }
        for (durable, unsynced) in moments {
            for bytes in crashed(&durable, &unsynced) {
                self.check_start(&plan_of(bytes, self.regions))?;
            }
        }
        Ok(())
    }

    /// Regions that are not sent are the same, whatever the crash left on the medium, with every
    /// reader that is not refused.
    fn check_start(&self, plan: &Plan) -> Result<(), String> {
        let sent: Vec<usize> = match &plan.start {
            Start::Copy { .. } | Start::Compare { .. } => return Ok(()),
            Start::Continues { .. } => return Err("a crash is taken for a clean stop".into()),
            Start::CopyPart { ranges, .. } => ranges.iter().map(|r| region_of(*r)).collect(),
        };
        for region in (0..self.regions).filter(|region| !sent.contains(region)) {
            let cached = self.cache.iter().filter(|w| w.0 == region).map(|w| w.1);
            let possible: Vec<u64> = cached.chain([self.kept[region]]).collect();
            for (at, image) in self.replica.range(plan.released..) {
                if possible.iter().any(|value| *value != image[region]) {
                    return Err(format!(
                        "region {region} is left out; the medium may hold {possible:?}, and a \
                         reader with everything up to {at} has {}",
                        image[region]
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Runs every history up to `depth` steps; the first that breaks the promise, and how many.
fn explore(faults: Faults, depth: usize) -> (u64, Option<(Vec<Step>, String)>) {
    let mut histories = 0;
    let mut stack: Vec<Vec<Step>> = vec![Vec::new()];
    while let Some(past) = stack.pop() {
        let mut world = World::new(faults);
        let checked = past.iter().enumerate().try_for_each(|(at, step)| {
            world.looks = at + 1 == past.len();
            world.take(*step)
        });
        histories += 1;
        if let Err(why) = checked {
            return (histories, Some((past, why)));
        }
        if past.len() < depth {
            for step in world.steps(&past) {
                let mut more = past.clone();
                more.push(step);
                stack.push(more);
            }
        }
    }
    (histories, None)
}

#[test]
fn no_crash_of_a_short_history_leaves_out_what_differs() {
    let depth = if std::env::var_os("FARSHORE_SOAK").is_some() { 12 } else { 9 };
    let (histories, failure) = explore(Faults::default(), depth);
    if let Some((steps, why)) = failure {
        panic!("{why}\nafter {steps:?}");
    }
    println!("{histories} histories of at most {depth} steps");
    assert!(histories > 10_000, "only {histories} histories");
}

fn must_be_found(faults: Faults) {
    let (histories, failure) = explore(faults, 10);
    let (steps, why) = failure.expect("no history notices this fault");
    println!("found after {histories} histories: {why}\n{steps:?}");
}

#[test]
fn a_write_before_its_bit_is_found() {
    must_be_found(Faults { intent_not_waited_for: true, ..Faults::default() });
}

#[test]
fn a_bit_cleared_without_flush_is_found() {
    must_be_found(Faults { intent_cleared_without_flush: true, ..Faults::default() });
}

#[test]
fn a_bit_cleared_before_the_release_is_found() {
    must_be_found(Faults { intent_cleared_before_release: true, ..Faults::default() });
}
