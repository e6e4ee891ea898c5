//! One volume inside the core: its records, its room, its dirty chunks and its order.

use std::borrow::Cow;

use farshore_extent::{
    BlockSizes, CaptureOrder, ChunkMap, ChunkSize, Epoch, Extent, Lsn, Seq, VolumeId, VolumeSize,
};

use super::brake::delay_ms;
use super::compare::Compare;
use super::event::{Action, Buffer, Now, PoolSlot, VolumeKey};
use super::intent::Intent;
use super::limits::Limits;
use super::log::Log;
use super::range_lock::RangeLock;
use super::ring::PoolRing;
use crate::control::{Descriptor, DescriptorBody, PoolPlace};

/// The host's counter. Taking a number and appending the record are one call of
/// [`Volume::append`], so no gap is ever visible.
#[derive(Debug)]
pub(super) struct Counter {
    pub(super) epoch: Epoch,
    pub(super) last: Seq,
}

impl Counter {
    pub(super) fn take(&mut self) -> Seq {
        self.last = self.last.next();
        self.last
    }

    pub(super) const fn lsn(&self, seq: Seq) -> Lsn {
        Lsn::new(self.epoch, seq)
    }
}

/// What every operation on a volume needs besides the volume.
pub(super) struct Context<'a> {
    pub(super) now: Now,
    pub(super) counter: &'a mut Counter,
    pub(super) limits: &'a Limits,
    pub(super) out: &'a mut Vec<Action>,
}

/// Figures since attach.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Figures {
    pub(super) writes: u64,
    pub(super) written_bytes: u64,
    pub(super) backing_errors: u64,
    /// Writes whose answers were held back.
    pub(super) throttled: u64,
}

#[derive(Debug)]
pub(super) struct Volume {
    pub(super) key: VolumeKey,
    pub(super) id: VolumeId,
    pub(super) size: VolumeSize,
    pub(super) blocks: BlockSizes,
    pub(super) chunk: ChunkSize,
    pub(super) log: Log,
    pub(super) ring: PoolRing,
    pub(super) dirty: ChunkMap,
    /// Dirty chunks that no guest wrote to since they became dirty.
    pub(super) cold: ChunkMap,
    /// Which dirty chunks are asked about before they are sent.
    pub(super) compare: Compare,
    /// None: nothing is kept for a crash, every start copies everything.
    pub(super) intent: Option<Intent>,
    pub(super) locks: RangeLock,
    pub(super) order: CaptureOrder,
    pub(super) reason: Cow<'static, str>,
    /// Where the copy loop looks next.
    pub(super) cursor: u64,
    /// Most dirty bytes seen in this catch-up.
    pub(super) catch_up_total: u64,
    /// The copy loop is not to run yet.
    pub(super) held: bool,
    /// How many times order was lost.
    pub(super) losses: u64,
    /// Order was lost because the log had no more room.
    pub(super) overrun: bool,
    /// The copy loop was told to wait for `CopyWanted`.
    pub(super) copy_waits: bool,
    /// Writes in flight that cannot be recorded.
    pub(super) spares: u32,
    pub(super) figures: Figures,
}

impl Volume {
    pub(super) fn append(
        &mut self,
        cx: &mut Context<'_>,
        body: DescriptorBody,
        ticket: Option<u64>,
    ) -> Seq {
        let seq = cx.counter.take();
        self.append_at(cx, seq, body, ticket);
        seq
    }

