//! A block device by the kernel's own NBD client: the way of attaching where ublk is missing.
//!
//! The kernel gets one end of each of a few socket pairs by generic netlink, together with all
//! that a client would negotiate; the other ends are served by our [NBD server](super::nbd) from
//! the transmission phase on. Owns the sockets, the threads and the kernel's device; knows nothing
//! of what is served.
//!
//! # A restart
//! The device outlives the process: it is attached with a long dead-connection timeout, and a new
//! process brings it new sockets (RECONFIGURE). It is known as ours by its backend identifier,
//! which the kernel shows in `/sys/block/nbdN/backend` and checks itself when it is reconfigured;
//! so a stranger's device is never touched. The `pid` file proves nothing: it names the thread
//! that attached, alive or not.
//!
//! Requests that were in flight on a dead connection are sent again only when the kernel's request
//! timer looks at them. How that works differs:
//!
//! - **One connection** (the default): the device is told no timeout. The timer then never ends a
//!   connection, however slow the storage is; it only finds requests whose connection was replaced
//!   meanwhile. So the timer may be short, and 5 s is what in-flight requests wait at most, from
//!   its last look on.
//! - **Several connections**: the kernel takes a request older than the timeout for lost, ends its
//!   connection and sends it again on another. A timeout below what the storage may need under
//!   load would repeat requests for ever and answer none, so it is 30 s, and so long do in-flight
//!   requests wait after a crash.
//!
//! Either way a request may be executed twice: once by the dead process or on the ended
//! connection, once again. A thread replaces its connection only when everything it had in flight
//! on the old one has come back, so storage that hangs is not heaped with repetitions.
//! New requests wait only for the new connection; after an orderly [`Server::leave`] all do.
//!
//! Measured on Linux 6.12 in a virtual machine without KVM, fio at depth 8, one connection: killed
//! and started again, the device is served after 0.2 to 1.0 s and the requests that were in flight
//! are answered after 5.7 to 6.2 s; after an orderly leave there is no wait beyond the first.
//!
//! # What is not set
//! `DISCONNECT_ON_CLOSE`: the device would vanish when a file system is unmounted for a check.
//! `DESTROY_ON_DISCONNECT`: the number would be gone with it, and the partition limit of the
//! module with it; a free device costs nothing.

mod client;
mod error;
mod message;
mod place;
mod server;
mod sysfs;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub use error::{KernelNbdError, Unavailable};
pub use place::Health;
pub use server::{Server, available, existing, look, remove_stale, remove_stale_unused};

/// Longest identifier in bytes.
pub const MAX_IDENTIFIER: usize = 128;

/// How long an attach waits for the search for partitions on a new device.
const SCAN_LIMIT: Duration = Duration::from_secs(10);

/// What the kernel's client can do here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Support {
    /// Partition nodes a device may have (module parameter `max_part`); 0: none will appear.
    pub max_part: u32,
}

/// How a device is attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The N of `/dev/nbdN`; `None`: any free one.
    pub number: Option<u32>,
    /// How the device is known as ours after a restart: the volume's id, unique on the host.
    pub identifier: String,
    /// Sockets, each with a thread and a queue of its own, at most one for each processor; 0: one.
    /// Only for a new device.
    pub connections: u16,
    /// How long a request may be outstanding before the kernel looks after it; `None`: 5 s with
    /// one connection, 30 s with several. With several, only for a new device.
    pub request_timeout: Option<Duration>,
    /// How long the kernel keeps guests waiting for a new connection before it fails their
    /// requests.
    pub dead_connection_timeout: Duration,
}

impl Config {
    /// The usual configuration of the volume `identifier`.
    #[must_use]
    pub fn new(identifier: impl Into<String>) -> Self {
        Self {
            number: None,
            identifier: identifier.into(),
            connections: 0,
            request_timeout: None,
            dead_connection_timeout: Duration::from_secs(365 * 24 * 3600),
        }
    }
}

/// What the kernel says of an attached device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Existing {
    /// The N of `/dev/nbdN`.
    pub number: u32,
    /// The identifier it was attached with, if by us.
    pub identifier: Option<String>,
    /// Whose it is, for people.
    pub owner: String,
}
