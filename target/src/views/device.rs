//! A view as a block device: the bytes of a recovery point under a private scratch.
//!
//! Every request is carried out in `submit`; the reads of a point go through the store's caches.
//! FLUSH and FUA make the scratch durable: what they cover is there after a power cut.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use farshore_blkfilter::device::{
    Allocation, Completion, Device, DeviceError, DeviceInfo, MAX_PAYLOAD, Queue, Request, Slot,
    SlotUse, Tag,
};
use farshore_extent::{BlockSizes, Extent, VolumeSize};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::flatten::{Image, Mirror, Source};
use super::scratch::{Place, Scratch, ScratchError};

/// Most bytes of reserved slots of one queue: the largest client request (32 MiB) fits twice.
const QUEUE_BYTES: usize = 64 << 20;
/// A view counts as full for so long after a write was refused: what overwrites is still taken.
const LATELY: Duration = Duration::from_secs(60);
/// Pieces of a view that are looked at together while it is flattened.
const MAX_PIECES: usize = 1 << 12;
/// Idle buffers that a queue keeps.
const SPARES: usize = 32;

/// Why the bytes of a point could not be read.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct PointReadError(pub(crate) String);

/// The bytes of a recovery point: the store's reader, or a test's.
pub(crate) trait PointBytes: Send + Sync + 'static {
    /// Fills `out` with the bytes from `offset` on.
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), PointReadError>;
    /// Which parts of `extent` read as zero without anything stored, in consecutive pieces that
    /// cover it; after `max` of them the answer may end early.
    fn zeroes(&self, extent: Extent, max: usize) -> Vec<(Extent, bool)> {
        let _ = max;
        vec![(extent, false)]
    }
}

/// Why a view takes no new writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// Its scratch is full.
    Quota,
    /// The disk of the target is nearly full.
    Disk,
}

/// What a view consists of.
pub(super) enum Backing {
    /// The recovery point, and over it what was written to the view.
    Layers { point: Box<dyn PointBytes>, scratch: Box<Scratch> },
    /// All of it in one place, when it was flattened.
    Image(Arc<Image>),
}

/// See the module.
pub(crate) struct ViewDevice {
    name: String,
    size: VolumeSize,
    blocks: BlockSizes,
    read_only: bool,
    backing: RwLock<Backing>,
    /// Held together by writes under way; alone by who wants none to be.
    gate: RwLock<()>,
    /// Hears of every write while the view is flattened.
    mirror: RwLock<Option<Arc<Mirror>>>,
    refused: Mutex<Option<(Refused, Instant)>>,
    /// Open queues: connections, and the threads of a block device.
    queues: AtomicUsize,
}

impl ViewDevice {
    pub(super) fn new(
        name: String,
        (size, blocks): (VolumeSize, BlockSizes),
        backing: Backing,
        read_only: bool,
    ) -> Self {
        Self {
            name,
            size,
            blocks,
            read_only,
            backing: RwLock::new(backing),
            gate: RwLock::default(),
            mirror: RwLock::default(),
            refused: Mutex::default(),
            queues: AtomicUsize::new(0),
        }
    }

    fn backing(&self) -> RwLockReadGuard<'_, Backing> {
        self.backing.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes written to the view.
    pub(super) fn used(&self) -> u64 {
        match &*self.backing() {
            Backing::Layers { scratch, .. } => scratch.used(),
            Backing::Image(_) => 0,
        }
    }

    /// Why a write was refused lately; none when none was.
    pub(super) fn refused(&self) -> Option<Refused> {
        let last = *self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        last.filter(|(_, when)| when.elapsed() < LATELY).map(|(why, _)| why)
    }

    /// Why it takes no more writes, if a flush has failed.
    pub(super) fn failed(&self) -> Option<String> {
        match &*self.backing() {
            Backing::Layers { scratch, .. } => scratch.failed().map(str::to_owned),
            Backing::Image(image) => image.failed().map(str::to_owned),
        }
    }

