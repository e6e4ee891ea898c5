//! Opening a store: which segments belong to the history, and where it ends.
//!
//! Sealed segments are opened by their footer only; a segment without one is scanned batch by
//! batch. At the first place that is no batch of this history a table ([`judge`]) tells a torn
//! tail (cut) from damage to what was durable (kept aside, reported).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use farshore_changelog::limits::MAX_SEGMENT_BYTES;
use farshore_changelog::{
    BatchHeader, SegmentError, SegmentEvent, SegmentHeader, SegmentId, SegmentIndexBuilder,
    SegmentTrailer,
};
use farshore_extent::{CaptureOrder, Chain, ExtentSet, Lsn, VolumeSize};

use super::base::{self, Base};
use super::disk::{ALIGN, AlignedBuf, Disk, DiskFile, FileKind};
use super::error::StoreError;
use super::faults::Faults;
use super::limits::MAX_GROUP_BYTES;
use super::order::OrderBook;
use super::runs::Runs;
use super::scan::Scan;
use super::segment::{Segment, file_name, id_in_name, read_head};
use super::segment_files::is_spare;
use super::superblock::{self, Super};
use super::{OpenSegment, Store, StoreConfig, StoreMeta};

/// An image of the volume from elsewhere: the base of the store that is made in its directory.
pub(crate) const SEED: &str = "seed.img";

/// What opening a store found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Segments opened by their footer.
    pub sealed: usize,
    /// Batches read and verified in segments without one.
    pub scanned_batches: usize,
    /// A torn tail was cut behind this place: nothing acknowledged was in it.
    pub torn_tail: Option<Lsn>,
    /// Data that was durable is gone. The history ends where the first begins.
    pub damage: Vec<Damage>,
    /// Copies of the super block that failed their checksum and were written again.
    pub bad_super_copies: usize,
    /// Merging into the base was interrupted and goes on at the next expiry.
    pub apply_pending: bool,
    /// The checksums of the base were not there: they are made anew from what it holds now.
    pub lost_checksums: bool,
}

/// Durable data that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Last place that is good before it.
    pub after: Lsn,
    /// Places up to this were durable, as far as known.
    pub upto: Lsn,
    /// Which file, and what is wrong with it.
    pub what: String,
}

/// What is known about the place where the readable history ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Evidence {
    /// Something is there: a batch that fails a check, or valid batches behind it.
    pub(super) something: bool,
    /// A later batch of this history was made when a place beyond this was durable already.
    pub(super) later_batch_claims: bool,
    /// The super block says that a place beyond this was durable.
    pub(super) super_claims: bool,
    /// Another segment follows, and it does not go on from here.
    pub(super) later_segment: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Judgement {
    /// The history ends here, cleanly.
    End,
    /// A write was cut off by a power loss; nothing of it was acknowledged.
    Torn,
    /// Durable data is damaged.
    Damaged,
}

/// The table of design 04 rule 6.
pub(super) const fn judge(evidence: Evidence) -> Judgement {
    if evidence.later_batch_claims || evidence.super_claims || evidence.later_segment {
        Judgement::Damaged
    } else if evidence.something {
        Judgement::Torn
    } else {
        Judgement::End
    }
}

