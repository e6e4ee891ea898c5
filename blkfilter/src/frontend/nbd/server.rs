//! Listens on a unix socket and gives every connection a thread. Survives whatever accept can
//! report; owns the socket file.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket as new_socket,
};
use tracing::{debug, warn};

use super::export::Exports;
use super::handshake::{Start, negotiate};
use super::socket::Socket;
use super::transmission::Transmission;
use super::wire::ClientFlags;

/// How long to stop accepting when the process is out of descriptors or memory.
const ACCEPT_PAUSE_MS: u16 = 100;

/// Connections the kernel queues for us.
const BACKLOG: i32 = 128;

/// How a server behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Permission bits of the socket file.
    pub mode: u32,
    /// Connections at a time; more are closed at once. Each costs at most about 80 MiB when it
    /// is busy and 330 KiB when it is idle, see [`limits`](super::limits).
    pub max_connections: usize,
    /// Longest wait for a peer in the option phase; ten times that for the phase as a whole.
    pub handshake_wait: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { mode: 0o600, max_connections: 64, handshake_wait: Duration::from_secs(30) }
    }
}

/// A listening NBD server. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    path: PathBuf,
    /// Device and inode of the socket file, so that another server's file is never removed.
    identity: (u64, u64),
    acceptor: Option<thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    exports: Exports,
    config: Config,
    stop: EventFd,
    open: Mutex<Open>,
    fewer: Condvar,
}

#[derive(Debug, Default)]
struct Open {
    sockets: BTreeMap<u64, Arc<Socket>>,
    next: u64,
    /// Connections in transmission.
    clients: u32,
}

impl Server {
    /// Listens on a unix socket at `path`. A socket file on which nobody listens is replaced.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] when a live server listens there,
    /// [`io::ErrorKind::AlreadyExists`] when something else than a socket is there, and whatever
    /// the system says.
    pub fn bind_unix(path: &Path, exports: Exports, config: Config) -> io::Result<Self> {
        remove_stale(path)?;
        let listener = listen_at(path, config.mode)?;
        let file = fs::symlink_metadata(path)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let shared = Arc::new(Shared {
            exports,
            config,
            stop: EventFd::from_flags(flags)?,
            open: Mutex::default(),
            fewer: Condvar::new(),
        });
        let accepting = shared.clone();
        let acceptor = thread::Builder::new()
            .name("nbd-accept".into())
            .spawn(move || accept_loop(&accepting, &listener))?;
        let identity = (file.dev(), file.ino());
        Ok(Self { shared, path: path.to_owned(), identity, acceptor: Some(acceptor) })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Connections in transmission, on all exports.
    #[must_use]
    pub fn clients(&self) -> u32 {
        self.shared.lock().clients
    }

    /// Stops: no new connections; open ones finish the requests that have arrived and end. Those
    /// that have not after `grace` are cut. Returns whether all had ended when it returned.
    pub fn stop(&mut self, grace: Duration) -> bool {
        let Some(acceptor) = self.acceptor.take() else { return true };
        let _ = self.shared.stop.write(1); // cannot fail: the counter is far from full
        let _ = acceptor.join(); // a panic there was reported when it happened
        let ours = |m: &fs::Metadata| (m.dev(), m.ino()) == self.identity;
        if fs::symlink_metadata(&self.path).as_ref().is_ok_and(ours) {
            let _ = fs::remove_file(&self.path); // left behind, it is stale and gets replaced
        }
        let mut open = self.shared.lock();
        open.sockets.values().for_each(|socket| socket.end_input());
        open = self.shared.wait_empty(open, grace);
        if open.sockets.is_empty() {
            return true;
        }
        open.sockets.values().for_each(|socket| socket.cut());
        self.shared.wait_empty(open, Duration::from_secs(1)).sockets.is_empty()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop(Duration::from_secs(5));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner) // plain data
    }

    fn wait_empty<'a>(
        &self,
        mut open: MutexGuard<'a, Open>,
        limit: Duration,
    ) -> MutexGuard<'a, Open> {
        let until = Instant::now() + limit;
        while !open.sockets.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            open = self.fewer.wait_timeout(open, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        open
    }

    /// Starts a thread for a connection, or closes it.
    fn admit(self: &Arc<Self>, fd: OwnedFd) {
        let socket = Arc::new(Socket::new(fd));
        let mut open = self.lock();
        if open.sockets.len() >= self.config.max_connections {
            debug!("nbd: connection refused, {} are open", open.sockets.len());
            return;
        }
        open.next += 1;
        let place = Place { shared: self.clone(), number: open.next };
        open.sockets.insert(place.number, socket.clone());
        drop(open);
        let thread = thread::Builder::new().name("nbd".into());
        let started = thread.spawn(move || {
            let config = &place.shared.config;
            let counted = || InTransmission::new(&place.shared);
            let exports = &place.shared.exports;
            serve_socket(&socket, exports, Start::Greeting, config.handshake_wait, counted);
            drop(place);
        });
        if let Err(error) = started {
            warn!(%error, "nbd: no thread for a connection, it is closed");
        }
    }
}

