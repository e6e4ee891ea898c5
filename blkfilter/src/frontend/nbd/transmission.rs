//! The transmission phase of one connection: one thread, one queue, one event loop.
//!
//! The thread that received a request answers it. A turn takes up to a group of requests from
//! what has arrived, hands them to the device together, and sends what is finished together.
//! It waits only when there is nothing to do: inside a receive when nothing is in flight (two
//! system calls a request at depth one), otherwise in a poll of the socket and the queue.
//!
//! Never blocks on a peer that does not read: replies that the socket does not take wait here,
//! bounded, and no further request is taken meanwhile.

use std::io::IoSliceMut;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::debug;

use super::handshake::Settled;
use super::inbox::Inbox;
use super::incoming::{Carry, Incoming};
use super::jobs::{Jobs, Kind, untag};
use super::limits::{
    BUSY_BYTES, GROUP, MAX_REQUESTS, STAGING, STAGING_BEHIND_LARGE, STARVED_TRIES, STARVED_WAIT_MS,
    STRAIGHT,
};
use super::outbox::Outbox;
use super::request::{Mode, Plan, plan};
use super::socket::{Received, Socket};
use super::status::status_reply;
use super::wire::{self, ErrorNumber, RawRequest, command};
use crate::device::{Completion, Device, DeviceInfo, Queue};

/// Why a turn took no more requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Everything that has arrived is used.
    Bytes,
    /// A group is complete; more may be there.
    Group,
    /// Too much is in flight or unsent.
    Full,
    /// The queue has no buffer.
    Starved,
    /// No more requests will come.
    End,
}

/// How much to receive at once behind a payload of `len` bytes: after a large one, the next is
/// probably large too, and should arrive in its slot instead of the staging buffer.
pub fn behind(len: u32) -> usize {
    if len >= STRAIGHT { STAGING_BEHIND_LARGE } else { STAGING }
}

/// One connection in transmission.
pub struct Transmission {
    socket: Arc<Socket>,
    device: Arc<dyn Device>,
    info: DeviceInfo,
    mode: Mode,
    pub(super) queue: Box<dyn Queue>,
    pub(super) inbox: Inbox,
    pub(super) incoming: Incoming,
    pub(super) jobs: Jobs,
    outbox: Outbox,
    done: Vec<Completion>,
    /// No further request is taken: the client left, was cut or spoke nonsense.
    closed: bool,
    /// The client said goodbye.
    goodbye: bool,
    /// Nothing can be sent any more.
    broken: bool,
    /// The last receive was full: more is probably waiting.
    more: bool,
    /// Waits in a row in which no buffer came free.
    pub(super) starved: u32,
    /// How much to receive at once where a header comes next: little when payload is large.
    pub(super) behind_last: usize,
}

impl Transmission {
    /// A connection that has just left the option phase.
    pub fn new(socket: Arc<Socket>, settled: Settled) -> Self {
        let device = settled.device;
        Self {
            socket,
            info: device.info(),
            device,
            mode: settled.mode,
            queue: settled.queue,
            inbox: Inbox::new(),
            incoming: Incoming::Header,
            jobs: Jobs::default(),
            outbox: Outbox::default(),
            done: Vec::new(),
            closed: false,
            goodbye: false,
            broken: false,
            more: true,
            starved: 0,
            behind_last: STAGING,
        }
    }

    /// Serves until the client leaves or is cut, and everything in flight has come back. Returns
    /// whether the client said goodbye.
    pub fn run(mut self) -> bool {
        loop {
            let next = self.take_group();
            let mut progress = self.reap();
            progress |= self.send();
            let idle = self.queue.in_flight() == 0 && self.outbox.is_empty();
            // Answering may have ended the connection: then nothing more is received.
            let next = if self.closed { Next::End } else { next };
            let again = match next {
                Next::Group => true,
                Next::Bytes => false,
                Next::Full => !self.is_full(),
                Next::Starved => progress,
                Next::End if idle => break,
                Next::End => false,
            };
            if !again {
                self.wait(next);
            }
        }
        self.incoming.abandon(&mut *self.queue);
        self.goodbye
    }

    fn take_group(&mut self) -> Next {
        self.info = self.device.info();
        let mut taken = 0;
        loop {
            match self.carry_on() {
                Carry::Complete => {}
                Carry::Bytes if self.closed => return Next::End,
                Carry::Bytes => return Next::Bytes,
                Carry::Starved => return Next::Starved,
            }
            if self.closed {
                return Next::End;
            }
            if taken == GROUP {
                return Next::Group;
            }
            if self.is_full() {
                return Next::Full;
            }
            let Some(header) = self.inbox.take_header() else { return Next::Bytes };
            taken += 1;
            match RawRequest::decode(&header) {
                Some(raw) => self.begin(raw),
                None => {
                    debug!("client sent no request where one was due: hanging up");
                    self.closed = true;
                }
            }
        }
    }

