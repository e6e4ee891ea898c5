//! The freezer's socket: who may ask, and the life of a time of quiet on its connection.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use farshore_changelog::codec::{read_message, write_message};
use farshore_extent::Problem;

use super::config::Config;
use super::message::{Quiet, Reply, Request};
use super::problem;
use super::sequence::{self, Sequence};
use crate::durable_fs;
use crate::sys::fdpass::Peer;
use crate::sys::process::on_termination;
use crate::sys::wake::{Event, wait_readable};

/// Clients at a time.
const MAX_CLIENTS: usize = 16;
/// Longest time for the rest of a message that has begun, and for a client to take an answer.
const TALK: Duration = Duration::from_secs(10);
/// Rest when the process is out of descriptors or threads.
const PAUSE: Duration = Duration::from_millis(100);

/// Reads the configuration: anew for each request, so that nothing has to be reloaded.
pub type Load = Box<dyn Fn() -> Result<Config, Problem> + Send + Sync>;

/// The role, ready to serve.
pub struct Freezer {
    load: Load,
    record: PathBuf,
    socket: PathBuf,
    needed: Vec<PathBuf>,
    turn: Mutex<()>,
    clients: AtomicUsize,
    stop: Arc<Event>,
}

/// Serves until SIGTERM or SIGINT; `ready` is called once it listens. What is quiet then ends in order.
///
/// # Errors
/// FS-3411: the socket or the run directory cannot be used.
pub fn run(run: &Path, state: &Path, load: Load, ready: impl FnOnce()) -> Result<(), Problem> {
    let stop = on_termination().map_err(|e| problem::own_file(run, &e))?;
    // Whoever is used to it sends it for a new configuration, which needs none.
    let hangup = nix::sys::signal::SigSet::from(nix::sys::signal::Signal::SIGHUP);
    let _ = hangup.thread_block(); // without it such a signal only restarts the role
    durable_fs::create_directory(run, 0o755).map_err(|e| problem::own_file(run, &e))?;
    let freezer = Freezer {
        load,
        record: run.join("freezer.json"),
        socket: run.join("freezer.sock"),
        needed: needed(run, state),
        turn: Mutex::default(),
        clients: AtomicUsize::new(0),
        stop,
    };
    Arc::new(freezer).serve(ready)
}

/// What this role and `filterd` write to.
fn needed(run: &Path, state: &Path) -> Vec<PathBuf> {
    let log = fs::read_link("/proc/self/fd/2").ok().filter(|log| log.is_file());
    let inside = ["filterd", "agent", "target"].map(|role| state.join(role));
    [run.to_owned(), state.to_owned()].into_iter().chain(inside).chain(log).collect()
}

