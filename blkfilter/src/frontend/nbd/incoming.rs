//! The request that is being taken in: cut into pieces, its payload received into slots. At most
//! one at a time; it may wait for bytes or for a buffer.

use farshore_extent::Extent;

use super::jobs::{Kind, tag};
use super::limits::MAX_ZERO;
use super::transmission::Transmission;
use super::wire::{ErrorNumber, RawRequest};
use crate::device::{DeviceError, MAX_PAYLOAD, Queue, Request, Slot, SlotUse};

/// What is being taken in.
#[derive(Debug)]
pub enum Incoming {
    /// Nothing: a header comes next.
    Header,
    /// A write whose payload is arriving.
    Write(Write),
    /// A read of which not all pieces have a buffer yet.
    Read(Read),
    /// The payload of a refused write, to be dropped.
    Drain(Drain),
}

/// A write whose payload is arriving.
#[derive(Debug)]
pub struct Write {
    job: u32,
    fua: bool,
    /// Length of the whole request in bytes.
    pub len: u32,
    /// What has no slot yet.
    rest: Option<Extent>,
    piece: u32,
    /// The piece being filled, and how far it is.
    pub slot: Option<(Slot, usize)>,
    /// Where that piece goes.
    extent: Extent,
}

impl Write {
    /// So many bytes were received into the slot.
    pub fn received(&mut self, len: usize) {
        if let Some((_, filled)) = &mut self.slot {
            *filled += len;
        }
    }
}

/// A read of which not all pieces have a buffer yet.
#[derive(Debug)]
pub struct Read {
    job: u32,
    rest: Extent,
    piece: u32,
}

/// The payload of a refused write, to be dropped.
#[derive(Debug)]
pub struct Drain {
    job: u32,
    left: u64,
}

/// How far taking in has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carry {
    /// The request is in; a header comes next.
    Complete,
    /// It waits for bytes.
    Bytes,
    /// It waits for a buffer.
    Starved,
}

impl Incoming {
    /// Gives up what is being taken in: the connection is over.
    pub fn abandon(&mut self, queue: &mut dyn Queue) {
        if let Self::Write(Write { slot: Some((slot, _)), .. }) =
            std::mem::replace(self, Self::Header)
        {
            queue.release(slot);
        }
    }
}

/// The first piece of at most `most` bytes, and what is left.
fn cut(extent: Extent, most: u64) -> (Extent, Option<Extent>) {
    let stop = extent.offset().saturating_add(most).min(extent.end());
    let first = Extent::between(extent.offset(), stop).unwrap_or(extent);
    (first, Extent::between(first.end(), extent.end()))
}

/// Length of a piece; cut to fit.
fn slot_len(piece: Extent) -> u32 {
    u32::try_from(piece.len()).unwrap_or(u32::MAX)
}

impl Transmission {
    /// A flush: nothing to take in.
    pub(super) fn begin_flush(&mut self, raw: &RawRequest) {
        let job = self.jobs.open(raw.cookie, Kind::Plain, 0, 0);
        self.queue.submit(tag(job, 0), Request::Flush); // its piece takes the submitter's count
    }

    /// A zero or trim: all pieces at once, they carry nothing.
    pub(super) fn begin_zero(&mut self, cookie: u64, extent: Extent, fua: bool, may_unmap: bool) {
        let job = self.jobs.open(cookie, Kind::Plain, extent.offset(), 0);
        let (mut piece, mut rest) = (0, Some(extent));
        while let Some(left) = rest {
            let (extent, later) = cut(left, MAX_ZERO);
            self.jobs.get(job).left += 1;
            self.queue.submit(tag(job, piece), Request::Zero { extent, fua, may_unmap });
            piece += 1;
            rest = later;
        }
        self.settle(job);
    }

    /// A read: its pieces are submitted as buffers allow.
    pub(super) fn begin_read(&mut self, cookie: u64, extent: Extent, skip: u32, len: u32) {
        let job = self.jobs.open(cookie, Kind::Read, extent.offset(), len);
        self.jobs.get(job).skip = skip;
        self.incoming = Incoming::Read(Read { job, rest: extent, piece: 0 });
    }

    /// A write: its payload comes next.
    pub(super) fn begin_write(&mut self, cookie: u64, extent: Extent, fua: bool) {
        let len = slot_len(extent);
        let job = self.jobs.open(cookie, Kind::Plain, extent.offset(), len);
        self.behind_last = super::transmission::behind(len);
        let rest = Some(extent);
        self.incoming =
            Incoming::Write(Write { job, fua, len, rest, piece: 0, slot: None, extent });
    }

