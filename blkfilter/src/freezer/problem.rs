//! Every problem of application points that arises on the source host: FS-34xx.

use std::fmt::Display;
use std::path::Path;
use std::time::Duration;

use farshore_extent::{Problem, VolumeName};

/// What a failure means for the point.
const CRASH: &str = "none; the point is cut all the same, and is crash-consistent";

fn app(code: u16, what: String, why: impl Into<String>, next: &str) -> Problem {
    Problem::harmless(code, what, why, next).with_risk(CRASH)
}

/// FS-3401: nothing is configured for a volume.
#[must_use]
pub fn none_covers(volumes: &str) -> Problem {
    app(
        3401,
        format!("no application is configured for {volumes}"),
        "freezer.toml on the source names no [[application]] with this volume",
        "add one with its hooks and mounts (docs/application-points.md)",
    )
}

/// FS-3402: the freezer cannot be asked, or is gone.
#[must_use]
pub fn lost(socket: &Path, why: &dyn Display) -> Problem {
    app(
        3402,
        format!("the freezer does not answer on {}", socket.display()),
        why.to_string(),
        "start it on the source: systemctl enable --now farshore-freezer, or farshore freezer (with \
         the same --root when one is used)",
    )
}

/// FS-3403: a hook said no.
pub(super) fn hook_failed(stage: &str, who: &VolumeName, how: &str, said: &str) -> Problem {
    let said =
        if said.is_empty() { "it said nothing".to_owned() } else { format!("it said: {said}") };
    app(
        3403,
        format!("the {stage} hook of {who} failed"),
        format!("{how}; {said}"),
        "correct the hook; run it by hand as its user with the environment of \
         docs/application-points.md",
    )
}

/// FS-3404: a hook took too long.
pub(super) fn hook_late(stage: &str, who: &VolumeName, limit: Duration, said: &str) -> Problem {
    let said = if said.is_empty() { String::new() } else { format!("; it said: {said}") };
    app(
        3404,
        format!("the {stage} hook of {who} was ended: it took too long"),
        format!("its limit is {limit:?}{said}"),
        "find out what it waits for, or raise hook_limit in freezer.toml",
    )
}

/// FS-3405: the kernel does not freeze it.
pub(super) fn not_frozen(at: &Path, why: &dyn Display) -> Problem {
    app(
        3405,
        format!("{} cannot be frozen", at.display()),
        why.to_string(),
        "correct freeze in freezer.toml; it names mount points of ext4, xfs, btrfs or another file \
         system that can be frozen, and the freezer runs as root",
    )
}

/// FS-3406: it must not be frozen.
pub(super) fn needed(at: &Path, by: &Path) -> Problem {
    app(
        3406,
        format!("{} is not frozen: Farshore itself needs it", at.display()),
        format!("{} lies on that file system; the point could not be cut", by.display()),
        "move one of the two to another file system, or take the mount out of freeze in freezer.toml",
    )
}

/// FS-3407: it was not quiet long enough.
pub(super) fn too_late(why: impl Into<String>) -> Problem {
    app(
        3407,
        "it was not quiet until the point was cut".to_owned(),
        why,
        "when this comes again, raise quiet_limit in freezer.toml, and look for what slows the host \
         or its disks down",
    )
}

/// FS-3408: one at a time.
pub(super) fn busy() -> Problem {
    app(
        3408,
        "applications of this host are being made quiet for another point".to_owned(),
        "only one such point can be made at a time",
        "try again when that one is done",
    )
}

/// FS-3409: freezer.toml or a hook cannot be used.
pub(super) fn setting(name: &str, why: impl Into<String>) -> Problem {
    app(
        3409,
        format!("{name} cannot be used"),
        why,
        "correct it; it is read again for the next point (farshore config check)",
    )
}

/// FS-3410: nobody would thaw.
pub(super) fn no_watchdog(why: &dyn Display) -> Problem {
    app(
        3410,
        "nothing is frozen: the watchdog that would thaw it cannot be started".to_owned(),
        why.to_string(),
        "look at the limits of processes and memory of the host",
    )
}

/// FS-3411: the freezer's own socket or files.
pub(super) fn own_file(at: &Path, why: &dyn Display) -> Problem {
    Problem::harmless(
        3411,
        format!("the freezer cannot use {}", at.display()),
        why.to_string(),
        "check who owns that folder, and that no second freezer runs",
    )
}

/// FS-3412: a mount stays frozen.
pub(super) fn still_frozen(at: &Path, why: &dyn Display) -> Problem {
    Problem::harmless(
        3412,
        format!("{} could not be thawed", at.display()),
        why.to_string(),
        "thaw it by hand at once: fsfreeze --unfreeze MOUNTPOINT",
    )
    .with_risk("whoever writes to that file system waits; nothing is lost")
}
