//! Why a ublk device could not be made, changed or removed, with what to do about it.

use std::time::Duration;

use nix::errno::Errno;

use super::features::Unavailable;
use crate::device::DeviceError;

/// See the variants.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UblkError {
    /// ublk cannot be used at all.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// The driver did not finish a command in time. It may still finish it.
    #[error(
        "the ublk driver did not finish {command} within {limit:?}; some kernels (6.17 and early \
         6.18) never do: run a fixed kernel, and reboot if the command stays stuck"
    )]
    Late {
        /// Name of the command.
        command: &'static str,
        /// How long it was given.
        limit: Duration,
    },
    /// A command that did not end in time is still with the driver: nothing more is sent.
    #[error(
        "the ublk driver has not finished {command}, which was given up: it is sent nothing more for \
         this device until it has; reboot if it stays so"
    )]
    Behind {
        /// Name of the earlier command.
        command: &'static str,
    },
    /// The driver refused a command.
    #[error("the ublk driver refused {command}: {errno}")]
    Refused {
        /// Name of the command.
        command: &'static str,
        /// Why.
        errno: Errno,
    },
    /// The number is taken by a device of another program.
    #[error("ublk device {number} belongs to another program: choose another number")]
    NotOurs {
        /// The number.
        number: u32,
    },
    /// Another server still serves the device.
    #[error("ublk device {number} is still served by another process")]
    Served {
        /// The number.
        number: u32,
    },
    /// The existing device does not fit what should be served.
    #[error("ublk device {number} cannot be taken over: {why}")]
    Unfit {
        /// The number.
        number: u32,
        /// In which way.
        why: String,
    },
    /// Somebody has the block device open.
    #[error("/dev/ublkb{number} is in use: unmount it and close it first")]
    InUse {
        /// The number.
        number: u32,
    },
    /// The device nodes do not appear.
    #[error(
        "{path} cannot be opened although the kernel made the device: {why}; is /dev a devtmpfs?"
    )]
    NoNode {
        /// Which.
        path: String,
        /// What opening it said.
        why: String,
    },
    /// The kernel cannot change the size of a device in use.
    #[error(
        "this kernel cannot resize a ublk device in use (no UPDATE_SIZE, Linux 6.16): detach and \
         attach the volume again"
    )]
    CannotResize,
    /// What is to be served has no queue for us, or cannot be served over ublk.
    #[error("the volume cannot be served: {0}")]
    Device(#[from] DeviceError),
    /// A queue thread could not start or ended.
    #[error("a queue thread of ublk device {number} failed: {why}")]
    Queue {
        /// The number.
        number: u32,
        /// How.
        why: String,
    },
}
