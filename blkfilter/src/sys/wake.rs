//! Descriptors to wait on: an event between threads, and several descriptors behind one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// A flag between threads that can be waited for with poll: readable once set, until cleared.
#[derive(Debug)]
pub struct Event(EventFd);

impl Event {
    /// A cleared event.
    ///
    /// # Errors
    /// Out of descriptors or memory.
    pub fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    /// Sets it; from any thread, any number of times.
    pub fn set(&self) {
        // EAGAIN means the counter is full: the event is set then. No other failure is possible
        // on a descriptor we own.
        let _ = self.0.write(1);
    }

    /// Clears it. Returns whether it was set. Look at what it announces *after* clearing.
    pub fn clear(&self) -> bool {
        self.0.read().is_ok()
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Several descriptors behind one: it is readable while any of them is. Nothing is to be cleared
/// here, only at the members.
#[derive(Debug)]
pub struct AnyReadable(Epoll);

impl AnyReadable {
    /// Over the given descriptors; a member that is closed leaves.
    ///
    /// # Errors
    /// Of the kernel: out of descriptors, or one that cannot be polled.
    pub fn new(members: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let set = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        for (member, key) in members.iter().zip(0..) {
            set.add(member, EpollEvent::new(EpollFlags::EPOLLIN, key))?;
        }
        Ok(Self(set))
    }
}

impl AsFd for AnyReadable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.0.as_fd()
    }
}

/// Waits until one of the descriptors is readable, or the time has passed; `None` waits for ever.
/// Returns which are (a closed or broken one counts as readable).
///
/// # Errors
/// Of poll, other than an interruption.
pub fn wait_readable(
    fds: &[BorrowedFd<'_>],
    timeout: Option<std::time::Duration>,
) -> io::Result<Vec<bool>> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let deadline = timeout.and_then(|t| std::time::Instant::now().checked_add(t));
    let mut polled: Vec<_> = fds.iter().map(|&fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    loop {
        let left = match deadline {
            // One millisecond more than asked, rather than a busy round at the end.
            Some(deadline) => {
                let left = deadline.saturating_duration_since(std::time::Instant::now());
                let millis = i32::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX);
                PollTimeout::try_from(if left.is_zero() { 0 } else { millis })
                    .unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        };
        match poll(&mut polled, left) {
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(polled.iter().map(|p| p.any().unwrap_or(true)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const NOW: Option<Duration> = Some(Duration::ZERO);

    #[test]
    fn an_event_is_readable_until_cleared() {
        let event = Event::new().unwrap();
        assert_eq!(wait_readable(&[event.as_fd()], NOW).unwrap(), [false]);
        event.set();
        event.set();
        assert_eq!(wait_readable(&[event.as_fd()], None).unwrap(), [true]);
        assert!(event.clear() && !event.clear());
        assert_eq!(wait_readable(&[event.as_fd()], NOW).unwrap(), [false]);
    }

    #[test]
    fn a_set_is_readable_while_any_member_is() {
        let (a, b) = (Event::new().unwrap(), Event::new().unwrap());
        let any = AnyReadable::new(&[a.as_fd(), b.as_fd()]).unwrap();
        assert_eq!(wait_readable(&[any.as_fd()], NOW).unwrap(), [false]);
        b.set();
        assert_eq!(wait_readable(&[any.as_fd()], None).unwrap(), [true]);
        assert_eq!(wait_readable(&[any.as_fd()], None).unwrap(), [true]);
        b.clear();
        assert_eq!(wait_readable(&[any.as_fd()], NOW).unwrap(), [false]);
    }

    #[test]
    fn waiting_ends_when_the_time_has_passed() {
        let event = Event::new().unwrap();
        let wait = Some(Duration::from_millis(20));
        assert_eq!(wait_readable(&[event.as_fd()], wait).unwrap(), [false]);
    }
}
