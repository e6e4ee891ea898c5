//! Segments: one append-only file of the journal or the spool.
//!
//! ```text
//! header block | batch | pad | batch | pad | ... | footer pages | unused | trailer block
//! 0            4096                               footer_block           capacity - 4096
//! ```
//! Everything begins at a multiple of 4096, so that a durable sector is never written again. The
//! trailer is written last: with it the segment is sealed and is never scanned again. Nothing
//! here reads a file; places are given by the owner of the file.

use core::fmt;

use farshore_extent::{
    BlockSizes, CaptureOrder, Chain, Epoch, Generation, Lsn, Seq, VolumeId, VolumeSize, WallTime,
};

use crate::layout::{
    array, i64_at, segment_header as head, segment_trailer as tail, u16_at, u32_at, u64_at,
};
use crate::limits::{MAX_SEGMENT_BYTES, SEGMENT_ALIGN};
use crate::record::{RecordBody, RecordError};

const HEADER_MAGIC: [u8; 8] = *b"FARSHSEG";
const TRAILER_MAGIC: [u8; 8] = *b"FARSHEND";
const VERSION: u16 = 1;

/// Number of a segment within its store: counts up, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct SegmentId(u64);

impl SegmentId {
    /// The `n`-th segment.
    #[must_use]
    pub const fn new(n: u64) -> Self {
        Self(n)
    }

    /// The raw number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The one after it.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Why bytes are no part of a segment. Names the failing check.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// The magic is missing: zeroed, foreign or stale.
    #[error("no segment {0} here")]
    Missing(&'static str),
    /// A later version of the format.
    #[error("segment format version {0} is newer than this program understands")]
    Version(u16),
    /// Fewer bytes than needed.
    #[error("segment {what} needs {needed} bytes, {have} are there")]
    Truncated {
        /// Which part.
        what: &'static str,
        /// Bytes needed.
        needed: usize,
        /// Bytes there.
        have: usize,
    },
    /// A checksum is wrong.
    #[error("checksum of the segment's {0} does not match")]
    Checksum(&'static str),
    /// A value no writer produces.
    #[error("segment field {0} is impossible")]
    Field(&'static str),
    /// An event of the footer is malformed.
    #[error("event {index} of the footer: {source}")]
    Event {
        /// Which event.
        index: usize,
        /// What is wrong.
        source: RecordError,
    },
}

/// The first block of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The volume.
    pub volume: VolumeId,
    /// Generation of the store when it began.
    pub generation: Generation,
    /// Epoch of its first batch.
    pub epoch: Epoch,
    /// Its number.
    pub segment: SegmentId,
    /// Last place before it: its first batch has this as `prev`.
    pub prev: Lsn,
    /// Chain there.
    pub prev_chain: Chain,
    /// Capture time of its first batch; a label.
    pub created: WallTime,
    /// Bytes of the file; the trailer is its last block.
    pub capacity: u64,
    /// Size of the volume at `prev`.
    pub size: VolumeSize,
    /// Block sizes of the volume at `prev`.
    pub blocks: BlockSizes,
    /// Order at `prev`.
    pub order: CaptureOrder,
}

impl SegmentHeader {
    /// Bytes of the block.
    pub const LEN: usize = SEGMENT_ALIGN;

    /// The block.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; Self::LEN];
        let mut put = |at: core::ops::Range<usize>, bytes: &[u8]| out[at].copy_from_slice(bytes);
        put(head::magic, &HEADER_MAGIC);
        put(head::version, &VERSION.to_le_bytes());
        put(head::block_len, &u16::try_from(Self::LEN).unwrap_or(0).to_le_bytes());
        put(head::volume, &self.volume.to_bytes());
        put(head::generation, &self.generation.get().to_le_bytes());
        put(head::epoch, &self.epoch.get().to_le_bytes());
        put(head::segment, &self.segment.get().to_le_bytes());
        put(head::prev_epoch, &self.prev.epoch.get().to_le_bytes());
        put(head::prev_seq, &self.prev.seq.get().to_le_bytes());
        put(head::prev_chain, &self.prev_chain.to_bytes());
        put(head::created, &self.created.nanos().to_le_bytes());
        put(head::capacity, &self.capacity.to_le_bytes());
        put(head::volume_size, &self.size.get().to_le_bytes());
        put(head::block_logical, &self.blocks.logical().to_le_bytes());
        put(head::block_physical, &self.blocks.physical().to_le_bytes());
        put(head::order, &[order_byte(self.order)]);
        seal(&mut out, head::crc);
        out
    }

    /// Parses and checks the block; bytes behind it are left alone.
    ///
    /// # Errors
    /// [`SegmentError`] naming the check.
    pub fn parse(bytes: &[u8]) -> Result<Self, SegmentError> {
        let bytes = block(bytes, "header", HEADER_MAGIC, head::crc)?;
        let field = SegmentError::Field;
        if usize::from(u16_at(bytes, head::block_len)) != Self::LEN {
            return Err(field("block length"));
        }
        if u32_at(bytes, head::flags) != 0 {
            return Err(field("flags"));
        }
        let capacity = u64_at(bytes, head::capacity);
        let blocks = 3 * SEGMENT_ALIGN as u64;
        if !(blocks..=MAX_SEGMENT_BYTES).contains(&capacity)
            || !capacity.is_multiple_of(SEGMENT_ALIGN as u64)
        {
            return Err(field("capacity"));
        }
        Ok(Self {
            volume: VolumeId::from_bytes(array(bytes, head::volume)),
            generation: Generation::new(u64_at(bytes, head::generation)),
            epoch: Epoch::new(u64_at(bytes, head::epoch)),
            segment: SegmentId::new(u64_at(bytes, head::segment)),
            prev: lsn_at(bytes, head::prev_epoch, head::prev_seq),
            prev_chain: Chain::from_bytes(array(bytes, head::prev_chain)),
            created: WallTime::from_nanos(i64_at(bytes, head::created)),
            capacity,
            size: VolumeSize::new(u64_at(bytes, head::volume_size))
                .map_err(|_| field("volume size"))?,
            blocks: BlockSizes::new(
                u32_at(bytes, head::block_logical),
                u32_at(bytes, head::block_physical),
            )
            .map_err(|_| field("block sizes"))?,
            order: order_from(bytes[head::order][0]).ok_or(field("order"))?,
        })
    }

    /// Checksum of the block: the trailer repeats it, so that a trailer which an earlier life of
    /// a recycled file left behind never fits.
    #[must_use]
    pub fn crc(&self) -> u32 {
        u32_at(&self.encode(), head::crc)
    }

    /// Where the trailer of the segment lies.
    #[must_use]
    pub const fn trailer_place(&self) -> u64 {
        self.capacity - SEGMENT_ALIGN as u64
    }
}

/// The last block of a sealed segment: what it holds, and where the footer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentTrailer {
    /// The volume.
    pub volume: VolumeId,
    /// Number of the segment.
    pub segment: SegmentId,
    /// [`SegmentHeader::crc`] of the same segment.
    pub header_crc: u32,
    /// Where the footer's pages begin, in blocks of 4096 bytes.
    pub footer_block: u32,
    /// Last place in the segment.
    pub last: Lsn,
    /// Chain there.
    pub chain: Chain,
    /// Earliest capture time in the segment; a label.
    pub min_time: WallTime,
    /// Latest capture time in the segment; a label.
    pub max_time: WallTime,
    /// Batches.
    pub batch_count: u32,
    /// Markers, order changes, resizes, epoch starts.
    pub event_count: u32,
    /// Bytes of auxiliary data of the events.
    pub event_aux_len: u32,
    /// Frames.
    pub frame_count: u32,
    /// Entries of the run.
    pub extent_count: u32,
    /// Order at `last`.
    pub order: CaptureOrder,
    /// Payload before compression, in bytes.
    pub raw_bytes: u64,
    /// Payload as stored, in bytes.
    pub stored_bytes: u64,
    /// Size of the volume at `last`.
    pub size: VolumeSize,
}

