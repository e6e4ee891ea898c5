//! The replica store of one volume: journal segments, base image, super block.
//!
//! ```text
//! super          four blocks: floor, base, generation        (superblock.rs, FORMAT.md)
//! seed.img       becomes base.img when the store is made
//! base.img       raw sparse image: the volume at `base`
//! base.crc       its checksums                                 (base.rs)
//! seg-NNNN       journal segments, ascending; the last one is open    (farshore-changelog)
//! run-LL-NNNN    index of many segments                               (runs, FORMAT.md)
//! spare-N        prewritten files that become segments
//! lost-*         what recovery put aside because it could not be right; never read again
//! lock           held while the store is open
//! ```
//! One thread owns a [`Store`] and calls it; views ([`PointReader`]) may be used from any thread.
//! No clock, no async runtime; files only through [`Disk`]. Owns the watermarks `journaled`
//! (durable) and `applied` (base); never acknowledges what is not durable.

mod append;
mod base;
mod cache;
mod check;
mod compare;
mod copy_out;
mod disk;
mod durable_fs;
mod error;
mod expire;
mod faults;
mod inspect;
pub mod limits;
mod loss;
mod offline;
mod order;
mod query;
mod read_only;
mod recover;
mod rot;
mod runs;
mod scan;
mod scrub;
mod segment;
mod segment_files;
mod sim_disk;
mod superblock;
#[cfg(test)]
mod tests;
mod verify;
mod view;

use std::collections::BTreeMap;
use std::sync::Arc;

use farshore_changelog::{BatchHeader, SegmentHeader, SegmentId, SegmentIndexBuilder};
use farshore_extent::{
    BlockSizes, CaptureOrder, Chain, Generation, Lsn, VolumeId, VolumeSize, WallTime,
};

pub use append::Committed;
pub use check::{CheckReport, Finding, check};
pub use compare::{Compared, Defect};
pub use copy_out::{Copied, CopyError, ImageSink, copy_out};
pub use disk::{ALIGN, AlignedBuf, Disk, DiskFile, FileKind, Stretch};
pub use durable_fs::FileDisk;
pub(crate) use durable_fs::stretch;
pub use error::{AppendError, ReadError, StoreError, ViewError};
pub use expire::{ExpireProgress, Held};
pub use faults::Faults;
pub use inspect::{InspectedBatch, InspectedSegment, inspect, inspect_segment};
pub use loss::{Behind, Written};
pub use offline::OfflineStore;
pub(crate) use order::behind;
pub use order::{CommittedPoint, OrderedStretch, StoreEvent};
pub use read_only::ReadOnlyDisk;
pub(crate) use read_only::same_file;
pub(crate) use recover::SEED;
pub use recover::{Damage, RecoveryReport};
pub use scrub::{ScrubFinding, Scrubbed};
pub use sim_disk::{SimDisk, SimFaults};
pub use superblock::{Super, SuperError};
pub use view::{Content, OpenViews, PointReader};

use base::Base;
use compare::Comparer;
use order::OrderBook;
use runs::Runs;
use segment::Segment;
use view::Pins;

/// What a new store is made for.
#[derive(Debug, Clone, Copy)]
pub struct StoreMeta {
    /// The volume.
    pub volume: VolumeId,
    /// Its size in bytes.
    pub size: VolumeSize,
    /// Its block sizes.
    pub blocks: BlockSizes,
    /// First generation given out.
    pub generation: Generation,
    /// Now; a label.
    pub created: WallTime,
}

/// Sizes of a store. The defaults are the product's; the simulator takes tiny ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreConfig {
    /// Size of a segment file in bytes, a multiple of 4096.
    pub segment_bytes: u64,
    /// Prewritten segments kept for a full disk.
    pub reserve_segments: usize,
    /// Segments merged into the base in one round.
    pub apply_segments: usize,
    /// Bytes written to the base in one call of [`Store::expire`].
    pub apply_step_bytes: u64,
    /// Runs of one level that become one of the next, at least 2.
    pub run_fanout: u64,
    /// Entries merged in one call of [`Store::merge_runs`].
    pub merge_step: usize,
    /// Planted faults; none outside of tests.
    pub faults: Faults,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            segment_bytes: limits::SEGMENT_BYTES,
            reserve_segments: limits::RESERVE_SEGMENTS,
            apply_segments: limits::APPLY_SEGMENTS,
            apply_step_bytes: limits::APPLY_STEP_BYTES,
            run_fanout: limits::RUN_FANOUT,
            merge_step: limits::MERGE_STEP,
            faults: Faults::default(),
        }
    }
}

/// How far a store has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Fencing number: batches must carry it.
    pub generation: Generation,
    /// Everything up to here is durable; only this is ever acknowledged.
    pub durable: Lsn,
    /// Chain at `durable`.
    pub chain: Chain,
    /// Everything up to here was taken by [`Store::append`]; the next batch must follow it.
    pub received: Lsn,
    /// Oldest place that can be opened.
    pub floor: Lsn,
    /// The base image holds this place.
    pub base: Lsn,
    /// Order at `durable`.
    pub order: CaptureOrder,
    /// Size of the volume at `durable`.
    pub size: VolumeSize,
}

