//! Opening and claiming, and what is refused.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use farshore_extent::{BlockSizes, Problem, VolumeSize};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{major, minor};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use super::claim::{ClaimError, claim_file};
use super::{Backing, Mode};
use crate::control::BackendKind;
use crate::preflight::problem;
use crate::sys::aligned::AlignedBuf;
use crate::sys::info;

/// Physical block size reported for files, in bytes: page and file-system blocks are that large.
const FILE_PHYSICAL: u32 = 4096;

/// Smallest block there is, in bytes.
const SECTOR_UNIT: u32 = 512;

/// Largest unit a file system may ask direct I/O to be aligned to, in bytes.
const MAX_DIRECT_UNIT: u32 = 4096;

/// Major and minor number.
pub(crate) fn device_numbers(dev: u64) -> (u64, u64) {
    (major(dev), minor(dev))
}

/// Name in `/sys/dev/block`.
pub(crate) fn sysfs_name((major, minor): (u64, u64)) -> String {
    format!("{major}:{minor}")
}

/// Pause between two attempts to claim.
const CLAIM_PAUSE: Duration = Duration::from_millis(20);

impl Backing {
    /// As [`Self::open`], but while another program holds it tries again, for `patience`: the
    /// kernel may keep the claim of a killed filterd until its last writes are done.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn open_patiently(path: &Path, mode: Mode, patience: Duration) -> Result<Self, Problem> {
        let started = Instant::now();
        loop {
            match Self::open(path, mode) {
                Err(problem) if problem.code.0 == 4016 && started.elapsed() < patience => {}
                outcome => return outcome,
            }
            // Nobody announces that a claim has ended.
            #[allow(clippy::disallowed_methods)]
            std::thread::sleep(CLAIM_PAUSE);
        }
    }

    /// Opens a block device or raw file and claims it: until the last user of the result is gone,
    /// nobody who asks can mount, claim or lock it.
    ///
    /// # Errors
    /// FS-4011 to FS-4029, each a reason not to use it; FS-4029 when the kernel fails to say what
    /// it is. Nothing was changed then.
    pub fn open(path: &Path, mode: Mode) -> Result<Self, Problem> {
        let metadata = std::fs::metadata(path).map_err(|e| problem::cannot_look(path, &e))?;
        let kind = match metadata.file_type() {
            t if t.is_block_device() => BackendKind::Block,
            t if t.is_file() => BackendKind::File,
            _ => return Err(problem::not_a_disk(path, metadata.is_dir())),
        };
        let file = open_claimed(path, kind, mode)?;
        // The path may have been replaced since; what counts is what was opened.
        let opened = file.metadata().map_err(|e| problem::silent(path, &e))?;
        if (opened.ino(), opened.dev(), opened.rdev())
            != (metadata.ino(), metadata.dev(), metadata.rdev())
        {
            return Err(problem::silent(path, &io::Error::other("it was replaced meanwhile")));
        }
        match kind {
            BackendKind::Block => Self::block(path, file, mode, opened.rdev()),
            BackendKind::File => Self::file(path, file, mode, opened.len()),
        }
    }

    /// The size that the kernel gives now, in bytes.
    ///
    /// # Errors
    /// FS-4029 when the kernel does not tell.
    pub fn measure(&self) -> Result<u64, Problem> {
        let bytes = match self.kind {
            BackendKind::Block => info::block_size_bytes(self.file.as_fd()),
            BackendKind::File => self.file.metadata().map(|m| m.len()),
        };
        bytes.map_err(|e| problem::silent(&self.path, &e))
    }

    /// A size that it has now, as that of a volume.
    ///
    /// # Errors
    /// Those of [`Self::open`] for a size that no volume can have.
    pub fn usable(&self, bytes: u64) -> Result<VolumeSize, Problem> {
        usable_size(&self.path, bytes, self.blocks)
    }

    fn block(path: &Path, file: File, mode: Mode, rdev: u64) -> Result<Self, Problem> {
        let fd = file.as_fd();
        let silent = |e: io::Error| problem::silent(path, &e);
        let bytes = info::block_size_bytes(fd).map_err(silent)?;
        let (logical, physical) = info::block_units(fd).map_err(silent)?;
        if mode == Mode::ReadWrite && info::block_read_only(fd).map_err(silent)? {
            return Err(problem::read_only(path));
        }
        let directory = Path::new("/sys/dev/block").join(sysfs_name(device_numbers(rdev)));
        if let Some(model) = zoned(&directory) {
            return Err(problem::zoned(path, &model));
        }
        let volatile_cache = queue_attribute(&directory, "write_cache")
            .is_none_or(|text| text.trim() != "write through");
        let physical = physical.clamp(logical, 65536);
        let blocks = BlockSizes::new(logical, physical)
            .map_err(|_| problem::block_size(path, logical, physical))?;
        let size = usable_size(path, bytes, blocks)?;
        let direct = enable_direct(&file, logical);
        let file = Arc::new(file);
        let path = path.to_owned();
        let kind = BackendKind::Block;
        let size = RwLock::new(size);
        Ok(Self { file, path, kind, mode, size, blocks, direct, volatile_cache })
    }

    fn file(path: &Path, file: File, mode: Mode, bytes: u64) -> Result<Self, Problem> {
        let direct = direct_unit(&file).is_some_and(|unit| enable_direct(&file, unit));
        let logical = if direct { file_block_size(&file) } else { SECTOR_UNIT };
        let blocks = BlockSizes::new(logical, FILE_PHYSICAL.max(logical))
            .map_err(|_| problem::block_size(path, logical, FILE_PHYSICAL))?;
        let size = usable_size(path, bytes, blocks)?;
        let file = Arc::new(file);
        let (path, kind) = (path.to_owned(), BackendKind::File);
        // Metadata of the file (allocation) is not durable without a sync, whatever the disk does.
        let volatile_cache = true;
        let size = RwLock::new(size);
        Ok(Self { file, path, kind, mode, size, blocks, direct, volatile_cache })
    }
}