impl Store {
    /// Makes a store on an empty disk, or on one with a [`SEED`], and opens it.
    ///
    /// # Errors
    /// [`StoreError::Exists`] when there is one; [`StoreError::InUse`]; the disk's.
    pub fn create(
        disk: Arc<dyn Disk>,
        meta: &StoreMeta,
        config: StoreConfig,
    ) -> Result<(Self, RecoveryReport), StoreError> {
        let lock = lock(disk.as_ref())?;
        let names = disk.list().map_err(|e| StoreError::io("listing the store", e))?;
        let has_super = match disk.open(superblock::NAME, FileKind::Plain) {
            // A super block that fails its checks in a store without segments is a creation that
            // was cut off.
            Ok(file) => Super::load(file.as_ref()).is_ok(),
            Err(_) => false,
        };
        if has_super || names.iter().any(|n| id_in_name(n).is_some()) {
            return Err(StoreError::Exists);
        }
        for name in [base::IMAGE, base::SUMS, superblock::NAME] {
            if names.iter().any(|n| n == name) {
                disk.delete(name).map_err(|e| StoreError::io(name, e))?;
            }
        }
        let seeded = names.iter().any(|n| n == SEED);
        let image = if seeded {
            disk.rename(SEED, base::IMAGE).and_then(|()| disk.open(base::IMAGE, FileKind::Plain))
        } else {
            disk.create(base::IMAGE, FileKind::Plain)
        };
        let made = image.and_then(|image| {
            image.set_len(meta.size.get())?;
            image.sync()?;
            disk.create(base::SUMS, FileKind::Plain)?;
            disk.sync_dir()
        });
        made.map_err(|e| StoreError::io("creating base.img", e))?;
        let file = disk.create(superblock::NAME, FileKind::Plain);
        let file = file.map_err(|e| StoreError::io("creating super", e))?;
        Super {
            version: 1,
            volume: meta.volume,
            generation: meta.generation,
            floor: Lsn::ZERO,
            base: Lsn::ZERO,
            base_time: meta.created,
            base_order: CaptureOrder::CatchUp,
            size: meta.size,
            blocks: meta.blocks,
            first_segment: SegmentId::new(1),
            durable: Lsn::ZERO,
            created: meta.created,
            unknown: ExtentSet::new(),
            summed: if seeded { 0 } else { base::ALL },
        }
        .create(file.as_ref())?;
        disk.sync_dir().map_err(|e| StoreError::io("syncing the directory", e))?;
        Self::open_locked(disk, config, lock)
    }

    /// Opens a store: afterwards [`Store::position`] says where the history ends.
    ///
    /// # Errors
    /// [`StoreError::NotAStore`], [`StoreError::InUse`], [`StoreError::Super`],
    /// [`StoreError::Version`]; the disk's.
    pub fn open(
        disk: Arc<dyn Disk>,
        config: StoreConfig,
    ) -> Result<(Self, RecoveryReport), StoreError> {
        let lock = lock(disk.as_ref())?;
        Self::open_locked(disk, config, lock)
    }

    fn open_locked(
        disk: Arc<dyn Disk>,
        config: StoreConfig,
        lock: Box<dyn Send>,
    ) -> Result<(Self, RecoveryReport), StoreError> {
        let super_file = match disk.open(superblock::NAME, FileKind::Plain) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(StoreError::NotAStore);
            }
            Err(e) => return Err(StoreError::io("opening super", e)),
        };
        let (mut sb, health) = Super::load(super_file.as_ref())?;
        health.repair(super_file.as_ref())?;
        let (base, lost) = open_base(disk.as_ref(), &mut sb, super_file.as_ref(), config.faults)?;
        if config.faults.floor_lowered_after_crash {
            sb.floor = sb.base;
        }
        let mut walk = Walk::new(disk, sb, config);
        walk.report.bad_super_copies = health.bad_copies;
        walk.report.apply_pending = walk.sb.floor > walk.sb.base;
        walk.report.lost_checksums = lost;
        walk.all()?;
        walk.finish(super_file, base, lock)
    }
}

/// The base; and whether its checksums were lost.
fn open_base(
    disk: &dyn Disk,
    sb: &mut Super,
    super_file: &dyn DiskFile,
    faults: Faults,
) -> Result<(Arc<Base>, bool), StoreError> {
    let failed = |e| StoreError::io("opening base.img", e);
    let image = disk.open(base::IMAGE, FileKind::Plain).map_err(failed)?;
    let failed = |e| StoreError::io("opening base.crc", e);
    let (sums, lost) = match disk.open(base::SUMS, FileKind::Plain) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let lost = sb.summed > 0;
            if lost {
                // Before a new file has the name: it has none of what super relies on.
                sb.summed = 0;
                sb.store_next(super_file)?;
            }
            let made = disk.create(base::SUMS, FileKind::Plain);
            (made.and_then(|file| disk.sync_dir().map(|()| file)).map_err(failed)?, lost)
        }
        file => (file.map_err(failed)?, false),
    };
    if sb.summed == 0 {
        // What a merge has left there says nothing about what is made next.
        sums.set_len(0).map_err(failed)?;
    }
    Ok((Base::new(image, sums, faults), lost))
}

