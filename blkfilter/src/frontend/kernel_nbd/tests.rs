//! The bytes of the messages, what is read from `/sys`, and a connection as the kernel uses it.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use farshore_extent::{BlockSizes, VolumeSize};

use super::message::{self, Connect, Family, Timeouts};
use super::sysfs::{Sysfs, backend_of};
use super::{Config, KernelNbdError, Server, available, existing};
use crate::device::{Device, DeviceInfo};
use crate::frontend::memory::MemoryDevice;
use crate::frontend::nbd::wire::{RawRequest, command, command_flag};
use crate::frontend::nbd::{Direct, export_flags};

const NBD: Family = Family { id: 0x1234, max_attribute: 10 };

/// The bytes of a little-endian machine, as pairs of hexadecimal digits.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    let pair = |p: &[u8]| u8::from_str_radix(std::str::from_utf8(p).unwrap(), 16).unwrap();
    digits.chunks(2).map(pair).collect()
}

#[cfg(target_endian = "little")]
#[test]
fn messages_are_the_bytes_the_headers_of_linux_describe() {
    let header = |len: &str, kind: &str| format!("{len}000000 {kind} 0500 01000000 00000000");
    let expected = header("1c", "1000") + "03010000 0800 0200 6e626400"; // "nbd" and a zero
    assert_eq!(message::get_family(), hex(&expected));

    let device = Connect {
        number: Some(7),
        size: 0x1_0000_0000,
        block_size: 4096,
        flags: 0x016d,
        identifier: "vol1x",
        timeouts: Timeouts {
            request: Duration::from_secs(30),
            dead_connection: Duration::from_secs(86400),
        },
    };
    let expected = header("80", "3412")
        + "01010000"
        + "0800 0100 07000000"
        + "0c00 0200 0000000001000000"
        + "0c00 0300 0010000000000000"
        + "0c00 0500 6d01000000000000"
        + "0c00 0400 1e00000000000000"
        + "0c00 0800 8051010000000000"
        + "0900 0a00 766f6c3178 000000"
        + "1c00 0780" // the sockets, nested
        + "0c00 0180 0800 0100 05000000"
        + "0c00 0180 0800 0100 09000000";
    assert_eq!(message::connect(NBD, &device, &[5, 9]), hex(&expected));

    let expected = header("34", "3412")
        + "03010000 0800 0100 07000000 0800 0a00 766f6c31"
        + "1000 0780 0c00 0180 0800 0100 05000000";
    assert_eq!(message::replace_socket(NBD, 7, "vol1", 5), hex(&expected));

    let expected = header("30", "3412")
        + "03010000 0800 0100 07000000 0800 0a00 766f6c31 0c00 0200 0000000001000000";
    assert_eq!(message::set_size(NBD, 7, "vol1", 1 << 32), hex(&expected));

    let expected = header("1c", "3412") + "02010000 0800 0100 07000000";
    assert_eq!(message::disconnect(NBD, 7), hex(&expected));
}

#[cfg(target_endian = "little")]
#[test]
fn answers_are_read_and_refusals_are_errors() {
    let family = hex("34000000 1000 0000 01000000 99000000 01020000
         0800 0200 6e626400 0600 0100 3412 0000 0800 0500 0a000000 08000300 01000000");
    let good =
        hex("24000000 0200 0001 01000000 99000000 00000000 1c000000 1000 0500 01000000 00000000");
    assert!(!message::is_last(&family) && message::is_last(&good));
    let answers = [family, good.clone()];
    message::verdict(&answers).unwrap();
    assert_eq!(message::family(&answers), Some(Family { id: 0x1234, max_attribute: 10 }));

    let index = hex("1c000000 3412 0000 01000000 99000000 01010000 0800 0100 0c000000");
    assert_eq!(message::index(&[index, good]), Some(12));

    let busy =
        hex("24000000 0200 0000 01000000 99000000 f0ffffff 1c000000 3412 0500 01000000 00000000");
    let error = message::verdict(&[busy]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::libc::EBUSY));
}

#[test]
fn malformed_answers_are_no_answers_and_end_the_wait() {
    for bytes in ["", "00", "00000000 0000 0000", "ffffffff 0200 0000 01000000 00000000 00"] {
        let bytes = hex(bytes);
        assert!(message::is_last(&bytes), "{bytes:?}");
        assert!(message::verdict(std::slice::from_ref(&bytes)).is_err());
        assert_eq!(message::family(std::slice::from_ref(&bytes)), None);
        assert_eq!(message::index(&[bytes]), None);
    }
}

