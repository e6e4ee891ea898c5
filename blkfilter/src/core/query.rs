//! Looking at the core without changing it.

use farshore_extent::{
    CaptureOrder, Epoch, Extent, ExtentSet, Lsn, SourceWatermarks, VolumeId, VolumeSize, WallTime,
};

use super::capture::CaptureCore;
use super::command::Refused;
use super::event::{IntentLoss, VolumeKey};
use super::region_map::RegionMap;
use crate::control::{Descriptor, VerifyProgress};

/// What is waiting for a reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Waiting {
    /// Records.
    pub records: usize,
    /// Their payload in bytes.
    pub payload: u64,
    /// One of them should be fetched at once.
    pub urgent: bool,
}

/// One volume's figures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CoreStatus {
    /// Its identity.
    pub volume: VolumeId,
    /// Its size in bytes.
    pub size: VolumeSize,
    /// Ordered or catching up.
    pub order: CaptureOrder,
    /// Why it is catching up; empty when ordered.
    pub reason: String,
    /// How many times order was lost since attach.
    pub losses: u64,
    /// It lost order because the log had no more room.
    pub overrun: bool,
    /// Bytes in dirty chunks.
    pub dirty_bytes: u64,
    /// The copy loop is held.
    pub held: bool,
    /// The copy loop has to wait for room, or is held.
    pub copy_stuck: bool,
    /// What a verify has found.
    pub verify: VerifyProgress,
    /// Most of them in this catch-up.
    pub catch_up_total: u64,
    /// Everything up to here has a number and is retained or released.
    pub captured: Lsn,
    /// Everything up to here is no longer retained: in the agent's spool or durable at the target.
    pub released: Lsn,
    /// Everything up to here is durable at the target.
    pub durable: Lsn,
    /// Capture time of the oldest retained record; zero when there is none.
    pub oldest: WallTime,
    /// Retained records.
    pub records: usize,
    /// Their payload in bytes.
    pub payload: u64,
    /// Bytes of the pool that cannot be given out now: payload, requests in flight, padding.
    pub pool_used: u64,
    /// Bytes of the pool.
    pub pool_bytes: u64,
    /// Guest writes and zeroes that the backing has completed.
    pub writes: u64,
    /// Bytes of them.
    pub written_bytes: u64,
    /// Backing requests that failed, as far as the core saw them.
    pub backing_errors: u64,
    /// For how many milliseconds the throttle holds answers back now.
    pub throttle_ms: u64,
    /// Writes whose answers it has held back.
    pub throttled: u64,
    /// Requests in flight or waiting for their range, copy reads included; without flushes.
    pub in_flight: usize,
    /// The intent map; none when none is kept.
    pub intent: Option<IntentStatus>,
}

/// What a crash now would mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IntentStatus {
    /// Regions that would be compared.
    pub set: u64,
    /// Regions of the volume.
    pub regions: u64,
    /// Bytes of a region.
    pub region_bytes: u64,
    /// More than this are cleared when they may be.
    pub cap: u64,
    /// Of the volume that the disk has bits for; less than its size while it grows.
    pub durable_size: VolumeSize,
    /// Set when the map is not kept.
    pub loss: Option<IntentLoss>,
}