fn lock(disk: &dyn Disk) -> Result<Box<dyn Send>, StoreError> {
    disk.lock().map_err(|e| match e.kind() {
        std::io::ErrorKind::WouldBlock => StoreError::InUse { holder: e.to_string() },
        _ => StoreError::io("locking the store", e),
    })
}

/// The walk over all segments, oldest first.
struct Walk {
    disk: Arc<dyn Disk>,
    sb: Super,
    config: StoreConfig,
    names: Vec<String>,
    report: RecoveryReport,
    segments: Vec<Arc<Segment>>,
    open: Option<OpenSegment>,
    /// Where the history has come to.
    at: Lsn,
    chain: Chain,
    size: VolumeSize,
    order: CaptureOrder,
    recent: BTreeMap<Lsn, Chain>,
    /// What the events until now say about order, and the place of the last of them.
    book: OrderBook,
    newest: Lsn,
    highest: SegmentId,
    dir_changed: bool,
}

/// What is to be done with the segments behind one.
enum Next {
    Go,
    /// They cannot follow: put them aside.
    Stop,
}

impl Walk {
    fn new(disk: Arc<dyn Disk>, sb: Super, config: StoreConfig) -> Self {
        Self {
            disk,
            config,
            names: Vec::new(),
            report: RecoveryReport::default(),
            segments: Vec::new(),
            open: None,
            at: Lsn::ZERO,
            chain: Chain::EMPTY,
            size: sb.size,
            order: sb.base_order,
            recent: BTreeMap::new(),
            book: OrderBook::new(sb.base, sb.base_order, sb.base_time),
            newest: Lsn::ZERO,
            highest: SegmentId::new(sb.first_segment.get().saturating_sub(1)),
            dir_changed: false,
            sb,
        }
    }

    fn all(&mut self) -> Result<(), StoreError> {
        self.names = self.disk.list().map_err(|e| StoreError::io("listing the store", e))?;
        let lost = self.names.iter().filter_map(|n| id_in_name(n.strip_prefix("lost-")?));
        self.highest = lost.fold(self.highest, SegmentId::max);
        let mut ids: Vec<_> = self.names.iter().filter_map(|n| id_in_name(n)).collect();
        ids.sort_unstable();
        let rubbish = ids.partition_point(|id| *id < self.sb.first_segment);
        for id in ids.drain(..rubbish) {
            self.delete(&file_name(id))?;
        }
        for n in 0..ids.len() {
            self.highest = self.highest.max(ids[n]);
            if let Next::Stop = self.segment(ids[n], ids.get(n + 1).copied())? {
                for id in &ids[n + 1..] {
                    self.highest = self.highest.max(*id);
                    self.put_aside(*id)?;
                }
                break;
            }
        }
        if self.at < self.sb.durable && self.report.damage.is_empty() {
            self.report.damage.push(Damage {
                after: self.at,
                upto: self.sb.durable,
                what: "the journal ends before what the super block knows to be durable".into(),
            });
        }
        if self.dir_changed && !self.config.faults.no_dir_sync {
            self.disk.sync_dir().map_err(|e| StoreError::io("syncing the directory", e))?;
        }
        Ok(())
    }

    fn segment(&mut self, id: SegmentId, next: Option<SegmentId>) -> Result<Next, StoreError> {
        let name = file_name(id);
        let failed = |e| StoreError::io(format!("opening {name}"), e);
        let file = self.disk.open(&name, FileKind::Journal).map_err(failed)?;
        let len = file.len().map_err(failed)?;
        let header = self.header(id, file.as_ref(), len)?;
        let first = self.segments.is_empty();
        if first && header.prev <= self.sb.base {
            // The oldest segment says itself where it begins; super says that is early enough.
            (self.at, self.chain) = (header.prev, header.prev_chain);
            (self.size, self.order) = (header.size, header.order);
        }
        if (header.prev, header.prev_chain) != (self.at, self.chain) {
            self.damaged(header.prev, format!("{name} does not follow the segment before it"));
            self.put_aside(id)?;
            return Ok(Next::Stop);
        }
        if let Some(trailer) = self.trailer(file.as_ref(), &header)?
            && let Ok(head) = read_head(file.as_ref(), &header, &trailer)
        {
            self.report.sealed += 1;
            self.note(head.batches.iter().map(|b| (b.last(), b.chain)));
            self.reach(trailer.last, trailer.chain, trailer.size, trailer.order);
            let segment = Arc::new(Segment::sealed(header, trailer, head.fences, file));
            self.take(&segment, &head.events);
            self.segments.push(segment);
            return Ok(Next::Go);
        }
        self.scan(header, file, next)
    }

