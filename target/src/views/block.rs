//! A view as a block device of this host: by ublk, else by the kernel's NBD client.
//!
//! A view ends with the daemon, and so does its device: what a killed daemon left behind is found
//! by a mark that only this installation leaves, and removed at the next start.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use farshore_blkfilter::device::Device;
use farshore_blkfilter::frontend::users::Users;
use farshore_blkfilter::frontend::{kernel_nbd, ublk};
use farshore_extent::{Problem, ViewId};
use farshore_protocol::token::CaFingerprint;

use crate::problem;

/// How long the kernel may take to remove a device.
const REMOVAL: Duration = Duration::from_secs(10);

/// How long the threads of a device that has stopped get to end what they have begun.
const LEAVE: Duration = Duration::from_secs(5);

/// How long users of a device of the kernel's NBD client wait for a daemon that was killed.
const ORPHANED: Duration = Duration::from_secs(60);

/// Tells the devices of this installation's views from all others, filterd's included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark(u64);

impl Mark {
    /// Of the installation with this authority.
    pub(crate) fn of(authority: CaFingerprint) -> Self {
        let bytes = authority.to_bytes();
        let (head, _) = bytes.split_first_chunk().unwrap_or((&[0; 8], &[]));
        // The driver's word for a device without an owner is zero.
        Self(u64::from_le_bytes(*head) | 1)
    }

    fn identifier(self, view: ViewId) -> String {
        format!("{}{view}", self.prefix())
    }

    fn prefix(self) -> String {
        format!("farshore-view-{:016x}-", self.0)
    }
}

/// A view's device. Dropped without [`Self::remove`], it is left to the next start.
pub(super) enum BlockDevice {
    Ublk(ublk::Server),
    Nbd(kernel_nbd::Server),
}

impl BlockDevice {
    /// Makes the device.
    ///
    /// # Errors
    /// FS-6606 when neither way is possible here.
    pub(super) fn start(
        device: &Arc<dyn Device>,
        mark: Mark,
        view: ViewId,
    ) -> Result<Self, Problem> {
        let config = ublk::Config { owner: mark.0, ..ublk::Config::default() };
        let no_ublk = match ublk::Server::start(Arc::clone(device), config) {
            Ok(server) => return Ok(Self::Ublk(server)),
            Err(error) => error,
        };
        let mut config = kernel_nbd::Config::new(mark.identifier(view));
        config.dead_connection_timeout = ORPHANED;
        kernel_nbd::Server::start(Arc::clone(device), config).map(Self::Nbd).map_err(|no_nbd| {
            problem::no_device(&format!("by ublk: {no_ublk}; by the kernel's NBD client: {no_nbd}"))
        })
    }

    pub(super) fn path(&self) -> PathBuf {
        match self {
            Self::Ublk(server) => server.block_device(),
            Self::Nbd(server) => server.block_device(),
        }
    }

    /// Refuses while somebody uses the device. udev, which looks at every device, does not count.
    ///
    /// # Errors
    /// FS-6607, with the users' names.
    pub(super) fn unused(&self) -> Result<(), Problem> {
        let path = self.path();
        let users = Users::of_device(&path);
        if users.only_passing() { Ok(()) } else { Err(problem::device_in_use(&path, &users)) }
    }

    /// Why it serves no more, although nothing here ended it; none while all is well.
    pub(super) fn stopped(&self) -> Option<String> {
        match self {
            Self::Ublk(server) => server.failed(),
            Self::Nbd(server) => {
                server.health().gone.then(|| "another program disconnected it".to_owned())
            }
        }
    }

