//! A RAM disk behind the device seam: what tests and benchmarks serve, and the simplest complete
//! example of a [`Device`].
//!
//! Sparse: memory is allocated chunk by chunk as it is written and given back when a whole chunk
//! is unmapped. Every request is finished when `submit` returns. Holds nothing durable.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use farshore_extent::{BlockSizes, Extent, VolumeSize};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::device::{
    Allocation, Completion, Device, DeviceError, DeviceInfo, MAX_PAYLOAD, Queue, Request, Slot,
    SlotUse, Tag,
};

/// Unit of allocation and of locking, in bytes.
const CHUNK: u64 = 256 << 10;

/// What buffers of slots are aligned to, in bytes, as a direct I/O device would need.
const ALIGN: usize = 4096;

/// Most bytes of reserved slots of one queue: more than the largest request of any NBD client
/// (64 MiB), so that it fits as a whole.
const QUEUE_BYTES: usize = 96 << 20;

/// Idle buffers a queue keeps for each size class, so that steady traffic never allocates.
const SPARES: usize = 64;

type Chunk = RwLock<Option<Box<[u8]>>>;

/// How often each kind of request was completed; for tests.
#[derive(Debug, Default)]
struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    zeroes: AtomicU64,
    unmaps: AtomicU64,
    flushes: AtomicU64,
    fua: AtomicU64,
}

/// A snapshot of how often each kind of request was completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryCounts {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Zero requests, unmapping ones included.
    pub zeroes: u64,
    /// Zero requests that allowed to give the space back.
    pub unmaps: u64,
    /// Flushes.
    pub flushes: u64,
    /// Writes and zero requests that asked to be durable.
    pub fua: u64,
}

/// A RAM disk. Cheap to share; all queues see the same bytes.
#[derive(Debug)]
pub struct MemoryDevice {
    info: DeviceInfo,
    chunks: Vec<Chunk>,
    counters: Counters,
    /// Errno-like switch of tests: the next requests of any queue fail this many times.
    failing: AtomicU32,
}

impl MemoryDevice {
    /// A RAM disk of `size` that reads as zero, can zero, and says that it has a volatile cache
    /// (so that front ends advertise FLUSH and FUA).
    #[must_use]
    pub fn new(size: VolumeSize) -> Self {
        Self::with_info(DeviceInfo {
            size,
            blocks: BlockSizes::E512,
            read_only: false,
            zeroes: true,
            volatile_cache: true,
        })
    }

    /// A RAM disk that says of itself exactly `info`.
    #[must_use]
    pub fn with_info(info: DeviceInfo) -> Self {
        let chunks = (0..info.size.get().div_ceil(CHUNK)).map(|_| RwLock::new(None)).collect();
        Self { info, chunks, counters: Counters::default(), failing: AtomicU32::new(0) }
    }

    /// How often each kind of request was completed so far.
    #[must_use]
    pub fn counts(&self) -> MemoryCounts {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        MemoryCounts {
            reads: get(&self.counters.reads),
            writes: get(&self.counters.writes),
            zeroes: get(&self.counters.zeroes),
            unmaps: get(&self.counters.unmaps),
            flushes: get(&self.counters.flushes),
            fua: get(&self.counters.fua),
        }
    }

    /// The next `times` requests, of whatever kind, fail with [`DeviceError::Io`].
    pub fn fail_next(&self, times: u32) {
        self.failing.store(times, Ordering::Relaxed);
    }