impl SegmentTrailer {
    /// Bytes of the block.
    pub const LEN: usize = SEGMENT_ALIGN;

    /// The block.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; Self::LEN];
        let mut put = |at: core::ops::Range<usize>, bytes: &[u8]| out[at].copy_from_slice(bytes);
        put(tail::magic, &TRAILER_MAGIC);
        put(tail::version, &VERSION.to_le_bytes());
        put(tail::volume, &self.volume.to_bytes());
        put(tail::segment, &self.segment.get().to_le_bytes());
        put(tail::header_crc, &self.header_crc.to_le_bytes());
        put(tail::footer_block, &self.footer_block.to_le_bytes());
        put(tail::last_epoch, &self.last.epoch.get().to_le_bytes());
        put(tail::last_seq, &self.last.seq.get().to_le_bytes());
        put(tail::last_chain, &self.chain.to_bytes());
        put(tail::min_time, &self.min_time.nanos().to_le_bytes());
        put(tail::max_time, &self.max_time.nanos().to_le_bytes());
        put(tail::batch_count, &self.batch_count.to_le_bytes());
        put(tail::event_count, &self.event_count.to_le_bytes());
        put(tail::event_aux_len, &self.event_aux_len.to_le_bytes());
        put(tail::frame_count, &self.frame_count.to_le_bytes());
        put(tail::extent_count, &self.extent_count.to_le_bytes());
        put(tail::order, &[order_byte(self.order)]);
        put(tail::raw_bytes, &self.raw_bytes.to_le_bytes());
        put(tail::stored_bytes, &self.stored_bytes.to_le_bytes());
        put(tail::volume_size, &self.size.get().to_le_bytes());
        seal(&mut out, tail::crc);
        out
    }

    /// Parses the block and checks that it belongs to `header` and fits its file.
    ///
    /// # Errors
    /// [`SegmentError`] naming the check; [`SegmentError::Missing`] when the segment is not sealed
    /// (or the block is what an earlier life of the file left behind).
    pub fn parse(bytes: &[u8], header: &SegmentHeader) -> Result<Self, SegmentError> {
        let bytes = block(bytes, "trailer", TRAILER_MAGIC, tail::crc)?;
        let volume = VolumeId::from_bytes(array(bytes, tail::volume));
        let segment = SegmentId::new(u64_at(bytes, tail::segment));
        let header_crc = u32_at(bytes, tail::header_crc);
        if (volume, segment, header_crc) != (header.volume, header.segment, header.crc()) {
            return Err(SegmentError::Missing("trailer"));
        }
        let field = SegmentError::Field;
        if u32_at(bytes, tail::flags) != 0 {
            return Err(field("flags"));
        }
        let trailer = Self {
            volume,
            segment,
            header_crc,
            footer_block: u32_at(bytes, tail::footer_block),
            last: lsn_at(bytes, tail::last_epoch, tail::last_seq),
            chain: Chain::from_bytes(array(bytes, tail::last_chain)),
            min_time: WallTime::from_nanos(i64_at(bytes, tail::min_time)),
            max_time: WallTime::from_nanos(i64_at(bytes, tail::max_time)),
            batch_count: u32_at(bytes, tail::batch_count),
            event_count: u32_at(bytes, tail::event_count),
            event_aux_len: u32_at(bytes, tail::event_aux_len),
            frame_count: u32_at(bytes, tail::frame_count),
            extent_count: u32_at(bytes, tail::extent_count),
            order: order_from(bytes[tail::order][0]).ok_or(field("order"))?,
            raw_bytes: u64_at(bytes, tail::raw_bytes),
            stored_bytes: u64_at(bytes, tail::stored_bytes),
            size: VolumeSize::new(u64_at(bytes, tail::volume_size))
                .map_err(|_| field("volume size"))?,
        };
        let end = trailer.footer_place() + trailer.footer_len() as u64;
        if trailer.footer_block == 0 || end > header.trailer_place() {
            return Err(field("footer place"));
        }
        if trailer.last < header.prev {
            return Err(field("last place"));
        }
        Ok(trailer)
    }

    /// Where the footer's pages begin in the file.
    #[must_use]
    pub const fn footer_place(&self) -> u64 {
        self.footer_block as u64 * SEGMENT_ALIGN as u64
    }
}

