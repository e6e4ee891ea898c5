//! Stable names of block devices: `/dev/farshore/NAME`, and no second disk with the same UUIDs.
//!
//! ```text
//! RUN/devices/ublkb3   FARSHORE_VOLUME=pgdata    a device of ours; and FARSHORE_ID, the volume's,
//!                                                and FARSHORE_STARTING=1 until it is there
//! RUN/origins/vdb      FARSHORE_ORIGIN=pgdata    the disk behind it: same contents, not to be used
//! ```
//! The udev rules we ship read these files when the kernel announces a change, so a rule asks
//! nobody and never waits. Where no udev makes the name, filterd does; it never takes a name that
//! belongs to something else. The files outlive filterd, as the devices do; both end with the boot.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use farshore_extent::{VolumeId, VolumeName};

use crate::durable_fs;

/// The run directory that our udev rules read.
const UDEV_READS: &str = "/run/farshore";

/// In the announcement of a device that is being made.
const STARTING: &str = "FARSHORE_STARTING=1\n";

/// How long udev may take to make a name.
const UDEV_TAKES: Duration = Duration::from_secs(3);

/// Between two looks whether it has.
const LOOK: Duration = Duration::from_millis(10);

/// The places where names are kept; others in tests.
#[derive(Debug, Clone)]
pub(super) struct Names {
    run: PathBuf,
    dev: PathBuf,
    sys: PathBuf,
    /// Exists while udev runs.
    udev: PathBuf,
}

/// A device of ours as an earlier run announced it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Announced {
    /// The kernel's name.
    pub(super) kernel: String,
    pub(super) name: String,
    pub(super) volume: VolumeId,
}

impl Names {
    pub(super) fn new(run: &Path) -> Self {
        let (dev, sys, udev) = ("/dev".into(), "/sys".into(), "/run/udev/control".into());
        Self { run: run.to_owned(), dev, sys, udev }
    }

    fn file(&self, kernel: &str) -> PathBuf {
        self.run.join("devices").join(kernel)
    }

    /// Says whose the device `kernel` is. Before it appears, so that udev knows it at first sight;
    /// `starting` until it has.
    pub(super) fn announce(
        &self,
        kernel: &str,
        name: &VolumeName,
        volume: VolumeId,
        starting: bool,
    ) -> io::Result<()> {
        let mut text = format!("FARSHORE_VOLUME={name}\nFARSHORE_ID={volume}\n");
        if starting {
            text += STARTING;
        }
        put(&self.file(kernel), &text)
    }

    /// Whether an earlier run announced the volume's device and did not live to see it appear.
    pub(super) fn was_starting(&self, kernel: &str, volume: VolumeId) -> bool {
        let text = fs::read_to_string(self.file(kernel)).unwrap_or_default();
        text.contains(&format!("FARSHORE_ID={volume}\n")) && text.contains(STARTING)
    }

    /// Takes the announcement back of a device that nobody, udev included, should look at.
    pub(super) fn forget(&self, kernel: &str) {
        remove(&self.file(kernel));
    }

    /// Everything announced and not withdrawn.
    pub(super) fn announced(&self) -> Vec<Announced> {
        let Ok(entries) = fs::read_dir(self.run.join("devices")) else { return Vec::new() };
        let read = |entry: fs::DirEntry| {
            let text = fs::read_to_string(entry.path()).ok()?;
            let value =
                |key| text.lines().find_map(|line| line.strip_prefix(key)).map(str::to_owned);
            let kernel = entry.file_name().into_string().ok()?;
            let volume = value("FARSHORE_ID=")?.parse().ok()?;
            Some(Announced { kernel, name: value("FARSHORE_VOLUME=")?, volume })
        };
        entries.flatten().filter_map(read).collect()
    }

    /// The stable name of the device `kernel`, made if need be; `None` when something that is not
    /// ours has it.
    pub(super) fn link(&self, kernel: &str, name: &str) -> Option<PathBuf> {
        self.changed(kernel);
        let link = self.dev.join("farshore").join(name);
        if self.udev.exists() && self.run == Path::new(UDEV_READS) {
            let until = Instant::now() + UDEV_TAKES;
            while !leads_to(&link, kernel) && Instant::now() < until {
                // Nobody announces that udev has finished.
                #[allow(clippy::disallowed_methods)]
                std::thread::sleep(LOOK);
            }
        }
        if !self.make(&link, kernel) {
            return None;
        }
        for (part, number) in self.partitions(kernel) {
            self.make(&self.dev.join("farshore").join(format!("{name}-part{number}")), &part);
        }
        Some(link)
    }

