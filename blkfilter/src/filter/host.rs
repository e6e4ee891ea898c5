//! The capture core behind its lock, and the way of its actions to the queues.
//!
//! One lock a host, because number and append are one step over all volumes. It is held for
//! memory operations only; whoever is to be woken is woken after it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use farshore_extent::{Epoch, Extent, Lsn, MarkerId, VolumeId, VolumeSize, WallTime};

use super::fetch::Watcher;
use super::inbox::Inbox;
use crate::control::CompareAnswer;
use crate::core::{
    Action, Attach, CaptureCore, CoreStatus, Event, Limits, MarkerSpec, NewPart, Now, Placed,
    QueueId, Refused, RegionMap, VolumeKey,
};

/// What a volume leaves when it stops.
#[derive(Debug)]
pub struct Left {
    /// Its figures.
    pub status: CoreStatus,
    /// What a reader lacks that has everything up to `status.released`.
    pub missing: Vec<Extent>,
    /// The intent map, which covers it.
    pub set: RegionMap,
}

/// The host's core. Shared by all queues, the copy loops and the control socket.
#[derive(Debug)]
pub struct Host {
    shared: Mutex<Shared>,
    started: Instant,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) core: CaptureCore,
    pub(super) lines: BTreeMap<VolumeKey, Line>,
    queues: BTreeMap<QueueId, Arc<Inbox>>,
    next_queue: u32,
    pub(super) last_watcher: u64,
    /// Nobody waits any more.
    pub(super) stopping: bool,
    /// Tells [`Host::keep_time`] that there is a deadline.
    deadline: Arc<Condvar>,
    out: Vec<Action>,
}

/// What the driver keeps beside a volume of the core.
#[derive(Debug, Default)]
pub(super) struct Line {
    /// Mirrors the core's answer, so that a queue need not lock to ask.
    catching_up: Arc<AtomicBool>,
    copy: Option<QueueId>,
    /// Of the thread that keeps the intent map.
    intent: Option<QueueId>,
    /// Who waits for records or for their release.
    pub(super) watchers: Vec<Watcher>,
    pub(super) news: Arc<Condvar>,
}

/// Whom to wake once the lock is free.
#[derive(Debug, Default)]
struct Wake {
    inboxes: Vec<Arc<Inbox>>,
    waiters: Vec<Arc<Condvar>>,
}

impl Wake {
    fn wake(self) {
        self.inboxes.iter().for_each(|inbox| inbox.wake());
        self.waiters.iter().for_each(|waiter| waiter.notify_all());
    }
}

