//! The state machine itself: requests from arrival to answer.

use farshore_extent::{Epoch, Extent, Seq};

use super::brake::Brake;
use super::event::{
    Action, Backing, Buffer, CopyEnd, Event, IntentEnd, IoKey, Now, Outcome, QueueId, Token,
    VolumeKey,
};
use super::gate::AckGate;
use super::intent::Intent;
use super::limits::{Faults, Limits};
use super::range_lock::{LockKey, Sharing};
use super::slab::Slab;
use super::volume::{Context, Counter, Volume, Written};
use crate::device::DeviceError;

/// The capture core of a host. See the module's head for how it is driven.
#[derive(Debug)]
pub struct CaptureCore {
    pub(super) counter: Counter,
    pub(super) limits: Limits,
    pub(super) volumes: Vec<Option<Volume>>,
    pub(super) requests: Slab<Request>,
    pub(super) gate: AckGate,
    pub(super) brake: Brake,
    pub(super) pending_markers: Vec<(farshore_extent::MarkerId, Vec<VolumeKey>)>,
    /// Volumes attached so far.
    pub(super) attached: u64,
    granted: Vec<IoKey>,
}

/// A request between its arrival and the backing's completion.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) queue: QueueId,
    pub(super) token: Token,
    pub(super) volume: VolumeKey,
    pub(super) lock: Option<LockKey>,
    pub(super) what: What,
}

#[derive(Debug)]
pub(super) enum What {
    Write {
        extent: Extent,
        buffer: Buffer,
        crc: u32,
        pieces: Vec<u32>,
        fua: bool,
        early: Option<Seq>,
    },
    Zero {
        extent: Extent,
        fua: bool,
        may_unmap: bool,
        early: Option<Seq>,
    },
    Flush {
        /// On the intent map's clock.
        began: u64,
    },
    /// A flush of our own.
    OwnFlush {
        began: u64,
    },
    Copy {
        extent: Extent,
        slot: super::event::PoolSlot,
    },
    CopyHole {
        extent: Extent,
    },
    /// A read of one chunk for its digest.
    Digest {
        extent: Extent,
        slot: super::event::PoolSlot,
        verify: bool,
    },
}

impl What {
    const fn backing(&self) -> Backing {
        match self {
            Self::Write { extent, buffer, fua, .. } => {
                Backing::Write { extent: *extent, buffer: *buffer, fua: *fua }
            }
            Self::Zero { extent, fua, may_unmap, .. } => {
                Backing::Zero { extent: *extent, fua: *fua, may_unmap: *may_unmap }
            }
            Self::Flush { .. } | Self::OwnFlush { .. } => Backing::Flush,
            Self::Copy { extent, slot } => Backing::Read { extent: *extent, slot: *slot },
            Self::CopyHole { extent } => Backing::CheckHole { extent: *extent },
            Self::Digest { extent, slot, .. } => Backing::Digest { extent: *extent, slot: *slot },
        }
    }

    /// What it changes on the medium.
    pub(super) const fn write(&self) -> Option<Extent> {
        match self {
            Self::Write { extent, .. } | Self::Zero { extent, .. } => Some(*extent),
            Self::Flush { .. }
            | Self::OwnFlush { .. }
            | Self::Copy { .. }
            | Self::CopyHole { .. }
            | Self::Digest { .. } => None,
        }
    }

    const fn range(&self) -> Option<(Extent, Sharing)> {
        match self {
            Self::Write { extent, .. } | Self::Zero { extent, .. } => {
                Some((*extent, Sharing::Exclusive))
            }
            Self::Copy { extent, .. } | Self::CopyHole { extent } | Self::Digest { extent, .. } => {
                Some((*extent, Sharing::Shared))
            }
            Self::Flush { .. } | Self::OwnFlush { .. } => None,
        }
    }
}

impl CaptureCore {
    /// A core without volumes, for the epoch that this run was given durably.
    #[must_use]
    pub fn new(epoch: Epoch, limits: Limits) -> Self {
        Self {
            counter: Counter { epoch, last: Seq::ZERO },
            limits,
            volumes: Vec::new(),
            requests: Slab::new(),
            gate: AckGate::default(),
            brake: Brake::default(),
            pending_markers: Vec::new(),
            attached: 0,
            granted: Vec::new(),
        }
    }

