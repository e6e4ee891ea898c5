//! A backing file behind nothing: what a device without a filter needs, buffers and a ring.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use farshore_blkfilter::backing::Backing;
use farshore_blkfilter::device::{
    Completion, Device, DeviceError, DeviceInfo, Queue, Request, Slot, SlotUse, Tag,
};
use farshore_blkfilter::sys::aligned::AlignedBuf;
use farshore_blkfilter::sys::ring::{Done, Engine, IoBuf, Op, Ring};

/// Buffers a queue lends at once; as many requests as a connection may have open.
const MOST_SLOTS: usize = 512;

/// A backing file and nothing else.
#[derive(Debug)]
pub struct Plain(pub Backing);

impl Device for Plain {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            size: self.0.size(),
            blocks: self.0.blocks(),
            read_only: self.0.read_only(),
            zeroes: self.0.zeroes(),
            volatile_cache: self.0.volatile_cache(),
        }
    }

    fn open_queue(self: Arc<Self>) -> Result<Box<dyn Queue>, DeviceError> {
        let ring = self.0.ring(0, Engine::Auto, Vec::new()).map_err(|_| DeviceError::NoMemory)?;
        Ok(Box::new(PlainQueue {
            ring,
            lent: Vec::new(),
            vacant: Vec::new(),
            idle: HashMap::new(),
            _device: self,
        }))
    }
}

/// A lent slot: its buffer while nobody else has it, and the request it belongs to once submitted.
#[derive(Debug, Default)]
struct Lent {
    buf: Option<AlignedBuf>,
    request: Option<(Tag, bool)>,
}

struct PlainQueue {
    ring: Ring,
    lent: Vec<Lent>,
    vacant: Vec<usize>,
    idle: HashMap<usize, Vec<AlignedBuf>>,
    _device: Arc<Plain>,
}

impl PlainQueue {
    fn place(&mut self, lent: Lent) -> usize {
        match self.vacant.pop() {
            Some(index) => {
                self.lent[index] = lent;
                index
            }
            None => {
                self.lent.push(lent);
                self.lent.len() - 1
            }
        }
    }

    fn keep(&mut self, buf: AlignedBuf) {
        self.idle.entry(buf.len()).or_default().push(buf);
    }

    /// Takes a submitted slot's buffer out and notes whom its completion belongs to.
    fn take(&mut self, slot: &Slot, tag: Tag, read: bool) -> Option<(u64, IoBuf)> {
        let lent = self.lent.get_mut(usize::try_from(slot.key).ok()?)?;
        lent.request = Some((tag, read));
        Some((slot.key, IoBuf::Own(lent.buf.take()?)))
    }

    fn finish(&mut self, done: Done) -> Option<Completion> {
        let index = usize::try_from(done.user_data).ok()?;
        let (tag, read) = self.lent.get_mut(index)?.request.take()?;
        let result = done.result.map_err(|_| DeviceError::Io);
        let slot = match done.buf {
            Some(IoBuf::Own(buf)) if read => {
                let len = u32::try_from(buf.len()).ok()?;
                self.lent[index].buf = Some(buf);
                return Some(Completion {
                    tag,
                    result,
                    slot: Some(Slot { key: done.user_data, len }),
                });
            }
            Some(IoBuf::Own(buf)) => {
                self.keep(buf);
                None
            }
            Some(IoBuf::Pool(_)) | None => None,
        };
        self.vacant.push(index);
        Some(Completion { tag, result, slot })
    }
}

impl Queue for PlainQueue {
    fn reserve(&mut self, len: u32, _purpose: SlotUse) -> Result<Slot, DeviceError> {
        if self.lent.len() - self.vacant.len() >= MOST_SLOTS {
            return Err(DeviceError::NoMemory);
        }
        let size = usize::try_from(len).map_err(|_| DeviceError::Invalid)?;
        let spare = self.idle.get_mut(&size).and_then(Vec::pop);
        let buf = spare.unwrap_or_else(|| AlignedBuf::zeroed(size));
        let key = self.place(Lent { buf: Some(buf), request: None }) as u64;
        Ok(Slot { key, len })
    }

    fn bytes(&mut self, slot: &Slot) -> &mut [u8] {
        let index = usize::try_from(slot.key).unwrap_or(usize::MAX);
        match self.lent.get_mut(index) {
            Some(Lent { buf: Some(buf), .. }) => buf,
            _ => &mut [],
        }
    }

    fn release(&mut self, slot: Slot) {
        let index = usize::try_from(slot.key).unwrap_or(usize::MAX);
        if let Some(buf) = self.lent.get_mut(index).and_then(|lent| lent.buf.take()) {
            self.vacant.push(index);
            self.keep(buf);
        }
    }

    fn submit(&mut self, tag: Tag, request: Request) {
        let (key, op) = match request {
            Request::Read { extent, slot } => {
                let Some((key, buf)) = self.take(&slot, tag, true) else { return };
                (key, Op::Read { offset: extent.offset(), buf })
            }
            Request::Write { extent, slot, fua } => {
                let Some((key, buf)) = self.take(&slot, tag, false) else { return };
                (key, Op::Write { offset: extent.offset(), buf, durable: fua })
            }
            Request::Zero { extent, fua, may_unmap } => {
                let key = self.place(Lent { buf: None, request: Some((tag, false)) }) as u64;
                (key, Op::Zero { extent, may_unmap, durable: fua })
            }
            Request::Flush => {
                (self.place(Lent { buf: None, request: Some((tag, false)) }) as u64, Op::Sync)
            }
        };
        self.ring.push(op, key);
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        if let Err(error) = self.ring.submit() {
            eprintln!("bare-front: {error}");
        }
        let mut done = Vec::new();
        self.ring.completions(|one| done.push(one));
        out.extend(done.into_iter().filter_map(|one| self.finish(one)));
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.ring.fd()
    }

    fn in_flight(&self) -> usize {
        self.ring.in_flight()
    }
}
