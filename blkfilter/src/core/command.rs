//! What is asked of the core besides I/O: volumes come and go, markers, holds, releases.

use std::borrow::Cow;

use farshore_changelog::limits::{MAX_MARKER_NAME, MAX_RECORD_PAYLOAD};
use farshore_extent::{
    BlockSizes, CaptureOrder, ChunkMap, ChunkSize, Extent, GroupId, Lsn, MarkerId, PointKind,
    VolumeId, VolumeSize, WallTime,
};

use super::capture::{CaptureCore, held};
use super::compare::Compare;
use super::event::{Action, IntentCommit, Now, PoolSlot, VolumeKey};
use super::intent::Intent;
use super::log::Log;
use super::range_lock::RangeLock;
use super::region_map::RegionMap;
use super::ring::PoolRing;
use super::volume::{Context, Figures, Volume};
use crate::control::DescriptorBody;

/// Why the core did not do what it was asked. Nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The key or identity is of no attached volume.
    #[error("no such volume is attached")]
    NoSuchVolume,
    /// The identity is attached already.
    #[error("the volume is attached already")]
    AlreadyAttached,
    /// The pool cannot hold four chunks and four of the largest writes.
    #[error("a pool of {given} bytes is too small, {needed} are needed")]
    PoolTooSmall {
        /// Bytes given.
        given: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// A volume in use cannot become smaller.
    #[error("a volume of {} bytes cannot shrink to {}", from.get(), to.get())]
    Shrinks {
        /// Size in bytes.
        from: VolumeSize,
        /// Size asked for.
        to: VolumeSize,
    },
    /// Requests are in flight.
    #[error("{0} requests are in flight")]
    Busy(usize),
    /// A place after the last record.
    #[error("{asked} is ahead of the last record {captured}")]
    AheadOfCaptured {
        /// The place named.
        asked: Lsn,
        /// Last record.
        captured: Lsn,
    },
    /// The reader is missing records that were released: it has to ask for a new copy.
    #[error("records after {asked} were released up to {released} and are gone")]
    AlreadyReleased {
        /// The place named.
        asked: Lsn,
        /// Released up to here.
        released: Lsn,
    },
    /// The marker's name is longer than 255 bytes.
    #[error("a marker's name has at most {MAX_MARKER_NAME} bytes")]
    NameTooLong,
    /// Too many records or pending markers are retained.
    #[error("too many records or pending markers are waiting")]
    NoRoom,
    /// No pending marker has this identity.
    #[error("no pending marker has this identity")]
    NoSuchMarker,
    /// Another hold is on.
    #[error("another hold is on")]
    HoldBusy,
    /// A volume of the hold is catching up.
    #[error("a volume is catching up")]
    NotOrdered(Vec<VolumeId>),
}

/// How a volume begins its epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// After a clean stop at `last`, with everything released and nothing changed since.
    Continues {
        /// Last record of the earlier epoch.
        last: Lsn,
    },
    /// The target may have any of it: everything is compared, and what differs is sent.
    Compare {
        /// Shown in status.
        reason: String,
    },
    /// The target has nothing: everything is sent.
    Copy {
        /// Shown in status.
        reason: String,
    },
    /// Only some ranges may differ from what a reader has that has everything up to `released`;
    /// any other reader is refused ([`Refused::AlreadyReleased`]).
    CopyPart {
        /// Ranges to send, widened to chunks.
        ranges: Vec<Extent>,
        /// Of an earlier epoch.
        released: Lsn,
        /// They are compared first: the reader may have any of them.
        compare: bool,
        /// Shown in status.
        reason: String,
    },
}

impl Start {
    /// The same, with nothing sent that was not compared.
    #[must_use]
    pub fn compared(self) -> Self {
        match self {
            Self::Copy { reason } => Self::Compare { reason },
            Self::CopyPart { ranges, released, reason, .. } => {
                Self::CopyPart { ranges, released, compare: true, reason }
            }
            other @ (Self::Continues { .. } | Self::Compare { .. }) => other,
        }
    }
}

