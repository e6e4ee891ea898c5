//! The answering side of the control socket: who may ask, and the way of an exchange.
//!
//! Owns the socket and a thread for each client; decides nothing about volumes, a [`Serve`] does.
//! Nobody but the daemon's own user, root, and the users and groups named in [`Access`] is
//! listened to. Malformed input ends that client's connection and nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use farshore_changelog::codec::{encode, read_message};
use farshore_extent::Problem;
use nix::unistd::{Gid, chown, geteuid};

use super::message::{Reply, Request};
use crate::sys::fdpass::{Peer, send_with_fd};
use crate::sys::wake::{Event, wait_readable};

/// Clients at a time: each volume's reader, the agent's line, and people. A thread each.
const MAX_CLIENTS: usize = 256;

/// Longest time a client may take to read an answer.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// Rest when the process is out of descriptors or threads.
const PAUSE: Duration = Duration::from_millis(100);

/// Who besides the daemon's own user and root may use the socket.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Access {
    /// These users.
    pub uids: Vec<u32>,
    /// Members of these groups; the socket file is given to the first.
    pub gids: Vec<u32>,
}

impl Access {
    pub(crate) fn allows(&self, peer: Peer) -> bool {
        peer.uid == 0
            || peer.uid == geteuid().as_raw()
            || self.uids.contains(&peer.uid)
            || self.gids.contains(&peer.gid)
    }
}

/// An answer, with the descriptor that goes along.
#[derive(Debug)]
pub struct Response {
    /// What is said.
    pub reply: Reply,
    /// Only with [`Reply::Pool`].
    pub fd: Option<OwnedFd>,
}

impl From<Reply> for Response {
    fn from(reply: Reply) -> Self {
        Self { reply, fd: None }
    }
}

/// Answers requests; called from many threads at once, may block.
pub trait Serve: Send + Sync + 'static {
    /// Answers one request.
    ///
    /// # Errors
    /// What the person or the agent is told.
    fn serve(&self, request: Request) -> Result<Response, Problem>;
}

/// A listening control socket. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    clients: Arc<Clients>,
    path: PathBuf,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Clients {
    open: Mutex<Open>,
    fewer: Condvar,
    stop: Event,
}

#[derive(Debug, Default)]
struct Open {
    streams: BTreeMap<u64, UnixStream>,
    next: u64,
    stopping: bool,
}

impl Clients {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner) // plain data
    }
}

impl Server {
    /// Listens at `path`; a socket file on which nobody listens is replaced.
    ///
    /// # Errors
    /// `AddrInUse` when a daemon listens there, and whatever the system says.
    pub fn bind(path: &Path, access: Access, service: Arc<dyn Serve>) -> io::Result<Self> {
        remove_stale(path)?;
        let listener = UnixListener::bind(path)?;
        // Peers are asked for their credentials, so the moment before this harms nobody.
        let mode = if access.gids.is_empty() && access.uids.is_empty() { 0o600 } else { 0o660 };
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        if let Some(gid) = access.gids.first() {
            chown(path, None, Some(Gid::from_raw(*gid)))?;
        }
        listener.set_nonblocking(true)?;
        let (open, fewer, stop) = (Mutex::default(), Condvar::new(), Event::new()?);
        let clients = Arc::new(Clients { open, fewer, stop });
        let accepting = Arc::clone(&clients);
        let acceptor = Builder::new()
            .name("control".into())
            .spawn(move || accept_loop(&accepting, &listener, &access, &service))?;
        Ok(Self { clients, path: path.to_owned(), acceptor: Some(acceptor) })
    }

    /// Stops: no new clients; the open ones are cut. Waits a moment for their threads.
    pub fn stop(&mut self) {
        let Some(acceptor) = self.acceptor.take() else { return };
        self.clients.stop.set();
        let _ = acceptor.join(); // a panic there was reported when it happened
        let _ = fs::remove_file(&self.path); // left behind, it is stale and gets replaced
        let mut open = self.clients.lock();
        open.stopping = true;
        for stream in open.streams.values() {
            let _ = stream.shutdown(Shutdown::Both); // fails when the peer has gone
        }
        let limit = Duration::from_secs(5);
        let empty = |open: &mut Open| !open.streams.is_empty();
        let waited = self.clients.fewer.wait_timeout_while(open, limit, empty);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
        Ok(file) if !file.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "not a socket"));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
        Err(_) => fs::remove_file(path),
    }
}

fn accept_loop(
    clients: &Arc<Clients>,
    listener: &UnixListener,
    access: &Access,
    service: &Arc<dyn Serve>,
) {
    loop {
        match wait_readable(&[clients.stop.as_fd(), listener.as_fd()], None) {
            Ok(ready) if ready.first() == Some(&true) => return,
            Ok(_) => {}
            Err(error) => tracing::error!(%error, "cannot wait for control clients"),
        }
        match listener.accept() {
            Ok((stream, _)) => admit(clients, stream, access, service),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept control clients for the moment");
                if matches!(wait_readable(&[clients.stop.as_fd()], Some(PAUSE)), Ok(r) if r == [true])
                {
                    return;
                }
            }
        }
    }
}

