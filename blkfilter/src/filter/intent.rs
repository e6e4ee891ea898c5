//! The thread that keeps a volume's intent map durable: one sync for all that wait.
//!
//! Guests wait for it only at the first write to a region that is not set. It flushes the backing
//! on a ring of its own, so that a flush and a commit do not wait for each other.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::device::FilterDevice;
use super::host::Host;
use super::inbox::Inbox;
use super::queue::device_error;
use crate::backing::Backing;
use crate::core::{Action, Event, IntentEnd, IoKey, Outcome, QueueId, VolumeKey};
use crate::sys::ring::{Op, Ring};
use crate::sys::wake::wait_readable;
use crate::volume_state::{FileMedium, StateFile};

/// How long cleared bits wait to be written together with others.
const LAZY: Duration = Duration::from_secs(1);

/// Between two looks whether the state directory can be written again.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// The state of a volume, shared with who ends it in order.
pub type SharedState = Arc<Mutex<StateFile<FileMedium>>>;

/// The keeper of one volume's intent map. Dropping it asks it to stop.
#[derive(Debug)]
pub struct IntentKeeper {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    inbox: Arc<Inbox>,
    stop: AtomicBool,
}

impl IntentKeeper {
    /// Starts the thread for an attached volume, before anybody writes to it.
    ///
    /// # Errors
    /// Out of descriptors or threads.
    pub fn start(device: &Arc<FilterDevice>, state: SharedState) -> io::Result<Self> {
        let inbox = Arc::new(Inbox::new()?);
        let shared = Arc::new(Shared { inbox, stop: AtomicBool::new(false) });
        let ring = device.backing.ring(2, device.engine, vec![])?;
        let queue = device.host.open_queue(&shared.inbox);
        device.host.set_intent_queue(device.key, queue);
        let worker = Worker {
            host: Arc::clone(&device.host),
            volume: device.key,
            _backing: Arc::clone(&device.backing),
            shared: Arc::clone(&shared),
            state,
            queue,
            ring,
            flush: None,
            // What was wanted before the queue was there.
            due: Some(Instant::now()),
            again: None,
            ending: false,
            actions: Vec::new(),
        };
        match Builder::new().name("intent".into()).spawn(move || worker.run()) {
            Ok(thread) => Ok(Self { shared, thread }),
            Err(error) => {
                device.host.end_intent(device.key);
                device.host.close_queue(queue);
                Err(error)
            }
        }
    }

    /// Has the thread end after the commit and the flush it is at. Nobody may write to the volume
    /// any more.
    pub fn ask_to_stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.inbox.wake();
    }

    /// Whether the thread has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }
}

impl Drop for IntentKeeper {
    fn drop(&mut self) {
        self.ask_to_stop();
    }
}

/// Does not have the device: who has it can still write, and needs this thread for it.
struct Worker {
    host: Arc<Host>,
    volume: VolumeKey,
    /// What the ring is on.
    _backing: Arc<Backing>,
    shared: Arc<Shared>,
    state: SharedState,
    queue: QueueId,
    ring: Ring,
    /// The flush of the backing that is under way.
    flush: Option<IoKey>,
    /// When the next commit is to be made.
    due: Option<Instant>,
    /// After a loss: when to look whether it works again.
    again: Option<Instant>,
    /// The core asks for nothing more.
    ending: bool,
    actions: Vec<Action>,
}

impl Worker {
    fn run(mut self) {
        loop {
            self.shared.inbox.take_all(&mut self.actions);
            self.act();
            self.finish_flush();
            let now = Instant::now();
            if self.due.is_some_and(|due| due <= now) {
                self.due = None;
                self.commit();
                continue;
            }
            if self.again.is_some_and(|again| again <= now) {
                self.again = None;
                self.look_again();
                continue;
            }
            if self.ending && self.flush.is_none() {
                break;
            }
            if self.shared.stop.load(Ordering::Acquire) && !self.ending {
                self.ending = true;
                self.host.end_intent(self.volume);
                continue; // what it asked for before that is in the inbox
            }
            self.wait(now);
        }
        self.host.close_queue(self.queue);
    }

    fn wait(&self, now: Instant) {
        if !self.actions.is_empty() {
            return;
        }
        let next = [self.due, self.again].into_iter().flatten().min();
        let left = next.map(|at| at.saturating_duration_since(now));
        if let Err(error) = wait_readable(&[self.shared.inbox.fd(), self.ring.fd()], left) {
            tracing::error!(%error, "the keeper of the intent map cannot wait");
        }
    }

    fn act(&mut self) {
        for action in std::mem::take(&mut self.actions) {
            match action {
                Action::IntentWanted { urgent, .. } => {
                    let at = Instant::now() + if urgent { Duration::ZERO } else { LAZY };
                    self.due = Some(self.due.map_or(at, |due| due.min(at)));
                }
                Action::FlushWanted { io, .. } => {
                    self.flush = Some(io);
                    self.ring.push(Op::Sync, 0);
                    if let Err(error) = self.ring.submit() {
                        tracing::warn!(%error, "the kernel takes no flush for the moment");
                    }
                }
                Action::Backing { .. }
                | Action::Answer { .. }
                | Action::CopyDone { .. }
                | Action::CopyWanted { .. }
                | Action::Recorded { .. }
                | Action::HoldBroken { .. } => debug_assert!(false, "not for the intent map"),
            }
        }
    }

    fn finish_flush(&mut self) {
        let mut ended = None;
        self.ring.completions(|done| ended = Some(done.result));
        if let (Some(result), Some(io)) = (ended, self.flush)
            && self.flush.take().is_some()
        {
            let failed = |errno| Outcome::Failed(device_error(errno));
            let outcome = result.map_or_else(failed, |()| Outcome::Done);
            self.step(Event::BackingDone { io, outcome });
        }
    }

    fn step(&mut self, event: Event) {
        let host = Arc::clone(&self.host);
        host.run(Some(self.queue), &mut self.actions, |core, now, out| core.step(now, event, out));
    }

    fn commit(&mut self) {
        let volume = self.volume;
        let Some(commit) = self.host.lock().core.take_intent(volume) else { return };
        let end = self.with_state(|state| state.commit(&commit));
        if let IntentEnd::Lost(loss) = end {
            tracing::error!(
                code = "FS-2052",
                ?loss,
                "the state directory cannot be written: a crash of filterd now means that the \
                 whole volume is copied again"
            );
            self.again = Some(Instant::now() + LOOK_AGAIN);
        }
        self.step(Event::IntentDone { volume, end });
    }

    fn look_again(&mut self) {
        if self.with_state(StateFile::works_again) {
            let (host, volume) = (Arc::clone(&self.host), self.volume);
            host.run(Some(self.queue), &mut self.actions, |core, now, out| {
                core.resume_intent(now, volume, out);
            });
            tracing::info!("the state directory can be written again");
        } else {
            self.again = Some(Instant::now() + LOOK_AGAIN);
        }
    }

    fn with_state<T>(&self, act: impl FnOnce(&mut StateFile<FileMedium>) -> T) -> T {
        // A panic while the state was held is a defect that tests have to find; what is in it is
        // written whole by each call.
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
