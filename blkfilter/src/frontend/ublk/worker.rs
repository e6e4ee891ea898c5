//! The queue threads of one device, and what is known of them.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::error::UblkError;
use super::plane::{Exit, Plane};
use crate::device::Device;
use crate::sys::ublk::queue::{Payloads, Prepared, QueueRing};
use crate::sys::ublk::uapi::{DevInfo, feature};
use crate::sys::wake::Event;

/// How far the threads are.
#[derive(Debug, Default)]
struct Progress {
    prepared: usize,
    fetched: usize,
    ended: usize,
    /// The first thing that went wrong.
    failure: Option<String>,
    /// The end of the device is wanted.
    removing: bool,
}

/// [`Progress`], shared.
#[derive(Debug, Default)]
struct Board {
    progress: Mutex<Progress>,
    changed: Condvar,
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits until `enough`, or the time has passed.
    fn wait(
        &self,
        limit: Duration,
        enough: impl Fn(&Progress) -> bool,
    ) -> MutexGuard<'_, Progress> {
        let deadline = Instant::now() + limit;
        let mut progress = self.lock();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if enough(&progress) || left.is_zero() {
                return progress;
            }
            let waited = self.changed.wait_timeout(progress, left);
            progress = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Counts a thread as ended whichever way it ends.
struct Ending(Arc<Board>, Option<Exit>);

impl Drop for Ending {
    fn drop(&mut self) {
        let exit = self.1.take();
        self.0.note(|progress| {
            progress.ended += 1;
            let failure = match exit {
                Some(Exit::Left) => None,
                Some(Exit::Stopped) if progress.removing => None,
                Some(Exit::Stopped) => Some("another program stopped the device".into()),
                Some(Exit::Failed(why)) => Some(why),
                None => Some("it panicked".into()),
            };
            progress.failure = progress.failure.take().or(failure);
        });
    }
}

/// What goes wrong with the threads of a device.
#[derive(Debug)]
pub(super) struct Failures(Arc<Board>);

impl Failures {
    /// Why a thread has ended by itself, after waiting for that for at most `limit`.
    pub(super) fn wait(&self, limit: Duration) -> Option<String> {
        self.0.wait(limit, |now| now.failure.is_some()).failure.clone()
    }
}

#[derive(Debug)]
struct Worker {
    /// Its ring must outlive it.
    thread: JoinHandle<Option<QueueRing>>,
    go: SyncSender<Arc<File>>,
    stop: Arc<Event>,
}

/// All queue threads of a device. Dropping it only tells them to end.
#[derive(Debug)]
pub(super) struct Workers {
    number: u32,
    workers: Vec<Worker>,
    board: Arc<Board>,
}

/// What a thread is to serve.
struct Job {
    device: Arc<dyn Device>,
    info: DevInfo,
    queue: u16,
    /// CPUs its requests come from, one bit each.
    cpus: Vec<u8>,
    stop: Arc<Event>,
}

impl Workers {
    /// Starts a thread for every queue of the device and waits until all are ready to serve it.
    ///
    /// # Errors
    /// [`UblkError::Device`] or [`UblkError::Queue`] when one cannot be.
    pub(super) fn prepare(
        device: &Arc<dyn Device>,
        info: &DevInfo,
        cpus: impl Fn(u16) -> Vec<u8>,
        limit: Duration,
    ) -> Result<Self, UblkError> {
        let board = Arc::<Board>::default();
        let mut all = Self { number: info.device, workers: Vec::new(), board };
        for queue in 0..info.queues {
            let (device, cpus) = (Arc::clone(device), cpus(queue));
            let stop = Arc::new(Event::new().map_err(|error| all.error(&error.to_string()))?);
            let job = Job { device, info: *info, queue, cpus, stop: Arc::clone(&stop) };
            let (go, begin) = sync_channel(1);
            let board = Arc::clone(&all.board);
            let thread = Builder::new().name(format!("ublk-{}.{queue}", info.device));
            let run = move || {
                let mut ending = Ending(Arc::clone(&board), None);
                let (exit, ring) = serve(job, &begin, &board);
                ending.1 = Some(exit);
                ring
            };
            let thread = thread.spawn(run).map_err(|error| all.error(&error.to_string()))?;
            all.workers.push(Worker { thread, go, stop });
        }
        all.wait_all(limit, "open its queue", |progress| progress.prepared)?;
        Ok(all)
    }

