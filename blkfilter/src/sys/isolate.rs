//! Calls that may hang in the kernel, on a thread that shares no descriptors with the process.
//!
//! A thread that waits in the kernel uninterruptibly keeps the descriptors it shares open, even
//! when the process is killed. Where what it waits for is served by this very process over one of
//! them, nobody would ever answer and nobody would ever notice that the server is dead: only a
//! reboot helps. With a table of its own, killing the process closes everything else.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

/// Runs `call` on a thread whose only descriptors are `keep`, under their numbers, and waits for
/// it. After `limit` the thread is left to itself.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`] after `limit`; whatever `call` says; when there is no thread.
pub fn run<T: Send + 'static>(
    keep: &[BorrowedFd<'_>],
    limit: Duration,
    call: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let keep: Vec<RawFd> = keep.iter().map(AsRawFd::as_raw_fd).collect();
    let (done, result) = channel();
    thread::Builder::new().name("isolated".into()).spawn(move || {
        let called = forget_descriptors(keep).and_then(|()| call());
        // What was kept must be closed by the time the caller goes on, not by the thread's end.
        let forgotten = forget_descriptors(Vec::new());
        let _ = done.send(called.and_then(|value| forgotten.map(|()| value)));
    })?;
    match result.recv_timeout(limit) {
        Ok(called) => called,
        Err(RecvTimeoutError::Timeout) => Err(io::ErrorKind::TimedOut.into()),
        Err(RecvTimeoutError::Disconnected) => Err(io::Error::other("the isolated call panicked")),
    }
}

/// Something open on a thread of its own. Dropped, it is let go of, and nobody waits for that.
#[derive(Debug)]
pub struct Held {
    let_go: Sender<()>,
    gone: Receiver<()>,
}

/// Has a thread with no other descriptors make what `call` makes and keep it, and waits until it
/// is there. After `limit` the thread is left to itself and lets go as soon as it can.
///
/// # Errors
/// As [`run`].
pub fn hold<T>(
    limit: Duration,
    call: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<Held> {
    let (done, result) = channel();
    let (let_go, told) = channel();
    let (ended, gone) = channel();
    let keep = move || match forget_descriptors(Vec::new()).and_then(|()| call()) {
        Ok(held) => {
            if done.send(Ok(())).is_ok() {
                // Ends when the other side is dropped.
                let _ = told.recv();
            }
            drop(held);
            let _ = ended.send(());
        }
        Err(error) => drop(done.send(Err(error))),
    };
    thread::Builder::new().name("isolated".into()).spawn(keep)?;
    match result.recv_timeout(limit) {
        Ok(made) => made.map(|()| Held { let_go, gone }),
        Err(RecvTimeoutError::Timeout) => Err(io::ErrorKind::TimedOut.into()),
        Err(RecvTimeoutError::Disconnected) => Err(io::Error::other("the isolated call panicked")),
    }
}

impl Held {
    /// Lets go, and returns whether that has happened within `limit`.
    pub fn release(self, limit: Duration) -> bool {
        drop(self.let_go);
        self.gone.recv_timeout(limit).is_ok()
    }
}

/// Gives the calling thread a table of descriptors of its own that has only `keep`.
pub(super) fn forget_descriptors(mut keep: Vec<RawFd>) -> io::Result<()> {
    unshare(CloneFlags::CLONE_FILES)?;
    keep.sort_unstable();
    let mut from: libc::c_uint = 0;
    for fd in keep {
        let fd = libc::c_uint::try_from(fd).map_err(io::Error::other)?;
        if fd > from {
            close_range(from, fd - 1)?;
        }
        from = fd + 1;
    }
    close_range(from, libc::c_uint::MAX)
}

fn close_range(first: libc::c_uint, last: libc::c_uint) -> io::Result<()> {
    // SAFETY: takes plain numbers. The table is this thread's alone (unshare), and the thread
    // owns none of the descriptors in it, so no owner anywhere loses its descriptor.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    Errno::result(result).map(drop).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    /// Nobody has the other end. A thread or a child of another test that just begins has a copy of
    /// every descriptor for a moment.
    fn assert_hung_up(ours: &mut UnixStream) {
        let until = std::time::Instant::now() + LIMIT;
        let error = loop {
            match ours.write_all(b"x") {
                Err(error) => break error,
                Ok(()) => assert!(std::time::Instant::now() < until, "a copy was kept"),
            }
            thread::yield_now();
        };
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn the_call_has_the_kept_descriptors_and_no_others() {
        let (kept, other) = (File::open("/dev/null").unwrap(), File::open("/dev/null").unwrap());
        let (kept_fd, other_fd) = (kept.as_raw_fd(), other.as_raw_fd());
        let open = move || {
            let is_open = |fd: i32| {
                std::path::Path::new("/proc/thread-self/fd").join(fd.to_string()).exists()
            };
            Ok((is_open(kept_fd), is_open(other_fd), is_open(0)))
        };
        assert_eq!(run(&[kept.as_fd()], LIMIT, open).unwrap(), (true, false, false));
        other.metadata().expect("the process still has its own");
        kept.metadata().expect("the process still has its own");
    }

    #[test]
    fn a_kept_descriptor_is_closed_there_when_the_call_is_over() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        run(&[theirs.as_fd()], LIMIT, || Ok(())).unwrap();
        drop(theirs);
        assert_hung_up(&mut ours);
    }

    #[test]
    fn a_hanging_call_is_given_up_and_lets_go_of_the_sockets_of_others() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let (release, held) = channel::<()>();
        let hang = move || Ok(held.recv().is_ok());
        let error = run(&[], Duration::from_millis(50), hang).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(theirs);
        assert_hung_up(&mut ours);
        drop(release);
    }

    #[test]
    fn what_is_held_stays_open_until_it_is_released() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let locked = {
            let path = path.clone();
            move || {
                let file = File::create(path)?;
                file.try_lock().map_err(io::Error::from).map(|()| file)
            }
        };
        let held = hold(LIMIT, locked.clone()).unwrap();
        let other = File::open(&path).unwrap();
        assert!(other.try_lock().is_err(), "it is held");
        assert_eq!(hold(LIMIT, locked).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(held.release(LIMIT));
        other.try_lock().expect("it is free");
    }

    #[test]
    fn what_comes_too_late_is_let_go() {
        let (release, waited) = channel::<()>();
        let (held, gone) = channel::<()>();
        let late = move || {
            let _ = waited.recv();
            Ok(held)
        };
        let error = hold(Duration::from_millis(50), late).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(release);
        assert_eq!(gone.recv_timeout(LIMIT), Err(RecvTimeoutError::Disconnected));
    }
}