impl CaptureCore {
    /// The epoch of this run.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.counter.epoch
    }

    /// The last number given out.
    #[must_use]
    pub const fn last(&self) -> Lsn {
        self.counter.lsn(self.counter.last)
    }

    /// The key of an attached volume.
    #[must_use]
    pub fn key_of(&self, id: VolumeId) -> Option<VolumeKey> {
        self.volumes.iter().flatten().find(|v| v.id == id).map(|v| v.key)
    }

    /// The keys of all attached volumes.
    #[must_use]
    pub fn keys(&self) -> Vec<VolumeKey> {
        self.volumes.iter().flatten().map(|v| v.key).collect()
    }

    /// The records after `after`, in order and without a gap, appended to `out`; at most
    /// `max_records` of them and, beyond the first, `max_bytes` of payload. True when more wait.
    ///
    /// # Errors
    /// [`Refused::AlreadyReleased`] when records between `after` and the oldest retained one are
    /// gone and needed; [`Refused::AheadOfCaptured`]; [`Refused::NoSuchVolume`].
    pub fn fetch(
        &self,
        volume: VolumeKey,
        after: Lsn,
        max_records: usize,
        max_bytes: u64,
        out: &mut Vec<Descriptor>,
    ) -> Result<bool, Refused> {
        let volume = self.volume(volume).ok_or(Refused::NoSuchVolume)?;
        if volume.withholds() {
            return Ok(false);
        }
        volume.log.fetch(after, max_records, max_bytes, out)
    }

    /// How much [`Self::fetch`] would find.
    ///
    /// # Errors
    /// As [`Self::fetch`].
    pub fn waiting(&self, volume: VolumeKey, after: Lsn) -> Result<Waiting, Refused> {
        let volume = self.volume(volume).ok_or(Refused::NoSuchVolume)?;
        if volume.withholds() {
            return Ok(Waiting::default());
        }
        let (records, payload, urgent) = volume.log.waiting(after)?;
        Ok(Waiting { records, payload, urgent })
    }

    /// The volume's watermarks; what was handed to a reader counts as sent when it is released.
    #[must_use]
    pub fn watermarks(&self, volume: VolumeKey) -> Option<SourceWatermarks> {
        let log = &self.volume(volume)?.log;
        SourceWatermarks::new(log.captured(), log.released(), log.durable()).ok()
    }

    /// The chunk that the copy loop would take next: ask whether it begins a hole.
    #[must_use]
    pub fn peek_copy(&self, volume: VolumeKey) -> Option<Extent> {
        let volume = self.volume(volume)?;
        volume.next_to_send()
    }

    /// Whether a write's pieces need checksums of their own (see `Event::Write::pieces`).
    #[must_use]
    pub fn is_catching_up(&self, volume: VolumeKey) -> bool {
        self.volume(volume).is_some_and(|v| v.order == CaptureOrder::CatchUp)
    }

    /// When the closed gate opens alone, or the next answer that is held back is given, on the
    /// monotonic clock; the driver sends a `Event::Tick` then.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        [self.gate.deadline_ms(), self.brake.deadline_ms()].into_iter().flatten().min()
    }

    /// What a reader lacks that has everything up to the volume's `released`: dirty chunks, and
    /// the extents of all retained records. For an orderly stop.
    #[must_use]
    pub fn missing(&self, volume: VolumeKey) -> Vec<Extent> {
        let Some(volume) = self.volume(volume) else { return Vec::new() };
        let mut missing: ExtentSet = volume.log.extents().collect();
        let mut next = volume.dirty.next_dirty(0);
        while let Some(chunk) = next {
            missing.insert(chunk);
            let after = chunk.end();
            let more = (after < volume.size.get()).then(|| volume.dirty.next_dirty(after));
            next = more.flatten().filter(|more| more.offset() >= after);
        }
        missing.iter().collect()
    }

    /// The intent map as it should be on disk.
    #[must_use]
    pub fn intent_map(&self, volume: VolumeKey) -> Option<RegionMap> {
        Some(self.volume(volume)?.intent.as_ref()?.map().clone())
    }

    /// The figures of a volume.
    #[must_use]
    pub fn status(&self, volume: VolumeKey) -> Option<CoreStatus> {
        let v = self.volume(volume)?;
        Some(CoreStatus {
            volume: v.id,
            size: v.size,
            order: v.order,
            reason: v.reason.clone().into_owned(),
            losses: v.losses,
            overrun: v.overrun,
            dirty_bytes: v.dirty.dirty_bytes(),
            held: v.held,
            copy_stuck: !v.may_copy(&self.limits),
            verify: v.compare.verify_progress(v.size),
            catch_up_total: v.catch_up_total,
            captured: v.log.captured(),
            released: v.log.released(),
            durable: v.log.durable(),
            oldest: v.log.oldest(),
            records: v.log.len(),
            payload: v.log.payload(),
            pool_used: v.ring.used(),
            pool_bytes: v.ring.capacity(),
            writes: v.figures.writes,
            written_bytes: v.figures.written_bytes,
            backing_errors: v.figures.backing_errors,
            throttle_ms: v.throttle_ms(self.limits.throttle_ms),
            throttled: v.figures.throttled,
            in_flight: v.locks.claims(),
            intent: v.intent.as_ref().map(|intent| IntentStatus {
                set: intent.set_regions(),
                regions: intent.map().regions(),
                region_bytes: intent.map().region(),
                cap: intent.cap(),
                durable_size: intent.durable_size(),
                loss: intent.loss(),
            }),
        })
    }
}

impl super::volume::Volume {
    /// A new copy was asked for, and the disk does not say yet that everything may differ: whoever
    /// saw a record of it now could be taken for one who has what lies before.
    fn withholds(&self) -> bool {
        self.intent.as_ref().is_some_and(super::intent::Intent::withholds)
    }
}
