//! What the product needs from the kernel is there, in the stable release and in the newest one.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use crate::image::Disk;
use crate::runner::NEWEST;
use crate::{Case, Group, case_list, guest};

const CASES: &[Case] =
    case_list![the_drivers_load_and_make_their_devices, udev_names_the_disks_of_the_machine];
const DISKS: &[Disk] = &[Disk::new("source", 64).blocks(4096, 4096)];

pub const GROUP: Group = Group { name: "kernel", disks: DISKS, cases: CASES, ..Group::DEFAULT };

pub const NEWEST_GROUP: Group = Group {
    name: "newest_kernel",
    kernel: NEWEST,
    soak: true,
    disks: DISKS,
    cases: CASES,
    ..Group::DEFAULT
};

fn the_drivers_load_and_make_their_devices() {
    guest::load("ublk_drv");
    let control = std::fs::metadata("/dev/ublk-control").expect("/dev/ublk-control");
    assert!(control.file_type().is_char_device());
    guest::load("nbd");
    guest::block_device(Path::new("/dev/nbd0"));
}

fn udev_names_the_disks_of_the_machine() {
    guest::start_udev();
    let named = std::fs::canonicalize("/dev/disk/by-id/virtio-source").expect("udev's name");
    let disk = guest::disk("source");
    assert_eq!(named, disk);
    let queue = Path::new("/sys/block").join(disk.file_name().expect("name")).join("queue");
    let size = std::fs::read_to_string(queue.join("logical_block_size")).expect("sysfs");
    assert_eq!(size.trim(), "4096", "the block size that the group asked for");
}
