//! What a person is told when a store's folder cannot be read or a point cannot be copied:
//! FS-6701 to FS-6708.

use std::fmt::Display;
use std::io;
use std::path::Path;

use farshore_extent::{ExtentSet, Problem};

use crate::store::{StoreError, ViewError};

/// Ranges that are named; more are counted.
const NAMED: usize = 8;

/// FS-6701 while somebody has it, else what the store says.
pub(super) fn store(dir: &Path, error: &StoreError) -> Problem {
    let StoreError::InUse { holder } = error else {
        return error.problem(&dir.display().to_string());
    };
    Problem::harmless(
        6701,
        format!("the store {} is in use: {holder}", dir.display()),
        "a running target writes new content into its files, so what is read meanwhile could be a mix",
        "open the point with the running target (farshore failover test NAME --point P) and copy \
         its device; or stop the target; or read a snapshot of its file system",
    )
}

/// FS-6702: the journal knows no such point.
pub(super) fn no_point(dir: &Path, why: &str) -> Problem {
    let next = list(dir);
    Problem::harmless(6702, format!("no such point in {}", dir.display()), why, next)
}

/// The moment cannot be opened: told as of a view, but there is no daemon to ask.
pub(super) fn view(dir: &Path, error: &ViewError) -> Problem {
    let mut problem = error.problem(&dir.display().to_string());
    if !matches!(error, ViewError::Store(_)) {
        problem.what = format!("cannot extract from {}: {error}", dir.display());
        problem.next = list(dir);
    }
    problem
}

fn list(dir: &Path) -> String {
    format!("farshore extract {} --list", dir.display())
}

/// FS-6703: nothing can be written there.
pub(super) fn bad_destination(to: &Path, why: impl Display) -> Problem {
    Problem::harmless(
        6703,
        format!("cannot extract to {}", to.display()),
        why.to_string(),
        "name a file in a directory outside of the store, or a block device that nobody uses",
    )
}

/// FS-6704: a device that must not be written to.
pub(super) fn device(to: &Path, why: impl Display) -> Problem {
    Problem::harmless(
        6704,
        format!("refusing to overwrite {}", to.display()),
        why.to_string(),
        "choose another device, or unmount and end what uses this one: lsblk shows it",
    )
}

/// FS-6705: the destination failed.
pub(super) fn cannot_write(to: &Path, error: &io::Error) -> Problem {
    Problem::harmless(
        6705,
        format!("the image cannot be written to {}", to.display()),
        error.to_string(),
        "give it space or a healthy disk, and run the same command again",
    )
    .with_risk("the store is unharmed; a file was not made, a device holds an incomplete image")
}

/// FS-6706: a part of the moment cannot be read.
pub(super) fn unreadable(
    to: &Path,
    ranges: &ExtentSet,
    reasons: &[String],
    is_file: bool,
) -> Problem {
    let named: Vec<String> = ranges.iter().take(NAMED).map(|extent| extent.to_string()).collect();
    let more = ranges.extents().saturating_sub(NAMED);
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    let left = if is_file { "no file was made" } else { "the device holds an incomplete image" };
    Problem::harmless(
        6706,
        format!(
            "{} bytes of this moment cannot be read: {}{more}",
            ranges.bytes(),
            named.join(", ")
        ),
        reasons.join("; "),
        "farshore store check names the points that are whole; --damaged zero fills these ranges \
         with zeroes",
    )
    .with_risk(format!("these bytes of this moment are lost; {}: {left}", to.display()))
}

/// FS-6707: the destination does not give back what was written.
pub(super) fn differs(to: &Path) -> Problem {
    Problem::harmless(
        6707,
        format!("{} does not hold what was written to it", to.display()),
        "read again, its content has another digest",
        "do not use it; check this disk and the kernel's log, and extract to another one",
    )
    .with_risk("the store is unharmed; a file was not made, the content of a device is wrong")
}

/// FS-6708: stopped by hand.
pub(super) fn stopped(to: &Path) -> Problem {
    Problem::harmless(
        6708,
        format!("stopped before all of it was in {}", to.display()),
        "it was interrupted",
        "run the same command again: it begins anew",
    )
    .with_risk("the store is unharmed; a file was not made, a device holds an incomplete image")
}
