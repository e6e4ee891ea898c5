//! How an attach by the kernel's NBD client fails, each with what to do about it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why this host has no kernel NBD client for us.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}; {remedy}")]
pub struct Unavailable {
    /// What is missing.
    pub why: String,
    /// What to do, as a command where there is one.
    pub remedy: String,
}

/// Why a device could not be attached, changed or removed.
#[derive(Debug, thiserror::Error)]
pub enum KernelNbdError {
    /// The kernel has no NBD client, or one that is too old.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// The number asked for belongs to someone else.
    #[error("/dev/nbd{number} is in use by {by}; use another number or disconnect it first")]
    Taken {
        /// The number.
        number: u32,
        /// Whose it is, as far as the kernel tells.
        by: String,
    },
    /// The device is ours, and a live process still serves it.
    #[error("/dev/nbd{0} is still served by another process; stop that one first")]
    Served(u32),
    /// The device is ours, but the kernel was once told something that is no longer true and
    /// that it cannot be told again while the device exists.
    #[error(
        "/dev/nbd{number} cannot be continued: its {what} changed since it was attached; \
         stop its users and detach it, then attach it again"
    )]
    Changed {
        /// The number.
        number: u32,
        /// What changed, and how.
        what: String,
    },
    /// The device was disconnected, but the kernel keeps it until its last user closes it.
    #[error("/dev/nbd{0} is still open; close what uses it (fuser -vm /dev/nbd{0})")]
    Busy(u32),
    /// The device was not disconnected, because somebody uses it.
    #[error("/dev/nbd{0} is in use: unmount it and close it first")]
    InUse(u32),
    /// The device was disconnected by someone else.
    #[error("/dev/nbd{0} was disconnected by someone else; detach the volume and attach it again")]
    Gone(u32),
    /// The kernel has the device, but no node for it appeared.
    #[error("the node {0} did not appear; is /dev a devtmpfs, and does the container share it?")]
    NoNode(PathBuf),
    /// The kernel does not answer.
    #[error("the kernel did not finish \"{what}\" within {limit:?}; look into the kernel log")]
    Hangs {
        /// What it was asked.
        what: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
    /// Whatever the system says.
    #[error("cannot {what}: {error}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
}

/// For `map_err`: names what was tried; a time-out is the kernel's.
pub(super) fn system(what: &'static str, limit: Duration) -> impl Fn(io::Error) -> KernelNbdError {
    move |error| match error.kind() {
        io::ErrorKind::TimedOut => KernelNbdError::Hangs { what, limit },
        _ => KernelNbdError::System { what, error },
    }
}