    fn is_full(&self) -> bool {
        self.jobs.len() >= MAX_REQUESTS || self.jobs.payload + self.outbox.pending() >= BUSY_BYTES
    }

    fn begin(&mut self, raw: RawRequest) {
        let mut planned = plan(&raw, &self.info, self.mode);
        if matches!(planned, Plan::Refuse(_)) {
            // The device may have grown since this group was begun.
            self.info = self.device.info();
            planned = plan(&raw, &self.info, self.mode);
        }
        match planned {
            Plan::Disconnect => {
                self.closed = true;
                self.goodbye = true;
            }
            Plan::Nothing => self.answer_now(&raw, None),
            Plan::Refuse(error) if raw.payload_len() == 0 => self.answer_now(&raw, Some(error)),
            Plan::Refuse(error) => self.begin_refused(&raw, error),
            Plan::Status { extent, one } => {
                let reply = status_reply(&*self.device, raw.cookie, extent, one);
                self.outbox.push(&reply);
                self.outbox.replies += 1;
            }
            Plan::Flush => self.begin_flush(&raw),
            Plan::Zero { extent, fua, may_unmap } => {
                self.begin_zero(raw.cookie, extent, fua, may_unmap);
            }
            Plan::Read { extent, skip, len } => self.begin_read(raw.cookie, extent, skip, len),
            Plan::Write { extent, fua } => self.begin_write(raw.cookie, extent, fua),
        }
    }

    /// Answers a request that carries no payload in either direction.
    fn answer_now(&mut self, raw: &RawRequest, error: Option<ErrorNumber>) {
        let chunked = raw.command == command::READ || raw.command == command::BLOCK_STATUS;
        self.push_end(raw.cookie, chunked && self.mode.structured, error);
    }

    /// Appends a reply without payload, or the last chunk of one.
    fn push_end(&mut self, cookie: u64, chunked: bool, error: Option<ErrorNumber>) {
        self.outbox.replies += 1;
        match error {
            None if chunked => {
                let header = wire::chunk_header(cookie, wire::chunk::DONE, wire::chunk::NONE, 0);
                self.outbox.push(&header);
            }
            Some(error) if chunked => self.outbox.push(&wire::error_chunk(cookie, error)),
            error => self.outbox.push(&wire::simple_reply(cookie, error)),
        }
    }

    /// Collects finished requests and writes their replies. Returns whether there were any.
    fn reap(&mut self) -> bool {
        if self.queue.in_flight() == 0 {
            return false;
        }
        self.queue.reap(&mut self.done);
        let any = !self.done.is_empty();
        let mut done = std::mem::take(&mut self.done);
        for completion in done.drain(..) {
            self.complete(completion);
            if self.outbox.replies >= GROUP {
                self.send();
            }
        }
        self.done = done; // its room is used again
        any
    }

    fn complete(&mut self, completion: Completion) {
        let (index, piece) = untag(completion.tag);
        let job = self.jobs.get(index);
        if let Err(error) = completion.result {
            job.fail(error.into());
        }
        let last = job.left == 1;
        let failed = job.failed.is_some();
        match completion.slot {
            Some(slot) if failed || self.broken => self.queue.release(slot),
            Some(slot) if self.mode.structured => {
                let wanted = job.wanted(piece, slot.len);
                let len = u32::try_from(wanted.len()).unwrap_or(u32::MAX); // at most the slot
                let offset = job.wanted_offset(piece);
                self.outbox.push(&wire::data_chunk(job.cookie, last, offset, len));
                self.outbox.push_payload(slot, wanted, &mut *self.queue);
                if last {
                    self.outbox.replies += 1;
                    return self.jobs.close(index);
                }
            }
            Some(slot) => job.held.push((piece, slot)),
            None => {}
        }
        self.settle(index);
    }

    /// One part of a job is over; answers when it was the last.
    pub(super) fn settle(&mut self, index: u32) {
        if !self.jobs.settle(index) {
            return;
        }
        let job = self.jobs.get(index);
        let (cookie, kind, failed) = (job.cookie, job.kind, job.failed);
        if self.broken || failed.is_some() {
            job.held.drain(..).for_each(|(_, slot)| self.queue.release(slot));
        }
        if failed.is_some() && job.committed {
            debug!("a read failed after a part of it was sent: hanging up");
            self.break_off();
        }
        if !self.broken {
            if failed.is_none() && kind == Kind::Read && !self.mode.structured {
                self.push_held(index);
            } else {
                self.push_end(cookie, kind == Kind::Read && self.mode.structured, failed);
            }
        }
        self.jobs.close(index);
    }

