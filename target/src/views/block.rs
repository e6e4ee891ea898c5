//! A view as a block device of this host: by ublk, else by the kernel's NBD client.
//!
//! A device that is in use when the daemon ends, or that a killed one left behind, waits with its
//! users for the next daemon. One that no open view owns is found by a mark that only this
//! installation leaves, and removed.

use std::collections::BTreeSet;
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

/// How long users of a device of the kernel's NBD client wait for the next daemon.
const ORPHANED: Duration = Duration::from_secs(60);

/// How long the driver may take to see that the server before is dead.
const TAKE_OVER: Duration = Duration::from_secs(40);

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
    /// Makes the device; or takes over the one `before`, whose users have waited, or makes one of
    /// that name, when that is possible.
    ///
    /// # Errors
    /// FS-6606 when neither way is possible here.
    pub(super) fn start(
        device: &Arc<dyn Device>,
        mark: Mark,
        view: ViewId,
        before: Option<&Path>,
    ) -> Result<Self, Problem> {
        let number = |prefix| before?.to_str()?.strip_prefix(prefix)?.parse::<u32>().ok();
        let (before_ublk, before_nbd) = (number("/dev/ublkb"), number("/dev/nbd"));
        if let Some(number) = before_ublk {
            match ublk_numbered(device, mark, number, TAKE_OVER) {
                Ok(server) => return Ok(Self::Ublk(server)),
                Err(error) => {
                    tracing::warn!(number, %error, "a view's device cannot be taken over");
                    // Its users get errors instead of waiting for ever.
                    let removed = ublk::remove_stale(number, mark.0, REMOVAL);
                    tell(&format!("/dev/ublkb{number}"), removed.map_err(|e| e.to_string()));
                }
            }
        }
        if let Some(number) = before_nbd {
            match kernel_nbd::Server::start(Arc::clone(device), nbd_config(mark, view, before_nbd))
            {
                Ok(server) => return Ok(Self::Nbd(server)),
                Err(error) => {
                    tracing::warn!(number, %error, "a view's device cannot be taken over");
                    let identifier = mark.identifier(view);
                    let removed = kernel_nbd::remove_stale(number, &identifier, REMOVAL);
                    tell(&format!("/dev/nbd{number}"), removed.map_err(|e| e.to_string()));
                }
            }
        }
        let config = ublk::Config { owner: mark.0, ..ublk::Config::default() };
        let no_ublk = match ublk::Server::start(Arc::clone(device), config) {
            Ok(server) => return Ok(Self::Ublk(server)),
            Err(error) => error,
        };
        let config = nbd_config(mark, view, None);
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
        ublk_numbered(device, mark, number, REMOVAL).map(Self::Ublk).map_err(|error| {
            let removed = ublk::remove_stale(number, mark.0, REMOVAL);
            tell(&format!("/dev/ublkb{number}"), removed.map_err(|e| e.to_string()));
            format!("{why}; it cannot be served again: {error}")
        })
    }

    /// Keeps the device for the next daemon: its users wait.
    pub(super) fn leave(self) {
        let path = self.path();
        let left = match self {
            Self::Ublk(server) => server.leave(LEAVE),
            Self::Nbd(server) => server.leave(LEAVE),
        };
        let path = path.display();
        tracing::info!(%path, left, "the device of a view waits for the next daemon");
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

fn ublk_numbered(
    device: &Arc<dyn Device>,
    mark: Mark,
    number: u32,
    patience: Duration,
) -> Result<ublk::Server, ublk::UblkError> {
    let config =
        ublk::Config { number: Some(number), owner: mark.0, patience, ..ublk::Config::default() };
    ublk::Server::start(Arc::clone(device), config)
}

fn nbd_config(mark: Mark, view: ViewId, number: Option<u32>) -> kernel_nbd::Config {
    let mut config = kernel_nbd::Config::new(mark.identifier(view));
    config.dead_connection_timeout = ORPHANED;
    config.number = number;
    config
}

/// Removes the devices that an earlier daemon of this installation left behind, apart from those
/// `kept`.
pub(super) fn remove_stale(mark: Mark, kept: &BTreeSet<PathBuf>) {
    let stale = |path: String| (!kept.contains(Path::new(&path))).then_some(path);
    for number in numbers(Path::new("/sys/class/ublk-char"), "ublkc") {
        let Some(path) = stale(format!("/dev/ublkb{number}")) else { continue };
        let ours = ublk::existing(number).ok().flatten().is_some_and(|d| d.owner == mark.0);
        if ours {
            let removed = ublk::remove_stale(number, mark.0, REMOVAL).map_err(|e| e.to_string());
            tell(&path, removed);
        }
    }
    for number in numbers(Path::new("/sys/block"), "nbd") {
        let Some(path) = stale(format!("/dev/nbd{number}")) else { continue };
        let identifier = kernel_nbd::existing(number).and_then(|device| device.identifier);
        if let Some(identifier) = identifier.filter(|i| i.starts_with(&mark.prefix())) {
            let removed = kernel_nbd::remove_stale(number, &identifier, REMOVAL);
            tell(&path, removed.map_err(|e| e.to_string()));
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
