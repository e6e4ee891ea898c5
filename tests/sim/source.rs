//! The source host: the real capture core over simulated backing devices, with guests that write.
//!
//! A backing operation is applied to the medium and completed at separate, random moments, so the
//! medium sees overlapping operations in another order than they complete, as real disks do.

mod grow;

use std::collections::BTreeMap;

use farshore_blkfilter::control::{CompareAnswer, Descriptor};
use farshore_blkfilter::core::{
    Action, Backing, Buffer, CaptureCore, CopyEnd, Event, Faults, HoldEnd, IoKey, Limits,
    MarkerSpec, Now, Outcome, QueueId, Token,
};
use farshore_blkfilter::device::DeviceError;
use farshore_extent::{
    CaptureOrder, Epoch, Extent, GroupId, Lsn, MarkerId, PointKind, SECTOR, VolumeId, WallTime,
};

use crate::coverage::{Coverage, Seen};
use crate::disk::{Disk, Unflushed};
use crate::oracle::{Content, content_of, sector_bytes, sectors};
use crate::rng::Rng;

const GUEST: QueueId = QueueId(0);
const COPIER: QueueId = QueueId(1);

/// An operation of a guest or of the copy loop, from submission to its end.
pub struct InFlight {
    disk: usize,
    io: IoKey,
    token: Token,
    what: Backing,
    pub applied: bool,
    fails: bool,
    /// A flush: writes that had completed when it began.
    covers: Vec<u64>,
}

/// What a guest remembers of a request it has made.
pub struct Asked {
    disk: usize,
    content: Vec<Content>,
    /// The highest number among the writes it had seen answered.
    after: Lsn,
    /// Number of its completion.
    number: Option<Lsn>,
}

/// A hold of the gate that is on.
pub struct Held {
    marker: MarkerId,
    at: Lsn,
}

/// The source host.
pub struct Source {
    pub core: CaptureCore,
    pub disks: Vec<Disk>,
    pub(crate) limits: Limits,
    pub(crate) epoch: Epoch,
    now_ms: u64,
    pub(crate) in_flight: Vec<InFlight>,
    pub(crate) asked: BTreeMap<Token, Asked>,
    pub(crate) spares: BTreeMap<Token, Vec<u8>>,
    answered: Lsn,
    pub(crate) held: Option<Held>,
    next_token: u64,
    next_content: Content,
    next_write: u64,
    pub(crate) actions: Vec<Action>,
}

const POOL_ALIGN: u64 = 512;

impl Source {
    pub fn new(rng: &mut Rng, faults: Faults) -> Self {
        let limits = Limits {
            max_records: if rng.chance(300) { 8 + rng.index(64) } else { 4096 },
            control_headroom: 64,
            max_pending_markers: 8,
            max_hold_ms: 50,
            throttle_ms: if rng.chance(200) { 1 + rng.index(20) as u64 } else { 0 },
            pool_align: POOL_ALIGN,
            faults,
        };
        let disks = (0..1 + rng.index(2)).map(|_| Disk::new(rng)).collect();
        let epoch = Epoch::new(1);
        let mut source = Self {
            core: CaptureCore::new(epoch, limits.clone()),
            disks,
            limits,
            epoch,
            now_ms: 1,
            in_flight: Vec::new(),
            asked: BTreeMap::new(),
            spares: BTreeMap::new(),
            answered: Lsn::ZERO,
            held: None,
            next_token: 1,
            next_content: 1,
            next_write: 1,
            actions: Vec::new(),
        };
        source.attach(rng, &mut Coverage::default());
        source
    }

    pub fn now(&self) -> Now {
        let nanos = i64::try_from(self.now_ms).expect("small") * 1_000_000;
        Now { wall: WallTime::from_nanos(nanos), mono_ms: self.now_ms }
    }

