//! Reads, writes, syncs and zeroes on one backing file, for one queue thread.
//!
//! io_uring where it is permitted; otherwise (containers) every operation is done at once, when it
//! is pushed. On a file without direct I/O reads and writes are done at once too: the kernel would
//! only hand them to a worker thread.
//!
//! A buffer moves into its operation and comes back with its completion, so nobody can touch it
//! while the kernel has it. Short transfers are continued here; who pushes an operation learns
//! only whether all of it was done.

mod blocking;
mod op;
mod uring;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;

use super::pool::PoolMemory;
use super::wake::Event;
use op::{Active, Next};
pub use op::{Done, IoBuf, Op};
use uring::Uring;

/// Which way operations take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// io_uring, or blocking calls when it is not permitted.
    #[default]
    Auto,
    /// Blocking calls.
    Blocking,
}

/// How to set up a [`Ring`].
#[derive(Debug, Default)]
pub struct RingConfig {
    /// Operations the kernel works on at once; more may be pushed and wait here. Zero means 128.
    pub depth: u32,
    /// Which way.
    pub engine: Engine,
    /// The file has no direct I/O: reads and writes are done when pushed.
    pub buffered: bool,
    /// Memories to register with the kernel. What the limit on locked memory does not allow
    /// (the largest first) or is over 1 GiB is used unregistered.
    pub fixed: Vec<Arc<PoolMemory>>,
}

/// Operations of one thread on one file. See the module.
#[derive(Debug)]
pub struct Ring {
    /// Goes first: its drop waits until the kernel has let go of all buffers in `active`.
    uring: Option<Uring>,
    file: Arc<File>,
    buffered: bool,
    active: Vec<Option<Active>>,
    vacant: Vec<u32>,
    /// In `active`, not yet with the kernel.
    waiting: VecDeque<u32>,
    /// Done at push, not yet reported.
    done: VecDeque<Done>,
    /// Stands in for the ring's descriptor when there is none.
    idle: Event,
}

impl Ring {
    /// A ring on `file`.
    ///
    /// # Errors
    /// Out of descriptors. Not: io_uring being forbidden, or memory that cannot be registered.
    pub fn new(file: Arc<File>, config: RingConfig) -> io::Result<Self> {
        let depth = if config.depth == 0 { 128 } else { config.depth };
        // Without direct I/O the ring sees no payload: pinning a pool of 256 MiB for it would cost
        // every new connection up to 70 ms.
        let fixed = if config.buffered { Vec::new() } else { config.fixed };
        let uring = match config.engine {
            Engine::Blocking => None,
            Engine::Auto => match Uring::new(&file, depth, fixed) {
                Ok(uring) => Some(uring),
                Err(error) => {
                    tracing::info!(%error, "io_uring is not available, using blocking calls");
                    None
                }
            },
        };
        Ok(Self {
            uring,
            file,
            buffered: config.buffered,
            active: Vec::new(),
            vacant: Vec::new(),
            waiting: VecDeque::new(),
            done: VecDeque::new(),
            idle: Event::new()?,
        })
    }

    /// Whether io_uring is used at all.
    #[must_use]
    pub fn is_async(&self) -> bool {
        self.uring.is_some()
    }

    /// Memories registered with the kernel.
    #[must_use]
    pub fn registered(&self) -> usize {
        self.uring.as_ref().map_or(0, Uring::registered)
    }

    /// Takes an operation; its completion carries `user_data` and the buffer. Call
    /// [`Self::submit`] once for all that were pushed, and [`Self::completions`] before waiting
    /// on [`Self::fd`]: what was done at push is not announced there.
    pub fn push(&mut self, mut op: Op, user_data: u64) {
        if self.uring.is_none() || (self.buffered && op.is_plain_transfer()) {
            let result = blocking::perform(&self.file, &mut op);
            self.done.push_back(op.done(user_data, result));
            return;
        }
        let active = Some(Active::new(op, user_data));
        let index = match self.vacant.pop() {
            Some(index) => {
                if let Some(place) =
                    usize::try_from(index).ok().and_then(|i| self.active.get_mut(i))
                {
                    *place = active;
                }
                index
            }
            None => {
                let index = u32::try_from(self.active.len()).unwrap_or(u32::MAX);
                self.active.push(active);
                index
            }
        };
        self.waiting.push_back(index);
    }

    /// Hands everything pushed to the kernel with one system call (none when there is nothing).
    ///
    /// # Errors
    /// The kernel is out of memory for the moment. Nothing is lost: call again.
    pub fn submit(&mut self) -> io::Result<()> {
        let Some(uring) = &mut self.uring else { return Ok(()) };
        while let Some(&index) = self.waiting.front() {
            let Some(active) = slot(&mut self.active, index).as_ref() else {
                self.waiting.pop_front();
                continue;
            };
            if !uring.prepare(index, active) {
                break;
            }
            self.waiting.pop_front();
        }
        uring.enter()
    }

    /// Reports everything that is done. Never blocks. Operations that became possible by it (the
    /// ring was full) are submitted.
    pub fn completions(&mut self, mut report: impl FnMut(Done)) {
        loop {
            while let Some(done) = self.done.pop_front() {
                report(done);
            }
            let Some(uring) = &mut self.uring else { return };
            let mut more = false;
            while let Some((index, result)) = uring.next_completion() {
                let place = slot(&mut self.active, index);
                let Some(active) = place.as_mut() else { continue };
                match active.advance(result) {
                    Next::Again => {
                        self.waiting.push_back(index);
                        more = true;
                    }
                    Next::Finished(result) => {
                        if let Some(active) = place.take() {
                            self.vacant.push(index);
                            report(active.into_done(result));
                        }
                    }
                }
            }
            if !more && (self.waiting.is_empty() || !uring.has_room()) {
                return;
            }
            if let Err(error) = self.submit() {
                tracing::warn!(%error, "io_uring does not take operations for the moment");
                return;
            }
        }
    }

    /// Waits until an operation is done, or the time has passed. For threads that have nothing
    /// else to wait for.
    ///
    /// # Errors
    /// Of poll, or as for [`Self::submit`].
    pub fn wait(&mut self, timeout: Option<std::time::Duration>) -> io::Result<()> {
        self.submit()?;
        if self.done.is_empty() && self.in_flight() > 0 {
            super::wake::wait_readable(&[self.fd()], timeout)?;
        }
        Ok(())
    }

    /// Readable while the kernel has completions to report.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.uring.as_ref().map_or_else(|| self.idle.as_fd(), Uring::fd)
    }

    /// Operations pushed and not yet reported.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.active.len() - self.vacant.len() + self.done.len()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let Some(uring) = &mut self.uring else { return };
        if !uring.drain() {
            // The device does not answer. Leaking the buffers is the only sound thing left: the
            // kernel may still write to them.
            tracing::error!(
                "giving up on operations the device never finished; leaking their buffers"
            );
            std::mem::forget(std::mem::take(&mut self.active));
        }
    }
}

fn slot(active: &mut [Option<Active>], index: u32) -> &mut Option<Active> {
    // Indices come from `push` only, through the kernel and back; a slot is never removed.
    let index = usize::try_from(index).unwrap_or(usize::MAX);
    &mut active[index]
}

/// Turns a negative result of the kernel into the error.
fn errno(result: i32) -> Errno {
    Errno::from_raw(result.wrapping_neg())
}

#[cfg(test)]
mod tests;
