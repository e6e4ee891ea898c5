//! Which file systems may be frozen, and freezing them.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::Builder;
use std::time::Duration;

use farshore_extent::Problem;

use super::problem;
use super::watchdog::Guard;
use crate::preflight::{HostRoots, Mount};
use crate::sys::freeze;

/// Mounts frozen for one point; their numbers fit seven bits.
const MAX_MOUNTS: u8 = 128;

/// What is always needed: whoever logs must not wait.
const LOGS: &str = "/var/log";

/// A mount that may be frozen.
#[derive(Debug)]
pub(super) struct Freezable {
    /// Its place among the others.
    pub(super) number: u8,
    pub(super) at: PathBuf,
    pub(super) directory: File,
}

/// Opens the mounts, each once, when nothing that is needed lies on them.
///
/// # Errors
/// FS-3405 and FS-3406.
pub(super) fn open(mounts: &[PathBuf], needed: &[PathBuf]) -> Result<Vec<Freezable>, Problem> {
    let all = HostRoots::default().mounts();
    let mut open: Vec<Freezable> = Vec::new();
    let mut seen: Vec<&str> = Vec::new();
    for at in mounts {
        let real = fs::canonicalize(at).map_err(|e| problem::not_frozen(at, &e))?;
        let mount = all.iter().rev().find(|mount| Path::new(&mount.at) == real);
        let mount = mount.ok_or_else(|| problem::not_frozen(at, &"nothing is mounted there"))?;
        let is_needed = |path: &&PathBuf| lies_on(path, mount, &all);
        if let Some(path) = needed.iter().chain([&PathBuf::from(LOGS)]).find(is_needed) {
            return Err(problem::needed(at, path));
        }
        if !seen.contains(&mount.dev.as_str()) {
            seen.push(&mount.dev);
            let directory = File::open(&real).map_err(|e| problem::not_frozen(at, &e))?;
            let number = u8::try_from(open.len()).unwrap_or(u8::MAX);
            if number >= MAX_MOUNTS {
                return Err(problem::not_frozen(at, &"there are too many others"));
            }
            open.push(Freezable { number, at: at.clone(), directory });
        }
    }
    Ok(open)
}

/// Whether `path`, or the folder that it would be made in, lies on the file system of `mount`.
fn lies_on(path: &Path, mount: &Mount, all: &[Mount]) -> bool {
    let Some(real) = path.ancestors().find_map(|part| fs::canonicalize(part).ok()) else {
        return false;
    };
    // The deepest, and of those the one mounted last.
    let deepest = all.iter().filter(|m| real.starts_with(&m.at)).max_by_key(|m| m.at.len());
    let deepest = deepest.map(|found| found.at.as_str());
    let home = all.iter().rev().find(|m| Some(m.at.as_str()) == deepest);
    home.is_some_and(|home| home.dev == mount.dev)
}

/// Freezes it within `limit`. One that is frozen later is thawed at once; until that has happened
/// `guard` is kept, by which the watchdog knows that it has to stay.
///
/// # Errors
/// FS-3405; FS-3407 after `limit`.
pub(super) fn freeze(
    mount: &Freezable,
    guard: &Arc<Guard>,
    limit: Duration,
) -> Result<(), Problem> {
    let bad = |e: io::Error| problem::not_frozen(&mount.at, &e);
    let (directory, guard) = (mount.directory.try_clone().map_err(bad)?, Arc::clone(guard));
    guard.begin(mount.number).map_err(|e| problem::no_watchdog(&e))?;
    let (done, outcome) = sync_channel(0);
    let number = mount.number;
    let work = move || {
        let frozen = freeze::freeze(&directory);
        let in_time = frozen.is_ok();
        if !in_time {
            guard.not_frozen(number);
        }
        // Handed over, not left in a queue: what nobody takes must be thawed here.
        if done.send(frozen).is_err() && in_time {
            thaw_at_last(&directory);
        }
        drop(guard);
    };
    Builder::new().name("freeze".into()).spawn(work).map_err(bad)?;
    match outcome.recv_timeout(limit) {
        Ok(frozen) => frozen.map_err(bad),
        Err(_) => Err(problem::too_late(format!(
            "freezing {} took longer than {limit:?}; it is thawed as soon as that is done",
            mount.at.display()
        ))),
    }
}

/// Thaws what nobody else will. Returns whether it was frozen.
pub(super) fn thaw_at_last(directory: &File) -> bool {
    match freeze::thaw(directory) {
        Ok(was) => was,
        Err(error) => {
            tracing::error!(%error, "a file system could not be thawed; it is tried again");
            false
        }
    }
}