/// The segment that is being written.
struct OpenSegment {
    file: Arc<dyn DiskFile>,
    builder: SegmentIndexBuilder,
}

impl OpenSegment {
    const fn header(&self) -> &SegmentHeader {
        self.builder.header()
    }
}

/// A batch that waits for the commit.
struct Pending {
    header: BatchHeader,
    /// Where it begins in the group's buffer.
    at: usize,
    /// It has digests to compare.
    asks: bool,
}

/// The replica store of one volume.
pub struct Store {
    config: StoreConfig,
    disk: Arc<dyn Disk>,
    sb: Super,
    super_file: Arc<dyn DiskFile>,
    base: Arc<Base>,
    /// How far the checksums of the base are made; super follows.
    summing: u64,
    /// Sealed (or given up) segments, ascending.
    segments: Vec<Arc<Segment>>,
    runs: Runs,
    open: Option<OpenSegment>,
    /// Names of prewritten files.
    spares: Vec<String>,
    /// Highest number given to a spare.
    spare_count: u64,
    next_segment: SegmentId,
    group: AlignedBuf,
    pending: Vec<Pending>,
    durable: Lsn,
    chain: Chain,
    received: Lsn,
    received_chain: Chain,
    received_size: VolumeSize,
    /// Chains of recent batches by their last place.
    recent: BTreeMap<Lsn, Chain>,
    book: OrderBook,
    undelivered: Vec<StoreEvent>,
    pins: Pins,
    comparer: Comparer,
    expiry: Option<expire::Expiry>,
    /// A scrub under way.
    pass: Option<scrub::Pass>,
    /// A merge was interrupted: holes of the base may be there in the page cache only.
    distrust_holes: bool,
    /// Segments below the base that a view still reads.
    doomed: Vec<Arc<Segment>>,
    poisoned: Option<String>,
    _lock: Box<dyn Send>,
}

impl Store {
    /// How far it has come.
    #[must_use]
    pub fn position(&self) -> Position {
        Position {
            generation: self.sb.generation,
            durable: self.durable,
            chain: self.chain,
            received: self.received,
            floor: self.sb.floor,
            base: self.sb.base,
            order: self.book.current(),
            size: self.open.as_ref().map_or_else(
                || self.segments.last().map_or(self.sb.size, |s| s.size),
                |open| open.builder.size(),
            ),
        }
    }

    /// The volume it is for.
    #[must_use]
    pub const fn volume(&self) -> VolumeId {
        self.sb.volume
    }

    /// Block sizes of the volume.
    #[must_use]
    pub const fn blocks(&self) -> BlockSizes {
        self.sb.blocks
    }

    /// The first failure, once a write or sync has failed: nothing is acknowledged any more.
    #[must_use]
    pub fn poisoned(&self) -> Option<&str> {
        self.poisoned.as_deref()
    }

    /// Raises the generation durably: batches of sources with the old one are refused from now on.
    /// What was appended and not committed is dropped.
    ///
    /// # Errors
    /// [`StoreError`]; the store is then poisoned.
    pub fn raise_generation(&mut self) -> Result<Generation, StoreError> {
        self.check_alive()?;
        self.forget_uncommitted();
        self.sb.generation = self.sb.generation.next();
        self.store_super()?;
        Ok(self.sb.generation)
    }

    /// Raises the generation durably up to `to`; nothing when it is there already.
    ///
    /// # Errors
    /// As for [`Self::raise_generation`].
    pub fn raise_generation_to(&mut self, to: Generation) -> Result<(), StoreError> {
        self.check_alive()?;
        if self.sb.generation >= to {
            return Ok(());
        }
        self.forget_uncommitted();
        self.sb.generation = to;
        self.store_super()
    }

    /// Drops batches that were appended and not committed: their source is gone and will send
    /// them again.
    pub fn forget_uncommitted(&mut self) {
        self.group.clear();
        self.pending.clear();
        self.received = self.durable;
        self.received_chain = self.chain;
        self.received_size = self.position().size;
    }

    fn check_alive(&self) -> Result<(), StoreError> {
        match &self.poisoned {
            None => Ok(()),
            Some(first) => Err(StoreError::Poisoned { first: first.clone() }),
        }
    }

    /// Latches the first failure of a write or sync (design 04 rule 4).
    fn poison(&mut self, error: StoreError) -> StoreError {
        self.poisoned.get_or_insert_with(|| error.to_string());
        error
    }

    fn store_super(&mut self) -> Result<(), StoreError> {
        self.sb.durable = self.durable;
        let stored = self.sb.store_next(self.super_file.as_ref());
        stored.map_err(|e| self.poison(e))
    }

    fn sync_dir(&mut self) -> Result<(), StoreError> {
        if self.config.faults.no_dir_sync {
            return Ok(());
        }
        let synced = self.disk.sync_dir().map_err(|e| StoreError::io("syncing the directory", e));
        synced.map_err(|e| self.poison(e))
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("position", &self.position()).finish_non_exhaustive()
    }
}
