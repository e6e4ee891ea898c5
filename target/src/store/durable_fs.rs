//! Real files: the only module of the store that touches the file system, and the only one that
//! renames.
//!
//! Journal files are written O_DIRECT|O_DSYNC (3.5 times the speed of buffered + fdatasync) and
//! read through the page cache by a second descriptor; where O_DIRECT is not possible (tmpfs)
//! they are written buffered and synced after each write.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use farshore_extent::Extent;
use nix::errno::Errno;
use nix::fcntl::PosixFadviseAdvice as Advice;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, OFlag, fallocate, posix_fadvise};
use nix::unistd::{Whence, lseek};

use super::disk::{ALIGN, AlignedBuf, Disk, DiskFile, FileKind, Stretch};

/// Locked while somebody has the store.
pub(super) const LOCK: &str = "lock";

/// One directory of the file system.
#[derive(Debug, Clone)]
pub struct FileDisk {
    dir: PathBuf,
    direct: bool,
}

impl FileDisk {
    /// The directory `dir`, made if it is missing (readable by its owner only).
    ///
    /// # Errors
    /// As they come.
    pub fn open(dir: impl Into<PathBuf>) -> io::Result<Self> {
        let dir = dir.into();
        if !dir.is_dir() {
            use std::os::unix::fs::DirBuilderExt;
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
            if let Some(parent) = dir.parent().filter(|p| !p.as_os_str().is_empty()) {
                File::open(parent)?.sync_all()?;
            }
        }
        Ok(Self { dir, direct: true })
    }

    /// The same without direct I/O: for comparisons.
    #[must_use]
    pub fn buffered(mut self) -> Self {
        self.direct = false;
        self
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn file(&self, file: File, name: &str, kind: FileKind) -> io::Result<Arc<dyn DiskFile>> {
        let mut direct = None;
        if kind == FileKind::Journal {
            // Readahead would only fetch what is about to be written directly.
            let _ = posix_fadvise(&file, 0, 0, Advice::POSIX_FADV_RANDOM);
            // After a failed sync the page cache may show what never reached the medium.
            let _ = posix_fadvise(&file, 0, 0, Advice::POSIX_FADV_DONTNEED);
            let flags = (OFlag::O_DIRECT | OFlag::O_DSYNC).bits();
            let mut options = OpenOptions::new();
            options.write(true).custom_flags(flags);
            // EINVAL: this file system has no direct I/O (tmpfs); buffered + sync then.
            if self.direct {
                direct = options.open(self.dir.join(name)).ok();
            }
        }
        Ok(Arc::new(RealFile { file, direct }))
    }
}

impl Disk for FileDisk {
    fn lock(&self) -> io::Result<Box<dyn Send>> {
        let path = self.dir.join(LOCK);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut held) => {
                held.set_len(0)?;
                writeln!(held, "pid {}", std::process::id())?;
                Ok(Box::new(held))
            }
            Err((file, Errno::EAGAIN)) => Err(held(&path, &file)),
            Err((_, errno)) => Err(errno.into()),
        }
    }

    fn create(&self, name: &str, kind: FileKind) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        self.file(options.open(self.dir.join(name))?, name, kind)
    }

    fn open(&self, name: &str, kind: FileKind) -> io::Result<Arc<dyn DiskFile>> {
        let file = OpenOptions::new().read(true).write(true).open(self.dir.join(name))?;
        self.file(file, name, kind)
    }

    fn delete(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.dir.join(name))
    }

    #[allow(clippy::disallowed_methods)] // the caller syncs the directory: Disk::rename says so
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.dir.join(from), self.dir.join(to))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let names = std::fs::read_dir(&self.dir)?
            .map(|entry| entry.map(|e| e.file_name().to_string_lossy().into_owned()));
        let mut names = names.collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }
}

struct RealFile {
    /// Reads, and writes that a sync makes durable.
    file: File,
    /// Writes that are durable when they return.
    direct: Option<File>,
}

impl DiskFile for RealFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, at)
    }

    fn write_at(&self, buf: &[u8], at: u64) -> io::Result<()> {
        self.file.write_all_at(buf, at)
    }

    fn write_durable(&self, buf: &[u8], at: u64) -> io::Result<()> {
        let Some(direct) = &self.direct else {
            self.file.write_all_at(buf, at)?;
            return self.file.sync_data();
        };
        if buf.as_ptr().align_offset(ALIGN) == 0 {
            return direct.write_all_at(buf, at);
        }
        let mut aligned = AlignedBuf::with_capacity(buf.len());
        aligned.push_padded(buf);
        direct.write_all_at(&aligned.as_slice()[..buf.len()], at)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn punch(&self, extent: Extent) -> io::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, flags, signed(extent.offset())?, signed(extent.len())?)?;
        Ok(())
    }

    fn stretch(&self, extent: Extent) -> io::Result<Stretch> {
        stretch(&self.file, extent)
    }
}

/// The hole or data that begins at the start of `extent`.
pub(crate) fn stretch(file: &File, extent: Extent) -> io::Result<Stretch> {
    let from = signed(extent.offset())?;
    let data = match lseek(file, from, Whence::SeekData) {
        Ok(at) => u64::try_from(at).unwrap_or(extent.end()),
        Err(Errno::ENXIO) => return Ok(Stretch { hole: true, end: extent.end() }),
        Err(Errno::EINVAL) => return Ok(Stretch { hole: false, end: extent.end() }),
        Err(e) => return Err(e.into()),
    };
    if data > extent.offset() {
        return Ok(Stretch { hole: true, end: data.min(extent.end()) });
    }
    let hole = lseek(file, from, Whence::SeekHole)?;
    let hole = u64::try_from(hole).unwrap_or(extent.end());
    Ok(Stretch { hole: false, end: hole.min(extent.end()) })
}

/// Why the lock cannot be had: who has it.
pub(super) fn held(path: &Path, file: &File) -> io::Error {
    let mut holder = String::new();
    let _ = file.take(64).read_to_string(&mut holder);
    // The file names the last writer; somebody who only looks writes nothing.
    let alive = holder.trim().strip_prefix("pid ");
    let alive = alive.is_some_and(|pid| Path::new("/proc").join(pid).exists());
    let holder = if alive { holder.trim() } else { "a program that looks into the store" };
    let text = format!("{} is held by {holder}", path.display());
    io::Error::new(io::ErrorKind::WouldBlock, text)
}

fn signed(n: u64) -> io::Result<i64> {
    i64::try_from(n).map_err(|_| io::ErrorKind::InvalidInput.into())
}
