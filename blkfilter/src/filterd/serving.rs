//! The front end of one volume: the only way to it, so that there is one writer.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use farshore_extent::{Problem, VolumeId, VolumeSize};

use super::problem;
use super::state::{Front, VolumeRecord};
use crate::control::{AttachKind, Attachment};
use crate::device::Device;
use crate::durable_fs;
use crate::frontend::kernel_nbd::{self, KernelNbdError};
use crate::frontend::nbd::{self, Export, Exports};
use crate::frontend::ublk::{self, UblkError};

/// How long the ublk driver, and the start of a queue, may take: a host under load is slow, and a
/// driver that hangs stays so.
const DRIVER: Duration = Duration::from_secs(30);

/// Longest wait for the kernel to remove a device that nobody serves.
const REMOVAL: Duration = Duration::from_secs(10);

/// A running front end.
pub(super) enum Serving {
    Ublk(ublk::Server),
    Nbd(kernel_nbd::Server),
    Socket { server: nbd::Server, path: PathBuf },
}

/// Why a front end did not start.
pub(super) enum NotStarted {
    /// The number belongs to somebody else's device.
    Taken,
    /// The driver is stuck with the device, and may still do what it was told.
    Stuck(Problem),
    /// Anything else.
    Failed(Problem),
}

impl Serving {
    /// Starts to serve `device` in the way on record: makes the block device, or takes over the
    /// one that an earlier filterd left.
    pub(super) fn start(
        device: Arc<dyn Device>,
        record: &VolumeRecord,
        queues: u16,
    ) -> Result<Self, NotStarted> {
        let failed = |kind: AttachKind, error: &dyn std::fmt::Display| {
            NotStarted::Failed(problem::no_device(&record.name, kind, error))
        };
        match &record.front {
            Front::Ublk { number } => {
                let owner = owner(record.volume);
                let number = Some(*number);
                let limit = DRIVER;
                let config =
                    ublk::Config { number, owner, queues, limit, ..ublk::Config::default() };
                match ublk::Server::start(device, config) {
                    Ok(server) => Ok(Self::Ublk(server)),
                    Err(UblkError::NotOurs { .. }) => Err(NotStarted::Taken),
                    Err(error @ (UblkError::Late { .. } | UblkError::Behind { .. })) => {
                        let kind = AttachKind::Ublk;
                        Err(NotStarted::Stuck(problem::no_device(&record.name, kind, error)))
                    }
                    Err(error) => Err(failed(AttachKind::Ublk, &error)),
                }
            }
            Front::Nbd { number } => {
                let identifier = record.volume.to_string();
                let usual = kernel_nbd::Config::new(identifier);
                let config =
                    kernel_nbd::Config { number: Some(*number), connections: queues, ..usual };
                match kernel_nbd::Server::start(device, config) {
                    Ok(server) => Ok(Self::Nbd(server)),
                    Err(KernelNbdError::Taken { .. }) => Err(NotStarted::Taken),
                    Err(error) => Err(failed(AttachKind::Nbd, &error)),
                }
            }
            Front::Socket { path } => {
                Self::socket(device, record, path.clone()).map_err(NotStarted::Failed)
            }
        }
    }

    fn socket(
        device: Arc<dyn Device>,
        record: &VolumeRecord,
        path: PathBuf,
    ) -> Result<Self, Problem> {
        let failed = |e: io::Error| problem::socket(&path, &e);
        if let Some(directory) = path.parent() {
            durable_fs::create_directory(directory, 0o700).map_err(failed)?;
        }
        let exports = Exports::new();
        let export = Export {
            name: record.name.as_str().to_owned(),
            description: format!("protected volume on {}", record.backing.display()),
            device,
        };
        exports.add(export).map_err(|e| problem::resources("an export", e))?;
        let server = nbd::Server::bind_unix(&path, exports, nbd::Config::default());
        Ok(Self::Socket { server: server.map_err(failed)?, path })
    }

    pub(super) fn attachment(&self) -> Attachment {
        match self {
            Self::Ublk(s) => Attachment::Ublk { number: s.number(), device: s.block_device() },
            Self::Nbd(s) => Attachment::Nbd { number: s.number(), device: s.block_device() },
            Self::Socket { path, .. } => Attachment::Socket { path: path.clone() },
        }
    }

