//! What people and the agent are told: FS-2030 to FS-2052, FS-3110, FS-3111, FS-4031,
//! FS-4032, FS-4036 and FS-4037.

use std::fmt::Display;
use std::io;
use std::path::Path;

use farshore_extent::{Code, Problem, VolumeName, VolumeSize};

use crate::control::AttachKind;
use crate::core::Refused;
use crate::frontend::users::Users;

/// Fetch: records between the asked place and the oldest one here are gone. The agent sends
/// `Recopy` and goes on from where the target is.
pub const RECORDS_GONE: Code = Code(3110);

/// Fetch or Release: the asked place is ahead of this log.
pub const AHEAD_OF_LOG: Code = Code(3111);

pub(super) fn state(path: &Path, error: &io::Error) -> Problem {
    Problem::harmless(
        2030,
        format!("filterd cannot use its state directory {}", path.display()),
        error.to_string(),
        "make the directory writable for the user that runs filterd, and look for a full disk",
    )
    .with_risk("none: nothing is written to a protected volume without a durable state")
}

pub(super) fn state_in_use(path: &Path) -> Problem {
    Problem::harmless(
        2031,
        format!("another filterd uses the state directory {}", path.display()),
        "one daemon serves all volumes of a host",
        "stop the other one first, or give this one its own --root",
    )
}

/// The state of a host with protected volumes is missing.
pub(super) fn no_state(state: &Path, marker: &Path) -> Problem {
    Problem::harmless(
        2039,
        format!("filterd does not find its state in {}", state.display()),
        format!(
            "{} says that volumes of this host are protected: the file system with their records is \
             not mounted, or the records were removed",
            marker.display()
        ),
        format!(
            "mount it (`findmnt --fstab` shows what belongs there) and start filterd again; if the \
             records are lost for good, remove {} and protect the volumes again",
            marker.display()
        ),
    )
    .with_risk("the volumes are not served until then; nothing was changed")
}

pub(super) fn damaged(path: &Path, error: impl Display) -> Problem {
    Problem::harmless(
        2032,
        format!("the record of a protected volume is unreadable: {}", path.display()),
        error.to_string(),
        "protect the volume again under the same name; everything is then copied again",
    )
    .with_risk("the volume is not served; its backing device and its replica are unharmed")
}

pub(super) fn socket(path: &Path, error: &io::Error) -> Problem {
    Problem::harmless(
        2033,
        format!("filterd cannot listen on {}", path.display()),
        error.to_string(),
        "look whether another daemon listens there and whether the directory is writable",
    )
}

pub(super) fn resources(what: &str, error: impl Display) -> Problem {
    Problem::harmless(
        2034,
        format!("filterd cannot get {what}"),
        error.to_string(),
        "free memory or raise the limits of the filterd service, then try again",
    )
}

pub(super) fn no_such_volume(what: impl Display) -> Problem {
    Problem::harmless(
        2035,
        format!("no protected volume {what} is attached"),
        "it was never protected on this host, was unprotected, or its backing device was missing \
         when filterd started",
        "`farshore status` lists the protected volumes; the log of filterd tells why one is missing",
    )
}

pub(super) fn clients_connected(name: &VolumeName, clients: u32) -> Problem {
    Problem::harmless(
        2036,
        format!("cannot stop protecting {name}: {clients} clients are connected"),
        "they would get errors for everything they write from then on",
        "unmount and disconnect them first, or use --force to disconnect them",
    )
}

/// The volume on record was failed over; `fence` is what the target has said.
pub(super) fn fenced(name: &VolumeName, fence: &Problem) -> Problem {
    Problem::harmless(
        4037,
        format!("{name} is not attached for writing: it was failed over to the target"),
        format!("{fence}: {}", fence.why),
        format!(
            "to go on here, on the target: farshore failover cancel {name}; to look at the old disk, \
             read /dev/farshore/{name}, which takes no writes; if the target is lost for good: \
             farshore volume unfence {name}"
        ),
    )
    .with_risk("two machines that write to copies of one volume: nobody can put that together again")
}

