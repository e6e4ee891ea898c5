//! What does not stand in the way of protecting and should be known: programs that find disks by
//! the identifiers on them would see each twice, on the origin and on the protected device.
//!
//! What lies on a device is taken from udev's database; where it has none, from the few
//! signatures that matter here.

use std::fs;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use farshore_extent::VolumeName;

use super::block_device;
use super::host::HostRoots;
use crate::control::Hint;

/// Enough to hold the signatures below, in bytes.
const HEAD: usize = 68 << 10;

/// Start of the superblock of btrfs.
const BTRFS: usize = 64 << 10;

/// Hints about protecting `path` as `name`; none for a file, which nobody scans.
#[must_use]
pub fn hints(roots: &HostRoots, name: &VolumeName, path: &Path) -> Vec<Hint> {
    let all = contents(roots, path);
    let mut found: Vec<Hint> = all.iter().filter_map(|c| c.hint(name)).collect();
    found.extend(fstab(roots, name, &all));
    found
}

/// Entries of `/etc/fstab` that mount `path` itself, although it is protected as `name`: at the
/// next boot they would go past the filter.
#[must_use]
pub fn fstab_hints(roots: &HostRoots, name: &VolumeName, path: &Path) -> Vec<Hint> {
    fstab(roots, name, &contents(roots, path))
}

/// Of the device and its partitions, the device first.
fn contents(roots: &HostRoots, path: &Path) -> Vec<Contents> {
    let Some(dev) = block_device(path) else { return Vec::new() };
    let parts = roots.partitions_of(&dev).into_iter();
    let nodes = parts.map(|(node, dev)| Contents::of(roots, &dev, &node));
    std::iter::once(Contents::of(roots, &dev, path)).chain(nodes).collect()
}

/// What lies on a device, as far as it is known.
#[derive(Debug)]
pub(super) struct Contents {
    /// The node asked for.
    node: PathBuf,
    /// Type as libblkid names it: `ext4`, `LVM2_member`.
    kind: Option<String>,
    /// Devices of a btrfs, when they were counted.
    members: u64,
    /// Specifications under which fstab may name it: `UUID=…`, `/dev/disk/by-id/…`.
    names: Vec<String>,
}

impl Contents {
    fn of(roots: &HostRoots, dev: &str, node: &Path) -> Self {
        let told = fs::read_to_string(roots.beside("run/udev/data").join(format!("b{dev}")));
        let mut contents = Self::told(node, &told.unwrap_or_default());
        let head = head(node);
        contents.kind = contents.kind.or_else(|| signature(&head).map(str::to_owned));
        if contents.kind.as_deref() == Some("btrfs") {
            contents.members = little_endian(&head, BTRFS + 0x88).unwrap_or(1);
        }
        contents
    }

    /// From an entry of udev's database.
    pub(super) fn told(node: &Path, entry: &str) -> Self {
        let property = |name: &str| {
            let value = entry.lines().find_map(|line| line.strip_prefix("E:")?.strip_prefix(name));
            value.and_then(|rest| rest.strip_prefix('=')).map(str::to_owned)
        };
        let mut names = vec![node.display().to_string()];
        for (spec, name) in [
            ("UUID", "ID_FS_UUID"),
            ("LABEL", "ID_FS_LABEL"),
            ("PARTUUID", "ID_PART_ENTRY_UUID"),
            ("PARTLABEL", "ID_PART_ENTRY_NAME"),
        ] {
            names.extend(property(name).map(|value| format!("{spec}={value}")));
        }
        let links = entry.lines().filter_map(|line| line.strip_prefix("S:"));
        names.extend(links.map(|link| format!("/dev/{link}")));
        Self { node: node.to_owned(), kind: property("ID_FS_TYPE"), members: 1, names }
    }

