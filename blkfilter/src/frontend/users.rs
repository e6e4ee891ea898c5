//! Who uses a block device of ours, on the whole host: mounts in every namespace, swap, devices
//! built on it, and processes that have it open.
//!
//! Looks at `/proc` and `/sys` only. It does no I/O on the device and touches no file system, so it
//! answers while the device waits for its server.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use super::claim::is_refusal;
use crate::preflight::{HostRoots, device_of};
use crate::sys::isolate;

/// How long the kernel may take to say whether a device is claimed.
const CLAIM: Duration = Duration::from_secs(5);

/// A process that has the device, or one of its partitions, open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Opener {
    pub(crate) pid: u32,
    pub(crate) name: String,
}

impl Opener {
    /// udev looks at every device for a moment, and lets it go by itself.
    fn is_passing(&self) -> bool {
        self.name.contains("udev") || self.name == "blkid"
    }
}

/// The users found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Users {
    /// Mount points.
    pub(crate) mounts: Vec<String>,
    /// It is swap space.
    pub(crate) swap: bool,
    /// Devices built on it.
    pub(crate) holders: Vec<String>,
    /// Who has it open.
    pub(crate) openers: Vec<Opener>,
    /// The kernel says that it is claimed, by something that was not found.
    pub(crate) claimed: bool,
}

impl Users {
    /// Of the block device that the kernel calls `name`; none when there is no such device.
    pub(crate) fn of(roots: &HostRoots, name: &str) -> Self {
        let Some(number) = roots.number_of(name) else { return Self::default() };
        let holders = roots.holders(&number);
        let family = roots.family(number);
        let on_it = |mount: &crate::preflight::Mount| mount.is_on(&family);
        let mounts = roots.mounts_of_all().into_iter().filter(on_it).map(|mount| mount.at);
        let mounts: BTreeSet<String> = mounts.collect();
        Self {
            mounts: mounts.into_iter().collect(),
            swap: roots.swaps(&family, None),
            holders,
            openers: openers(roots, &family),
            claimed: false,
        }
    }

    /// The same, and asks the kernel whether anything else has claimed the device at `node`: a
    /// file system mounted where no process sees it. Opens the device, so it must be served.
    pub(crate) fn of_served(roots: &HostRoots, name: &str, node: &Path) -> Self {
        let mut users = Self::of(roots, name);
        if users.is_empty() && device_of(node).is_some() && device_of(node) == roots.number_of(name)
        {
            let node = node.to_owned();
            users.claimed = is_refused(CLAIM, move || claim(&node));
        }
        users
    }

    /// The kernel itself uses it: taking it away would damage what is on it.
    pub(crate) fn in_kernel(&self) -> bool {
        self.claimed || self.swap || !self.mounts.is_empty() || !self.holders.is_empty()
    }

    pub(crate) fn is_empty(&self) -> bool {
        !self.in_kernel() && self.openers.is_empty()
    }

    /// Of a block device that this process serves.
    #[must_use]
    pub fn of_device(node: &Path) -> Self {
        let name = node.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        Self::of_served(&HostRoots::default(), name, node)
    }

    /// Nobody but those that look at every device for a moment.
    #[must_use]
    pub fn only_passing(&self) -> bool {
        !self.in_kernel() && self.openers.iter().all(Opener::is_passing)
    }
}

impl fmt::Display for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said: Vec<String> = Vec::new();
        said.extend(self.mounts.iter().map(|at| format!("it is mounted on {at}")));
        said.extend(self.swap.then(|| "it is in use as swap space".to_owned()));
        said.extend(self.holders.iter().map(|name| format!("/dev/{name} is built on it")));
        said.extend(self.claimed.then(|| "the kernel has claimed it".to_owned()));
        let opener = |o: &Opener| format!("{} (process {}) has it open", o.name, o.pid);
        said.extend(self.openers.iter().map(opener));
        f.write_str(&said.join("; "))
    }
}

/// Opens the device alone, for a moment.
fn claim(node: &Path) -> io::Result<()> {
    let flags = libc::O_EXCL | libc::O_NONBLOCK | libc::O_CLOEXEC;
    fs::File::options().read(true).custom_flags(flags).open(node).map(drop)
}

/// Whether `claim` is refused because another has claimed the device. Opening and closing may read
/// and write it, and this very process answers that: when it does not, the device counts as claimed.
fn is_refused(limit: Duration, claim: impl FnOnce() -> io::Result<()> + Send + 'static) -> bool {
    isolate::run(&[], limit, claim).is_err_and(|error| is_refusal(&error))
}