/// Programs have the block device open.
pub(super) fn opened(name: &str, device: &Path, users: &Users) -> Problem {
    Problem::harmless(
        2036,
        format!("cannot stop protecting {name}: {} is open", device.display()),
        users.to_string(),
        "end these programs and try again; --force does not help: the kernel keeps a device that is \
         open, and what they still write would be lost",
    )
}

/// The kernel itself uses the block device.
pub(super) fn in_kernel(name: &str, device: &Path, users: &Users) -> Problem {
    Problem::harmless(
        2046,
        format!("cannot stop protecting {name}: {} is in use", device.display()),
        users.to_string(),
        "unmount it, swapoff, or take apart what is built on it (lsblk shows it), then try again; \
         --force does not help: what is on the device would lose it in the middle of a write",
    )
}

/// The kernel did not remove a device.
pub(super) fn not_removed(
    name: &str,
    device: &Path,
    error: impl Display,
    users: &Users,
) -> Problem {
    let held = if users.is_empty() { String::new() } else { format!("; {users}") };
    Problem::harmless(
        2047,
        format!("the kernel does not let go of {}, the device of {name}", device.display()),
        format!("{error}{held}"),
        "close what holds it and try again; when nothing does, look at the kernel's log: a device \
         that the kernel cannot remove is gone after a reboot",
    )
    .with_risk("the volume stays protected; I/O that still comes may have to wait")
}

/// A block device could not be made or taken over.
pub(super) fn no_device(name: &VolumeName, kind: AttachKind, error: impl Display) -> Problem {
    Problem::harmless(
        2048,
        format!("{name} cannot be attached by {kind}"),
        error.to_string(),
        "follow the reason; filterd tries again by itself when the volume was protected before",
    )
}

pub(super) fn busy(name: &VolumeName) -> Problem {
    Problem::harmless(
        2037,
        format!("{name} does not come to rest"),
        "its backing device, or the kernel's driver, has not finished everything that was begun",
        "look at the kernel's log for errors of the device; filterd goes on by itself when the last \
         request has ended",
    )
    .with_risk("the volume refuses new clients; what was captured stays with filterd")
}

pub(super) fn in_change(name: &VolumeName) -> Problem {
    Problem::harmless(
        2049,
        format!("{name} is being attached or taken away at this moment"),
        "its disk or a driver takes long to answer",
        "try again in a minute; when it stays so, look at the kernel's log for errors of the disk",
    )
    .with_risk("none for other volumes: they are not held up")
}

pub(super) fn bad_pool(bytes: u64) -> Problem {
    Problem::harmless(
        2038,
        format!("a pool of {bytes} bytes is not possible"),
        "a pool must hold four of the largest writes and chunks and fit into memory",
        "choose 8 MiB to 64 GiB",
    )
}

pub(super) fn impossible(path: &Path, kind: AttachKind, why: impl Display) -> Problem {
    Problem::harmless(
        4031,
        format!("cannot protect {}: no device can be attached by {kind} here", path.display()),
        why.to_string(),
        "correct what is named, or leave --attach out: the best way this host has is taken then",
    )
}

/// `/dev/farshore/NAME-partN` is the name of a partition.
pub(super) fn name_of_a_partition(path: &Path, name: &VolumeName) -> Problem {
    Problem::harmless(
        4036,
        format!("cannot protect {}: the name {name} ends like that of a partition", path.display()),
        format!("/dev/farshore/{name} is also the name of a partition on another volume"),
        "choose a --name that does not end in -part and a number",
    )
}

