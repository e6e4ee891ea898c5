//! The process that thaws when nobody else does. It knows mounts and a time limit, runs nothing, and
//! writes nothing before it has thawed.
//!
//! Its standard input is a pipe whose other end only the freezer has, with every thread of it that is
//! still freezing: the end of that pipe means that it has thawed or is gone. Until then the watchdog
//! stays, because a freeze that the kernel has begun may still succeed. Through it comes which mounts
//! the freezer freezes: what somebody else had frozen before is not touched.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::Builder;
use std::time::{Duration, Instant};

use farshore_extent::Problem;
use nix::fcntl::OFlag;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::pipe2;

use super::mounts::Freezable;
use super::problem;
use crate::sys::freeze;
use crate::sys::process::lock_memory;
use crate::sys::wake::wait_readable;

/// The first word with which the program starts itself to be the watchdog.
pub const WORD: &str = "freezer-watchdog";

/// Longest wait until it watches.
const READY: Duration = Duration::from_secs(5);
/// Between two attempts to thaw while the freezer may still be freezing.
const AGAIN: Duration = Duration::from_millis(100);
/// Attempts at a file system that cannot be thawed, one a second.
const ATTEMPTS: u32 = 60;

/// In a byte from the freezer: the mount with this number was not frozen after all.
const NOT_FROZEN: u8 = 0x80;

/// The freezer's end of the pipe.
#[derive(Debug)]
pub(super) struct Guard(OwnedFd);

impl Guard {
    /// From now on this mount is thawed when the freezer is gone.
    ///
    /// # Errors
    /// When nobody watches any more: it must not be frozen.
    pub(super) fn begin(&self, mount: u8) -> io::Result<()> {
        nix::unistd::write(&self.0, &[mount]).map(drop).map_err(io::Error::from)
    }

    /// It could not be frozen.
    pub(super) fn not_frozen(&self, mount: u8) {
        // Nobody is there to thaw it either.
        let _ = nix::unistd::write(&self.0, &[mount | NOT_FROZEN]);
    }
}

/// A watchdog that watches. Dropped with the last copy of its guard, it thaws what is left and ends.
#[derive(Debug)]
pub(super) struct Watchdog {
    guard: Arc<Guard>,
}

impl Watchdog {
    /// Starts one for these mounts and returns when it watches. After `limit` it thaws.
    ///
    /// # Errors
    /// FS-3410.
    pub(super) fn start(mounts: &[Freezable], limit: Duration) -> Result<Self, Problem> {
        let bad = |e: io::Error| problem::no_watchdog(&e);
        let (lives, guard) = pipe2(OFlag::O_CLOEXEC).map_err(|e| bad(e.into()))?;
        let mut child = Command::new("/proc/self/exe")
            .arg(WORD)
            .arg(limit.as_millis().to_string())
            .args(mounts.iter().map(|mount| &mount.at))
            .current_dir("/")
            .process_group(0)
            .stdin(lives)
            .stdout(Stdio::piped())
            .spawn()
            .map_err(bad)?;
        let told = child.stdout.take();
        let (sender, answer) = sync_channel(1);
        let listen = move || {
            let mut line = String::new();
            let read = told.map(|told| BufReader::new(told).read_line(&mut line));
            // Nobody may be waiting any more.
            let _ = sender.send(read.is_some_and(|read| read.is_ok()).then_some(line));
            // Its end is waited for, so that nothing of it stays.
            let _ = child.wait();
        };
        Builder::new().name("watchdog".into()).spawn(listen).map_err(bad)?;
        let watched = answer.recv_timeout(READY).ok().flatten().unwrap_or_default();
        let wanted: io::Result<Vec<String>> =
            mounts.iter().map(|mount| identity(&mount.directory)).collect();
        if watched.trim_end() != wanted.map_err(bad)?.join(" ") {
            return Err(problem::no_watchdog(&"it does not watch the same file systems"));
        }
        Ok(Self { guard: Arc::new(Guard(guard)) })
    }

    /// Kept by whoever is freezing.
    pub(super) const fn guard(&self) -> &Arc<Guard> {
        &self.guard
    }
}

fn identity(directory: &File) -> io::Result<String> {
    let found = directory.metadata()?;
    Ok(format!("{}:{}", found.dev(), found.ino()))
}

/// The watchdog's whole life. `arguments` are those after [`WORD`]: the limit in milliseconds and the
/// mount points.
///
/// # Errors
/// When it cannot watch; then nothing is frozen.
pub fn watch(mut arguments: impl Iterator<Item = OsString>) -> io::Result<()> {
    // Whatever ends the freezer, even for its whole group, must not end this.
    let ignored = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];
    ignored.into_iter().collect::<SigSet>().thread_block()?;
    let limit = arguments.next().and_then(|text| text.to_str()?.parse().ok());
    let limit = Duration::from_millis(limit.ok_or(io::ErrorKind::InvalidInput)?);
    let mounts: Vec<PathBuf> = arguments.map(PathBuf::from).collect();
    let directories: Vec<File> = mounts.iter().map(File::open).collect::<io::Result<_>>()?;
    // Both help on a host without memory, and neither is always allowed.
    let _ = lock_memory();
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let watched: io::Result<Vec<String>> = directories.iter().map(identity).collect();
    let mut out = io::stdout().lock();
    writeln!(out, "{}", watched?.join(" "))?;
    out.flush()?;

    let mut watched: Vec<_> = directories.into_iter().map(Watched::new).collect();
    let deadline = Instant::now() + limit;
    let freezer = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let wait = if left.is_zero() { AGAIN } else { left };
        if wait_readable(&[freezer.as_fd()], Some(wait)).is_ok_and(|ready| ready == [true])
            && !heard(&freezer, &mut watched)
        {
            break;
        }
        if Instant::now() >= deadline {
            thaw(&mut watched);
        }
    }
    for _ in 0..ATTEMPTS {
        if thaw(&mut watched) {
            break;
        }
        let _ = wait_readable(&[], Some(Duration::from_secs(1)));
    }
    for (mount, _) in mounts.iter().zip(&watched).filter(|(_, watched)| watched.thawed) {
        // Whoever reads the log may be gone.
        let _ = writeln!(io::stderr(), "watchdog: {} was frozen still; thawed", mount.display());
    }
    Ok(())
}

/// A mount as the watchdog sees it.
struct Watched {
    directory: File,
    /// The freezer has begun to freeze it, and has not failed.
    ours: bool,
    /// It was frozen, and thawed here.
    thawed: bool,
}

impl Watched {
    const fn new(directory: File) -> Self {
        Self { directory, ours: false, thawed: false }
    }
}

/// Takes what the freezer says. False when it is gone, or has thawed everything.
fn heard(mut freezer: &File, watched: &mut [Watched]) -> bool {
    let mut bytes = [0; 64];
    let len = freezer.read(&mut bytes).unwrap_or(0);
    for byte in &bytes[..len] {
        if let Some(mount) = watched.get_mut(usize::from(byte & !NOT_FROZEN)) {
            mount.ours = byte & NOT_FROZEN == 0;
        }
    }
    len > 0
}

/// Thaws each that the freezer froze. Returns whether none is frozen any more.
fn thaw(watched: &mut [Watched]) -> bool {
    let mut all = true;
    for mount in watched.iter_mut().filter(|mount| mount.ours) {
        match freeze::thaw(&mount.directory) {
            Ok(was) => mount.thawed |= was,
            Err(_) => all = false,
        }
    }
    all
}
