//! The spool of one volume: batches on the source's disk that the target does not have yet.
//!
//! Segments as FORMAT.md gives them, without footer and trailer: a header block, then batches
//! byte for byte as they will travel, each at a multiple of 4096. A segment is synced before the
//! next one is begun, so only the newest can have a torn tail. Nothing durable is written again:
//! after a restart or a failure a new segment is begun.
//!
//! Knows no clock, no limits and no target; [`crate::supply`] decides what is kept here.

mod disk;
mod recover;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use farshore_changelog::limits::{MAX_BATCH_BYTES, MAX_SEGMENT_BYTES, SEGMENT_ALIGN};
use farshore_changelog::{
    BatchError, BatchHeader, EncodedBatch, RawBatch, SegmentHeader, SegmentId,
};
use farshore_extent::{
    BlockSizes, CaptureOrder, Chain, Generation, Lsn, VolumeId, VolumeSize, WallTime,
};

pub use disk::{FolderDisk, SpoolDisk};

const ALIGN: u64 = SEGMENT_ALIGN as u64;

/// Bytes of a segment after which the next one is begun.
pub const SEGMENT_BYTES: u64 = 64 << 20;

/// Mistakes built in on purpose, to prove that the simulator finds each. None in the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpoolFaults {
    /// Tells `filterd` to let go of records that are written and not synced.
    pub release_before_sync: bool,
    /// Believes the last batches after a restart without verifying them.
    pub tail_not_checked: bool,
    /// Sends what is newest before what lies in the spool.
    pub sent_out_of_order: bool,
}

/// Whose batches these are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpoolOwner {
    /// The volume.
    pub volume: VolumeId,
    /// Its size in bytes.
    pub size: VolumeSize,
    /// Its block sizes in bytes.
    pub blocks: BlockSizes,
    /// Bytes of a segment; [`SEGMENT_BYTES`] in the product.
    pub segment_bytes: u64,
}

/// A place between two batches, and the history before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Border {
    /// Last place before it.
    pub after: Lsn,
    /// Chain there.
    pub chain: Chain,
    /// Generation of the batches around it.
    pub generation: Generation,
}

impl Border {
    /// The border before a batch.
    #[must_use]
    pub const fn before(header: &BatchHeader) -> Self {
        let BatchHeader { prev, prev_chain, generation, .. } = *header;
        Self { after: prev, chain: prev_chain, generation }
    }

    /// The border after a batch.
    #[must_use]
    pub const fn behind(header: &BatchHeader) -> Self {
        Self { after: header.last(), chain: header.chain, generation: header.generation }
    }
}

/// Where the next batch to be read lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    segment: SegmentId,
    at: u64,
    border: Border,
}

impl Cursor {
    /// What was read before it.
    #[must_use]
    pub const fn border(&self) -> Border {
        self.border
    }
}

/// Why a batch cannot be read back.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Of the medium.
    #[error("segment {segment} of the spool cannot be read at {at}: {source}")]
    Io {
        /// Which segment.
        segment: SegmentId,
        /// Byte offset in it.
        at: u64,
        /// What the system says.
        source: io::Error,
    },
    /// The bytes are not those that were written.
    #[error("segment {segment} of the spool is damaged at {at}: {source}")]
    Damaged {
        /// Which segment.
        segment: SegmentId,
        /// Byte offset in it.
        at: u64,
        /// Which check.
        source: BatchError,
    },
}

#[derive(Debug)]
struct Segment {
    id: SegmentId,
    first: Border,
    /// Border after its last batch, written or durable.
    last: Border,
    /// Where the next batch goes.
    end: u64,
    created: WallTime,
}

/// See the module.
#[derive(Debug)]
pub struct Spool<D> {
    disk: D,
    owner: SpoolOwner,
    faults: SpoolFaults,
    /// Oldest first, each following the one before.
    segments: VecDeque<Segment>,
    next: SegmentId,
    /// The last segment was begun in this run and takes more.
    writable: bool,
    /// Border and end of the last segment at its last sync.
    synced: Option<(Border, u64)>,
    unsynced: u64,
    bytes: u64,
}

