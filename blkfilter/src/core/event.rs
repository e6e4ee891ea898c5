//! What goes into the core and what comes out.

use farshore_extent::{Extent, Lsn, MarkerId, VolumeSize, WallTime};

use super::region_map::BLOCK_WORDS;
use crate::device::DeviceError;

/// The time, handed in by the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Now {
    /// Label of the records; orders nothing.
    pub wall: WallTime,
    /// A monotonic clock in milliseconds; decides deadlines.
    pub mono_ms: u64,
}

/// A queue of the driver: one thread's way in. Chosen by the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueId(pub u32);

/// The driver's name for a request, unique in its queue; comes back with each action about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// The core's name for a request, from [`Action::Backing`] to [`Event::BackingDone`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IoKey {
    pub(super) index: u32,
    pub(super) round: u32,
}

impl IoKey {
    /// As one number, for a driver that has room for no more.
    #[must_use]
    pub const fn to_raw(self) -> u64 {
        ((self.round as u64) << 32) | self.index as u64
    }
}

/// An attached volume; valid until it is detached, and never given to another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeKey {
    pub(super) index: u32,
    /// Which of those that have had this place.
    pub(super) generation: u64,
}

impl VolumeKey {
    /// A small number: the place of the volume in a table of the driver's.
    #[must_use]
    pub const fn index(self) -> usize {
        self.index as usize
    }
}

/// Room in a volume's pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolSlot {
    pub(super) ticket: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
}

impl PoolSlot {
    /// Where it begins in the pool, in bytes.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.offset
    }

    /// Bytes asked for.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // room for nothing is never reserved
    pub const fn len(self) -> u32 {
        self.len
    }
}

/// Where the payload of a write lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Buffer {
    /// In the volume's pool: it can become a record.
    Pool(PoolSlot),
    /// In a private buffer of the driver's: the write cannot be recorded, its chunks become dirty.
    Spare,
}

/// What happens to the core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The guest writes; the payload is complete in its private buffer.
    Write {
        /// Who gets the answer.
        queue: QueueId,
        /// The driver's name for it.
        token: Token,
        /// Which volume.
        volume: VolumeKey,
        /// Where; at most one record's payload.
        extent: Extent,
        /// Where the payload lies.
        buffer: Buffer,
        /// crc32c of the payload, from that buffer.
        crc: u32,
        /// crc32c of each piece, cut at multiples of the chunk size. Only looked at when the write
        /// lies in clean *and* dirty chunks; when it is empty then, no part is recorded and all
        /// touched chunks become dirty, which is right but copies more.
        pieces: Vec<u32>,
        /// Durable before the answer.
        fua: bool,
    },
    /// The guest zeroes or discards; at most 64 MiB.
    Zero {
        /// Who gets the answer.
        queue: QueueId,
        /// The driver's name for it.
        token: Token,
        /// Which volume.
        volume: VolumeKey,
        /// Where.
        extent: Extent,
        /// Durable before the answer.
        fua: bool,
        /// The space may be given back.
        may_unmap: bool,
    },
    /// The guest flushes.
    Flush {
        /// Who gets the answer.
        queue: QueueId,
        /// The driver's name for it.
        token: Token,
        /// Which volume.
        volume: VolumeKey,
    },
    /// The copy loop has time for one more chunk. Ends with exactly one [`Action::CopyDone`].
    Copy {
        /// The copy loop's queue.
        queue: QueueId,
        /// The driver's name for it.
        token: Token,
        /// Which volume.
        volume: VolumeKey,
        /// The driver believes this range to be a hole. When it covers the chunk that is next, it
        /// is recorded as zero without being read, after [`Backing::CheckHole`] under the lock.
        hole: Option<Extent>,
    },
    /// An [`Action::Backing`] has ended.
    BackingDone {
        /// Which.
        io: IoKey,
        /// How.
        outcome: Outcome,
    },
    /// What [`super::CaptureCore::take_intent`] gave has been written, or could not be.
    IntentDone {
        /// Of which volume.
        volume: VolumeKey,
        /// How it ended.
        end: IntentEnd,
    },
    /// Time has passed; see `CaptureCore::next_deadline`.
    Tick,
}

/// A block of the intent map as it has to be on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IntentBlock {
    /// Which; each has [`super::BLOCK_REGIONS`] regions.
    pub index: usize,
    /// Its bits, the lowest region first.
    pub words: [u64; BLOCK_WORDS],
}

/// Changes of the intent map that become durable together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IntentCommit {
    /// Each as a whole; a block that is torn counts as full.
    pub blocks: Vec<IntentBlock>,
    /// What is not set lies with the target if that has everything up to here.
    pub released: Lsn,
    /// Of the volume. When it has grown, the blocks of the new part are among `blocks`, and they
    /// are durable before this size is.
    pub size: VolumeSize,
}