    /// Makes one link; `false` when the name is taken.
    fn make(&self, link: &Path, kernel: &str) -> bool {
        if leads_to(link, kernel) {
            return true;
        }
        if !self.may_replace(link) {
            tracing::warn!(link = %link.display(), kernel, "the name belongs to something else");
            return false;
        }
        let made = durable_fs::create_directory(&self.dev.join("farshore"), 0o755).and_then(|()| {
            match fs::remove_file(link) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
                _ => symlink(Path::new("..").join(kernel), link),
            }
        });
        made.inspect_err(|error| tracing::warn!(link = %link.display(), %error, "no stable name"))
            .is_ok()
    }

    /// Whether nothing is there, or a link of ours to a device that is gone.
    fn may_replace(&self, link: &Path) -> bool {
        match fs::symlink_metadata(link) {
            Err(error) => error.kind() == io::ErrorKind::NotFound,
            Ok(metadata) if !metadata.is_symlink() => false,
            Ok(_) => !link.exists() && fs::read_link(link).is_ok_and(|to| to.starts_with("..")),
        }
    }

    /// Takes the names of a device that is gone away.
    pub(super) fn withdraw(&self, kernel: &str, name: &str) {
        remove(&self.file(kernel));
        self.changed(kernel);
        let directory = self.dev.join("farshore");
        let Ok(entries) = fs::read_dir(&directory) else { return };
        for entry in entries.flatten() {
            let file = entry.file_name();
            let rest = file.to_str().and_then(|file| file.strip_prefix(name));
            let ours = rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("-part"));
            let to = fs::read_link(entry.path()).ok();
            let to = to.as_ref().and_then(|to| to.file_name()?.to_str()?.strip_prefix(kernel));
            if ours && to.is_some_and(|rest| rest.is_empty() || rest.starts_with('p')) {
                remove(&entry.path());
            }
        }
        // Other volumes may still have names there.
        let _ = fs::remove_dir(&directory);
    }

    /// From now on nothing but filterd is to use the disk `kernel`.
    pub(super) fn claim_origin(&self, kernel: &str, name: &VolumeName) {
        let text = format!("FARSHORE_ORIGIN={name}\n");
        if let Err(error) = put(&self.run.join("origins").join(kernel), &text) {
            tracing::warn!(kernel, %error, "udev does not know the disk behind a protected volume");
        }
        self.changed(kernel);
    }

    /// The disk is an ordinary one again.
    pub(super) fn free_origin(&self, kernel: &str) {
        remove(&self.run.join("origins").join(kernel));
        self.changed(kernel);
    }

    /// Has udev look at a device, and at its partitions, again.
    fn changed(&self, kernel: &str) {
        let devices = self.partitions(kernel).into_iter().map(|(part, _)| part);
        for device in std::iter::once(kernel.to_owned()).chain(devices) {
            let file = self.sys.join("class/block").join(device).join("uevent");
            if let Err(error) = fs::write(&file, "change") {
                tracing::debug!(file = %file.display(), %error, "udev is not told");
            }
        }
    }

    /// Partitions of a disk: the kernel's name and the number of each.
    fn partitions(&self, kernel: &str) -> Vec<(String, u32)> {
        let Ok(entries) = fs::read_dir(self.sys.join("class/block").join(kernel)) else {
            return Vec::new();
        };
        let partition = |entry: fs::DirEntry| {
            let number = fs::read_to_string(entry.path().join("partition")).ok()?;
            Some((entry.file_name().into_string().ok()?, number.trim().parse().ok()?))
        };
        entries.flatten().filter_map(partition).collect()
    }
}

fn leads_to(link: &Path, kernel: &str) -> bool {
    fs::read_link(link).is_ok_and(|to| to.file_name().is_some_and(|name| name == kernel))
}

