//! Every problem the agent tells a person, one function a cause: 51xx link, 52xx enrolment and
//! the agent's own files. Refusals of the target arrive with codes of their own.

use std::fmt::Display;
use std::path::Path;

use farshore_extent::{Problem, VolumeName};
use farshore_protocol::admin::MergedPoints;

const BEHIND: &str =
    "none for the disk; the replica falls behind, and changes wait on this host until then";

/// FS-5101: nobody answers at the target's address.
#[must_use]
pub fn unreachable(address: &str, why: &dyn Display) -> Problem {
    Problem::harmless(
        5101,
        format!("the target {address} cannot be reached"),
        why.to_string(),
        "check that the target runs (farshore target run), its address and the firewall; it is \
         tried again by itself",
    )
    .with_risk(BEHIND)
}

/// FS-5102: the connection ended.
#[must_use]
pub fn lost(address: &str, why: &dyn Display) -> Problem {
    Problem::harmless(
        5102,
        format!("the connection to the target {address} was lost"),
        why.to_string(),
        "nothing; it is made again by itself, and goes on where the target is",
    )
    .with_risk(BEHIND)
}

/// FS-5103: whoever answers is not the target this host enrolled with.
#[must_use]
pub fn not_our_target(address: &str, why: &dyn Display) -> Problem {
    Problem::harmless(
        5103,
        format!("{address} is not the target this host was enrolled with"),
        why.to_string(),
        "check the address; when the target was set up anew, enroll this host again. Restart the \
         agent afterwards: after an authentication error it does not try again",
    )
    .with_risk(BEHIND)
}

/// FS-5104: the target did not accept this host's certificate.
#[must_use]
pub fn certificate_refused(address: &str, why: &dyn Display) -> Problem {
    Problem::harmless(
        5104,
        format!("the target {address} refused the certificate of this host"),
        why.to_string(),
        "check the clocks of both hosts, or enroll this host again with a new token, then restart \
         the agent: after an authentication error it does not try again",
    )
    .with_risk(BEHIND)
}

/// FS-5105: the peer sends what no target of ours sends.
#[must_use]
pub fn violation(address: &str, why: &dyn Display) -> Problem {
    Problem::harmless(
        5105,
        format!("the target {address} does not speak this protocol"),
        why.to_string(),
        "check that the address is that of a Farshore target of the same release",
    )
    .with_risk(BEHIND)
}

/// FS-5106: the proxy refused.
#[must_use]
pub fn proxy(proxy: &str, address: &str, why: &dyn Display) -> Problem {
    Problem::harmless(
        5106,
        format!("the proxy {proxy} does not connect to {address}"),
        why.to_string(),
        "allow CONNECT to that address and port in the proxy, or correct `proxy` in agent.toml",
    )
    .with_risk(BEHIND)
}

/// FS-5201: this host is not enrolled.
#[must_use]
pub fn not_enrolled(file: &Path) -> Problem {
    Problem::harmless(
        5201,
        "this host is not enrolled with a target",
        format!("{} does not exist", file.display()),
        "make a token on the target (farshore token create --for HOST), then run farshore enroll \
         TOKEN here",
    )
}

/// FS-5202: the text is not a token.
#[must_use]
pub fn bad_token(why: &dyn Display) -> Problem {
    Problem::harmless(
        5202,
        "this is not a usable token",
        why.to_string(),
        "copy the whole line that farshore token create printed on the target",
    )
}

/// FS-5203: the machine at the token's address is not the one that made the token.
#[must_use]
pub fn foreign_target(address: &str, why: &dyn Display) -> Problem {
    Problem::harmless(
        5203,
        format!("{address} is not the target that made this token"),
        why.to_string(),
        "check the address in the token (farshore token create --address), or make a new token on \
         that target",
    )
}

/// FS-5204: the agent's own identity cannot be used.
#[must_use]
pub fn identity(file: &Path, why: &dyn Display) -> Problem {
    Problem::harmless(
        5204,
        format!("the identity of this host in {} cannot be used", file.display()),
        why.to_string(),
        "restore the file, or enroll this host again with a new token",
    )
}

/// FS-5205: a file of the agent.
#[must_use]
pub fn file(verb: &str, path: &Path, why: &dyn Display) -> Problem {
    Problem::harmless(
        5205,
        format!("cannot {verb} {}", path.display()),
        why.to_string(),
        "check that the directory exists, has space, and belongs to the user of the agent",
    )
}

