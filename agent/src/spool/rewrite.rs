//! Writing a segment again with less in it: beside the old one, synced, then in its place.

use std::io;

use farshore_changelog::{
    BatchBuilder, BatchContext, BatchError, CheckedBatch, RawBatch, Record, RecordBody,
    SegmentHeader, SegmentId,
};
use farshore_extent::{Epoch, Extent, Lsn, Seq};

use super::merge::{At, MergeError, Plan};
use super::{ALIGN, Border, Cursor, ReadError, Spool, SpoolDisk};

/// What is being written has this number until it takes the place of another.
pub(super) const TEMPORARY: SegmentId = SegmentId::new(0);

/// Bytes after which what is written is synced, so that no single sync takes long.
const SYNC_BYTES: u64 = 8 << 20;

/// Bytes that a new segment may have, for an old one of so many. The one with the point that is kept
/// may lose nothing, and has one record more.
#[must_use]
pub const fn room_for(old: u64) -> u64 {
    old + old / 16 + (64 << 10)
}

/// See the module.
pub(super) struct Rewrite {
    pub(super) plan: Plan,
    id: SegmentId,
    /// Bytes that the new one may have.
    room: u64,
    batches: Vec<Cursor>,
    next: usize,
    /// How many of `plan.stay` are written.
    stayed: usize,
    /// `OrderLost` is written.
    opened: bool,
    builder: BatchBuilder,
    /// Epoch and number of the newest record in the builder.
    open: Option<Lsn>,
    marked: bool,
    durable: Lsn,
    border: Border,
    end: u64,
    unsynced: u64,
    /// Payload of the batch being read.
    raw: Vec<u8>,
}

impl std::fmt::Debug for Rewrite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rewrite").field("id", &self.id).field("next", &self.next).finish()
    }
}

impl Rewrite {
    /// Begins with the header of the old one.
    pub(super) fn begin<D: SpoolDisk>(
        spool: &mut Spool<D>,
        (id, first, old): (SegmentId, Border, u64),
        batches: Vec<Cursor>,
        plan: Plan,
        zstd_level: Option<i32>,
    ) -> Result<Self, MergeError> {
        spool.straight = false;
        let disk = &mut spool.disk;
        match disk.delete(TEMPORARY) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        let mut header = vec![0; SegmentHeader::LEN];
        let read = disk.read_at(id, 0, &mut header);
        read.map_err(|source| ReadError::Io { segment: id, at: 0, source })?;
        disk.create(TEMPORARY)?;
        disk.write_at(TEMPORARY, 0, &header)?;
        Ok(Self {
            plan,
            id,
            room: room_for(old),
            batches,
            next: 0,
            stayed: 0,
            opened: false,
            builder: BatchBuilder::new(zstd_level),
            open: None,
            marked: false,
            durable: Lsn::ZERO,
            border: first,
            end: ALIGN,
            unsynced: ALIGN,
            raw: Vec::new(),
        })
    }

    /// The next batch. True when the new segment is in its place, false when it would be
    /// larger than it may, and nothing has changed.
    pub(super) fn step<D: SpoolDisk>(
        &mut self,
        spool: &mut Spool<D>,
    ) -> Result<Option<bool>, MergeError> {
        if let Some(cursor) = self.batches.get(self.next).copied() {
            let header = spool.header(cursor)?;
            let bytes = spool.bytes_of(cursor, &header)?;
            let (segment, at) = (cursor.segment, cursor.at);
            let damaged = |source| ReadError::Damaged { segment, at, source };
            let batch = RawBatch::parse(&bytes).and_then(RawBatch::check).map_err(damaged)?;
            batch.read_all(&mut self.raw).map_err(damaged)?;
            self.durable = header.durable;
            for (index, record) in batch.records().enumerate() {
                let at = (u32::try_from(self.next).unwrap_or(0), u32::try_from(index).unwrap_or(0));
                self.take(spool, &batch, at, &record)?;
            }
            self.next += 1;
            self.hold_last_number(spool, &batch)?;
            return Ok((self.end > self.room).then_some(false));
        }
        self.finish_batch(spool)?;
        // The next segment must follow it, and nothing may be missing that was to stay.
        let last = spool.segments.iter().find(|s| s.id == self.id).map(|s| s.last);
        let whole =
            last.is_some_and(|last| last.is_at(self.border)) && self.stayed == self.plan.stay.len();
        if !whole || self.end > self.room {
            return Ok(Some(false));
        }
        spool.disk.sync(TEMPORARY)?;
        spool.disk.replace(TEMPORARY, self.id)?;
        spool.replaced(self.id, self.border, self.end);
        Ok(Some(true))
    }

