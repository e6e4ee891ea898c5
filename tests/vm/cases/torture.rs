//! What users, disks and memory do to a source at their worst, on a real kernel. SPECIFICATION.md lists
//! all of it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::harness::{Site, run, said, wait_for};
use crate::image::Disk;
use crate::mapper::Mapped;
use crate::runner::{Lab, STABLE};
use crate::volume::{Volume, Way, fio, fio_arguments};
use crate::{Case, Group, Scenario, case_list, guest};

pub const GROUP: Group = Group {
    name: "torture",
    disks: &[Disk::new("disk", 64), Disk::new("other", 64), Disk::new("large", 256)],
    limit: Duration::from_secs(300),
    cases: case_list![
        a_buffer_that_changes_under_its_write_arrives_as_it_is_on_the_disk,
        a_range_that_fails_is_told_to_the_guest_and_sent_when_it_can_be_read,
        a_disk_that_hangs_holds_up_only_its_own_volume,
        discards_of_all_sizes_race_with_writes,
        writeback_through_the_device_ends_when_memory_is_short,
    ],
    ..Group::DEFAULT
};

pub const SCENARIO: Scenario = Scenario {
    name: "torture::what_a_disk_that_lies_about_flushes_has_lost_is_compared_and_sent",
    kernel: STABLE,
    soak: false,
    run: what_a_disk_that_lies_about_flushes_has_lost_is_compared_and_sent,
};

pub const STEPS: &[Case] = case_list![write_and_flush, compare_what_is_left];

const WAY: Way = Way::Ublk;
const LIMIT: Duration = Duration::from_secs(120);

/// Writes 64 KiB at a time from a buffer that another process changes all the while: by direct I/O, and by
/// the page cache through a mapping of the device.
const CHANGING_BUFFER: &str = "
import mmap, os, sys
buffer = mmap.mmap(-1, 65536)
fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
cached = os.open(sys.argv[1], os.O_RDWR)
mapped = mmap.mmap(cached, 1 << 20, offset=8 << 20)
child = os.fork()
if child == 0:
    parent = os.getppid()
    while os.getppid() == parent:
        byte = os.urandom(1)
        buffer[:] = byte * 65536
        mapped[:65536] = byte * 65536
for i in range(200):
    assert os.pwrite(fd, buffer, (i % 16) << 16) == 65536
    if i % 20 == 0: mapped.flush()
os.kill(child, 9)
os.waitpid(child, 0)
mapped.flush()
os.fsync(cached)
";

fn a_buffer_that_changes_under_its_write_arrives_as_it_is_on_the_disk() {
    let site = Site::new();
    let _daemons = site.start_all();
    let volume = Volume::protect(&site, WAY, "disk", "1s");
    volume.wait_protected();
    run("python3", &["-c", CHANGING_BUFFER, volume.path()]);
    volume.assert_point_equals_disk("changing");
    volume.unprotect();
}

/// A direct write of `kib` KiB of one letter, in the background.
fn write(device: &Path, letter: char, at_kib: u64, kib: u64) -> Child {
    let script = "head -c $3K /dev/zero | tr '\\0' $1 | dd of=$0 oflag=direct,seek_bytes seek=$2K \
                  bs=$3K iflag=fullblock conv=notrunc status=none";
    let mut bash = Command::new("bash");
    bash.args(["-c", script]).arg(device).arg(letter.to_string());
    bash.args([at_kib.to_string(), kib.to_string()]).stderr(Stdio::piped());
    bash.spawn().expect("bash")
}

/// Whether it was a good write; what went wrong otherwise.
fn ended(write: Child) -> Result<(), String> {
    let out = write.wait_with_output().expect("dd");
    if out.status.success() { Ok(()) } else { Err(said(&out)) }
}

fn a_range_that_fails_is_told_to_the_guest_and_sent_when_it_can_be_read() {
    let site = Site::new();
    let _daemons = site.start_all();
    let mapped = Mapped::new("disk");
    let volume = Volume::protect_path(&site, WAY, "disk", &mapped.path(), "1s");
    volume.wait_protected();
    ended(write(&volume.device, 'a', 8 << 10, 1024)).expect("write");
    // From the middle of what is written next, to its end.
    let bad = (8 << 11) + 1024..(9 << 11);
    mapped.suspend();
    mapped.fail(bad);
    mapped.resume();
    let told = ended(write(&volume.device, 'b', 8 << 10, 1024)).expect_err("was accepted");
    assert!(told.contains("Input/output error"), "{told}");
    ended(write(&volume.device, 'c', 32 << 10, 256)).expect("the rest of the disk works");
    let out = site.try_cli(&["point", "tag", "disk", "--name", "unknown"]);
    assert!(!out.status.success(), "a point of content that nobody knows: {}", said(&out));
    mapped.suspend();
    mapped.mend();
    mapped.resume();
    volume.assert_point_equals_disk("mended");
    ended(write(&volume.device, 'd', 8 << 10, 1024)).expect("write");
    volume.assert_point_equals_disk("again");
    volume.unprotect();
}