impl Host {
    /// A host without volumes, for an epoch that was raised durably.
    #[must_use]
    pub fn new(epoch: Epoch, limits: Limits) -> Self {
        let shared = Shared {
            core: CaptureCore::new(epoch, limits),
            lines: BTreeMap::new(),
            queues: BTreeMap::new(),
            next_queue: 0,
            last_watcher: 0,
            stopping: false,
            deadline: Arc::default(),
            out: Vec::new(),
        };
        Self { shared: Mutex::new(shared), started: Instant::now() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Shared> {
        // A panic inside the core is a defect that tests have to find; the state is the best
        // there is, and stopping all volumes of the host would harm more.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn now(&self) -> Now {
        let mono_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        Now { wall: WallTime::now(), mono_ms }
    }

    /// Runs one call of the core and hands its actions out; those for `mine` go to `own`.
    pub(super) fn run<T>(
        &self,
        mine: Option<QueueId>,
        own: &mut Vec<Action>,
        act: impl FnOnce(&mut CaptureCore, Now, &mut Vec<Action>) -> T,
    ) -> T {
        let now = self.now();
        let mut wake = Wake::default();
        let value = {
            let shared = &mut *self.lock();
            let value = act(&mut shared.core, now, &mut shared.out);
            shared.hand_out(mine, own, &mut wake);
            if shared.core.next_deadline().is_some() {
                wake.waiters.push(Arc::clone(&shared.deadline));
            }
            value
        };
        wake.wake();
        value
    }

    /// The same for callers that are no queue.
    pub(super) fn command<T>(
        &self,
        act: impl FnOnce(&mut CaptureCore, Now, &mut Vec<Action>) -> T,
    ) -> T {
        self.run(None, &mut Vec::new(), act)
    }

    /// Steps a queue's events in order: what ended first, then what arrived.
    pub(super) fn step(
        &self,
        mine: QueueId,
        ended: &mut Vec<Event>,
        arrived: &mut Vec<Event>,
        own: &mut Vec<Action>,
    ) {
        self.run(Some(mine), own, |core, now, out| {
            for event in ended.drain(..).chain(arrived.drain(..)) {
                core.step(now, event, out);
            }
        });
    }

    pub(super) fn open_queue(&self, inbox: &Arc<Inbox>) -> QueueId {
        let mut shared = self.lock();
        shared.next_queue += 1;
        let id = QueueId(shared.next_queue);
        shared.queues.insert(id, Arc::clone(inbox));
        id
    }

    pub(super) fn close_queue(&self, id: QueueId) {
        self.lock().queues.remove(&id);
    }

    /// Sends the core its ticks until [`Self::stop_waits`]: needed where answers may be held back.
    pub fn keep_time(&self) {
        let mut shared = self.lock();
        let deadline = Arc::clone(&shared.deadline);
        while !shared.stopping {
            let now = self.now().mono_ms;
            match shared.core.next_deadline() {
                None => shared = deadline.wait(shared).unwrap_or_else(PoisonError::into_inner),
                Some(at) if at > now => {
                    let rest = Duration::from_millis(at - now);
                    let waited = deadline.wait_timeout(shared, rest);
                    shared = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                Some(_) => {
                    drop(shared);
                    self.command(|core, now, out| core.step(now, Event::Tick, out));
                    shared = self.lock();
                }
            }
        }
        // Nobody keeps time any more.
        drop(shared);
        let end = |core: &mut CaptureCore, now, out: &mut Vec<Action>| core.end_throttle(now, out);
        self.command(end);
    }

    /// Attaches a volume to the core.
    ///
    /// # Errors
    /// As [`CaptureCore::attach`].
    pub fn attach(&self, attach: Attach) -> Result<VolumeKey, Refused> {
        let key = self.command(|core, now, out| core.attach(now, attach, out))?;
        let mut shared = self.lock();
        let line = Line::default();
        line.catching_up.store(shared.core.is_catching_up(key), Ordering::Relaxed);
        shared.lines.insert(key, line);
        Ok(key)
    }

    /// Forgets a volume. Its queues and its copy loop must be closed.
    ///
    /// # Errors
    /// As [`CaptureCore::detach`].
    pub fn detach(&self, key: VolumeKey) -> Result<(), Refused> {
        let mut shared = self.lock();
        shared.core.detach(key)?;
        if let Some(line) = shared.lines.remove(&key) {
            line.news.notify_all();
        }
        Ok(())
    }

    /// Whether the volume is catching up, to be asked without a lock.
    pub(super) fn catching_up(&self, key: VolumeKey) -> Arc<AtomicBool> {
        self.lock().lines.get(&key).map(|line| Arc::clone(&line.catching_up)).unwrap_or_default()
    }

    pub(super) fn set_copy_queue(&self, key: VolumeKey, queue: Option<QueueId>) {
        if let Some(line) = self.lock().lines.get_mut(&key) {
            line.copy = queue;
        }
    }

    /// The backing is larger now; see [`CaptureCore::grow`].
    ///
    /// # Errors
    /// As [`CaptureCore::grow`].
    pub fn grow(
        &self,
        volume: VolumeKey,
        size: VolumeSize,
        part: NewPart,
    ) -> Result<bool, Refused> {
        self.command(|core, now, out| core.grow(now, volume, size, part, out))
    }

    pub(super) fn set_intent_queue(&self, key: VolumeKey, queue: QueueId) {
        if let Some(line) = self.lock().lines.get_mut(&key) {
            line.intent = Some(queue);
        }
    }

    /// The intent map of the volume changes no more, and nothing is asked for it.
    pub(super) fn end_intent(&self, key: VolumeKey) {
        let mut shared = self.lock();
        shared.core.end_intent(key);
        if let Some(line) = shared.lines.get_mut(&key) {
            line.intent = None;
        }
    }

    /// What an orderly stop has to write.
    #[must_use]
    pub fn left(&self, key: VolumeKey) -> Option<Left> {
        // All of one moment: the agent may release meanwhile.
        let shared = self.lock();
        let (status, missing) = (shared.core.status(key)?, shared.core.missing(key));
        Some(Left { status, missing, set: shared.core.intent_map(key)? })
    }

    /// The figures of a volume.
    #[must_use]
    pub fn status(&self, volume: VolumeId) -> Option<CoreStatus> {
        let shared = self.lock();
        shared.core.status(shared.core.key_of(volume)?)
    }

    /// The epoch of this run.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.lock().core.epoch()
    }

    /// Cuts a marker over `volumes`; none means all. See [`CaptureCore::marker`].
    ///
    /// # Errors
    /// As [`CaptureCore::marker`].
    pub fn marker(&self, volumes: &[VolumeId], mut spec: MarkerSpec) -> Result<Placed, Refused> {
        self.command(|core, now, out| {
            spec.volumes = if volumes.is_empty() {
                core.keys()
            } else {
                let key = |id: &VolumeId| core.key_of(*id).ok_or(Refused::NoSuchVolume);
                volumes.iter().map(key).collect::<Result<_, _>>()?
            };
            core.marker(now, &spec, out)
        })
    }

    /// Commits or aborts a pending marker.
    ///
    /// # Errors
    /// As [`CaptureCore::resolve_marker`].
    pub fn resolve_marker(&self, marker: MarkerId, commit: bool) -> Result<(), Refused> {
        self.command(|core, now, out| core.resolve_marker(now, marker, commit, out))
    }

    /// Everything up to `upto` is durable at the target.
    ///
    /// # Errors
    /// As [`CaptureCore::release`].
    pub fn release(&self, volume: VolumeId, upto: Lsn) -> Result<(), Refused> {
        self.command(|core, now, out| {
            let key = core.key_of(volume).ok_or(Refused::NoSuchVolume)?;
            core.release(now, key, upto, out)
        })?;
        self.tell_released(volume);
        Ok(())
    }

    /// Everything up to `upto` is durable in the agent's spool.
    ///
    /// # Errors
    /// As [`CaptureCore::spooled`].
    pub fn spooled(&self, volume: VolumeId, upto: Lsn) -> Result<(), Refused> {
        self.command(|core, now, out| {
            let key = core.key_of(volume).ok_or(Refused::NoSuchVolume)?;
            core.spooled(now, key, upto, out)
        })
    }

    /// Sends everything again through the stream.
    ///
    /// # Errors
    /// As [`CaptureCore::recopy`].
    pub fn recopy(&self, volume: VolumeId, reason: String) -> Result<(), Refused> {
        self.command(|core, now, out| {
            let key = core.key_of(volume).ok_or(Refused::NoSuchVolume)?;
            core.recopy(now, key, reason, out)
        })
    }

    /// Has everything compared with the replica, and what differs sent.
    ///
    /// # Errors
    /// As [`CaptureCore::resync`].
    pub fn resync(&self, volume: VolumeId, reason: String) -> Result<(), Refused> {
        self.command(|core, now, out| {
            let key = core.key_of(volume).ok_or(Refused::NoSuchVolume)?;
            core.resync(now, key, reason, out)
        })
    }

    /// Keeps the copy loop from running, or lets it go.
    ///
    /// # Errors
    /// As [`CaptureCore::hold_copy`].
    pub fn hold_copy(&self, volume: VolumeId, held: bool) -> Result<(), Refused> {
        self.command(|core, now, out| {
            let key = core.key_of(volume).ok_or(Refused::NoSuchVolume)?;
            core.hold_copy(now, key, held, out)
        })
    }

    /// Starts a verify from the beginning, or ends it.
    ///
    /// # Errors
    /// As [`CaptureCore::verify`].
    pub fn verify(&self, volume: VolumeId, start: bool) -> Result<(), Refused> {
        self.command(|core, now, out| {
            let key = core.key_of(volume).ok_or(Refused::NoSuchVolume)?;
            core.verify(now, key, start, out)
        })
    }

    /// What the target said about the digests up to `upto`.
    ///
    /// # Errors
    /// As [`CaptureCore::compared`].
    pub fn compared(
        &self,
        volume: VolumeId,
        upto: Lsn,
        answer: &CompareAnswer,
    ) -> Result<(), Refused> {
        self.command(|core, now, out| {
            let key = core.key_of(volume).ok_or(Refused::NoSuchVolume)?;
            core.compared(now, key, upto, answer, out)
        })
    }

    /// Ends all waits of [`Self::fetch`] and [`Self::drain`], now and later.
    pub fn stop_waits(&self) {
        let mut shared = self.lock();
        shared.stopping = true;
        shared.lines.values().for_each(|line| line.news.notify_all());
        shared.deadline.notify_all();
    }
}

impl Shared {
    fn hand_out(&mut self, mine: Option<QueueId>, own: &mut Vec<Action>, wake: &mut Wake) {
        for action in self.out.drain(..) {
            let queue = match &action {
                Action::Backing { queue, .. }
                | Action::Answer { queue, .. }
                | Action::CopyDone { queue, .. } => *queue,
                Action::CopyWanted { volume } => {
                    match self.lines.get(volume).and_then(|line| line.copy) {
                        Some(queue) => queue,
                        None => continue,
                    }
                }
                Action::IntentWanted { volume, .. } | Action::FlushWanted { volume, .. } => {
                    match self.lines.get(volume).and_then(|line| line.intent) {
                        Some(queue) => queue,
                        None => continue,
                    }
                }
                Action::Recorded { volume, payload, urgent } => {
                    let Some(line) = self.lines.get_mut(volume) else { continue };
                    if *urgent {
                        let now = self.core.is_catching_up(*volume);
                        line.catching_up.store(now, Ordering::Relaxed);
                    }
                    if line.recorded(*payload, *urgent) {
                        wake.waiters.push(Arc::clone(&line.news));
                    }
                    continue;
                }
                Action::HoldBroken { marker } => {
                    tracing::warn!(%marker, "a hold was not released in time; it is broken");
                    continue;
                }
            };
            if mine == Some(queue) {
                own.push(action);
            } else if let Some(inbox) = self.queues.get(&queue) {
                inbox.put(action);
                if !wake.inboxes.iter().any(|known| Arc::ptr_eq(known, inbox)) {
                    wake.inboxes.push(Arc::clone(inbox));
                }
            }
        }
    }
}
