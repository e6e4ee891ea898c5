//! The spool of one volume: batches on the source's disk that the target does not have yet.
//!
//! Segments as FORMAT.md gives them, without footer and trailer: a header block, then batches
//! byte for byte as they will travel, each at a multiple of 4096. A segment is synced before the
//! next one is begun, so only the newest can have a torn tail. Nothing durable is written again:
//! after a restart or a failure a new segment is begun. Merging puts a smaller segment in the place
//! of one as a whole (`merge`); the batches behind it then follow it by place and no longer by
//! chain. Whoever sends them chains them anew.
//!
//! Knows no clock, no limits and no target; [`crate::supply`] decides what is kept here.

mod disk;
mod merge;
mod recover;
mod rewrite;

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
pub use merge::Merged;
pub use rewrite::room_for;

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
    /// Merges without saying that order is lost.
    pub merged_without_gap: bool,
    /// Drops what is written again after the point that is kept.
    pub merged_beyond_point: bool,
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

    /// Whether it is the same place of the same generation; the chains may differ after a merge.
    #[must_use]
    pub fn is_at(&self, other: Self) -> bool {
        (self.after, self.generation) == (other.after, other.generation)
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
    /// It was part of groups of up to `2^level` segments that were merged, or not worth it.
    level: u8,
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
    /// A border as the target knows it, inside the row: where [`Self::find`] begins.
    anchor: Option<Border>,
    /// Newest segment that may have been sent; none when nothing was.
    sent: Option<SegmentId>,
    /// What may have been sent is not known: nothing is merged.
    sent_unknown: bool,
    /// It was empty once in this run, and nothing was merged since: every chain is the one sent.
    straight: bool,
    merge: Option<merge::Merge>,
    merged: Option<Merged>,
}

impl<D: SpoolDisk> Spool<D> {
    /// Appends a batch; durable after [`Self::sync`]. Its place must follow [`Self::end`], if there
    /// is one. `sent` tells that the target may have received it.
    ///
    /// # Errors
    /// Of the medium. Call [`Self::give_up_tail`] then.
    pub fn append(&mut self, batch: &EncodedBatch, sent: bool) -> io::Result<Cursor> {
        let before = Border::before(&batch.header);
        debug_assert!(self.end().is_none_or(|end| end.is_at(before)), "a gap in the spool");
        let room = (self.owner.segment_bytes).min(MAX_SEGMENT_BYTES - ALIGN);
        let padded = (batch.bytes.len() as u64).next_multiple_of(ALIGN);
        let fits = |s: &Segment| s.last == before && (s.end == ALIGN || s.end + padded <= room);
        if !self.writable || !self.segments.back().is_some_and(fits) {
            self.begin(before, batch.header.first_time)?;
        }
        let segment = self.segments.back().ok_or(io::ErrorKind::NotFound)?;
        let cursor = Cursor { segment: segment.id, at: segment.end, border: before };
        if sent {
            self.note_sent(cursor);
        }
        let segment = self.segments.back_mut().ok_or(io::ErrorKind::NotFound)?;
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
        self.segments.push_back(Segment {
            id,
            first: before,
            last: before,
            end: ALIGN,
            created,
            level: 0,
        });
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

    /// Bytes of all segments, without the one that is being written anew.
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

    /// The cursor behind the batch that ends at this border, as the target knows it, if there is
    /// one here. The end of the spool is not found: nothing is to be read there.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn find(&mut self, border: Border) -> Result<Option<Cursor>, ReadError> {
        let Some(first) = self.segments.front().map(|s| s.first) else { return Ok(None) };
        let anchor = self.anchor.filter(|a| a.after <= border.after);
        let mut begin = None;
        if let Some(anchor) = anchor.filter(|a| a.generation == first.generation) {
            begin = self.cursor_at(anchor.after)?.map(|cursor| (cursor, anchor.chain));
        }
        // What was never merged has the chain that was sent.
        let first = || Some((self.segments.front()?.first(), first.chain));
        let Some((mut cursor, mut chain)) = begin.or_else(first) else { return Ok(None) };
        while cursor.border.after < border.after {
            let Some(next) = self.at_batch(cursor) else { return Ok(None) };
            cursor = next;
            let header = self.header(cursor)?;
            chain = if header.prev_chain == chain {
                header.chain
            } else {
                let bytes = self.bytes_of(cursor, &header)?;
                EncodedBatch { header, bytes }.chained(chain).header.chain
            };
            cursor = cursor.behind(&header);
        }
        let here = Border { chain, ..cursor.border };
        let found = if here == border { self.at_batch(cursor) } else { None };
        if found.is_some() {
            self.anchor = Some(border);
        }
        Ok(found)
    }

