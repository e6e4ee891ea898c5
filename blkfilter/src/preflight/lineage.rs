//! What a block device lies on: the disk of a partition, the devices that a stacked one is built on.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::host::{DevName, HostRoots};

/// The disk that a partition is part of; none for anything else.
pub(super) fn disk_of(roots: &HostRoots, dev: &str) -> Option<DevName> {
    let directory = fs::canonicalize(roots.directory(dev)).ok()?;
    let disk = directory.parent().filter(|_| directory.join("partition").exists())?;
    number(&disk.join("dev"))
}

/// Everything the device lies on, itself included.
pub(super) fn below(roots: &HostRoots, dev: &str) -> BTreeSet<DevName> {
    let mut known = BTreeSet::new();
    let mut left = vec![dev.to_owned()];
    while let Some(dev) = left.pop() {
        let slaves = fs::read_dir(roots.directory(&dev).join("slaves"));
        let slaves = slaves.into_iter().flatten().flatten();
        let slaves: Vec<_> = slaves.filter_map(|s| number(&s.path().join("dev"))).collect();
        let disk = disk_of(roots, &dev);
        if known.insert(dev) {
            left.extend(disk);
            left.extend(slaves);
        }
    }
    known
}

fn number(file: &Path) -> Option<DevName> {
    Some(fs::read_to_string(file).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use farshore_extent::VolumeName;
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};

    use super::super::{OwnPlaces, Running, Subject};
    use super::*;

    /// `/dev/vdb` (8:16) with the partition `vdb1` (8:17), on that `dm-0` (253:0), and a ublk
    /// device (259:3) with a partition (259:4).
    struct Host {
        dir: tempfile::TempDir,
        roots: HostRoots,
    }

    impl Host {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let roots = HostRoots { proc: dir.path().join("proc"), sys: dir.path().join("sys") };
            let host = Self { dir, roots };
            host.device("8:16", "devices/vdb");
            host.device("8:17", "devices/vdb/vdb1");
            host.put("sys/devices/vdb/vdb1/partition", "1\n");
            host.device("253:0", "devices/dm-0");
            host.put("sys/devices/dm-0/slaves/vdb1/dev", "8:17\n");
            host.device("259:3", "devices/ublkb3");
            host.device("259:4", "devices/ublkb3/ublkb3p1");
            host.put("sys/devices/ublkb3/ublkb3p1/partition", "1\n");
            host
        }

        fn put(&self, path: &str, text: &str) {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
        }

        fn device(&self, number: &str, place: &str) {
            self.put(&format!("sys/{place}/dev"), &format!("{number}\n"));
            let numbers = self.dir.path().join("sys/dev/block");
            fs::create_dir_all(&numbers).unwrap();
            symlink(self.dir.path().join("sys").join(place), numbers.join(number)).unwrap();
        }

        /// A node; none where they cannot be made.
        fn node(&self, (major, minor): (u64, u64)) -> Option<PathBuf> {
            let node = self.dir.path().join(format!("node-{major}-{minor}"));
            let made = mknod(&node, SFlag::S_IFBLK, Mode::S_IRUSR, makedev(major, minor));
            made.is_ok().then_some(node)
        }

        fn subject(&self, dev: &str) -> Subject<'static> {
            Subject::device(&self.roots, Path::new("/dev/x"), dev.to_owned())
        }

        fn relative(&self, dev: &str, running: &Running) -> Option<u16> {
            let found = self.subject(dev).relative(&self.roots, std::slice::from_ref(running));
            found.map(|problem| problem.code.0)
        }
    }

    fn volume(backing: PathBuf, device: Option<PathBuf>) -> Running {
        Running { name: VolumeName::new("pgdata").unwrap(), backing, nbd_socket: None, device }
    }

    #[test]
    fn a_device_lies_on_its_disk_and_on_what_it_is_built_of() {
        let host = Host::new();
        let names = |dev| below(&host.roots, dev).into_iter().collect::<Vec<_>>();
        assert_eq!(names("253:0"), ["253:0", "8:16", "8:17"]);
        assert_eq!(names("8:16"), ["8:16"]);
        assert_eq!(disk_of(&host.roots, "8:17").as_deref(), Some("8:16"));
        assert_eq!(disk_of(&host.roots, "8:16"), None);
        assert_eq!(disk_of(&host.roots, "9:9"), None);
    }

    #[test]
    fn a_partition_of_a_protected_disk_and_the_disk_of_a_protected_partition_are_refused() {
        let host = Host::new();
        let (Some(disk), Some(part)) = (host.node((8, 16)), host.node((8, 17))) else {
            println!("skipped: device nodes cannot be made here");
            return;
        };
        assert_eq!(host.relative("8:17", &volume(disk.clone(), None)), Some(4033));
        assert_eq!(host.relative("8:16", &volume(part, None)), Some(4033));
        assert_eq!(host.relative("259:3", &volume(disk, None)), None);
    }

    #[test]
    fn what_lies_on_a_device_of_ours_is_refused() {
        let host = Host::new();
        let Some(served) = host.node((259, 3)) else {
            println!("skipped: device nodes cannot be made here");
            return;
        };
        let running = volume("/dev/vdz".into(), Some(served));
        assert_eq!(host.relative("259:3", &running), Some(4034), "the device itself");
        assert_eq!(host.relative("259:4", &running), Some(4034), "a partition");
        host.put("sys/devices/dm-0/slaves/ublkb3p1/dev", "259:4\n");
        assert_eq!(host.relative("253:0", &running), Some(4034), "built on a partition");
        assert_eq!(host.relative("8:16", &running), None);
        let file = Subject { file: Some((makedev(259, 4), 1)), device: None, ..host.subject("x") };
        let found = file.relative(&host.roots, &[running]);
        assert_eq!(found.unwrap().code.0, 4034, "a file on a file system on a partition");
    }

    #[test]
    fn what_is_built_on_the_disk_of_a_partition_counts() {
        let host = Host::new();
        host.put("sys/devices/vdb/holders/md0/dev", "9:0\n");
        let subject = host.subject("8:17");
        let places = OwnPlaces { state: "/proc".into(), run: "/proc".into() };
        let name = VolumeName::new("pgdata").unwrap();
        let found = subject.users(&host.roots, &name, &places);
        assert_eq!(found.len(), 1);
        assert!(found[0].code.0 == 4015 && found[0].what.contains("md0"), "{}", found[0].what);
    }
}