impl Freezer {
    fn serve(self: Arc<Self>, ready: impl FnOnce()) -> Result<(), Problem> {
        let listener = self.listen().map_err(|e| problem::own_file(&self.socket, &e))?;
        if let Err(problem) = sequence::recover(&self.record, &self.load) {
            tracing::error!(%problem, why = problem.why, "post hooks wait for the next start");
        }
        if let Err(problem) = (self.load)() {
            tracing::error!(%problem, why = problem.why, next = problem.next, "no points yet");
        }
        tracing::info!(socket = %self.socket.display(), "the freezer runs");
        ready();
        loop {
            match wait_readable(&[self.stop.as_fd(), listener.as_fd()], None) {
                Ok(found) if found.first() == Some(&true) => break,
                Ok(_) => {}
                Err(error) => tracing::error!(%error, "cannot wait for clients"),
            }
            match listener.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept clients for the moment");
                    let _ = wait_readable(&[self.stop.as_fd()], Some(PAUSE));
                }
            }
        }
        // Ends with the post hooks of what was quiet.
        drop(self.turn.lock().unwrap_or_else(PoisonError::into_inner));
        let _ = fs::remove_file(&self.socket); // a left-over is replaced
        Ok(())
    }

    fn listen(&self) -> io::Result<UnixListener> {
        if UnixStream::connect(&self.socket).is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        match fs::remove_file(&self.socket) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&self.socket)?;
        // Peers are asked for their credentials; who may ask can change at any time.
        fs::set_permissions(&self.socket, fs::Permissions::from_mode(0o666))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }

    fn admit(self: &Arc<Self>, stream: UnixStream) {
        let peer = match Peer::of(&stream) {
            Ok(peer) => peer,
            Err(error) => return tracing::warn!(%error, "a client without credentials"),
        };
        let access = (self.load)().map(|config| config.access).unwrap_or_default();
        if !access.allows(peer) {
            return tracing::warn!(uid = peer.uid, pid = peer.pid, "a client was refused");
        }
        if self.clients.fetch_add(1, Ordering::AcqRel) >= MAX_CLIENTS {
            self.clients.fetch_sub(1, Ordering::AcqRel);
            return tracing::warn!("too many clients");
        }
        let this = Arc::clone(self);
        let talk = move || {
            if let Err(error) = this.converse(&stream)
                && error.kind() != io::ErrorKind::UnexpectedEof
            {
                tracing::debug!(%error, "a client was hung up on");
            }
            this.clients.fetch_sub(1, Ordering::AcqRel);
        };
        if let Err(error) = Builder::new().name("client".into()).spawn(talk) {
            self.clients.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(%error, "no thread for a client");
        }
    }

    fn converse(&self, stream: &UnixStream) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(TALK))?;
        stream.set_write_timeout(Some(TALK))?;
        let mut problems = Vec::new();
        loop {
            wait_readable(&[stream.as_fd()], None)?;
            let answer = match next(stream)? {
                Request::Applications => {
                    (self.load)().map(|config| Reply::Applications(config.infos()))
                }
                Request::Quiet(quiet) => {
                    problems = self.quiet(stream, &quiet)?;
                    continue;
                }
                Request::Thaw => Err(problem::too_late("it had ended before")),
                Request::Finish => Ok(Reply::Finished(std::mem::take(&mut problems))),
            };
            say(stream, &answer)?;
        }
    }

    /// From the request for quiet to the last post hook, whose problems are returned.
    fn quiet(&self, stream: &UnixStream, quiet: &Quiet) -> io::Result<Vec<Problem>> {
        let _turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => {
                say(stream, &Err(problem::busy()))?;
                return Ok(Vec::new());
            }
        };
        let config = match (self.load)() {
            Ok(config) => config,
            Err(problem) => {
                say(stream, &Err(problem))?;
                return Ok(Vec::new());
            }
        };
        let (mut sequence, begun) = Sequence::begin(&config, quiet, &self.record, &self.needed);
        let talked = match begun {
            Ok(left) => {
                let limit_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
                let told = say(stream, &Ok(Reply::Quiet { limit_ms }));
                let asked = told.and_then(|()| self.asked_to_thaw(stream, sequence.until));
                let thawed = sequence.thaw();
                match asked {
                    Ok(true) => say(stream, &thawed.map(|()| Reply::Thawed)),
                    // Told when it asks.
                    Ok(false) => Ok(()),
                    Err(error) => Err(error),
                }
            }
            Err(problem) => {
                // Nothing of what was frozen so far may wait for a hook.
                let thawed = sequence.thaw();
                drop(thawed);
                say(stream, &Err(problem))
            }
        };
        let problems = sequence.post();
        for problem in &problems {
            tracing::error!(%problem, why = problem.why, next = problem.next, "a post hook");
        }
        talked.map(|()| problems)
    }

    /// Waits until it may be thawed. False when the time is over, or the role is stopped.
    fn asked_to_thaw(&self, stream: &UnixStream, until: Instant) -> io::Result<bool> {
        let left = until.saturating_duration_since(Instant::now());
        let ready = wait_readable(&[stream.as_fd(), self.stop.as_fd()], Some(left))?;
        if ready.first() != Some(&true) {
            return Ok(false);
        }
        match next(stream)? {
            Request::Thaw => Ok(true),
            Request::Applications | Request::Quiet(_) | Request::Finish => {
                Err(io::Error::other("only Thaw makes sense while it is quiet"))
            }
        }
    }
}

fn next(mut stream: &UnixStream) -> io::Result<Request> {
    read_message(&mut stream)
}

fn say(mut stream: &UnixStream, answer: &Result<Reply, Problem>) -> io::Result<()> {
    write_message(&mut stream, answer)
}
