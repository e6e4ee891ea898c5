//! The listening socket and the life of connections.

use std::io::{ErrorKind, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use super::client::{Client, PATIENCE, exports, info_data, ram};
use crate::frontend::nbd::starttls::{BeforeTls, Step};
use crate::frontend::nbd::wire::{ClientFlags, command, option, reply};
use crate::frontend::nbd::{Config, Exports, Server, serve_after_starttls};

fn connect(server: &Server) -> UnixStream {
    let stream = UnixStream::connect(server.path()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn listening(exports: &Exports, config: Config) -> (tempfile::TempDir, Server) {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::bind_unix(&dir.path().join("s"), exports.clone(), config).unwrap();
    (dir, server)
}

/// Waits for a condition that another thread brings about.
fn eventually(what: &str, holds: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "{what} never came true");
        std::thread::yield_now();
    }
}

#[test]
fn the_socket_is_private_a_stale_one_is_replaced_and_a_live_one_is_not() {
    let exports = exports(ram(1 << 20));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap()); // its file stays: stale
    let mut server = Server::bind_unix(&path, exports.clone(), Config::default()).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = Server::bind_unix(&path, exports.clone(), Config::default());
    assert_eq!(second.unwrap_err().kind(), ErrorKind::AddrInUse);
    Client::enter(connect(&server), true);
    assert!(server.stop(PATIENCE));
    assert!(!path.exists());

    std::fs::write(&path, "precious").unwrap();
    let third = Server::bind_unix(&path, exports, Config::default());
    assert_eq!(third.unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn only_clients_in_transmission_are_counted() {
    let exports = exports(ram(1 << 20));
    let (_dir, server) = listening(&exports, Config::default());
    let greeted = Client::greet(connect(&server));
    let one = Client::enter(connect(&server), true);
    let two = Client::enter(connect(&server), false);
    eventually("two clients", || server.clients() == 2);
    assert_eq!(exports.clients("disk"), Some(2));
    drop((greeted, one));
    eventually("one client", || server.clients() == 1 && exports.list()[0].clients == 1);
    drop(two);
    eventually("no client", || server.clients() == 0 && exports.clients("disk") == Some(0));
}

#[test]
fn stop_answers_what_has_arrived_and_ends_idle_clients() {
    let exports = exports(ram(1 << 20));
    let (_dir, mut server) = listening(&exports, Config::default());
    let mut client = Client::enter(connect(&server), true);
    client.write(1, 0, &[1; 4096]);
    assert_eq!(client.outcome(), (1, 0));
    let begun = Instant::now();
    assert!(server.stop(PATIENCE));
    assert!(begun.elapsed() < PATIENCE);
    assert!(client.at_end());
    assert!(UnixStream::connect(server.path()).is_err());
}

#[test]
fn stop_cuts_a_client_that_will_not_take_its_answers() {
    let exports = exports(ram(64 << 20));
    let (_dir, mut server) = listening(&exports, Config::default());
    let mut client = Client::enter(connect(&server), true);
    for cookie in 0..20 {
        client.request(command::READ, 0, cookie, 0, 1 << 20);
    }
    assert!(server.stop(Duration::from_millis(50)));
    assert_eq!(server.clients(), 0);
}

#[test]
fn removing_an_export_ends_its_connections_only() {
    let both = exports(ram(1 << 20));
    let device = ram(1 << 20);
    let gone = super::super::Export { name: "gone".into(), description: String::new(), device };
    both.add(gone).unwrap();
    let (_dir, server) = listening(&both, Config::default());
    let mut stays = Client::greet(connect(&server));
    assert_eq!(stays.ask(option::GO, &info_data("disk", &[])).0, reply::ACK);
    let mut ends = Client::greet(connect(&server));
    assert_eq!(ends.ask(option::GO, &info_data("gone", &[])).0, reply::ACK);
    eventually("both in transmission", || server.clients() == 2);
    assert!(both.remove("gone", PATIENCE));
    assert!(!both.remove("gone", PATIENCE));
    assert!(ends.at_end());
    assert_eq!(stays.read(0, 512), [0; 512]);
    assert_eq!(both.list().len(), 1);
}

#[test]
fn connections_beyond_the_limit_are_closed_and_places_come_free() {
    let exports = exports(ram(1 << 20));
    let config = Config { max_connections: 2, ..Config::default() };
    let (_dir, server) = listening(&exports, config);
    let one = Client::enter(connect(&server), true);
    let _two = Client::enter(connect(&server), true);
    assert_eq!(connect(&server).read(&mut [0; 18]).unwrap(), 0);
    drop(one);
    eventually("a free place", || connect(&server).read(&mut [0; 18]).unwrap() == 18);
}

#[test]
fn a_silent_peer_is_dropped_after_the_handshake_wait() {
    let exports = exports(ram(1 << 20));
    let config = Config { handshake_wait: Duration::from_millis(20), ..Config::default() };
    let (_dir, server) = listening(&exports, config);
    let mut stream = connect(&server);
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).unwrap();
    assert_eq!(heard.len(), 18);
}

#[test]
fn a_bridge_takes_over_after_starttls_without_a_second_greeting() {
    let mut said = vec![0, 0, 0, 3];
    said.extend(super::client::option_bytes(option::STARTTLS, &[]));
    let step = BeforeTls::new().feed(&said, &mut Vec::new());
    assert_eq!(step, Step::BeginTls(ClientFlags { no_zeroes: true }));
    let Step::BeginTls(flags) = step else { return };

    let exports = exports(ram(1 << 20));
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap(); // as an async bridge leaves it
    let serving = exports.clone();
    let server =
        std::thread::spawn(move || serve_after_starttls(theirs, &serving, flags, PATIENCE));
    let mut client = Client { stream: ours, structured: false };
    assert_eq!(client.ask(option::STARTTLS, &[]).0, reply::ERR_INVALID);
    assert_eq!(client.ask(option::GO, &info_data("disk", &[])).0, reply::ACK);
    assert_eq!(client.read(0, 512), [0; 512]);
    client.leave(server);
}
