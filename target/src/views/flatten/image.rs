//! The image that a view is flattened into: a raw sparse file, which gets its name when it is whole,
//! or a block device. Afterwards it is what the view is made of.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use farshore_extent::{Extent, Problem, ViewId};
use nix::fcntl::{FallocateFlags, OFlag, PosixFadviseAdvice, fallocate, posix_fadvise};

use crate::extract::Destination;
use crate::store::stretch;
use crate::{durable_fs, problem};

/// Read or zeroed by hand at once, in bytes.
const PIECE: u64 = 1 << 20;

/// What may lie where an image is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::views) enum Begin {
    /// Nothing.
    Empty,
    /// What was begun before.
    Resume,
    /// Anything.
    Force,
}

/// An image that is open for writing.
#[derive(Debug)]
pub(in crate::views) struct Image {
    file: File,
    /// Where it will be, or is.
    path: PathBuf,
    /// Its name until it is whole; none for a device.
    aside: Option<PathBuf>,
    /// The first failed sync: nothing more is taken.
    failed: OnceLock<String>,
}

impl Image {
    /// Begins an image of `size` bytes at `to`, or goes on with the one that was begun for this view.
    /// Something else that lies there is replaced only by [`Begin::Force`].
    ///
    /// # Errors
    /// FS-6703, FS-6704, FS-6622.
    pub(in crate::views) fn begin(
        to: &Path,
        data: &Path,
        (view, size): (ViewId, u64),
        how: Begin,
    ) -> Result<Self, Problem> {
        let failed = |e| problem::flatten_cannot_write(to, &e);
        match Destination::find(to, data, size)? {
            Destination::File { path, replaces } => {
                if replaces && how != Begin::Force {
                    return Err(problem::flatten_not_empty(to));
                }
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let aside = path.with_file_name(format!(".{name}.{view}.part"));
                let mut options = OpenOptions::new();
                options.read(true).write(true).create(true).truncate(false).mode(0o600);
                let file = options.open(&aside).map_err(failed)?;
                file.set_len(size).map_err(failed)?;
                Ok(Self { file, path, aside: Some(aside), failed: OnceLock::new() })
            }
            Destination::Device { path, file, .. } => {
                let image = Self { file, path, aside: None, failed: OnceLock::new() };
                if how == Begin::Empty && !image.looks_empty(size).map_err(failed)? {
                    return Err(problem::flatten_not_empty(to));
                }
                Ok(image)
            }
        }
    }

    /// Opens the image that a view is made of.
    ///
    /// # Errors
    /// Of the file system; `InvalidData` when it is shorter than the view.
    pub(in crate::views) fn open(path: &Path, size: u64) -> io::Result<Self> {
        // A device is ours alone.
        let exclusive = (OFlag::O_EXCL | OFlag::O_CLOEXEC).bits();
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).custom_flags(exclusive).open(path)?;
        let mut end = &file;
        if io::Seek::seek(&mut end, io::SeekFrom::End(0))? < size {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is shorter than the view"));
        }
        Ok(Self { file, path: path.to_owned(), aside: None, failed: OnceLock::new() })
    }

    /// Whether the places where file systems and partition tables begin and end hold zeroes.
    fn looks_empty(&self, size: u64) -> io::Result<bool> {
        let ends = [
            Extent::between(0, size.min(PIECE)),
            Extent::between(size.saturating_sub(PIECE), size),
        ];
        for end in ends.into_iter().flatten() {
            if !self.is_zero(end)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Where it will be, or is.
    pub(in crate::views) fn path(&self) -> &Path {
        &self.path
    }

    /// The device number of the file system that a file lies on.
    pub(in crate::views) fn file_system(&self) -> Option<u64> {
        self.aside.as_ref()?;
        self.file.metadata().ok().map(|m| m.dev())
    }

    /// Why it takes no more writes, if a sync has failed.
    pub(in crate::views) fn failed(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    fn check_alive(&self) -> io::Result<()> {
        self.failed.get().map_or(Ok(()), |first| Err(io::Error::other(first.clone())))
    }

    pub(in crate::views) fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, offset)
    }

    pub(in crate::views) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check_alive()?;
        self.file.write_all_at(bytes, offset)
    }

    /// Makes a range read as zero; as a hole where that is possible.
    pub(in crate::views) fn zero(&self, extent: Extent) -> io::Result<()> {
        self.check_alive()?;
        if stretch(&self.file, extent).is_ok_and(|s| s.hole && s.end >= extent.end()) {
            return Ok(());
        }
        let signed = |n: u64| i64::try_from(n).map_err(io::Error::other);
        let (offset, len) = (signed(extent.offset())?, signed(extent.len())?);
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for how in [FallocateFlags::FALLOC_FL_PUNCH_HOLE, FallocateFlags::FALLOC_FL_ZERO_RANGE] {
            if fallocate(&self.file, how | keep, offset, len).is_ok() {
                return Ok(());
            }
        }
        for piece in extent.split_at_multiples_of(PIECE) {
            let zeroes = vec![0; usize::try_from(piece.len()).unwrap_or(0)];
            self.file.write_all_at(&zeroes, piece.offset())?;
        }
        Ok(())
    }

    /// Whether a range reads as zero.
    pub(in crate::views) fn is_zero(&self, extent: Extent) -> io::Result<bool> {
        let mut at = extent.offset();
        let mut bytes = Vec::new();
        while let Some(rest) = Extent::between(at, extent.end()) {
            // A block device has no holes to ask for.
            let here = stretch(&self.file, rest).ok().filter(|s| s.end > at);
            let (hole, end) = here.map_or((false, rest.end()), |s| (s.hole, s.end));
            if hole {
                at = end;
                continue;
            }
            let end = end.min(at + PIECE);
            bytes.resize(usize::try_from(end - at).unwrap_or(0), 0);
            self.read(at, &mut bytes)?;
            if bytes.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            at = end;
        }
        Ok(true)
    }

    /// What was written before is durable when this returns. After an error nothing more is taken.
    pub(in crate::views) fn sync(&self) -> io::Result<()> {
        self.check_alive()?;
        self.file.sync_all().inspect_err(|e| drop(self.failed.set(e.to_string())))
    }

    /// Reads come from the medium from now on, as far as the kernel can do that.
    pub(in crate::views) fn forget_cached(&self) {
        // Only how much the verification proves is at stake.
        let _ = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }

    /// Gives a whole and synced file its name, durably.
    pub(in crate::views) fn finish(&self) -> io::Result<()> {
        self.aside.as_ref().map_or(Ok(()), |aside| durable_fs::rename(aside, &self.path))
    }
}

/// Removes what was begun for a view and not finished.
pub(in crate::views) fn drop_unfinished(to: &Path, view: ViewId) {
    let Some(name) = to.file_name() else { return };
    let aside = to.with_file_name(format!(".{}.{view}.part", name.to_string_lossy()));
    match std::fs::remove_file(&aside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %aside.display(), error = %e, "an unfinished image is left");
        }
        _ => {}
    }
}