fn open_claimed(path: &Path, kind: BackendKind, mode: Mode) -> Result<File, Problem> {
    let write = mode == Mode::ReadWrite;
    let exclusive = if kind == BackendKind::Block { libc::O_EXCL } else { 0 };
    // O_NONBLOCK: the path may have become a pipe meanwhile; it means nothing for disks and files.
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(exclusive | libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(|e| problem::cannot_open(path, &e))?;
    // Left on, it would make io_uring answer EAGAIN instead of waiting.
    if let Ok(flags) = fcntl(&file, FcntlArg::F_GETFL) {
        let blocking = OFlag::from_bits_retain(flags) - OFlag::O_NONBLOCK;
        fcntl(&file, FcntlArg::F_SETFL(blocking)).map_err(|e| problem::silent(path, &e.into()))?;
    }
    if kind == BackendKind::File {
        claim_file(&file, write).map_err(|error| match error {
            ClaimError::Held => problem::claimed(path),
            ClaimError::Failed(e) => problem::silent(path, &e.into()),
        })?;
    }
    Ok(file)
}

fn usable_size(path: &Path, bytes: u64, blocks: BlockSizes) -> Result<VolumeSize, Problem> {
    if let Some(problem) = problem::bad_size(path, bytes, blocks.logical()) {
        return Err(problem);
    }
    VolumeSize::new(bytes).map_err(|e| problem::silent(path, &io::Error::other(e)))
}

/// Logical block size a file will have, in bytes: what direct I/O on it needs.
pub(crate) fn file_block_size(file: &File) -> u32 {
    direct_unit(file).unwrap_or(SECTOR_UNIT)
}

/// Unit direct I/O on a file needs, in bytes; `None` when buffered I/O is the better way.
fn direct_unit(file: &File) -> Option<u32> {
    // Memory needs no direct I/O; the kernel would accept it and do it in a worker thread.
    if fstatfs(file).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC) {
        return None;
    }
    match info::direct_alignment(file) {
        Some(known) => Some(known.offset.max(SECTOR_UNIT))
            .filter(|_| known.offset > 0 && known.memory > 0 && known.memory <= MAX_DIRECT_UNIT)
            .filter(|unit| *unit <= MAX_DIRECT_UNIT),
        // The kernel does not say: pages are always enough.
        None => Some(MAX_DIRECT_UNIT),
    }
}

/// Switches the descriptor to direct I/O when a first read of `unit` bytes works that way.
fn enable_direct(file: &File, unit: u32) -> bool {
    let Ok(flags) = fcntl(file, FcntlArg::F_GETFL) else { return false };
    let flags = OFlag::from_bits_retain(flags);
    if fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT)).is_err() {
        return false;
    }
    let mut probe = AlignedBuf::zeroed(usize::try_from(unit).unwrap_or(4096));
    if file.read_at(&mut probe, 0).is_ok() {
        return true;
    }
    // If this fails too, I/O will report errors; it cannot go wrong silently.
    let _ = fcntl(file, FcntlArg::F_SETFL(flags));
    false
}

/// A queue attribute of a disk, or of the disk a partition lies on.
pub(crate) fn queue_attribute(directory: &Path, name: &str) -> Option<String> {
    ["queue", "../queue"]
        .iter()
        .find_map(|queue| std::fs::read_to_string(directory.join(queue).join(name)).ok())
}

/// The zone model of a zoned device.
pub(crate) fn zoned(directory: &Path) -> Option<String> {
    let model = queue_attribute(directory, "zoned")?.trim().to_owned();
    (!model.is_empty() && model != "none").then_some(model)
}
