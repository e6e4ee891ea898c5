//! Memory for payload: the capture pool shared with the agent, and private arenas for reads.
//!
//! Who holds which part is decided by [`PoolSpace`] under a lock; a [`PoolSlice`] is the token of
//! one such part. It can be neither copied nor forged, so threads fill their slices side by side
//! without a lock, and dropping a slice gives the part back.

use std::fmt;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

mod claims;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::pool::{POOL_UNIT, PoolRange, PoolSpace};
use claims::Claims;

/// Seals every pool carries once it is complete: its size is fixed for ever, and nobody else can
/// map it writable or write to it.
pub(super) const POOL_SEALS: SealFlag = SealFlag::F_SEAL_SHRINK
    .union(SealFlag::F_SEAL_GROW)
    .union(SealFlag::F_SEAL_SEAL)
    .union(SealFlag::F_SEAL_FUTURE_WRITE);

/// `MFD_NOEXEC_SEAL`: never executable; not named by nix yet.
const NOEXEC_SEAL: MFdFlags = MFdFlags::from_bits_retain(0x0008);

/// A mapping of page-aligned memory, with its allocator.
pub struct PoolMemory {
    base: NonNull<u8>,
    len: usize,
    /// The sealed memfd of a shared pool.
    fd: Option<OwnedFd>,
    room: Room,
}

/// Who decides where a slice lies.
enum Room {
    /// The allocator here.
    Given(Mutex<PoolSpace>),
    /// The capture core; here it is only made sure that no two slices overlap.
    Claimed(Claims),
}

// SAFETY: the mapping lives as long as self and stays where it is. Bytes are reached through
// PoolSlices only, which never overlap (PoolSpace, Claims), so threads never race on a byte.
unsafe impl Send for PoolMemory {}
// SAFETY: as above; the allocator has a lock of its own.
unsafe impl Sync for PoolMemory {}

impl PoolMemory {
    /// A pool of `bytes` (rounded up to whole pages) in a sealed memfd that an agent can map.
    ///
    /// # Errors
    /// Of the kernel: no memory, too many descriptors; `InvalidInput` for a size of zero or
    /// beyond the address space.
    pub fn shared(bytes: u64) -> io::Result<Arc<Self>> {
        let len = page_len(bytes)?;
        Self::memfd(len, Room::given(len))
    }

    /// The same, without an allocator: the caller chooses places with [`Self::claim`].
    ///
    /// # Errors
    /// As for [`Self::shared`].
    pub fn shared_for_claims(bytes: u64) -> io::Result<Arc<Self>> {
        let len = page_len(bytes)?;
        Self::memfd(len, Room::Claimed(Claims::new(len.get() as u64)))
    }