/// What `/sys` shows of an attached device.
fn sys(number: u32, files: &[(&str, &str)]) -> (tempfile::TempDir, Sysfs) {
    let root = tempfile::tempdir().unwrap();
    let device = root.path().join(format!("block/nbd{number}"));
    fs::create_dir_all(device.join("queue")).unwrap();
    fs::create_dir_all(device.join("mq/0")).unwrap();
    fs::create_dir_all(device.join("mq/1")).unwrap();
    fs::create_dir_all(root.path().join("block/nbd0")).unwrap();
    for (name, text) in files {
        fs::write(device.join(name), format!("{text}\n")).unwrap();
    }
    let sysfs = Sysfs::at(root.path());
    (root, sysfs)
}

#[test]
fn only_an_attached_device_with_our_identifier_is_ours() {
    let (_root, ours) = sys(3, &[("pid", "17"), ("backend", &backend_of("vol1"))]);
    assert_eq!(ours.identifier(3).as_deref(), Some("vol1"));
    assert_eq!((ours.find("vol1"), ours.find("vol"), ours.find("vol10")), (Some(3), None, None));
    assert_eq!(ours.connections(3), 2);
    assert!(!ours.is_configured(0) && ours.identifier(0).is_none());

    let (_root, free) = sys(3, &[("backend", &backend_of("vol1"))]);
    assert_eq!((free.identifier(3), free.find("vol1")), (None, None), "it is not attached");
    let (_root, stranger) = sys(3, &[("pid", "17"), ("backend", "vol1")]);
    assert_eq!((stranger.identifier(3), stranger.find("vol1")), (None, None));
    assert_eq!(stranger.owner(3), "\"vol1\"");
    let (_root, nameless) = sys(3, &[("pid", "17"), ("backend", "")]);
    assert_eq!((nameless.identifier(3), nameless.owner(3)), (None, "process 17".to_owned()));
}

#[test]
fn a_device_left_behind_goes_on_unless_the_kernel_believes_what_is_true_no_more() {
    let files = [
        ("pid", "17"),
        ("ro", "0"),
        ("queue/logical_block_size", "512"),
        ("queue/write_zeroes_max_bytes", "4294966784"),
        ("queue/write_cache", "write through"),
    ];
    let (_root, sysfs) = sys(3, &files);
    let info = MemoryDevice::new(VolumeSize::new(1 << 20).unwrap()).info();
    assert_eq!(sysfs.contradiction(3, &info), None);
    assert!(!sysfs.has_cache(3));
    for changed in [
        DeviceInfo { blocks: BlockSizes::new(4096, 4096).unwrap(), ..info },
        DeviceInfo { read_only: true, ..info },
        DeviceInfo { zeroes: false, ..info },
    ] {
        assert!(sysfs.contradiction(3, &changed).is_some(), "{changed:?}");
    }
    let harmless = DeviceInfo { volatile_cache: false, ..info };
    assert_eq!(sysfs.contradiction(3, &harmless), None);
}

/// A request as the kernel sends it, and the error number of its simple reply.
fn ask(stream: &mut UnixStream, raw: RawRequest, payload: &[u8]) -> u32 {
    stream.write_all(&raw.encode()).unwrap();
    stream.write_all(payload).unwrap();
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..4], 0x6744_6698_u32.to_be_bytes(), "not a simple reply");
    assert_eq!(reply[8..], raw.cookie.to_be_bytes());
    u32::from_be_bytes(reply[4..8].try_into().unwrap())
}

