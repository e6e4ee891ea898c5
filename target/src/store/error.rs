//! What can go wrong in a store, as kinds to branch on, and as a person is told.

use std::io;

use farshore_changelog::{BatchError, SegmentError, SegmentId};
use farshore_extent::{Chain, Epoch, Extent, Generation, Lsn, Problem, VolumeId};

/// The store cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it.
    #[error("the store is in use: {holder}")]
    InUse {
        /// Who, as far as known.
        holder: String,
    },
    /// No store in this directory.
    #[error("there is no store here")]
    NotAStore,
    /// A store exists where one was to be created.
    #[error("there is a store here already")]
    Exists,
    /// Every copy of the super block is damaged.
    #[error("the super block is damaged: {why}")]
    Super {
        /// Which check failed.
        why: String,
    },
    /// Made by a newer version.
    #[error("the store has format version {0}, newer than this program understands")]
    Version(u16),
    /// The medium failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, on which file.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// No space for the journal. Nothing was lost: expire, or give space, and commit again.
    #[error("no space left for {what}")]
    DiskFull {
        /// What needed it.
        what: String,
    },
    /// An earlier write or sync failed: nothing is acknowledged until the store is reopened.
    #[error("stopped after an earlier failure: {first}")]
    Poisoned {
        /// The first failure.
        first: String,
    },
    /// A sealed segment is damaged where it must be read.
    #[error("segment {segment}: {source}")]
    Segment {
        /// Which.
        segment: SegmentId,
        /// The check that failed.
        source: SegmentError,
    },
    /// A run over several segments is damaged.
    #[error("{name}: {source}")]
    Run {
        /// Its file.
        name: String,
        /// The check that failed.
        source: SegmentError,
    },
    /// A batch read back from the journal is damaged.
    #[error("segment {segment}, batch at {place}: {source}")]
    Batch {
        /// Which segment.
        segment: SegmentId,
        /// Where in its file.
        place: u64,
        /// The check that failed.
        source: BatchError,
    },
}

impl StoreError {
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        let what = what.into();
        if is_full(&source) { Self::DiskFull { what } } else { Self::Io { what, source } }
    }

    /// What a person is told. `volume` is its name or identity.
    #[must_use]
    pub fn problem(&self, volume: &str) -> Problem {
        let what = format!("replica store of {volume}: {self}");
        let none = "none, everything acknowledged is on disk";
        let (code, risk, why, next) = match self {
            Self::InUse { .. } => (
                6001,
                "none, nothing was changed",
                "a store has exactly one writer",
                "stop the other process, or use another directory",
            ),
            Self::NotAStore => (
                6002,
                "none, nothing was changed",
                "no copy of its super block was found",
                "check the directory; was the file system mounted?",
            ),
            Self::Exists => (
                6003,
                "none, nothing was changed",
                "a new store never replaces an old one",
                "open it, or move it away",
            ),
            Self::Super { .. } => (
                6004,
                "the replica cannot be used until it is repaired",
                "both generations of the super block fail their checksums",
                "check the disk; restore `super` from a backup or protect the volume anew",
            ),
            Self::Version(_) => (
                6005,
                "none, nothing was changed",
                "the store was written by a newer version",
                "run that version",
            ),
            Self::Io { .. } => (
                6006,
                none,
                "the disk under the store reported an error",
                "look at the kernel's log for this disk; the store is reopened automatically",
            ),
            Self::DiskFull { .. } => (
                6007,
                "none, but new changes wait at the source",
                "the file system of the store is full",
                "free space, shorten retention, or close views that hold the journal",
            ),
            Self::Poisoned { .. } => (
                6008,
                none,
                "after a failed write nothing is acknowledged before all was read again",
                "the store is reopened automatically; look at the kernel's log for this disk",
            ),
            Self::Segment { .. } | Self::Run { .. } | Self::Batch { .. } => (
                6009,
                "points that need the damaged place cannot be opened; newer ones may",
                "bytes read back do not match their checksum",
                "check the disk; a full copy of the volume repairs the newest state",
            ),
        };
        Problem::harmless(code, what, why, next).with_risk(risk)
    }
}

pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// A batch was not taken. Nothing changed.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Of another volume.
    #[error("batch of volume {0} sent to another replica")]
    WrongVolume(VolumeId),
    /// Made by a source that was fenced off.
    #[error("batch of generation {batch}, but the replica is at {own}: this source is fenced")]
    Fenced {
        /// Of the batch.
        batch: Generation,
        /// Of the store.
        own: Generation,
    },
    /// Of a generation nobody gave out here.
    #[error("batch of generation {batch}, but the replica is at {own} only")]
    Ahead {
        /// Of the batch.
        batch: Generation,
        /// Of the store.
        own: Generation,
    },
    /// All of it is here already: acknowledge again.
    #[error("batch up to {last} is here already")]
    Duplicate {
        /// Last place of the batch.
        last: Lsn,
    },
    /// Something is missing before it, or it begins inside what is here.
    #[error("batch follows {prev}, but the replica is at {expected}")]
    Gap {
        /// What the batch follows.
        prev: Lsn,
        /// What it should follow.
        expected: Lsn,
    },
    /// Another history: nothing may be merged.
    #[error("batch follows another history at {at}")]
    Diverged {
        /// Where they differ.
        at: Lsn,
        /// The store's chain there.
        own: Chain,
    },
    /// An epoch that is over.
    #[error("batch of epoch {batch}, but the replica is in {own}")]
    EpochBack {
        /// Of the batch.
        batch: Epoch,
        /// Of the store.
        own: Epoch,
    },
    /// A record lies outside of the volume.
    #[error("record at {extent} is outside of the volume")]
    Outside {
        /// Which range.
        extent: Extent,
    },
    /// The payload is sealed, and this version has no keys.
    #[error("the payload is sealed and this version cannot open it")]
    Sealed,
    /// [`super::limits::MAX_GROUP_BYTES`] are waiting: commit first.
    #[error("the commit group is full")]
    GroupFull,
    /// See [`StoreError::Poisoned`].
    #[error("stopped after an earlier failure: {first}")]
    Poisoned {
        /// The first failure.
        first: String,
    },
}

/// A view cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// Older than the oldest place kept.
    #[error("place {at} has expired: the oldest that can be opened is {floor}")]
    Expired {
        /// What was asked for.
        at: Lsn,
        /// Oldest place.
        floor: Lsn,
    },
    /// Newer than what is durable.
    #[error("place {at} is not here yet: the newest is {durable}")]
    NotYet {
        /// What was asked for.
        at: Lsn,
        /// Newest place.
        durable: Lsn,
    },
    /// Writes were missing at that place: what it shows never existed on the source.
    #[error("place {at} lies in a catch-up and was never a consistent state")]
    NotOrdered {
        /// What was asked for.
        at: Lsn,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ViewError {
    /// What a person is told.
    #[must_use]
    pub fn problem(&self, volume: &str) -> Problem {
        let what = format!("cannot open a view of {volume}: {self}");
        match self {
            Self::Expired { .. } => Problem::harmless(
                6010,
                what,
                "expired points were merged into the base image",
                "choose a newer point; `farshore point list` shows those kept",
            ),
            Self::NotYet { .. } => Problem::harmless(
                6011,
                what,
                "only what is durable can be opened",
                "choose an older point, or wait until the replica has caught up",
            ),
            Self::NotOrdered { .. } => Problem::harmless(
                6012,
                what,
                "while a volume catches up its writes arrive out of order",
                "choose a point before the catch-up or after it",
            ),
            Self::Store(e) => e.problem(volume),
        }
    }
}

/// A range of a view cannot be read. Nothing wrong was given out.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Beyond the end of the volume at that place.
    #[error("range {extent} is outside of the volume")]
    Outside {
        /// Which range.
        extent: Extent,
    },
    /// The content was not known at that place.
    #[error("the content of {extent} is unknown: a write failed at the source")]
    Unknown {
        /// Which range.
        extent: Extent,
    },
    /// A part of the base image does not match its checksum.
    #[error("{extent}: the base image is damaged there")]
    Base {
        /// Which range.
        extent: Extent,
    },
    /// A frame does not match its checksum.
    #[error("{extent}: frame {frame} of segment {segment} is damaged: {why}")]
    Damaged {
        /// Which range of the volume.
        extent: Extent,
        /// In which segment.
        segment: SegmentId,
        /// Which frame.
        frame: u32,
        /// Which check failed.
        why: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ReadError {
    /// What a person is told; the reader of the view gets an I/O error.
    #[must_use]
    pub fn problem(&self, volume: &str) -> Problem {
        let what = format!("cannot read a view of {volume}: {self}");
        match self {
            Self::Outside { .. } => Problem::harmless(
                6013,
                what,
                "the request lies beyond the end of the volume",
                "read within the size that the export announces",
            ),
            Self::Unknown { .. } => Problem::harmless(
                6014,
                what,
                "the source's disk failed a write there and its content was not read again yet",
                "choose another point; check the source's disk",
            )
            .with_risk("these bytes do not exist at this point; all others can be read"),
            Self::Base { .. } => Problem::harmless(
                6015,
                what,
                "bytes of base.img do not match their checksum in base.crc",
                format!(
                    "on the source: farshore resync {volume}, which makes the newest state whole; \
                     check the disk under the store"
                ),
            )
            .with_risk(
                "points that did not overwrite these bytes lack them; all others can be read",
            ),
            Self::Damaged { .. } => Problem::harmless(
                6009,
                what,
                "bytes read back do not match their checksum",
                "choose a newer point that overwrote the range; check the disk under the store",
            )
            .with_risk("these bytes of this point are lost; all others can be read"),
            Self::Store(e) => e.problem(volume),
        }
    }
}