    pub fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
    }

    /// A guest asks for something; nothing happens when too much is in flight.
    pub fn guest(&mut self, rng: &mut Rng, coverage: &mut Coverage) {
        if self.asked.len() >= 12 {
            return;
        }
        let disk = rng.index(self.disks.len());
        let total = self.disks[disk].size.get() / SECTOR;
        // Hot places, so that requests overlap.
        let span = if rng.chance(600) { total.min(16) } else { total };
        let start = rng.below(span);
        let longest = if rng.chance(800) { 8 } else { 24 };
        let len = (1 + rng.below(longest)).min(total - start);
        let extent = Extent::new(start * SECTOR, len * SECTOR).expect("inside");
        let token = self.token();
        let fua = rng.chance(100);
        let count = sectors(extent).len();
        match rng.below(10) {
            0 => {
                let event = Event::Flush { queue: GUEST, token, volume: self.disks[disk].key() };
                self.ask(token, disk, Vec::new());
                self.step(event, coverage);
            }
            1 | 2 => {
                self.ask(token, disk, vec![0; count]);
                let volume = self.disks[disk].key();
                let may_unmap = rng.chance(500);
                let event = Event::Zero { queue: GUEST, token, volume, extent, fua, may_unmap };
                self.step(event, coverage);
            }
            _ => self.write(rng, disk, extent, token, fua, coverage),
        }
    }

    fn write(
        &mut self,
        rng: &mut Rng,
        disk: usize,
        extent: Extent,
        token: Token,
        fua: bool,
        coverage: &mut Coverage,
    ) {
        self.next_content += 1;
        let id = if rng.chance(50) { 0 } else { self.next_content };
        let content = vec![id; sectors(extent).len()];
        let bytes: Vec<u8> = content.iter().flat_map(|c| sector_bytes(*c)).collect();
        let volume = self.disks[disk].key();
        let len = u32::try_from(bytes.len()).expect("small");
        let buffer = match self.core.reserve(volume, len) {
            Some(slot) => {
                self.disks[disk].pool_mut(slot).copy_from_slice(&bytes);
                Buffer::Pool(slot)
            }
            None => {
                coverage.saw(Seen::PoolFull);
                self.spares.insert(token, bytes.clone());
                Buffer::Spare
            }
        };
        let pieces = extent
            .split_at_multiples_of(2048)
            .map(|p| {
                let at = usize::try_from(p.offset() - extent.offset()).expect("small");
                let end = at + usize::try_from(p.len()).expect("small");
                crc32c::crc32c(&bytes[at..end])
            })
            .collect();
        let crc = crc32c::crc32c(&bytes);
        self.ask(token, disk, content);
        let event = Event::Write { queue: GUEST, token, volume, extent, buffer, crc, pieces, fua };
        self.step(event, coverage);
    }

    fn ask(&mut self, token: Token, disk: usize, content: Vec<Content>) {
        let asked = Asked { disk, content, after: self.answered, number: None };
        self.asked.insert(token, asked);
    }

    fn token(&mut self) -> Token {
        self.next_token += 1;
        Token(self.next_token)
    }

    /// The copy loop of one volume takes a turn.
    pub fn copy(&mut self, rng: &mut Rng, coverage: &mut Coverage) {
        let disk = rng.index(self.disks.len());
        if self.disks[disk].copying || !self.disks[disk].copy_wanted {
            return;
        }
        let token = self.token();
        self.disks[disk].copying = true;
        self.ask(token, disk, Vec::new());
        let volume = self.disks[disk].key();
        let hole = self.core.peek_copy(volume).filter(|chunk| {
            let medium = &self.disks[disk].medium;
            medium[sectors(*chunk)].iter().all(|c| *c == 0)
        });
        self.step(Event::Copy { queue: COPIER, token, volume, hole }, coverage);
    }

    /// The backing device does something: applies an operation, or completes an applied one.
    pub fn backing(&mut self, rng: &mut Rng, coverage: &mut Coverage) {
        if self.in_flight.is_empty() {
            return;
        }
        let index = rng.index(self.in_flight.len());
        if self.in_flight[index].applied {
            self.complete(index, coverage);
        } else {
            self.apply(index, rng);
        }
    }

    pub fn apply(&mut self, index: usize, rng: &mut Rng) {
        let op = &mut self.in_flight[index];
        op.applied = true;
        let disk = &mut self.disks[op.disk];
        let (extent, bytes) = match op.what {
            Backing::Write { extent, buffer: Buffer::Pool(slot), .. } => {
                (extent, disk.pool_bytes(slot).to_vec())
            }
            Backing::Write { extent, buffer: Buffer::Spare, .. } => {
                (extent, self.spares.get(&op.token).cloned().expect("a spare buffer"))
            }
            Backing::Zero { extent, .. } => {
                (extent, vec![0; usize::try_from(extent.len()).expect("small")])
            }
            Backing::Read { extent, slot } | Backing::Digest { extent, slot } => {
                let medium = disk.medium[sectors(extent)].to_vec();
                let bytes: Vec<u8> = medium.iter().flat_map(|c| sector_bytes(*c)).collect();
                disk.pool_mut(slot).copy_from_slice(&bytes);
                return;
            }
            Backing::Flush | Backing::CheckHole { .. } => return,
        };
        let range = sectors(extent);
        let id = self.next_write;
        self.next_write += 1;
        op.covers = vec![id];
        // A failing write leaves a part of itself.
        let done = if op.fails { rng.index(range.len() + 1) } else { range.len() };
        let mut content = Vec::new();
        for (at, sector) in range.clone().enumerate().take(done) {
            let made = content_of(&bytes[at * 512..(at + 1) * 512]).expect("payload of one write");
            disk.medium[sector] = made;
            content.push(Some(made));
        }
        disk.cache.push(Unflushed { id, first: range.start, content, completed: false });
    }

    fn complete(&mut self, index: usize, coverage: &mut Coverage) {
        let op = self.in_flight.swap_remove(index);
        let disk = &mut self.disks[op.disk];
        let next = Lsn::new(self.epoch, self.core.last().seq.next());
        let outcome = match op.what {
            _ if op.fails => Outcome::Failed(DeviceError::Io),
            Backing::Read { slot, .. } => {
                let bytes = disk.pool_bytes(slot);
                if bytes.iter().all(|b| *b == 0) {
                    Outcome::Zeroes
                } else {
                    Outcome::Data { crc: crc32c::crc32c(bytes) }
                }
            }
            Backing::Digest { slot, .. } => {
                let bytes = disk.pool_bytes(slot);
                let digest = *blake3::hash(bytes).as_bytes();
                Outcome::Digest { digest, zero: bytes.iter().all(|b| *b == 0) }
            }
            Backing::CheckHole { extent } => {
                let hole = disk.medium[sectors(extent)].iter().all(|c| *c == 0);
                if hole { Outcome::Zeroes } else { Outcome::NotHole }
            }
            Backing::Write { .. } | Backing::Zero { .. } | Backing::Flush => Outcome::Done,
        };
        match op.what {
            Backing::Write { fua, .. } | Backing::Zero { fua, .. } => {
                disk.completed(&op.covers, fua && !op.fails);
            }
            Backing::Flush => disk.flushed(&op.covers),
            Backing::Read { .. } | Backing::Digest { .. } | Backing::CheckHole { .. } => {}
        }
        let written = match op.what {
            Backing::Write { extent, .. } | Backing::Zero { extent, .. } => Some(extent),
            Backing::Read { .. }
            | Backing::Digest { .. }
            | Backing::CheckHole { .. }
            | Backing::Flush => None,
        };
        if let (Some(extent), Some(asked)) = (written, self.asked.get_mut(&op.token)) {
            let content = if op.fails {
                coverage.saw(Seen::BackingError);
                disk.medium[sectors(extent)].to_vec()
            } else {
                asked.content.clone()
            };
            disk.oracle.set(next, extent, content);
            asked.number = Some(next);
        }
        self.spares.remove(&op.token);
        self.step(Event::BackingDone { io: op.io, outcome }, coverage);
    }

    pub fn step(&mut self, event: Event, coverage: &mut Coverage) {
        let now = self.now();
        let mut actions = std::mem::take(&mut self.actions);
        self.core.step(now, event, &mut actions);
        self.carry_out(&mut actions, coverage);
        self.actions = actions;
    }

    pub fn carry_out(&mut self, actions: &mut Vec<Action>, coverage: &mut Coverage) {
        for action in actions.drain(..) {
            match action {
                Action::Backing { token, io, what, .. } => {
                    let disk = self.asked.get(&token).expect("an asked request").disk;
                    let risky = matches!(what, Backing::Write { .. } | Backing::Zero { .. });
                    let fails = risky && self.next_token.is_multiple_of(97);
                    self.start(disk, io, token, what, fails);
                }
                Action::Answer { token, result, .. } => self.answer(token, result, coverage),
                Action::CopyDone { token, end, .. } => self.copy_done(token, end, coverage),
                Action::Recorded { .. } => {}
                Action::IntentWanted { volume, .. } => {
                    let disk = self.disks.iter_mut().find(|d| d.key() == volume);
                    disk.expect("of this host").intent_wanted = true;
                }
                Action::FlushWanted { volume, io } => {
                    let disk = self.disks.iter().position(|d| d.key() == volume);
                    let disk = disk.expect("of this host");
                    self.start(disk, io, Token(0), Backing::Flush, false);
                }
                Action::CopyWanted { volume } => {
                    self.disks
                        .iter_mut()
                        .filter(|d| d.key() == volume)
                        .for_each(|d| d.copy_wanted = true);
                }
                Action::HoldBroken { marker } => {
                    coverage.saw(Seen::HoldBroken);
                    if self.held.as_ref().is_some_and(|h| h.marker == marker) {
                        self.held = None;
                    }
                }
            }
        }
    }

    fn start(&mut self, disk: usize, io: IoKey, token: Token, what: Backing, fails: bool) {
        let covers = match what {
            Backing::Flush => self.disks[disk].completed_writes(),
            _ => Vec::new(),
        };
        self.in_flight.push(InFlight { disk, io, token, what, applied: false, fails, covers });
    }

    fn answer(&mut self, token: Token, _: Result<(), DeviceError>, coverage: &mut Coverage) {
        let asked = self.asked.remove(&token).expect("answered once");
        // While catching up, a write to a dirty chunk takes no number.
        let last = self.core.last();
        let Some(number) = asked.number.filter(|n| *n <= last) else { return };
        assert!(asked.after < number, "a write got a number below one it may depend on");
        if let Some(held) = &self.held {
            let late = number > held.at;
            assert!(!late, "a write behind a held marker was answered: {number} > {}", held.at);
        }
        if self.answered < number {
            self.answered = number;
        }
        coverage.saw(Seen::Answered);
    }

    fn copy_done(&mut self, token: Token, end: CopyEnd, coverage: &mut Coverage) {
        let disk = self.asked.remove(&token).expect("answered once").disk;
        let disk = &mut self.disks[disk];
        disk.copying = false;
        match end {
            CopyEnd::Copied { .. } => coverage.saw(Seen::Copied),
            CopyEnd::Compared { .. } => coverage.saw(Seen::Asked),
            CopyEnd::Clean | CopyEnd::PoolBusy => disk.copy_wanted = false,
            CopyEnd::NotHole => coverage.saw(Seen::HoleFilled),
            CopyEnd::Failed => {}
        }
    }

    /// Cuts a marker over all volumes of the host.
    pub fn marker(&mut self, rng: &mut Rng, coverage: &mut Coverage) {
        let spec = self.marker_spec(rng, false);
        let now = self.now();
        let mut actions = std::mem::take(&mut self.actions);
        if let Ok(placed) = self.core.marker(now, &spec, &mut actions) {
            coverage.saw(if placed.not_ordered.is_empty() {
                Seen::Marker
            } else {
                Seen::NotOrdered
            });
        }
        self.carry_out(&mut actions, coverage);
        self.actions = actions;
    }

    fn marker_spec(&self, rng: &mut Rng, pending: bool) -> MarkerSpec {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&rng.next().to_le_bytes());
        id[8..].copy_from_slice(&rng.next().to_le_bytes());
        let volumes = self.disks.iter().map(Disk::key).collect();
        let marker = MarkerId::from_bytes(id);
        let kind = if pending { PointKind::Group } else { PointKind::Crash };
        MarkerSpec { marker, volumes, kind, group: GroupId::NIL, name: String::new(), pending }
    }

    /// Begins or ends a hold of the acknowledgement gate, as a group point does.
    pub fn hold_or_release(&mut self, rng: &mut Rng, coverage: &mut Coverage) {
        let now = self.now();
        let mut actions = std::mem::take(&mut self.actions);
        match self.held.take() {
            None => {
                let spec = self.marker_spec(rng, true);
                if let Ok(placed) = self.core.hold(now, &spec, 1 + rng.below(40), &mut actions) {
                    self.held = Some(Held { marker: spec.marker, at: placed.lsn });
                }
            }
            Some(held) => {
                let end = self.core.release_hold(now, held.marker, &mut actions);
                if end == HoldEnd::Held {
                    coverage.saw(Seen::Held);
                }
                let commit = end == HoldEnd::Held;
                // A marker of a volume that lost its order meanwhile is gone; that is no error.
                drop(self.core.resolve_marker(now, held.marker, commit, &mut actions));
            }
        }
        self.carry_out(&mut actions, coverage);
        self.actions = actions;
    }

    pub fn tick(&mut self, coverage: &mut Coverage) {
        self.step(Event::Tick, coverage);
    }

    /// Records for the agent, with the pool they lie in.
    pub fn fetch(
        &self,
        volume: VolumeId,
        after: Lsn,
        max: usize,
        out: &mut Vec<Descriptor>,
    ) -> Result<(), String> {
        let disk = self.disk(volume);
        let got = self.core.fetch(disk.key(), after, max, u64::MAX, out);
        got.map(|_| ()).map_err(|e| e.to_string())
    }

    pub fn pool(&self, volume: VolumeId) -> &[u8] {
        &self.disk(volume).pool
    }

    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    pub fn release(&mut self, volume: VolumeId, upto: Lsn, coverage: &mut Coverage) {
        let key = self.disk(volume).key();
        let now = self.now();
        let mut actions = std::mem::take(&mut self.actions);
        // A release of an older epoch is not an error, and one that is ahead must be refused.
        drop(self.core.release(now, key, upto, &mut actions));
        self.carry_out(&mut actions, coverage);
        self.actions = actions;
    }

    pub fn spooled(&mut self, volume: VolumeId, upto: Lsn, coverage: &mut Coverage) {
        let key = self.disk(volume).key();
        let now = self.now();
        let mut actions = std::mem::take(&mut self.actions);
        drop(self.core.spooled(now, key, upto, &mut actions));
        self.carry_out(&mut actions, coverage);
        self.actions = actions;
    }

    pub fn recopy(&mut self, volume: VolumeId, reason: &str, coverage: &mut Coverage) {
        coverage.saw(Seen::Recopy);
        let key = self.disk(volume).key();
        let now = self.now();
        let mut actions = std::mem::take(&mut self.actions);
        self.core.recopy(now, key, reason.to_owned(), &mut actions).expect("recopy");
        self.carry_out(&mut actions, coverage);
        self.actions = actions;
    }

    /// What the target said about digests.
    pub fn compared(
        &mut self,
        volume: VolumeId,
        upto: Lsn,
        answer: &CompareAnswer,
        coverage: &mut Coverage,
    ) {
        let key = self.disk(volume).key();
        let now = self.now();
        let mut actions = std::mem::take(&mut self.actions);
        // One that is ahead must be refused, one of an older epoch changes nothing.
        if self.core.compared(now, key, upto, answer, &mut actions).is_ok() {
            coverage.saw(match answer {
                CompareAnswer::Differing(_) => Seen::AnswersTaken,
                CompareAnswer::Lost => Seen::AnswersLost,
            });
        }
        self.carry_out(&mut actions, coverage);
        self.actions = actions;
    }

    /// Starts a verify of one volume; it must never find anything.
    pub fn verify(&mut self, rng: &mut Rng, coverage: &mut Coverage) {
        let key = self.disks[rng.index(self.disks.len())].key();
        let now = self.now();
        let mut actions = std::mem::take(&mut self.actions);
        self.core.verify(now, key, true, &mut actions).expect("attached");
        self.carry_out(&mut actions, coverage);
        self.actions = actions;
    }

    pub fn disk(&self, volume: VolumeId) -> &Disk {
        self.disks.iter().find(|d| d.id == volume).expect("a volume of this host")
    }

    pub fn order(&self, volume: VolumeId) -> CaptureOrder {
        self.core.status(self.disk(volume).key()).expect("attached").order
    }

    pub fn watermarks(&self, volume: VolumeId) -> (Lsn, Lsn) {
        let status = self.core.status(self.disk(volume).key()).expect("attached");
        (status.captured, status.durable)
    }

    /// Bytes of the pool in use, its size, and bytes still to be copied.
    pub fn pressure(&self, volume: VolumeId) -> (u64, u64, u64) {
        let status = self.core.status(self.disk(volume).key()).expect("attached");
        (status.pool_used, status.pool_bytes, status.dirty_bytes)
    }

    /// The agent has told that everything is durable at the target.
    pub fn all_released(&self) -> bool {
        self.disks.iter().all(|d| {
            let (captured, released) = self.watermarks(d.id);
            captured == released
        })
    }

    /// Nothing in flight and nobody waiting.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && self.asked.is_empty()
    }

    /// Nothing was damaged: a verify that found a difference is a false alarm.
    pub fn check_verifies(&self, coverage: &mut Coverage) {
        for disk in &self.disks {
            let verify = self.core.status(disk.key()).expect("attached").verify;
            assert_eq!(verify.differing_bytes, 0, "a false alarm: {:?}", verify.differing);
            if verify.checked_bytes > 0 {
                coverage.saw(Seen::Verified);
            }
        }
    }

    /// When nothing is in flight, what is true and what is on the medium must be the same.
    pub fn check_medium(&self) {
        if !self.is_idle() {
            return;
        }
        for disk in &self.disks {
            assert_eq!(
                disk.oracle.now(),
                disk.medium,
                "the medium differs from what completed last"
            );
        }
    }
}