    fn take<D: SpoolDisk>(
        &mut self,
        spool: &mut Spool<D>,
        batch: &CheckedBatch<'_>,
        at: At,
        record: &Record,
    ) -> Result<(), MergeError> {
        let (epoch, seq, time) = (batch.header().epoch, record.seq, record.time);
        if self.plan.point == Some(at) {
            let body = RecordBody::OrderRestored;
            self.event(spool, epoch, &Record { seq, time, body })?;
        }
        if !self.plan.covers(at) {
            return self.keep(spool, batch, record, record.body.extent());
        }
        if !std::mem::replace(&mut self.opened, true) && !spool.faults.merged_without_gap {
            self.event(spool, epoch, &Record { seq, time, body: RecordBody::OrderLost })?;
        }
        let stays = self.plan.stay.get(self.stayed).filter(|(which, _)| *which == at);
        let Some(extent) = stays.map(|(_, extent)| *extent) else { return Ok(()) };
        self.stayed += 1;
        self.keep(spool, batch, record, Some(extent))
    }

    /// The next segment follows the last number of this one: should its record be dropped, another
    /// carries the number. Within a merged stretch this one says nothing.
    fn hold_last_number<D: SpoolDisk>(
        &mut self,
        spool: &mut Spool<D>,
        batch: &CheckedBatch<'_>,
    ) -> Result<(), MergeError> {
        let header = batch.header();
        let is_there = self.open == Some(header.last()) || self.border.after == header.last();
        if self.next < self.batches.len() || is_there {
            return Ok(());
        }
        let (seq, time) = (header.last_seq, header.last_time);
        self.event(spool, header.epoch, &Record { seq, time, body: RecordBody::OrderLost })
    }

    /// A record, or a part of it.
    fn keep<D: SpoolDisk>(
        &mut self,
        spool: &mut Spool<D>,
        batch: &CheckedBatch<'_>,
        record: &Record,
        part: Option<Extent>,
    ) -> Result<(), MergeError> {
        let (epoch, seq, time) = (batch.header().epoch, record.seq, record.time);
        let (Some(part), Some(extent)) = (part, record.body.extent()) else {
            return self.event(spool, epoch, record);
        };
        let Some(payload) = record.body.payload() else {
            let body = match record.body.clone() {
                RecordBody::Zero { copied, .. } => RecordBody::Zero { extent: part, copied },
                RecordBody::Unknown { .. } => RecordBody::Unknown { extent: part },
                other => other,
            };
            return self.event(spool, epoch, &Record { seq, time, body });
        };
        self.begin_number(spool, epoch, seq)?;
        let whole = slice(&self.raw, u64::from(payload.raw_off), extent.len());
        if crc32c::crc32c(whole) != payload.crc {
            let Cursor { segment, at, .. } = self.batches[self.next];
            let source = BatchError::Payload { seq };
            return Err(ReadError::Damaged { segment, at, source }.into());
        }
        let bytes = slice(whole, part.offset() - extent.offset(), part.len());
        let crc = if part == extent { payload.crc } else { crc32c::crc32c(bytes) };
        let copied = matches!(record.body, RecordBody::Copy { .. });
        self.builder.push_data(seq, time, part, bytes, crc, copied);
        Ok(())
    }

    /// A record without payload.
    fn event<D: SpoolDisk>(
        &mut self,
        spool: &mut Spool<D>,
        epoch: Epoch,
        record: &Record,
    ) -> Result<(), MergeError> {
        self.begin_number(spool, epoch, record.seq)?;
        self.builder.push(record);
        self.marked |= matches!(record.body, RecordBody::Marker(_));
        Ok(())
    }

    /// A batch never divides a number, holds one epoch, and ends with a marker.
    fn begin_number<D: SpoolDisk>(
        &mut self,
        spool: &mut Spool<D>,
        epoch: Epoch,
        seq: Seq,
    ) -> Result<(), MergeError> {
        let place = Lsn::new(epoch, seq);
        if let Some(open) = self.open.filter(|open| *open != place)
            && (self.marked || self.builder.is_full() || open.epoch != epoch)
        {
            self.finish_batch(spool)?;
        }
        self.open = Some(place);
        Ok(())
    }

    fn finish_batch<D: SpoolDisk>(&mut self, spool: &mut Spool<D>) -> Result<(), MergeError> {
        let Some(last) = self.open.take() else { return Ok(()) };
        let context = BatchContext {
            volume: spool.owner.volume,
            generation: self.border.generation,
            prev: self.border.after,
            prev_chain: self.border.chain,
            durable: self.durable,
        };
        self.marked = false;
        let Some(batch) = self.builder.finish(last.epoch, &context) else { return Ok(()) };
        spool.disk.write_at(TEMPORARY, self.end, &batch.bytes)?;
        let padded = (batch.bytes.len() as u64).next_multiple_of(ALIGN);
        self.end += padded;
        self.unsynced += padded;
        self.border = Border::behind(&batch.header);
        if self.unsynced >= SYNC_BYTES {
            spool.disk.sync(TEMPORARY)?;
            self.unsynced = 0;
        }
        Ok(())
    }
}

/// A part of a payload. What lies outside, which no checked batch has, fails the checksum.
fn slice(bytes: &[u8], from: u64, len: u64) -> &[u8] {
    let range = || Some(usize::try_from(from).ok()?..usize::try_from(from + len).ok()?);
    range().and_then(|range| bytes.get(range)).unwrap_or_default()
}