fn admit(clients: &Arc<Clients>, stream: UnixStream, access: &Access, service: &Arc<dyn Serve>) {
    match Peer::of(&stream) {
        Ok(peer) if access.allows(peer) => {}
        Ok(peer) => {
            tracing::warn!(uid = peer.uid, pid = peer.pid, "control client refused");
            return;
        }
        Err(error) => {
            tracing::warn!(%error, "control client without credentials refused");
            return;
        }
    }
    let place = match Place::take(clients, &stream) {
        Ok(place) => place,
        Err(error) => {
            tracing::warn!(%error, "control client refused");
            return;
        }
    };
    let service = Arc::clone(service);
    let thread = Builder::new().name("control-client".into()).spawn(move || {
        if let Err(error) = converse(&stream, &*service)
            && error.kind() != io::ErrorKind::UnexpectedEof
        {
            tracing::debug!(%error, "a control client was hung up on");
        }
        drop(place);
    });
    if let Err(error) = thread {
        tracing::warn!(%error, "no thread for a control client");
    }
}

/// A client's place in the list; gives it up when dropped, also by a panic.
struct Place {
    clients: Arc<Clients>,
    number: u64,
}

impl Place {
    fn take(clients: &Arc<Clients>, stream: &UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(WRITE_LIMIT))?;
        let copy = stream.try_clone()?;
        let mut open = clients.lock();
        if open.stopping || open.streams.len() >= MAX_CLIENTS {
            return Err(io::Error::other("too many clients"));
        }
        open.next += 1;
        let number = open.next;
        open.streams.insert(number, copy);
        Ok(Self { clients: Arc::clone(clients), number })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clients.lock().streams.remove(&self.number);
        self.clients.fewer.notify_all();
    }
}

/// Exchanges until the client leaves or speaks nonsense.
fn converse(stream: &UnixStream, service: &dyn Serve) -> io::Result<()> {
    let mut input = stream;
    loop {
        let request: Request = read_message(&mut input)?;
        let (answer, fd) = match service.serve(request) {
            Ok(Response { reply, fd }) => (Ok(reply), fd),
            Err(problem) => (Err(problem), None),
        };
        send(stream, &answer, fd)?;
    }
}

fn send(
    mut stream: &UnixStream,
    answer: &Result<Reply, Problem>,
    fd: Option<OwnedFd>,
) -> io::Result<()> {
    let body = encode(answer).map_err(io::Error::other)?;
    let len = u32::try_from(body.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(4 + body.len());
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.extend_from_slice(&body);
    match fd {
        Some(fd) => send_with_fd(stream, &bytes, fd.as_fd()),
        None => io::Write::write_all(&mut stream, &bytes),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::control::Client;

    struct Nothing;

    impl Serve for Nothing {
        fn serve(&self, request: Request) -> Result<Response, Problem> {
            match request {
                Request::List => Ok(Reply::Volumes(vec![]).into()),
                _ => Err(Problem::harmless(2039, "no", "not here", "go")),
            }
        }
    }

    fn server(dir: &Path) -> (Server, PathBuf) {
        let path = dir.join("control.sock");
        (Server::bind(&path, Access::default(), Arc::new(Nothing)).unwrap(), path)
    }

    #[test]
    fn exchanges_go_on_after_a_problem_and_the_socket_is_the_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (mut server, path) = server(dir.path());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut client = Client::connect(&path).unwrap();
        assert_eq!(client.list().unwrap(), vec![]);
        let id = farshore_extent::VolumeId::random();
        assert_eq!(client.copy_rate(id, 0).unwrap_err().code.0, 2039);
        assert_eq!(client.list().unwrap(), vec![]);
        server.stop();
        assert!(!path.exists() && client.list().is_err());
    }

    #[test]
    fn malformed_input_ends_that_client_only() {
        let dir = tempfile::tempdir().unwrap();
        let (_server, path) = server(dir.path());
        let mut good = Client::connect(&path).unwrap();
        for nonsense in [&[0xff; 64][..], &[4, 0, 0, 0, 0xee, 0xee, 0xee, 0xee][..]] {
            let mut bad = UnixStream::connect(&path).unwrap();
            bad.write_all(nonsense).unwrap();
            let mut rest = vec![];
            // Unread input makes the kernel report a reset instead of the end.
            let _ = bad.read_to_end(&mut rest);
            assert!(rest.is_empty());
        }
        assert_eq!(good.list().unwrap(), vec![]);
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        drop(UnixListener::bind(&path).unwrap());
        let first = Server::bind(&path, Access::default(), Arc::new(Nothing)).unwrap();
        let second = Server::bind(&path, Access::default(), Arc::new(Nothing));
        assert_eq!(second.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(first);
    }

    #[test]
    fn other_users_are_refused_unless_they_are_named() {
        let peer = Peer { uid: geteuid().as_raw() + 4242, gid: 777, pid: 1 };
        assert!(!Access::default().allows(peer));
        assert!(Access { uids: vec![peer.uid], gids: vec![] }.allows(peer));
        assert!(Access { uids: vec![], gids: vec![777] }.allows(peer));
    }
}