/// A volume to attach.
#[derive(Debug, Clone)]
pub struct Attach {
    /// Its identity.
    pub volume: VolumeId,
    /// Its size in bytes.
    pub size: VolumeSize,
    /// Its block sizes in bytes.
    pub blocks: BlockSizes,
    /// Unit of the copy loop.
    pub chunk: ChunkSize,
    /// Size of its pool in bytes.
    pub pool_bytes: u64,
    /// How it begins.
    pub start: Start,
    /// The intent map as it is on disk; none: none is kept.
    pub intent: Option<IntentStart>,
}

/// The intent map that a volume begins with.
#[derive(Debug, Clone)]
pub struct IntentStart {
    /// As it is on disk, durably; covers everything that [`Start`] will copy.
    pub set: RegionMap,
    /// More regions than this are cleared when they may be.
    pub cap: u64,
}

/// A marker to cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MarkerSpec {
    /// Identity; the same in all streams of a group.
    pub marker: MarkerId,
    /// Volumes that shall carry it.
    pub volumes: Vec<VolumeKey>,
    /// What the point will promise.
    pub kind: PointKind,
    /// The group or nil.
    pub group: GroupId,
    /// Name tag, at most 255 bytes.
    pub name: String,
    /// Wait for [`CaptureCore::resolve_marker`]; otherwise it is a point at once.
    pub pending: bool,
}

/// Where a marker was placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// One number for all volumes; the last number given out when no volume carries it.
    pub lsn: Lsn,
    /// Capture time.
    pub time: WallTime,
    /// Volumes that carry it.
    pub volumes: Vec<VolumeId>,
    /// Volumes that do not, because they are catching up.
    pub not_ordered: Vec<VolumeId>,
}

/// How a hold ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HoldEnd {
    /// The gate had never opened since the marker.
    Held,
    /// It had opened alone, or there was no such hold: the marker must not become a point.
    Broken,
}

impl CaptureCore {
    /// Attaches a volume: its `EpochStart` is its first record.
    ///
    /// # Errors
    /// [`Refused::AlreadyAttached`], [`Refused::PoolTooSmall`].
    pub fn attach(
        &mut self,
        now: Now,
        attach: Attach,
        out: &mut Vec<Action>,
    ) -> Result<VolumeKey, Refused> {
        if self.key_of(attach.volume).is_some() {
            return Err(Refused::AlreadyAttached);
        }
        let largest = u64::try_from(MAX_RECORD_PAYLOAD).unwrap_or(u64::MAX);
        let chunk = attach.chunk.get();
        // Tiny chunks are a simulator's, with tiny writes.
        let needed = 4 * chunk.max(if chunk < (64 << 10) { 0 } else { largest });
        if attach.pool_bytes < needed {
            return Err(Refused::PoolTooSmall { given: attach.pool_bytes, needed });
        }
        let index = self.volumes.iter().position(Option::is_none).unwrap_or(self.volumes.len());
        let place = u32::try_from(index).map_err(|_| Refused::NoRoom)?;
        let key = VolumeKey { index: place, generation: self.attached };
        self.attached += 1;
        let mut volume = new_volume(key, &attach, self.limits.pool_align);
        let mut cx =
            Context { now, counter: &mut self.counter, limits: &self.limits, out: &mut *out };
        let continues = volume.order == CaptureOrder::Ordered;
        let (size, blocks) = (volume.size, volume.blocks);
        let seq =
            volume.append(&mut cx, DescriptorBody::EpochStart { continues, size, blocks }, None);
        if !continues {
            if volume.dirty.dirty_bytes() == volume.size.get() {
                volume.log.restart_at(seq);
            }
            volume.try_restore(&mut cx);
            volume.want_copy(&mut cx);
        }
        volume.ask_for_intent(cx.out);
        if index == self.volumes.len() {
            self.volumes.push(Some(volume));
        } else {
            self.volumes[index] = Some(volume);
        }
        Ok(key)
    }