fn openers(roots: &HostRoots, family: &BTreeSet<String>) -> Vec<Opener> {
    let mut found = Vec::new();
    for process in roots.processes() {
        let pid = process.file_name().and_then(|name| name.to_str()?.parse().ok());
        let Some(pid) = pid.filter(|pid| *pid != std::process::id()) else { continue };
        if has_open(&process, family) {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            found.push(Opener { pid, name: name.trim().to_owned() });
        }
    }
    found.sort_by_key(|opener| opener.pid);
    found
}

fn has_open(process: &Path, family: &BTreeSet<String>) -> bool {
    // A process that has ended meanwhile, or that may not be looked at, has nothing to say.
    let Ok(entries) = fs::read_dir(process.join("fd")) else { return false };
    entries.flatten().any(|entry| device_of(&entry.path()).is_some_and(|dev| family.contains(&dev)))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use nix::sys::stat::{Mode, SFlag, makedev, mknod};

    use super::*;

    struct Fake {
        dir: tempfile::TempDir,
        roots: HostRoots,
    }

    impl Fake {
        /// `ublkb3` with a partition and a device-mapper device on that; nobody uses them.
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let roots = HostRoots { proc: dir.path().join("proc"), sys: dir.path().join("sys") };
            let fake = Self { dir, roots };
            fake.put("proc/swaps", "Filename Type Size Used Priority\n");
            fake.put("sys/class/block/ublkb3/dev", "259:3\n");
            fake.put("sys/dev/block/259:3/ublkb3p1/partition", "1\n");
            fake.put("sys/dev/block/259:3/ublkb3p1/dev", "259:4\n");
            fake.put("sys/dev/block/259:4/dev", "259:4\n");
            fake
        }

        fn put(&self, path: &str, text: &str) -> PathBuf {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path
        }

        fn users(&self) -> Users {
            Users::of(&self.roots, "ublkb3")
        }
    }

    #[test]
    fn a_device_that_nobody_uses_or_that_is_gone_has_no_users() {
        let fake = Fake::new();
        assert!(fake.users().is_empty());
        assert!(Users::of(&fake.roots, "ublkb9").is_empty());
    }

    #[test]
    fn mounts_in_every_namespace_are_named_those_of_partitions_and_of_what_is_on_top_too() {
        let fake = Fake::new();
        fake.put("sys/dev/block/259:4/holders/dm-0/dev", "253:0\n");
        fake.put("sys/dev/block/259:3/ublkb3p1/holders/dm-0/dev", "253:0\n");
        fake.put("proc/1/mountinfo", "1 2 259:4 / /srv\\040a rw - ext4 /dev/x rw\n");
        fake.put("proc/77/mountinfo", "1 2 253:0 / /inside rw - xfs /dev/y rw\n");
        fake.put("proc/notaprocess/mountinfo", "1 2 259:3 / /no rw - xfs /dev/y rw\n");
        let users = fake.users();
        assert_eq!(users.mounts, ["/inside", "/srv a"]);
        assert_eq!(users.holders, ["dm-0"]);
        assert!(users.in_kernel() && !users.only_passing());
        let text = users.to_string();
        assert!(text.contains("mounted on /srv a") && text.contains("/dev/dm-0"), "{text}");
    }

    #[test]
    fn a_device_that_is_refused_or_does_not_answer_counts_as_claimed() {
        let long = Duration::from_secs(20);
        let says = |errno| move || Err(io::Error::from_raw_os_error(errno));
        assert!(is_refused(long, says(libc::EBUSY)));
        assert!(!is_refused(long, says(libc::ENXIO)));
        assert!(!is_refused(long, || Ok(())));
        let (release, held) = std::sync::mpsc::channel::<()>();
        let hang = move || held.recv().map_err(io::Error::other);
        assert!(is_refused(Duration::from_millis(20), hang));
        drop(release);
    }

    #[test]
    fn processes_that_have_it_open_are_named_with_their_number() {
        let fake = Fake::new();
        let node = fake.dir.path().join("node");
        let made = mknod(&node, SFlag::S_IFBLK, Mode::S_IRUSR, makedev(259, 4));
        if made.is_err() {
            println!("skipped: device nodes cannot be made here");
            return;
        }
        for (pid, name) in [(812, "postgres"), (900, "(udev-worker)")] {
            let fd = fake.put(&format!("proc/{pid}/comm"), &format!("{name}\n"));
            let fds = fd.with_file_name("fd");
            fs::create_dir_all(&fds).unwrap();
            std::os::unix::fs::symlink(&node, fds.join("7")).unwrap();
            std::os::unix::fs::symlink("/dev/null", fds.join("8")).unwrap();
        }
        let users = fake.users();
        assert_eq!(users.openers.len(), 2);
        assert!(!users.in_kernel() && !users.only_passing());
        assert!(users.to_string().contains("postgres (process 812)"), "{users}");
        fs::remove_dir_all(fake.dir.path().join("proc/812")).unwrap();
        assert!(fake.users().only_passing() && !fake.users().is_empty());
    }
}