    /// Whether users of an earlier run go on without having noticed.
    pub(super) fn recovered(&self) -> bool {
        match self {
            Self::Ublk(server) => server.recovered(),
            Self::Nbd(server) => server.recovered(),
            Self::Socket { .. } => false,
        }
    }

    /// Connections of a socket; a block device has none.
    pub(super) fn clients(&self) -> u32 {
        match self {
            Self::Socket { server, .. } => server.clients(),
            Self::Ublk(_) | Self::Nbd(_) => 0,
        }
    }

    /// Why it has stopped to serve by itself; none while all is well.
    pub(super) fn failed(&self) -> Option<String> {
        match self {
            Self::Ublk(server) => server.failed(),
            Self::Nbd(server) => {
                server.health().gone.then(|| "it was disconnected by someone else".to_owned())
            }
            Self::Socket { .. } => None,
        }
    }

    /// Whether its users can see a new size while they use it; the reason when they cannot.
    pub(super) fn may_resize(&self) -> Result<(), String> {
        match self {
            Self::Ublk(server) if !server.can_resize() => Err(UblkError::CannotResize.to_string()),
            Self::Ublk(_) | Self::Nbd(_) | Self::Socket { .. } => Ok(()),
        }
    }

    /// Tells the kernel the size that the device has already. Clients of a socket learn it when
    /// they connect.
    pub(super) fn resize(&self, size: VolumeSize) -> Result<(), String> {
        match self {
            Self::Ublk(server) => server.resize(size).map_err(|e| e.to_string()),
            Self::Nbd(server) => server.resize(size).map_err(|e| e.to_string()),
            Self::Socket { .. } => Ok(()),
        }
    }

    /// Takes no more requests and answers those under way; users of a block device wait for the
    /// next start. Returns whether all were answered within `grace`.
    pub(super) fn leave(self, grace: Duration) -> bool {
        match self {
            Self::Ublk(server) => server.leave(grace),
            Self::Nbd(server) => server.leave(grace),
            Self::Socket { mut server, .. } => server.stop(grace),
        }
    }

    /// Takes the way to the volume away, unless it is a block device in use. `Ok`: whether all
    /// requests were answered within `grace`.
    pub(super) fn remove(self, grace: Duration) -> Result<bool, NotRemoved> {
        match self {
            Self::Ublk(server) => match server.remove_unused(grace) {
                Ok(()) => Ok(true),
                Err(error @ UblkError::InUse { .. }) => {
                    Err(NotRemoved { still: Some(Self::Ublk(server)), why: error.to_string() })
                }
                Err(error) => Err(NotRemoved { still: None, why: error.to_string() }),
            },
            Self::Nbd(server) => match server.remove_unused(grace) {
                Ok(()) => Ok(true),
                Err(error @ KernelNbdError::InUse(_)) => {
                    Err(NotRemoved { still: Some(Self::Nbd(server)), why: error.to_string() })
                }
                Err(error) => Err(NotRemoved { still: None, why: error.to_string() }),
            },
            Self::Socket { mut server, .. } => Ok(server.stop(grace)),
        }
    }
}

/// A block device that the kernel did not remove.
pub(super) struct NotRemoved {
    /// It is served on.
    pub(super) still: Option<Serving>,
    /// The reason.
    pub(super) why: String,
}

/// How a ublk device is known as this volume's.
fn owner(volume: VolumeId) -> u64 {
    let wide = u128::from_le_bytes(volume.to_bytes());
    // The low bit is the price of never being zero.
    u64::try_from((wide ^ wide >> 64) & u128::from(u64::MAX)).unwrap_or_default() | 1
}

impl Front {
    pub(super) const fn kind(&self) -> AttachKind {
        match self {
            Self::Ublk { .. } => AttachKind::Ublk,
            Self::Nbd { .. } => AttachKind::Nbd,
            Self::Socket { .. } => AttachKind::Socket,
        }
    }

    pub(super) fn socket(&self) -> Option<PathBuf> {
        match self {
            Self::Socket { path } => Some(path.clone()),
            Self::Ublk { .. } | Self::Nbd { .. } => None,
        }
    }

    /// The kernel's name of the block device: `ublkb3`, `nbd3`.
    pub(super) fn kernel_name(&self) -> Option<String> {
        match self {
            Self::Ublk { number } => Some(format!("ublkb{number}")),
            Self::Nbd { number } => Some(format!("nbd{number}")),
            Self::Socket { .. } => None,
        }
    }

