//! The agent's side of a pool: mapped for reading, after checking that it cannot shrink.

use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;

/// Why a descriptor is no pool.
#[derive(Debug, thiserror::Error)]
pub enum PoolMapError {
    /// Not a memfd, or it lacks the seals: whoever made it could shrink it under our feet.
    #[error("the descriptor is not a sealed pool")]
    NotSealed,
    /// The file has another size than announced.
    #[error("a pool of {announced} bytes was announced, the descriptor has {actual}")]
    WrongSize {
        /// Bytes announced.
        announced: u64,
        /// Bytes it has.
        actual: u64,
    },
    /// The mapping failed.
    #[error("cannot map the pool")]
    Map(#[from] io::Error),
}

/// A pool mapped for reading.
pub struct ReadOnlyPool {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a read-only mapping that lives as long as self.
unsafe impl Send for ReadOnlyPool {}
// SAFETY: as above.
unsafe impl Sync for ReadOnlyPool {}

impl ReadOnlyPool {
    /// Maps `announced` bytes of `fd`, which is closed again: the mapping keeps the memory.
    ///
    /// # Errors
    /// [`PoolMapError`]; a short or unsealed descriptor is refused, because reading beyond its end
    /// would kill the process (SIGBUS).
    pub fn map(fd: &OwnedFd, announced: u64) -> Result<Self, PoolMapError> {
        let seals = fcntl(fd, FcntlArg::F_GET_SEALS).map_err(|_| PoolMapError::NotSealed)?;
        if !SealFlag::from_bits_retain(seals).contains(super::pool::POOL_SEALS) {
            return Err(PoolMapError::NotSealed);
        }
        let actual = u64::try_from(fstat(fd).map_err(io::Error::from)?.st_size).unwrap_or(0);
        let len = usize::try_from(announced).ok().and_then(NonZeroUsize::new);
        let len = match len {
            Some(len) if announced == actual => len,
            _ => return Err(PoolMapError::WrongSize { announced, actual }),
        };
        // SAFETY: a fresh read-only mapping of a file that has this size and, being sealed against
        // shrinking and against changing its seals, keeps it.
        let base = unsafe { mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, fd, 0) }
            .map_err(io::Error::from)?;
        Ok(Self { base: base.cast(), len: len.get() })
    }

    /// Size in bytes.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.len as u64
    }

    /// The payload of a fetched record that is not released yet; `None` when it is not inside the
    /// pool.
    ///
    /// `filterd` does not touch these bytes between Fetch and Release. Should it do so all the
    /// same, the bytes are some bytes, and the record's checksum does not agree.
    #[must_use]
    pub fn bytes(&self, offset: u64, len: u64) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        let len = usize::try_from(len).ok()?;
        let end = start.checked_add(len)?;
        if end > self.len {
            return None;
        }
        // SAFETY: inside the mapping (checked above), which lives as long as the borrow; nobody
        // changes these bytes while they are not released (the contract of Fetch and Release).
        Some(unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(start), len) })
    }
}

impl Drop for ReadOnlyPool {
    fn drop(&mut self) {
        // SAFETY: our own mapping; borrows of it have ended. A failure leaves address space behind.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}

impl fmt::Debug for ReadOnlyPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReadOnlyPool({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::super::pool::PoolMemory;
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    #[test]
    fn the_agent_sees_what_the_filter_writes() {
        let pool = PoolMemory::shared(1 << 16).unwrap();
        let reader = ReadOnlyPool::map(&pool.read_only_fd().unwrap(), 1 << 16).unwrap();
        let _first = pool.reserve(5000).unwrap();
        let mut slice = pool.reserve(5000).unwrap();
        slice.bytes_mut().copy_from_slice(&[0xab; 5000]);
        assert_eq!(reader.bytes(slice.offset(), 5000).unwrap(), slice.bytes());
        assert_eq!(reader.capacity(), 1 << 16);
    }

    #[test]
    fn places_outside_the_pool_are_refused() {
        let pool = PoolMemory::shared(4096).unwrap();
        let reader = ReadOnlyPool::map(&pool.read_only_fd().unwrap(), 4096).unwrap();
        assert!(reader.bytes(0, 4096).is_some() && reader.bytes(4096, 0).is_some());
        assert!(reader.bytes(1, 4096).is_none() && reader.bytes(u64::MAX, 1).is_none());
    }

    #[test]
    fn a_short_or_unsealed_descriptor_is_refused() {
        let pool = PoolMemory::shared(4096).unwrap();
        let fd = pool.read_only_fd().unwrap();
        assert!(matches!(
            ReadOnlyPool::map(&fd, 8192),
            Err(PoolMapError::WrongSize { announced: 8192, actual: 4096 })
        ));
        assert!(matches!(ReadOnlyPool::map(&fd, 0), Err(PoolMapError::WrongSize { .. })));
        let loose = memfd_create(c"loose", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&loose, 4096).unwrap();
        assert!(matches!(ReadOnlyPool::map(&loose, 4096), Err(PoolMapError::NotSealed)));
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        assert!(matches!(ReadOnlyPool::map(&file, 4096), Err(PoolMapError::NotSealed)));
    }
}