    /// A refused write: answered once its payload is dropped.
    pub(super) fn begin_refused(&mut self, raw: &RawRequest, error: ErrorNumber) {
        let job = self.jobs.open(raw.cookie, Kind::Plain, raw.offset, 0);
        self.jobs.get(job).fail(error);
        self.incoming = Incoming::Drain(Drain { job, left: u64::from(raw.payload_len()) });
    }

    /// Goes on with what is being taken in.
    pub(super) fn carry_on(&mut self) -> Carry {
        match std::mem::replace(&mut self.incoming, Incoming::Header) {
            Incoming::Header => Carry::Complete,
            Incoming::Write(write) => self.carry_write(write),
            Incoming::Read(read) => self.carry_read(read),
            Incoming::Drain(drain) => self.carry_drain(drain),
        }
    }

    fn carry_write(&mut self, mut write: Write) -> Carry {
        loop {
            if let Some((slot, mut filled)) = write.slot.take() {
                filled += self.inbox.copy_into(&mut self.queue.bytes(&slot)[filled..]);
                if filled < slot.len as usize {
                    write.slot = Some((slot, filled));
                    self.incoming = Incoming::Write(write);
                    return Carry::Bytes;
                }
                let request = Request::Write { extent: write.extent, slot, fua: write.fua };
                self.jobs.get(write.job).left += 1;
                self.queue.submit(tag(write.job, write.piece), request);
                write.piece += 1;
            }
            let Some(rest) = write.rest else {
                self.settle(write.job);
                return Carry::Complete;
            };
            let (extent, later) = cut(rest, MAX_PAYLOAD as u64);
            match self.queue.reserve(slot_len(extent), SlotUse::Write) {
                Ok(slot) => {
                    write.slot = Some((slot, 0));
                    write.extent = extent;
                    write.rest = later;
                    self.starved = 0;
                }
                Err(DeviceError::NoMemory) => {
                    self.incoming = Incoming::Write(write);
                    return Carry::Starved;
                }
                Err(error) => {
                    self.jobs.get(write.job).fail(error.into());
                    return self.carry_drain(Drain { job: write.job, left: rest.len() });
                }
            }
        }
    }

    fn carry_read(&mut self, mut read: Read) -> Carry {
        loop {
            let (extent, later) = cut(read.rest, MAX_PAYLOAD as u64);
            match self.queue.reserve(slot_len(extent), SlotUse::Read) {
                Ok(slot) => {
                    self.starved = 0;
                    self.jobs.get(read.job).left += u32::from(later.is_some());
                    self.queue.submit(tag(read.job, read.piece), Request::Read { extent, slot });
                    read.piece += 1;
                    match later {
                        Some(rest) => read.rest = rest,
                        // The last piece takes the submitter's count, so that its chunk ends
                        // the reply.
                        None => return Carry::Complete,
                    }
                }
                Err(DeviceError::NoMemory) => {
                    self.incoming = Incoming::Read(read);
                    return Carry::Starved;
                }
                Err(error) => {
                    self.jobs.get(read.job).fail(error.into());
                    self.settle(read.job);
                    return Carry::Complete;
                }
            }
        }
    }

    fn carry_drain(&mut self, mut drain: Drain) -> Carry {
        drain.left -= self.inbox.skip(drain.left);
        if drain.left > 0 {
            self.incoming = Incoming::Drain(drain);
            return Carry::Bytes;
        }
        self.settle(drain.job);
        Carry::Complete
    }

    /// A read that is answered as a whole holds all buffers itself: what it has is sent, with
    /// the promise that the rest succeeds. Returns whether there was anything.
    pub(super) fn send_held(&mut self) -> bool {
        let Incoming::Read(Read { job, .. }) = self.incoming else { return false };
        let found = self.jobs.get(job);
        if found.held.is_empty() || found.failed.is_some() {
            return false;
        }
        self.push_held(job);
        true
    }

    /// No buffer came free for too long although nothing of ours is in flight: the request fails.
    pub(super) fn refuse_starved(&mut self) {
        match std::mem::replace(&mut self.incoming, Incoming::Header) {
            Incoming::Write(write) => {
                self.jobs.get(write.job).fail(ErrorNumber::NOMEM);
                let left = write.rest.map_or(0, Extent::len); // starved: no slot is being filled
                self.incoming = Incoming::Drain(Drain { job: write.job, left });
            }
            Incoming::Read(read) => {
                self.jobs.get(read.job).fail(ErrorNumber::NOMEM);
                self.settle(read.job);
            }
            other @ (Incoming::Header | Incoming::Drain(_)) => self.incoming = other,
        }
    }
}
