//! A device that finishes requests later, in any order, with few buffers: what a real one does on
//! a bad day. Effects happen in the order of submission, so a sequential model stays true.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use farshore_extent::Extent;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::device::{
    Allocation, Completion, Device, DeviceError, DeviceInfo, Queue, Request, Slot, SlotUse, Tag,
};
use crate::frontend::memory::MemoryDevice;

pub struct Late {
    pub ram: Arc<MemoryDevice>,
    /// Bytes of slots a queue has.
    pub budget: u64,
    pub seed: u64,
}

struct LateQueue {
    inner: Box<dyn Queue>,
    stash: Vec<Completion>,
    writes: Vec<(Tag, u32)>,
    wake: EventFd,
    free: u64,
    random: u64,
}

impl Device for Late {
    fn info(&self) -> DeviceInfo {
        self.ram.info()
    }

    fn open_queue(self: Arc<Self>) -> Result<Box<dyn Queue>, DeviceError> {
        Ok(Box::new(LateQueue {
            inner: self.ram.clone().open_queue()?,
            stash: Vec::new(),
            writes: Vec::new(),
            wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap(),
            free: self.budget,
            random: self.seed | 1,
        }))
    }

    fn allocation(&self, extent: Extent, max: usize) -> Vec<Allocation> {
        self.ram.allocation(extent, max)
    }
}

impl LateQueue {
    fn draw(&mut self, below: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        usize::try_from(self.random >> 33).unwrap() % below
    }
}

impl Queue for LateQueue {
    fn reserve(&mut self, len: u32, purpose: SlotUse) -> Result<Slot, DeviceError> {
        if u64::from(len) > self.free {
            return Err(DeviceError::NoMemory);
        }
        self.free -= u64::from(len);
        self.inner.reserve(len, purpose)
    }

    fn bytes(&mut self, slot: &Slot) -> &mut [u8] {
        self.inner.bytes(slot)
    }

    fn release(&mut self, slot: Slot) {
        self.free += u64::from(slot.len);
        self.inner.release(slot);
    }

    fn submit(&mut self, tag: Tag, request: Request) {
        if let Request::Write { slot, .. } = &request {
            self.writes.push((tag, slot.len));
        }
        self.inner.submit(tag, request);
        self.inner.reap(&mut self.stash);
        self.wake.write(1).unwrap();
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        let _ = self.wake.read();
        for _ in 0..self.draw(self.stash.len() + 1) {
            let index = self.draw(self.stash.len());
            let done = self.stash.swap_remove(index);
            if let Some(at) = self.writes.iter().position(|(tag, _)| *tag == done.tag) {
                self.free += u64::from(self.writes.swap_remove(at).1);
            }
            out.push(done);
        }
        if !self.stash.is_empty() {
            self.wake.write(1).unwrap();
        }
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn in_flight(&self) -> usize {
        self.stash.len()
    }
}

impl Drop for LateQueue {
    fn drop(&mut self) {
        assert!(self.stash.is_empty(), "a queue was dropped with requests in flight");
    }
}
