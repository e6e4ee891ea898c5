//! filterd sees no mount of a device that it serves.
//!
//! A mount that filterd holds is a mount that ends when filterd ends. When the last `umount` of a
//! file system on our own device happens inside our own exit, the kernel writes the superblock to a
//! device whose server is that dying process: the exit waits for itself, or the write is lost. A
//! filterd that starts while its device is mounted (after a crash, at an upgrade) inherits exactly
//! such mounts.
//!
//! So the process gets a mount namespace of its own, early, and detaches from it every mount that
//! lies on a device of ours; the mounts of the host stay as they are. The namespace is a *slave* of
//! the host's: what the host mounts and unmounts later happens here too, and the guard detaches what
//! is ours. A *private* namespace (`unshare -m`, systemd's `PrivateMounts=`) is the wrong cure: it
//! keeps a mount for ever that the host has long unmounted, so the host finds its disk in use.
//!
//! It also means that filterd cannot reach a file on a volume that it serves, and so never waits
//! for itself by looking at a path.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};

use crate::preflight::{HostRoots, Mount};
use crate::sys::wake::Event;

/// The block devices that we serve, by the kernel's names (`ublkb3`). Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct OwnDevices(Arc<Mutex<BTreeSet<String>>>);

impl OwnDevices {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner) // plain data
    }

    /// To be called before the device can be mounted. False: it is one of ours already.
    pub(super) fn add(&self, name: String) -> bool {
        self.lock().insert(name)
    }

    pub(super) fn remove(&self, name: &str) {
        self.lock().remove(name);
    }

    /// These devices, their partitions, and what is built on them.
    fn family(&self, roots: &HostRoots) -> BTreeSet<String> {
        let numbers: Vec<_> = self.lock().iter().filter_map(|name| roots.number_of(name)).collect();
        numbers.into_iter().flat_map(|number| roots.family(number)).collect()
    }
}

/// Gives the calling thread, and those it starts from now on, a mount namespace that follows the
/// host's. To be called before other threads exist. Returns whether there is one; without
/// `CAP_SYS_ADMIN`, which serving block devices needs too, there is none.
pub(super) fn enter() -> bool {
    if let Err(error) = unshare(CloneFlags::CLONE_NEWNS) {
        tracing::debug!(%error, "no mount namespace of our own");
        return false;
    }
    let none: Option<&str> = None;
    match mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none) {
        Ok(()) => true,
        Err(error) => {
            // Mounts may be shared with the host then: nothing must be detached.
            tracing::warn!(%error, "the mount namespace does not follow the host's");
            false
        }
    }
}

/// Keeps mounts of our own devices out of this namespace, until dropped.
#[derive(Debug)]
pub(super) struct Guard {
    stop: Arc<Event>,
    thread: Option<JoinHandle<()>>,
}

impl Guard {
    /// Detaches those that are there, and watches for more.
    pub(super) fn start(own: OwnDevices) -> io::Result<Self> {
        let stop = Arc::new(Event::new()?);
        // Opened before the first look: what changes after it is announced.
        let table = File::open("/proc/thread-self/mountinfo")?;
        let roots = HostRoots::default();
        detach_own(&roots, &own);
        let stopped = Arc::clone(&stop);
        let watch = move || {
            while let Ok(true) = changed(&table, &stopped) {
                detach_own(&roots, &own);
            }
        };
        let thread = Some(Builder::new().name("mounts".into()).spawn(watch)?);
        Ok(Self { stop, thread })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.stop.set();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic there was reported when it happened
        }
    }
}

