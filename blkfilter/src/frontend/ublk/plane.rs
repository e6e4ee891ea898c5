//! One queue being served: one thread, one ring, one way into the device.
//!
//! A turn takes the requests that have come home, gives them to the device in groups, and commits
//! what the device has finished; then one system call commits, fetches and waits. Nothing is
//! allocated for a request: tables by tag are as long as the queue from the start.
//!
//! A tag is never dropped: a request for which there is no buffer is held back until a completion
//! frees one. What has not been begun when the server leaves is not answered at all: the driver
//! gives it to the next server.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::request::{Plan, errno, plan};
use crate::device::{
    Completion, Device, DeviceError, DeviceInfo, Queue, Request, Slot, SlotUse, Tag,
};
use crate::sys::ublk::queue::{Event, QueueRing};
use crate::sys::ublk::uapi::Descriptor;
use crate::sys::wake;

/// Requests taken before the first of them is handed to the backing device.
const GROUP: usize = 16;

/// How long to wait for a buffer when no request of ours is in flight that would free one.
const STARVED_WAIT: Duration = Duration::from_millis(10);

/// How long a request may wait for a buffer in all before it fails.
const STARVED_LIMIT: Duration = Duration::from_secs(30);

/// Index of the watched descriptors.
pub(super) const STOP: usize = 1;

/// The driver's side of a queue. The real one is [`QueueRing`].
pub(super) trait Kernel {
    fn depth(&self) -> u16;
    fn descriptor(&self, tag: u16) -> Descriptor;
    fn take_payload(&mut self, tag: u16, into: &mut [u8]) -> io::Result<()>;
    fn give_payload(&mut self, tag: u16, from: &[u8]) -> io::Result<()>;
    fn commit(&mut self, tag: u16, result: i32);
    fn enter(&mut self, limit: Option<Duration>, out: &mut Vec<Event>) -> io::Result<()>;
    fn flush(&mut self) -> io::Result<()>;
}

impl Kernel for QueueRing {
    fn depth(&self) -> u16 {
        self.depth()
    }
    fn descriptor(&self, tag: u16) -> Descriptor {
        self.descriptor(tag)
    }
    fn take_payload(&mut self, tag: u16, into: &mut [u8]) -> io::Result<()> {
        self.take_payload(tag, into)
    }
    fn give_payload(&mut self, tag: u16, from: &[u8]) -> io::Result<()> {
        self.give_payload(tag, from)
    }
    fn commit(&mut self, tag: u16, result: i32) {
        self.commit(tag, result);
    }
    fn enter(&mut self, limit: Option<Duration>, out: &mut Vec<Event>) -> io::Result<()> {
        self.enter(limit, out)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.flush()
    }
}

/// Why a queue is no longer served.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Exit {
    /// The driver has stopped the device.
    Stopped,
    /// We were told to leave; what was begun has ended.
    Left,
    /// The driver or the ring did something it should not.
    Failed(String),
}

/// See the module.
pub(super) struct Plane<K> {
    /// Goes first: its drop waits until the backing device has let go of everything, and only then
    /// may the next server have the device.
    queue: Box<dyn Queue>,
    kernel: K,
    device: Arc<dyn Device>,
    info: DeviceInfo,
    stop: Arc<wake::Event>,
    /// By tag: what its request is answered with when it succeeds.
    success: Vec<i32>,
    /// Tags that wait for a buffer, oldest first.
    held: VecDeque<u16>,
    events: Vec<Event>,
    done: Vec<Completion>,
    /// Tags the driver wants no more.
    ended: u16,
    /// Requests begun since the device was last asked for completions.
    begun: usize,
    leaving: bool,
    starved_since: Option<Instant>,
}

impl<K: Kernel> Plane<K> {
    /// Over a kernel whose tags are all fetched. `stop`, once set, ends it.
    pub(super) fn new(
        kernel: K,
        device: Arc<dyn Device>,
        queue: Box<dyn Queue>,
        stop: Arc<wake::Event>,
    ) -> Self {
        let depth = usize::from(kernel.depth());
        Self {
            queue,
            info: device.info(),
            device,
            stop,
            success: vec![0; depth],
            held: VecDeque::with_capacity(depth),
            events: Vec::with_capacity(depth + 2),
            done: Vec::with_capacity(depth),
            ended: 0,
            begun: 0,
            leaving: false,
            starved_since: None,
            kernel,
        }
    }

    /// Serves until there is a reason not to, and until the device has let go of everything.
    /// Gives the kernel's side back: see [`QueueRing`] for when it may be dropped.
    pub(super) fn run(mut self) -> (Exit, K) {
        let exit = loop {
            let starved = !self.held.is_empty() && self.queue.in_flight() == 0;
            let limit = starved.then_some(STARVED_WAIT);
            if let Err(error) = self.kernel.enter(limit, &mut self.events) {
                break Exit::Failed(format!("io_uring: {error}"));
            }
            if let Err(exit) = self.turn() {
                break exit;
            }
        };
        drop(self.queue);
        (exit, self.kernel)
    }

