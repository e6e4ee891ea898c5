//! Every kind of request through the device of a protected volume while it is replicated: what was
//! written reads back, and the point cut afterwards equals the disk byte for byte.

use std::os::unix::fs::{FileExt, OpenOptionsExt};

use crate::harness::{Site, run};
use crate::image::Disk;
use crate::volume::{Volume, Way, fio, queue_limit};
use crate::{Group, case_list, guest};

pub const GROUP: Group = Group {
    name: "verify",
    disks: &[
        Disk::new("plain", 64),
        Disk::new("thick", 64).without_discard(),
        Disk::new("large-blocks", 64).blocks(4096, 4096),
        Disk::new("emulated", 64).blocks(512, 4096),
    ],
    cases: case_list![
        random_writes_of_mixed_sizes_by_several_jobs,
        trimmed_and_zeroed_ranges_read_as_zero,
        a_disk_without_discard_is_zeroed_by_writing,
        a_disk_of_4k_blocks_keeps_its_block_size,
        a_disk_that_emulates_512_byte_blocks_takes_them,
    ],
    ..Group::DEFAULT
};

const WAY: Way = Way::Ublk;

fn random_writes_of_mixed_sizes_by_several_jobs() {
    let site = Site::new();
    let _daemons = site.start_all();
    let volume = Volume::protect(&site, WAY, "plain", "1s");
    volume.wait_protected();
    let halves = ["--numjobs=2", "--offset_increment=32m", "--size=32m", "--randseed=7"];
    let mixed = ["--rw=randwrite", "--bsrange=512-1m", "--blockalign=512", "--iodepth=16"];
    fio(&volume.device, &[&mixed[..], &halves].concat());
    fio(&volume.device, &["--rw=randwrite", "--bs=512", "--size=1m", "--iodepth=32"]);
    fio(&volume.device, &["--rw=write", "--bs=1m", "--offset=8m", "--size=8m", "--iodepth=1"]);
    volume.assert_point_equals_disk("after-fio");
    refuses_less_than_a_block(&volume, 100);
    volume.unprotect();
}

/// A direct write that is no multiple of the block is refused and changes nothing.
fn refuses_less_than_a_block(volume: &Volume<'_>, length: usize) {
    let direct = nix::libc::O_DIRECT;
    let mut options = std::fs::File::options();
    let file = options.read(true).write(true).custom_flags(direct).open(&volume.device);
    let refused = file.expect("open").write_at(&vec![1; length], 0).expect_err("was accepted");
    assert_eq!(refused.raw_os_error(), Some(nix::libc::EINVAL), "{refused}");
}

fn range_is(file: &std::fs::File, from_mib: u64, mib: usize, byte: u8) {
    let mut found = vec![!byte; mib << 20];
    file.read_exact_at(&mut found, from_mib << 20).expect("read");
    assert!(found.iter().all(|b| *b == byte), "{from_mib} MiB: not all is {byte:#x}");
}

fn fill(volume: &Volume<'_>, mib: usize) -> std::fs::File {
    let file = std::fs::File::options().read(true).write(true).open(&volume.device).expect("open");
    file.write_all_at(&vec![0x78; mib << 20], 0).expect("write");
    file.sync_all().expect("fsync");
    file
}

fn trimmed_and_zeroed_ranges_read_as_zero() {
    let site = Site::new();
    let _daemons = site.start_all();
    let volume = Volume::protect(&site, WAY, "plain", "1s");
    volume.wait_protected();
    let file = fill(&volume, 16);
    let device = volume.path();
    run("blkdiscard", &["--offset", "0", "--length", "4MiB", device]);
    run("blkdiscard", &["--zeroout", "--offset", "8MiB", "--length", "4MiB", device]);
    run("fallocate", &["--zero-range", "--offset", "13MiB", "--length", "1MiB", device]);
    range_is(&file, 0, 4, 0);
    range_is(&file, 4, 4, 0x78);
    range_is(&file, 8, 4, 0);
    range_is(&file, 12, 1, 0x78);
    range_is(&file, 13, 1, 0);
    range_is(&file, 14, 2, 0x78);
    drop(file);
    volume.assert_point_equals_disk("zeroed");
    volume.unprotect();
}

fn a_disk_without_discard_is_zeroed_by_writing() {
    let site = Site::new();
    let _daemons = site.start_all();
    let volume = Volume::protect(&site, WAY, "thick", "1s");
    volume.wait_protected();
    let file = fill(&volume, 4);
    run("blkdiscard", &["--zeroout", "--offset", "1MiB", "--length", "2MiB", volume.path()]);
    range_is(&file, 0, 1, 0x78);
    range_is(&file, 1, 2, 0);
    range_is(&file, 3, 1, 0x78);
    drop(file);
    volume.assert_point_equals_disk("zeroed");
    volume.unprotect();
}

fn a_disk_of_4k_blocks_keeps_its_block_size() {
    let site = Site::new();
    let _daemons = site.start_all();
    let volume = Volume::protect(&site, WAY, "large-blocks", "1s");
    volume.wait_protected();
    assert_eq!(queue_limit(&volume.device, "logical_block_size"), "4096");
    assert_eq!(queue_limit(&volume.device, "physical_block_size"), "4096");
    let mixed = ["--rw=randwrite", "--bsrange=4k-256k", "--blockalign=4k", "--iodepth=8"];
    fio(&volume.device, &[&mixed[..], &["--size=32m"]].concat());
    refuses_less_than_a_block(&volume, 512);
    volume.assert_point_equals_disk("after-fio");
    volume.unprotect();
}

fn a_disk_that_emulates_512_byte_blocks_takes_them() {
    let site = Site::new();
    let _daemons = site.start_all();
    let volume = Volume::protect(&site, WAY, "emulated", "1s");
    volume.wait_protected();
    assert_eq!(queue_limit(&volume.device, "logical_block_size"), "512");
    assert_eq!(queue_limit(&guest::disk("emulated"), "physical_block_size"), "4096");
    let mixed = ["--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--iodepth=8"];
    fio(&volume.device, &[&mixed[..], &["--size=16m"]].concat());
    volume.assert_point_equals_disk("after-fio");
    volume.unprotect();
}