    /// Tells `mirror` of every write from now on.
    pub(super) fn set_mirror(&self, mirror: Option<Arc<Mirror>>) {
        *self.mirror.write().unwrap_or_else(PoisonError::into_inner) = mirror;
    }

    /// Consists of `image` from now on, which holds what the view shows.
    pub(super) fn become_image(&self, image: Arc<Image>) {
        let mut backing = self.backing.write().unwrap_or_else(PoisonError::into_inner);
        let layers = std::mem::replace(&mut *backing, Backing::Image(image));
        drop(backing);
        drop(layers);
    }

    /// Whether anybody is connected to it.
    pub(super) fn in_use(&self) -> bool {
        self.queues.load(Ordering::Relaxed) != 0
    }

    fn read(&self, extent: Extent, out: &mut [u8]) -> Result<(), DeviceError> {
        Source::read(self, extent.offset(), out).map_err(|error| {
            tracing::error!(view = self.name, %extent, error, "a view cannot be read");
            DeviceError::Io
        })
    }

    fn write(&self, extent: Extent, bytes: &[u8], fua: bool) -> Result<(), DeviceError> {
        let write = |backing: &Backing| match backing {
            Backing::Layers { scratch, .. } => scratch.write(extent, bytes),
            Backing::Image(image) => Ok(image.write(extent.offset(), bytes)?),
        };
        self.change(extent, fua, write)
    }

    fn zero(&self, extent: Extent, fua: bool) -> Result<(), DeviceError> {
        let zero = |backing: &Backing| match backing {
            Backing::Layers { scratch, .. } => scratch.zero(extent),
            Backing::Image(image) => Ok(image.zero(extent)?),
        };
        self.change(extent, fua, zero)
    }

    fn change(
        &self,
        extent: Extent,
        fua: bool,
        change: impl FnOnce(&Backing) -> Result<(), ScratchError>,
    ) -> Result<(), DeviceError> {
        let gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&self.backing());
        // Also when it has failed: a part of it may be there.
        if let Some(mirror) = &*self.mirror.read().unwrap_or_else(PoisonError::into_inner) {
            mirror.touch(extent);
        }
        drop(gate);
        self.taken(changed)?;
        if fua { self.flush() } else { Ok(()) }
    }

    /// Everything written is durable afterwards.
    pub(super) fn flush(&self) -> Result<(), DeviceError> {
        if self.read_only {
            return Ok(());
        }
        let flushed = match &*self.backing() {
            Backing::Layers { scratch, .. } => scratch.flush(),
            Backing::Image(image) => image.sync().map_err(ScratchError::from),
        };
        self.taken(flushed)
    }

    fn taken(&self, written: Result<(), ScratchError>) -> Result<(), DeviceError> {
        let (error, why) = match written {
            Ok(()) => return Ok(()),
            Err(ScratchError::Full) => (DeviceError::NoSpace, Refused::Quota),
            Err(ScratchError::DiskFull) => (DeviceError::NoSpace, Refused::Disk),
            Err(ScratchError::Io(error)) => {
                tracing::warn!(view = self.name, %error, "a write to a view failed");
                return Err(DeviceError::Io);
            }
        };
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        *refused = Some((why, Instant::now()));
        Err(error)
    }
}