/// A connection's place in the list; gives it up when dropped, also by a panic.
struct Place {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.lock().sockets.remove(&self.number);
        self.shared.fewer.notify_all();
    }
}

/// Counts a connection in transmission until dropped.
struct InTransmission(Arc<Shared>);

impl InTransmission {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.lock().clients += 1;
        Self(shared.clone())
    }
}

impl Drop for InTransmission {
    fn drop(&mut self) {
        self.0.lock().clients -= 1;
    }
}

/// Serves one accepted connection, from the greeting on, on the calling thread, until the client
/// leaves, the socket is shut down or the export is removed. `handshake_wait` is as in
/// [`Config`].
pub fn serve(stream: UnixStream, exports: &Exports, handshake_wait: Duration) {
    let socket = Arc::new(Socket::new(stream.into()));
    serve_socket(&socket, exports, Start::Greeting, handshake_wait, || ());
}

/// The same for a connection whose greeting and STARTTLS were answered by someone else (see
/// [`starttls`](super::starttls)): the stream carries the plaintext inside TLS and begins with the
/// next option. `flags` is what the client said after the greeting.
pub fn serve_after_starttls(
    stream: UnixStream,
    exports: &Exports,
    flags: ClientFlags,
    handshake_wait: Duration,
) {
    let socket = Arc::new(Socket::new(stream.into()));
    serve_socket(&socket, exports, Start::AfterStartTls(flags), handshake_wait, || ());
}

fn serve_socket<G>(
    socket: &Arc<Socket>,
    exports: &Exports,
    start: Start,
    handshake_wait: Duration,
    entered: impl FnOnce() -> G,
) {
    if let Err(error) = socket.make_blocking() {
        return debug!(%error, "nbd: connection failed before the handshake");
    }
    match negotiate(socket, exports, start, handshake_wait) {
        Ok(Some((offer, settled))) => {
            let Some(_visit) = offer.enter(socket) else { return }; // removed meanwhile
            let _counted = entered();
            debug!(export = offer.export.name, "nbd: client in transmission");
            Transmission::new(socket.clone(), settled).run();
            debug!(export = offer.export.name, "nbd: client gone");
        }
        Ok(None) => {}
        Err(error) => debug!(%error, "nbd: no transmission"),
    }
    socket.cut();
}

/// Removes a socket file on which nobody listens.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
        Ok(file) if file.file_type().is_socket() => {}
        Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(e) => Err(e),
    }
}

/// Binds and listens; the permissions are in place before the first connection is possible.
fn listen_at(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = new_socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    fs::set_permissions(path, Permissions::from_mode(mode))?;
    listen(&fd, Backlog::new(BACKLOG)?)?;
    Ok(UnixListener::from(fd))
}

fn accept_loop(shared: &Arc<Shared>, listener: &UnixListener) {
    let mut short = false; // of resources: said once, not ten times a second
    loop {
        if wait_for(shared, Some(listener)) {
            return;
        }
        match listener.accept() {
            Ok((stream, _)) => {
                short = false;
                shared.admit(stream.into());
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if out_of_resources(&error) => {
                if !std::mem::replace(&mut short, true) {
                    warn!(%error, "nbd: cannot accept connections for the moment");
                }
                if wait_for(shared, None) {
                    return;
                }
            }
            Err(error) => debug!(%error, "nbd: a connection failed before it was accepted"),
        }
    }
}

fn out_of_resources(error: &io::Error) -> bool {
    let full = [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM];
    error.raw_os_error().is_some_and(|n| full.contains(&Errno::from_raw(n)))
}

/// Waits for a connection, or without a listener for a moment. Returns whether to stop.
fn wait_for(shared: &Shared, listener: Option<&UnixListener>) -> bool {
    let stop = PollFd::new(shared.stop.as_fd(), PollFlags::POLLIN);
    let polled = match listener {
        Some(listener) => {
            let mut both = [stop, PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            let polled = poll(&mut both, PollTimeout::NONE);
            polled.map(|_| both[0].any().unwrap_or(false))
        }
        None => {
            let mut one = [stop];
            let polled = poll(&mut one, ACCEPT_PAUSE_MS);
            polled.map(|_| one[0].any().unwrap_or(false))
        }
    };
    polled.unwrap_or(false) // interrupted: look again
}