    /// The header in the file, or, when that is damaged, the one it must have had.
    fn header(
        &self,
        id: SegmentId,
        file: &dyn DiskFile,
        len: u64,
    ) -> Result<SegmentHeader, StoreError> {
        let mut block = vec![0; ALIGN];
        let read = file.read_at(&mut block, 0);
        let parsed = match read {
            Ok(()) => SegmentHeader::parse(&block),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(SegmentError::Missing("header"))
            }
            Err(e) => return Err(StoreError::io(format!("reading {}", file_name(id)), e)),
        };
        match parsed {
            Err(SegmentError::Version(v)) => Err(StoreError::Version(v)),
            Ok(header) if header.segment == id && header.volume == self.sb.volume => Ok(header),
            Ok(_) | Err(_) => {
                let (prev, prev_chain) = self.place_before(file);
                Ok(SegmentHeader {
                    volume: self.sb.volume,
                    generation: self.sb.generation,
                    epoch: prev.epoch,
                    segment: id,
                    prev,
                    prev_chain,
                    created: self.sb.created,
                    capacity: (len / ALIGN as u64 * ALIGN as u64)
                        .clamp(3 * ALIGN as u64, MAX_SEGMENT_BYTES),
                    size: self.size,
                    blocks: self.sb.blocks,
                    order: self.order,
                })
            }
        }
    }

    /// Where a segment without a header must begin: where the one before it ends, or, when it is the
    /// oldest, where its first batch says.
    fn place_before(&self, file: &dyn DiskFile) -> (Lsn, Chain) {
        let mut block = vec![0; ALIGN];
        let oldest = self.segments.is_empty() && file.read_at(&mut block, ALIGN as u64).is_ok();
        let first = BatchHeader::parse(&block)
            .ok()
            .filter(|first| oldest && first.volume == self.sb.volume && first.prev <= self.sb.base);
        first.map_or((self.at, self.chain), |first| (first.prev, first.prev_chain))
    }

    fn trailer(
        &self,
        file: &dyn DiskFile,
        header: &SegmentHeader,
    ) -> Result<Option<SegmentTrailer>, StoreError> {
        let mut block = vec![0; ALIGN];
        match file.read_at(&mut block, header.trailer_place()) {
            Ok(()) => Ok(SegmentTrailer::parse(&block, header).ok()),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
            Err(e) => {
                let what = format!("reading trailer of {}", file_name(header.segment));
                Err(StoreError::io(what, e))
            }
        }
    }

    /// Reads an unsealed segment batch by batch.
    fn scan(
        &mut self,
        header: SegmentHeader,
        file: Arc<dyn DiskFile>,
        next: Option<SegmentId>,
    ) -> Result<Next, StoreError> {
        let mut scan = Scan {
            builder: SegmentIndexBuilder::new(header),
            file,
            volume: self.sb.volume,
            generation: self.sb.generation,
        };
        while scan.one(self.config.faults.no_chain_check)? {
            self.report.scanned_batches += 1;
        }
        let builder = &scan.builder;
        self.note(builder.batches().iter().map(|b| (b.last(), b.chain)));
        self.reach(builder.last(), builder.chain(), builder.size(), builder.order());
        let follows = match next {
            Some(next) => self.begins_at(next)? == Some((self.at, self.chain)),
            None => false,
        };
        let tail = scan.tail()?;
        let judgement = judge(Evidence {
            something: tail.something,
            later_batch_claims: !follows && tail.claimed > self.at,
            super_claims: !follows && self.sb.durable > self.at,
            later_segment: next.is_some() && !follows,
        });
        let segment = Arc::new(Segment::in_memory(&scan.builder, Arc::clone(&scan.file)));
        self.take(&segment, scan.builder.events());
        match judgement {
            _ if follows => self.segments.push(segment),
            Judgement::Damaged => {
                let upto = tail.claimed.max(self.sb.durable).max(self.at);
                let what = format!("{} is damaged at {}", file_name(header.segment), tail.place);
                self.damaged(upto, what);
                self.segments.push(segment);
                return Ok(Next::Stop);
            }
            Judgement::Torn | Judgement::End => {
                if judgement == Judgement::Torn {
                    self.report.torn_tail = Some(self.at);
                    if !self.config.faults.tail_not_cut {
                        scan.cut(tail)?;
                    }
                }
                self.open = Some(OpenSegment { file: scan.file, builder: scan.builder });
            }
        }
        Ok(Next::Go)
    }

    fn begins_at(&self, id: SegmentId) -> Result<Option<(Lsn, Chain)>, StoreError> {
        let mut block = vec![0; ALIGN];
        let read = self
            .disk
            .open(&file_name(id), FileKind::Journal)
            .and_then(|file| file.read_at(&mut block, 0));
        match read {
            Ok(()) => Ok(SegmentHeader::parse(&block).ok().map(|h| (h.prev, h.prev_chain))),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
            Err(e) => Err(StoreError::io(format!("reading {}", file_name(id)), e)),
        }
    }

    /// The events of the next segment of the history.
    fn take(&mut self, segment: &Segment, events: &[SegmentEvent]) {
        let mut told = Vec::new();
        for event in events {
            if self.book.is_ended_by(event) {
                // When it cannot be read the stretch ends earlier, behind all its points.
                self.newest = segment.record_before(event.lsn()).unwrap_or(self.newest);
            }
            // The base holds what lies before it; pending markers from there are still needed.
            self.book.take_after(event, self.newest, self.sb.base, &mut told);
            self.newest = event.lsn();
        }
    }

    fn reach(&mut self, at: Lsn, chain: Chain, size: VolumeSize, order: CaptureOrder) {
        (self.at, self.chain, self.size, self.order) = (at, chain, size, order);
    }

    fn note(&mut self, batches: impl Iterator<Item = (Lsn, Chain)>) {
        self.recent.extend(batches);
        while self.recent.len() > super::limits::RECENT_CHAINS {
            self.recent.pop_first();
        }
    }

    fn damaged(&mut self, upto: Lsn, what: String) {
        self.report.damage.push(Damage { after: self.at, upto, what });
    }

    fn delete(&mut self, name: &str) -> Result<(), StoreError> {
        self.dir_changed = true;
        self.disk.delete(name).map_err(|e| StoreError::io(format!("removing {name}"), e))
    }

    /// Kept for people to look at, never read again.
    fn put_aside(&mut self, id: SegmentId) -> Result<(), StoreError> {
        self.dir_changed = true;
        let name = file_name(id);
        let done = self.disk.rename(&name, &format!("lost-{name}"));
        done.map_err(|e| StoreError::io(format!("putting {name} aside"), e))
    }

    fn finish(
        self,
        super_file: Arc<dyn DiskFile>,
        base: Arc<Base>,
        lock: Box<dyn Send>,
    ) -> Result<(Store, RecoveryReport), StoreError> {
        let sb = self.sb;
        let spares: Vec<_> = self.names.iter().filter(|n| is_spare(n)).cloned().collect();
        let number = |n: &String| u64::from_str_radix(n.strip_prefix("spare-")?, 16).ok();
        let spare_count = spares.iter().filter_map(number).max().unwrap_or(0);
        let runs = Runs::open(self.disk.as_ref(), &self.names, sb.volume, &self.segments)?;
        let store = Store {
            config: self.config,
            disk: self.disk,
            sb,
            super_file,
            base,
            summing: 0,
            segments: self.segments,
            runs,
            open: self.open,
            spares,
            spare_count,
            next_segment: self.highest.next(),
            group: AlignedBuf::with_capacity(MAX_GROUP_BYTES),
            pending: Vec::new(),
            durable: self.at,
            chain: self.chain,
            received: self.at,
            received_chain: self.chain,
            received_size: self.size,
            recent: self.recent,
            book: self.book,
            undelivered: Vec::new(),
            comparer: super::compare::Comparer::default(),
            pins: Arc::new(Mutex::new(BTreeMap::new())),
            expiry: None,
            pass: None,
            distrust_holes: self.report.apply_pending,
            doomed: Vec::new(),
            poisoned: None,
            _lock: lock,
        };
        Ok((store, self.report))
    }
}
