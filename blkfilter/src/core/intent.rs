//! The intent map of one volume: which regions may differ from the replica after a crash.
//!
//! A region's bit is durable before a write of it is given to the backing. It is cleared when all
//! three hold: no write is in flight and no chunk dirty there, the target is durable past the
//! region's last number, and a flush of the backing began after the region's last completion and
//! succeeded. Setting must be durable, clearing need not be: a stale bit costs a comparison.
//!
//! A region is cleared for one of two reasons: more regions than the cap are set (then the one
//! written longest ago goes first; never by a timer, which would make low rates wait at every
//! write), or the guest never wrote it and only a copy needed the bit.
//!
//! Order of both lists is by last number, because a region joins at the end when it comes to rest.

use farshore_extent::{ChunkMap, Extent, Lsn, Seq, VolumeSize};

use super::event::{IntentBlock, IntentCommit, IntentEnd, IntentLoss, IoKey};
use super::limits::Faults;
use super::region_map::RegionMap;

/// Copied regions that wait for a flush of their own, while more are being copied.
const COLD_BATCH: usize = 64;

/// Writes in a row that make a stream.
const STREAM: u8 = 4;

const NONE: u32 = u32::MAX;

/// A region that something has touched in this run and whose bit is set.
#[derive(Debug, Clone, Copy)]
struct Entry {
    region: u64,
    in_flight: u32,
    /// Not below the number of any record of it.
    last: Seq,
    /// Of the flush clock, when its last write completed.
    completed: u64,
    /// The guest wrote it in this run.
    written: bool,
    /// Where the last write ended, and how many in a row began there.
    stream_end: u64,
    stream: u8,
    list: Option<Which>,
    prev: u32,
    next: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    /// Written by the guest.
    Warm,
    /// Only copied.
    Cold,
}

/// Regions at rest: nothing in flight, nothing dirty.
#[derive(Debug)]
struct List {
    head: u32,
    tail: u32,
    len: usize,
}

impl Default for List {
    fn default() -> Self {
        Self { head: NONE, tail: NONE, len: 0 }
    }
}

/// What the driver was last asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    Nothing,
    Lazily,
    Urgently,
}

/// Whether records may be handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Withheld {
    No,
    /// Until a commit that is yet to be taken.
    UntilTaken,
    /// Until the running commit is durable.
    UntilDone,
}

#[derive(Debug)]
pub(super) struct Intent {
    /// As it shall be on disk.
    wanted: RegionMap,
    /// Surely on disk, whatever is being written.
    durable: RegionMap,
    cap: u64,
    /// Place in `entries` plus one, by region; 0 is none.
    places: Vec<u32>,
    entries: Vec<Entry>,
    free: Vec<u32>,
    warm: List,
    cold: List,
    /// Requests that hold their range and wait for a bit.
    waiting: Vec<IoKey>,
    /// Counts flushes begun.
    clock: u64,
    /// Everything that completed before this tick is durable on the backing.
    flushed: u64,
    flushing: bool,
    /// A flush failed: what completed before it may be lost whatever later flushes say.
    distrust: bool,
    /// Over the cap, until well below it.
    sweeping: bool,
    /// By block: differs from the disk.
    changed: Vec<bool>,
    any_changed: bool,
    any_marked: bool,
    running: Option<(Vec<IntentBlock>, VolumeSize)>,
    /// The disk has bits for a volume of this size.
    durable_size: VolumeSize,
    asked: Asked,
    withheld: Withheld,
    lost: Option<IntentLoss>,
    /// Nobody carries out anything any more.
    ended: bool,
}

impl Intent {
    /// `set`: as it is on disk, durably. Regions without dirty chunks are cleared in time.
    pub(super) fn new(set: RegionMap, cap: u64, dirty: &ChunkMap) -> Self {
        let regions = usize::try_from(set.regions()).unwrap_or(usize::MAX);
        let mut intent = Self {
            durable: set.clone(),
            durable_size: set.size(),
            cap: cap.max(1),
            places: vec![0; regions],
            entries: Vec::new(),
            free: Vec::new(),
            warm: List::default(),
            cold: List::default(),
            waiting: Vec::new(),
            clock: 0,
            flushed: 0,
            flushing: false,
            distrust: false,
            sweeping: false,
            changed: vec![false; set.blocks()],
            any_changed: false,
            any_marked: false,
            running: None,
            asked: Asked::Nothing,
            withheld: Withheld::No,
            lost: None,
            ended: false,
            wanted: set,
        };
        for region in intent.durable.clone().iter() {
            intent.rest(region, Seq::ZERO, dirty);
        }
        intent
    }