    /// Deals with everything that has happened.
    fn turn(&mut self) -> Result<(), Exit> {
        self.info = self.device.info();
        let mut events = std::mem::take(&mut self.events);
        let mut broken = None;
        for event in events.drain(..) {
            match event {
                Event::Request(tag) => self.arrived(tag),
                Event::Ended(_) => self.ended += 1,
                Event::Broken(tag, errno) => broken = Some((tag, errno)),
                Event::Readable(STOP) => {
                    self.leaving = true;
                    self.stop.clear();
                }
                Event::Readable(_) => {} // the device has something: see below
            }
        }
        self.events = events; // its room is used again
        while self.reap() | self.is_starved() && self.retry() {}
        if let Some((tag, errno)) = broken {
            return Err(Exit::Failed(format!(
                "the driver refused the answer of tag {tag}: {errno}"
            )));
        }
        let idle = self.queue.in_flight() == 0;
        if self.ended == self.kernel.depth() && idle {
            return Err(Exit::Stopped);
        }
        if self.leaving && idle {
            return Err(match self.kernel.flush() {
                Ok(()) => Exit::Left,
                Err(error) => Exit::Failed(format!("io_uring: {error}")),
            });
        }
        Ok(())
    }

    fn arrived(&mut self, tag: u16) {
        if self.leaving || !self.begin(tag) {
            self.held.push_back(tag);
            return;
        }
        self.begun += 1;
        if self.begun == GROUP {
            self.reap();
        }
    }

    /// Gives the request of `tag` to the device, or answers it. False: there is no buffer for it.
    fn begin(&mut self, tag: u16) -> bool {
        let whom = Tag(u64::from(tag));
        let (request, success) = match plan(&self.kernel.descriptor(tag), &self.info) {
            Plan::Refuse(errno) => {
                self.kernel.commit(tag, -(errno as i32));
                return true;
            }
            Plan::Flush => (Request::Flush, 0),
            Plan::Zero { extent, fua, may_unmap } => (Request::Zero { extent, fua, may_unmap }, 0),
            Plan::Read { extent, len } => match self.reserve(tag, len, SlotUse::Read) {
                Ok(slot) => (Request::Read { extent, slot }, len),
                Err(settled) => return settled,
            },
            Plan::Write { extent, len, fua } => match self.reserve(tag, len, SlotUse::Write) {
                Ok(slot) => {
                    let bytes = self.queue.bytes(&slot);
                    if let Err(error) = self.kernel.take_payload(tag, bytes) {
                        tracing::error!(tag, len, %error, "ublk: a write's payload is not to be had");
                        self.queue.release(slot);
                        self.kernel.commit(tag, -libc::EIO);
                        return true;
                    }
                    (Request::Write { extent, slot, fua }, len)
                }
                Err(settled) => return settled,
            },
        };
        // At most MAX_PAYLOAD.
        self.success[usize::from(tag)] = i32::try_from(success).unwrap_or(i32::MAX);
        self.queue.submit(whom, request);
        true
    }

    /// A slot, or whether the request is settled without one.
    fn reserve(&mut self, tag: u16, len: u32, purpose: SlotUse) -> Result<Slot, bool> {
        match self.queue.reserve(len, purpose) {
            Ok(slot) => Ok(slot),
            Err(DeviceError::NoMemory) => Err(false),
            Err(error) => {
                self.kernel.commit(tag, -(errno(error) as i32));
                Err(true)
            }
        }
    }

    /// Hands what was begun to the backing device and commits what is finished. Returns whether
    /// anything was.
    fn reap(&mut self) -> bool {
        self.begun = 0;
        let mut done = std::mem::take(&mut self.done);
        self.queue.reap(&mut done);
        let any = !done.is_empty();
        for completion in done.drain(..) {
            self.finish(completion);
        }
        self.done = done; // its room is used again
        any
    }

    fn finish(&mut self, completion: Completion) {
        let Completion { tag, result, slot } = completion;
        // As submitted by us.
        let tag = u16::try_from(tag.0).unwrap_or(u16::MAX);
        let mut answer = match result {
            Ok(()) => self.success[usize::from(tag)],
            Err(error) => -(errno(error) as i32),
        };
        if let Some(slot) = slot {
            if answer >= 0
                && let Err(error) = self.kernel.give_payload(tag, self.queue.bytes(&slot))
            {
                tracing::error!(tag, %error, "ublk: the driver does not take what was read");
                answer = -libc::EIO;
            }
            self.queue.release(slot);
        }
        self.kernel.commit(tag, answer);
    }

    /// Whether requests wait for a buffer that none of ours will free.
    fn is_starved(&self) -> bool {
        !self.held.is_empty() && !self.leaving && self.queue.in_flight() == 0
    }

    /// Begins requests that were held back, oldest first. Returns whether any was begun.
    fn retry(&mut self) -> bool {
        let mut any = false;
        while let Some(&tag) = self.held.front().filter(|_| !self.leaving) {
            if !self.begin(tag) {
                break;
            }
            self.held.pop_front();
            any = true;
        }
        if any || !self.is_starved() {
            self.starved_since = None;
            return any;
        }
        let since = *self.starved_since.get_or_insert_with(|| {
            tracing::warn!(waiting = self.held.len(), "ublk: no buffer for a request, waiting");
            Instant::now()
        });
        if since.elapsed() >= STARVED_LIMIT
            && let Some(tag) = self.held.pop_front()
        {
            tracing::error!(tag, "ublk: no buffer came free, a request fails");
            self.kernel.commit(tag, -(Errno::ENOMEM as i32));
        }
        false
    }
}

#[cfg(test)]
mod tests;
