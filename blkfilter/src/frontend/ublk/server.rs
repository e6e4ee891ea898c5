//! The life of one device.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use farshore_extent::VolumeSize;

use super::error::UblkError;
use super::features::features;
use crate::device::Device;

/// How a device is made and kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Number of the device, for a stable `/dev/ublkbN`; none: any free one.
    pub number: Option<u32>,
    /// Kept by the driver with the device: how we know our own. Never zero.
    pub owner: u64,
    /// Queues, each with a thread; zero: as many as CPUs, at most 4.
    pub queues: u16,
    /// Requests a queue has open at a time; zero: 64.
    pub depth: u16,
    /// How long the driver may take for one command.
    pub limit: Duration,
    /// How long a dying server may still hold the device before [`Server::start`] gives up. A
    /// killed server with every tag busy holds it until the driver notices: up to 30 s before
    /// Linux 6.15.
    pub patience: Duration,
    /// Look for partitions. Linux before 7.0 always does.
    pub partitions: bool,
    /// Let the driver copy payloads through buffers of ours even where it need not.
    pub copy: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            number: None,
            owner: 0,
            queues: 0,
            depth: 0,
            limit: Duration::from_secs(10),
            patience: Duration::from_secs(60),
            partitions: true,
            copy: false,
        }
    }
}

/// A served device. Dropping it leaves the device to the next server, as [`Self::leave`] does.
#[derive(Debug)]
pub struct Server {
    number: u32,
    recovered: bool,
}

impl Server {
    /// Makes the device, or takes it over when `number` is ours and its server is gone.
    ///
    /// # Errors
    /// [`UblkError`]; nothing of ours is left behind then, except what the error names.
    pub fn start(device: Arc<dyn Device>, config: Config) -> Result<Self, UblkError> {
        let _ = (features()?, device, config);
        Err(UblkError::Queue { number: 0, why: "not finished".into() })
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Its node.
    #[must_use]
    pub fn block_device(&self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkb{}", self.number))
    }

    /// Whether it was taken over from a server before.
    #[must_use]
    pub fn recovered(&self) -> bool {
        self.recovered
    }

    /// Changes the size while the device is in use.
    ///
    /// # Errors
    /// [`UblkError::CannotResize`] where the driver cannot.
    pub fn resize(&self, size: VolumeSize) -> Result<(), UblkError> {
        let _ = size;
        Err(UblkError::CannotResize)
    }

    /// Why a queue thread has ended by itself; none while all are well.
    #[must_use]
    pub fn failed(&self) -> Option<String> {
        None
    }

    /// The same, after waiting for it for at most `limit`.
    #[must_use]
    pub fn wait_failed(&self, limit: Duration) -> Option<String> {
        let _ = limit;
        None
    }

    /// Ends the queue threads and keeps the device: its I/O waits for the next server. True: all
    /// have ended and nothing is in flight.
    #[must_use]
    pub fn leave(&self, grace: Duration) -> bool {
        let _ = grace;
        true
    }

    /// Takes the device away. Whoever still has it open gets I/O errors from now on, except where
    /// the driver refuses that ([`UblkError::InUse`]; the device is served on then).
    ///
    /// # Errors
    /// [`UblkError`].
    pub fn remove(&self, grace: Duration) -> Result<(), UblkError> {
        let _ = grace;
        Ok(())
    }
}

/// Removes device `number` when it is ours and nobody serves it. False: there is no such device.
///
/// # Errors
/// [`UblkError::NotOurs`], [`UblkError::Served`], or of the driver.
pub fn remove_stale(number: u32, owner: u64, limit: Duration) -> Result<bool, UblkError> {
    let _ = (number, owner, limit);
    features()?;
    Ok(false)
}
