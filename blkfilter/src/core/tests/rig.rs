//! A core with simulated disks, pools and readers. A disk's write takes effect at a moment of the
//! test's choosing between submission and completion.

use std::collections::BTreeMap;

use farshore_extent::{
    BlockSizes, ChunkSize, Epoch, Extent, GroupId, Lsn, MarkerId, PointKind, VolumeId, VolumeSize,
    WallTime,
};

use super::super::*;
use crate::control::{CompareAnswer, Descriptor, DescriptorBody, PoolPlace};
use crate::device::DeviceError;

/// Bytes of a sector; a sector's content is one number.
pub(super) const UNIT: u64 = 512;
/// Content of a replica's sector that was never sent.
pub(super) const NEVER: u64 = u64::MAX;
/// Sectors of a chunk.
pub(super) const CHUNK: u64 = 4;

pub(super) fn sectors(first: u64, count: u64) -> Extent {
    Extent::new(first * UNIT, count * UNIT).unwrap()
}

fn range(extent: Extent) -> std::ops::Range<usize> {
    let at = |byte: u64| usize::try_from(byte / UNIT).unwrap();
    at(extent.offset())..at(extent.end())
}

pub(super) fn crc_of(content: &[u64]) -> u32 {
    let bytes: Vec<u8> = content.iter().flat_map(|n| n.to_le_bytes()).collect();
    crc32c::crc32c(&bytes)
}

fn digest_of(content: &[u64]) -> [u8; 32] {
    let bytes: Vec<u8> = content.iter().flat_map(|n| n.to_le_bytes()).collect();
    *blake3::hash(&bytes).as_bytes()
}

/// An operation that the backing has been given.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) io: IoKey,
    pub(super) token: Token,
    pub(super) volume: VolumeKey,
    pub(super) what: Backing,
    pub(super) took_effect: bool,
    read: Vec<u64>,
}

/// A reader's idea of a volume.
#[derive(Debug)]
pub(super) struct Replica {
    pub(super) image: Vec<u64>,
    pub(super) after: Lsn,
    pub(super) ordered: bool,
    pub(super) records: Vec<Descriptor>,
    /// Extents whose digests differed since the last answer.
    pub(super) differing: Vec<Extent>,
    /// Image after each number, while ordered.
    pub(super) cuts: Vec<(u64, Vec<u64>)>,
}

pub(super) struct Rig {
    pub(super) core: CaptureCore,
    pub(super) now: Now,
    pub(super) keys: Vec<VolumeKey>,
    pub(super) disks: Vec<Vec<u64>>,
    pub(super) pools: Vec<Vec<u64>>,
    pub(super) replicas: Vec<Replica>,
    pub(super) running: Vec<Running>,
    pub(super) answers: BTreeMap<Token, Result<(), DeviceError>>,
    pub(super) copy_ends: Vec<CopyEnd>,
    pub(super) copy_wanted: bool,
    pub(super) broken: Vec<MarkerId>,
    /// For the next volume.
    pub(super) intent: Option<IntentStart>,
    pub(super) intent_wanted: bool,
    pub(super) own_flush: Option<IoKey>,
    /// Content of writes in spare buffers.
    spare: BTreeMap<Token, Vec<u64>>,
    owner: BTreeMap<Token, VolumeKey>,
    next: u64,
    out: Vec<Action>,
}

pub(super) fn limits() -> Limits {
    Limits { pool_align: UNIT, ..Limits::default() }
}

pub(super) fn copy_start() -> Start {
    Start::Copy { reason: "first copy".into() }
}

pub(super) fn compare_start() -> Start {
    Start::Compare { reason: "unclean start".into() }
}

pub(super) fn continues() -> Start {
    Start::Continues { last: Lsn::ZERO }
}

pub(super) fn attach(size: u64, pool: u64, start: Start) -> Attach {
    Attach {
        volume: VolumeId::random(),
        size: VolumeSize::new(size * UNIT).unwrap(),
        blocks: BlockSizes::E512,
        chunk: ChunkSize::tiny(CHUNK * UNIT),
        pool_bytes: pool * UNIT,
        start,
        intent: None,
    }
}