    /// The block device of that name; none for any other name.
    pub(super) fn of_kernel_name(name: &str) -> Option<Self> {
        let number = |prefix| name.strip_prefix(prefix).and_then(|rest| rest.parse().ok());
        let ublk = number("ublkb").map(|number| Self::Ublk { number });
        ublk.or_else(|| number("nbd").map(|number| Self::Nbd { number }))
    }

    /// Whether there is a block device of this number: `Some(true)` when it is `volume`'s.
    ///
    /// # Errors
    /// Nobody knows, and why.
    pub(super) fn existing(&self, volume: VolumeId) -> Result<Option<bool>, String> {
        match self {
            Self::Ublk { number } => {
                let found = ublk::owner(*number).map_err(|e| e.to_string())?;
                Ok(found.map(|found| found == owner(volume)))
            }
            Self::Nbd { number } => {
                let found = kernel_nbd::look(*number).map_err(|e| e.to_string())?;
                let ours = volume.to_string();
                Ok(found.map(|found| found.identifier == Some(ours)))
            }
            Self::Socket { .. } => Ok(None),
        }
    }

    /// A block device of this kind with a number that nobody uses and that is not in `others`.
    ///
    /// # Errors
    /// The kernel does not say who uses one. That is no reason to take it.
    pub(super) fn free(kind: AttachKind, others: &[Self]) -> Result<Option<Self>, String> {
        for number in 0.. {
            let (front, is_free) = match kind {
                AttachKind::Ublk => {
                    let free = match ublk::owner(number) {
                        Ok(owner) => Ok(owner.is_none()),
                        Err(UblkError::Behind { .. }) => Ok(false),
                        Err(error) => Err(error.to_string()),
                    };
                    (Self::Ublk { number }, free)
                }
                AttachKind::Nbd => {
                    let found = kernel_nbd::look(number).map_err(|e| e.to_string());
                    (Self::Nbd { number }, found.map(|found| found.is_none()))
                }
                AttachKind::Socket => return Ok(None),
            };
            if !others.contains(&front) && is_free? {
                return Ok(Some(front));
            }
        }
        Ok(None)
    }

    /// Removes the block device of `volume` that an earlier filterd left in the kernel. Returns
    /// whether there was one; a device of somebody else is left alone.
    pub(super) fn remove_stale(&self, volume: VolumeId) -> Result<bool, String> {
        match self {
            Self::Ublk { number } => {
                match ublk::remove_stale_unused(*number, owner(volume), REMOVAL) {
                    Ok(was) => Ok(was),
                    Err(UblkError::NotOurs { .. } | UblkError::Unavailable(_)) => Ok(false),
                    Err(error) => Err(error.to_string()),
                }
            }
            Self::Nbd { number } => {
                match kernel_nbd::remove_stale_unused(*number, &volume.to_string(), REMOVAL) {
                    Ok(was) => Ok(was),
                    Err(KernelNbdError::Taken { .. } | KernelNbdError::Unavailable(_)) => Ok(false),
                    Err(error) => Err(error.to_string()),
                }
            }
            Self::Socket { .. } => Ok(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_names_and_ways_of_attaching_agree() {
        for front in [Front::Ublk { number: 3 }, Front::Nbd { number: 12 }] {
            let name = front.kernel_name().unwrap();
            assert_eq!(Front::of_kernel_name(&name), Some(front));
        }
        for other in ["ublkb", "ublkb3p1", "nbd0p1", "vdb", "ublkc3"] {
            assert_eq!(Front::of_kernel_name(other), None, "{other}");
        }
    }

    #[test]
    fn every_volume_has_an_owner_word_of_its_own_that_is_not_zero() {
        assert_ne!(owner(VolumeId::from_bytes([0; 16])), 0);
        let (a, b) = (VolumeId::random(), VolumeId::random());
        assert_ne!(owner(a), owner(b));
        assert_eq!(owner(a), owner(a));
    }

    #[test]
    fn a_number_is_free_only_when_the_driver_says_so() {
        let free = Front::free(AttachKind::Ublk, &[]);
        assert_eq!(free.is_ok(), ublk::features().is_ok(), "{free:?}");
    }
}
