//! A disk that gets larger while its volume is in use: the file system on it never stops, and points
//! keep the size of their time. A kernel that cannot show a new size refuses and changes nothing.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use farshore_protocol::admin::PointChoice;

use crate::harness::{Site, assert_same_bytes, run, said};
use crate::runner::NEWEST;
use crate::volume::{Volume, Way};
use crate::{Group, case_list, guest};

pub const GROUP: Group = Group {
    name: "grow",
    limit: Duration::from_secs(420),
    cases: case_list![
        a_file_system_in_use_grows_on_kernel_nbd,
        ublk_without_update_size_refuses_and_grows_at_the_next_start,
    ],
    ..Group::DEFAULT
};

pub const NEWEST_GROUP: Group = Group {
    name: "newest_grow",
    kernel: NEWEST,
    soak: true,
    cases: case_list![a_file_system_in_use_grows_on_ublk, a_file_system_in_use_grows_on_kernel_nbd,],
    ..GROUP
};

const BEFORE_MIB: u64 = 32;
const AFTER_MIB: u64 = 96;
const MOUNT: &str = "/mnt/growing";

/// A loop device: a disk that can get larger, as a logical volume or a virtual disk can.
struct Growing {
    image: PathBuf,
    device: PathBuf,
}

impl Growing {
    fn new(site: &Site) -> Self {
        guest::load("loop");
        let image = site.root().join("growing.img");
        File::create(&image).and_then(|f| f.set_len(BEFORE_MIB << 20)).expect("image");
        let out = run("losetup", &["--find", "--show", image.to_str().expect("UTF-8")]);
        let device = String::from_utf8(out.stdout).expect("UTF-8");
        Self { device: guest::block_device(Path::new(device.trim())), image }
    }

    /// What is found behind the old end is left from another use.
    fn enlarge(&self) {
        let mut file = OpenOptions::new().write(true).open(&self.image).expect("image");
        file.set_len(AFTER_MIB << 20).expect("room");
        file.seek(SeekFrom::Start((BEFORE_MIB << 20) + (1 << 20))).expect("seek");
        let random = File::open("/dev/urandom").expect("random bytes");
        std::io::copy(&mut std::io::Read::take(random, 4 << 20), &mut file).expect("write");
        run("losetup", &["--set-capacity", self.device.to_str().expect("UTF-8")]);
        assert_eq!(size_mib(&self.device), AFTER_MIB);
    }
}

impl Drop for Growing {
    fn drop(&mut self) {
        run("losetup", &["--detach", self.device.to_str().expect("UTF-8")]);
    }
}

fn size_mib(device: &Path) -> u64 {
    let device = fs::canonicalize(device).expect("device");
    let name = device.file_name().and_then(|n| n.to_str()).expect("name");
    let sectors = fs::read_to_string(format!("/sys/block/{name}/size")).expect("sysfs");
    sectors.trim().parse::<u64>().expect("a number") >> 11
}

/// Verified writes to a file, slow enough to last over the growth.
fn load() -> Child {
    let file = format!("--filename={MOUNT}/load");
    let how = ["--name=load", "--ioengine=libaio", "--direct=1", "--thread=1", "--minimal", &file];
    let what = ["--rw=randwrite", "--bs=4k", "--size=12m", "--iodepth=4", "--rate=300k"];
    let verify = ["--verify=crc32c", "--verify_state_save=0", "--verify_fatal=1", "--do_verify=1"];
    let mut fio = Command::new("fio");
    fio.args(how).args(what).args(verify).stdout(Stdio::piped()).stderr(Stdio::piped());
    fio.spawn().expect("fio")
}

fn a_file_system_in_use_grows_on_ublk() {
    grow_in_use(Way::Ublk);
}

fn a_file_system_in_use_grows_on_kernel_nbd() {
    grow_in_use(Way::Nbd);
}

fn grow_in_use(way: Way) {
    let site = Site::new();
    let disk = Growing::new(&site);
    let _daemons = site.start_all();
    let volume = Volume::protect_path(&site, way, "disk", &disk.device, "1s");
    run("mkfs.ext4", &["-q", volume.path()]);
    volume.wait_protected();
    let before = volume.assert_point_equals_disk("before");
    let kept = keep(&site, &disk);
    fs::create_dir_all(MOUNT).expect("a folder");
    run("mount", &[volume.path(), MOUNT]);
    let mut load = load();

    disk.enlarge();
    site.cli(&["volume", "grow", "disk"]);
    assert_eq!(size_mib(&volume.device), AFTER_MIB);
    run("resize2fs", &[volume.path()]);
    fs::write(format!("{MOUNT}/file"), vec![7; 40 << 20]).expect("there is room now");
    assert!(load.try_wait().expect("fio").is_none(), "the load ended before the growth");
    let out = load.wait_with_output().expect("fio");
    assert!(out.status.success(), "fio: {}\n{}", said(&out), site.logs());
    run("umount", &[MOUNT]);
    run("fsck.ext4", &["-fn", volume.path()]);

    site.tag_when_ordered("disk", "ordered");
    volume.assert_point_equals_disk("after");
    assert_is(&site, before.point, &kept);
    volume.unprotect();
}

/// The disk as it is now.
fn keep(site: &Site, disk: &Growing) -> PathBuf {
    let kept = site.root().join("kept.img");
    run("cp", &[&disk.device, &kept].map(|p| p.to_str().expect("UTF-8")));
    kept
}

/// The point has the size and the content of `kept`.
fn assert_is(site: &Site, point: farshore_extent::PointId, kept: &Path) {
    let view = site.open("disk", PointChoice::Id(point));
    assert_eq!(view.size.get(), BEFORE_MIB << 20);
    let copy = site.fetch_view(&view, "old.img");
    assert_same_bytes(kept, &copy, "the old point has changed");
    site.close(&view);
}

fn ublk_without_update_size_refuses_and_grows_at_the_next_start() {
    let site = Site::new();
    let disk = Growing::new(&site);
    let mut daemons = site.start_all();
    let volume = Volume::protect_path(&site, Way::Ublk, "disk", &disk.device, "1s");
    run("mkfs.ext4", &["-q", volume.path()]);
    volume.wait_protected();
    let before = volume.assert_point_equals_disk("before");
    let kept = keep(&site, &disk);
    let same = site.cli(&["volume", "grow", "disk"]);
    assert!(same.contains("already"), "{same}");

    disk.enlarge();
    for extra in ["--dry-run", "--json"] {
        let refused = site.try_cli(&["volume", "grow", "disk", extra]);
        assert_eq!(refused.status.code(), Some(4), "{}", said(&refused));
        assert!(said(&refused).contains("FS-4032"), "{}", said(&refused));
    }
    assert_eq!(size_mib(&volume.device), BEFORE_MIB);
    // It is in order still: the refusal has changed nothing.
    let refused = site.tag("disk", "refused");
    assert_is(&site, refused.point, &kept);

    // Nobody uses the device: a restart makes it anew.
    assert!(daemons.filterd.stop().success(), "{}", site.logs());
    daemons.filterd = site.start_filterd();
    guest::wait_block_device(&volume.device);
    assert_eq!(size_mib(&volume.device), AFTER_MIB);
    run("fsck.ext4", &["-fn", volume.path()]);
    run("resize2fs", &[volume.path()]);
    site.tag_when_ordered("disk", "ordered");
    volume.assert_point_equals_disk("after");
    assert_is(&site, before.point, &kept);
    volume.unprotect();
}