/// A whole file or none: udev may read at any moment.
fn put(path: &Path, text: &str) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        durable_fs::create_directory(directory, 0o755)?;
    }
    durable_fs::write(path, text.as_bytes(), 0o644)
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "cannot be removed");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Host {
        dir: tempfile::TempDir,
        names: Names,
    }

    impl Host {
        /// Without udev, with the disk `ublkb3` and its first partition.
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let at = |name: &str| dir.path().join(name);
            let names =
                Names { run: at("run"), dev: at("dev"), sys: at("sys"), udev: at("run/udev") };
            let host = Self { dir, names };
            fs::create_dir_all(host.at("dev")).unwrap();
            for node in ["ublkb3", "ublkb3p1", "vdb"] {
                fs::write(host.at("dev").join(node), "").unwrap();
            }
            let partition = host.at("sys/class/block/ublkb3/ublkb3p1");
            fs::create_dir_all(&partition).unwrap();
            fs::write(partition.join("partition"), "1\n").unwrap();
            host
        }

        fn at(&self, path: &str) -> PathBuf {
            self.dir.path().join(path)
        }

        fn link(&self, name: &str) -> Option<PathBuf> {
            fs::read_link(self.at("dev/farshore").join(name)).ok()
        }
    }

    #[test]
    fn without_udev_the_names_of_a_device_and_its_partitions_come_and_go_with_it() {
        let host = Host::new();
        let (name, id) = (VolumeName::new("pgdata").unwrap(), VolumeId::random());
        host.names.announce("ublkb3", &name, id, true).unwrap();
        assert!(host.names.was_starting("ublkb3", id));
        assert!(!host.names.was_starting("ublkb3", VolumeId::random()));
        host.names.announce("ublkb3", &name, id, false).unwrap();
        assert!(!host.names.was_starting("ublkb3", id));
        let (kernel, text) = ("ublkb3".to_owned(), "pgdata".to_owned());
        assert_eq!(host.names.announced(), [Announced { kernel, name: text, volume: id }]);
        let link = host.names.link("ublkb3", "pgdata").unwrap();
        assert_eq!(link, host.at("dev/farshore/pgdata"));
        assert_eq!(link.canonicalize().unwrap(), host.at("dev/ublkb3").canonicalize().unwrap());
        assert_eq!(host.link("pgdata-part1"), Some("../ublkb3p1".into()));
        symlink("../ublkb31", host.at("dev/farshore/pgdata2")).unwrap();
        host.names.withdraw("ublkb3", "pgdata");
        assert_eq!((host.link("pgdata"), host.link("pgdata-part1")), (None, None));
        assert_eq!(host.link("pgdata2"), Some("../ublkb31".into()), "of another volume");
        assert_eq!(host.names.announced(), []);
    }

    #[test]
    fn a_name_that_belongs_to_something_else_is_never_taken() {
        let host = Host::new();
        fs::create_dir(host.at("dev/farshore")).unwrap();
        fs::write(host.at("dev/farshore/file"), "mine").unwrap();
        symlink("../vdb", host.at("dev/farshore/live")).unwrap();
        symlink("/somewhere/else", host.at("dev/farshore/foreign")).unwrap();
        symlink("../ublkb9", host.at("dev/farshore/stale")).unwrap();
        for taken in ["file", "live", "foreign"] {
            assert_eq!(host.names.link("ublkb3", taken), None, "{taken}");
        }
        assert!(host.names.link("ublkb3", "stale").is_some(), "of a device that is gone");
        host.names.withdraw("ublkb3", "live");
        assert_eq!(host.link("live"), Some("../vdb".into()));
        assert_eq!(fs::read_to_string(host.at("dev/farshore/file")).unwrap(), "mine");
    }

    #[test]
    fn the_disk_behind_a_volume_is_marked_while_it_is_protected() {
        let host = Host::new();
        let uevent = host.at("sys/class/block/vdb/uevent");
        fs::create_dir_all(uevent.parent().unwrap()).unwrap();
        host.names.claim_origin("vdb", &VolumeName::new("pgdata").unwrap());
        let mark = host.at("run/origins/vdb");
        assert_eq!(fs::read_to_string(&mark).unwrap(), "FARSHORE_ORIGIN=pgdata\n");
        assert_eq!(fs::read_to_string(&uevent).unwrap(), "change");
        host.names.free_origin("vdb");
        assert!(!mark.exists());
    }
}