fn raw(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> RawRequest {
    RawRequest { flags, command, cookie, offset, len }
}

/// A connection served on a thread, and the kernel's end of it.
fn served(
    device: &Arc<MemoryDevice>,
    durable: bool,
) -> (UnixStream, Arc<Direct>, thread::JoinHandle<bool>) {
    let (ours, kernel) = UnixStream::pair().unwrap();
    kernel.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let direct = Arc::new(Direct::new(ours.into()));
    let (serving, device) = (direct.clone(), device.clone());
    (kernel, direct, thread::spawn(move || serving.serve(device, durable).unwrap()))
}

#[test]
fn a_connection_begins_in_transmission_and_ends_with_the_kernels_goodbye() {
    let device = Arc::new(MemoryDevice::new(VolumeSize::new(1 << 20).unwrap()));
    let (mut kernel, _, thread) = served(&device, false);
    assert_eq!(ask(&mut kernel, raw(command::WRITE, 0, 1, 4096, 512), &[7; 512]), 0);
    assert_eq!(ask(&mut kernel, raw(command::READ, 0, 2, 4096, 512), &[]), 0);
    let mut read = [0; 512];
    kernel.read_exact(&mut read).unwrap();
    assert_eq!(read, [7; 512]);
    assert_eq!(ask(&mut kernel, raw(command::FLUSH, 0, 3, 0, 0), &[]), 0);
    assert_eq!(ask(&mut kernel, raw(command::TRIM, 0, 4, 4096, 512), &[]), 0);
    let no_hole = command_flag::NO_HOLE;
    assert_eq!(ask(&mut kernel, raw(command::WRITE_ZEROES, no_hole, 5, 0, 512), &[]), 0);
    assert_eq!(device.counts().fua, 0);
    kernel.write_all(&raw(command::DISC, 0, 6, 0, 0).encode()).unwrap();
    assert!(thread.join().unwrap(), "a goodbye is told from a lost connection");
}

#[test]
fn a_lost_connection_is_no_goodbye_and_an_ended_one_answers_what_has_arrived() {
    let device = Arc::new(MemoryDevice::new(VolumeSize::new(1 << 20).unwrap()));
    let (kernel, _, thread) = served(&device, false);
    drop(kernel);
    assert!(!thread.join().unwrap());

    let (mut kernel, direct, thread) = served(&device, false);
    for cookie in 0..8 {
        kernel.write_all(&raw(command::WRITE, 0, cookie, 0, 512).encode()).unwrap();
        kernel.write_all(&[1; 512]).unwrap();
    }
    direct.end_input();
    let mut replies = Vec::new();
    kernel.read_to_end(&mut replies).unwrap();
    assert_eq!(replies.len(), 8 * 16, "each request that had arrived is answered");
    assert!(!thread.join().unwrap());
}

#[test]
fn what_the_kernel_was_told_of_the_cache_holds_although_the_device_changed() {
    let size = VolumeSize::new(1 << 20).unwrap();
    let cached = Arc::new(MemoryDevice::new(size));
    let (mut kernel, ..) = served(&cached, true);
    assert_eq!(ask(&mut kernel, raw(command::WRITE, 0, 1, 0, 512), &[7; 512]), 0);
    assert_eq!(ask(&mut kernel, raw(command::TRIM, 0, 2, 0, 512), &[]), 0);
    assert_eq!(cached.counts().fua, 2, "it will send no FLUSH, so all is durable at once");

    let info = DeviceInfo { volatile_cache: false, ..cached.info() };
    let cacheless = Arc::new(MemoryDevice::with_info(info));
    let (mut kernel, ..) = served(&cacheless, false);
    assert_eq!(ask(&mut kernel, raw(command::FLUSH, 0, 1, 0, 0), &[]), 0);
    let fua = command_flag::FUA;
    assert_eq!(ask(&mut kernel, raw(command::WRITE, fua, 2, 0, 512), &[7; 512]), 0);
}

#[test]
fn the_kernel_is_told_exactly_what_the_device_is() {
    let info = MemoryDevice::new(VolumeSize::new(1 << 20).unwrap()).info();
    // HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, CAN_MULTI_CONN of linux/nbd.h.
    assert_eq!(export_flags(&info, false), 1 | 4 | 8 | 32 | 64 | 256);
    let bare = DeviceInfo { zeroes: false, volatile_cache: false, read_only: true, ..info };
    assert_eq!(export_flags(&bare, false), 1 | 2 | 256);
}

#[test]
fn without_the_kernels_client_everything_says_what_to_do() {
    let Err(missing) = available() else {
        return println!("skipped: this kernel has the NBD client; tests/vm attaches by it");
    };
    assert!(!missing.why.is_empty() && !missing.remedy.is_empty());
    let device = Arc::new(MemoryDevice::new(VolumeSize::new(1 << 20).unwrap()));
    let error = Server::start(device, Config::new("vol1")).unwrap_err();
    assert!(matches!(error, KernelNbdError::Unavailable(_)), "{error}");
    assert_eq!(existing(1_000_000), None);
}
