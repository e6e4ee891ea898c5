//! Freezing and thawing a mounted file system.
//!
//! While it is frozen its content on the device is whole, and whoever writes to it waits. The kernel
//! counts no freezes of one kind: the first thaw thaws, whoever asks.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

mod call {
    // linux/fs.h: FIFREEZE and FITHAW. The argument is not used.
    nix::ioctl_readwrite!(fifreeze, b'X', 119, libc::c_int);
    nix::ioctl_readwrite!(fithaw, b'X', 120, libc::c_int);
}

/// Writes everything out and freezes the file system that `directory` is on. Takes as long as the
/// device takes, and cannot be interrupted.
///
/// # Errors
/// `EBUSY` when it is frozen already, `EOPNOTSUPP` when it cannot be, `EPERM` without
/// `CAP_SYS_ADMIN`, and whatever the device says.
pub fn freeze(directory: impl AsFd) -> io::Result<()> {
    let mut unused = 0;
    // SAFETY: the descriptor lives for the call, and the argument is one int that does too.
    unsafe { call::fifreeze(directory.as_fd().as_raw_fd(), &raw mut unused) }?;
    Ok(())
}

/// Thaws it. Returns whether it was frozen.
///
/// # Errors
/// Whatever the file system says but that it is not frozen.
pub fn thaw(directory: impl AsFd) -> io::Result<bool> {
    let mut unused = 0;
    // SAFETY: as above.
    match unsafe { call::fithaw(directory.as_fd().as_raw_fd(), &raw mut unused) } {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EINVAL) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
