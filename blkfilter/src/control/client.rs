//! The asking side of the control socket, for the agent and the command line.
//!
//! Blocking, one exchange at a time. Every call has a time limit, so nothing waits for ever on a
//! daemon that hangs. After a failed exchange the stream may be out of step: it is closed, and the
//! next call connects anew.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use farshore_changelog::codec::{read_message, write_message};
use farshore_extent::{Lsn, MarkerId, Problem, VolumeId, VolumeName};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use super::message::{
    CompareAnswer, Fetched, Grown, MarkerPlaced, MarkerRequest, ProtectRequest, Readiness, Reply,
    Request, VolumeInfo, VolumeStatus,
};
use crate::sys::fdpass::FdReader;
use crate::sys::pool_reader::ReadOnlyPool;

/// Time to be accepted, in seconds.
const CONNECT_SECONDS: i64 = 10;

/// Time an ordinary call may take.
const CALL: Duration = Duration::from_secs(10);

/// Time for calls that open or close devices and files.
const SLOW_CALL: Duration = Duration::from_secs(60);

/// Added to the time a call itself asks the daemon to wait.
const GRACE: Duration = Duration::from_secs(10);

/// What [`Client::fetch`] asks for; see [`Request::Fetch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FetchWish {
    /// Enough payload to answer at once, in bytes.
    pub want_bytes: u32,
    /// Longest wait after the first record.
    pub wait: Duration,
    /// Longest wait without any record.
    pub idle: Duration,
}

/// A connection to `filterd`.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    /// None after a failed exchange.
    stream: Option<UnixStream>,
}

impl Client {
    /// Connects to the daemon's control socket.
    ///
    /// # Errors
    /// FS-5901 when nobody listens there, FS-4901 when this user may not.
    pub fn connect(path: &Path) -> Result<Self, Problem> {
        let stream = open(path)?;
        Ok(Self { path: path.to_owned(), stream: Some(stream) })
    }