impl<D: SpoolDisk> Spool<D> {
    /// Appends a batch; durable after [`Self::sync`]. It must follow [`Self::end`], if there is one.
    ///
    /// # Errors
    /// Of the medium. Call [`Self::give_up_tail`] then.
    pub fn append(&mut self, batch: &EncodedBatch) -> io::Result<Cursor> {
        let before = Border::before(&batch.header);
        debug_assert!(self.end().is_none_or(|end| end == before), "a gap in the spool");
        let room = (self.owner.segment_bytes).min(MAX_SEGMENT_BYTES - ALIGN);
        let padded = (batch.bytes.len() as u64).next_multiple_of(ALIGN);
        let fits = |s: &Segment| s.end == ALIGN || s.end + padded <= room;
        if !self.writable || !self.segments.back().is_some_and(fits) {
            self.begin(before, batch.header.first_time)?;
        }
        let segment = self.segments.back_mut().ok_or(io::ErrorKind::NotFound)?;
        let cursor = Cursor { segment: segment.id, at: segment.end, border: before };
        self.disk.write_at(segment.id, segment.end, &batch.bytes)?;
        segment.end += padded;
        segment.last = Border::behind(&batch.header);
        self.unsynced += padded;
        self.bytes += padded;
        Ok(cursor)
    }

    /// Begins a segment; the one before is durable first.
    fn begin(&mut self, before: Border, created: WallTime) -> io::Result<()> {
        self.sync()?;
        let id = self.next;
        self.next = id.next();
        let SpoolOwner { volume, size, blocks, segment_bytes } = self.owner;
        let header = SegmentHeader {
            volume,
            generation: before.generation,
            epoch: before.after.epoch,
            segment: id,
            prev: before.after,
            prev_chain: before.chain,
            created,
            capacity: segment_bytes.next_multiple_of(ALIGN).max(3 * ALIGN),
            size,
            blocks,
            // Not known here, and nobody asks: the target follows the order by the records.
            order: CaptureOrder::CatchUp,
        };
        self.disk.create(id)?;
        self.writable = true;
        self.synced = None;
        self.segments.push_back(Segment { id, first: before, last: before, end: ALIGN, created });
        self.bytes += ALIGN;
        self.unsynced += ALIGN;
        self.disk.write_at(id, 0, &header.encode())
    }

    /// Makes everything appended durable.
    ///
    /// # Errors
    /// Of the medium. Call [`Self::give_up_tail`] then: a second try would prove nothing.
    pub fn sync(&mut self) -> io::Result<()> {
        let Some(last) = self.segments.back().filter(|_| self.unsynced > 0) else { return Ok(()) };
        self.disk.sync(last.id)?;
        self.synced = Some((last.last, last.end));
        self.unsynced = 0;
        Ok(())
    }

    /// After a failure: what was not synced is not in the spool. The next batch begins a segment.
    pub fn give_up_tail(&mut self) {
        self.writable = false;
        if self.unsynced == 0 {
            return;
        }
        self.bytes -= self.unsynced.min(self.bytes);
        self.unsynced = 0;
        let Some(last) = self.segments.back_mut() else { return };
        if let Some((border, end)) = self.synced {
            (last.last, last.end) = (border, end);
        } else {
            // Best effort: a left-over is recognised, its batches are not followed by any.
            let _ = self.disk.delete(last.id);
            self.segments.pop_back();
            self.synced = self.segments.back().map(|s| (s.last, s.end));
        }
    }

    /// The border after the last batch; none when the spool is empty.
    #[must_use]
    pub fn end(&self) -> Option<Border> {
        self.segments.back().map(|s| s.last)
    }

    /// The border after the last durable batch.
    #[must_use]
    pub fn durable_end(&self) -> Option<Border> {
        if self.unsynced == 0 {
            return self.end();
        }
        let before = || Some(self.segments.get(self.segments.len().checked_sub(2)?)?.last);
        self.synced.map(|(border, _)| border).or_else(before)
    }

    /// Bytes written since the last sync.
    #[must_use]
    pub const fn unsynced(&self) -> u64 {
        self.unsynced
    }

    /// Bytes of all segments.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Capture time of the oldest batch.
    #[must_use]
    pub fn since(&self) -> Option<WallTime> {
        self.segments.front().map(|s| s.created)
    }

    /// Where reading begins.
    #[must_use]
    pub fn first(&self) -> Option<Cursor> {
        self.segments.front().map(Segment::first)
    }