    fn memfd(len: NonZeroUsize, room: Room) -> io::Result<Arc<Self>> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let fd = memfd_create(c"farshore-pool", flags | NOEXEC_SEAL)
            // The flag is unknown before Linux 6.3.
            .or_else(|_| memfd_create(c"farshore-pool", flags))?;
        let file = File::from(fd);
        file.set_len(len.get() as u64)?;
        // SAFETY: a fresh shared mapping of a file of exactly this size; the kernel chooses the
        // address, so nothing existing is replaced.
        let base = unsafe {
            mmap(
                None,
                len,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                &file,
                0,
            )
        }?;
        let fd = Some(OwnedFd::from(file));
        let memory = Self { base: base.cast(), len: len.get(), fd, room };
        // Guests' data does not belong into a core dump. SAFETY: the mapping just made; the advice
        // changes nothing about its bytes.
        unsafe { madvise(base, len.get(), MmapAdvise::MADV_DONTDUMP) }?;
        if let Some(fd) = &memory.fd {
            fcntl(fd, FcntlArg::F_ADD_SEALS(POOL_SEALS))?;
        }
        Ok(Arc::new(memory))
    }

    /// An arena of `bytes` (rounded up to whole pages) that only this process sees: destinations
    /// of reads, spare buffers of writes when the pool is full.
    ///
    /// # Errors
    /// As for [`Self::shared`].
    pub fn private(bytes: u64) -> io::Result<Arc<Self>> {
        let len = page_len(bytes)?;
        // SAFETY: a fresh anonymous mapping at an address the kernel chooses.
        let base = unsafe {
            mmap_anonymous(
                None,
                len,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE,
            )
        }?;
        // SAFETY: as for the shared pool.
        unsafe { madvise(base, len.get(), MmapAdvise::MADV_DONTDUMP) }?;
        let room = Room::given(len);
        Ok(Arc::new(Self { base: base.cast(), len: len.get(), fd: None, room }))
    }

    /// Size in bytes.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.len as u64
    }

    /// Bytes in slices, each rounded up to [`POOL_UNIT`].
    #[must_use]
    pub fn used(&self) -> u64 {
        match &self.room {
            Room::Given(space) => lock(space).used(),
            Room::Claimed(claims) => claims.used(),
        }
    }

    /// A slice of exactly `len` bytes, aligned to [`POOL_UNIT`]; `None` when the pool is full.
    /// Its content is whatever was there before.
    #[must_use]
    pub fn reserve(self: &Arc<Self>, len: u32) -> Option<PoolSlice> {
        let Room::Given(space) = &self.room else { return None };
        let range = lock(space).reserve(u64::from(len))?;
        let (offset, range) = (range.offset(), Some(range));
        Some(PoolSlice { memory: Arc::clone(self), offset, range, len: len as usize })
    }

    /// The slice at a place of the caller's choosing, aligned to [`POOL_UNIT`]; `None` when a part
    /// of it is in another slice, it is not inside, or the memory has an allocator of its own.
    #[must_use]
    pub fn claim(self: &Arc<Self>, offset: u64, len: u32) -> Option<PoolSlice> {
        let Room::Claimed(claims) = &self.room else { return None };
        claims.take(offset, u64::from(len)).then(|| PoolSlice {
            memory: Arc::clone(self),
            offset,
            range: None,
            len: len as usize,
        })
    }

    /// The pool's descriptor, opened again for reading only, to hand to the agent. `Unsupported`
    /// for a private arena.
    ///
    /// # Errors
    /// When `/proc` is not mounted, or out of descriptors.
    pub fn read_only_fd(&self) -> io::Result<OwnedFd> {
        let fd = self.fd.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
        Ok(File::open(path)?.into())
    }

    /// Address and length, for the ring to register.
    pub(super) fn mapping(&self) -> (NonNull<u8>, usize) {
        (self.base, self.len)
    }
}

impl Drop for PoolMemory {
    fn drop(&mut self) {
        // SAFETY: our own mapping; every slice holds an Arc of self, so none is left.
        // A failure here would leave address space behind, which harms nobody.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}

impl fmt::Debug for PoolMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PoolMemory({} of {} bytes used)", self.used(), self.len)
    }
}

impl Room {
    fn given(len: NonZeroUsize) -> Self {
        Self::Given(Mutex::new(PoolSpace::new(len.get() as u64)))
    }
}

fn lock(space: &Mutex<PoolSpace>) -> MutexGuard<'_, PoolSpace> {
    // The allocator is consistent between its calls; a panic elsewhere cannot break it.
    space.lock().unwrap_or_else(PoisonError::into_inner)
}

