//! Every problem the target tells a person, one function a cause. 3120 verification, 50xx link and
//! enrolment, 65xx the daemon and its volumes, 66xx points. Those of views and of failovers are in
//! modules of their own.

mod failover;
mod views;

use std::fmt::Display;
use std::path::Path;

use farshore_extent::{Generation, Problem, VolumeName, VolumeSize};

pub use failover::*;
pub use views::*;

/// FS-5001: a message other than `Enroll` without a certificate.
#[must_use]
pub fn no_certificate() -> Problem {
    Problem::harmless(
        5001,
        "the connection was refused: the host has no certificate of this target",
        "only enrolled hosts may send data",
        "make a token on the target (farshore token create) and enroll the host with it",
    )
}

/// FS-5002: the token's secret is unknown, used or too old. One text for all three: who tries
/// secrets learns nothing.
#[must_use]
pub fn bad_token() -> Problem {
    Problem::harmless(
        5002,
        "the token was refused",
        "it is unknown, was used already, or is too old; a token works once and for a short time",
        "make a new one on the target: farshore token create --for HOST",
    )
}

/// FS-5003: the identity claimed is not the one in the certificate.
#[must_use]
pub fn wrong_host() -> Problem {
    Problem::harmless(
        5003,
        "the connection was refused: the host is not the one its certificate names",
        "the files of the agent come from two machines, or were copied",
        "enroll this host again with a new token",
    )
}

/// FS-5004: the host was removed.
#[must_use]
pub fn host_removed() -> Problem {
    Problem::harmless(
        5004,
        "the connection was refused: this host is not enrolled here, or was removed",
        "its certificate is no longer accepted",
        "enroll the host again with a new token",
    )
}

/// FS-5005: no common version.
#[must_use]
pub fn no_common_version(theirs: &[u16]) -> Problem {
    Problem::harmless(
        5005,
        "the connection was refused: no common protocol version",
        format!(
            "the source speaks {theirs:?}, this target {:?}",
            farshore_protocol::version::SPOKEN
        ),
        "bring both sides to the same release of farshore",
    )
}

/// FS-5006: bytes or messages no peer of ours sends.
#[must_use]
pub fn violation(why: impl Display) -> Problem {
    Problem::harmless(
        5006,
        "the connection was closed: the peer broke the protocol",
        why.to_string(),
        "if both sides run the same release, report this with the logs of both",
    )
}

/// FS-5007: the identity belongs to another enrolled host.
#[must_use]
pub fn identity_taken() -> Problem {
    Problem::harmless(
        5007,
        "enrolment was refused: this host identity is enrolled already",
        "the token was made for another host name than the one that holds this identity",
        "if it is the same machine, make the token for the name it was enrolled under",
    )
}

/// FS-5008: all connections are in use.
#[must_use]
pub fn too_many_connections(limit: usize) -> Problem {
    Problem::harmless(
        5008,
        "the connection was refused: too many connections",
        format!("{limit} are open, which is the limit"),
        "raise limits.connections in target.toml, or find out who holds them",
    )
}

/// FS-5009: the certificate request is no good.
#[must_use]
pub fn bad_request(why: impl Display) -> Problem {
    Problem::harmless(
        5009,
        "enrolment was refused: the certificate request cannot be signed",
        why.to_string(),
        "if both sides run the same release, report this with the logs of both",
    )
}

/// FS-6501: `target init` was not run.
#[must_use]
pub fn not_initialised(missing: &Path) -> Problem {
    Problem::harmless(
        6501,
        "this target is not set up",
        format!("{} does not exist", missing.display()),
        "run farshore target init first",
    )
}

/// FS-6502: a file of the daemon's own.
#[must_use]
pub fn file(verb: &str, path: &Path, why: &dyn Display) -> Problem {
    Problem::harmless(
        6502,
        format!("cannot {verb} {}", path.display()),
        why.to_string(),
        "check that the directory exists, has space, and belongs to the user of the daemon",
    )
}

/// FS-6503: the catalogue.
#[must_use]
pub fn catalogue(why: &dyn Display) -> Problem {
    Problem::harmless(
        6503,
        "the catalogue cannot be read or written",
        why.to_string(),
        "check space and permissions of the data directory; points can be rebuilt from the journal",
    )
}

/// FS-6504: cannot listen.
#[must_use]
pub fn listen(address: &str, why: &dyn Display) -> Problem {
    Problem::harmless(
        6504,
        format!("cannot listen on {address}"),
        why.to_string(),
        "choose another address in target.toml, or stop what uses it (ss -ltnp shows it)",
    )
}

