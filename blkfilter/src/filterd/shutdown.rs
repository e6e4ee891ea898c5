//! Being asked to stop.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crate::sys::process::on_termination;
use crate::sys::wake::{Event, wait_readable};

/// A request to stop, by signal or by another thread. Clones share it.
#[derive(Debug, Clone)]
pub struct Shutdown(Arc<Event>);

impl Shutdown {
    /// Triggered by [`Self::trigger`] alone.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Event::new()?)))
    }

    /// Triggered by SIGTERM and SIGINT too, which end the process no more. All that are made this
    /// way are one.
    ///
    /// # Errors
    /// Out of descriptors, or of the kernel.
    pub fn on_signals() -> io::Result<Self> {
        on_termination().map(Self)
    }

    /// Asks to stop; from any thread.
    pub fn trigger(&self) {
        self.0.set();
    }

    /// Waits until asked, at most `limit`. Returns whether it was asked.
    ///
    /// # Errors
    /// Of poll.
    pub fn wait(&self, limit: Option<Duration>) -> io::Result<bool> {
        Ok(wait_readable(&[self.0.as_fd()], limit)?.contains(&true))
    }
}