    pub(super) fn hint(&self, name: &VolumeName) -> Option<Hint> {
        let node = self.node.display();
        let ours = format!("/dev/farshore/{name}");
        let (what, next) = match self.kind.as_deref()? {
            "LVM2_member" => (
                "is a physical volume of LVM, which would find its identifier twice and may \
                 activate the volume group on the origin, past the filter"
                    .to_owned(),
                format!(
                    "lvmdevices --deldev {node}; lvmdevices --adddev {ours}   # without a devices \
                     file: global_filter = [ \"r|^{node}|\", \"r|^/dev/disk/|\", \
                     \"r|^/dev/block/|\", \"a|.*|\" ] in \
                     /etc/lvm/lvm.conf"
                ),
            ),
            "btrfs" if self.members > 1 => (
                format!(
                    "is one of {} devices of a btrfs: a point is of use only with all of them",
                    self.members
                ),
                format!(
                    "# protect every device of it (`btrfs filesystem show {node}` lists them), \
                     then: btrfs device scan --forget; btrfs device scan /dev/farshore/*"
                ),
            ),
            "btrfs" => (
                "holds a btrfs, which takes devices by identifier and could take the origin"
                    .to_owned(),
                format!("btrfs device scan --forget {node}; btrfs device scan {ours}"),
            ),
            "linux_raid_member" => (
                "is a member of an md array, which could be assembled on the origin".to_owned(),
                "echo 'DEVICE /dev/farshore/*' >> /etc/mdadm/mdadm.conf && update-initramfs -u   \
                 # keep other arrays: list their devices there, too"
                    .to_owned(),
            ),
            "zfs_member" => (
                "is part of a ZFS pool, which could be imported from the origin".to_owned(),
                "# import it by `zpool import -d /dev/farshore POOL`".to_owned(),
            ),
            "mpath_member" => (
                "is one path of a multipath device: writes on another path are not seen".to_owned(),
                "multipath -ll   # protect the device in /dev/mapper instead".to_owned(),
            ),
            _ => return None,
        };
        Some(Hint { what: format!("{node} {what}"), next })
    }
}

/// Entries of fstab that mount one of `all`, with what should stand there.
fn fstab(roots: &HostRoots, name: &VolumeName, all: &[Contents]) -> Vec<Hint> {
    let text = fs::read_to_string(roots.beside("etc/fstab")).unwrap_or_default();
    let entries = text.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [spec, at, kind, options, ..] = *fields.as_slice() else { return None };
        (!spec.starts_with('#') && kind != "swap").then_some((spec, at, kind, options))
    });
    let ours = format!("/dev/farshore/{name}");
    let of_one = entries.filter_map(|(spec, at, kind, options)| {
        let spec_of = |c: &&Contents| c.names.iter().any(|n| n == &spec.replace('"', ""));
        // A partition's name below ours is udev's affair.
        let part = all.iter().position(|c| spec_of(&c))?;
        let suffix = if part == 0 { "" } else { "-partN" };
        Some(Hint {
            what: format!("/etc/fstab mounts {spec} on {at}: at boot that may be the origin"),
            next: format!(
                "# put there: {ours}{suffix} {at} {kind} \
                 {options},_netdev,x-systemd.after=farshore-filterd.service 0 2"
            ),
        })
    });
    of_one.collect()
}

/// The first bytes; fewer, or none, when they cannot be read.
fn head(node: &Path) -> Vec<u8> {
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(node);
    let mut head = Vec::new();
    if let Ok(file) = file {
        // What was read before an error counts.
        let _ = file.take(HEAD as u64).read_to_end(&mut head);
    }
    head
}

/// The signatures that matter, named as libblkid does.
pub(super) fn signature(head: &[u8]) -> Option<&'static str> {
    let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
    let lvm = |sector: usize| at(sector, b"LABELONE") && at(sector + 24, b"LVM2 001");
    if (0..4).any(|n| lvm(n * 512)) {
        return Some("LVM2_member");
    }
    // md metadata 1.1 and 1.2.
    if [0, 4096].into_iter().any(|offset| at(offset, &0xa92b_4efc_u32.to_le_bytes())) {
        return Some("linux_raid_member");
    }
    at(BTRFS + 0x40, b"_BHRfS_M").then_some("btrfs")
}

