//! Disks that answer late, or not at all for a while, at the worst moments of filterd's life.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use farshore_blkfilter::control::Client;

use crate::harness::{Site, run, said, wait_for};
use crate::image::Disk;
use crate::mapper::Mapped;
use crate::volume::{Volume, Way};
use crate::{Group, case_list, guest};

pub const GROUP: Group = Group {
    name: "slow_disk",
    disks: &[Disk::new("disk", 64), Disk::new("other", 64)],
    limit: Duration::from_secs(300),
    cases: case_list![
        what_a_killed_filterd_has_under_way_ends_before_the_next_one_serves,
        a_device_that_is_lost_with_a_write_under_way_comes_back_when_the_write_has_ended,
        a_start_that_hangs_is_given_up_and_filterd_stays_usable,
        // Last: before Linux 7.0 it leaves a device that only a reboot removes.
        filterd_killed_during_the_search_for_partitions_is_followed_by_one_that_serves,
    ],
    ..Group::DEFAULT
};

const LIMIT: Duration = Duration::from_secs(120);

fn protect(site: &Site, disk: &Path, way: &str) -> Child {
    let mut command = Command::new(crate::harness::farshore_bin());
    command.arg("--root").arg(site.root()).arg("protect").arg(disk);
    command.args(["--name", "disk", "--policy", "off", "--yes", "--attach", way]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("farshore")
}

fn filterd_killed_during_the_search_for_partitions_is_followed_by_one_that_serves() {
    let site = Site::new();
    let filterd = site.start_filterd();
    let slow = Mapped::new("disk");
    Way::Ublk.load_driver();
    let disk = slow.path();
    partition(&disk);
    slow.delay(5000, 0);
    // Before Linux 7.0 the driver never finishes the start: the kernel would tell of a hung task.
    fs::write("/proc/sys/kernel/hung_task_timeout_secs", "0").expect("sysctl");
    let asking = protect(&site, &disk, "ublk");
    wait_for("the device", LIMIT, || Path::new("/sys/class/block/ublkb0").exists().then_some(()));
    filterd.kill();
    asking.wait_with_output().expect("protect");
    slow.delay(0, 0);
    let _filterd = site.start_filterd();
    let first = guest::wait_block_device(Path::new("/dev/farshore/disk-part1"));
    println!("{} leads to {:?}", first.display(), fs::canonicalize(&first));
    run("mkfs.ext4", &["-q", first.to_str().expect("UTF-8")]);
    run("fsck.ext4", &["-f", "-n", first.to_str().expect("UTF-8")]);
    assert!(helpers() <= 2, "stuck commands pile up");
    site.cli(&["unprotect", "disk", "--yes"]);
}

/// Has the kernel look for more than one sector when it looks for partitions.
fn partition(disk: &Path) {
    let table = "printf 'label: gpt\\nsize=24MiB\\n' | sfdisk --quiet --no-tell-kernel \"$0\"";
    run("bash", &["-c", table, disk.to_str().expect("UTF-8")]);
}

/// A driver that hangs must not hang us with it: `protect` ends with what to do, everything else works,
/// and what comes of the start in the end is cleared away.
fn a_start_that_hangs_is_given_up_and_filterd_stays_usable() {
    let site = Site::new();
    let filterd = site.start_filterd();
    let slow = Mapped::new("disk");
    Way::Ublk.load_driver();
    let disk = slow.path();
    partition(&disk);
    slow.delay(2000, 0);
    fs::write("/proc/sys/kernel/hung_task_timeout_secs", "0").expect("sysctl");
    let asking = protect(&site, &disk, "ublk");
    let made = Path::new("/sys/class/block/ublkb0");
    wait_for("the device", LIMIT, || made.exists().then_some(()));
    slow.suspend();
    let mut client = Client::connect(&site.paths.filterd_socket()).expect("filterd");
    client.list().expect("it answers while the driver hangs");
    let out = asking.wait_with_output().expect("protect");
    assert!(!out.status.success(), "{}", said(&out));
    for word in ["FS-2048", "START_DEV", "reboot"] {
        assert!(said(&out).contains(word), "{word} is missing: {}", said(&out));
    }
    assert!(made.exists(), "the start has not ended: it must be given up, not waited for");
    let other = Volume::protect(&site, Way::Ublk, "other", "off");
    assert!(write(&other.device, "new").wait().expect("dd").success());
    other.unprotect();
    slow.resume();
    slow.delay(0, 0);
    wait_for("what came of the start to be removed", LIMIT, || (!made.exists()).then_some(()));
    wait_for("the disk to be free again", LIMIT, || {
        let out = protect(&site, &disk, "ublk").wait_with_output().expect("protect");
        assert!(out.status.success() || said(&out).contains("FS-2037"), "{}", said(&out));
        out.status.success().then_some(())
    });
    guest::wait_block_device(Path::new("/dev/farshore/disk"));
    site.cli(&["unprotect", "disk", "--yes"]);
    assert!(filterd.stop().success(), "{}", site.logs());
}

/// Its backing device still has the write of a device that is gone: until that has ended nobody
/// may serve the volume, and everybody else is served.
fn a_device_that_is_lost_with_a_write_under_way_comes_back_when_the_write_has_ended() {
    let site = Site::new();
    let _filterd = site.start_filterd();
    let slow = Mapped::new("disk");
    Way::Nbd.load_driver();
    let out = protect(&site, &slow.path(), "nbd").wait_with_output().expect("protect");
    assert!(out.status.success(), "{}", said(&out));
    let stable = Path::new("/dev/farshore/disk");
    let device = fs::canonicalize(guest::wait_block_device(stable)).expect("device");
    slow.suspend();
    let mut old = write(&device, "old");
    wait_under_way(device.file_name().and_then(|n| n.to_str()).expect("name"));
    run("nbd-client", &["-d", device.to_str().expect("UTF-8")]);
    wait_for("the write to fail", LIMIT, || old.try_wait().expect("dd"));
    assert!(!old.wait().expect("dd").success(), "nobody may say that it was written");
    let attached = || site.logs().matches("attaching a protected volume volume=disk").count();
    let mut client = Client::connect(&site.paths.filterd_socket()).expect("filterd");
    client.list().expect("it answers while the disk hangs");
    let other = Volume::protect(&site, Way::Nbd, "other", "off");
    assert!(write(&other.device, "new").wait().expect("dd").success());
    other.unprotect();
    assert_eq!(attached(), 1, "it is served anew with a write under way\n{}", site.logs());
    slow.resume();
    wait_for("the volume to be attached anew", LIMIT, || (attached() == 2).then_some(()));
    wait_for("it to be served", LIMIT, || {
        (client.list().expect("it answers").len() == 1).then_some(())
    });
    let device = guest::wait_block_device(stable);
    assert!(write(&device, "new").wait().expect("dd").success());
    assert_eq!(&start_of(&slow.path()), b"new");
    site.cli(&["unprotect", "disk", "--yes"]);
}

/// Waits until a block device has a request that it has not answered.
fn wait_under_way(kernel_name: &str) {
    let inflight = format!("/sys/block/{kernel_name}/inflight");
    wait_for("the write", LIMIT, || {
        let text = fs::read_to_string(&inflight).expect("sysfs");
        text.split_whitespace().any(|n| n != "0").then_some(())
    });
}

fn start_of(device: &Path) -> [u8; 3] {
    let mut found = [0; 3];
    fs::File::open(device).and_then(|mut disk| disk.read_exact(&mut found)).expect("read");
    found
}

/// Programs that wait for the driver.
fn helpers() -> usize {
    let out = Command::new("pgrep").args(["-c", "-f", "ublk-helper"]).output().expect("pgrep");
    said(&out).trim().parse().expect("a number")
}

/// A write of a killed filterd that the disk still holds could land on what was written since: its
/// claims must keep the next filterd away until it has ended.
fn what_a_killed_filterd_has_under_way_ends_before_the_next_one_serves() {
    let site = Site::new();
    let filterd = site.start_filterd();
    let slow = Mapped::new("disk");
    Way::Ublk.load_driver();
    let out = protect(&site, &slow.path(), "ublk").wait_with_output().expect("protect");
    assert!(out.status.success(), "{}", said(&out));
    let device = guest::wait_block_device(Path::new("/dev/farshore/disk"));
    slow.suspend();
    let mut old = write(&device, "old");
    wait_under_way("ublkb0");
    // It cannot end before its write has: nobody waits for it here.
    run("kill", &["-9", &filterd.pid().to_string()]);
    let mut next = site.start("filterd", &["filterd"]);
    wait_for("the next one to be held back", LIMIT, || {
        let waits = site.logs().contains("waiting for the claim");
        (waits || !next.is_alive()).then_some(())
    });
    assert_eq!(old.try_wait().expect("dd"), None, "it serves while a write is under way");
    slow.resume();
    drop(filterd);
    let _next = if next.is_alive() { next } else { site.start_filterd() };
    wait_for("the old write", LIMIT, || old.try_wait().expect("dd"));
    assert!(old.wait().expect("dd").success(), "{}", site.logs());
    assert!(write(&device, "new").wait().expect("dd").success());
    assert_eq!(&start_of(&device), b"new");
    site.cli(&["unprotect", "disk", "--yes"]);
}

/// Writes one block of `text` at the beginning, past the page cache.
fn write(device: &Path, text: &str) -> Child {
    let script = "printf '%4096s' | sed \"s/^.../$1/\" | dd of=\"$0\" bs=4096 iflag=fullblock \
                  oflag=direct conv=notrunc status=none";
    Command::new("bash").args(["-c", script]).arg(device).arg(text).spawn().expect("bash")
}
