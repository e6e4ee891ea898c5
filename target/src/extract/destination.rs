//! Where an image goes: a file that gets its name when it is whole, or a block device that nobody
//! uses.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use farshore_blkfilter::frontend::users::Users;
use farshore_extent::{Extent, Problem};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, PosixFadviseAdvice, fallocate, posix_fadvise};

use super::problem;
use crate::durable_fs;
use crate::store::{ImageSink, same_file};

/// Written bytes are made durable after so many: progress is then true, and an error early.
const SYNC_EVERY: u64 = 256 << 20;

/// Zeroes are written at most so many at once, in bytes.
const ZERO_PIECE: u64 = 1 << 20;

/// A place that can take the image.
#[derive(Debug)]
pub enum Destination {
    /// An image file, new or in place of one that exists.
    File {
        /// Its name.
        path: PathBuf,
        /// There is one that will be replaced.
        replaces: bool,
    },
    /// A block device, claimed.
    Device {
        /// Its node.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
        /// It is open for us alone.
        file: File,
    },
}

impl Destination {
    /// Looks at `to`, which shall take `bytes`, and claims it if it is a device. Changes nothing.
    ///
    /// # Errors
    /// FS-6703 and FS-6704, each a reason not to use it.
    pub fn find(to: &Path, store: &Path, bytes: u64) -> Result<Self, Problem> {
        let bad = |why: &dyn std::fmt::Display| problem::bad_destination(to, why);
        let metadata = match std::fs::metadata(to) {
            Ok(metadata) => Some(metadata),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(bad(&e)),
        };
        match metadata.map(|m| m.file_type()) {
            Some(kind) if kind.is_block_device() => Self::device(to, bytes),
            Some(kind) if !kind.is_file() => Err(bad(&"it is neither a file nor a block device")),
            there => {
                let replaces = there.is_some();
                // What a link names is replaced, not the link.
                let path = if replaces { std::fs::canonicalize(to) } else { Ok(to.to_owned()) };
                let path = path.map_err(|e| bad(&e))?;
                let Some(name) = path.file_name() else { return Err(bad(&"it has no name")) };
                let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
                let dir = std::fs::canonicalize(dir.unwrap_or(Path::new(".")));
                let dir = dir.map_err(|e| bad(&format!("its directory: {e}")))?;
                if dir.ancestors().any(|above| same_file(above, store)) {
                    return Err(bad(&"it lies in the store itself, which is never written to"));
                }
                Ok(Self::File { path: dir.join(name), replaces })
            }
        }
    }

    fn device(to: &Path, needed: u64) -> Result<Self, Problem> {
        let bad = |e: io::Error| problem::bad_destination(to, e);
        let node = std::fs::canonicalize(to).map_err(bad)?;
        let users = Users::of_device(&node);
        if !users.only_passing() {
            return Err(problem::device(to, users));
        }
        let exclusive = (OFlag::O_EXCL | OFlag::O_CLOEXEC).bits();
        let opened = OpenOptions::new().read(true).write(true).custom_flags(exclusive).open(&node);
        let mut file = opened.map_err(|e| match e.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EBUSY) => problem::device(to, "the kernel has claimed it"),
            _ => bad(e),
        })?;
        let bytes = file.seek(SeekFrom::End(0)).map_err(bad)?;
        if bytes < needed {
            let why = format!("it has {bytes} bytes, and the volume had {needed}");
            return Err(problem::device(to, why));
        }
        Ok(Self::Device { path: to.to_owned(), bytes, file })
    }

    /// As it was named.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::File { path, .. } | Self::Device { path, .. } => path,
        }
    }

    /// Ready to take `bytes`.
    pub(super) fn begin(self, bytes: u64) -> io::Result<Box<dyn Image>> {
        match self {
            Self::File { path, .. } => Ok(Box::new(FileImage::begin(path, bytes)?)),
            Self::Device { file, .. } => Ok(Box::new(DeviceImage { file, written: 0 })),
        }
    }
}

