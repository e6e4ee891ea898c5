//! The block device or raw file under the filter: claimed exclusively, opened for direct I/O.
//!
//! Owns the one descriptor that holds the claim and does all I/O, and what the kernel says of the
//! device. Never decides whether a device may be protected (`preflight` does) and never reads or
//! writes content itself, except to probe direct I/O: the rings of the queues do
//! ([`Backing::ring`]).

mod claim;
mod identity;
mod open;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use farshore_extent::{BlockSizes, Extent, VolumeSize};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use crate::control::BackendKind;
use crate::sys::info;
use crate::sys::pool::PoolMemory;
use crate::sys::ring::{Engine, Ring, RingConfig};

pub use identity::{BlockIdentity, FileIdentity, Identity};
pub(crate) use open::{device_numbers, file_block_size, sysfs_name, zoned};

/// What the backing is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Reads and writes, claimed exclusively.
    ReadWrite,
    /// Reads only, claimed exclusively all the same: nobody may change it meanwhile.
    ReadOnly,
}

/// An open backing device. Clones of its parts (rings) keep the claim until the last is dropped.
#[derive(Debug)]
pub struct Backing {
    file: Arc<File>,
    path: PathBuf,
    kind: BackendKind,
    mode: Mode,
    size: RwLock<VolumeSize>,
    blocks: BlockSizes,
    direct: bool,
    volatile_cache: bool,
}

impl Backing {
    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Block device or file.
    #[must_use]
    pub const fn kind(&self) -> BackendKind {
        self.kind
    }

    /// Opened for reading only.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.mode == Mode::ReadOnly
    }

    /// Size in bytes: when it was opened, or as last told by [`Self::set_size`].
    #[must_use]
    pub fn size(&self) -> VolumeSize {
        *self.size.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is used up to `size` from now on, which it has now.
    pub fn set_size(&self, size: VolumeSize) {
        *self.size.write().unwrap_or_else(PoisonError::into_inner) = size;
    }

    /// Block sizes in bytes; the logical one is what direct I/O on it needs.
    #[must_use]
    pub const fn blocks(&self) -> BlockSizes {
        self.blocks
    }

    /// Whether I/O bypasses the page cache.
    #[must_use]
    pub const fn direct(&self) -> bool {
        self.direct
    }

    /// Whether completed writes need a flush to be durable: advertise FLUSH and FUA then.
    #[must_use]
    pub const fn volatile_cache(&self) -> bool {
        self.volatile_cache
    }

    /// Whether ranges can be zeroed and discarded, and read as zero from then on. So for all that
    /// can be written: where the kernel cannot do it, rings write zeroes.
    #[must_use]
    pub fn zeroes(&self) -> bool {
        !self.read_only()
    }

    /// A ring on it for one queue thread. `fixed`: memories to register.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn ring(
        &self,
        depth: u32,
        engine: Engine,
        fixed: Vec<Arc<PoolMemory>>,
    ) -> io::Result<Ring> {
        let config = RingConfig { depth, engine, buffered: !self.direct, fixed };
        Ring::new(Arc::clone(&self.file), config)
    }

    /// Makes everything completed so far durable, the times of a file included; blocks. For
    /// orderly stops; queues use their ring.
    ///
    /// # Errors
    /// Of the device.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Has the kernel forget what it has cached of a block device; blocks. A buffered read of somebody
    /// else that overlapped a direct write of ours may have left the old bytes there, for as long
    /// as anybody has the device open.
    pub fn forget_cached(&self) {
        if self.kind == BackendKind::Block
            && let Err(error) = info::forget_cached(self.file.as_fd())
        {
            tracing::warn!(path = %self.path.display(), %error, "the page cache of a disk stays");
        }
    }

    /// The first allocated range at or after `from`, up to the end of the volume; `None` when only
    /// holes follow. What is not in such a range reads as zero. Ranges are widened to logical
    /// blocks. A block device, or a file system that does not tell, is all data.
    ///
    /// # Errors
    /// Of the file.
    pub fn next_data(&self, from: u64) -> io::Result<Option<Extent>> {
        let end = self.size().get();
        let Some(rest) = Extent::between(from, end) else { return Ok(None) };
        if self.kind == BackendKind::Block {
            return Ok(Some(rest));
        }
        let start = match self.seek(from, Whence::SeekData) {
            Ok(start) => start,
            // No data at or after `from`.
            Err(Errno::ENXIO) => return Ok(None),
            Err(Errno::EINVAL) => return Ok(Some(rest)),
            Err(e) => return Err(e.into()),
        };
        let stop = match self.seek(start, Whence::SeekHole) {
            Ok(stop) => stop,
            // The file shrank meanwhile; reading it will say so.
            Err(Errno::ENXIO) => end,
            Err(e) => return Err(e.into()),
        };
        let unit = u64::from(self.blocks.logical());
        let start = (start - start % unit).max(from);
        Ok(Extent::between(start, stop.next_multiple_of(unit).min(end)))
    }

    /// Whether the file has no data in `part`, which may lie behind the volume's end: it reads as
    /// zeroes. False when nothing tells.
    #[must_use]
    pub fn is_hole(&self, part: Extent) -> bool {
        self.kind == BackendKind::File
            && match self.seek(part.offset(), Whence::SeekData) {
                Ok(data) => data >= part.end(),
                Err(errno) => errno == Errno::ENXIO, // no data from there on
            }
    }

    /// The position is shared by all users of the descriptor, but nobody else uses it: rings and
    /// probes give their own.
    fn seek(&self, from: u64, whence: Whence) -> Result<u64, Errno> {
        let from = i64::try_from(from).map_err(|_| Errno::EINVAL)?;
        let at = lseek(&*self.file, from, whence)?;
        u64::try_from(at).map_err(|_| Errno::EINVAL)
    }

    /// What tells whether somebody changed it behind our back: record it at a clean stop (after
    /// [`Self::sync`], with no I/O under way), compare at the next start (before any write).
    ///
    /// # Errors
    /// When the kernel does not tell; then take it as changed.
    pub fn identity(&self) -> io::Result<Identity> {
        Identity::of(self.file.as_fd(), self.kind, self.size())
    }
}

#[cfg(test)]
mod tests;