    /// Lets every thread fetch all tags of the open device, and waits until they have.
    ///
    /// # Errors
    /// [`UblkError::Queue`].
    pub(super) fn fetch(&self, device: &Arc<File>, limit: Duration) -> Result<(), UblkError> {
        for worker in &self.workers {
            // A thread that is gone shows as a failure below.
            let _ = worker.go.send(Arc::clone(device));
        }
        self.wait_all(limit, "fetch its requests", |progress| progress.fetched)
    }

    fn wait_all(
        &self,
        limit: Duration,
        what: &str,
        count: impl Fn(&Progress) -> usize,
    ) -> Result<(), UblkError> {
        let all = self.workers.len();
        let progress = self.board.wait(limit, |now| now.failure.is_some() || count(now) == all);
        match &progress.failure {
            Some(why) => Err(self.error(why)),
            None if count(&progress) == all => Ok(()),
            None => Err(self.error(&format!("it did not {what} within {limit:?}"))),
        }
    }

    fn error(&self, why: &str) -> UblkError {
        UblkError::Queue { number: self.number, why: why.into() }
    }

    /// What goes wrong with them, to look at while others deal with the threads.
    pub(super) fn failures(&self) -> Failures {
        Failures(Arc::clone(&self.board))
    }

    /// From now on the end of the device is no failure; or is again.
    pub(super) fn expect_removal(&self, expected: bool) {
        self.board.note(|progress| progress.removing = expected);
    }

    /// Tells the threads to end what they have begun, and then themselves.
    pub(super) fn tell_to_leave(&self) {
        self.workers.iter().for_each(|worker| worker.stop.set());
    }

    /// Waits until all threads are gone. Gives them back when some are not after `limit`.
    pub(super) fn join(mut self, limit: Duration) -> Result<(), Self> {
        let all = self.workers.len();
        let ended = self.board.wait(limit, |now| now.ended == all).ended;
        if ended < all {
            return Err(self);
        }
        for worker in self.workers.drain(..) {
            // A panic is in the failure already.
            let _ = worker.thread.join();
        }
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.tell_to_leave();
    }
}

/// One queue thread.
fn serve(job: Job, begin: &Receiver<Arc<File>>, board: &Board) -> (Exit, Option<QueueRing>) {
    match try_serve(job, begin, board) {
        Ok((exit, ring)) => (exit, Some(ring)),
        Err(exit) => (exit, None),
    }
}

fn try_serve(
    job: Job,
    begin: &Receiver<Arc<File>>,
    board: &Board,
) -> Result<(Exit, QueueRing), Exit> {
    let failed = |why: &dyn std::fmt::Display| Exit::Failed(why.to_string());
    let Job { device, info, queue: index, cpus, stop } = job;
    stay_on(&cpus);
    let queue = Arc::clone(&device).open_queue().map_err(|error| failed(&error))?;
    let payloads = if info.flags & feature::USER_COPY != 0 {
        Payloads::UserCopy
    } else {
        Payloads::Buffers(info.max_io_bytes as usize)
    };
    let watched = queue.wake_fd().try_clone_to_owned().and_then(|wake| {
        Ok(vec![wake, stop.as_fd().try_clone_to_owned()?]) // see plane::STOP
    });
    let prepared = watched.and_then(|watched| Prepared::new(index, info.depth, payloads, watched));
    let prepared = prepared.map_err(|error| failed(&error))?;
    board.note(|progress| progress.prepared += 1);
    // Closed when the device does not come about.
    let file = begin.recv().map_err(|_| Exit::Left)?;
    let ring = prepared.fetch(file).map_err(|error| failed(&error))?;
    board.note(|progress| progress.fetched += 1);
    Ok(Plane::new(ring, device, queue, stop).run())
}

/// Runs where the requests come from. Only speed depends on it.
fn stay_on(cpus: &[u8]) {
    let mut set = CpuSet::new();
    let bits = cpus.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1));
    let mut any = false;
    for (cpu, _) in bits.enumerate().filter(|(_, set)| *set) {
        any |= set.set(cpu).is_ok();
    }
    if any && let Err(error) = sched_setaffinity(Pid::from_raw(0), &set) {
        tracing::debug!(%error, "ublk: a queue thread stays where it is");
    }
}