    /// Every protected volume and its state.
    ///
    /// # Errors
    /// The daemon's problem, or FS-4901, FS-5901, FS-5904, FS-5907 of the connection (so for all calls).
    pub fn list(&mut self) -> Result<Vec<VolumeStatus>, Problem> {
        match self.call(&Request::List, CALL)? {
            Reply::Volumes(volumes) => Ok(volumes),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Every volume on record, attached or not.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn recorded(&mut self) -> Result<Vec<VolumeId>, Problem> {
        match self.call(&Request::Recorded, CALL)? {
            Reply::Recorded(volumes) => Ok(volumes),
            other => Err(self.unexpected(&other)),
        }
    }

    /// What stands in the way of protecting, and how the volume would be attached. Changes nothing.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn preflight(&mut self, request: ProtectRequest) -> Result<Readiness, Problem> {
        match self.call(&Request::Preflight(request), SLOW_CALL)? {
            Reply::Preflight(readiness) => Ok(readiness),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Starts protecting a backing device.
    ///
    /// # Errors
    /// As for [`Self::list`]; the daemon's problem is the first failed prerequisite.
    pub fn protect(&mut self, request: ProtectRequest) -> Result<VolumeInfo, Problem> {
        match self.call(&Request::Protect(request), SLOW_CALL)? {
            Reply::Protected(info) => Ok(info),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Stops protecting.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn unprotect(&mut self, name: VolumeName, force: bool) -> Result<(), Problem> {
        self.done(&Request::Unprotect { name, force }, SLOW_CALL)
    }

    /// Lets a volume have the larger size that its backing device has got; see [`Request::Grow`].
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn grow(&mut self, name: VolumeName, dry_run: bool) -> Result<Grown, Problem> {
        match self.call(&Request::Grow { name, dry_run }, SLOW_CALL)? {
            Reply::Grown(grown) => Ok(grown),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Cuts a marker over the volumes, at one number of the host.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn marker(&mut self, request: MarkerRequest) -> Result<MarkerPlaced, Problem> {
        match self.call(&Request::Marker(request), CALL)? {
            Reply::Marker(placed) => Ok(placed),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Commits or aborts a pending marker.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn resolve_marker(&mut self, marker: MarkerId, commit: bool) -> Result<(), Problem> {
        self.done(&Request::ResolveMarker { marker, commit }, CALL)
    }

    /// Waits until everything captured so far is durable at the target; `false` when `limit`
    /// passed before.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn drain(&mut self, volume: VolumeId, limit: Duration) -> Result<bool, Problem> {
        let request = Request::Drain { volume, timeout_ms: millis(limit) };
        match self.call(&request, limit.saturating_add(GRACE))? {
            Reply::Drained(reached) => Ok(reached),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Maps the pool of a volume for reading.
    ///
    /// # Errors
    /// As for [`Self::list`]; FS-5907 when what arrives is no sealed pool of the announced size.
    pub fn open_pool(&mut self, volume: VolumeId) -> Result<ReadOnlyPool, Problem> {
        let (reply, fd) = self.exchange(&Request::OpenPool { volume }, CALL)?;
        let len = match reply {
            Reply::Pool { len } => len,
            other => return Err(self.unexpected(&other)),
        };
        let fd = fd.ok_or_else(|| self.broken("the pool's descriptor did not arrive"))?;
        ReadOnlyPool::map(&fd, len).map_err(|e| self.broken(&e.to_string()))
    }

    /// The records after a place, in order; see [`Request::Fetch`].
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn fetch(
        &mut self,
        volume: VolumeId,
        after: Lsn,
        wish: FetchWish,
    ) -> Result<Fetched, Problem> {
        let request = Request::Fetch {
            volume,
            after,
            want_bytes: wish.want_bytes,
            wait_ms: millis(wish.wait),
            idle_ms: millis(wish.idle),
        };
        let limit = wish.idle.saturating_add(wish.wait).saturating_add(GRACE);
        match self.call(&request, limit)? {
            Reply::Fetched(fetched) => Ok(fetched),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Everything up to `upto` is durable at the target: the pool may reuse it.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn release(&mut self, volume: VolumeId, upto: Lsn) -> Result<(), Problem> {
        self.done(&Request::Release { volume, upto }, CALL)
    }

    /// Everything up to `upto` is durable in the agent's spool, and not at the target.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn spooled(&mut self, volume: VolumeId, upto: Lsn) -> Result<(), Problem> {
        self.done(&Request::Spooled { volume, upto }, CALL)
    }

    /// Everything is to be sent again through the stream.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn recopy(&mut self, volume: VolumeId, reason: &str) -> Result<(), Problem> {
        self.done(&Request::Recopy { volume, reason: reason.to_owned() }, CALL)
    }

    /// Everything is to be compared with the replica; what differs is sent.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn resync(&mut self, volume: VolumeId, reason: &str) -> Result<(), Problem> {
        self.done(&Request::Resync { volume, reason: reason.to_owned() }, CALL)
    }

    /// Starts at once the copy that waits; nothing when none does.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn start_copy(&mut self, volume: VolumeId) -> Result<(), Problem> {
        self.done(&Request::StartCopy { volume }, CALL)
    }

    /// Starts a verify from the beginning, or ends it; 0 bytes a second is no limit.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn verify(
        &mut self,
        volume: VolumeId,
        start: bool,
        bytes_per_second: u64,
    ) -> Result<(), Problem> {
        self.done(&Request::Verify { volume, start, bytes_per_second }, CALL)
    }

    /// What the target said about the digests of a volume.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn compared(
        &mut self,
        volume: VolumeId,
        upto: Lsn,
        answer: CompareAnswer,
    ) -> Result<(), Problem> {
        self.done(&Request::Compared { volume, upto, answer }, CALL)
    }

    /// Limits the copy loop; 0 bytes a second is no limit.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn copy_rate(&mut self, volume: VolumeId, bytes_per_second: u64) -> Result<(), Problem> {
        self.done(&Request::CopyRate { volume, bytes_per_second }, CALL)
    }

    /// Keeps that the volume was failed over, or that it was taken back.
    ///
    /// # Errors
    /// As for [`Self::list`].
    pub fn fence(&mut self, volume: VolumeId, fence: Option<Problem>) -> Result<(), Problem> {
        self.done(&Request::Fence { volume, fence }, CALL)
    }

    fn done(&mut self, request: &Request, limit: Duration) -> Result<(), Problem> {
        match self.call(request, limit)? {
            Reply::Done => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    fn call(&mut self, request: &Request, limit: Duration) -> Result<Reply, Problem> {
        self.exchange(request, limit).map(|(reply, _)| reply)
    }

    fn exchange(
        &mut self,
        request: &Request,
        limit: Duration,
    ) -> Result<(Reply, Option<OwnedFd>), Problem> {
        let kept = self.stream.take();
        let reused = kept.is_some();
        let mut stream = kept.map_or_else(|| open(&self.path), Ok)?;
        let mut answer = talk(&stream, request, limit);
        if reused && answer.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::BrokenPipe) {
            // The daemon was restarted since the last call and nobody has read this request.
            stream = open(&self.path)?;
            answer = talk(&stream, request, limit);
        }
        match answer {
            Ok((reply, fd)) => {
                self.stream = Some(stream);
                reply.map(|reply| (reply, fd))
            }
            Err(error) => Err(self.lost(&error, limit)),
        }
    }

    /// The exchange failed half-way; the stream is gone already.
    fn lost(&self, error: &io::Error, limit: Duration) -> Problem {
        let socket = self.path.display();
        let (what, why) = match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => (
                format!("filterd did not answer on {socket} within {} s", limit.as_secs()),
                "the daemon is busy or hangs; the request may still take effect".to_owned(),
            ),
            io::ErrorKind::InvalidData => {
                return self.broken(&error.to_string());
            }
            _ => (
                format!("the connection to filterd on {socket} was lost"),
                format!("{error}; the request may have taken effect or not"),
            ),
        };
        Problem::harmless(
            5904,
            what,
            why,
            "look at the state with `farshore status` and at the log of filterd, then try again",
        )
        .with_risk("none by itself: protected volumes go on working as long as filterd runs")
    }

    fn unexpected(&mut self, reply: &Reply) -> Problem {
        let kind = match reply {
            Reply::Volumes(_) => "Volumes",
            Reply::Protected(_) => "Protected",
            Reply::Preflight(_) => "Preflight",
            Reply::Grown(_) => "Grown",
            Reply::Recorded(_) => "Recorded",
            Reply::Marker(_) => "Marker",
            Reply::Drained(_) => "Drained",
            Reply::Pool { .. } => "Pool",
            Reply::Fetched(_) => "Fetched",
            Reply::Done => "Done",
        };
        self.stream = None;
        self.broken(&format!("an answer of another kind arrived: {kind}"))
    }

    fn broken(&self, why: &str) -> Problem {
        Problem::harmless(
            5907,
            format!("filterd on {} gave an answer that makes no sense", self.path.display()),
            why,
            "check that filterd and this command are of the same version (`farshore --version`), \
             restart the older one",
        )
    }
}

fn millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

type Answer = (Result<Reply, Problem>, Option<OwnedFd>);

fn talk(stream: &UnixStream, request: &Request, limit: Duration) -> io::Result<Answer> {
    stream.set_write_timeout(Some(CALL))?;
    stream.set_read_timeout(Some(limit))?;
    let mut writer = stream;
    write_message(&mut writer, request)?;
    let mut reader = FdReader::new(stream);
    let reply = read_message(&mut reader)?;
    Ok((reply, reader.into_fd()))
}

/// Connects; a daemon that hangs with a full backlog counts as one that does not answer.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::seconds(CONNECT_SECONDS))?;
    nix::sys::socket::connect(fd.as_raw_fd(), &address)?;
    Ok(fd.into())
}

fn open(path: &Path) -> Result<UnixStream, Problem> {
    connect(path).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => Problem::harmless(
            4901,
            format!("no permission to talk to filterd on {}", path.display()),
            "the control socket belongs to the user that runs filterd",
            "run the command as that user or as root",
        ),
        _ => Problem::harmless(
            5901,
            format!("filterd is not running: nobody answers on {}", path.display()),
            error.to_string(),
            "start it with `systemctl start farshore-filterd`, or `farshore filterd` (with the \
             same --root when one is used), and run the command again",
        )
        .with_risk(
            "protected volumes cannot be used until filterd runs again; their backing devices \
             are unharmed",
        ),
    })
}

#[cfg(test)]
mod tests;