    /// Forgets a volume and its records.
    ///
    /// # Errors
    /// [`Refused::Busy`] with requests in flight, [`Refused::NoSuchVolume`].
    pub fn detach(&mut self, volume: VolumeKey) -> Result<(), Refused> {
        self.volume(volume).ok_or(Refused::NoSuchVolume)?;
        match self.requests.iter().filter(|r| r.volume == volume).count() {
            0 => {
                self.volumes[volume.index()] = None;
                self.forget_pending(volume);
                Ok(())
            }
            n => Err(Refused::Busy(n)),
        }
    }

    /// Room in the volume's pool for a payload of `len` bytes; `None`: use a spare buffer.
    pub fn reserve(&mut self, volume: VolumeKey, len: u32) -> Option<PoolSlot> {
        self.volume_mut(volume)?.ring.reserve(len)
    }

    /// Gives back room whose request never arrived.
    pub fn unreserve(
        &mut self,
        now: Now,
        volume: VolumeKey,
        slot: PoolSlot,
        out: &mut Vec<Action>,
    ) {
        self.with_volume(now, volume, out, |v, cx| {
            v.ring.drop_user(slot.ticket);
            v.want_copy(cx);
        });
    }

    /// Cuts a marker over the volumes at one number.
    ///
    /// # Errors
    /// [`Refused::NameTooLong`], [`Refused::NoSuchVolume`], [`Refused::NoRoom`].
    pub fn marker(
        &mut self,
        now: Now,
        spec: &MarkerSpec,
        out: &mut Vec<Action>,
    ) -> Result<Placed, Refused> {
        self.check_marker(spec)?;
        self.gate.expire(now.mono_ms, out);
        Ok(self.place_marker(now, spec, out))
    }

    fn check_marker(&self, spec: &MarkerSpec) -> Result<(), Refused> {
        if spec.name.len() > MAX_MARKER_NAME {
            return Err(Refused::NameTooLong);
        }
        if spec.pending && self.pending_markers.len() >= self.limits.max_pending_markers {
            return Err(Refused::NoRoom);
        }
        let most = self.limits.max_records + self.limits.control_headroom;
        for key in &spec.volumes {
            let volume = self.volume(*key).ok_or(Refused::NoSuchVolume)?;
            if volume.log.len() >= most {
                return Err(Refused::NoRoom);
            }
        }
        Ok(())
    }

    fn place_marker(&mut self, now: Now, spec: &MarkerSpec, out: &mut Vec<Action>) -> Placed {
        let mut placed =
            Placed { lsn: self.last(), time: now.wall, volumes: vec![], not_ordered: vec![] };
        let mut carriers: Vec<VolumeKey> = Vec::new();
        for key in &spec.volumes {
            let Some(volume) = self.volume(*key) else { continue };
            if volume.order == CaptureOrder::CatchUp {
                placed.not_ordered.push(volume.id);
            } else if !carriers.contains(key) {
                placed.volumes.push(volume.id);
                carriers.push(*key);
            }
        }
        if carriers.is_empty() {
            return placed;
        }
        let seq = self.counter.take();
        placed.lsn = self.counter.lsn(seq);
        let body = DescriptorBody::Marker {
            marker: spec.marker,
            kind: spec.kind,
            group: spec.group,
            name: spec.name.clone(),
            pending: spec.pending,
        };
        for key in &carriers {
            self.with_volume(now, *key, out, |v, cx| v.append_at(cx, seq, body.clone(), None));
        }
        if spec.pending {
            self.pending_markers.push((spec.marker, carriers));
        }
        placed
    }

    /// Commits or aborts a pending marker in every stream that carries it.
    ///
    /// # Errors
    /// [`Refused::NoSuchMarker`].
    pub fn resolve_marker(
        &mut self,
        now: Now,
        marker: MarkerId,
        commit: bool,
        out: &mut Vec<Action>,
    ) -> Result<(), Refused> {
        let index = self.pending_markers.iter().position(|(id, _)| *id == marker);
        let index = index.ok_or(Refused::NoSuchMarker)?;
        let (_, carriers) = self.pending_markers.remove(index);
        for key in carriers {
            let body = if commit {
                DescriptorBody::MarkerCommit(marker)
            } else {
                DescriptorBody::MarkerAbort(marker)
            };
            self.with_volume(now, key, out, |v, cx| {
                v.append(cx, body, None);
            });
        }
        Ok(())
    }

