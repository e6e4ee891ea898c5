//! The copy loop's side of the core: which chunk next, and what its end means.
//!
//! Shared lock, read, number, record, bit cleared, unlock. No write completes in the chunk
//! meanwhile, so the record holds the content at its number.

use farshore_changelog::limits::MAX_DATALESS_LEN;
use farshore_extent::{CaptureOrder, ChunkMap, Extent};

use super::capture::{CaptureCore, What};
use super::command::Refused;
use super::event::{Action, CopyEnd, Now, Outcome, PoolSlot, VolumeKey};
use super::volume::{Context, Volume};
use crate::control::{DescriptorBody, PoolPlace};

impl CaptureCore {
    /// Keeps the copy loop of `volume` from running, or lets it go. Guests write on; what they
    /// change stays marked. Nothing is held any more once order is restored.
    ///
    /// # Errors
    /// [`Refused::NoSuchVolume`].
    pub fn hold_copy(
        &mut self,
        now: Now,
        volume: VolumeKey,
        held: bool,
        out: &mut Vec<Action>,
    ) -> Result<(), Refused> {
        self.with_volume(now, volume, out, |v, cx| {
            v.held = held && v.order == CaptureOrder::CatchUp;
            v.want_copy(cx);
        })
        .ok_or(Refused::NoSuchVolume)
    }

    /// Picks the next dirty chunk and reserves room for it.
    pub(super) fn next_copy(
        &mut self,
        key: VolumeKey,
        hole: Option<Extent>,
    ) -> Result<What, CopyEnd> {
        let Some(volume) = self.volumes.get_mut(key.index()).and_then(Option::as_mut) else {
            return Err(CopyEnd::Clean);
        };
        volume.copy_waits = true;
        if !volume.may_copy(&self.limits) {
            return Err(CopyEnd::PoolBusy);
        }
        let Some(chunk) = volume.next_to_send() else {
            let extent = volume.next_verify().ok_or(CopyEnd::Clean)?;
            let read = volume.read_for_digest(extent, true)?;
            volume.verify_reads(extent);
            return Ok(read);
        };
        if let Some(extent) = hole.and_then(|hole| volume.whole_chunks(chunk, hole)) {
            volume.cursor = extent.end();
            volume.copy_waits = false;
            return Ok(What::CopyHole { extent });
        }
        if volume.compare.is_suspect(chunk) {
            volume.cursor = chunk.end();
            return volume.read_for_digest(chunk, false);
        }
        let len = u32::try_from(chunk.len()).map_err(|_| CopyEnd::Failed)?;
        let slot = volume.ring.reserve(len).ok_or(CopyEnd::PoolBusy)?;
        volume.cursor = chunk.end();
        volume.copy_waits = false;
        if self.limits.faults.clear_bit_before_read_recorded {
            volume.dirty.clear(chunk);
            volume.cold.clear(chunk);
        }
        Ok(What::Copy { extent: chunk, slot })
    }
}

impl Volume {
    /// The dirty chunk that is next. Those that guests have written to come last: until a chunk is
    /// sent, one copy carries all writes to it; afterwards each is a record. No chunk becomes cold
    /// again before order is restored, so a writer cannot keep the loop from its end.
    pub(super) fn next_to_send(&self) -> Option<Extent> {
        self.next_unasked(&self.cold).or_else(|| self.next_unasked(&self.dirty))
    }

    /// Chunks that wait for an answer are passed over.
    fn next_unasked(&self, map: &ChunkMap) -> Option<Extent> {
        let mut at = self.cursor;
        for _ in 0..=self.compare.asked_chunks() {
            let chunk = map.next_dirty(at)?;
            if !self.compare.is_asked(chunk) {
                return Some(chunk);
            }
            at = chunk.end();
        }
        None
    }

    fn read_for_digest(&mut self, extent: Extent, verify: bool) -> Result<What, CopyEnd> {
        let len = u32::try_from(extent.len()).map_err(|_| CopyEnd::Failed)?;
        let slot = self.ring.reserve(len).ok_or(CopyEnd::PoolBusy)?;
        self.copy_waits = false;
        Ok(What::Digest { extent, slot, verify })
    }

    /// The whole chunks from `chunk` on that lie in `hole`, at most one record's worth.
    fn whole_chunks(&self, chunk: Extent, hole: Extent) -> Option<Extent> {
        if !hole.contains(chunk) {
            return None;
        }
        let size = self.chunk.get();
        let end = if hole.end() >= self.size.get() {
            self.size.get()
        } else {
            hole.end() - hole.end() % size
        };
        let most = MAX_DATALESS_LEN.max(size);
        Extent::between(chunk.offset(), end.min(chunk.offset() + (most - most % size)))
    }

    /// The end of a copy read.
    pub(super) fn copied(
        &mut self,
        cx: &mut Context<'_>,
        extent: Extent,
        slot: PoolSlot,
        outcome: Outcome,
    ) -> CopyEnd {
        let end = match outcome {
            Outcome::Data { crc } => {
                let place = PoolPlace { offset: slot.offset(), crc };
                let seq = cx.counter.take();
                self.retain(cx, seq, slot, DescriptorBody::Copy { extent, place });
                self.sent(extent);
                CopyEnd::Copied { bytes: extent.len() }
            }
            Outcome::Zeroes => self.copied_zeroes(cx, extent),
            Outcome::Failed(_) | Outcome::Done | Outcome::Digest { .. } | Outcome::NotHole => {
                self.figures.backing_errors += 1;
                CopyEnd::Failed
            }
        };
        self.ring.drop_user(slot.ticket);
        end
    }

    /// The end of a look at a hole.
    pub(super) fn copied_hole(
        &mut self,
        cx: &mut Context<'_>,
        extent: Extent,
        outcome: Outcome,
    ) -> CopyEnd {
        match outcome {
            Outcome::Zeroes => self.copied_zeroes(cx, extent),
            Outcome::NotHole => {
                self.cursor = extent.offset();
                CopyEnd::NotHole
            }
            Outcome::Failed(_) | Outcome::Done | Outcome::Digest { .. } | Outcome::Data { .. } => {
                self.figures.backing_errors += 1;
                CopyEnd::Failed
            }
        }
    }

    pub(super) fn copied_zeroes(&mut self, cx: &mut Context<'_>, extent: Extent) -> CopyEnd {
        self.append(cx, DescriptorBody::Zero { extent, copied: true }, None);
        self.sent(extent);
        CopyEnd::Copied { bytes: extent.len() }
    }
}