    /// Copies the bytes from `offset` on into `out`; beyond the end nothing is copied.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) {
        let mut rest = out;
        for (chunk, at, len) in self.parts(offset, rest.len()) {
            let (now, later) = rest.split_at_mut(len);
            match &*chunk.read().unwrap_or_else(PoisonError::into_inner) {
                Some(bytes) => now.copy_from_slice(&bytes[at..at + len]),
                None => now.fill(0),
            }
            rest = later;
        }
    }

    /// Copies `bytes` to `offset` and on; beyond the end nothing is copied.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) {
        let mut rest = bytes;
        for (chunk, at, len) in self.parts(offset, rest.len()) {
            let (now, later) = rest.split_at(len);
            let mut held = chunk.write().unwrap_or_else(PoisonError::into_inner);
            held.get_or_insert_with(empty_chunk)[at..at + len].copy_from_slice(now);
            rest = later;
        }
    }

    fn zero(&self, extent: Extent, may_unmap: bool) {
        let len = usize::try_from(extent.len()).unwrap_or(usize::MAX);
        for (chunk, at, len) in self.parts(extent.offset(), len) {
            let mut held = chunk.write().unwrap_or_else(PoisonError::into_inner);
            match &mut *held {
                Some(_) if may_unmap && len as u64 == CHUNK => *held = None,
                Some(bytes) => bytes[at..at + len].fill(0),
                None if may_unmap => {}
                None => *held = Some(empty_chunk()),
            }
        }
    }

    /// The chunks under `len` bytes from `offset` on, each with the offset and the length in it.
    fn parts(&self, offset: u64, len: usize) -> impl Iterator<Item = (&Chunk, usize, usize)> {
        let len = (len as u64).min(self.info.size.get().saturating_sub(offset));
        let whole = Extent::new(offset, len).ok();
        whole.into_iter().flat_map(|all| all.split_at_multiples_of(CHUNK)).filter_map(|part| {
            let index = usize::try_from(part.offset() / CHUNK).ok()?;
            let at = usize::try_from(part.offset() % CHUNK).ok()?;
            Some((self.chunks.get(index)?, at, usize::try_from(part.len()).ok()?))
        })
    }

    fn fails_now(&self) -> bool {
        self.failing.load(Ordering::Relaxed) > 0
            && self
                .failing
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
                .is_ok()
    }

    fn count(&self, fua: bool, kind: &AtomicU64) {
        kind.fetch_add(1, Ordering::Relaxed);
        if fua {
            self.counters.fua.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn empty_chunk() -> Box<[u8]> {
    vec![0; usize::try_from(CHUNK).unwrap_or(0)].into_boxed_slice()
}

impl Device for MemoryDevice {
    fn info(&self) -> DeviceInfo {
        self.info
    }

    fn open_queue(self: Arc<Self>) -> Result<Box<dyn Queue>, DeviceError> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|_| DeviceError::NoMemory)?;
        Ok(Box::new(MemoryQueue {
            device: self,
            buffers: Buffers::default(),
            finished: Vec::new(),
            wake,
        }))
    }

    fn allocation(&self, extent: Extent, max: usize) -> Vec<Allocation> {
        let len = usize::try_from(extent.len()).unwrap_or(usize::MAX);
        let mut found: Vec<Allocation> = Vec::new();
        for (chunk, _, len) in self.parts(extent.offset(), len) {
            let hole = chunk.read().unwrap_or_else(PoisonError::into_inner).is_none();
            let full = found.len() == max;
            match found.last_mut() {
                Some(last) if last.hole == hole => last.len += len as u64,
                _ if full => break,
                _ => found.push(Allocation { len: len as u64, hole, zero: hole }),
            }
        }
        found
    }
}

/// One thread's way into the RAM disk.
struct MemoryQueue {
    device: Arc<MemoryDevice>,
    buffers: Buffers,
    finished: Vec<Completion>,
    /// Never signalled: nothing finishes later than in `submit`.
    wake: EventFd,
}

/// A buffer with [`ALIGN`] spare bytes in front of which the aligned part is used.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

/// Reserved buffers by key, and idle ones by size class.
#[derive(Default)]
struct Buffers {
    used: Vec<Option<Buffer>>,
    free_keys: Vec<usize>,
    idle: [Vec<Buffer>; CLASSES],
    reserved: usize,
}

/// Size classes: powers of two from 4 KiB to [`MAX_PAYLOAD`].
const CLASSES: usize = 9;

/// Index of the smallest class that holds `len` bytes.
fn class_of(len: usize) -> usize {
    (len.div_ceil(ALIGN).next_power_of_two().trailing_zeros() as usize).min(CLASSES - 1)
}

impl Buffers {
    fn reserve(&mut self, len: u32) -> Result<Slot, DeviceError> {
        let size = len as usize;
        if size == 0 || size > MAX_PAYLOAD {
            return Err(DeviceError::Invalid);
        }
        let class = class_of(size);
        if self.reserved + (ALIGN << class) > QUEUE_BYTES {
            return Err(DeviceError::NoMemory);
        }
        self.reserved += ALIGN << class;
        let buffer = self.idle[class].pop().unwrap_or_else(|| {
            let bytes = vec![0; (ALIGN << class) + ALIGN];
            let start = bytes.as_ptr().align_offset(ALIGN).min(ALIGN);
            Buffer { bytes, start }
        });
        let key = self.free_keys.pop().unwrap_or_else(|| {
            self.used.push(None);
            self.used.len() - 1
        });
        self.used[key] = Some(buffer);
        Ok(Slot { key: key as u64, len })
    }

    /// The bytes of a slot; empty for a slot that is not ours.
    fn bytes(&mut self, slot: &Slot) -> &mut [u8] {
        let key = usize::try_from(slot.key).unwrap_or(usize::MAX);
        match self.used.get_mut(key) {
            Some(Some(buffer)) => &mut buffer.bytes[buffer.start..][..slot.len as usize],
            _ => &mut [],
        }
    }

    fn release(&mut self, slot: &Slot) {
        let key = usize::try_from(slot.key).unwrap_or(usize::MAX);
        let Some(buffer) = self.used.get_mut(key).and_then(Option::take) else { return };
        let class = class_of(slot.len as usize);
        self.reserved -= ALIGN << class;
        self.free_keys.push(key);
        if self.idle[class].len() < SPARES {
            self.idle[class].push(buffer);
        }
    }
}