/// An image being written.
pub(super) trait Image: ImageSink {
    fn is_file(&self) -> bool;
    /// Durable when this returns.
    fn sync(&self) -> io::Result<()>;
    /// Of its first `bytes`, read from the medium.
    fn digest(&self, bytes: u64) -> io::Result<blake3::Hash>;
    /// It is whole.
    fn finish(self: Box<Self>) -> io::Result<()>;
}

/// Beside its name until it is whole; gone if it never is.
struct FileImage {
    path: PathBuf,
    aside: PathBuf,
    file: File,
    written: u64,
    whole: bool,
}

impl FileImage {
    fn begin(path: PathBuf, bytes: u64) -> io::Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let aside = path.with_file_name(format!(".{name}.new"));
        match std::fs::remove_file(&aside) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&aside)?;
        let image = Self { path, aside, file, written: 0, whole: false };
        image.file.set_len(bytes)?;
        Ok(image)
    }
}

impl Drop for FileImage {
    fn drop(&mut self) {
        if !self.whole {
            // The error that ended it is the one to tell.
            let _ = std::fs::remove_file(&self.aside);
        }
    }
}

impl ImageSink for FileImage {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        write(&self.file, &mut self.written, offset, bytes)
    }

    /// A new file is a hole where nothing was written.
    fn zero(&mut self, _: Extent) -> io::Result<()> {
        Ok(())
    }
}

impl Image for FileImage {
    fn is_file(&self) -> bool {
        true
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn digest(&self, bytes: u64) -> io::Result<blake3::Hash> {
        digest(&self.file, bytes)
    }

    fn finish(mut self: Box<Self>) -> io::Result<()> {
        durable_fs::rename(&self.aside, &self.path)?;
        self.whole = true;
        Ok(())
    }
}

struct DeviceImage {
    file: File,
    written: u64,
}

impl ImageSink for DeviceImage {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        write(&self.file, &mut self.written, offset, bytes)
    }

    /// By the device if it can, so that one of thin provisioning stays thin.
    fn zero(&mut self, extent: Extent) -> io::Result<()> {
        let signed = |n: u64| i64::try_from(n).map_err(io::Error::other);
        let (offset, len) = (signed(extent.offset())?, signed(extent.len())?);
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for how in [FallocateFlags::FALLOC_FL_PUNCH_HOLE, FallocateFlags::FALLOC_FL_ZERO_RANGE] {
            if fallocate(&self.file, how | keep, offset, len).is_ok() {
                return Ok(());
            }
        }
        for piece in extent.split_at_multiples_of(ZERO_PIECE) {
            let zeroes = vec![0; usize::try_from(piece.len()).unwrap_or(0)];
            write(&self.file, &mut self.written, piece.offset(), &zeroes)?;
        }
        Ok(())
    }
}

impl Image for DeviceImage {
    fn is_file(&self) -> bool {
        false
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn digest(&self, bytes: u64) -> io::Result<blake3::Hash> {
        digest(&self.file, bytes)
    }

    fn finish(self: Box<Self>) -> io::Result<()> {
        Ok(())
    }
}

fn write(file: &File, written: &mut u64, offset: u64, bytes: &[u8]) -> io::Result<()> {
    file.write_all_at(bytes, offset)?;
    *written += bytes.len() as u64;
    if *written >= SYNC_EVERY {
        *written = 0;
        file.sync_data()?;
        forget_cached(file);
    }
    Ok(())
}

fn forget_cached(file: &File) {
    // Only memory is at stake, and that what is read back comes from the medium.
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

fn digest(file: &File, bytes: u64) -> io::Result<blake3::Hash> {
    forget_cached(file);
    let mut from = file;
    from.seek(SeekFrom::Start(0))?;
    let mut reader = from.take(bytes);
    let mut hasher = blake3::Hasher::new();
    let mut buf = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let len = reader.read(&mut buf)?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        hasher.update(&buf[..len]);
        left -= len as u64;
    }
    Ok(hasher.finalize())
}
