//! Being asked to stop.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::sys::wake::{Event, wait_readable};

/// A request to stop, by signal or by another thread. Clones share it.
#[derive(Debug, Clone)]
pub struct Shutdown {
    event: Arc<Event>,
    signals: Option<Arc<SignalFd>>,
}

impl Shutdown {
    /// Triggered by [`Self::trigger`] alone.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { event: Arc::new(Event::new()?), signals: None })
    }

    /// Triggered by SIGTERM and SIGINT too. Call it before any thread is started: threads made
    /// earlier would take the signals and end the process.
    ///
    /// # Errors
    /// Of the kernel.
    pub fn on_signals() -> io::Result<Self> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        set.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = Some(Arc::new(SignalFd::with_flags(&set, flags)?));
        Ok(Self { event: Arc::new(Event::new()?), signals })
    }

    /// Asks to stop; from any thread.
    pub fn trigger(&self) {
        self.event.set();
    }

    /// Waits until asked, at most `limit`. Returns whether it was asked.
    ///
    /// # Errors
    /// Of poll.
    pub fn wait(&self, limit: Option<Duration>) -> io::Result<bool> {
        let mut fds = vec![(*self.event).as_fd()];
        if let Some(signals) = &self.signals {
            fds.push(signals.as_fd());
        }
        Ok(wait_readable(&fds, limit)?.contains(&true))
    }
}