fn little_endian(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pgdata() -> VolumeName {
        VolumeName::new("pgdata").unwrap()
    }

    fn of_kind(kind: &str) -> Contents {
        Contents::told(Path::new("/dev/vdb"), &format!("E:ID_FS_TYPE={kind}\n"))
    }

    #[test]
    fn the_database_of_udev_is_understood() {
        let entry = "S:disk/by-id/virtio-1\nI:77\nE:ID_FS_TYPE=xfs\nE:ID_FS_UUID=6f-1\n\
                     E:ID_FS_UUID_ENC=6f-2\nE:ID_FS_LABEL=data\nG:systemd\n";
        let found = Contents::told(Path::new("/dev/vdb"), entry);
        assert_eq!(found.kind.as_deref(), Some("xfs"));
        let names = ["/dev/vdb", "UUID=6f-1", "LABEL=data", "/dev/disk/by-id/virtio-1"];
        assert_eq!(found.names, names);
        assert_eq!(found.hint(&pgdata()), None, "xfs is found by its place in fstab only");
    }

    #[test]
    fn whatever_finds_disks_by_their_content_is_told_where_to_look() {
        for kind in ["LVM2_member", "btrfs", "linux_raid_member", "zfs_member"] {
            let hint = of_kind(kind).hint(&pgdata()).unwrap();
            assert!(hint.what.starts_with("/dev/vdb ") && !hint.what.contains('\n'), "{hint:?}");
            assert!(hint.next.contains("/dev/farshore"), "{hint:?}");
        }
        assert!(of_kind("mpath_member").hint(&pgdata()).unwrap().next.contains("/dev/mapper"));
        let pool = Contents { members: 3, ..of_kind("btrfs") }.hint(&pgdata()).unwrap();
        assert!(pool.what.contains("3 devices"), "{}", pool.what);
        for kind in ["ext4", "crypto_LUKS"] {
            assert_eq!(of_kind(kind).hint(&pgdata()), None, "{kind}");
        }
    }

    #[test]
    fn without_udev_the_signatures_are_read_from_the_device() {
        let mut head = vec![0; HEAD];
        assert_eq!(signature(&head), None);
        head[BTRFS + 0x40..BTRFS + 0x48].copy_from_slice(b"_BHRfS_M");
        head[BTRFS + 0x88] = 2;
        assert_eq!(signature(&head), Some("btrfs"));
        let dir = tempfile::tempdir().unwrap();
        let node = dir.path().join("node");
        fs::write(&node, &head).unwrap();
        let nothing = HostRoots { proc: dir.path().join("proc"), sys: dir.path().join("sys") };
        let found = Contents::of(&nothing, "8:16", &node);
        assert_eq!((found.kind.as_deref(), found.members), (Some("btrfs"), 2));
        head[512..520].copy_from_slice(b"LABELONE");
        head[536..544].copy_from_slice(b"LVM2 001");
        assert_eq!(signature(&head), Some("LVM2_member"));
        assert_eq!(signature(&[]), None);
        let mut raid = vec![0; 8192];
        raid[4096..4100].copy_from_slice(&[0xfc, 0x4e, 0x2b, 0xa9]);
        assert_eq!(signature(&raid), Some("linux_raid_member"));
    }

    #[test]
    fn an_entry_of_fstab_that_means_the_origin_is_rewritten() {
        let dir = tempfile::tempdir().unwrap();
        let roots = HostRoots { proc: dir.path().join("proc"), sys: dir.path().join("sys") };
        fs::create_dir(dir.path().join("etc")).unwrap();
        let text = "# UUID=6f-1 /old xfs defaults 0 2\nUUID=\"6f-1\" /srv xfs noatime 0 2\n\
                    UUID=77 /other ext4 defaults\n/dev/vdb none swap sw\nshort line\n";
        fs::write(dir.path().join("etc/fstab"), text).unwrap();
        let entry = "E:ID_FS_UUID=6f-1\n";
        let found = fstab(&roots, &pgdata(), &[Contents::told(Path::new("/dev/vdb"), entry)]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].what.contains("on /srv"));
        let line = "/dev/farshore/pgdata /srv xfs \
                    noatime,_netdev,x-systemd.after=farshore-filterd.service";
        assert!(found[0].next.contains(line), "{}", found[0].next);
    }

    #[test]
    fn files_have_no_hints() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(hints(&HostRoots::default(), &pgdata(), file.path()).is_empty());
    }
}