    /// Serves a device that has stopped again, when the kernel still has it: its users have waited
    /// and go on. Only ublk keeps one, and only as long as nobody stopped the device itself.
    ///
    /// # Errors
    /// Why it is gone: somebody took it away, or it cannot be served. Its users get errors then.
    pub(super) fn again(
        self,
        device: &Arc<dyn Device>,
        mark: Mark,
        why: String,
    ) -> Result<Self, String> {
        let waits = |number| match ublk::existing(number) {
            Ok(Some(found)) => found.owner == mark.0 && found.state != ublk::State::Dead,
            Ok(None) | Err(_) => false,
        };
        let server = match self {
            Self::Ublk(server) if waits(server.number()) => server,
            gone => {
                gone.remove();
                return Err(why);
            }
        };
        let number = server.number();
        if !server.leave(LEAVE) {
            tracing::warn!(number, "requests of a view's device are still under way");
        }
        let config = ublk::Config {
            number: Some(number),
            owner: mark.0,
            patience: REMOVAL,
            ..ublk::Config::default()
        };
        ublk::Server::start(Arc::clone(device), config).map(Self::Ublk).map_err(|error| {
            let removed = ublk::remove_stale(number, mark.0, REMOVAL);
            tell(&format!("/dev/ublkb{number}"), removed.map_err(|e| e.to_string()));
            format!("{why}; it cannot be served again: {error}")
        })
    }

    /// Takes the device away, whoever uses it.
    pub(super) fn remove(self) {
        let path = self.path();
        let removed = match self {
            Self::Ublk(server) => server.remove(REMOVAL).map_err(|e| e.to_string()),
            Self::Nbd(server) => server.remove(REMOVAL).map_err(|e| e.to_string()),
        };
        if let Err(error) = removed {
            let path = path.display();
            tracing::error!(
                %path,
                error,
                "the device of a view is left until its users close it, or to the next start"
            );
        }
    }
}

/// Removes the devices that an earlier daemon of this installation left behind.
pub(super) fn remove_stale(mark: Mark) {
    for number in numbers(Path::new("/sys/class/ublk-char"), "ublkc") {
        let ours = ublk::existing(number).ok().flatten().is_some_and(|d| d.owner == mark.0);
        if ours {
            let removed = ublk::remove_stale(number, mark.0, REMOVAL).map_err(|e| e.to_string());
            tell(&format!("/dev/ublkb{number}"), removed);
        }
    }
    for number in numbers(Path::new("/sys/block"), "nbd") {
        let identifier = kernel_nbd::existing(number).and_then(|device| device.identifier);
        if let Some(identifier) = identifier.filter(|i| i.starts_with(&mark.prefix())) {
            let removed = kernel_nbd::remove_stale(number, &identifier, REMOVAL);
            tell(&format!("/dev/nbd{number}"), removed.map_err(|e| e.to_string()));
        }
    }
}

fn tell(path: &str, removed: Result<bool, String>) {
    match removed {
        Ok(_) => tracing::info!(path, "removed the device of a view, which nobody served"),
        Err(error) => tracing::error!(path, error, "the device of a view cannot be removed"),
    }
}

/// Numbers behind `prefix` in the names of a directory of `/sys`.
fn numbers(directory: &Path, prefix: &str) -> Vec<u32> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let number = |entry: std::fs::DirEntry| {
        entry.file_name().to_str()?.strip_prefix(prefix)?.parse::<u32>().ok()
    };
    entries.filter_map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_is_the_installations_own_and_never_nobodys() {
        let of = |certificate: &[u8]| Mark::of(CaFingerprint::of(certificate));
        assert_eq!(of(b"a"), of(b"a"));
        assert_ne!(of(b"a"), of(b"b"));
        assert_ne!(of(b"a").0, 0);
        let identifier = of(b"a").identifier(ViewId::from_bytes([3; 16]));
        assert!(identifier.starts_with(&of(b"a").prefix()), "{identifier}");
        assert!(!identifier.starts_with(&of(b"b").prefix()), "{identifier}");
    }

    #[test]
    fn devices_are_found_by_their_numbers() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["nbd0", "nbd12", "nbd", "nbd1p1", "vda"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let mut found = numbers(dir.path(), "nbd");
        found.sort_unstable();
        assert_eq!(found, [0, 12]);
        assert!(numbers(&dir.path().join("none"), "nbd").is_empty());
    }
}
