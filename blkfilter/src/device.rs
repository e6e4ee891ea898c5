//! The seam between front ends and what they serve: the filter on the source, a view on the target.
//!
//! It fits ublk's pinned queue threads as well as sockets. One [`Queue`] belongs to one thread for
//! life. A front end reserves a [`Slot`] *before* the payload arrives, lets the kernel or the
//! socket write straight into it, and submits; so no payload is copied on the way to the backing
//! device and to the log. Completions are reaped on the same thread, which answers the guest.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use farshore_extent::{BlockSizes, Extent, VolumeSize};

/// Largest payload of one request at this seam, in bytes; front ends cut larger ones. Equal to the
/// largest payload of a record.
pub const MAX_PAYLOAD: usize = farshore_changelog::limits::MAX_RECORD_PAYLOAD;

/// What a device is, for the front end to advertise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Size in bytes.
    pub size: VolumeSize,
    /// Logical and physical block size in bytes.
    pub blocks: BlockSizes,
    /// Writes are refused with [`DeviceError::ReadOnly`].
    pub read_only: bool,
    /// Whether zero and discard are possible and deterministic (the range then reads as zero).
    pub zeroes: bool,
    /// Whether FLUSH and FUA mean something (volatile cache below). Advertise exactly this.
    pub volatile_cache: bool,
}

/// Why a request failed; front ends translate it into their protocol's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// EIO.
    #[error("input/output error")]
    Io,
    /// ENOSPC.
    #[error("no space left")]
    NoSpace,
    /// EINVAL: out of range or not aligned to the logical block size.
    #[error("invalid request")]
    Invalid,
    /// EPERM.
    #[error("read-only device")]
    ReadOnly,
    /// ENOMEM: no buffer could be reserved.
    #[error("out of buffers")]
    NoMemory,
    /// ESHUTDOWN: the device is being detached.
    #[error("device is shutting down")]
    Shutdown,
}

/// Chosen by the front end; comes back with the completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u64);

/// A private buffer of one request, reserved from its queue. Only its queue knows what is behind.
/// A slot given to [`Queue::submit`] belongs to the queue again.
#[derive(Debug, PartialEq, Eq)]
pub struct Slot {
    /// Meaning private to the queue (offset in the pool, index of a buffer).
    pub key: u64,
    /// Length in bytes, 1..=[`MAX_PAYLOAD`].
    pub len: u32,
}

/// One request. Extents are aligned to the logical block size and inside the device: the front end
/// has checked with [`check_request`].
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// Read into the slot; it comes back with the completion.
    Read {
        /// Where.
        extent: Extent,
        /// Filled by the device.
        slot: Slot,
    },
    /// Write the slot's bytes.
    Write {
        /// Where.
        extent: Extent,
        /// Filled by the front end.
        slot: Slot,
        /// Durable before the completion.
        fua: bool,
    },
    /// Make the range read as zero.
    Zero {
        /// Where; at most 64 MiB, front ends cut larger ones.
        extent: Extent,
        /// Durable before the completion.
        fua: bool,
        /// The space may be given back (trim, or write-zeroes without NO_HOLE).
        may_unmap: bool,
    },
    /// All writes completed before this was submitted, on any queue, are durable at its completion.
    Flush,
}

/// The outcome of one request.
#[derive(Debug)]
pub struct Completion {
    /// As submitted.
    pub tag: Tag,
    /// How it ended.
    pub result: Result<(), DeviceError>,
    /// For reads: the slot with the bytes (also after an error). Give it back with
    /// [`Queue::release`].
    pub slot: Option<Slot>,
}

/// Kind of buffer wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotUse {
    /// Payload of a write: from the capture pool, or a private spare when the pool is full.
    Write,
    /// Destination of a read.
    Read,
}

/// One thread's way into a device.
pub trait Queue: Send {
    /// Reserves a private buffer of `len` bytes, aligned for direct I/O.
    ///
    /// # Errors
    /// [`DeviceError::NoMemory`] when every buffer is in use: the front end then stops taking
    /// requests until a completion frees one. A full capture pool is *not* such an error.
    fn reserve(&mut self, len: u32, purpose: SlotUse) -> Result<Slot, DeviceError>;

    /// The bytes of a reserved slot.
    fn bytes(&mut self, slot: &Slot) -> &mut [u8];

    /// Gives back a slot that was not submitted, or that came back with a read.
    fn release(&mut self, slot: Slot);

    /// Takes a request. It may be completed already when this returns.
    fn submit(&mut self, tag: Tag, request: Request);

    /// Hands everything submitted to the kernel (one system call for all) and appends finished
    /// requests to `out`. Never blocks.
    fn reap(&mut self, out: &mut Vec<Completion>);

    /// Readable when [`Self::reap`] has something to say. For poll together with the front end's
    /// own descriptor.
    fn wake_fd(&self) -> BorrowedFd<'_>;

    /// Requests submitted and not yet reaped.
    fn in_flight(&self) -> usize;
}

/// What is known about the allocation of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    /// Bytes this answer is about.
    pub len: u64,
    /// Nothing is allocated there.
    pub hole: bool,
    /// It reads as zero.
    pub zero: bool,
}

/// What front ends serve.
pub trait Device: Send + Sync + 'static {
    /// What it is. May change its size while open.
    fn info(&self) -> DeviceInfo;

    /// A way in for the calling thread.
    ///
    /// # Errors
    /// [`DeviceError`] when the device is being detached or out of resources.
    fn open_queue(self: Arc<Self>) -> Result<Box<dyn Queue>, DeviceError>;

    /// Allocation of `extent`, in consecutive pieces that cover it; at most `max` of them (the
    /// answer may then end early). "Everything is data" is always a right answer.
    fn allocation(&self, extent: Extent, max: usize) -> Vec<Allocation> {
        let _ = max;
        vec![Allocation { len: extent.len(), hole: false, zero: false }]
    }
}

/// Checks a request's range: inside the device, aligned to logical blocks, not empty.
///
/// # Errors
/// [`DeviceError::Invalid`].
pub fn check_request(info: &DeviceInfo, offset: u64, len: u64) -> Result<Extent, DeviceError> {
    let extent = Extent::new(offset, len).map_err(|_| DeviceError::Invalid)?;
    let inside = info.size.extent().contains(extent);
    let aligned = extent.is_aligned_to(u64::from(info.blocks.logical()));
    if inside && aligned { Ok(extent) } else { Err(DeviceError::Invalid) }
}
