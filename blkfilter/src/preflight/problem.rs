//! The text of every refusal: FS-4011 to FS-4029 and FS-4033 to FS-4035, one code a cause.

use std::fmt::Display;
use std::io;
use std::path::Path;

use farshore_changelog::limits::MAX_INDEXED_BYTES;
use farshore_extent::{Problem, VolumeName};

/// Smallest volume worth protecting, in bytes.
pub(crate) const MIN_VOLUME: u64 = 1 << 20;

fn refused(
    code: u16,
    path: &Path,
    because: impl Display,
    why: impl Into<String>,
    next: impl Into<String>,
) -> Problem {
    let what = format!("cannot protect {}: {because}", path.display());
    Problem::harmless(code, what, why, next)
}

pub(crate) fn cannot_look(path: &Path, error: &io::Error) -> Problem {
    if error.kind() == io::ErrorKind::PermissionDenied {
        return no_permission(path);
    }
    if error.kind() != io::ErrorKind::NotFound {
        return silent(path, error);
    }
    refused(
        4011,
        path,
        "it does not exist",
        "there is nothing at this path on the host where filterd runs",
        "check the spelling; `lsblk` lists the block devices of this host",
    )
}

/// Mount points without which the host does not run.
const SYSTEM: [&str; 6] = ["/", "/boot", "/boot/efi", "/efi", "/usr", "/var"];

pub(super) fn mounted(path: &Path, name: &VolumeName, at: &str) -> Problem {
    if SYSTEM.contains(&at) {
        return refused(
            4012,
            path,
            format!("it carries the running system (mounted on {at})"),
            "a mounted disk cannot be taken over while it is in use, and the system's disk is \
             always in use",
            "protect the disks with the data; docs/limits.md tells about the boot disk",
        );
    }
    refused(
        4012,
        path,
        format!("it is mounted on {at}"),
        format!(
            "writes that bypass the protected device of {name} would be missing on the replica, \
             and two writers destroy a file system"
        ),
        format!("stop what uses {at}, run `umount {at}`, and run the same command again"),
    )
}

pub(crate) fn not_a_disk(path: &Path, directory: bool) -> Problem {
    let (because, next) = if directory {
        (
            "it is a directory",
            "name the block device the directory's file system is on (`findmnt -no SOURCE -T DIR` \
             tells) or a raw image file inside it",
        )
    } else {
        (
            "it is neither a block device nor a regular file",
            "name a block device such as /dev/vdb, or a raw image file",
        )
    };
    let why = "only block devices and raw image files have blocks to record";
    refused(4013, path, because, why, next)
}

pub(super) fn swap(path: &Path) -> Problem {
    refused(
        4014,
        path,
        "it is in use as swap space",
        "swap holds this host's memory; replicating it is useless, and running out of memory while \
         recording swap writes would stop the host",
        format!(
            "choose another device; to free this one run `swapoff {}` and remove it from /etc/fstab",
            path.display()
        ),
    )
}

pub(super) fn holders(path: &Path, holders: &[String]) -> Problem {
    refused(
        4015,
        path,
        format!("other devices are built on it ({})", holders.join(", ")),
        "LVM, RAID or encryption writes to it directly, past the filter",
        "protect the device on top instead (a logical volume can be protected), or deactivate it \
         first: `lsblk` shows what is on top, then `vgchange -an`, `mdadm --stop` or \
         `cryptsetup close`",
    )
}

pub(crate) fn claimed(path: &Path) -> Problem {
    refused(
        4016,
        path,
        "another program has it open exclusively",
        "a second writer would change blocks without being recorded",
        format!(
            "find the program with `fuser -v {0}` or `lslocks`, stop it (a virtual machine, \
             qemu-nbd, another filterd), and run the same command again",
            path.display()
        ),
    )
}

pub(crate) fn read_only(path: &Path) -> Problem {
    refused(
        4017,
        path,
        "it is read-only",
        "there will be no writes to record; a write-protected or failing disk can be the cause",
        format!(
            "for a device look at `blockdev --getro {0}` and the kernel log; for a file look at \
             its mount options and `lsattr {0}`",
            path.display()
        ),
    )
}

pub(crate) fn zoned(path: &Path, model: &str) -> Problem {
    refused(
        4018,
        path,
        format!("it is a zoned device ({model})"),
        "zoned devices accept writes only in order within a zone; the base image and the views of \
         the target do not keep that",
        "choose a conventional device, or protect a volume above the layer that hides the zones",
    )
}

pub(crate) fn bad_size(path: &Path, bytes: u64, logical: u32) -> Option<Problem> {
    if bytes < MIN_VOLUME {
        return Some(refused(
            4019,
            path,
            format!("its size is {bytes} bytes, less than {MIN_VOLUME}"),
            "that is too small for a volume; an empty file, a card reader without a card and a \
             detached loop device look like this",
            "check that this is the device meant (`lsblk`); make a file larger with \
             `truncate --size`",
        ));
    }
    if bytes > MAX_INDEXED_BYTES {
        return Some(refused(
            4035,
            path,
            format!("its size is {bytes} bytes, more than {MAX_INDEXED_BYTES}"),
            "the target's index addresses 512 TiB in a volume",
            "divide it: protect several smaller devices, for example logical volumes",
        ));
    }
    if !bytes.is_multiple_of(u64::from(logical)) {
        let up = bytes.next_multiple_of(u64::from(logical));
        return Some(refused(
            4020,
            path,
            format!("its size of {bytes} bytes is not a multiple of its block size of {logical}"),
            "the last bytes could not be reached by direct I/O and would be missing",
            format!("extend it to whole blocks: `truncate --size={up} {}`", path.display()),
        ));
    }
    None
}