impl Rig {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            core: CaptureCore::new(Epoch::new(7), limits),
            now: Now { wall: WallTime::from_nanos(1), mono_ms: 1 },
            keys: vec![],
            disks: vec![],
            pools: vec![],
            replicas: vec![],
            running: vec![],
            answers: BTreeMap::new(),
            copy_ends: vec![],
            copy_wanted: false,
            broken: vec![],
            intent: None,
            intent_wanted: false,
            own_flush: None,
            spare: BTreeMap::new(),
            owner: BTreeMap::new(),
            next: 1,
            out: vec![],
        }
    }

    /// One volume of `size` sectors that continues an ordered history, pool of `pool` sectors.
    pub(super) fn ordered(size: u64, pool: u64) -> (Self, VolumeKey) {
        let mut rig = Self::new(limits());
        let key = rig.attach(size, pool, continues());
        (rig, key)
    }

    pub(super) fn attach(&mut self, size: u64, pool: u64, start: Start) -> VolumeKey {
        let ordered = start == continues();
        let intent = self.intent.take();
        let attach = Attach { intent, ..attach(size, pool, start) };
        let key = self.core.attach(self.now, attach, &mut self.out).unwrap();
        let len = usize::try_from(size).unwrap();
        self.keys.push(key);
        self.disks.push(vec![0; len]);
        self.pools.push(vec![0; usize::try_from(pool).unwrap()]);
        self.replicas.push(Replica {
            image: vec![if ordered { 0 } else { NEVER }; len],
            after: Lsn::ZERO,
            ordered: false,
            records: vec![],
            differing: vec![],
            cuts: vec![],
        });
        self.act();
        key
    }

    pub(super) fn token(&mut self, volume: VolumeKey) -> Token {
        self.next += 1;
        let token = Token(self.next);
        self.owner.insert(token, volume);
        token
    }

    /// A guest's write of one number into all sectors; the number is the token's.
    pub(super) fn write(&mut self, volume: VolumeKey, extent: Extent) -> Token {
        let token = self.token(volume);
        let count = range(extent).len();
        let len = u32::try_from(extent.len()).unwrap();
        let content = vec![token.0; count];
        let crc = crc_of(&content);
        let buffer = match self.core.reserve(volume, len) {
            Some(slot) => {
                let at = usize::try_from(slot.offset() / UNIT).unwrap();
                self.pools[volume.index()][at..at + count].copy_from_slice(&content);
                Buffer::Pool(slot)
            }
            None => {
                self.spare.insert(token, content);
                Buffer::Spare
            }
        };
        let pieces = extent.split_at_multiples_of(CHUNK * UNIT);
        let pieces = pieces.map(|p| crc_of(&vec![token.0; range(p).len()])).collect();
        let queue = QueueId(0);
        self.step(Event::Write { queue, token, volume, extent, buffer, crc, pieces, fua: false });
        token
    }

    pub(super) fn zero(&mut self, volume: VolumeKey, extent: Extent) -> Token {
        let token = self.token(volume);
        let queue = QueueId(0);
        self.step(Event::Zero { queue, token, volume, extent, fua: false, may_unmap: true });
        token
    }

    pub(super) fn flush(&mut self, volume: VolumeKey) -> Token {
        let token = self.token(volume);
        self.step(Event::Flush { queue: QueueId(0), token, volume });
        token
    }

    pub(super) fn copy(&mut self, volume: VolumeKey, hole: Option<Extent>) -> Token {
        let token = self.token(volume);
        self.copy_wanted = false;
        self.step(Event::Copy { queue: QueueId(1), token, volume, hole });
        token
    }

    pub(super) fn spec(&self, volumes: &[VolumeKey]) -> MarkerSpec {
        MarkerSpec {
            marker: MarkerId::random(),
            volumes: volumes.to_vec(),
            kind: PointKind::Crash,
            group: GroupId::NIL,
            name: String::new(),
            pending: false,
        }
    }

    pub(super) fn command<T>(
        &mut self,
        act: impl FnOnce(&mut CaptureCore, Now, &mut Vec<Action>) -> T,
    ) -> T {
        let value = act(&mut self.core, self.now, &mut self.out);
        self.act();
        value
    }

    pub(super) fn step(&mut self, event: Event) {
        self.core.step(self.now, event, &mut self.out);
        self.act();
    }

    fn act(&mut self) {
        for action in std::mem::take(&mut self.out) {
            match action {
                Action::Backing { token, io, what, .. } => {
                    let volume = self.owner[&token];
                    let (took_effect, read) = (false, vec![]);
                    self.running.push(Running { io, token, volume, what, took_effect, read });
                }
                Action::Answer { token, result, .. } => {
                    assert!(self.answers.insert(token, result).is_none(), "answered twice");
                }
                Action::CopyDone { end, .. } => self.copy_ends.push(end),
                Action::CopyWanted { .. } => self.copy_wanted = true,
                Action::HoldBroken { marker } => self.broken.push(marker),
                Action::Recorded { .. } => {}
                Action::IntentWanted { .. } => self.intent_wanted = true,
                Action::FlushWanted { io, .. } => self.own_flush = Some(io),
            }
        }
    }

    pub(super) fn running(&self, token: Token) -> Option<usize> {
        self.running.iter().position(|r| r.token == token)
    }

    /// The medium changes (or is read) now; the completion comes later.
    pub(super) fn take_effect(&mut self, index: usize) {
        let run = &mut self.running[index];
        run.took_effect = true;
        let disk = &mut self.disks[run.volume.index()];
        let pool = &self.pools[run.volume.index()];
        match run.what {
            Backing::Write { extent, buffer: Buffer::Pool(slot), .. } => {
                let at = usize::try_from(slot.offset() / UNIT).unwrap();
                let count = range(extent).len();
                disk[range(extent)].copy_from_slice(&pool[at..at + count]);
            }
            Backing::Write { extent, buffer: Buffer::Spare, .. } => {
                disk[range(extent)].copy_from_slice(&self.spare[&run.token]);
            }
            Backing::Zero { extent, .. } => disk[range(extent)].fill(0),
            Backing::Flush => {}
            Backing::Read { extent, .. }
            | Backing::Digest { extent, .. }
            | Backing::CheckHole { extent } => {
                run.read = disk[range(extent)].to_vec();
            }
        }
    }

    pub(super) fn complete(&mut self, index: usize, failure: Option<DeviceError>) {
        if !self.running[index].took_effect && failure.is_none() {
            self.take_effect(index);
        }
        let run = self.running.remove(index);
        let pool = &mut self.pools[run.volume.index()];
        let outcome = match (failure, run.what) {
            (Some(error), _) => Outcome::Failed(error),
            (None, Backing::Write { .. } | Backing::Zero { .. } | Backing::Flush) => Outcome::Done,
            (None, Backing::Read { .. }) if run.read.iter().all(|n| *n == 0) => Outcome::Zeroes,
            (None, Backing::Read { slot, .. }) => {
                let at = usize::try_from(slot.offset() / UNIT).unwrap();
                pool[at..at + run.read.len()].copy_from_slice(&run.read);
                Outcome::Data { crc: crc_of(&run.read) }
            }
            (None, Backing::Digest { .. }) => Outcome::Digest {
                digest: digest_of(&run.read),
                zero: run.read.iter().all(|n| *n == 0),
            },
            (None, Backing::CheckHole { .. }) if run.read.iter().all(|n| *n == 0) => {
                Outcome::Zeroes
            }
            (None, Backing::CheckHole { .. }) => Outcome::NotHole,
        };
        self.step(Event::BackingDone { io: run.io, outcome });
    }

    /// Completes the request with this token, which must be running.
    pub(super) fn finish(&mut self, token: Token) {
        let index = self.running(token).expect("the request runs on the backing");
        self.complete(index, None);
    }

    pub(super) fn finish_all(&mut self) {
        while !self.running.is_empty() {
            self.complete(0, None);
        }
    }

    pub(super) fn answered(&self, token: Token) -> bool {
        self.answers.contains_key(&token)
    }

    /// The reader takes up to `max` records and applies them. False: a payload was damaged.
    pub(super) fn read(&mut self, volume: VolumeKey, max: usize) -> bool {
        let index = volume.index();
        let mut records = vec![];
        let after = self.replicas[index].after;
        self.core.fetch(volume, after, max, u64::MAX, &mut records).unwrap();
        let epoch = self.core.epoch();
        let mut intact = true;
        for record in records {
            let replica = &mut self.replicas[index];
            let lsn = Lsn::new(epoch, record.seq);
            intact &= lsn > replica.after;
            replica.after = lsn;
            intact &= apply(replica, &record.body, &self.pools[index]);
            if replica.ordered {
                replica.cuts.push((record.seq.get(), replica.image.clone()));
            }
            replica.records.push(record);
        }
        intact
    }

    /// The reader says that everything it took is durable, and what of it differs.
    pub(super) fn release(&mut self, volume: VolumeKey) {
        let differing = std::mem::take(&mut self.replicas[volume.index()].differing);
        self.release_and_answer(volume, &CompareAnswer::Differing(differing));
    }

    /// The same, but the answers to digests are lost on the way.
    pub(super) fn release_and_lose_answers(&mut self, volume: VolumeKey) {
        self.replicas[volume.index()].differing.clear();
        self.release_and_answer(volume, &CompareAnswer::Lost);
    }

    fn release_and_answer(&mut self, volume: VolumeKey, answer: &CompareAnswer) {
        let upto = self.replicas[volume.index()].after;
        self.command(|core, now, out| core.release(now, volume, upto, out)).unwrap();
        self.command(|core, now, out| core.compared(now, volume, upto, answer, out)).unwrap();
    }

    pub(super) fn read_and_release(&mut self, volume: VolumeKey) {
        assert!(self.read(volume, usize::MAX), "a payload was damaged");
        self.release(volume);
    }

    /// The disk becomes larger, with old content in its new part unless that is `part`, and the
    /// core is told.
    pub(super) fn grow(
        &mut self,
        volume: VolumeKey,
        size: u64,
        part: NewPart,
    ) -> Result<bool, Refused> {
        let units = usize::try_from(size).unwrap();
        let disk = &mut self.disks[volume.index()];
        let content = if part == NewPart::Zero { 0 } else { 0xDEAD };
        disk.resize(disk.len().max(units), content);
        let size = VolumeSize::new(size * UNIT).unwrap();
        self.command(|core, now, out| core.grow(now, volume, size, part, out))
    }

    /// Runs everything to its end: requests, copies, verifies, reader.
    pub(super) fn drain(&mut self) {
        for _ in 0..10_000 {
            self.finish_all();
            let mut busy = false;
            for key in self.keys.clone() {
                self.read_and_release(key);
                if self.core.is_catching_up(key) || self.status(key).verify.running {
                    self.copy(key, None);
                    busy = true;
                }
                busy |= self.status(key).records > 0;
            }
            if !busy && self.running.is_empty() {
                return;
            }
        }
        panic!("the copy loop does not come to an end");
    }

    pub(super) fn bodies(&self, volume: VolumeKey) -> Vec<DescriptorBody> {
        let mut records = vec![];
        let epoch_only = Lsn::ZERO;
        self.core.fetch(volume, epoch_only, usize::MAX, u64::MAX, &mut records).unwrap();
        records.into_iter().map(|r| r.body).collect()
    }

    /// The records after the epoch's start, in short words.
    pub(super) fn story(&self, volume: VolumeKey) -> Vec<String> {
        self.bodies(volume).iter().skip(1).map(word).collect()
    }

    pub(super) fn status(&self, volume: VolumeKey) -> CoreStatus {
        self.core.status(volume).unwrap()
    }
}