    /// Takes one event; appends what is to be done to `out`.
    ///
    /// Numbers are taken, records appended and answers decided within this call: the caller
    /// serialises all calls of a host.
    pub fn step(&mut self, now: Now, event: Event, out: &mut Vec<Action>) {
        self.gate.expire(now.mono_ms, out);
        self.brake.expire(now.mono_ms, out);
        let late = self.limits.faults.marker_before_gate && self.gate.is_closed();
        match event {
            Event::Write { queue, token, volume, extent, buffer, crc, pieces, fua } => {
                if buffer == Buffer::Spare
                    && let Some(v) = self.volume_mut(volume)
                {
                    v.spares += 1;
                }
                let early = self.early_number();
                let what = What::Write { extent, buffer, crc, pieces, fua, early };
                self.arrive(Request { queue, token, volume, lock: None, what }, out);
            }
            Event::Zero { queue, token, volume, extent, fua, may_unmap } => {
                let early = self.early_number();
                let what = What::Zero { extent, fua, may_unmap, early };
                self.arrive(Request { queue, token, volume, lock: None, what }, out);
            }
            Event::Flush { queue, token, volume } => {
                let intent = self.volume_mut(volume).and_then(|v| v.intent.as_mut());
                let what = What::Flush { began: intent.map_or(0, Intent::flush_begins) };
                self.arrive(Request { queue, token, volume, lock: None, what }, out);
            }
            Event::Copy { queue, token, volume, hole } => match self.next_copy(volume, hole) {
                Ok(what) => {
                    self.arrive(Request { queue, token, volume, lock: None, what }, out);
                }
                Err(end) => out.push(Action::CopyDone { queue, token, end }),
            },
            Event::BackingDone { io, outcome } => self.done(now, io, outcome, out),
            Event::IntentDone { volume, end } => self.intent_done(volume, end, out),
            Event::Tick => {}
        }
        if late {
            self.gate.close_late();
        }
    }

    fn early_number(&mut self) -> Option<Seq> {
        self.limits.faults.number_before_backing.then(|| self.counter.take())
    }

    /// Range lock, then the backing; or the end for a volume that is no longer there.
    fn arrive(&mut self, request: Request, out: &mut Vec<Action>) {
        let (queue, token) = (request.queue, request.token);
        let faults = self.limits.faults;
        let Some(volume) = held(&mut self.volumes, request.volume) else {
            let gone = Err(DeviceError::Shutdown);
            out.push(Action::Answer { queue, token, result: gone });
            return;
        };
        let write = request.what.write();
        if let (Some(intent), Some(extent)) = (&mut volume.intent, write) {
            intent.begin(extent, self.counter.last);
        }
        let what = request.what.backing();
        let range = request.what.range().filter(|(_, sharing)| {
            let off = faults.copy_without_lock && *sharing == Sharing::Shared;
            !(faults.no_range_lock || off)
        });
        let io = self.requests.insert(request);
        let held = range.is_none_or(|(extent, sharing)| {
            let (lock, held) = volume.locks.claim(io, extent, sharing);
            if let Some(request) = self.requests.get_mut(io) {
                request.lock = Some(lock);
            }
            held
        });
        let waits = held && volume.must_wait_for_intent(io, write, faults);
        volume.ask_for_intent(out);
        if held && !waits {
            out.push(Action::Backing { queue, token, io, what });
        }
    }

    /// Number and record, then unlock, then answer through the gate.
    fn done(&mut self, now: Now, io: IoKey, outcome: Outcome, out: &mut Vec<Action>) {
        let Some(request) = self.requests.remove(io) else {
            debug_assert!(false, "a backing operation ended twice");
            return;
        };
        let Some(volume) = held(&mut self.volumes, request.volume) else {
            debug_assert!(false, "a volume was detached with requests in flight");
            return;
        };
        let mut cx =
            Context { now, counter: &mut self.counter, limits: &self.limits, out: &mut *out };
        let end = volume.completed(&mut cx, &request.what, outcome);
        if let Some(lock) = request.lock {
            volume.locks.unlock(lock, &mut self.granted);
        }
        volume.intent_after(&request.what, outcome, cx.counter.last);
        volume.try_restore(&mut cx);
        volume.want_copy(&mut cx);
        self.sweep(request.volume, out);
        self.start_granted(out);
        self.finish(now, &request, end, out);
    }

