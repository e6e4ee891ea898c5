//! The option phase.

use proptest::prelude::*;

use super::client::{Client, exports, info_data, meta_data, option_bytes, ram, served};
use crate::frontend::nbd::wire::{info, option, reply};
use crate::frontend::nbd::{Export, Exports};

fn two_exports() -> Exports {
    let both = exports(ram(1 << 20));
    let device = ram(2 << 20);
    both.add(Export { name: "other".into(), description: String::new(), device }).unwrap();
    both
}

#[test]
fn go_tells_what_the_export_is_and_only_what_is_true() {
    let (stream, server) = served(&exports(ram(1 << 20)));
    let mut client = Client::greet(stream);
    let wanted = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE];
    let (last, infos) = client.ask(option::GO, &info_data("", &wanted));
    assert_eq!(last, reply::ACK);
    let of = |kind: u16| {
        let found = infos.iter().find(|(_, data)| data[..2] == kind.to_be_bytes());
        found.map(|(_, data)| data[2..].to_vec()).unwrap()
    };
    assert_eq!(of(info::NAME), b"disk");
    assert_eq!(of(info::DESCRIPTION), b"for tests");
    assert_eq!(of(info::EXPORT)[..8], (1u64 << 20).to_be_bytes());
    let sizes: Vec<u8> = [512u32, 4096, 32 << 20].iter().flat_map(|n| n.to_be_bytes()).collect();
    assert_eq!(of(info::BLOCK_SIZE), sizes);
    client.leave(server);
}

#[test]
fn export_name_enters_without_zeroes_or_hangs_up() {
    let (stream, server) = served(&exports(ram(1 << 20)));
    let mut client = Client::greet(stream);
    client.say(&option_bytes(option::EXPORT_NAME, b"disk"));
    assert_eq!(client.take(10)[..8], (1u64 << 20).to_be_bytes());
    // No block sizes were told: any bytes can be read.
    assert_eq!(client.read(1, 1000), [0; 1000]);
    assert_eq!(client.read((1 << 20) - 1, 1), [0; 1]);
    client.leave(server);

    let (stream, server) = served(&exports(ram(1 << 20)));
    let mut client = Client::greet(stream);
    client.say(&option_bytes(option::EXPORT_NAME, b"nothing"));
    assert!(client.at_end());
    server.join().unwrap();
}

#[test]
fn the_empty_name_is_unknown_when_there_are_two_exports() {
    let (stream, server) = served(&two_exports());
    let mut client = Client::greet(stream);
    assert_eq!(client.ask(option::GO, &info_data("", &[])).0, reply::ERR_UNKNOWN);
    let (last, listed) = client.ask(option::LIST, &[]);
    assert_eq!((last, listed.len()), (reply::ACK, 2));
    assert_eq!(listed[0].1, b"\0\0\0\x04diskfor tests");
    assert_eq!(client.ask(option::GO, &info_data("other", &[])).0, reply::ACK);
    client.leave(server);
}

#[test]
fn a_context_needs_structured_replies_and_the_same_export() {
    let (stream, server) = served(&two_exports());
    let mut client = Client::greet(stream);
    let meta = meta_data("disk", &["base:allocation", "base:nothing", "qemu:x"]);
    assert_eq!(client.ask(option::SET_META_CONTEXT, &meta).0, reply::ERR_INVALID);
    assert_eq!(client.ask(option::STRUCTURED_REPLY, &[]).0, reply::ACK);
    let (last, selected) = client.ask(option::SET_META_CONTEXT, &meta);
    assert_eq!((last, selected.len()), (reply::ACK, 1));
    let listed = client.ask(option::LIST_META_CONTEXT, &meta_data("disk", &[]));
    assert_eq!((listed.0, listed.1.len()), (reply::ACK, 1));
    // Another export is entered: the selection is not for it.
    assert_eq!(client.ask(option::GO, &info_data("other", &[])).0, reply::ACK);
    client.structured = true;
    client.request(7, 0, 5, 0, 512);
    assert_eq!(client.outcome(), (5, 22));
    client.leave(server);
}

#[test]
fn refused_options_leave_the_stream_in_step() {
    let (stream, server) = served(&exports(ram(1 << 20)));
    let mut client = Client::greet(stream);
    let name = "n".repeat(5000);
    for (option, data, kind) in [
        (option::STARTTLS, vec![], reply::ERR_UNSUP),
        (11, vec![], reply::ERR_UNSUP),
        (4711, vec![1; 300], reply::ERR_UNSUP),
        (option::LIST, vec![0], reply::ERR_INVALID),
        (option::STRUCTURED_REPLY, vec![0], reply::ERR_INVALID),
        (option::GO, vec![], reply::ERR_INVALID),
        (option::GO, vec![0xff; 10], reply::ERR_INVALID),
        (option::INFO, info_data("nothing", &[]), reply::ERR_UNKNOWN),
        (option::INFO, info_data(&name, &[]), reply::ERR_TOO_BIG),
        (option::INFO, vec![0; 70_000], reply::ERR_TOO_BIG),
        (4711, vec![0; 1 << 20], reply::ERR_TOO_BIG),
    ] {
        assert_eq!(client.ask(option, &data).0, kind, "option {option}");
    }
    assert_eq!(client.ask(option::GO, &info_data("disk", &[])).0, reply::ACK);
    client.leave(server);
}

#[test]
fn abort_is_acknowledged_and_absurd_lengths_are_cut_off() {
    let (stream, server) = served(&exports(ram(1 << 20)));
    let mut client = Client::greet(stream);
    assert_eq!(client.ask(option::ABORT, &[]).0, reply::ACK);
    assert!(client.at_end());
    server.join().unwrap();

    let (stream, server) = served(&exports(ram(1 << 20)));
    let mut client = Client::greet(stream);
    let mut bytes = option_bytes(option::GO, &[]);
    bytes[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    client.say(&bytes);
    assert!(client.at_end());
    server.join().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the data of options is, each gets exactly one final reply that names it, and the
    /// negotiation can still be finished.
    #[test]
    fn any_option_gets_one_final_reply(
        asked in proptest::collection::vec(
            (prop_oneof![3u32..5, 6u32..12, any::<u32>()],
             proptest::collection::vec(any::<u8>(), 0..40)), 1..20)
    ) {
        let (stream, server) = served(&exports(ram(1 << 20)));
        let mut client = Client::greet(stream);
        for (option, data) in asked.iter().filter(|(option, _)| ![1, 2].contains(option)) {
            let entered = client.ask(*option, data).0 == reply::ACK && *option == option::GO;
            prop_assume!(!entered);
        }
        prop_assert_eq!(client.ask(option::GO, &info_data("disk", &[])).0, reply::ACK);
        client.leave(server);
    }
}
