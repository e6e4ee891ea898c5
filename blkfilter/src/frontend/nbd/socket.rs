//! A connected stream socket with the few calls the server needs: receive into several buffers,
//! send several, wait or not. The descriptor stays in blocking mode, so that an idle connection
//! waits inside one receive; calls that must not wait say so each time.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{MsgFlags, Shutdown, recvmsg, sendmsg, setsockopt, shutdown, sockopt};
use nix::sys::time::TimeVal;

/// What a receive brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// So many bytes.
    Bytes(usize),
    /// Nothing is there now (or the time allowed is over).
    Nothing,
    /// The peer, or a stop, ended the stream.
    End,
}

/// A connected stream socket.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Takes over a connected socket.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Puts the descriptor into blocking mode, whatever the listener or a bridge left it in.
    pub fn make_blocking(&self) -> io::Result<()> {
        let flags = OFlag::from_bits_retain(fcntl(&self.0, FcntlArg::F_GETFL)?);
        if flags.contains(OFlag::O_NONBLOCK) {
            fcntl(&self.0, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
        }
        Ok(())
    }

    /// Receives into `buffers`, together not empty.
    pub fn receive(&self, buffers: &mut [IoSliceMut<'_>], wait: bool) -> io::Result<Received> {
        let flags = if wait { MsgFlags::empty() } else { MsgFlags::MSG_DONTWAIT };
        loop {
            let got = recvmsg::<()>(self.0.as_raw_fd(), buffers, None, flags).map(|m| m.bytes);
            match got {
                Ok(0) => return Ok(Received::End),
                Ok(n) => return Ok(Received::Bytes(n)),
                Err(Errno::EAGAIN) => return Ok(Received::Nothing),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Sends from `buffers` as much as the socket takes now; 0 when it takes nothing.
    pub fn send_now(&self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        self.send(buffers, MsgFlags::MSG_DONTWAIT)
    }

    fn send(&self, buffers: &[IoSlice<'_>], flags: MsgFlags) -> io::Result<usize> {
        let flags = flags | MsgFlags::MSG_NOSIGNAL;
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), buffers, &[], flags, None) {
                Ok(n) => return Ok(n),
                Err(Errno::EAGAIN) => return Ok(0),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Fills `bytes` completely, waiting at most the time set with [`Self::limit_waits`] for each
    /// part, and not after `until`: a peer that sends byte by byte does not last for ever.
    pub fn receive_exact(&self, bytes: &mut [u8], until: Instant) -> io::Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            if Instant::now() > until {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match self.receive(&mut [IoSliceMut::new(&mut bytes[filled..])], true)? {
                Received::Bytes(n) => filled += n,
                Received::Nothing => return Err(io::ErrorKind::TimedOut.into()),
                Received::End => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        Ok(())
    }

    /// Sends all of `bytes`, waiting at most the time set with [`Self::limit_waits`] for each
    /// part.
    pub fn send_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.send(&[IoSlice::new(bytes)], MsgFlags::empty())? {
                0 => return Err(io::ErrorKind::TimedOut.into()),
                n => bytes = &bytes[n..],
            }
        }
        Ok(())
    }

    /// Limits how long a waiting call may wait; `None` is for ever.
    pub fn limit_waits(&self, limit: Option<Duration>) -> io::Result<()> {
        let micros = limit.map_or(0, |l| i64::try_from(l.as_micros()).unwrap_or(i64::MAX).max(1));
        let value = TimeVal::new(micros / 1_000_000, micros % 1_000_000);
        setsockopt(&self.0, sockopt::ReceiveTimeout, &value)?;
        setsockopt(&self.0, sockopt::SendTimeout, &value)?;
        Ok(())
    }

    /// Ends receiving: what has arrived is still served, then the stream ends. Wakes a receive
    /// that waits in another thread. Replies can still be sent.
    pub fn end_input(&self) {
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Read); // already closed is as good
    }

    /// Ends both directions at once.
    pub fn cut(&self) {
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Both); // already closed is as good
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