/// FS-6505: a key or certificate.
#[must_use]
pub fn certificate(path: &Path, why: &dyn Display) -> Problem {
    Problem::harmless(
        6505,
        format!("the key or certificate {} cannot be used", path.display()),
        why.to_string(),
        "restore it from a backup; without the CA's key every host must be enrolled again",
    )
}

/// FS-6506: a second daemon on the same data.
#[must_use]
pub fn already_running(data: &Path) -> Problem {
    Problem::harmless(
        6506,
        format!("the data directory {} is in use", data.display()),
        "another target daemon runs on it",
        "stop that one, or give this one a directory of its own",
    )
}

/// FS-6507: an answer of a task inside the daemon did not come.
#[must_use]
pub fn stopping() -> Problem {
    Problem::harmless(
        6507,
        "the request was not carried out",
        "the daemon is stopping, or the volume was just closed",
        "try again when the daemon runs",
    )
}

/// Whether a problem is of this moment and this machine: whoever asked should try again. A source
/// that is refused for good stops until a person looks.
#[must_use]
pub const fn is_passing(problem: &Problem) -> bool {
    matches!(problem.code.0, 6502 | 6503 | 6507 | 6520)
}

/// FS-6510: the volume is another host's.
#[must_use]
pub fn other_hosts_volume(name: &VolumeName) -> Problem {
    Problem::harmless(
        6510,
        format!("the volume {name} was refused: it belongs to another host"),
        "a volume can be sent only by the host that created its replica",
        "protect the disk under a new name on this host",
    )
}

/// FS-6511: the name is taken.
#[must_use]
pub fn name_taken(name: &VolumeName) -> Problem {
    Problem::harmless(
        6511,
        format!("the volume {name} was refused: the name is in use on this target"),
        "another volume has this name, and names are how people choose what to recover",
        "protect the disk under another name",
    )
}

/// FS-6512: too many volumes.
#[must_use]
pub fn too_many_volumes(limit: usize) -> Problem {
    Problem::harmless(
        6512,
        "the volume was refused: the host has too many",
        format!("the limit is {limit}"),
        "raise limits.volumes_per_host in target.toml",
    )
}

/// FS-6513: the source was fenced.
#[must_use]
pub fn fenced(name: &VolumeName, own: Generation, theirs: Generation) -> Problem {
    Problem::harmless(
        6513,
        format!("the volume {name} was refused: this source has been failed over"),
        format!("the replica is in generation {own}, the source in {theirs}"),
        format!(
            "find out which side holds the data in use; to go back to this source, on the target: \
             farshore failover cancel {name}"
        ),
    )
    .with_risk("writes made on this source since the failover are not on the replica")
}

/// FS-6514: the source claims a generation this replica never gave out.
#[must_use]
pub fn unknown_generation(name: &VolumeName, own: Generation, theirs: Generation) -> Problem {
    Problem::harmless(
        6514,
        format!("the volume {name} was refused: the source is ahead of this replica"),
        format!(
            "the replica is in generation {own}, the source in {theirs}: this is an old copy of the target's data"
        ),
        "start the target with its newest data, or protect the volume anew",
    )
}

/// FS-6520: the store of a volume has failed and must be opened again.
#[must_use]
pub fn store(name: &VolumeName, why: &dyn Display) -> Problem {
    Problem::harmless(
        6520,
        format!("the replica of {name} cannot be written or read"),
        why.to_string(),
        "check disk space and the kernel log, then restart the target daemon",
    )
    .with_risk("nothing acknowledged is lost; new writes wait on the source")
}

/// FS-3120: verification found content that is not the source's.
#[must_use]
pub fn differs(name: &VolumeName, bytes: u64) -> Problem {
    Problem::harmless(
        3120,
        format!("verification found content of {name} that is not the source's"),
        format!(
            "{bytes} bytes are not the same at the same number of the log: one side lost or \
             changed data unseen"
        ),
        format!(
            "keep the events and the kernel logs of both sides, then run on the source: farshore \
             resync {name}"
        ),
    )
    .with_risk(
        "points until now may hold the wrong bytes; choose one and test it before you rely on it",
    )
}

/// FS-6015: a part of the base image rotted, and the newest state shows it.
#[must_use]
pub fn rotten_base(name: &VolumeName, bytes: u64) -> Problem {
    Problem::harmless(
        6015,
        format!("a part of the base image of {name} is damaged"),
        format!("{bytes} bytes of base.img do not match their checksums in base.crc"),
        format!(
            "run on the source: farshore resync {name}, which sends them again; check the disk \
             under the store"
        ),
    )
    .with_risk(
        "until then points lack these bytes where they did not overwrite them; all others are good",
    )
}