    /// Closes the acknowledgement gate of the marker's volumes, then cuts the marker, pending.
    /// The gate opens by [`Self::release_hold`], or alone after `timeout_ms` (at most the limit).
    ///
    /// # Errors
    /// [`Refused::NotOrdered`] when a volume is catching up, [`Refused::HoldBusy`], and those of
    /// [`Self::marker`].
    pub fn hold(
        &mut self,
        now: Now,
        spec: &MarkerSpec,
        timeout_ms: u64,
        out: &mut Vec<Action>,
    ) -> Result<Placed, Refused> {
        self.gate.expire(now.mono_ms, out);
        self.check_marker(spec)?;
        if self.gate.is_closed() {
            return Err(Refused::HoldBusy);
        }
        let behind = |v: &&Volume| v.order == CaptureOrder::CatchUp;
        let volumes = spec.volumes.iter().filter_map(|key| self.volume(*key));
        let behind: Vec<VolumeId> = volumes.filter(behind).map(|v| v.id).collect();
        if !behind.is_empty() {
            return Err(Refused::NotOrdered(behind));
        }
        let deadline = now.mono_ms.saturating_add(timeout_ms.min(self.limits.max_hold_ms));
        let late = self.limits.faults.marker_before_gate;
        self.gate.close(spec.marker, spec.volumes.clone(), deadline, late);
        let spec = MarkerSpec { pending: true, ..spec.clone() };
        Ok(self.place_marker(now, &spec, out))
    }

    /// Opens the gate of the hold with this marker.
    pub fn release_hold(&mut self, now: Now, marker: MarkerId, out: &mut Vec<Action>) -> HoldEnd {
        self.gate.expire(now.mono_ms, out);
        if self.gate.release(marker, out) { HoldEnd::Held } else { HoldEnd::Broken }
    }

    /// Everything up to `upto` is durable in the agent's spool: forgets the records and frees
    /// their room. What the target has does not change.
    ///
    /// # Errors
    /// [`Refused::AheadOfCaptured`], [`Refused::NoSuchVolume`].
    pub fn spooled(
        &mut self,
        now: Now,
        volume: VolumeKey,
        upto: Lsn,
        out: &mut Vec<Action>,
    ) -> Result<(), Refused> {
        self.with_volume(now, volume, out, |v, cx| {
            v.log.spooled(upto, &mut v.ring)?;
            v.want_copy(cx);
            Ok(())
        })
        .unwrap_or(Err(Refused::NoSuchVolume))
    }

    /// Everything up to `upto` is durable at the target: forgets the records, frees their room.
    ///
    /// # Errors
    /// [`Refused::AheadOfCaptured`], [`Refused::NoSuchVolume`].
    pub fn release(
        &mut self,
        now: Now,
        volume: VolumeKey,
        upto: Lsn,
        out: &mut Vec<Action>,
    ) -> Result<(), Refused> {
        let done = self.with_volume(now, volume, out, |v, cx| {
            v.log.release(upto, &mut v.ring)?;
            v.want_copy(cx);
            Ok(())
        });
        self.sweep(volume, out);
        done.unwrap_or(Err(Refused::NoSuchVolume))
    }

    /// What has to be made durable of the volume's intent map. One at a time: `None` until the
    /// last one was reported by [`super::Event::IntentDone`], and when nothing has changed.
    pub fn take_intent(&mut self, volume: VolumeKey) -> Option<IntentCommit> {
        let volume = self.volume_mut(volume)?;
        let durable = volume.log.durable();
        volume.intent.as_mut()?.take(durable)
    }

    /// The place for the intent map seems to be in order again: all of it has to be written.
    pub fn resume_intent(&mut self, now: Now, volume: VolumeKey, out: &mut Vec<Action>) {
        self.with_volume(now, volume, out, |v, cx| {
            v.intent.as_mut().map(Intent::resume);
            v.ask_for_intent(cx.out);
        });
    }