    pub(super) fn append_at(
        &mut self,
        cx: &mut Context<'_>,
        seq: Seq,
        body: DescriptorBody,
        ticket: Option<u64>,
    ) {
        let urgent = match &body {
            DescriptorBody::Write { .. }
            | DescriptorBody::Copy { .. }
            | DescriptorBody::Zero { .. }
            | DescriptorBody::Unknown { .. }
            | DescriptorBody::Hash { .. } => false,
            DescriptorBody::Marker { .. }
            | DescriptorBody::MarkerCommit(_)
            | DescriptorBody::MarkerAbort(_)
            | DescriptorBody::OrderLost
            | DescriptorBody::OrderRestored
            | DescriptorBody::Resize(_)
            | DescriptorBody::EpochStart { .. } => true,
        };
        let payload = body.payload_len();
        let at = cx.counter.lsn(seq);
        debug_assert!(at > self.log.captured() || cx.limits.faults.number_before_backing);
        self.log.append(at, Descriptor { seq, time: cx.now.wall, body }, ticket, urgent);
        cx.out.push(Action::Recorded { volume: self.key, payload, urgent });
    }

    /// A write that the backing has completed.
    pub(super) fn wrote(&mut self, cx: &mut Context<'_>, write: &Written<'_>) {
        let slot = match write.buffer {
            Buffer::Pool(slot) => slot,
            Buffer::Spare => {
                self.spares -= 1;
                self.overrun(cx, write.extent, "the capture pool was full");
                return;
            }
        };
        if self.is_log_full(cx) {
            self.overrun(cx, write.extent, "too many records waited for the target");
        } else if !self.dirty.touches_dirty(write.extent) {
            let place = PoolPlace { offset: slot.offset(), crc: write.crc };
            let seq = write.early.unwrap_or_else(|| cx.counter.take());
            let body = DescriptorBody::Write { extent: write.extent, place };
            self.retain(cx, seq, slot, body);
        } else {
            self.touch(cx, write.extent);
            self.record_clean_pieces(cx, write, slot);
        }
        self.ring.drop_user(slot.ticket);
    }

    /// A write that touches dirty chunks: its pieces in clean chunks are recorded, the others are
    /// carried by the copy loop.
    fn record_clean_pieces(&mut self, cx: &mut Context<'_>, write: &Written<'_>, slot: PoolSlot) {
        let cut: Vec<Extent> = write.extent.split_at_multiples_of(self.chunk.get()).collect();
        if cut.iter().all(|piece| self.dirty.touches_dirty(*piece)) {
            return;
        }
        if cut.len() != write.pieces.len() {
            // Nobody knows the checksums of the pieces: the copy loop carries all of it.
            self.mark_dirty(write.extent);
            return;
        }
        for (piece, crc) in cut.into_iter().zip(write.pieces) {
            if !self.dirty.touches_dirty(piece) {
                let offset = slot.offset() + (piece.offset() - write.extent.offset());
                let place = PoolPlace { offset, crc: *crc };
                let seq = cx.counter.take();
                self.retain(cx, seq, slot, DescriptorBody::Write { extent: piece, place });
            }
        }
    }

    /// Appends a record whose payload lies in `slot`.
    pub(super) fn retain(
        &mut self,
        cx: &mut Context<'_>,
        seq: Seq,
        slot: PoolSlot,
        body: DescriptorBody,
    ) {
        if cx.limits.faults.reuse_pool_before_release {
            self.append_at(cx, seq, body, None);
            return;
        }
        self.ring.add_user(slot.ticket);
        self.append_at(cx, seq, body, Some(slot.ticket));
    }

    /// A zero or discard that the backing has completed.
    pub(super) fn zeroed(&mut self, cx: &mut Context<'_>, extent: Extent, early: Option<Seq>) {
        if self.is_log_full(cx) {
            self.overrun(cx, extent, "too many records waited for the target");
        } else if !self.dirty.touches_dirty(extent) {
            let seq = early.unwrap_or_else(|| cx.counter.take());
            self.append_at(cx, seq, DescriptorBody::Zero { extent, copied: false }, None);
        } else {
            self.touch(cx, extent);
            for extent in self.dirty.clean_parts(extent) {
                self.append(cx, DescriptorBody::Zero { extent, copied: false }, None);
            }
        }
    }