    fn start_granted(&mut self, out: &mut Vec<Action>) {
        let faults = self.limits.faults;
        for io in self.granted.drain(..) {
            let Some(request) = self.requests.get(io) else { continue };
            let (queue, token, what) = (request.queue, request.token, request.what.backing());
            let write = request.what.write();
            let volume = held(&mut self.volumes, request.volume);
            let waits = volume.is_some_and(|v| v.must_wait_for_intent(io, write, faults));
            if !waits {
                out.push(Action::Backing { queue, token, io, what });
            }
        }
    }

    /// Bits have become durable, or never will: writes that waited for them go on.
    fn intent_done(&mut self, key: VolumeKey, end: IntentEnd, out: &mut Vec<Action>) {
        let volume = held(&mut self.volumes, key);
        let Some(intent) = volume.and_then(|v| v.intent.as_mut()) else { return };
        let withheld = intent.withholds();
        let requests = &self.requests;
        let durable = |intent: &Intent, io: IoKey| {
            let write = requests.get(io).and_then(|request| request.what.write());
            write.is_none_or(|extent| intent.is_durable(extent))
        };
        intent.committed(end, durable, &mut self.granted);
        if withheld && !intent.withholds() {
            out.push(Action::Recorded { volume: key, payload: 0, urgent: true });
        }
        self.sweep(key, out);
        self.start_granted(out);
    }

    /// Clears regions of the intent map that may be cleared; asks for what that needs.
    pub(super) fn sweep(&mut self, key: VolumeKey, out: &mut Vec<Action>) {
        let (epoch, faults) = (self.counter.epoch, self.limits.faults);
        let Some(volume) = held(&mut self.volumes, key) else { return };
        let settled = volume.dirty.dirty_chunks() == 0;
        let durable = volume.log.durable();
        let Some(intent) = &mut volume.intent else { return };
        let durable = if durable.epoch == epoch { durable.seq } else { Seq::ZERO };
        if intent.sweep(durable, settled, faults) {
            let what = What::OwnFlush { began: intent.flush_begins() };
            let (queue, token) = (QueueId(0), Token(0));
            let request = Request { queue, token, volume: key, lock: None, what };
            let io = self.requests.insert(request);
            out.push(Action::FlushWanted { volume: key, io });
        }
        volume.ask_for_intent(out);
    }

    fn finish(&mut self, now: Now, request: &Request, end: End, out: &mut Vec<Action>) {
        let (queue, token) = (request.queue, request.token);
        match end {
            End::Guest(result) => {
                if self.gate.holds(request.volume) && !self.limits.faults.gate_ignored {
                    return self.gate.wait(queue, token, result);
                }
                match self.delay(request) {
                    0 => out.push(Action::Answer { queue, token, result }),
                    ms => self.brake.hold(now.mono_ms.saturating_add(ms), queue, token, result),
                }
            }
            End::Copy(end) => out.push(Action::CopyDone { queue, token, end }),
            End::Nobody => {}
        }
    }

    /// Holds no answer back any more.
    pub fn end_throttle(&mut self, now: Now, out: &mut Vec<Action>) {
        self.limits.throttle_ms = 0;
        self.gate.expire(now.mono_ms, out);
        self.brake.expire(u64::MAX, out);
    }

    /// For how many milliseconds the answer is held back.
    fn delay(&mut self, request: &Request) -> u64 {
        let longest = self.limits.throttle_ms;
        if longest == 0 || request.what.write().is_none() {
            return 0;
        }
        let Some(volume) = held(&mut self.volumes, request.volume) else { return 0 };
        let delay = volume.throttle_ms(longest);
        volume.figures.throttled += u64::from(delay > 0);
        delay
    }

