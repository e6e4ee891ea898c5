//! The exclusive claim on a block device of ours while it goes away: nobody can mount it, use it as
//! swap or build anything on it between the look at its users and its end.
//!
//! Opening, and closing most of all, may read and write the device, which this very process serves;
//! so the claim is held by an isolated thread.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use crate::sys::{info, isolate};

/// How long the kernel may take to say whether a device is claimed.
const LIMIT: Duration = Duration::from_secs(5);

/// A claim. Dropped, it is let go of, and nobody waits for that.
#[derive(Debug)]
pub(super) struct Claim(isolate::Held);

/// The device is claimed, or does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refused;

impl Claim {
    /// Claims the block device at `node`; none when it cannot be opened at all, by nobody.
    pub(super) fn take(node: &Path) -> Result<Option<Self>, Refused> {
        let node = node.to_owned();
        judge(isolate::hold(LIMIT, move || Open::new(&node)))
    }

    /// Lets go. What is still cached is forgotten first, so that nobody mounts from the cache what
    /// is no longer there.
    pub(super) fn let_go(self) {
        if !self.0.release(LIMIT) {
            tracing::warn!("the claim on a device that goes away is not let go of yet");
        }
    }
}

fn judge(held: io::Result<isolate::Held>) -> Result<Option<Claim>, Refused> {
    match held {
        Ok(held) => Ok(Some(Claim(held))),
        Err(error) if is_refusal(&error) => Err(Refused),
        Err(_) => Ok(None),
    }
}

/// Whether an exclusive opening that failed so means that somebody uses the device.
pub(super) fn is_refusal(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY) || error.kind() == io::ErrorKind::TimedOut
}

/// The device, open alone.
struct Open(File);

impl Open {
    fn new(node: &Path) -> io::Result<Self> {
        let flags = libc::O_EXCL | libc::O_NONBLOCK | libc::O_CLOEXEC;
        OpenOptions::new().read(true).custom_flags(flags).open(node).map(Self)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        // It is gone or going: that its last writes fail is known.
        let _ = info::forget_cached(self.0.as_fd());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_claimed_or_does_not_answer_is_refused_and_one_that_is_gone_is_not() {
        let errno = |n| judge(Err(io::Error::from_raw_os_error(n)));
        assert_eq!(errno(libc::EBUSY).unwrap_err(), Refused);
        assert_eq!(judge(Err(io::ErrorKind::TimedOut.into())).unwrap_err(), Refused);
        for gone in [libc::ENXIO, libc::ENOENT, libc::ENODEV] {
            assert!(errno(gone).unwrap().is_none());
        }
        let claim = Claim::take(Path::new("/dev/null")).unwrap().expect("it can be opened");
        claim.let_go();
    }
}
