//! A volume becomes larger while it is in use.
//!
//! The stream tells the new size by one record: every write before it lies within the old size, and
//! a write behind the old end can only come after it. At the target the new part reads as zeroes.
//! Where that is what the disk holds, nothing else changes and order is kept. Otherwise the part is
//! sent by the copy loop like any content that is not in the log, between a loss of order and its
//! restoration. Either way no point exists for which the new part could be wrong.

use farshore_extent::{Extent, VolumeSize};

use super::capture::CaptureCore;
use super::command::Refused;
use super::event::{Action, Now, VolumeKey};
use super::volume::Volume;
use crate::control::DescriptorBody;

/// What the backing holds behind the old end, where no guest could write yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewPart {
    /// It reads as zeroes.
    Zero,
    /// Anything.
    Unknown,
}

impl CaptureCore {
    /// The backing of `volume` has `size` bytes from now on. Requests may be in flight; those for
    /// the new part come after this. Returns whether that is news; the same size again is not.
    ///
    /// # Errors
    /// [`Refused::Shrinks`], [`Refused::NoSuchVolume`].
    pub fn grow(
        &mut self,
        now: Now,
        volume: VolumeKey,
        size: VolumeSize,
        part: NewPart,
        out: &mut Vec<Action>,
    ) -> Result<bool, Refused> {
        let v = self.volume(volume).ok_or(Refused::NoSuchVolume)?;
        if size < v.size {
            return Err(Refused::Shrinks { from: v.size, to: size });
        }
        let Some(added) = Extent::between(v.size.get(), size.get()) else { return Ok(false) };
        self.with_volume(now, volume, out, |v, cx| {
            v.size = size;
            v.dirty.grow(size);
            v.cold.grow(size);
            v.compare.grow(size);
            if part == NewPart::Unknown && !cx.limits.faults.new_part_not_sent {
                // Order is lost first: no place has the new size and counts as ordered.
                v.lose(cx, added, "the volume was grown".into());
            }
            v.append(cx, DescriptorBody::Resize(size), None);
            if let Some(intent) = &mut v.intent {
                intent.grow(size, cx.counter.last, &v.dirty);
            }
            v.ask_for_intent(cx.out);
            v.want_copy(cx);
        });
        Ok(true)
    }
}

impl Volume {
    /// `extent` has been sent. A last chunk that was short when its copy began, and has grown
    /// since, was sent in part only and stays dirty.
    pub(super) fn sent(&mut self, extent: Extent) {
        let end = extent.end();
        let whole = if end == self.size.get() { end } else { end - end % self.chunk.get() };
        if let Some(chunks) = Extent::between(extent.offset(), whole) {
            self.dirty.clear(chunks);
            self.cold.clear(chunks);
            self.compare.sent(chunks, self.chunk);
        }
    }
}
