//! The same workload on the bare disk, through a loop device, through our device while it is
//! replicated, and through the ublk server of somebody else leaves the same content on each.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use farshore_blkfilter::sys::aligned::AlignedBuf;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::harness::{Site, run, said, wait_for};
use crate::image::Disk;
use crate::volume::{Volume, Way};
use crate::{Group, case_list, guest};

const MIB: u64 = 1 << 20;
const SIZE_MIB: u64 = 64;

pub const GROUP: Group = Group {
    name: "differential",
    disks: &[
        Disk::new("bare", SIZE_MIB),
        Disk::new("looped", SIZE_MIB),
        Disk::new("by-ublk", SIZE_MIB),
        Disk::new("by-nbd", SIZE_MIB),
    ],
    cases: case_list![our_devices_leave_what_the_bare_disk_and_a_loop_device_leave],
    ..Group::DEFAULT
};

/// Needs rublk, which `tools/rublk` builds.
pub const OTHER_SERVER_GROUP: Group = Group {
    name: "differential_other_server",
    soak: true,
    disks: &[Disk::new("by-rublk", SIZE_MIB), Disk::new("by-ublk", SIZE_MIB)],
    cases: case_list![our_ublk_server_leaves_what_rublk_leaves],
    ..Group::DEFAULT
};

/// Writers at the same time, each on a part of the disk of its own, so that the order between them
/// does not matter.
const WRITERS: u64 = 4;
const REQUESTS: u32 = 120;
/// Longest write; longer than a request of any of the devices.
const LONGEST: u64 = MIB;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}

/// One writer's requests: writes of 512 B to 1 MiB, ranges zeroed and trimmed so that they must
/// read as zero, flushes. The same for the same number.
fn write_part(device: &Path, part: u64) {
    let direct = nix::libc::O_DIRECT;
    let file = File::options().read(true).write(true).custom_flags(direct).open(device);
    let file = file.expect("the device opens");
    let (begin, len) = (part * SIZE_MIB * MIB / WRITERS, SIZE_MIB * MIB / WRITERS);
    let mut random = Random(0x9e37_79b9 + part);
    let mut buffer = AlignedBuf::zeroed(usize::try_from(LONGEST).expect("small"));
    for _ in 0..REQUESTS {
        // Small ones as often as large ones.
        let longest = (512 << random.below(12)).min(LONGEST);
        let bytes = (1 + random.below(longest / 512)) * 512;
        let at = begin + random.below((len - bytes) / 512 + 1) * 512;
        match random.below(20) {
            kind @ (0 | 1) => {
                let how = if kind == 0 {
                    FallocateFlags::FALLOC_FL_ZERO_RANGE
                } else {
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE
                };
                let how = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let signed = |n: u64| i64::try_from(n).expect("below 2^63");
                fallocate(&file, how, signed(at), signed(bytes)).expect("a range is zeroed");
            }
            2 => file.sync_data().expect("a flush"),
            _ => {
                let payload = &mut buffer[..usize::try_from(bytes).expect("small")];
                for word in payload.chunks_exact_mut(8) {
                    word.copy_from_slice(&random.below(u64::MAX).to_le_bytes());
                }
                file.write_all_at(payload, at).expect("a write");
            }
        }
    }
    file.sync_all().expect("a flush");
}

fn work_on(device: &Path) {
    let device = guest::block_device(device);
    std::thread::scope(|scope| {
        let writer = |part| {
            scope.spawn({
                let device = &device;
                move || write_part(device, part)
            })
        };
        let all: Vec<_> = (0..WRITERS).map(writer).collect();
        all.into_iter().for_each(|writer| writer.join().expect("a writer"));
    });
}

/// Of all bytes of a device.
fn digest(device: &Path) -> String {
    let out = run("sha256sum", &[text(&guest::block_device(device))]);
    let digest = said(&out).split_whitespace().next().unwrap_or_default().to_owned();
    assert_eq!(digest.len(), 64, "{}", said(&out));
    digest
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The workload through our device: what the device shows, what the disk holds, what the point
/// holds.
fn through_ours(way: Way, disk: &str) -> (String, String) {
    let site = Site::new();
    let _daemons = site.start_all();
    let volume = Volume::protect(&site, way, disk, "1s");
    volume.wait_protected();
    work_on(&volume.device);
    let shown = digest(&volume.device);
    volume.assert_point_equals_disk("worked-on");
    volume.unprotect();
    (shown, digest(&guest::disk(disk)))
}

fn our_devices_leave_what_the_bare_disk_and_a_loop_device_leave() {
    let bare = guest::disk("bare");
    let empty = digest(&bare);
    work_on(&bare);
    let wanted = digest(&bare);
    assert_ne!(wanted, empty, "the workload does something");

    guest::load("loop");
    let looped = guest::disk("looped");
    let out = run("losetup", &["--show", "--direct-io=on", "-f", text(&looped)]);
    let device = PathBuf::from(String::from_utf8_lossy(&out.stdout).trim());
    work_on(&device);
    assert_eq!(digest(&device), wanted, "the loop device shows something else than the bare disk");
    run("losetup", &["-d", text(&device)]);
    assert_eq!(digest(&looped), wanted, "the disk behind the loop device");

    for (way, disk) in [(Way::Ublk, "by-ublk"), (Way::Nbd, "by-nbd")] {
        let (shown, left) = through_ours(way, disk);
        assert_eq!(shown, wanted, "our device shows something else: {way:?}");
        assert_eq!(left, wanted, "the disk behind our device: {way:?}");
    }
}

fn our_ublk_server_leaves_what_rublk_leaves() {
    let rublk = Path::new(env!("CARGO_MANIFEST_DIR")).join(".build/rublk/bin/rublk");
    if !rublk.exists() {
        println!("skipped: there is no rublk: ./tools/rublk builds it, or says why it cannot");
        return;
    }
    guest::load("ublk_drv");
    let theirs = guest::disk("by-rublk");
    // It stays behind as a daemon, which must not hold our ends of pipes.
    let added = Command::new(&rublk)
        .args(["add", "loop", "-n", "7", "-q", "1", "-f", text(&theirs)])
        .args(["--logical-block-size", "512"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(added.expect("rublk can be run").success());
    let device = guest::wait_block_device(Path::new("/dev/ublkb7"));
    work_on(&device);
    let wanted = digest(&device);
    run(text(&rublk), &["del", "-n", "7"]);
    wait_for("their device to be gone", Duration::from_secs(30), || {
        (!device.exists()).then_some(())
    });
    assert_eq!(digest(&theirs), wanted, "the disk behind rublk");
    let (shown, left) = through_ours(Way::Ublk, "by-ublk");
    assert_eq!(shown, wanted, "our device shows something else than rublk's");
    assert_eq!(left, wanted, "the disk behind our device");
}