impl Source for ViewDevice {
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), String> {
        let backing = self.backing();
        let (point, scratch) = match &*backing {
            Backing::Image(image) => return image.read(offset, out).map_err(|e| e.to_string()),
            Backing::Layers { point, scratch } => (point, scratch),
        };
        let Some(extent) = Extent::between(offset, offset + out.len() as u64) else {
            return Ok(());
        };
        for (piece, place) in scratch.places(extent) {
            let (from, to) = (index(piece.offset() - offset), index(piece.end() - offset));
            let Some(out) = out.get_mut(from..to) else { continue };
            match place {
                Place::Zero => out.fill(0),
                Place::Scratch => {
                    scratch.read(piece.offset(), out).map_err(|e| format!("{piece}: {e}"))?;
                }
                Place::Point => {
                    point.read(piece.offset(), out).map_err(|e| format!("{piece}: {e}"))?;
                }
            }
        }
        Ok(())
    }

    fn zeroes(&self, extent: Extent) -> Vec<(Extent, bool)> {
        let mut at = extent.offset();
        let piece = |part: Allocation| {
            let piece = Extent::between(at, at + part.len)?;
            at = piece.end();
            Some((piece, part.zero))
        };
        self.allocation(extent, MAX_PIECES).into_iter().filter_map(piece).collect()
    }

    fn freeze(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Offsets within one request fit memory.
fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

impl Device for ViewDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            size: self.size,
            blocks: self.blocks,
            read_only: self.read_only,
            zeroes: true,
            volatile_cache: true,
        }
    }

    fn allocation(&self, extent: Extent, max: usize) -> Vec<Allocation> {
        let backing = self.backing();
        let (point, scratch) = match &*backing {
            Backing::Layers { point, scratch } => (point, scratch),
            Backing::Image(_) => {
                return vec![Allocation { len: extent.len(), hole: false, zero: false }];
            }
        };
        let mut found: Vec<Allocation> = Vec::new();
        for (piece, place) in scratch.places(extent) {
            let parts = match place {
                Place::Scratch => vec![(piece, false)],
                Place::Zero => vec![(piece, true)],
                Place::Point => point.zeroes(piece, max),
            };
            let covered = parts.last().is_some_and(|(last, _)| last.end() == piece.end());
            for (part, zero) in parts {
                let full = found.len() >= max;
                match found.last_mut() {
                    Some(last) if last.zero == zero => last.len += part.len(),
                    _ if full => return found,
                    _ => found.push(Allocation { len: part.len(), hole: zero, zero }),
                }
            }
            if !covered {
                break;
            }
        }
        found
    }

    fn open_queue(self: Arc<Self>) -> Result<Box<dyn Queue>, DeviceError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_flags(flags).map_err(|_| DeviceError::NoMemory)?;
        self.queues.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(ViewQueue {
            device: self,
            wake,
            finished: Vec::new(),
            buffers: Vec::new(),
            free: Vec::new(),
            spares: Vec::new(),
            reserved: 0,
        }))
    }
}

struct ViewQueue {
    device: Arc<ViewDevice>,
    /// Readable while completions wait.
    wake: EventFd,
    finished: Vec<Completion>,
    /// By key of the slot.
    buffers: Vec<Option<Vec<u8>>>,
    free: Vec<usize>,
    spares: Vec<Vec<u8>>,
    /// Bytes in reserved slots.
    reserved: usize,
}

impl Drop for ViewQueue {
    fn drop(&mut self) {
        self.device.queues.fetch_sub(1, Ordering::Relaxed);
    }
}

impl ViewQueue {
    fn take(&mut self, slot: &Slot) -> Vec<u8> {
        let key = usize::try_from(slot.key).unwrap_or(usize::MAX);
        self.buffers.get_mut(key).and_then(Option::take).unwrap_or_default()
    }

    fn put(&mut self, slot: &Slot, buffer: Vec<u8>) {
        let key = usize::try_from(slot.key).unwrap_or(usize::MAX);
        if let Some(place) = self.buffers.get_mut(key) {
            *place = Some(buffer);
        }
    }

    fn perform(&mut self, request: Request) -> (Result<(), DeviceError>, Option<Slot>) {
        match request {
            Request::Read { extent, slot } => {
                let mut buffer = self.take(&slot);
                let result = self.device.read(extent, &mut buffer);
                self.put(&slot, buffer);
                (result, Some(slot))
            }
            Request::Write { extent, slot, fua } => {
                let read_only = self.device.read_only;
                let result = match self.bytes(&slot) {
                    _ if read_only => Err(DeviceError::ReadOnly),
                    bytes if bytes.len() as u64 == extent.len() => Ok(()),
                    _ => Err(DeviceError::Invalid),
                };
                let buffer = self.take(&slot);
                let result = result.and_then(|()| self.device.write(extent, &buffer, fua));
                self.put(&slot, buffer);
                self.release(slot);
                (result, None)
            }
            Request::Zero { .. } if self.device.read_only => (Err(DeviceError::ReadOnly), None),
            Request::Zero { extent, fua, may_unmap: _ } => (self.device.zero(extent, fua), None),
            Request::Flush => (self.device.flush(), None),
        }
    }
}

