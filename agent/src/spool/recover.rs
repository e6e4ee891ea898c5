//! What a restart finds: the unbroken row of segments that ends with the newest one.

use std::collections::VecDeque;
use std::io;

use farshore_changelog::{BatchHeader, RawBatch, SegmentHeader, SegmentId};

use super::{ALIGN, Border, Cursor, Segment, Spool, SpoolDisk, SpoolFaults, SpoolOwner};

impl<D: SpoolDisk> Spool<D> {
    /// Opens what an earlier run left. The newest segment is read and verified; where it stops
    /// making sense its tail was torn by a crash, and `filterd` still has what comes after. What
    /// is kept is durable when this returns.
    ///
    /// # Errors
    /// Of the medium.
    pub fn open(disk: D, owner: SpoolOwner, faults: SpoolFaults) -> io::Result<Self> {
        let mut spool = Self {
            disk,
            owner,
            faults,
            segments: VecDeque::new(),
            next: SegmentId::new(1),
            writable: false,
            synced: None,
            unsynced: 0,
            bytes: 0,
            anchor: None,
            sent: None,
            sent_unknown: false,
            straight: false,
            merge: None,
            merged: None,
        };
        let found = spool.disk.list()?;
        spool.sent = spool.disk.sent()?;
        let newest = found.last().copied().max(spool.sent);
        spool.next = newest.map_or(spool.next, SegmentId::next);
        for id in found.into_iter().rev() {
            let header = spool.read_header(id)?;
            let known = spool.segments.front().map(|s| s.first);
            let segment = match (header, known) {
                (Some(header), None) => spool.scan(id, &header)?,
                (Some(header), Some(next)) => spool.older(id, &header, next)?,
                (None, _) => None,
            };
            // A segment without a batch, and whatever does not lead to the newest one: trimmed
            // segments that came back, a segment that was being begun, one that was being merged.
            match segment {
                Some(segment) => spool.segments.push_front(segment),
                None => spool.disk.delete(id)?,
            }
        }
        if let Some(last) = spool.segments.back() {
            spool.disk.sync(last.id)?;
            spool.synced = Some((last.last, last.end));
        }
        spool.straight = spool.segments.is_empty();
        spool.bytes = spool.segments.iter().map(|s| s.end).sum();
        Ok(spool)
    }

    fn read_header(&mut self, id: SegmentId) -> io::Result<Option<SegmentHeader>> {
        let mut block = vec![0; SegmentHeader::LEN];
        let read = self.disk.read_at(id, 0, &mut block)?;
        let header = SegmentHeader::parse(&block[..read]).ok();
        Ok(header.filter(|h| h.volume == self.owner.volume && h.segment == id))
    }

    /// A segment before others was synced before the next was begun: it ends where that begins.
    fn older(
        &mut self,
        id: SegmentId,
        header: &SegmentHeader,
        next: Border,
    ) -> io::Result<Option<Segment>> {
        let first = border(header);
        if first.after >= next.after || first.generation != next.generation {
            return Ok(None);
        }
        let end = self.disk.len(id)?.next_multiple_of(ALIGN);
        Ok(Some(Segment { id, first, last: next, end, created: header.created, level: 0 }))
    }

    /// Every batch of the newest segment that is whole and follows the one before.
    fn scan(&mut self, id: SegmentId, header: &SegmentHeader) -> io::Result<Option<Segment>> {
        let first = border(header);
        let mut cursor = Cursor { segment: id, at: ALIGN, border: first };
        let len = self.disk.len(id)?;
        while cursor.at < len {
            let Ok(header) = self.header(cursor) else { break };
            if !self.faults.tail_not_checked && !self.is_whole(cursor, &header) {
                break;
            }
            cursor = cursor.behind(&header);
        }
        if cursor.at < len {
            tracing::info!(segment = %id, at = cursor.at, len, "the torn end of the spool is left");
        }
        let created = header.created;
        let segment = Segment { id, first, last: cursor.border, end: cursor.at, created, level: 0 };
        Ok((cursor.border != first).then_some(segment))
    }

    fn is_whole(&mut self, cursor: Cursor, header: &BatchHeader) -> bool {
        let bytes = self.bytes_of(cursor, header);
        bytes.is_ok_and(|b| RawBatch::parse(&b).and_then(RawBatch::check).is_ok())
    }
}

const fn border(header: &SegmentHeader) -> Border {
    Border { after: header.prev, chain: header.prev_chain, generation: header.generation }
}
