//! The transmission phase of well-behaved and of odd clients.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::client::{Client, exports, ram, served};
use super::late::Late;
use crate::device::Device;
use crate::frontend::memory::MemoryDevice;
use crate::frontend::nbd::limits::MAX_REQUEST;
use crate::frontend::nbd::wire::{command, command_flag};

const MIB: usize = 1 << 20;

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn late(ram: &Arc<MemoryDevice>, budget: u64, seed: u64) -> Arc<dyn Device> {
    Arc::new(Late { ram: ram.clone(), budget, seed })
}

#[test]
fn the_largest_requests_are_cut_and_answered_once_both_ways() {
    for structured in [false, true] {
        let ram = ram(80 << 20);
        let (stream, server) = served(&exports(late(&ram, 64 << 20, 3)));
        let mut client = Client::enter(stream, structured);
        let data = pattern(1, MAX_REQUEST as usize);
        client.write(1, 512, &data);
        assert_eq!(client.outcome(), (1, 0));
        assert_eq!(ram.counts().writes, 32);
        assert!(client.read(512, data.len()) == data);
        assert!(client.read(4096, 3 * MIB + 512) == data[3584..][..3 * MIB + 512]);
        client.leave(server);
    }
}

#[test]
fn a_request_larger_than_all_buffers_is_served_or_refused_but_never_stuck() {
    let ram = ram(8 << 20);
    let (stream, server) = served(&exports(late(&ram, 2 << 20, 9)));
    let mut client = Client::enter(stream, true);
    let data = pattern(2, 8 * MIB);
    client.write(1, 0, &data);
    assert_eq!(client.outcome(), (1, 0));
    assert!(client.read(0, 8 * MIB) == data, "chunks leave as their buffers are needed");
    client.leave(server);

    // A simple reply should be held until all of it is known to be good, which is impossible.
    let (stream, server) = served(&exports(late(&ram, 2 << 20, 9)));
    let mut client = Client::enter(stream, false);
    assert!(client.read(0, 8 * MIB) == data);
    assert!(client.read(4096, MIB) == data[4096..][..MIB]);
    // When it then fails half-way, only hanging up is honest.
    client.request(command::READ, 0, 2, 0, 8 << 20);
    client.take(16 + MIB);
    ram.fail_next(u32::MAX);
    let rest = client.rest();
    ram.fail_next(0);
    assert!(rest < 7 * MIB);
    server.join().unwrap();

    // Not even one piece fits: payload is drained, the stream stays in step.
    let (stream, server) = served(&exports(late(&ram, 64 << 10, 9)));
    let mut client = Client::enter(stream, true);
    client.write(3, 0, &pattern(3, 2 * MIB));
    assert_eq!(client.outcome(), (3, 12));
    client.write(4, 0, &pattern(4, 4096));
    assert_eq!(client.outcome(), (4, 0));
    client.leave(server);
}

#[test]
fn refused_writes_are_drained_and_the_next_request_is_understood() {
    let (stream, server) = served(&exports(ram(1 << 20)));
    let mut client = Client::enter(stream, true);
    for (offset, len, error) in [
        (1, 512, 22),
        (0, 100, 22),
        (1 << 20, 512, 28),
        (u64::MAX - 10, 4096, 28),
        (0, MAX_REQUEST as usize + 512, 22),
    ] {
        client.write(9, offset, &pattern(5, len));
        assert_eq!(client.outcome(), (9, error));
    }
    assert!(client.read(0, MIB).iter().all(|b| *b == 0), "nothing of them was written");
    client.leave(server);
}

#[test]
fn flush_fua_trim_and_zeroes_reach_the_device_as_themselves() {
    let ram = ram(256 << 20);
    let (stream, server) = served(&exports(ram.clone()));
    let mut client = Client::enter(stream, true);
    ram.write_at(0, &pattern(1, MIB));
    client.request(command::WRITE, command_flag::FUA, 1, 0, 512);
    client.say(&[7; 512]);
    client.request(command::TRIM, command_flag::FUA, 2, 256 << 10, 256 << 10);
    client.request(command::WRITE_ZEROES, command_flag::NO_HOLE, 3, 512 << 10, 256 << 10);
    client.request(command::FLUSH, 0, 4, 0, 0);
    client.request(command::WRITE_ZEROES, 0, 5, 1 << 20, 200 << 20);
    for cookie in 1..=5 {
        assert_eq!(client.outcome(), (cookie, 0));
    }
    let counts = ram.counts();
    assert_eq!((counts.fua, counts.flushes), (2, 1));
    assert_eq!((counts.zeroes, counts.unmaps), (1 + 1 + 4, 1 + 4), "200 MiB in pieces of 64");
    client.request(command::BLOCK_STATUS, 0, 6, 0, 1 << 20);
    let status = client.answer(|_| (0, 0)).data;
    let words: Vec<u32> =
        status.chunks(4).map(|four| u32::from_be_bytes(four.try_into().unwrap())).collect();
    assert_eq!(words, [1, 256 << 10, 0, 256 << 10, 3, 512 << 10, 0]);
    client.request(command::BLOCK_STATUS, command_flag::REQ_ONE, 7, 512, 1 << 20);
    assert_eq!(
        client.answer(|_| (0, 0)).data[4..8],
        (256u32 << 10).wrapping_sub(512).to_be_bytes()
    );
    client.leave(server);
}

