//! What tells whether a backing device changed behind our back.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use farshore_extent::VolumeSize;
use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};

use super::open::{device_numbers, sysfs_name};
use crate::control::BackendKind;

/// Equal identities at a clean stop and at the next start mean: nobody wrote to it between. Any
/// difference means that somebody may have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Identity {
    /// Of a file.
    File(FileIdentity),
    /// Of a block device.
    Block(BlockIdentity),
}

/// Every write to a file changes its times. Two things escape: a write within the clock tick of the
/// kernel (4 ms before Linux 6.13) in which the identity was taken, and a stranger's direct write
/// whose time did not reach the disk before a power loss.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Device the file system is on.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Time of the last change of content, in nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Time of the last change of anything, in nanoseconds since 1970.
    pub ctime_ns: i64,
}

/// The counter of written sectors starts at zero with each boot, so the boot is part of it: after
/// a reboot a block device always counts as changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockIdentity {
    /// Kernel's random identity of this boot.
    pub boot_id: String,
    /// Device number.
    pub rdev: u64,
    /// Counts attachments of disks on this machine since boot, where the kernel has it: a disk
    /// taken out and put back has a new one.
    pub disk_sequence: Option<u64>,
    /// Sectors written and discarded since boot, as the kernel counts.
    pub written_sectors: u64,
    /// Size in bytes.
    pub size: u64,
    /// What the hardware or the volume manager calls it in every boot, where it has such a name.
    pub lasting: Option<String>,
}

impl Identity {
    /// Whether `later` can be what `self` has become by the writes of a filterd that was not
    /// stopped in order. In another boot a block device counts only when a lasting name says that
    /// it is the same and nobody has written to it yet in that boot; a file only when it is the
    /// same file.
    #[must_use]
    pub fn may_be_followed_by(&self, later: &Self) -> bool {
        match (self, later) {
            (Self::File(a), Self::File(b)) => (a.dev, a.ino, a.size) == (b.dev, b.ino, b.size),
            (Self::Block(a), Self::Block(b)) if a.boot_id == b.boot_id => {
                let same = (a.rdev, a.disk_sequence, a.size) == (b.rdev, b.disk_sequence, b.size);
                same && a.written_sectors <= b.written_sectors
            }
            (Self::Block(a), Self::Block(b)) => {
                let same = a.lasting.is_some() && (&a.lasting, a.size) == (&b.lasting, b.size);
                same && b.written_sectors == 0
            }
            (Self::File(_), Self::Block(_)) | (Self::Block(_), Self::File(_)) => false,
        }
    }

    pub(super) fn of(fd: BorrowedFd<'_>, kind: BackendKind, size: VolumeSize) -> io::Result<Self> {
        let stat = fstat(fd)?;
        let nanos = |seconds: i64, nanos: i64| seconds.wrapping_mul(1_000_000_000) + nanos;
        match kind {
            BackendKind::File => Ok(Self::File(FileIdentity {
                dev: stat.st_dev,
                ino: stat.st_ino,
                size: u64::try_from(stat.st_size).unwrap_or(0),
                mtime_ns: nanos(stat.st_mtime, stat.st_mtime_nsec),
                ctime_ns: nanos(stat.st_ctime, stat.st_ctime_nsec),
            })),
            BackendKind::Block => {
                let name = sysfs_name(device_numbers(stat.st_rdev));
                let directory = Path::new("/sys/dev/block").join(name);
                let counters = std::fs::read_to_string(directory.join("stat"))?;
                let disk_sequence = ["diskseq", "../diskseq"].iter().find_map(|file| {
                    std::fs::read_to_string(directory.join(file)).ok()?.trim().parse().ok()
                });
                let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
                Ok(Self::Block(BlockIdentity {
                    boot_id: boot_id.trim().to_owned(),
                    rdev: stat.st_rdev,
                    disk_sequence,
                    written_sectors: written_sectors(&counters)?,
                    size: size.get(),
                    lasting: lasting(&directory),
                }))
            }
        }
    }
}

/// Where sysfs has a name of a disk or of a volume that outlasts a boot.
const LASTING: [&str; 7] =
    ["wwid", "device/wwid", "uuid", "nguid", "dm/uuid", "serial", "device/serial"];

/// The lasting name of a device, or of its disk and the number of the partition.
fn lasting(directory: &Path) -> Option<String> {
    let read = |file: &str| {
        let text = std::fs::read_to_string(directory.join(file)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    let partition = read("partition");
    let above = if partition.is_some() { "../" } else { "" };
    let name = LASTING.iter().find_map(|file| Some((file, read(&format!("{above}{file}"))?)));
    let (kind, name) = name?;
    Some(format!("{kind} {name} {}", partition.unwrap_or_default()))
}

/// Fields 7 (write sectors) and, since Linux 4.19, 14 (discard sectors) of a block device's `stat`.
fn written_sectors(counters: &str) -> io::Result<u64> {
    let fields: Vec<u64> = counters.split_whitespace().map_while(|f| f.parse().ok()).collect();
    let written = fields.get(6).ok_or(io::ErrorKind::InvalidData)?;
    Ok(written.wrapping_add(fields.get(13).copied().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_and_discarded_sectors_are_counted() {
        let old = "1 2 3 4 5 6 700 8 9 10 11";
        let new = "1 2 3 4 5 6 700 8 9 10 11 12 13 44 15 16 17";
        assert_eq!(written_sectors(old).unwrap(), 700);
        assert_eq!(written_sectors(new).unwrap(), 744);
        assert!(written_sectors("").is_err());
    }
}