    pub(super) fn volume(&self, key: VolumeKey) -> Option<&Volume> {
        self.volumes.get(key.index())?.as_ref().filter(|volume| volume.key == key)
    }

    pub(super) fn volume_mut(&mut self, key: VolumeKey) -> Option<&mut Volume> {
        held(&mut self.volumes, key)
    }
}

/// The volume of this key; none when it was detached, whoever has its place now.
pub(super) fn held(volumes: &mut [Option<Volume>], key: VolumeKey) -> Option<&mut Volume> {
    volumes.get_mut(key.index())?.as_mut().filter(|volume| volume.key == key)
}

/// What the one who asked is told.
pub(super) enum End {
    Guest(Result<(), DeviceError>),
    Copy(CopyEnd),
    Nobody,
}

impl Volume {
    /// What the completion of the backing means for the log.
    fn completed(&mut self, cx: &mut Context<'_>, what: &What, outcome: Outcome) -> End {
        let failure = match outcome {
            Outcome::Failed(error) => Some(error),
            Outcome::Done
            | Outcome::Data { .. }
            | Outcome::Digest { .. }
            | Outcome::Zeroes
            | Outcome::NotHole => None,
        };
        match what {
            What::Write { extent, buffer, crc, pieces, early, .. } => {
                self.figures.writes += 1;
                self.figures.written_bytes += extent.len();
                if failure.is_some() {
                    self.failed(cx, *extent, Some(*buffer));
                } else {
                    let (extent, buffer, crc, early) = (*extent, *buffer, *crc, *early);
                    self.wrote(cx, &Written { extent, buffer, crc, pieces, early });
                }
                End::Guest(failure.map_or(Ok(()), Err))
            }
            What::Zero { extent, early, .. } => {
                self.figures.writes += 1;
                self.figures.written_bytes += extent.len();
                if failure.is_some() {
                    self.failed(cx, *extent, None);
                } else {
                    self.zeroed(cx, *extent, *early);
                }
                End::Guest(failure.map_or(Ok(()), Err))
            }
            What::Flush { .. } => {
                self.figures.backing_errors += u64::from(failure.is_some());
                End::Guest(failure.map_or(Ok(()), Err))
            }
            What::OwnFlush { .. } => {
                self.figures.backing_errors += u64::from(failure.is_some());
                End::Nobody
            }
            What::Copy { extent, slot } => End::Copy(self.copied(cx, *extent, *slot, outcome)),
            What::CopyHole { extent } => End::Copy(self.copied_hole(cx, *extent, outcome)),
            What::Digest { extent, slot, verify } => {
                End::Copy(self.digested(cx, (*extent, *verify), *slot, outcome))
            }
        }
    }

    /// Tells the intent map what the end of a request means.
    fn intent_after(&mut self, what: &What, outcome: Outcome, at: Seq) {
        let Some(intent) = &mut self.intent else { return };
        let well = !matches!(outcome, Outcome::Failed(_));
        match what {
            What::Write { extent, .. } | What::Zero { extent, .. } => {
                intent.end(*extent, at, &self.dirty);
            }
            What::Copy { extent, .. } | What::CopyHole { extent } | What::Digest { extent, .. } => {
                intent.copied(*extent, at, &self.dirty);
            }
            What::Flush { began } => intent.flush_ended(*began, well, false),
            What::OwnFlush { began } => intent.flush_ended(*began, well, true),
        }
    }

    /// Whether a request that holds its range waits for its bits; then it is kept.
    fn must_wait_for_intent(&mut self, io: IoKey, write: Option<Extent>, faults: Faults) -> bool {
        let (Some(intent), Some(extent)) = (&mut self.intent, write) else { return false };
        if faults.intent_not_waited_for || intent.is_durable(extent) {
            return false;
        }
        intent.wait(io);
        true
    }

    pub(super) fn ask_for_intent(&mut self, out: &mut Vec<Action>) {
        if let Some(urgent) = self.intent.as_mut().and_then(Intent::ask) {
            out.push(Action::IntentWanted { volume: self.key, urgent });
        }
    }
}
