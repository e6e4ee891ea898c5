//! Calls that may hang in the kernel, on a thread that shares no descriptors with the process.
//!
//! A thread that waits in the kernel uninterruptibly keeps the descriptors it shares open, even
//! when the process is killed. Where what it waits for is served by this very process over one of
//! them, nobody would ever answer and nobody would ever notice that the server is dead: only a
//! reboot helps. With a table of its own, killing the process closes everything else.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::mpsc::{RecvTimeoutError, channel};
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
        let error = ours.write_all(b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_hanging_call_is_given_up_and_lets_go_of_the_sockets_of_others() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let (release, held) = channel::<()>();
        let hang = move || Ok(held.recv().is_ok());
        let error = run(&[], Duration::from_millis(50), hang).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(theirs);
        let error = ours.write_all(b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe, "the hanging thread kept a copy");
        drop(release);
    }
}