impl Queue for ViewQueue {
    fn reserve(&mut self, len: u32, _purpose: SlotUse) -> Result<Slot, DeviceError> {
        let size = len as usize;
        if size == 0 || size > MAX_PAYLOAD {
            return Err(DeviceError::Invalid);
        }
        if self.reserved + size > QUEUE_BYTES {
            return Err(DeviceError::NoMemory);
        }
        let mut buffer = self.spares.pop().unwrap_or_default();
        buffer.resize(size, 0);
        self.reserved += size;
        let key = self.free.pop().unwrap_or_else(|| {
            self.buffers.push(None);
            self.buffers.len() - 1
        });
        self.buffers[key] = Some(buffer);
        Ok(Slot { key: key as u64, len })
    }

    fn bytes(&mut self, slot: &Slot) -> &mut [u8] {
        let key = usize::try_from(slot.key).unwrap_or(usize::MAX);
        self.buffers.get_mut(key).and_then(Option::as_mut).map_or(&mut [], Vec::as_mut_slice)
    }

    fn release(&mut self, slot: Slot) {
        let key = usize::try_from(slot.key).unwrap_or(usize::MAX);
        let Some(buffer) = self.buffers.get_mut(key).and_then(Option::take) else { return };
        self.reserved -= buffer.len();
        self.free.push(key);
        if self.spares.len() < SPARES {
            self.spares.push(buffer);
        }
    }

    fn submit(&mut self, tag: Tag, request: Request) {
        let (result, slot) = self.perform(request);
        self.finished.push(Completion { tag, result, slot });
        // Cannot fail: the counter is far from full.
        let _ = self.wake.write(1);
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        if !self.finished.is_empty() {
            // Cannot fail: the counter is above zero, so nothing blocks.
            let _ = self.wake.read();
        }
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
    use farshore_extent::{Lsn, ViewId, VolumeId};

    use super::*;
    use crate::store::SimDisk;
    use crate::views::scratch::{Identity, Limits};

    struct Pattern;

    impl PointBytes for Pattern {
        fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), PointReadError> {
            if offset == 4096 {
                return Err(PointReadError("planted".into()));
            }
            out.fill(0xAB);
            Ok(())
        }
    }

    fn scratch(quota: u64) -> Scratch {
        let identity = Identity {
            view: ViewId::from_bytes([1; 16]),
            volume: VolumeId::from_bytes([2; 16]),
            at: Lsn::ZERO,
            size: VolumeSize::new(1 << 20).unwrap(),
        };
        let limits = Limits { quota, reserve: None };
        Scratch::create(Arc::new(SimDisk::new(1)), identity, limits).unwrap()
    }

    fn over(scratch: Scratch, read_only: bool) -> ViewDevice {
        let shape = (VolumeSize::new(1 << 20).unwrap(), BlockSizes::E512);
        let scratch = Box::new(scratch);
        let backing = Backing::Layers { point: Box::new(Pattern), scratch };
        ViewDevice::new("v".into(), shape, backing, read_only)
    }

    fn made(quota: u64, read_only: bool) -> Arc<ViewDevice> {
        let scratch = scratch(quota);
        Arc::new(over(scratch, read_only))
    }

    fn view(quota: u64) -> Box<dyn Queue> {
        made(quota, false).open_queue().unwrap()
    }

    fn extent(offset: u64, len: u64) -> Extent {
        Extent::new(offset, len).unwrap()
    }

    fn done(queue: &mut dyn Queue, request: Request) -> Completion {
        queue.submit(Tag(7), request);
        let mut out = Vec::new();
        queue.reap(&mut out);
        assert_eq!((out.len(), queue.in_flight()), (1, 0));
        out.pop().unwrap()
    }

    fn write(queue: &mut dyn Queue, extent: Extent, value: u8) -> Result<(), DeviceError> {
        let slot = queue.reserve(u32::try_from(extent.len()).unwrap(), SlotUse::Write).unwrap();
        queue.bytes(&slot).fill(value);
        done(queue, Request::Write { extent, slot, fua: true }).result
    }