    pub(super) const fn set_regions(&self) -> u64 {
        self.wanted.count()
    }

    pub(super) const fn map(&self) -> &RegionMap {
        &self.wanted
    }

    /// Of the volume that the disk has bits for.
    pub(super) const fn durable_size(&self) -> VolumeSize {
        self.durable_size
    }

    pub(super) const fn cap(&self) -> u64 {
        self.cap
    }

    pub(super) const fn loss(&self) -> Option<IntentLoss> {
        self.lost
    }

    /// Records that are there must not be seen yet.
    pub(super) fn withholds(&self) -> bool {
        self.withheld != Withheld::No
    }

    fn place(&self, region: u64) -> Option<u32> {
        let index = usize::try_from(region).ok()?;
        self.places.get(index)?.checked_sub(1)
    }

    fn open(&mut self, region: u64) -> u32 {
        if let Some(place) = self.place(region) {
            return place;
        }
        let entry = Entry {
            region,
            in_flight: 0,
            last: Seq::ZERO,
            completed: self.clock,
            written: false,
            stream_end: 0,
            stream: 0,
            list: None,
            prev: NONE,
            next: NONE,
        };
        let place = if let Some(place) = self.free.pop() {
            self.entries[place as usize] = entry;
            place
        } else {
            self.entries.push(entry);
            u32::try_from(self.entries.len() - 1).unwrap_or(NONE)
        };
        if let Some(known) = usize::try_from(region).ok().and_then(|r| self.places.get_mut(r)) {
            *known = place + 1;
        }
        place
    }

    const fn list(&mut self, which: Which) -> &mut List {
        match which {
            Which::Warm => &mut self.warm,
            Which::Cold => &mut self.cold,
        }
    }

    fn link(&mut self, place: u32, which: Which) {
        let list = self.list(which);
        let tail = std::mem::replace(&mut list.tail, place);
        list.len += 1;
        if tail == NONE {
            list.head = place;
        } else {
            self.entries[tail as usize].next = place;
        }
        let entry = &mut self.entries[place as usize];
        (entry.list, entry.prev, entry.next) = (Some(which), tail, NONE);
    }

    fn unlink(&mut self, place: u32) {
        let entry = &mut self.entries[place as usize];
        let Some(which) = entry.list.take() else { return };
        let (prev, next) = (entry.prev, entry.next);
        if prev != NONE {
            self.entries[prev as usize].next = next;
        }
        if next != NONE {
            self.entries[next as usize].prev = prev;
        }
        let list = self.list(which);
        list.len -= 1;
        if list.head == place {
            list.head = next;
        }
        if list.tail == place {
            list.tail = prev;
        }
    }

    fn mark(&mut self, region: u64) {
        if self.wanted.set(region) {
            self.changed[RegionMap::block_of(region)] = true;
            self.any_changed = true;
            self.any_marked |= !self.durable.has(region);
        }
    }

    /// A write or zero of `extent` arrives.
    pub(super) fn begin(&mut self, extent: Extent, at: Seq) {
        for region in self.wanted.touched(extent) {
            let place = self.open(region);
            self.unlink(place);
            let entry = &mut self.entries[place as usize];
            entry.in_flight += 1;
            entry.written = true;
            self.mark(region);
        }
        self.follow_stream(extent, at);
    }

    /// A stream in the second half of its region: the next one is marked before it gets there.
    fn follow_stream(&mut self, extent: Extent, at: Seq) {
        let region = (extent.end() - 1) / self.wanted.region();
        let before = (extent.offset() / self.wanted.region()).saturating_sub(1);
        let ended = |intent: &Self, region: u64| {
            let entry = intent.place(region).map(|place| intent.entries[place as usize])?;
            (entry.stream_end == extent.offset()).then_some(entry.stream)
        };
        let stream = ended(self, region).or_else(|| ended(self, before));
        let stream = stream.map_or(0, |n| n.saturating_add(1));
        if let Some(place) = self.place(region) {
            let entry = &mut self.entries[place as usize];
            (entry.stream, entry.stream_end) = (stream, extent.end());
        }
        let second_half = extent.end() % self.wanted.region() >= self.wanted.region() / 2;
        let next = region + 1;
        let free = next < self.wanted.regions() && !self.wanted.has(next);
        if stream >= STREAM && second_half && free {
            let place = self.open(next);
            self.mark(next);
            self.entries[place as usize].last = at;
            self.link(place, Which::Warm);
        }
    }