fn apply(replica: &mut Replica, body: &DescriptorBody, pool: &[u64]) -> bool {
    let mut data = |extent: Extent, place: PoolPlace| {
        let at = usize::try_from(place.offset / UNIT).unwrap();
        let content = &pool[at..at + range(extent).len()];
        replica.image[range(extent)].copy_from_slice(content);
        crc_of(content) == place.crc
    };
    match body {
        DescriptorBody::Write { extent, place } | DescriptorBody::Copy { extent, place } => {
            return data(*extent, *place);
        }
        DescriptorBody::Zero { extent, .. } => replica.image[range(*extent)].fill(0),
        DescriptorBody::OrderLost => replica.ordered = false,
        DescriptorBody::OrderRestored => replica.ordered = true,
        DescriptorBody::EpochStart { continues, .. } => replica.ordered = *continues,
        DescriptorBody::Hash { extent, digest, .. } => {
            if digest_of(&replica.image[range(*extent)]) != *digest {
                replica.differing.push(*extent);
            }
        }
        DescriptorBody::Unknown { .. }
        | DescriptorBody::Marker { .. }
        | DescriptorBody::MarkerCommit(_)
        | DescriptorBody::MarkerAbort(_) => {}
        DescriptorBody::Resize(size) => replica.image.resize(range(size.extent()).len(), 0),
    }
    true
}

fn word(body: &DescriptorBody) -> String {
    let at = |extent: &Extent| format!("{}+{}", extent.offset() / UNIT, extent.len() / UNIT);
    match body {
        DescriptorBody::Write { extent, .. } => format!("write {}", at(extent)),
        DescriptorBody::Copy { extent, .. } => format!("copy {}", at(extent)),
        DescriptorBody::Zero { extent, copied: false } => format!("zero {}", at(extent)),
        DescriptorBody::Zero { extent, copied: true } => format!("hole {}", at(extent)),
        DescriptorBody::Unknown { extent } => format!("unknown {}", at(extent)),
        DescriptorBody::Hash { extent, .. } => format!("hash {}", at(extent)),
        DescriptorBody::Marker { .. } => "marker".into(),
        DescriptorBody::MarkerCommit(_) => "commit".into(),
        DescriptorBody::MarkerAbort(_) => "abort".into(),
        DescriptorBody::OrderLost => "lost".into(),
        DescriptorBody::OrderRestored => "restored".into(),
        DescriptorBody::Resize(_) => "resize".into(),
        DescriptorBody::EpochStart { .. } => "epoch".into(),
    }
}
