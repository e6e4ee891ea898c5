//! Passing one descriptor over a unix socket, and asking who is at the other end.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, getsockopt, recvmsg, sendmsg, sockopt,
};

/// Most descriptors Linux passes in one message (`SCM_MAX_FD`): with room for all of them none
/// can be left open behind our back.
const MOST_FDS: usize = 253;

/// Who is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Process when it connected.
    pub pid: i32,
}

impl Peer {
    /// The process at the other end of `stream`, as the kernel saw it connect.
    ///
    /// # Errors
    /// When the stream is not a connected unix socket.
    pub fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials = getsockopt(stream, sockopt::PeerCredentials)?;
        Ok(Self { uid: credentials.uid(), gid: credentials.gid(), pid: credentials.pid() })
    }
}

/// Sends `bytes` with one descriptor attached to the first of them.
///
/// # Errors
/// Of the stream; `InvalidInput` when there are no bytes to attach it to.
pub fn send_with_fd(stream: &UnixStream, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
    if bytes.is_empty() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let rights = [fd.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&rights)];
    let sent = loop {
        let sent = sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(bytes)],
            &control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent {
            Ok(sent) => break sent,
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    };
    let mut stream = stream;
    stream.write_all(bytes.get(sent..).unwrap_or_default())
}

/// Reads a stream and keeps the last descriptor that came along; others are closed.
#[derive(Debug)]
pub struct FdReader<'a> {
    stream: &'a UnixStream,
    received: Option<OwnedFd>,
}

impl<'a> FdReader<'a> {
    /// Reads from `stream`.
    #[must_use]
    pub fn new(stream: &'a UnixStream) -> Self {
        Self { stream, received: None }
    }

    /// The descriptor that came with what was read.
    #[must_use]
    pub fn into_fd(self) -> Option<OwnedFd> {
        self.received
    }
}

impl Read for FdReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut control = cmsg_space!([RawFd; MOST_FDS]);
        let mut slices = [IoSliceMut::new(buf)];
        let message = recvmsg::<()>(
            self.stream.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        let mut received = None;
        if let Ok(controls) = message.cmsgs() {
            for control in controls {
                if let ControlMessageOwned::ScmRights(fds) = control {
                    for fd in fds {
                        // SAFETY: the kernel just made this descriptor for us; it is owned here
                        // and nowhere else.
                        received = Some(unsafe { OwnedFd::from_raw_fd(fd) });
                    }
                }
            }
        }
        let read = message.bytes;
        if received.is_some() {
            self.received = received;
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Seek, SeekFrom};
    use std::os::fd::AsFd;

    #[test]
    fn a_descriptor_arrives_with_its_message() {
        let (here, there) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        send_with_fd(&here, b"message", file.as_fd()).unwrap();
        let mut reader = FdReader::new(&there);
        let mut bytes = [0; 7];
        reader.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"message");
        let mut same = File::from(reader.into_fd().unwrap());
        same.seek(SeekFrom::Start(0)).unwrap();
        let mut text = String::new();
        same.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
    }

    #[test]
    fn a_plain_message_brings_no_descriptor() {
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(b"abc").unwrap();
        let mut reader = FdReader::new(&there);
        reader.read_exact(&mut [0; 3]).unwrap();
        assert!(reader.into_fd().is_none());
        assert!(send_with_fd(&here, b"", there.as_fd()).is_err());
    }

    #[test]
    fn the_peer_is_known() {
        let (here, _there) = UnixStream::pair().unwrap();
        let peer = Peer::of(&here).unwrap();
        assert_eq!(peer.uid, nix::unistd::getuid().as_raw());
        assert_eq!(peer.pid, nix::unistd::getpid().as_raw());
    }
}