fn wait_under_way() {
    wait_for("the write to be under way", LIMIT, || {
        let text = fs::read_to_string("/sys/block/ublkb0/inflight").expect("sysfs");
        text.split_whitespace().any(|n| n != "0").then_some(())
    });
}

fn a_disk_that_hangs_holds_up_only_its_own_volume() {
    let site = Site::new();
    let _daemons = site.start_all();
    let mapped = Mapped::new("disk");
    let hanging = Volume::protect_path(&site, WAY, "disk", &mapped.path(), "1s");
    let other = Volume::protect(&site, WAY, "other", "1s");
    hanging.wait_protected();
    other.wait_protected();
    mapped.suspend();
    let mut late = write(&hanging.device, 'h', 0, 64);
    wait_under_way();
    let load = ["--rw=randwrite", "--bs=16k", "--size=8m", "--iodepth=8", "--randseed=2"];
    fio(&other.device, &load);
    site.tag("other", "meanwhile");
    for command in ["status", "doctor"] {
        let out = Command::new("timeout")
            .arg("60")
            .arg(crate::harness::farshore_bin())
            .arg("--root")
            .arg(site.root())
            .arg(command)
            .output()
            .expect("farshore");
        assert_ne!(out.status.code(), Some(124), "{command} waits for the disk: {}", said(&out));
    }
    assert!(late.try_wait().expect("dd").is_none(), "it was answered without the disk");
    // Back, and the write that waited succeeds; then the same with an error at the end.
    mapped.resume();
    ended(late).expect("the late write");
    hanging.assert_point_equals_disk("late");
    mapped.suspend();
    mapped.fail(0..128);
    let late = write(&hanging.device, 'e', 0, 64);
    wait_under_way();
    mapped.resume();
    let told = ended(late).expect_err("was accepted");
    assert!(told.contains("Input/output error"), "{told}");
    mapped.suspend();
    mapped.mend();
    mapped.resume();
    hanging.assert_point_equals_disk("failed");
    other.assert_point_equals_disk("other");
    leaves_no_old_bytes_in_the_page_cache(hanging, &mapped);
    other.unprotect();
}

/// A buffered read of the disk that overlaps a direct write may leave the old bytes in the page cache, and
/// whoever has the disk open keeps them there.
fn leaves_no_old_bytes_in_the_page_cache(volume: Volume<'_>, mapped: &Mapped) {
    let reader = fs::File::open(mapped.path()).expect("open");
    mapped.suspend();
    let late = write(&volume.device, 'z', 0, 64);
    wait_under_way();
    let mut read = Command::new("dd");
    let read = read.args(["of=/dev/null", "bs=64k", "count=1"]).stderr(Stdio::null());
    let read = read.arg(format!("if={}", mapped.path().display())).spawn();
    mapped.resume();
    ended(late).expect("the late write");
    assert!(read.expect("dd").wait().expect("dd").success());
    volume.unprotect();
    let mut first = [0; 4096];
    reader.read_exact_at(&mut first, 0).expect("read");
    assert_eq!(first, [b'z'; 4096], "a file system mounted from it would see the past");
}

fn discards_of_all_sizes_race_with_writes() {
    let site = Site::new();
    let _daemons = site.start_all();
    let volume = Volume::protect(&site, WAY, "large", "1s");
    volume.wait_protected();
    let writes = ["--rw=randwrite", "--bsrange=4k-64k", "--blockalign=512", "--iodepth=8"];
    let many = ["--size=64m", "--io_size=48m", "--norandommap", "--verify=0", "--randseed=4"];
    let arguments = fio_arguments(&volume.device, &[&writes[..], &many].concat());
    let mut load = Command::new("fio").args(arguments).stdout(Stdio::null()).spawn().expect("fio");
    // Unaligned at both ends, and up to the whole device.
    for (offset, length) in [
        (4096, 4096),
        (1 << 20, 512),
        (3 * 512, (5 << 20) + 512),
        ((16 << 20) + 512, (48 << 20) - 1024),
        (60 << 20, 180 << 20),
        (0, 256 << 20),
    ] {
        for how in [&[][..], &["--zeroout"]] {
            let (offset, length) = (offset.to_string(), length.to_string());
            let range = ["--offset", &offset, "--length", &length, volume.path()];
            run("blkdiscard", &[how, &range].concat());
        }
    }
    assert!(load.wait().expect("fio").success(), "{}", site.logs());
    volume.assert_point_equals_disk("discarded");
    volume.unprotect();
}