    /// A write or zero that failed: the medium may hold old, new or a mix. It is read again under
    /// the lock and sent.
    pub(super) fn failed(&mut self, cx: &mut Context<'_>, extent: Extent, buffer: Option<Buffer>) {
        match buffer {
            Some(Buffer::Spare) => self.spares -= 1,
            Some(Buffer::Pool(slot)) => self.ring.drop_user(slot.ticket),
            None => {}
        }
        self.figures.backing_errors += 1;
        self.lose(cx, extent, "the backing device failed a write".into());
        if !self.is_log_full(cx) {
            self.append(cx, DescriptorBody::Unknown { extent }, None);
        }
    }

    /// The content of `extent` will not be in the log as it was written: order is lost.
    pub(super) fn lose(&mut self, cx: &mut Context<'_>, extent: Extent, reason: Cow<'static, str>) {
        if self.order == CaptureOrder::Ordered {
            self.compare.postpone_verify();
            self.order = CaptureOrder::CatchUp;
            self.losses += 1;
            self.reason = reason;
            self.catch_up_total = 0;
            self.append(cx, DescriptorBody::OrderLost, None);
        }
        self.touch(cx, extent);
        self.mark_dirty(extent);
    }

    /// The same because the log has no more room.
    fn overrun(&mut self, cx: &mut Context<'_>, extent: Extent, reason: &'static str) {
        self.overrun |= self.order == CaptureOrder::Ordered;
        self.lose(cx, extent, reason.into());
    }

    /// What happened in `extent` is in no record where its chunks are dirty.
    fn touch(&mut self, cx: &Context<'_>, extent: Extent) {
        self.cold.clear(extent);
        if !cx.limits.faults.touched_chunk_is_answered {
            self.compare.touch(extent, self.chunk);
        }
    }

    pub(super) fn mark_dirty(&mut self, extent: Extent) {
        self.dirty.mark(extent);
        self.catch_up_total = self.catch_up_total.max(self.dirty.dirty_bytes());
    }

    /// Wakes the copy loop when it waits and could work.
    pub(super) fn want_copy(&mut self, cx: &mut Context<'_>) {
        let some = self.dirty.dirty_chunks() > self.compare.asked_chunks() || self.wants_verify();
        if self.copy_waits && some && self.may_copy(cx.limits) {
            self.copy_waits = false;
            cx.out.push(Action::CopyWanted { volume: self.key });
        }
    }

    pub(super) fn may_copy(&self, limits: &Limits) -> bool {
        let room = !self.ring.at_least_half_full() && self.log.len() * 2 < limits.max_records;
        room && !self.held && !self.compare.is_full()
    }

    /// What the throttle does now; there is no order to keep while catching up.
    pub(super) fn throttle_ms(&self, longest: u64) -> u64 {
        match self.order {
            CaptureOrder::Ordered => delay_ms(longest, self.ring.used(), self.ring.capacity()),
            CaptureOrder::CatchUp => 0,
        }
    }

    /// Ends the catch-up when nothing is left to be sent.
    pub(super) fn try_restore(&mut self, cx: &mut Context<'_>) {
        let done = self.order == CaptureOrder::CatchUp
            && self.dirty.dirty_chunks() == 0
            && self.spares == 0;
        if done {
            self.order = CaptureOrder::Ordered;
            self.reason = Cow::Borrowed("");
            (self.held, self.overrun) = (false, false);
            self.append(cx, DescriptorBody::OrderRestored, None);
        }
    }

    fn is_log_full(&self, cx: &Context<'_>) -> bool {
        self.log.len() >= cx.limits.max_records
    }
}

/// A write at the moment of its completion.
pub(super) struct Written<'a> {
    pub(super) extent: Extent,
    pub(super) buffer: Buffer,
    pub(super) crc: u32,
    pub(super) pieces: &'a [u32],
    /// Planted fault: its number was taken at arrival.
    pub(super) early: Option<Seq>,
}