fn page_len(bytes: u64) -> io::Result<NonZeroUsize> {
    bytes
        .checked_next_multiple_of(POOL_UNIT)
        .filter(|&rounded| i64::try_from(rounded).is_ok())
        .and_then(|rounded| usize::try_from(rounded).ok())
        .and_then(NonZeroUsize::new)
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Exclusive part of a [`PoolMemory`]. Dropping it gives the part back, so a record that is not
/// released yet keeps its slice.
pub struct PoolSlice {
    memory: Arc<PoolMemory>,
    offset: u64,
    /// Present until drop when the memory's allocator gave it.
    range: Option<PoolRange>,
    len: usize,
}

impl PoolSlice {
    /// Byte offset in the pool.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Length in bytes, as asked for.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.len
    }

    pub(super) fn address(&self) -> NonNull<u8> {
        // The offset of a range is below the length of the mapping, which is a usize.
        let offset = usize::try_from(self.offset()).unwrap_or(0);
        // SAFETY: PoolSpace and Claims hand out ranges inside 0..len only, so this stays in the mapping.
        unsafe { self.memory.base.add(offset) }
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `len` mapped bytes that only this slice reaches; changed through &mut self only.
        unsafe { std::slice::from_raw_parts(self.address().as_ptr(), self.len) }
    }

    /// The bytes, to fill. Not after the place was told to the agent: it reads them.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive in this process.
        unsafe { std::slice::from_raw_parts_mut(self.address().as_ptr(), self.len) }
    }
}

impl Drop for PoolSlice {
    fn drop(&mut self) {
        match (&self.memory.room, self.range.take()) {
            (Room::Given(space), Some(range)) => lock(space).give_back(range),
            (Room::Given(_), None) => {}
            (Room::Claimed(claims), _) => claims.give_back(self.offset, self.len as u64),
        }
    }
}

impl fmt::Debug for PoolSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PoolSlice({}+{})", self.offset(), self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::fstat;
    use std::os::unix::fs::FileExt;

    #[test]
    fn slices_are_aligned_disjoint_and_given_back_on_drop() {
        let pool = PoolMemory::shared(64 << 10).unwrap();
        let mut held: Vec<_> = (0..16).map(|_| pool.reserve(100).unwrap()).collect();
        assert!(pool.reserve(1).is_none());
        for (n, slice) in held.iter_mut().enumerate() {
            assert!(slice.bytes().as_ptr().addr().is_multiple_of(4096));
            slice.bytes_mut().fill(u8::try_from(n).unwrap());
        }
        for (n, slice) in held.iter().enumerate() {
            assert!(slice.bytes().iter().all(|&b| usize::from(b) == n));
        }
        drop(held);
        assert_eq!(pool.used(), 0);
        assert_eq!(pool.reserve(64 << 10).unwrap().len(), 64 << 10);
    }

    #[test]
    fn threads_fill_their_slices_side_by_side() {
        let pool = PoolMemory::private(1 << 20).unwrap();
        std::thread::scope(|scope| {
            for id in 0..4u8 {
                let pool = &pool;
                scope.spawn(move || {
                    for round in 0..200u32 {
                        let Some(mut slice) = pool.reserve(1 + (round * 977) % 60_000) else {
                            continue;
                        };
                        slice.bytes_mut().fill(id);
                        assert!(slice.bytes().iter().all(|&b| b == id));
                    }
                });
            }
        });
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn a_sealed_pool_cannot_be_resized_or_written_by_others() {
        let pool = PoolMemory::shared(1 << 16).unwrap();
        let fd = pool.fd.as_ref().unwrap();
        let other = File::from(fd.try_clone().unwrap());
        assert!(other.set_len(1).is_err() && other.set_len(1 << 20).is_err());
        assert!(other.write_at(b"x", 0).is_err());
        assert!(fcntl(fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_err());
        let reader = File::from(pool.read_only_fd().unwrap());
        assert!(reader.write_at(b"x", 0).is_err());
        assert_eq!(fstat(&reader).unwrap().st_size, 1 << 16);
        let mut slice = pool.reserve(4096).unwrap();
        slice.bytes_mut().fill(9);
        let mut seen = [0; 4096];
        reader.read_exact_at(&mut seen, slice.offset()).unwrap();
        assert!(seen.iter().all(|&b| b == 9));
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(PoolMemory::shared(0).is_err());
        assert!(PoolMemory::private(u64::MAX).is_err());
    }
}
