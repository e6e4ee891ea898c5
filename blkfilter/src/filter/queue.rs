//! One front-end thread's way into a protected volume.
//!
//! Nothing is done before [`Queue::reap`]: what was submitted and what the backing has completed
//! since is stepped together under one lock; then what the core decided is pushed, and handed to
//! the kernel with one system call.

use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use farshore_extent::Extent;
use nix::errno::Errno;

use super::device::FilterDevice;
use super::inbox::Inbox;
use super::slots::{Held, Slots};
use crate::core::{Action, Backing, Buffer, Event, IoKey, Outcome, QueueId, Token};
use crate::device::{Completion, DeviceError, MAX_PAYLOAD, Queue, Request, Slot, SlotUse, Tag};
use crate::sys::ring::{Done, IoBuf, Op, Ring};
use crate::sys::wake::{AnyReadable, wait_readable};

/// Operations of a queue that the kernel works on at once.
const DEPTH: u32 = 128;

/// A request between submit and its completion.
#[derive(Debug)]
struct Pending {
    tag: Tag,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// Never seen by the core. Its slot comes back.
    Read { key: u64, len: u32 },
    /// Waits for its range; the payload is here.
    Write(IoBuf),
    /// On the backing, or without payload.
    Other(Option<IoKey>),
}

pub(super) struct FilterQueue {
    device: Arc<FilterDevice>,
    id: QueueId,
    inbox: Arc<Inbox>,
    ring: Ring,
    wake: AnyReadable,
    slots: Slots,
    pending: Vec<Option<Pending>>,
    vacant: Vec<usize>,
    /// For the core: what the backing ended, what arrived.
    ended: Vec<Event>,
    arrived: Vec<Event>,
    /// From the core.
    actions: Vec<Action>,
    done: Vec<Done>,
    finished: Vec<Completion>,
    /// Something was pushed since the ring was last asked.
    pushed: bool,
}

impl FilterQueue {
    pub(super) fn new(device: Arc<FilterDevice>) -> io::Result<Self> {
        let inbox = Arc::new(Inbox::new()?);
        let slots = Slots::new()?;
        let fixed = vec![Arc::clone(&device.pool), slots.small_arena()];
        let ring = device.backing.ring(DEPTH, device.engine, fixed)?;
        let wake = AnyReadable::new(&[ring.fd(), inbox.fd()])?;
        let id = device.host.open_queue(&inbox);
        Ok(Self {
            device,
            id,
            inbox,
            ring,
            wake,
            slots,
            pending: Vec::new(),
            vacant: Vec::new(),
            ended: Vec::new(),
            arrived: Vec::new(),
            actions: Vec::new(),
            done: Vec::new(),
            finished: Vec::new(),
            pushed: false,
        })
    }

    fn open(&mut self, tag: Tag, kind: Kind) -> Token {
        let pending = Some(Pending { tag, kind });
        let index = match self.vacant.pop() {
            Some(index) => {
                self.pending[index] = pending;
                index
            }
            None => {
                self.pending.push(pending);
                self.pending.len() - 1
            }
        };
        Token(index as u64)
    }

    fn find(&mut self, token: u64) -> Option<&mut Pending> {
        self.pending.get_mut(usize::try_from(token).ok()?)?.as_mut()
    }

    fn close(&mut self, token: u64) -> Option<Pending> {
        let index = usize::try_from(token).ok()?;
        let pending = self.pending.get_mut(index)?.take()?;
        self.vacant.push(index);
        Some(pending)
    }

    fn fail(&mut self, tag: Tag, error: DeviceError) {
        self.finished.push(Completion { tag, result: Err(error), slot: None });
    }

    fn submit_read(&mut self, tag: Tag, extent: Extent, slot: &Slot) {
        self.device.reads.fetch_add(1, Ordering::Relaxed);
        let Some(held) = self.slots.lend(slot) else {
            return self.fail(tag, DeviceError::Invalid);
        };
        let token = self.open(tag, Kind::Read { key: slot.key, len: slot.len });
        self.ring.push(Op::Read { offset: extent.offset(), buf: held.buf }, token.0);
        self.pushed = true;
    }

