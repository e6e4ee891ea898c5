//! Generic netlink, one question at a time. Knows no family: the messages are the caller's.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::isolate;

/// Answers to what we ask are a few hundred bytes; the kernel's own suggestion is 8 KiB.
const ANSWER: usize = 16 << 10;

/// The kernel queues its answer before the send returns; this only bounds a surprise.
const PATIENCE: TimeVal = TimeVal::new(5, 0);

/// Sends `message` (a netlink message that asks for an acknowledgement) and collects datagrams of
/// the kernel until `last` says that one is the last. `fds` are the descriptors the message speaks
/// of, under their numbers. Runs isolated (see [`isolate`]): a request may wait in the kernel for
/// I/O that this process serves.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`] after `limit`, and whatever the system says.
pub fn ask(
    message: Vec<u8>,
    fds: &[BorrowedFd<'_>],
    limit: Duration,
    last: fn(&[u8]) -> bool,
) -> io::Result<Vec<Vec<u8>>> {
    isolate::run(fds, limit, move || {
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd =
            socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkGeneric)?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &PATIENCE)?;
        // Connected to the kernel, the socket takes no message from anyone else.
        connect(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        send(fd.as_raw_fd(), &message, MsgFlags::empty())?;
        let mut answers = Vec::new();
        loop {
            let mut answer = vec![0; ANSWER];
            let len = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
            answer.truncate(len);
            let done = last(&answer);
            answers.push(answer);
            if done {
                return Ok(answers);
            }
        }
    })
}