    /// Whether all bits of `extent` are on disk.
    pub(super) fn is_durable(&self, extent: Extent) -> bool {
        self.lost.is_some() || self.wanted.touched(extent).all(|region| self.durable.has(region))
    }

    pub(super) fn wait(&mut self, io: IoKey) {
        self.waiting.push(io);
    }

    /// A write or zero of `extent` has completed; everything it left in the log is not above `at`.
    pub(super) fn end(&mut self, extent: Extent, at: Seq, dirty: &ChunkMap) {
        for region in self.wanted.touched(extent) {
            let Some(place) = self.place(region) else { continue };
            let entry = &mut self.entries[place as usize];
            entry.in_flight = entry.in_flight.saturating_sub(1);
            entry.completed = self.clock;
            self.rest(region, at, dirty);
        }
    }

    /// A copy of `extent` was recorded.
    pub(super) fn copied(&mut self, extent: Extent, at: Seq, dirty: &ChunkMap) {
        for region in self.wanted.touched(extent) {
            self.rest(region, at, dirty);
        }
    }

    /// Puts a region that came to rest at the end of its list.
    fn rest(&mut self, region: u64, at: Seq, dirty: &ChunkMap) {
        let Some(extent) = self.wanted.extent(region) else { return };
        if !self.wanted.has(region) {
            return;
        }
        let place = self.open(region);
        if dirty.touches_dirty(extent) {
            self.unlink(place);
            return;
        }
        let entry = &mut self.entries[place as usize];
        if entry.in_flight > 0 {
            return;
        }
        entry.last = at;
        let which = if entry.written { Which::Warm } else { Which::Cold };
        self.unlink(place);
        self.link(place, which);
    }

    /// The volume is larger. The new part is marked: it is not with the target before the record at
    /// `at` is, nor before its chunks are sent.
    pub(super) fn grow(&mut self, size: VolumeSize, at: Seq, dirty: &ChunkMap) {
        let Some(added) = Extent::between(self.wanted.size().get(), size.get()) else { return };
        self.wanted.grow(size);
        self.durable.grow(size);
        self.places.resize(usize::try_from(self.wanted.regions()).unwrap_or(usize::MAX), 0);
        self.changed.resize(self.wanted.blocks(), true);
        (self.any_changed, self.any_marked) = (true, true);
        for region in self.wanted.touched(added) {
            self.mark(region);
            // A last region that was short may be marked; its block tells the new size all the same.
            self.changed[RegionMap::block_of(region)] = true;
            self.rest(region, at, dirty);
        }
    }

    /// Every chunk has become dirty. Nothing is handed out before the disk says so too.
    pub(super) fn all_dirty(&mut self) {
        for place in 0..u32::try_from(self.entries.len()).unwrap_or(NONE) {
            self.unlink(place);
        }
        for region in 0..self.wanted.regions() {
            self.mark(region);
        }
        if self.any_marked && self.lost.is_none() {
            self.withheld = Withheld::UntilTaken;
        }
    }

