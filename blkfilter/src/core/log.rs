//! The records of one volume that the agent has not released yet.

use std::collections::VecDeque;

use farshore_extent::{Extent, Lsn, Seq, SourceWatermarks, WallTime};

use super::command::Refused;
use super::ring::PoolRing;
use crate::control::{Descriptor, DescriptorBody};

#[derive(Debug)]
struct Retained {
    descriptor: Descriptor,
    /// Its room in the pool.
    ticket: Option<u64>,
    /// Payload bytes of all records up to and with this one.
    payload_end: u64,
}

/// Retained records in the order of their numbers, and the three watermarks.
#[derive(Debug)]
pub(super) struct Log {
    records: VecDeque<Retained>,
    captured: Lsn,
    released: Lsn,
    durable: Lsn,
    payload_end: u64,
    released_payload: u64,
    last_urgent: Seq,
    /// The record from which the stream makes sense to somebody who has nothing before it.
    restart: Option<Seq>,
}

impl Log {
    /// An empty log whose reader has everything up to `released`.
    pub(super) fn new(released: Lsn) -> Self {
        Self {
            records: VecDeque::new(),
            captured: released,
            released,
            durable: released,
            payload_end: 0,
            released_payload: 0,
            last_urgent: Seq::ZERO,
            restart: None,
        }
    }

    pub(super) fn append(
        &mut self,
        at: Lsn,
        descriptor: Descriptor,
        ticket: Option<u64>,
        urgent: bool,
    ) {
        self.payload_end += descriptor.body.payload_len();
        self.captured = self.captured.max(at);
        if urgent {
            self.last_urgent = descriptor.seq;
        }
        self.records.push_back(Retained { descriptor, ticket, payload_end: self.payload_end });
    }

    /// From the record `seq` on nothing before it is needed.
    pub(super) fn restart_at(&mut self, seq: Seq) {
        self.restart = Some(seq);
    }

    /// Where the retained records change the volume.
    pub(super) fn extents(&self) -> impl Iterator<Item = Extent> {
        self.records.iter().filter_map(|record| match &record.descriptor.body {
            DescriptorBody::Write { extent, .. }
            | DescriptorBody::Copy { extent, .. }
            | DescriptorBody::Zero { extent, .. }
            | DescriptorBody::Unknown { extent } => Some(*extent),
            DescriptorBody::Hash { .. }
            | DescriptorBody::Marker { .. }
            | DescriptorBody::MarkerCommit(_)
            | DescriptorBody::MarkerAbort(_)
            | DescriptorBody::OrderLost
            | DescriptorBody::OrderRestored
            | DescriptorBody::Resize(_)
            | DescriptorBody::EpochStart { .. } => None,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    /// Everything up to here has a number and is retained or released.
    pub(super) const fn captured(&self) -> Lsn {
        self.captured
    }

    /// Everything up to here is no longer retained: in the agent's spool or durable at the target.
    pub(super) const fn released(&self) -> Lsn {
        self.released
    }

    /// Everything up to here is durable at the target, says the agent. Never after `released`.
    pub(super) const fn durable(&self) -> Lsn {
        self.durable
    }

    pub(super) fn oldest(&self) -> WallTime {
        self.records.front().map_or(WallTime::default(), |r| r.descriptor.time)
    }

    pub(super) const fn payload(&self) -> u64 {
        self.payload_end - self.released_payload
    }

    /// Index of the first record after `after`.
    fn position(&self, after: Lsn) -> Result<usize, Refused> {
        if after > self.captured {
            return Err(Refused::AheadOfCaptured { asked: after, captured: self.captured });
        }
        if after < self.released {
            let first = self.records.front().map(|r| r.descriptor.seq);
            if first.is_some() && first == self.restart {
                return Ok(0);
            }
            return Err(Refused::AlreadyReleased { asked: after, released: self.released });
        }
        if after.epoch < self.captured.epoch {
            return Ok(0);
        }
        Ok(self.records.partition_point(|r| r.descriptor.seq <= after.seq))
    }

    pub(super) fn fetch(
        &self,
        after: Lsn,
        max_records: usize,
        max_bytes: u64,
        out: &mut Vec<Descriptor>,
    ) -> Result<bool, Refused> {
        let from = self.position(after)?;
        let (mut bytes, mut taken) = (0, 0);
        for record in self.records.range(from..) {
            let len = record.descriptor.body.payload_len();
            if taken == max_records || (taken > 0 && bytes + len > max_bytes) {
                return Ok(true);
            }
            bytes += len;
            taken += 1;
            out.push(record.descriptor.clone());
        }
        Ok(false)
    }

    /// Records after `after`, their payload in bytes, and whether one of them is urgent.
    pub(super) fn waiting(&self, after: Lsn) -> Result<(usize, u64, bool), Refused> {
        let from = self.position(after)?;
        let before = match from.checked_sub(1).and_then(|i| self.records.get(i)) {
            Some(record) => record.payload_end,
            None => self.released_payload,
        };
        let first = self.records.get(from).map(|r| r.descriptor.seq);
        let urgent = first.is_some_and(|seq| seq <= self.last_urgent);
        Ok((self.records.len() - from, self.payload_end - before, urgent))
    }

    /// Everything up to `upto` is durable at the target: forgets the records, gives their room
    /// back.
    pub(super) fn release(&mut self, upto: Lsn, ring: &mut PoolRing) -> Result<(), Refused> {
        self.spooled(upto, ring)?;
        if upto.epoch == self.captured.epoch {
            self.durable = upto.max(self.durable);
        }
        Ok(())
    }

    /// Somebody else keeps the records up to `upto`: forgets them and gives their room back.
    pub(super) fn spooled(&mut self, upto: Lsn, ring: &mut PoolRing) -> Result<(), Refused> {
        SourceWatermarks::new(self.captured, upto, upto)
            .map_err(|_| Refused::AheadOfCaptured { asked: upto, captured: self.captured })?;
        if upto.epoch == self.captured.epoch && upto > self.released {
            self.released = upto;
            self.drop_while(ring, |seq| seq <= upto.seq);
        }
        Ok(())
    }

    /// Forgets every record: their content will be sent again.
    pub(super) fn discard(&mut self, ring: &mut PoolRing) {
        self.drop_while(ring, |_| true);
        self.released = self.captured;
    }

    fn drop_while(&mut self, ring: &mut PoolRing, goes: impl Fn(Seq) -> bool) {
        while let Some(record) = self.records.front().filter(|r| goes(r.descriptor.seq)) {
            self.released_payload = record.payload_end;
            if let Some(ticket) = record.ticket {
                ring.drop_user(ticket);
            }
            self.records.pop_front();
        }
    }
}