/// FS-5206: a second agent on the same state.
#[must_use]
pub fn already_running(lock: &Path) -> Problem {
    Problem::harmless(
        5206,
        "another agent already runs on this state directory",
        format!("{} is locked", lock.display()),
        "stop that one first, or use another --root",
    )
}

/// FS-5207: a setting that cannot be used.
#[must_use]
pub fn setting(name: &str, why: impl Into<String>) -> Problem {
    Problem::harmless(
        5207,
        format!("{name}: the configuration cannot be used"),
        why,
        "correct the value and start again",
    )
}

/// FS-5208: the target answered enrolment with something else.
#[must_use]
pub fn bad_certificate(why: &dyn Display) -> Problem {
    Problem::harmless(
        5208,
        "the certificate that the target issued cannot be used",
        why.to_string(),
        "check that both sides run the same release; make a new token and try again",
    )
}

/// FS-3013: no point could be cut.
#[must_use]
pub fn not_ordered(volumes: &str) -> Problem {
    Problem::harmless(
        3013,
        format!("no point was cut: {volumes} cannot carry one now"),
        "changes are being copied, so no place in the log is consistent",
        "try again when farshore status shows the volume as protected",
    )
}

/// FS-5210: the agent is stopping.
#[must_use]
pub fn stopping() -> Problem {
    Problem::harmless(
        5210,
        "the agent is stopping: no point was cut",
        "it was asked to stop before it could answer",
        "try again when it runs",
    )
}

/// FS-5211: the spool's disk failed.
#[must_use]
pub fn spool_failed(volume: &str, dir: &Path, why: &dyn Display) -> Problem {
    Problem::harmless(
        5211,
        format!("changes of volume {volume} cannot be spooled"),
        format!("{}: {why}", dir.display()),
        "check the disk, its space and the permissions of the folder (it belongs to the user of \
         the agent); it is tried again every 10 s by itself",
    )
    .with_risk(
        "none for the disk; when the capture pool is full before the target is back, points stop \
         until what changed has been copied",
    )
}

/// FS-5212: the spool is at its limit.
#[must_use]
pub fn spool_full(volume: &str, dir: &Path, bytes: u64) -> Problem {
    Problem::harmless(
        5212,
        format!("the spool of volume {volume} has reached its limit"),
        format!("it holds {bytes} bytes, and {} may take no more", dir.display()),
        "get the target back; points up to now arrive there first, then what changed is copied. \
         For longer outages give the spool a larger disk, or raise spool_percent or spool_max in \
         agent.toml",
    )
    .with_risk(
        "none for the disk; once the capture pool is full as well, points stop until what changed \
         has been copied",
    )
}

/// FS-5215: points were merged.
#[must_use]
pub fn points_merged(volume: &str, merged: &MergedPoints) -> Problem {
    let MergedPoints { points, from, to } = merged;
    let span = to.since(*from).as_secs();
    Problem::harmless(
        5215,
        format!("points of volume {volume} in the spool were merged"),
        format!(
            "the spool is nearly full: {points} points of a stretch of {span} s made room for newer \
             changes; some in between remain"
        ),
        "get the target back. For outages as long as this one with every point, give the spool a \
         larger disk, or raise spool_percent or spool_max in agent.toml",
    )
    .with_risk("none for the disk or the newest state; the history of the outage is coarser")
}

/// FS-5213: the spool lies on what is being captured.
#[must_use]
pub fn spool_on_protected(dir: &Path, volume: &VolumeName) -> Problem {
    Problem::harmless(
        5213,
        "nothing is spooled: the spool would lie on a protected volume",
        format!(
            "{} is on volume {volume}: each change spooled would be another one",
            dir.display()
        ),
        "set spool_dir in agent.toml to a folder on another disk and restart the agent",
    )
    .with_risk("none for the disk; an outage of the target is bridged by the capture pool alone")
}

/// FS-5214: what only the spool had is gone.
#[must_use]
pub fn spool_damaged(volume: &str, why: &str) -> Problem {
    Problem::harmless(
        5214,
        format!("the spool of volume {volume} is damaged"),
        why,
        "check the disk of the spool; the volume is being copied again by itself",
    )
    .with_risk("none for the disk; no new recovery point until the copy has ended")
}
