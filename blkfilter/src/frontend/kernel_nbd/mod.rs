//! A block device by the kernel's own NBD client: the way of attaching where ublk is missing.

mod error;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use farshore_extent::VolumeSize;

pub use error::{KernelNbdError, Unavailable};

use crate::device::Device;

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
    /// Sockets, each with a thread and a queue of its own; 0: what suits best.
    pub connections: u16,
    /// How long a request may be outstanding before the kernel looks after it; `None`: what suits
    /// best.
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
}

/// Whether volumes can be attached by the kernel's client on this host.
///
/// # Errors
/// [`Unavailable`] says why not and what to do.
pub fn available() -> Result<Support, Unavailable> {
    let why = "the front end for the kernel's NBD client is not built into this program";
    Err(Unavailable { why: why.into(), remedy: "use another way of attaching".into() })
}

/// The attached device `number`; `None` when it is free.
#[must_use]
pub fn existing(number: u32) -> Option<Existing> {
    let _ = number;
    None
}

/// Removes the device `number` if it is `identifier`'s and nobody serves it. Returns whether it
/// was.
///
/// # Errors
/// [`KernelNbdError`].
pub fn remove_stale(
    number: u32,
    identifier: &str,
    limit: Duration,
) -> Result<bool, KernelNbdError> {
    let _ = (number, identifier, limit);
    Ok(false)
}

/// An attached device and the threads that serve it.
pub struct Server {
    number: u32,
    recovered: bool,
}

impl Server {
    /// Attaches `device`, or goes on with the device that an earlier process left behind.
    ///
    /// # Errors
    /// [`KernelNbdError`].
    pub fn start(device: Arc<dyn Device>, config: Config) -> Result<Self, KernelNbdError> {
        let _ = (device, config);
        Err(available().err().map_or(KernelNbdError::Gone(0), KernelNbdError::from))
    }

    /// The N of `/dev/nbdN`.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The device's node.
    #[must_use]
    pub fn block_device(&self) -> PathBuf {
        PathBuf::from(format!("/dev/nbd{}", self.number))
    }

    /// Whether the device was there already and its users have noticed nothing.
    #[must_use]
    pub fn recovered(&self) -> bool {
        self.recovered
    }

    /// Tells the kernel the new size.
    ///
    /// # Errors
    /// [`KernelNbdError`].
    pub fn resize(&self, size: VolumeSize) -> Result<(), KernelNbdError> {
        let _ = size;
        Err(KernelNbdError::Gone(self.number))
    }

    /// Ends the connections and keeps the kernel's device: its users wait for the next
    /// [`Self::start`]. Returns whether everything that had arrived was answered.
    #[must_use]
    pub fn leave(self, grace: Duration) -> bool {
        let _ = grace;
        true
    }

    /// Disconnects the device.
    ///
    /// # Errors
    /// [`KernelNbdError`].
    pub fn remove(self, grace: Duration) -> Result<(), KernelNbdError> {
        let _ = grace;
        Err(KernelNbdError::Gone(self.number))
    }
}