    /// A flush begins; to be given back when it ends.
    pub(super) const fn flush_begins(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    pub(super) fn flush_ended(&mut self, began: u64, well: bool, own: bool) {
        if own {
            self.flushing = false;
        }
        if well {
            self.flushed = self.flushed.max(began);
        } else {
            self.distrust = true;
        }
    }

    /// Clears what may be cleared and should be. True: the backing should be flushed for more;
    /// the caller begins the flush. `released`: durable at the target, in this epoch. `settled`:
    /// no more is being copied.
    pub(super) fn sweep(&mut self, released: Seq, settled: bool, faults: Faults) -> bool {
        if self.lost.is_some() || self.distrust || self.ended {
            return false;
        }
        let mut flush = false;
        while self.cold.len > 0 {
            match self.ripe(self.cold.head, released, faults) {
                Ripe::Yes => self.clear(self.cold.head),
                Ripe::NotFlushed => {
                    flush |= settled || self.cold.len >= COLD_BATCH;
                    break;
                }
                Ripe::NotReleased => break,
            }
        }
        self.sweeping |= self.wanted.count() > self.cap;
        while self.sweeping && self.warm.len > 0 {
            match self.ripe(self.warm.head, released, faults) {
                Ripe::Yes => self.clear(self.warm.head),
                Ripe::NotFlushed => {
                    flush = true;
                    break;
                }
                Ripe::NotReleased => break,
            }
            self.sweeping = self.wanted.count() > self.cap - self.cap / 8;
        }
        if flush && !self.flushing {
            self.flushing = true;
            return true;
        }
        false
    }

    fn ripe(&self, place: u32, released: Seq, faults: Faults) -> Ripe {
        let entry = &self.entries[place as usize];
        if entry.last > released && !faults.intent_cleared_before_release {
            Ripe::NotReleased
        } else if entry.completed >= self.flushed && !faults.intent_cleared_without_flush {
            Ripe::NotFlushed
        } else {
            Ripe::Yes
        }
    }

    fn clear(&mut self, place: u32) {
        self.unlink(place);
        let region = self.entries[place as usize].region;
        if let Some(known) = usize::try_from(region).ok().and_then(|r| self.places.get_mut(r)) {
            *known = 0;
        }
        self.free.push(place);
        self.wanted.clear(region);
        self.changed[RegionMap::block_of(region)] = true;
        self.any_changed = true;
    }

    /// Whether the driver has to be asked for a commit; the flag: somebody waits for it.
    pub(super) fn ask(&mut self) -> Option<bool> {
        if self.running.is_some() || self.lost.is_some() || self.ended || !self.any_changed {
            return None;
        }
        let want = if self.any_marked { Asked::Urgently } else { Asked::Lazily };
        if self.asked >= want {
            return None;
        }
        self.asked = want;
        Some(want == Asked::Urgently)
    }

    /// What has to be written now: all that changed, one commit at a time.
    pub(super) fn take(&mut self, released: Lsn) -> Option<IntentCommit> {
        if self.running.is_some() || self.lost.is_some() || !self.any_changed {
            return None;
        }
        let mut blocks = Vec::new();
        for (index, changed) in self.changed.iter_mut().enumerate() {
            if std::mem::take(changed) {
                let words = self.wanted.block(index);
                self.durable.keep_in_block(index, &words);
                blocks.push(IntentBlock { index, words });
            }
        }
        (self.any_changed, self.any_marked, self.asked) = (false, false, Asked::Nothing);
        if self.withheld == Withheld::UntilTaken {
            self.withheld = Withheld::UntilDone;
        }
        let size = self.wanted.size();
        self.running = Some((blocks.clone(), size));
        Some(IntentCommit { blocks, released, size })
    }

    /// The running commit has ended. The requests in `ready` may go to the backing now.
    pub(super) fn committed(
        &mut self,
        end: IntentEnd,
        durable: impl Fn(&Self, IoKey) -> bool,
        ready: &mut Vec<IoKey>,
    ) {
        let Some((blocks, size)) = self.running.take() else { return };
        match end {
            IntentEnd::Durable => {
                self.durable_size = size;
                for block in &blocks {
                    self.durable.add_block(block.index, &block.words);
                }
                if self.withheld == Withheld::UntilDone {
                    self.withheld = Withheld::No;
                }
            }
            IntentEnd::Lost(loss) => {
                self.lost = Some(loss);
                self.withheld = Withheld::No;
            }
        }
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|io| {
            let go = durable(self, *io);
            if go {
                ready.push(*io);
            }
            !go
        });
        self.waiting = waiting;
    }

    /// Nothing is asked for any more.
    pub(super) const fn end_keeping(&mut self) {
        self.ended = true;
    }

    /// After a loss: everything is to be written anew.
    pub(super) fn resume(&mut self) {
        if self.lost.take().is_some() {
            self.durable = RegionMap::new(self.wanted.size(), self.wanted.region());
            self.changed.fill(true);
            (self.any_changed, self.any_marked, self.asked) = (true, true, Asked::Nothing);
        }
    }
}

enum Ripe {
    Yes,
    NotFlushed,
    NotReleased,
}