/// Dirty pages of the device can only be written by filterd: it must get by without new memory while
/// everybody waits for that.
fn writeback_through_the_device_ends_when_memory_is_short() {
    const FILE: &str = "/mnt/large/file";
    let site = Site::new();
    let daemons = site.start_all();
    let volume = Volume::protect(&site, WAY, "large", "1s");
    volume.wait_protected();
    run("mkfs.ext4", &["-q", volume.path()]);
    fs::create_dir_all("/mnt/large").expect("folder");
    run("mount", &[volume.path(), "/mnt/large"]);
    // What is left of the memory: about 100 MiB, of which a group with 32 MiB writes 128.
    let free: u64 = fs::read_to_string("/proc/meminfo")
        .expect("meminfo")
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse().ok())
        .expect("MemAvailable");
    let taken = (free >> 10).saturating_sub(100).to_string();
    run("mkdir", &["-p", "/vm/ballast", "/vm/group"]);
    run("mount", &["-t", "tmpfs", "-o", "size=100%", "ballast", "/vm/ballast"]);
    let ballast = "head -c $0M /dev/zero > /vm/ballast/file";
    run("bash", &["-c", ballast, &taken]);
    run("mount", &["-t", "cgroup2", "group", "/vm/group"]);
    fs::write("/vm/group/cgroup.subtree_control", "+memory").expect("cgroup");
    fs::create_dir_all("/vm/group/small").expect("cgroup");
    fs::write("/vm/group/small/memory.max", "32M").expect("cgroup");
    let script = "echo $$ > /vm/group/small/cgroup.procs && \
                  for i in 1 2 3 4; do head -c 32M /dev/urandom >> $0 || exit 1; done && sync";
    run("bash", &["-c", script, FILE]);
    run("umount", &["/vm/group"]);
    run("umount", &["/vm/ballast"]);
    let filterd = fs::read_to_string(format!("/proc/{}/status", daemons.filterd.pid()));
    assert!(filterd.expect("filterd lives").contains("VmLck"), "{}", site.logs());
    assert_eq!(fs::metadata(FILE).expect("file").len(), 128 << 20);
    run("umount", &["/mnt/large"]);
    volume.assert_point_equals_disk("written-back");
    volume.unprotect();
}

fn what_a_disk_that_lies_about_flushes_has_lost_is_compared_and_sent(
    lab: &Lab,
) -> Result<(), String> {
    const DISKS: [Disk; 1] = [Disk::new("disk", 64).lying()];
    let mut machine = lab.boot("machine", &DISKS)?;
    let step = machine.start_case("torture::write_and_flush", LIMIT);
    machine.wait_signal("cut", &step)?;
    machine.cut();
    let mut machine = lab.boot("machine", &DISKS)?;
    machine.run_case("torture::compare_what_is_left", LIMIT).map(drop)
}

const SITE: &str = "/vm/scratch/site";

fn write_and_flush() {
    let site = Site::at(Path::new(SITE));
    let daemons = site.start_all();
    let volume = Volume::protect(&site, WAY, "disk", "1h");
    ended(write(&volume.device, 'w', 20 << 10, 4096)).expect("write");
    run("blockdev", &["--flushbufs", volume.path()]);
    let file = fs::File::options().write(true).open(&volume.device).expect("open");
    file.sync_all().expect("the disk says that it has everything");
    volume.assert_point_equals_disk("before");
    // The state of our own daemons lies on an honest disk.
    run("sync", &[]);
    std::mem::forget(daemons);
    guest::wait_for_the_cut();
}

fn compare_what_is_left() {
    let lost = fs::read(guest::disk("disk")).expect("disk");
    assert!(lost.iter().all(|b| *b == 0), "the disk did not lie: this proves nothing");
    let site = Site::at(Path::new(SITE));
    WAY.load_driver();
    let _daemons = site.start_again();
    let volume = Volume::again(&site, WAY, "disk");
    volume.assert_point_equals_disk("equal");
    let told = site.cli(&["verify", "disk", "--rate", "0", "--wait"]);
    assert!(told.contains("64 MiB compared"), "{told}");
    volume.unprotect();
}
