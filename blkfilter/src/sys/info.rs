//! What the kernel says of a file or block device: sizes, block sizes, alignment.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

mod ioctl {
    // The kernel's header says size_t here, the value is always 64 bits wide.
    nix::ioctl_read!(
        /// BLKGETSIZE64
        blk_get_size64, 0x12, 114, u64);
    nix::ioctl_read_bad!(
        /// BLKSSZGET
        blk_ssz_get, nix::libc::BLKSSZGET, nix::libc::c_int);
    nix::ioctl_read_bad!(
        /// BLKPBSZGET
        blk_pbsz_get, nix::libc::BLKPBSZGET, nix::libc::c_uint);
    nix::ioctl_read_bad!(
        /// BLKROGET
        blk_ro_get, nix::request_code_none!(0x12, 94), nix::libc::c_int);
    nix::ioctl_none_bad!(
        /// BLKFLSBUF
        blk_flsbuf, nix::request_code_none!(0x12, 97));
}

/// Size of a block device in bytes.
///
/// # Errors
/// When `fd` is no block device.
pub fn block_size_bytes(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut bytes = 0;
    // SAFETY: the kernel writes one u64 to the pointer, which is valid for the call.
    unsafe { ioctl::blk_get_size64(fd.as_raw_fd(), &raw mut bytes) }?;
    Ok(bytes)
}

/// Logical and physical block size of a block device in bytes.
///
/// # Errors
/// When `fd` is no block device.
pub fn block_units(fd: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    let (mut logical, mut physical) = (0, 0);
    // SAFETY: the kernel writes one int to the pointer, which is valid for the call.
    unsafe { ioctl::blk_ssz_get(fd.as_raw_fd(), &raw mut logical) }?;
    // SAFETY: the kernel writes one unsigned int to the pointer, which is valid for the call.
    unsafe { ioctl::blk_pbsz_get(fd.as_raw_fd(), &raw mut physical) }?;
    Ok((u32::try_from(logical).map_err(|_| io::ErrorKind::InvalidData)?, physical))
}

/// Whether a block device is set read-only.
///
/// # Errors
/// When `fd` is no block device.
pub fn block_read_only(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut flag = 0;
    // SAFETY: the kernel writes one int to the pointer, which is valid for the call.
    unsafe { ioctl::blk_ro_get(fd.as_raw_fd(), &raw mut flag) }?;
    Ok(flag != 0)
}

/// Writes out and forgets what the kernel has cached of a block device.
///
/// # Errors
/// When `fd` is no block device, or it takes no writes.
pub fn forget_cached(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no argument; the descriptor is open for the call.
    unsafe { ioctl::blk_flsbuf(fd.as_raw_fd()) }?;
    Ok(())
}

/// Alignment direct I/O needs on this file, as the kernel tells since Linux 6.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectAlignment {
    /// Of the buffer's address, in bytes.
    pub memory: u32,
    /// Of offset and length, in bytes.
    pub offset: u32,
}

/// What the kernel says about direct I/O on `file`: `None` when it does not say (older kernel, or
/// file systems that do not support the question); `Some` with zeroes when direct I/O is not
/// possible.
pub fn direct_alignment(file: &impl AsFd) -> Option<DirectAlignment> {
    let mut answer = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty path with AT_EMPTY_PATH asks about the descriptor itself; the kernel fills
    // the structure, which is valid for the call.
    let rc = unsafe {
        libc::statx(
            file.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            answer.as_mut_ptr(),
        )
    };
    // SAFETY: all bytes were zeroed above, which is a valid statx, and the kernel wrote whole fields.
    let answer = unsafe { answer.assume_init() };
    (rc == 0 && answer.stx_mask & libc::STATX_DIOALIGN != 0).then_some(DirectAlignment {
        memory: answer.stx_dio_mem_align,
        offset: answer.stx_dio_offset_align,
    })
}

/// Number, major and minor, of the block device that `path` leads to; none for anything else. Asks
/// no file server and mounts nothing, so it does not wait for one that is dead.
#[must_use]
pub fn block_device_at(path: &Path) -> Option<(u64, u64)> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let flags = libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    let mut answer = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is a string that ends in a zero and lives until the call returns; the
    // kernel fills the structure, which is valid for the call.
    let rc = unsafe {
        libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, libc::STATX_TYPE, answer.as_mut_ptr())
    };
    // SAFETY: all bytes were zeroed above, which is a valid statx, and the kernel wrote whole fields.
    let answer = unsafe { answer.assume_init() };
    let is_block = u32::from(answer.stx_mode) & libc::S_IFMT == libc::S_IFBLK;
    let number = (u64::from(answer.stx_rdev_major), u64::from(answer.stx_rdev_minor));
    (rc == 0 && is_block).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_block_devices_have_a_number() {
        for path in ["/dev/null", "/proc/self/stat", "/nonexistent"] {
            assert_eq!(block_device_at(Path::new(path)), None, "{path}");
        }
    }

    #[test]
    fn a_regular_file_is_no_block_device() {
        let file = tempfile::tempfile().unwrap();
        assert!(block_size_bytes(file.as_fd()).is_err());
        assert!(block_units(file.as_fd()).is_err());
        assert!(block_read_only(file.as_fd()).is_err());
        if let Some(alignment) = direct_alignment(&file) {
            assert!(alignment.offset == 0 || alignment.offset.is_power_of_two());
        }
    }
}
