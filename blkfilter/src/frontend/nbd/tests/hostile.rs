//! Peers that break the protocol, stop reading, or vanish. The server must neither panic nor hang,
//! and nobody else must notice.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use proptest::prelude::*;

use super::client::{Client, exports, info_data, meta_data, option_bytes, ram, served};
use super::late::Late;
use crate::frontend::nbd::limits::{BUSY_BYTES, MAX_REQUEST};
use crate::frontend::nbd::wire::{RawRequest, command, option};

/// A whole session of a sane client, as bytes.
fn session(requests: &[(u16, u16, u64, u32)]) -> Vec<u8> {
    let mut said = vec![0, 0, 0, 3];
    said.extend(option_bytes(option::STRUCTURED_REPLY, &[]));
    said.extend(option_bytes(option::SET_META_CONTEXT, &meta_data("disk", &["base:allocation"])));
    said.extend(option_bytes(option::LIST, &[]));
    said.extend(option_bytes(option::GO, &info_data("disk", &[0, 3])));
    for (cookie, (command, flags, offset, len)) in (0..).zip(requests) {
        let raw =
            RawRequest { flags: *flags, command: *command, cookie, offset: *offset, len: *len };
        said.extend(raw.encode());
        said.extend(vec![0x5a; raw.payload_len() as usize]);
    }
    said
}

/// Says `said`, half-closes, reads everything to the end; the server's thread must end.
fn throw(said: Vec<u8>, mut stream: UnixStream, server: JoinHandle<()>) -> usize {
    let mut sending = stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        let _ = sending.write_all(&said); // the server may hang up in the middle
        let _ = sending.shutdown(Shutdown::Write);
    });
    let mut heard = 0;
    let mut bytes = vec![0; 1 << 16];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => break,
            Ok(n) => heard += n,
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(e) => panic!("the server hangs: {e}"),
        }
    }
    sender.join().unwrap();
    server.join().expect("the server's thread panicked");
    heard
}

fn requests() -> impl Strategy<Value = Vec<(u16, u16, u64, u32)>> {
    let command = prop_oneof![0u16..2, 3u16..5, 6u16..8];
    let one = (command, 0u64..2048, 0u32..64);
    let one = one.prop_map(|(command, at, len)| (command, 0, at * 512, len * 512));
    proptest::collection::vec(one, 0..30)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn random_bytes_end_the_connection_and_nothing_else(
        said in proptest::collection::vec(any::<u8>(), 0..4096),
        greeted in any::<bool>(),
    ) {
        let (stream, server) = served(&exports(ram(1 << 20)));
        let mut bytes = if greeted { session(&[]) } else { Vec::new() };
        bytes.extend(said);
        throw(bytes, stream, server);
    }

    #[test]
    fn mutated_sessions_never_hang_or_panic(
        requests in requests(),
        places in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in proptest::option::of(any::<prop::sample::Index>()),
        seed in any::<u64>(),
    ) {
        let device = Arc::new(Late { ram: ram(1 << 20), budget: 2 << 20, seed });
        let (stream, server) = served(&exports(device));
        let mut said = session(&requests);
        for (place, byte) in places {
            let at = place.index(said.len());
            said[at] = byte;
        }
        if let Some(cut) = cut {
            let at = cut.index(said.len());
            said.truncate(at);
        }
        throw(said, stream, server);
    }
}

#[test]
fn an_unmutated_session_is_answered_completely_before_the_end() {
    let (stream, server) = served(&exports(ram(1 << 20)));
    let asked =
        [(command::WRITE, 0, 0, 4096), (command::READ, 0, 0, 4096), (command::FLUSH, 0, 0, 0)];
    let heard = throw(session(&asked), stream, server);
    let (stream, server) = served(&exports(ram(1 << 20)));
    let nothing = throw(session(&[]), stream, server);
    assert_eq!(heard - nothing, 16 + (28 + 4096) + 16);
}

#[test]
fn a_client_that_does_not_read_is_held_back_and_disturbs_nobody() {
    let ram = ram(64 << 20);
    let exports = exports(ram.clone());
    let (stream, stuck) = served(&exports);
    let mut greedy = Client::enter(stream, false);
    for cookie in 0..200 {
        greedy.request(command::READ, 0, cookie, 0, 1 << 20);
    }
    let (stream, server) = served(&exports);
    let mut other = Client::enter(stream, true);
    for _ in 0..50 {
        assert_eq!(other.read(0, 4096), vec![0; 4096]);
    }
    let reads = ram.counts().reads - 50;
    let most = (BUSY_BYTES + u64::from(MAX_REQUEST)) >> 20;
    assert!(reads <= most, "{reads} MiB were read for a client that takes none");
    other.leave(server);
    for cookie in 0..200 {
        let answer = greedy.answer(|_| (0, 1 << 20));
        assert_eq!((answer.cookie, answer.error), (cookie, 0));
    }
    greedy.leave(stuck);
}

#[test]
fn a_client_that_vanishes_gives_everything_back() {
    for lines in [0, 1, 40] {
        let device = Arc::new(Late { ram: ram(4 << 20), budget: 4 << 20, seed: 11 });
        let (stream, server) = served(&exports(device));
        let mut client = Client::enter(stream, true);
        for cookie in 0..lines {
            client.request(command::READ, 0, cookie, 0, 256 << 10);
        }
        client.request(command::WRITE, 0, 99, 0, 1 << 20);
        client.say(&[1; 1000]); // and then nothing
        drop(client);
        server.join().unwrap(); // the late device asserts that nothing is in flight
    }
}