    /// The cursor behind the batch that ends at this border, if there is one here. The end of the
    /// spool is not found: nothing is to be read there.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn find(&mut self, border: Border) -> Result<Option<Cursor>, ReadError> {
        let holds = |s: &&Segment| s.first.after <= border.after && border.after < s.last.after;
        let Some(mut cursor) = self.segments.iter().find(holds).map(Segment::first) else {
            return Ok(None);
        };
        while cursor.border.after < border.after {
            let header = self.header(cursor)?;
            cursor.at += (header.total_len() as u64).next_multiple_of(ALIGN);
            cursor.border = Border::behind(&header);
        }
        Ok((cursor.border == border).then_some(cursor))
    }

    /// The batch at the cursor, verified, and the cursor moved behind it; none at the end.
    ///
    /// # Errors
    /// [`ReadError`]; the batch and all after it are lost.
    pub fn read(&mut self, cursor: &mut Cursor) -> Result<Option<Arc<EncodedBatch>>, ReadError> {
        let within = |s: &Segment| s.id == cursor.segment && s.last != cursor.border;
        if !self.segments.iter().any(within) {
            // At the end of its segment, which may be trimmed already.
            let follows = |s: &&Segment| s.first == cursor.border && s.last != cursor.border;
            let Some(next) = self.segments.iter().find(follows) else { return Ok(None) };
            *cursor = next.first();
        }
        let header = self.header(*cursor)?;
        let bytes = self.bytes_of(*cursor, &header)?;
        let damaged =
            |source| ReadError::Damaged { segment: cursor.segment, at: cursor.at, source };
        if !self.faults.tail_not_checked {
            RawBatch::parse(&bytes).and_then(RawBatch::check).map_err(damaged)?;
        }
        cursor.at += (bytes.len() as u64).next_multiple_of(ALIGN);
        cursor.border = Border::behind(&header);
        Ok(Some(Arc::new(EncodedBatch { header, bytes })))
    }

    /// The header of the batch at the cursor; it must follow what was read before.
    fn header(&mut self, cursor: Cursor) -> Result<BatchHeader, ReadError> {
        let Cursor { segment, at, border } = cursor;
        let mut head = [0; BatchHeader::LEN];
        let io = |source| ReadError::Io { segment, at, source };
        let read = self.disk.read_at(segment, at, &mut head).map_err(io)?;
        let damaged = |source| ReadError::Damaged { segment, at, source };
        let header = BatchHeader::parse(&head[..read]).map_err(damaged)?;
        let ours = header.volume == self.owner.volume && header.total_len() <= MAX_BATCH_BYTES;
        if !ours || Border::before(&header) != border {
            return Err(damaged(BatchError::Field("previous place")));
        }
        Ok(header)
    }

    fn bytes_of(&mut self, cursor: Cursor, header: &BatchHeader) -> Result<Vec<u8>, ReadError> {
        let Cursor { segment, at, .. } = cursor;
        let mut bytes = vec![0; header.total_len()];
        let io = |source| ReadError::Io { segment, at, source };
        let read = self.disk.read_at(segment, at, &mut bytes).map_err(io)?;
        if read < bytes.len() {
            let source = BatchError::Truncated { needed: bytes.len(), have: read };
            return Err(ReadError::Damaged { segment, at, source });
        }
        Ok(bytes)
    }

    /// Everything up to `upto` is durable at the target: its segments are removed.
    pub fn trim(&mut self, upto: Lsn) {
        while let Some(oldest) = self.segments.front().filter(|s| s.last.after <= upto) {
            let (id, len) = (oldest.id, oldest.end);
            if let Err(error) = self.disk.delete(id) {
                tracing::warn!(segment = %id, %error, "a segment of the spool was not removed");
                // Never again the last: it would be taken for the newest after a restart.
                if self.segments.len() == 1 {
                    return;
                }
            }
            self.segments.pop_front();
            self.bytes -= len.min(self.bytes);
        }
        if self.segments.is_empty() {
            (self.writable, self.synced, self.unsynced, self.bytes) = (false, None, 0, 0);
        }
    }

    /// Removes everything.
    pub fn clear(&mut self) {
        let end = self.end().map_or(Lsn::ZERO, |end| end.after);
        self.trim(end);
    }
}

impl Segment {
    const fn first(&self) -> Cursor {
        Cursor { segment: self.id, at: ALIGN, border: self.first }
    }
}

#[cfg(test)]
mod tests;