    fn submit_write(&mut self, tag: Tag, extent: Extent, slot: &Slot, fua: bool) {
        let Some(held) = self.slots.remove(slot) else {
            return self.fail(tag, DeviceError::Invalid);
        };
        let bytes = held.buf.bytes();
        let (crc, pieces) = match held.place {
            Some(_) => (crc32c::crc32c(bytes), self.pieces(extent, bytes)),
            None => (0, Vec::new()),
        };
        let buffer = held.place.map_or(Buffer::Spare, Buffer::Pool);
        let token = self.open(tag, Kind::Write(held.buf));
        let (queue, volume) = (self.id, self.device.key);
        self.arrived.push(Event::Write { queue, token, volume, extent, buffer, crc, pieces, fua });
    }

    /// Checksums of a write's pieces, which only a volume that is catching up may ask for.
    fn pieces(&self, extent: Extent, bytes: &[u8]) -> Vec<u32> {
        let chunk = self.device.chunk.get();
        let one = extent.offset() / chunk == (extent.end() - 1) / chunk;
        if one || !self.device.catching_up.load(Ordering::Relaxed) {
            return Vec::new();
        }
        let piece = |piece: Extent| {
            let at = |byte: u64| usize::try_from(byte - extent.offset()).unwrap_or(usize::MAX);
            crc32c::crc32c(bytes.get(at(piece.offset())..at(piece.end())).unwrap_or_default())
        };
        extent.split_at_multiples_of(chunk).map(piece).collect()
    }

    /// One round: completions, core, actions. False when there was nothing to do.
    fn turn(&mut self) -> bool {
        self.inbox.take(&mut self.actions);
        let mut done = mem::take(&mut self.done);
        self.ring.completions(|one| done.push(one));
        let any = !(done.is_empty() && self.arrived.is_empty() && self.actions.is_empty());
        for one in done.drain(..) {
            self.completed(one);
        }
        self.done = done;
        if !(self.ended.is_empty() && self.arrived.is_empty()) {
            let host = Arc::clone(&self.device.host);
            host.step(self.id, &mut self.ended, &mut self.arrived, &mut self.actions);
        }
        let mut actions = mem::take(&mut self.actions);
        for action in actions.drain(..) {
            self.act(action);
        }
        self.actions = actions;
        if mem::take(&mut self.pushed)
            && let Err(error) = self.ring.submit()
        {
            // Nothing is lost: the ring keeps what it has until the next round.
            tracing::warn!(%error, "the kernel takes no operations for the moment");
            self.pushed = true;
        }
        any
    }

    /// The backing has ended something.
    fn completed(&mut self, done: Done) {
        let result = done.result.map_err(device_error);
        let Some(pending) = self.find(done.user_data) else { return };
        match pending.kind {
            Kind::Read { key, len } => {
                if result.is_err() {
                    self.device.read_errors.fetch_add(1, Ordering::Relaxed);
                }
                if let Some(buf) = done.buf {
                    self.slots.give_back(key, Held { buf, place: None });
                }
                if let Some(Pending { tag, .. }) = self.close(done.user_data) {
                    let slot = Some(Slot { key, len });
                    self.finished.push(Completion { tag, result, slot });
                }
            }
            Kind::Other(Some(io)) => {
                let outcome = result.map_or_else(Outcome::Failed, |()| Outcome::Done);
                // The payload's buffer goes with `done`: from here on the record alone keeps it.
                self.ended.push(Event::BackingDone { io, outcome });
            }
            Kind::Write(_) | Kind::Other(None) => {
                debug_assert!(false, "the backing ended what it was never given");
            }
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Backing { token, io, what, .. } => self.start(token, io, what),
            Action::Answer { token, result, .. } => {
                if let Some(Pending { tag, .. }) = self.close(token.0) {
                    self.finished.push(Completion { tag, result, slot: None });
                }
            }
            Action::CopyDone { .. }
            | Action::CopyWanted { .. }
            | Action::Recorded { .. }
            | Action::IntentWanted { .. }
            | Action::FlushWanted { .. }
            | Action::HoldBroken { .. } => debug_assert!(false, "not for a front end's queue"),
        }
    }