/// Waits until the table of mounts has changed; `false` when asked to stop.
fn changed(table: &File, stop: &Event) -> io::Result<bool> {
    loop {
        let mut fds = [
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
            // The table is always readable; a change is announced as urgent.
            PollFd::new(table.as_fd(), PollFlags::POLLPRI),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => return Ok(!fds[0].any().unwrap_or(true)),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Detaches every mount of ours that can be. Newest first: mounts lie on top of each other.
fn detach_own(roots: &HostRoots, own: &OwnDevices) {
    let family = own.family(roots);
    if family.is_empty() {
        return;
    }
    let mut mounts = roots.mounts();
    while let Some(at) = next_own(&mounts, &family) {
        let gone = mounts.remove(at).at;
        match umount2(Path::new(&gone), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => tracing::debug!(at = gone, "our own device is mounted on the host, not here"),
            // It went with the mount below it, or the host was faster.
            Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => tracing::warn!(at = gone, %error, "our own device stays mounted here"),
        }
    }
}

/// The newest mount of ours that a path leads to and that can be detached without the host noticing.
fn next_own(mounts: &[Mount], family: &BTreeSet<String>) -> Option<usize> {
    let own = |(at, mount): &(usize, &Mount)| {
        let covered = mounts[at + 1..].iter().any(|later| later.at == mount.at);
        mount.is_on(family) && !mount.shared && !covered
    };
    mounts.iter().enumerate().rfind(own).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounted(dev: &str, at: &str, shared: bool) -> Mount {
        Mount { dev: dev.into(), at: at.into(), source: "none".into(), shared }
    }

    #[test]
    fn only_own_mounts_are_detached_and_never_one_that_the_host_shares_or_one_that_is_covered() {
        let family = BTreeSet::from(["259:3".to_owned()]);
        let pick = |mounts: &[Mount]| next_own(mounts, &family);
        let (own, other) = (mounted("259:3", "/srv", false), mounted("8:1", "/", false));
        assert_eq!(pick(&[other.clone(), own.clone()]), Some(1));
        assert_eq!(pick(std::slice::from_ref(&other)), None);
        assert_eq!(pick(&[other.clone(), mounted("259:3", "/srv", true)]), None, "shared");
        let above = mounted("0:40", "/srv", false);
        assert_eq!(pick(&[other, own.clone(), above]), None, "the path leads to another mount");
        assert_eq!(pick(&[own.clone(), mounted("259:3", "/b", false)]), Some(1), "newest first");
    }

    #[test]
    fn a_mount_of_an_own_device_that_appears_later_is_detached_here_and_stays_on_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("at");
        std::fs::create_dir(&at).unwrap();
        // A thread that stands for the host, with mounts that it shares as systemd makes them.
        let played = std::thread::spawn(move || {
            if !enter() {
                println!("skipped: this user may not have a mount namespace");
                return;
            }
            let none: Option<&str> = None;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none).unwrap();
            let Some(host) = Host::new(&dir.path().join("image")) else {
                println!("skipped: no loop device can be had, or no file system made, here");
                return;
            };
            let filterd = || guarded(&host, &at);
            std::thread::scope(|scope| scope.spawn(filterd).join().unwrap());
        });
        played.join().unwrap();
    }

    fn guarded(host: &Host, at: &Path) {
        assert!(enter());
        let own = OwnDevices::default();
        own.add(host.device.clone());
        let seen = || HostRoots::default().mounts().iter().any(|m| Path::new(&m.at) == at);
        assert!(host.mount(at) && seen(), "the namespace follows the host's");
        let guard = Guard::start(own).unwrap();
        assert!(!seen(), "there before the guard");
        assert!(host.unmount(at) && host.mount(at));
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while seen() {
            assert!(std::time::Instant::now() < until, "the guard does not see it");
            std::thread::yield_now();
        }
        drop(guard);
        assert!(host.unmount(at), "the host had it all the time");
    }

    /// A loop device with a file system, and programs in the namespace of the thread that made it.
    struct Host {
        device: String,
        namespace: String,
    }

    impl Host {
        fn new(image: &Path) -> Option<Self> {
            File::create(image).and_then(|file| file.set_len(8 << 20)).ok()?;
            output("mkfs.ext4", &["-q", image.to_str()?])?;
            let device = output("losetup", &["--find", "--show", image.to_str()?])?;
            let device = device.trim().strip_prefix("/dev/")?.to_owned();
            let (pid, thread) = (std::process::id(), nix::unistd::gettid());
            Some(Self { device, namespace: format!("--mount=/proc/{pid}/task/{thread}/ns/mnt") })
        }

        fn run(&self, words: &[&str]) -> bool {
            output("nsenter", &[&[self.namespace.as_str(), "--"], words].concat()).is_some()
        }

        fn mount(&self, at: &Path) -> bool {
            self.run(&["mount", &format!("/dev/{}", self.device), at.to_str().unwrap()])
        }

        fn unmount(&self, at: &Path) -> bool {
            self.run(&["umount", at.to_str().unwrap()])
        }
    }

    impl Drop for Host {
        fn drop(&mut self) {
            output("losetup", &["-d", &format!("/dev/{}", self.device)]);
        }
    }

    fn output(program: &str, words: &[&str]) -> Option<String> {
        let out = std::process::Command::new(program).args(words).output().ok()?;
        out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
    }
}