    fn read(queue: &mut dyn Queue, extent: Extent) -> Result<Vec<u8>, DeviceError> {
        let slot = queue.reserve(u32::try_from(extent.len()).unwrap(), SlotUse::Read).unwrap();
        let completion = done(queue, Request::Read { extent, slot });
        let slot = completion.slot.unwrap();
        let bytes = queue.bytes(&slot).to_vec();
        queue.release(slot);
        completion.result.map(|()| bytes)
    }

    #[test]
    fn writes_and_zeroes_lie_over_the_point_and_nothing_else_changes() {
        let mut view = view(1 << 20);
        write(&mut *view, extent(512, 512), 1).unwrap();
        let zero = Request::Zero { extent: extent(1024, 512), fua: false, may_unmap: true };
        done(&mut *view, zero).result.unwrap();
        let bytes = read(&mut *view, extent(0, 2048)).unwrap();
        let firsts: Vec<u8> = bytes.chunks(512).map(|c| c[0]).collect();
        assert_eq!(firsts, [0xAB, 1, 0, 0xAB]);
        assert!(done(&mut *view, Request::Flush).result.is_ok());
    }

    #[test]
    fn allocation_covers_the_range_and_knows_scratch_zeroes_and_point() {
        let scratch = scratch(1 << 20);
        scratch.write(extent(512, 512), &[1; 512]).unwrap();
        scratch.zero(extent(1024, 512)).unwrap();
        let view = over(scratch, false);
        let map = view.allocation(extent(0, 4096), 10);
        let parts: Vec<_> = map.iter().map(|a| (a.len, a.zero)).collect();
        assert_eq!(parts, [(1024, false), (512, true), (2560, false)]);
        assert_eq!(view.allocation(extent(0, 4096), 2).len(), 2);
    }

    #[test]
    fn a_read_only_view_says_so_and_takes_no_writes() {
        let device = made(1 << 20, true);
        assert!(device.info().read_only);
        let mut view = device.open_queue().unwrap();
        assert_eq!(write(&mut *view, extent(0, 512), 1), Err(DeviceError::ReadOnly));
        let zero = Request::Zero { extent: extent(0, 512), fua: false, may_unmap: true };
        assert_eq!(done(&mut *view, zero).result, Err(DeviceError::ReadOnly));
        assert_eq!(read(&mut *view, extent(0, 512)).unwrap()[0], 0xAB);
        assert!(done(&mut *view, Request::Flush).result.is_ok());
    }

    #[test]
    fn it_is_in_use_while_a_queue_is_open() {
        let device = made(1 << 20, false);
        assert!(!device.in_use());
        let (first, second) = (device.clone().open_queue(), device.clone().open_queue());
        drop(first);
        assert!(device.in_use());
        drop(second);
        assert!(!device.in_use());
    }

    #[test]
    fn a_full_scratch_fails_writes_and_still_reads() {
        let device = made(1024, false);
        let mut view = device.clone().open_queue().unwrap();
        write(&mut *view, extent(0, 1024), 1).unwrap();
        assert_eq!(device.refused(), None);
        assert_eq!(write(&mut *view, extent(2048, 512), 1), Err(DeviceError::NoSpace));
        assert_eq!(device.refused(), Some(Refused::Quota));
        assert_eq!(read(&mut *view, extent(2048, 512)).unwrap()[0], 0xAB);
        write(&mut *view, extent(0, 512), 2).unwrap();
        assert_eq!(done(&mut *view, Request::Flush).result, Ok(()));
    }

    #[test]
    fn a_damaged_place_is_an_error_and_never_wrong_bytes() {
        let mut view = view(1 << 20);
        assert_eq!(read(&mut *view, extent(4096, 512)), Err(DeviceError::Io));
        write(&mut *view, extent(4096, 512), 3).unwrap();
        assert_eq!(read(&mut *view, extent(4096, 512)).unwrap()[0], 3);
    }
}