fn block<'a>(
    bytes: &'a [u8],
    what: &'static str,
    magic: [u8; 8],
    crc: core::ops::Range<usize>,
) -> Result<&'a [u8], SegmentError> {
    let have = bytes.len();
    let bytes = bytes.get(..SEGMENT_ALIGN).ok_or(SegmentError::Truncated {
        what,
        needed: SEGMENT_ALIGN,
        have,
    })?;
    // Magic and version have the same places in both blocks.
    if bytes[head::magic] != magic {
        return Err(SegmentError::Missing(what));
    }
    let version = u16_at(bytes, head::version);
    if version != VERSION {
        return Err(SegmentError::Version(version));
    }
    if crc32c::crc32c(&bytes[..crc.start]) != u32_at(bytes, crc) {
        return Err(SegmentError::Checksum(what));
    }
    Ok(bytes)
}

fn seal(block: &mut [u8], at: core::ops::Range<usize>) {
    let crc = crc32c::crc32c(&block[..at.start]);
    block[at].copy_from_slice(&crc.to_le_bytes());
}

fn lsn_at(bytes: &[u8], epoch: core::ops::Range<usize>, seq: core::ops::Range<usize>) -> Lsn {
    Lsn::new(Epoch::new(u64_at(bytes, epoch)), Seq::new(u64_at(bytes, seq)))
}

const fn order_byte(order: CaptureOrder) -> u8 {
    match order {
        CaptureOrder::CatchUp => 0,
        CaptureOrder::Ordered => 1,
    }
}

const fn order_from(byte: u8) -> Option<CaptureOrder> {
    match byte {
        0 => Some(CaptureOrder::CatchUp),
        1 => Some(CaptureOrder::Ordered),
        _ => None,
    }
}

/// The order after a record, given the order before it.
#[must_use]
pub const fn order_after(before: CaptureOrder, body: &RecordBody) -> CaptureOrder {
    match body {
        RecordBody::OrderLost => CaptureOrder::CatchUp,
        RecordBody::OrderRestored => CaptureOrder::Ordered,
        RecordBody::EpochStart(start) if !start.continues => CaptureOrder::CatchUp,
        RecordBody::EpochStart(_)
        | RecordBody::Write { .. }
        | RecordBody::Zero { .. }
        | RecordBody::Unknown { .. }
        | RecordBody::Copy { .. }
        | RecordBody::Hash { .. }
        | RecordBody::Marker(_)
        | RecordBody::MarkerCommit(_)
        | RecordBody::MarkerAbort(_)
        | RecordBody::Resize(_) => before,
    }
}