/// FS-6530: no such volume.
#[must_use]
pub fn no_volume(name: &VolumeName) -> Problem {
    Problem::harmless(
        6530,
        format!("there is no volume {name} on this target"),
        "no source has opened a volume of that name",
        "farshore status lists the volumes",
    )
}

/// FS-6531: this cannot be a seed.
#[must_use]
pub fn bad_seed(image: &Path, why: &str) -> Problem {
    Problem::harmless(
        6531,
        format!("{} cannot be the seed of a replica", image.display()),
        why,
        "give a raw image file or a block device with the content of the disk",
    )
}

/// FS-6532: the seed has another size than the volume.
#[must_use]
pub fn seed_of_another_size(
    name: &VolumeName,
    file: &Path,
    bytes: u64,
    size: VolumeSize,
) -> Problem {
    Problem::harmless(
        6532,
        format!("the seed of {name} is not used: it has {bytes} bytes, the volume {}", size.get()),
        "an image of another size is not an image of this disk",
        format!("nothing; everything is sent. The seed can be removed: rm {}", file.display()),
    )
}

/// FS-6533: it is too late for a seed.
#[must_use]
pub fn replica_exists(name: &VolumeName) -> Problem {
    Problem::harmless(
        6533,
        format!("the volume {name} has its replica already"),
        "a seed is the beginning of a new one",
        "nothing; or choose another name for a new volume",
    )
}

/// FS-6540: what was given is no retention policy.
#[must_use]
pub fn bad_policy(text: &str, why: &str) -> Problem {
    Problem::harmless(
        6540,
        format!("`{}` cannot be used as a retention policy", text.escape_debug()),
        why,
        "give the name of a policy (farshore policy list), tiers such as all:1h,1m:24h,1h:7d, or one time",
    )
}

/// FS-6541: the policy of a volume is not known any more.
#[must_use]
pub fn unknown_policy(name: &VolumeName, why: &str) -> Problem {
    Problem::harmless(
        6541,
        format!("nothing of {name} expires: its retention policy cannot be used"),
        why,
        format!(
            "put it back into [policies] of target.toml, or: farshore policy set {name} default"
        ),
    )
    .with_risk("its journal grows until the disk of the target is full")
}

/// FS-6601: no such point.
#[must_use]
pub fn no_point(name: &VolumeName, wanted: &str) -> Problem {
    Problem::harmless(
        6601,
        format!("{name} has no point {wanted}"),
        "it was never cut, has expired, or lies where the order of writes was lost",
        format!("farshore point list {name} shows what is kept"),
    )
}

/// FS-6602: no such view.
#[must_use]
pub fn no_view(view: &dyn Display) -> Problem {
    Problem::harmless(
        6602,
        format!("there is no open view {view}"),
        "it was closed, or never opened here",
        "farshore failover list shows the open ones",
    )
}

/// FS-6603: too many views.
#[must_use]
pub fn too_many_views(limit: usize) -> Problem {
    Problem::harmless(
        6603,
        "the view was not opened: too many are open",
        format!("the limit is {limit}"),
        "close one (farshore failover cleanup), or raise limits.views in target.toml",
    )
}

/// FS-6604: the export could not be made.
#[must_use]
pub fn export(why: &dyn Display) -> Problem {
    Problem::harmless(
        6604,
        "the view cannot be exported",
        why.to_string(),
        "check the run directory and the address, and try again",
    )
}

/// FS-6606: no block device could be made for a view.
#[must_use]
pub fn no_device(why: &dyn Display) -> Problem {
    Problem::harmless(
        6606,
        "the view cannot be made a block device",
        why.to_string(),
        "farshore doctor --target shows what is missing (the daemon has to run as root); without \
         --device any NBD client can use the view",
    )
}

/// FS-6607: the device of a view is in use.
#[must_use]
pub fn device_in_use(path: &Path, users: &dyn Display) -> Problem {
    let path = path.display();
    Problem::harmless(
        6607,
        format!("the view is not closed: {path} is in use"),
        users.to_string(),
        format!("umount {path} or end what is named, and close the view again"),
    )
}

/// FS-6605: a point could not be tagged.
#[must_use]
pub fn not_tagged(why: impl Into<String>) -> Problem {
    Problem::harmless(
        6605,
        "the point was not made",
        why,
        "farshore status shows the state of the volumes; try again when they are protected",
    )
}
