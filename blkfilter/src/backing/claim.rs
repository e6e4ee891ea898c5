//! The exclusive claim on a file. (Block devices are claimed by opening with `O_EXCL`.)

use std::fs::File;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// Who else holds the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ClaimError {
    /// Another program, or another volume of ours.
    Held,
    /// Locking failed for another reason.
    Failed(Errno),
}

/// Locks `file` both ways a program may look for: the whole file by an open-file-description lock
/// (QEMU and its tools use these) and by flock. Both live and die with the descriptor.
pub(super) fn claim_file(file: &File, write: bool) -> Result<(), ClaimError> {
    let kind = if write { libc::F_WRLCK } else { libc::F_RDLCK };
    let lock = libc::flock {
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: 0, // SEEK_SET
        l_start: 0,
        l_len: 0, // to the end, wherever it will be
        l_pid: 0,
    };
    outcome(fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).map(drop))?;
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(std::fs::TryLockError::WouldBlock) => Err(ClaimError::Held),
        Err(std::fs::TryLockError::Error(e)) => {
            Err(ClaimError::Failed(e.raw_os_error().map_or(Errno::EIO, Errno::from_raw)))
        }
    }
}

fn outcome(result: Result<(), Errno>) -> Result<(), ClaimError> {
    match result {
        Ok(()) => Ok(()),
        Err(Errno::EACCES | Errno::EAGAIN) => Err(ClaimError::Held),
        Err(e) => Err(ClaimError::Failed(e)),
    }
}