#[test]
fn device_errors_are_answered_and_the_connection_goes_on() {
    for structured in [false, true] {
        let ram = ram(8 << 20);
        let (stream, server) = served(&exports(late(&ram, 64 << 20, 5)));
        let mut client = Client::enter(stream, structured);
        ram.fail_next(1);
        client.write(1, 0, &[1; 512]);
        assert_eq!(client.outcome(), (1, 5));
        ram.fail_next(1);
        client.request(command::READ, 0, 2, 0, 4 << 20); // one piece of four fails
        assert_eq!(client.answer(|_| (0, 0)).error, 5);
        client.write(3, 0, &[1; 512]);
        assert_eq!(client.outcome(), (3, 0));
        assert_eq!(client.read(0, 512), [1; 512]);
        client.leave(server);
    }
}

#[derive(Debug, Clone, Copy)]
struct Op {
    command: u16,
    flags: u16,
    offset: u64,
    len: u32,
}

/// Mostly good requests on a disk of 1 MiB, and every kind of bad one.
fn op() -> impl Strategy<Value = Op> {
    let sectors = 0u64..2040;
    let command = prop_oneof![6 => 0u16..2, 2 => Just(3u16), 2 => Just(4u16), 2 => Just(6u16),
        1 => 8u16..20];
    let len = prop_oneof![8 => 0u32..9, 3 => 9u32..400, 1 => 3000u32..4000];
    let odd = prop_oneof![9 => Just(0u64), 1 => 1u64..512];
    let flags = prop_oneof![8 => Just(0u16), 1 => 0u16..64];
    (command, flags, sectors, len, odd).prop_map(|(command, flags, sector, len, odd)| Op {
        command,
        flags,
        offset: sector * 512 + odd,
        len: len * 512,
    })
}

/// What an operation must answer, by the protocol, on the test's disk.
fn expected(op: Op, size: u64) -> u32 {
    let fua = command_flag::FUA;
    let allowed = match op.command {
        command::READ => fua | command_flag::DF,
        command::WRITE_ZEROES => fua | command_flag::NO_HOLE,
        _ => fua,
    };
    let beyond = op.offset + u64::from(op.len) > size;
    let odd = !op.offset.is_multiple_of(512);
    if op.flags & !allowed != 0 || op.command > command::BLOCK_STATUS {
        22
    } else if op.command == command::FLUSH {
        0
    } else if op.command == command::READ && op.flags & command_flag::DF != 0 && op.len > 1 << 20 {
        75
    } else if beyond {
        if op.command == command::WRITE || op.command == command::WRITE_ZEROES { 28 } else { 22 }
    } else if odd && op.len > 0 {
        22
    } else {
        0
    }
}

/// Applies a successful operation to the model; what a read must return.
fn apply(op: Op, cookie: u64, model: &mut [u8]) -> Vec<u8> {
    let start = usize::try_from(op.offset).unwrap();
    let range = start..start + op.len as usize;
    match op.command {
        command::READ => return model[range].to_vec(),
        command::WRITE => model[range.clone()].copy_from_slice(&pattern(cookie, range.len())),
        command::TRIM | command::WRITE_ZEROES => model[range].fill(0),
        _ => {}
    }
    Vec::new()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Pipelined good and bad requests on a device that answers late, in any order and with few
    /// buffers: each gets exactly one reply with the right error, every read returns what a
    /// sequential model holds, and so does the disk at the end.
    #[test]
    fn every_request_gets_one_right_reply(
        ops in proptest::collection::vec(op(), 1..120),
        seed in any::<u64>(),
        budget in 2u64 << 20..4 << 20,
    ) {
        let ram = ram(1 << 20);
        let (stream, server) = served(&exports(late(&ram, budget, seed)));
        let mut client = Client::enter(stream, true);
        let mut model = vec![0; MIB];
        let mut wanted = BTreeMap::new();
        let mut said = Vec::new();
        for (cookie, op) in (0u64..).zip(&ops) {
            let raw = super::super::wire::RawRequest {
                flags: op.flags, command: op.command, cookie, offset: op.offset, len: op.len,
            };
            said.extend_from_slice(&raw.encode());
            if op.command == command::WRITE {
                said.extend_from_slice(&pattern(cookie, op.len as usize));
            }
            let error = expected(*op, 1 << 20);
            let data = if error == 0 { apply(*op, cookie, &mut model) } else { Vec::new() };
            wanted.insert(cookie, (error, data));
        }
        let mut sending = client.stream.try_clone().unwrap();
        let sender = std::thread::spawn(move || std::io::Write::write_all(&mut sending, &said));
        let of = |cookie: u64| ops[usize::try_from(cookie).unwrap()];
        while !wanted.is_empty() {
            let got = client.answer(|cookie| {
                let op = of(cookie);
                let len = if op.command == command::READ { op.len as usize } else { 0 };
                (op.offset, len)
            });
            let (error, data) = wanted.remove(&got.cookie).expect("one reply each");
            prop_assert_eq!(got.error, error, "{:?}", of(got.cookie));
            prop_assert!(got.data == data, "cookie {}", got.cookie);
        }
        sender.join().unwrap().unwrap();
        let mut disk = vec![0; MIB];
        ram.read_at(0, &mut disk);
        prop_assert!(disk == model);
        client.leave(server);
    }
}