pub(super) fn already_protected(path: &Path, by: &VolumeName) -> Problem {
    refused(
        4021,
        path,
        format!("it is already protected as {by}"),
        "a device is recorded by one volume only",
        format!(
            "nothing is to be done if that is what you want; otherwise run `farshore unprotect \
             {by}` first"
        ),
    )
}

pub(super) fn overlaps(path: &Path, other: &Path, by: &VolumeName) -> Problem {
    refused(
        4033,
        path,
        format!("{} is protected as {by}, and holds the same blocks", other.display()),
        "a block is recorded by one volume only: a write by the other way would be missing in one \
         of the two",
        format!(
            "protect either the disk or its partitions; to change, `farshore unprotect {by}` first"
        ),
    )
}

pub(super) fn on_protected(path: &Path, by: &VolumeName) -> Problem {
    refused(
        4034,
        path,
        format!("it lies on the protected device of {by}"),
        "every write to it is recorded already, and a filter on top of itself could not start \
         after a boot",
        format!("nothing is to be done: the points of {by} contain it"),
    )
}

pub(super) fn name_taken(path: &Path, name: &VolumeName, other: &Path) -> Problem {
    refused(
        4022,
        path,
        format!("the name {name} belongs to {}", other.display()),
        "names are unique on a host",
        format!("choose another --name, or run `farshore unprotect {name}` if it is obsolete"),
    )
}

pub(super) fn own_files(path: &Path, what: &str, at: &Path) -> Problem {
    refused(
        4023,
        path,
        format!("{what} of filterd ({}) lies on it", at.display()),
        "filterd would record its own writes for ever, and could not start when the volume needs it",
        "move these files to another disk (--root, or the directories in filterd.toml), restart \
         filterd, and run the same command again",
    )
}

pub(super) fn socket_too_long(path: &Path, socket: &Path, bytes: usize) -> Problem {
    refused(
        4024,
        path,
        format!("the path of its socket is {bytes} bytes long: {}", socket.display()),
        "Linux takes at most 107 bytes for the path of a unix socket",
        "choose a shorter path with --nbd-socket, or a shorter --root for filterd",
    )
}

pub(super) fn loop_backing(path: &Path, device: &str) -> Problem {
    refused(
        4025,
        path,
        format!("it is the backing file of /dev/{device}"),
        "writes through the loop device would bypass the filter",
        format!(
            "unmount what is on /dev/{device}, run `losetup --detach /dev/{device}`, and run the \
             same command again; or protect /dev/{device} itself"
        ),
    )
}

pub(super) fn no_permission(path: &Path) -> Problem {
    refused(
        4026,
        path,
        "filterd may not open it",
        "the user that runs filterd lacks the permission to read and write it, or to enter one of \
         the directories above it",
        format!(
            "run filterd as root (or a user in group disk) for block devices; for a file give its \
             user access: `ls -ld {}` shows what it has",
            path.display()
        ),
    )
}

pub(crate) fn block_size(path: &Path, logical: u32, physical: u32) -> Problem {
    refused(
        4027,
        path,
        format!("its block sizes are unusual ({logical} logical, {physical} physical bytes)"),
        "block sizes must be powers of two from 512 to 65536 bytes",
        "protect a partition, loop or device-mapper device on top that has ordinary block sizes",
    )
}

pub(super) fn socket_in_use(path: &Path, socket: &Path, by: &VolumeName) -> Problem {
    refused(
        4028,
        path,
        format!("the socket {} already serves {by}", socket.display()),
        "each volume has a socket of its own",
        "choose another path with --nbd-socket, or leave the option out",
    )
}

/// The kernel failed to say what is needed to judge.
pub(crate) fn silent(path: &Path, error: &io::Error) -> Problem {
    refused(
        4029,
        path,
        format!("it cannot be examined: {error}"),
        "without knowing what it is, protecting it would be a guess",
        "look at the kernel log (`dmesg`); the device may be failing or going away",
    )
}

pub(crate) fn cannot_open(path: &Path, error: &io::Error) -> Problem {
    match error.raw_os_error() {
        Some(libc::EBUSY | libc::ETXTBSY) => claimed(path),
        Some(libc::EROFS) => read_only(path),
        // A file marked immutable; for a device, a container that may not use it.
        Some(libc::EPERM) if path.is_file() => read_only(path),
        _ => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => cannot_look(path, error),
            _ => silent(path, error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_to_open_has_its_code() {
        let codes = [
            (libc::EBUSY, 4016),
            (libc::EROFS, 4017),
            (libc::EPERM, 4026),
            (libc::EACCES, 4026),
            (libc::ENOENT, 4011),
            (libc::ENXIO, 4029),
            (libc::EIO, 4029),
        ];
        for (errno, code) in codes {
            let error = io::Error::from_raw_os_error(errno);
            assert_eq!(cannot_open(Path::new("/dev/vdb"), &error).code.0, code, "{error}");
        }
        let immutable = io::Error::from_raw_os_error(libc::EPERM);
        let program = std::env::current_exe().unwrap();
        assert_eq!(cannot_open(&program, &immutable).code.0, 4017);
    }
}