/// The backing is smaller than the volume on it.
pub(super) fn shrunk(name: &VolumeName, from: VolumeSize, to: u64) -> Problem {
    Problem::harmless(
        2050,
        format!("{name} has {} bytes and cannot shrink to {to}", from.get()),
        "its backing device is smaller than it was; a volume in use only grows",
        "give the backing device its old size back; to make a volume smaller, shrink its file \
         system, unprotect it, make the device smaller, and protect it under another name",
    )
    .with_risk("what is beyond the end of the backing device can be neither read nor written")
}

/// The state directory takes no marks for the new part of a volume, and gives no error either.
pub(super) fn not_marked(name: &VolumeName, state: &Path) -> Problem {
    Problem::harmless(
        2052,
        format!("the new part of {name} cannot be marked in {}", state.display()),
        "the disk of the state directory does not answer",
        "look at that disk (`dmesg`), then run `farshore volume grow` again; until then the volume \
         is served with its old size",
    )
}

/// The kernel keeps the size of a device in use.
pub(super) fn cannot_grow(name: &VolumeName, why: impl Display) -> Problem {
    Problem::harmless(
        4032,
        format!("{name} cannot grow while it is in use"),
        why.to_string(),
        "nothing was changed. Unmount it and close what uses it, then restart filterd: the device \
         is made again with the new size, and the volume is copied again; or boot a newer kernel",
    )
}

/// The volume has grown, its block device has not.
pub(super) fn old_size_shown(name: &VolumeName, why: impl Display) -> Problem {
    Problem::harmless(
        2051,
        format!("{name} has grown, but its block device still shows the old size"),
        why.to_string(),
        format!("try again: `farshore volume grow {name}`; a restart of filterd does it too"),
    )
}

pub(super) fn known_elsewhere(name: &VolumeName, backing: &Path) -> Problem {
    Problem::harmless(
        2040,
        format!("{name} is known as the volume on {}", backing.display()),
        "its backing device could not be attached when filterd started, and this is another one",
        "bring the device back and restart filterd, or unprotect the old volume first",
    )
}

pub(super) fn stopping() -> Problem {
    Problem::harmless(
        2041,
        "filterd is stopping",
        "protected volumes change no more until it runs again",
        "try again when filterd has been restarted",
    )
}

pub(super) fn refused(refused: &Refused) -> Problem {
    match refused {
        Refused::NoSuchVolume => no_such_volume("of this identity"),
        Refused::AlreadyReleased { asked, released } => Problem::harmless(
            RECORDS_GONE.0,
            format!("the records after {asked} are no longer held"),
            format!(
                "the agent released them up to {released}, as durable in its spool or at the target"
            ),
            "the agent asks for a new copy; no one has to do anything",
        )
        .with_risk(
            "the target has lost acknowledged data or is another one, or the agent has lost \
             its spool; points stop until the new copy is complete",
        ),
        Refused::AheadOfCaptured { asked, captured } => Problem::harmless(
            AHEAD_OF_LOG.0,
            format!("{asked} is ahead of the last record {captured} of this host"),
            "the state directory of filterd was restored from an older copy, or the target \
             belongs to another host",
            "restore the newest state directory of filterd, or unprotect the volume and protect \
             it again",
        ),
        Refused::NoSuchMarker => Problem::harmless(
            2042,
            "no pending marker has this identity",
            "it was resolved before, or a new copy has begun since",
            "nothing: a marker that is not committed never becomes a point",
        ),
        Refused::NameTooLong => Problem::harmless(
            2043,
            "the name of a point is too long",
            refused.to_string(),
            "choose a shorter name",
        ),
        Refused::NoRoom | Refused::HoldBusy | Refused::NotOrdered(_) => Problem::harmless(
            2044,
            "no marker can be placed now",
            refused.to_string(),
            "try again when the volume is ordered again; `farshore status` tells",
        ),
        Refused::AlreadyAttached
        | Refused::PoolTooSmall { .. }
        | Refused::Shrinks { .. }
        | Refused::Busy(_) => Problem::harmless(
            2045,
            "the capture core refused a volume",
            refused.to_string(),
            "report this; it should have been noticed before",
        ),
    }
}