    /// Nobody keeps the volume's intent map any more: it stays as it is. Nobody may write then.
    pub fn end_intent(&mut self, volume: VolumeKey) {
        if let Some(intent) = self.volume_mut(volume).and_then(|v| v.intent.as_mut()) {
            intent.end_keeping();
        }
    }

    /// The target cannot follow the log: everything retained is dropped, order is lost, every chunk
    /// is compared and sent again if it differs. The reader may go on from any place it had.
    ///
    /// # Errors
    /// [`Refused::NoSuchVolume`].
    pub fn recopy(
        &mut self,
        now: Now,
        volume: VolumeKey,
        reason: String,
        out: &mut Vec<Action>,
    ) -> Result<(), Refused> {
        self.forget_pending(volume);
        self.with_volume(now, volume, out, |v, cx| {
            v.log.discard(&mut v.ring);
            v.compare.forget();
            let seq = v.suspect_all(cx, Cow::Owned(reason));
            v.log.restart_at(seq);
            // What told the reader the size, an EpochStart or a Resize, may be among what was dropped.
            v.append(cx, DescriptorBody::Resize(v.size), None);
            if let Some(intent) = &mut v.intent {
                intent.all_dirty();
            }
            v.ask_for_intent(cx.out);
            v.want_copy(cx);
        })
        .ok_or(Refused::NoSuchVolume)
    }

    fn forget_pending(&mut self, volume: VolumeKey) {
        for (_, carriers) in &mut self.pending_markers {
            carriers.retain(|key| *key != volume);
        }
        self.pending_markers.retain(|(_, carriers)| !carriers.is_empty());
    }

    pub(super) fn with_volume<T>(
        &mut self,
        now: Now,
        key: VolumeKey,
        out: &mut Vec<Action>,
        act: impl FnOnce(&mut Volume, &mut Context<'_>) -> T,
    ) -> Option<T> {
        let volume = held(&mut self.volumes, key)?;
        let mut cx = Context { now, counter: &mut self.counter, limits: &self.limits, out };
        Some(act(volume, &mut cx))
    }
}

fn new_volume(key: VolumeKey, attach: &Attach, pool_align: u64) -> Volume {
    let (order, reason, dirty, released) = match &attach.start {
        Start::Continues { last } => {
            let map = ChunkMap::clean(attach.size, attach.chunk);
            (CaptureOrder::Ordered, Cow::Borrowed(""), map, *last)
        }
        Start::Copy { reason } | Start::Compare { reason } => {
            let map = ChunkMap::all_dirty(attach.size, attach.chunk);
            (CaptureOrder::CatchUp, Cow::Owned(reason.clone()), map, Lsn::ZERO)
        }
        Start::CopyPart { ranges, released, reason, .. } => {
            let mut map = ChunkMap::clean(attach.size, attach.chunk);
            ranges.iter().for_each(|range| map.mark(*range));
            (CaptureOrder::CatchUp, Cow::Owned(reason.clone()), map, *released)
        }
    };
    let start = attach.intent.as_ref();
    let intent = start.map(|i| Intent::new(i.set.clone(), i.cap, &dirty));
    let mut volume = Volume {
        key,
        id: attach.volume,
        size: attach.size,
        blocks: attach.blocks,
        chunk: attach.chunk,
        log: Log::new(released),
        ring: PoolRing::new(attach.pool_bytes, pool_align),
        catch_up_total: dirty.dirty_bytes(),
        cold: dirty.clone(),
        dirty,
        intent,
        locks: RangeLock::default(),
        order,
        reason,
        cursor: 0,
        held: false,
        losses: 0,
        overrun: false,
        copy_waits: true,
        spares: 0,
        figures: Figures::default(),
        compare: Compare::new(attach.size, attach.chunk),
    };
    if matches!(attach.start, Start::Compare { .. } | Start::CopyPart { compare: true, .. }) {
        volume.suspect_dirty();
    }
    volume
}