    /// Appends the pieces that a simple reply has held back, in order, after its header.
    pub(super) fn push_held(&mut self, index: u32) {
        let job = self.jobs.get(index);
        let mut held = std::mem::take(&mut job.held);
        if !std::mem::replace(&mut job.committed, true) {
            self.outbox.push(&wire::simple_reply(job.cookie, None));
            self.outbox.replies += 1;
        }
        held.sort_unstable_by_key(|(piece, _)| *piece);
        for (piece, slot) in held.drain(..) {
            let wanted = self.jobs.get(index).wanted(piece, slot.len);
            self.outbox.push_payload(slot, wanted, &mut *self.queue);
        }
        self.jobs.get(index).held = held; // its room is used again
    }

    /// Sends what the socket takes. Returns whether anything went out.
    fn send(&mut self) -> bool {
        if self.outbox.is_empty() {
            return false;
        }
        match self.outbox.send(&self.socket, &mut *self.queue) {
            Ok(any) => any,
            Err(error) => {
                debug!(%error, "client gone with answers outstanding");
                self.break_off();
                true
            }
        }
    }

    /// Nothing is sent any more; what is in flight is only waited for.
    fn break_off(&mut self) {
        self.broken = true;
        self.close_input();
        self.outbox.clear(&mut *self.queue);
    }

    fn close_input(&mut self) {
        self.closed = true;
        self.incoming.abandon(&mut *self.queue);
    }

    /// Waits until there is something to do.
    fn wait(&mut self, next: Next) {
        let wants = next == Next::Bytes;
        let busy = self.queue.in_flight() > 0 || !self.outbox.is_empty();
        if wants && (!busy || self.more) {
            return self.receive(!busy);
        }
        let starved = next == Next::Starved && !busy;
        if starved {
            if self.send_held() {
                return;
            }
            self.starved += 1;
            if self.starved > STARVED_TRIES {
                self.starved = 0;
                if !self.mode.kernel {
                    return self.refuse_starved();
                }
            }
        }
        if self.poll(wants, starved) {
            self.receive(false);
        }
    }

    /// Polls the socket and the queue. Returns whether the socket has something to receive.
    fn poll(&self, wants: bool, starved: bool) -> bool {
        let mut events = PollFlags::empty();
        events.set(PollFlags::POLLIN, wants);
        events.set(PollFlags::POLLOUT, !self.outbox.is_empty());
        let timeout = if starved { STARVED_WAIT_MS.into() } else { PollTimeout::NONE };
        let queue = PollFd::new(self.queue.wake_fd(), PollFlags::POLLIN);
        let socket = PollFd::new(self.socket.as_fd(), events);
        let mut both = [queue, socket];
        // A hang-up would be reported for ever on a socket from which nothing is wanted.
        let count = if events.is_empty() { 1 } else { 2 };
        match poll(&mut both[..count], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => debug!(%error, "poll failed"),
        }
        let heard = both[1].revents().unwrap_or(PollFlags::empty());
        wants && heard.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR)
    }

    /// Receives once: the rest of a large payload straight into its slot, then what follows it.
    fn receive(&mut self, wait: bool) {
        let (behind, rest) = match &mut self.incoming {
            Incoming::Write(write) => {
                let rest = match &write.slot {
                    Some((slot, filled)) => &mut self.queue.bytes(slot)[*filled..],
                    None => &mut [],
                };
                (behind(write.len), rest)
            }
            Incoming::Header => (self.behind_last, &mut [][..]),
            Incoming::Read(_) | Incoming::Drain(_) => (STAGING, &mut [][..]),
        };
        let room = self.inbox.room(behind);
        let (straight, all) = (rest.len(), rest.len() + room.len());
        let got = if straight == 0 {
            self.socket.receive(&mut [IoSliceMut::new(room)], wait)
        } else {
            self.socket.receive(&mut [IoSliceMut::new(rest), IoSliceMut::new(room)], wait)
        };
        match got {
            Ok(Received::Bytes(len)) => {
                self.more = len == all;
                self.inbox.received(len.saturating_sub(straight));
                if let Incoming::Write(write) = &mut self.incoming {
                    write.received(len.min(straight));
                }
            }
            Ok(Received::Nothing) => self.more = false,
            Ok(Received::End) => self.close_input(),
            Err(error) => {
                debug!(%error, "connection failed");
                self.close_input();
            }
        }
    }
}