    fn start(&mut self, token: Token, io: IoKey, what: Backing) {
        let Some(pending) = self.find(token.0) else { return };
        let kind = mem::replace(&mut pending.kind, Kind::Other(Some(io)));
        let op = match (what, kind) {
            (Backing::Write { extent, fua, .. }, Kind::Write(buf)) => {
                Op::Write { offset: extent.offset(), buf, durable: fua }
            }
            (Backing::Zero { extent, fua, may_unmap }, _) => {
                Op::Zero { extent, may_unmap, durable: fua }
            }
            (Backing::Flush, _) => Op::Sync,
            (
                Backing::Write { .. }
                | Backing::Read { .. }
                | Backing::Digest { .. }
                | Backing::CheckHole { .. },
                Kind::Read { .. } | Kind::Other(_) | Kind::Write(_),
            ) => {
                debug_assert!(false, "not a request of this queue");
                let outcome = Outcome::Failed(DeviceError::Io);
                return self.ended.push(Event::BackingDone { io, outcome });
            }
        };
        self.ring.push(op, token.0);
        self.pushed = true;
    }
}

impl Queue for FilterQueue {
    fn reserve(&mut self, len: u32, purpose: SlotUse) -> Result<Slot, DeviceError> {
        if len == 0 || len as usize > MAX_PAYLOAD {
            return Err(DeviceError::Invalid);
        }
        if purpose == SlotUse::Write
            && let Some(held) = self.reserve_in_pool(len)
        {
            return Ok(self.slots.insert(held));
        }
        let buf = self.slots.arena(len).ok_or(DeviceError::NoMemory)?;
        Ok(self.slots.insert(Held { buf, place: None }))
    }

    fn bytes(&mut self, slot: &Slot) -> &mut [u8] {
        self.slots.bytes(slot)
    }

    fn release(&mut self, slot: Slot) {
        if let Some(held) = self.slots.remove(&slot) {
            self.discard(held);
        }
    }

    fn submit(&mut self, tag: Tag, request: Request) {
        let (queue, volume) = (self.id, self.device.key);
        let refused = self.device.refuses_writes();
        match request {
            Request::Write { slot, .. } if refused => {
                self.release(slot);
                self.fail(tag, DeviceError::ReadOnly);
            }
            Request::Zero { .. } if refused => self.fail(tag, DeviceError::ReadOnly),
            Request::Read { extent, slot } => self.submit_read(tag, extent, &slot),
            Request::Write { extent, slot, fua } => self.submit_write(tag, extent, &slot, fua),
            Request::Zero { extent, fua, may_unmap } => {
                let token = self.open(tag, Kind::Other(None));
                let event = Event::Zero { queue, token, volume, extent, fua, may_unmap };
                self.arrived.push(event);
            }
            Request::Flush => {
                let token = self.open(tag, Kind::Other(None));
                self.arrived.push(Event::Flush { queue, token, volume });
            }
        }
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        while self.turn() {}
        out.append(&mut self.finished);
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn in_flight(&self) -> usize {
        self.pending.len() - self.vacant.len() + self.finished.len()
    }
}

impl FilterQueue {
    fn reserve_in_pool(&mut self, len: u32) -> Option<Held> {
        let (host, key) = (&self.device.host, self.device.key);
        let place = host.lock().core.reserve(key, len)?;
        if let Some(slice) = self.device.pool.claim(place.offset(), len) {
            return Some(Held { buf: IoBuf::Pool(slice), place: Some(place) });
        }
        tracing::error!(offset = place.offset(), len, "a place in the pool was given out twice");
        host.command(|core, now, out| core.unreserve(now, key, place, out));
        None
    }

    /// A buffer that was never submitted, or came back from a read.
    fn discard(&self, held: Held) {
        let Held { buf, place } = held;
        drop(buf);
        if let Some(place) = place {
            let key = self.device.key;
            self.device.host.command(|core, now, out| core.unreserve(now, key, place, out));
        }
    }
}

impl Drop for FilterQueue {
    /// Finishes what is in flight: a write may be on the disk already and has to be recorded.
    fn drop(&mut self) {
        let mut out = Vec::new();
        loop {
            self.reap(&mut out);
            out.clear();
            if self.in_flight() == 0 {
                break;
            }
            if let Err(error) = wait_readable(&[self.wake_fd()], None) {
                tracing::error!(%error, "cannot wait for the backing device");
                break;
            }
        }
        let held: Vec<Held> = self.slots.clear().collect();
        held.into_iter().for_each(|held| self.discard(held));
        self.device.host.close_queue(self.id);
    }
}

/// What a guest is told about an error of the backing device.
pub(super) fn device_error(errno: Errno) -> DeviceError {
    match errno {
        Errno::ENOSPC | Errno::EDQUOT => DeviceError::NoSpace,
        _ => DeviceError::Io,
    }
}