    /// The cursor at a place that is a border; by place only.
    fn cursor_at(&mut self, place: Lsn) -> Result<Option<Cursor>, ReadError> {
        let holds = |s: &&Segment| s.first.after <= place && place < s.last.after;
        let Some(mut cursor) = self.segments.iter().find(holds).map(Segment::first) else {
            return Ok(None);
        };
        while cursor.border.after < place {
            let header = self.header(cursor)?;
            cursor = cursor.behind(&header);
        }
        Ok((cursor.border.after == place).then_some(cursor))
    }

    /// The cursor itself, or the begin of the next segment when it is at the end of its own, which
    /// may be trimmed already. None at the end.
    fn at_batch(&self, cursor: Cursor) -> Option<Cursor> {
        let place = cursor.border;
        let within = |s: &Segment| s.id == cursor.segment && s.last.after > place.after;
        if self.segments.iter().any(within) {
            return Some(cursor);
        }
        let follows = |s: &&Segment| s.first.is_at(place) && s.last.after > place.after;
        self.segments.iter().find(follows).map(Segment::first)
    }

    /// The batch at the cursor, verified, and the cursor moved behind it; none at the end. Its
    /// chain is that of the spool.
    ///
    /// # Errors
    /// [`ReadError`]; the batch and all after it are lost.
    pub fn read(&mut self, cursor: &mut Cursor) -> Result<Option<Arc<EncodedBatch>>, ReadError> {
        let Some(here) = self.at_batch(*cursor) else { return Ok(None) };
        let header = self.header(here)?;
        let bytes = self.bytes_of(here, &header)?;
        let damaged = |source| ReadError::Damaged { segment: here.segment, at: here.at, source };
        if !self.faults.tail_not_checked {
            RawBatch::parse(&bytes).and_then(RawBatch::check).map_err(damaged)?;
        }
        *cursor = here.behind(&header);
        Ok(Some(Arc::new(EncodedBatch { header, bytes })))
    }

    /// What is in this segment and before may be received from here on: it is not merged any more.
    pub fn note_sent(&mut self, cursor: Cursor) {
        if self.sent.is_some_and(|sent| cursor.segment <= sent) {
            return;
        }
        if let Err(error) = self.disk.note_sent(cursor.segment) {
            // Sending goes on. Should it be merged in a later run, the target's place is not found
            // in the spool, and the volume is compared.
            tracing::warn!(%error, "it cannot be noted what was sent; points are not merged");
            self.sent_unknown = true;
        }
        self.sent = Some(cursor.segment);
    }

    /// Whether what is left after [`Self::trim`] needs no memory of what was sent before it.
    #[must_use]
    pub const fn is_straight(&self) -> bool {
        self.straight
    }

    /// The target has acknowledged this border: reading after a restart begins there.
    pub const fn acknowledged(&mut self, border: Border) {
        self.anchor = Some(border);
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
            (self.anchor, self.merged, self.straight) = (None, None, true);
            self.stop_merging();
        }
    }

    /// Removes everything.
    pub fn clear(&mut self) {
        let end = self.end().map_or(Lsn::ZERO, |end| end.after);
        self.trim(end);
    }
}

impl Cursor {
    fn behind(self, header: &BatchHeader) -> Self {
        let at = self.at + (header.total_len() as u64).next_multiple_of(ALIGN);
        Self { segment: self.segment, at, border: Border::behind(header) }
    }

    /// The segment it is in.
    #[must_use]
    pub const fn segment(&self) -> SegmentId {
        self.segment
    }
}

impl Segment {
    const fn first(&self) -> Cursor {
        Cursor { segment: self.id, at: ALIGN, border: self.first }
    }
}

#[cfg(test)]
mod merge_tests;
#[cfg(test)]
mod tests;