/// How a commit of the intent map ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IntentEnd {
    /// It is durable.
    Durable,
    /// It is not. Writes go on; the map is not kept until [`super::CaptureCore::resume_intent`].
    Lost(IntentLoss),
}

/// What the disk says while the intent map is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IntentLoss {
    /// That every region may differ: the next start compares all of them.
    AllMayDiffer,
    /// Something old, which a note outside of that disk says; a boot loses the note. A power cut now
    /// would not be noticed as what it is.
    UntilBoot,
    /// Something old: nothing could be written. No crash now would be noticed as what it is.
    Nothing,
}

/// How a backing operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Write, zero or flush: all of it was done.
    Done,
    /// Error or short transfer.
    Failed(DeviceError),
    /// Copy read: the bytes are in the pool and have this crc32c.
    Data {
        /// crc32c of the bytes read.
        crc: u32,
    },
    /// Read for a digest.
    Digest {
        /// BLAKE3 of the bytes read.
        digest: [u8; 32],
        /// They are all zero.
        zero: bool,
    },
    /// Copy read: the bytes are all zero. Hole check: it is still a hole.
    Zeroes,
    /// Hole check: there is data now.
    NotHole,
}

/// What the backing device has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Write the request's private buffer.
    Write {
        /// Where.
        extent: Extent,
        /// Where the payload lies.
        buffer: Buffer,
        /// Durable before the completion.
        fua: bool,
    },
    /// Make the range read as zero.
    Zero {
        /// Where.
        extent: Extent,
        /// Durable before the completion.
        fua: bool,
        /// The space may be given back.
        may_unmap: bool,
    },
    /// Make everything completed so far durable.
    Flush,
    /// Copy loop: read into the pool; answer [`Outcome::Data`], [`Outcome::Zeroes`] or
    /// [`Outcome::Failed`].
    Read {
        /// Where.
        extent: Extent,
        /// Where to.
        slot: PoolSlot,
    },
    /// Copy loop: read into the pool; answer [`Outcome::Digest`] or [`Outcome::Failed`].
    Digest {
        /// Where.
        extent: Extent,
        /// Where to.
        slot: PoolSlot,
    },
    /// Copy loop: look whether the whole range is a hole; answer [`Outcome::Zeroes`],
    /// [`Outcome::NotHole`] or [`Outcome::Failed`].
    CheckHole {
        /// Where.
        extent: Extent,
    },
}

/// How one turn of the copy loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyEnd {
    /// This many bytes of the volume were recorded.
    Copied {
        /// Bytes of the volume, read or found to be a hole.
        bytes: u64,
    },
    /// The digest of this many bytes was recorded.
    Compared {
        /// Bytes of the volume.
        bytes: u64,
        /// For a verify: its own, lower rate holds.
        verify: bool,
    },
    /// Nothing to copy or to ask about: wait for [`Action::CopyWanted`].
    Clean,
    /// Half of the pool is in use, the list of records is full, or too much is asked: wait for
    /// [`Action::CopyWanted`].
    PoolBusy,
    /// The hole has been filled meanwhile: ask again without the hint.
    NotHole,
    /// The backing device could not read; the chunk stays dirty, the next turn takes another one.
    Failed,
}

/// What the driver has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Start an operation on the backing device of the request's volume.
    Backing {
        /// The queue of the request.
        queue: QueueId,
        /// The request.
        token: Token,
        /// To be given back with [`Event::BackingDone`].
        io: IoKey,
        /// What to do.
        what: Backing,
    },
    /// Answer the guest.
    Answer {
        /// The queue of the request.
        queue: QueueId,
        /// The request.
        token: Token,
        /// What to say.
        result: Result<(), DeviceError>,
    },
    /// The end of an [`Event::Copy`].
    CopyDone {
        /// The copy loop's queue.
        queue: QueueId,
        /// As given.
        token: Token,
        /// How it ended.
        end: CopyEnd,
    },
    /// A record was appended.
    Recorded {
        /// To which volume.
        volume: VolumeKey,
        /// Its payload in bytes.
        payload: u64,
        /// It should be fetched at once (markers, changes of order).
        urgent: bool,
    },
    /// The intent map has changed: [`super::CaptureCore::take_intent`].
    IntentWanted {
        /// Of which volume.
        volume: VolumeKey,
        /// Writes wait for it. Otherwise it may be left for a second, to be written with more.
        urgent: bool,
    },
    /// Flush the backing of the volume and report [`Event::BackingDone`], so that regions can be
    /// cleared. Nobody waits for it.
    FlushWanted {
        /// Which volume.
        volume: VolumeKey,
        /// To be given back.
        io: IoKey,
    },
    /// There is something to copy and room for it.
    CopyWanted {
        /// In which volume.
        volume: VolumeKey,
    },
    /// A hold reached its deadline; its answers were let go and it will be reported broken.
    HoldBroken {
        /// The marker of the hold.
        marker: MarkerId,
    },
}
