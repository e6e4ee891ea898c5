//! The connections of one device: a thread each, which serves its connection and, when that ended
//! by itself, brings the kernel a new one.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, io, thread};

use tracing::{debug, error, warn};

use super::client::Client;
use super::error::KernelNbdError;
use crate::device::Device;
use crate::frontend::nbd::Direct;

/// First and longest pause between two attempts to replace a connection.
const PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A connection that held this long was a good one: the next pause is a short one again.
const GOOD: Duration = Duration::from_secs(5);

/// How the connections of a device are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Health {
    /// Connections now.
    pub alive: usize,
    /// Connections that ended by themselves and were replaced.
    pub replaced: u64,
    /// The device was disconnected by someone else: nothing is served any more.
    pub gone: bool,
}

/// What the threads of a device share.
pub struct Places {
    client: Client,
    number: u32,
    identifier: String,
    device: Arc<dyn Device>,
    durable: bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    stopping: bool,
    health: Health,
    /// Threads that have not ended.
    threads: usize,
    open: BTreeMap<usize, Arc<Direct>>,
}

impl fmt::Debug for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Places").field("number", &self.number).finish_non_exhaustive()
    }
}

impl Places {
    /// The places of the device `number`, none of them served yet. `durable`: see
    /// [`Direct::serve`].
    pub fn new(
        client: Client,
        number: u32,
        identifier: &str,
        device: Arc<dyn Device>,
        durable: bool,
    ) -> Arc<Self> {
        let identifier = identifier.to_owned();
        let (state, changed) = (Mutex::default(), Condvar::new());
        Arc::new(Self { client, number, identifier, device, durable, state, changed })
    }

    /// Starts the thread of the place `index`, with a connection or to bring one.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn start(self: &Arc<Self>, index: usize, first: Option<OwnedFd>) -> io::Result<()> {
        let places = self.clone();
        self.lock().threads += 1;
        let end = ThreadEnd { places: self.clone(), index };
        let name = format!("nbd{}-{index}", self.number);
        thread::Builder::new().name(name).spawn(move || {
            places.run(index, first);
            drop(end);
        })?;
        Ok(())
    }

    /// How the connections are.
    pub fn health(&self) -> Health {
        let state = self.lock();
        Health { alive: state.open.len(), ..state.health }
    }

    /// Waits until a connection is served, at most for `limit`. Returns whether one is.
    pub fn wait_alive(&self, limit: Duration) -> bool {
        let idle = |state: &State| state.open.is_empty() && !state.health.gone;
        !self.wait_while(limit, idle).open.is_empty()
    }

    /// From now on connections that end are not replaced.
    pub fn keep_no_longer(&self) {
        self.lock().stopping = true;
        self.changed.notify_all();
    }

    /// Ends every connection and thread: what has arrived is answered. What has not been after
    /// `grace` is cut off. Returns whether nothing was.
    pub fn end(&self, grace: Duration) -> bool {
        self.keep_no_longer();
        self.lock().open.values().for_each(|connection| connection.end_input());
        if self.wait_while(grace, |state| state.threads > 0).threads == 0 {
            return true;
        }
        self.cut();
        drop(self.wait_while(Duration::from_secs(1), |state| state.threads > 0));
        false
    }

    /// Ends every connection at once.
    pub fn cut(&self) {
        self.lock().open.values().for_each(|connection| connection.cut());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner) // plain data
    }

    fn wait_while(&self, limit: Duration, wait: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let until = Instant::now() + limit;
        let mut state = self.lock();
        while wait(&state) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state =
                self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state
    }

    fn run(&self, index: usize, first: Option<OwnedFd>) {
        let mut next = first;
        let mut pause = PAUSE;
        loop {
            let Some(fd) = next.take().or_else(|| self.bring_one(&mut pause)) else { return };
            let Some(connection) = self.open(index, fd) else { return };
            let since = Instant::now();
            let served = connection.serve(self.device.clone(), self.durable);
            let stopping = self.closed(index);
            match served {
                Ok(true) if stopping => return,
                Ok(true) => return self.lost("the kernel said goodbye"),
                Ok(false) if stopping => return,
                Ok(false) => warn!(
                    device = %super::client::node(self.number).display(),
                    "the kernel gave up a connection (slow storage, or a timeout): replacing it"
                ),
                Err(error) => warn!(%error, "a connection got no queue of its device"),
            }
            if since.elapsed() >= GOOD {
                pause = PAUSE;
            }
            if self.pause(&mut pause) {
                return;
            }
        }
    }

    /// Gives the kernel a new connection as soon as it takes one; `None` when there will be none.
    fn bring_one(&self, pause: &mut Duration) -> Option<OwnedFd> {
        let mut said = false;
        loop {
            if self.lock().stopping {
                return None;
            }
            match self.client.reconnect(self.number, &self.identifier) {
                Ok(Some(fd)) => return Some(fd),
                Ok(None) => {} // the dead one is not noticed yet, or another process serves it
                Err(KernelNbdError::Gone(_)) => {
                    self.lost("it is not attached any more");
                    return None;
                }
                Err(error) if !std::mem::replace(&mut said, true) => {
                    warn!(%error, "no new connection for nbd{}; trying on", self.number);
                }
                Err(error) => debug!(%error, "still no new connection"),
            }
            if self.pause(pause) {
                return None;
            }
        }
    }

    /// Waits a little longer than last time. Returns whether to stop.
    fn pause(&self, pause: &mut Duration) -> bool {
        let stopping = self.wait_while(*pause, |state| !state.stopping).stopping;
        *pause = (*pause * 2).min(LONGEST_PAUSE);
        stopping
    }

    /// Counts a connection as served; `None` when it came too late.
    fn open(&self, index: usize, fd: OwnedFd) -> Option<Arc<Direct>> {
        let connection = Arc::new(Direct::new(fd));
        let mut state = self.lock();
        if state.stopping {
            return None;
        }
        state.open.insert(index, connection.clone());
        self.changed.notify_all();
        Some(connection)
    }

    /// The connection of a place has ended. Returns whether that was meant.
    fn closed(&self, index: usize) -> bool {
        let mut state = self.lock();
        state.open.remove(&index);
        if !state.stopping {
            state.health.replaced += 1;
        }
        state.stopping
    }

    fn lost(&self, why: &str) {
        let mut state = self.lock();
        if !std::mem::replace(&mut state.health.gone, true) {
            error!(
                "{} was disconnected by someone else ({why}): its users get errors; \
                 detach the volume and attach it again",
                super::client::node(self.number).display()
            );
        }
        self.changed.notify_all();
    }
}

/// Counts a thread until dropped, also by a panic, and then leaves no connection unserved.
struct ThreadEnd {
    places: Arc<Places>,
    index: usize,
}

impl Drop for ThreadEnd {
    fn drop(&mut self) {
        let mut state = self.places.lock();
        state.threads -= 1;
        if let Some(connection) = state.open.remove(&self.index) {
            connection.cut();
        }
        self.places.changed.notify_all();
    }
}