impl MemoryQueue {
    fn perform(&mut self, request: Request) -> (Result<(), DeviceError>, Option<Slot>) {
        let device = &self.device;
        let failed = device.fails_now();
        let refused = device.info.read_only;
        let (result, slot) = match request {
            Request::Read { extent, slot } => {
                device.count(false, &device.counters.reads);
                if !failed {
                    device.read_at(extent.offset(), self.buffers.bytes(&slot));
                }
                (Ok(()), Some(slot))
            }
            Request::Write { extent, slot, fua } => {
                if !failed && !refused {
                    device.count(fua, &device.counters.writes);
                    device.write_at(extent.offset(), self.buffers.bytes(&slot));
                }
                self.buffers.release(&slot);
                (if refused { Err(DeviceError::ReadOnly) } else { Ok(()) }, None)
            }
            Request::Zero { extent, fua, may_unmap } => {
                if !failed && !refused {
                    device.count(fua, &device.counters.zeroes);
                    if may_unmap {
                        device.count(false, &device.counters.unmaps);
                    }
                    device.zero(extent, may_unmap);
                }
                (if refused { Err(DeviceError::ReadOnly) } else { Ok(()) }, None)
            }
            Request::Flush => {
                device.count(false, &device.counters.flushes);
                (Ok(()), None)
            }
        };
        (if failed { Err(DeviceError::Io) } else { result }, slot)
    }
}

impl Queue for MemoryQueue {
    fn reserve(&mut self, len: u32, _purpose: SlotUse) -> Result<Slot, DeviceError> {
        self.buffers.reserve(len)
    }

    fn bytes(&mut self, slot: &Slot) -> &mut [u8] {
        self.buffers.bytes(slot)
    }

    fn release(&mut self, slot: Slot) {
        self.buffers.release(&slot);
    }

    fn submit(&mut self, tag: Tag, request: Request) {
        let (result, slot) = self.perform(request);
        self.finished.push(Completion { tag, result, slot });
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        out.append(&mut self.finished);
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn in_flight(&self) -> usize {
        self.finished.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(bytes: u64) -> Arc<MemoryDevice> {
        Arc::new(MemoryDevice::new(VolumeSize::new(bytes).unwrap()))
    }

    fn extent(offset: u64, len: u64) -> Extent {
        Extent::new(offset, len).unwrap()
    }

    #[test]
    fn what_one_queue_writes_another_reads_also_across_chunks() {
        let disk = disk(4 * CHUNK);
        let mut one = disk.clone().open_queue().unwrap();
        let slot = one.reserve(1024, SlotUse::Write).unwrap();
        one.bytes(&slot).fill(7);
        one.submit(Tag(1), Request::Write { extent: extent(CHUNK - 512, 1024), slot, fua: true });
        let mut done = Vec::new();
        one.reap(&mut done);
        assert!(done[0].result.is_ok() && one.in_flight() == 0);

        let mut two = disk.clone().open_queue().unwrap();
        let slot = two.reserve(2048, SlotUse::Read).unwrap();
        assert_eq!(two.bytes(&slot).as_ptr().align_offset(ALIGN), 0);
        two.submit(Tag(2), Request::Read { extent: extent(CHUNK - 1024, 2048), slot });
        done.clear();
        two.reap(&mut done);
        let slot = done.pop().unwrap().slot.unwrap();
        let bytes = two.bytes(&slot);
        assert!(bytes[..512].iter().all(|b| *b == 0) && bytes[512..1536].iter().all(|b| *b == 7));
        two.release(slot);
        assert_eq!(disk.counts().fua, 1);
    }

    #[test]
    fn unmapped_chunks_are_holes_that_read_as_zero() {
        let disk = disk(4 * CHUNK);
        disk.write_at(0, &vec![1; usize::try_from(3 * CHUNK).unwrap()]);
        disk.zero(extent(CHUNK, CHUNK), true);
        let map = disk.allocation(extent(0, 4 * CHUNK), 8);
        let holes: Vec<_> = map.iter().map(|a| (a.len / CHUNK, a.hole)).collect();
        assert_eq!(holes, [(1, false), (1, true), (1, false), (1, true)]);
        assert_eq!(disk.allocation(extent(0, 4 * CHUNK), 2).len(), 2);
        let mut byte = [9];
        disk.read_at(CHUNK, &mut byte);
        assert_eq!(byte, [0]);
    }

    #[test]
    fn a_queue_out_of_buffers_says_so_and_recovers() {
        let mut queue = disk(CHUNK).open_queue().unwrap();
        let largest = u32::try_from(MAX_PAYLOAD).unwrap();
        let mut slots = Vec::new();
        let error = loop {
            match queue.reserve(largest, SlotUse::Write) {
                Ok(slot) => slots.push(slot),
                Err(error) => break error,
            }
        };
        assert_eq!(error, DeviceError::NoMemory);
        assert!(slots.len() >= 32);
        queue.release(slots.pop().unwrap());
        assert!(queue.reserve(largest, SlotUse::Write).is_ok());
    }
}
