//! The ublk front end alone, over a bare disk: what is written comes back through every kind of
//! request, also when its server is killed or replaced under load, and what is removed is gone.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use farshore_blkfilter::backing::{Backing, Mode};
use farshore_blkfilter::device::{Device, DeviceError, DeviceInfo, Queue};
use farshore_blkfilter::frontend::ublk::{
    Config, Server, State, UblkError, existing, features, remove_stale,
};
use farshore_extent::VolumeSize;

use crate::harness::{pause, run, wait_for};
use crate::image::Disk;
use crate::runner::NEWEST;
use crate::volume::{fio, fio_arguments, queue_limit};
use crate::{Case, Group, case_list, guest};

const DISKS: &[Disk] = &[Disk::new("source", 64), Disk::new("large", 64).blocks(4096, 4096)];
const CASES: &[Case] = case_list![
    every_limit_is_the_one_of_the_disk,
    mixed_requests_come_back_and_reach_the_disk,
    a_disk_of_large_blocks_keeps_them,
    payloads_copied_by_the_driver_come_back_too,
    a_killed_server_is_replaced_and_the_load_sees_nothing,
    a_server_killed_with_every_tag_busy_is_replaced_soon,
    a_server_that_leaves_hands_its_requests_to_the_next,
    a_device_without_server_is_removed_but_never_that_of_another,
    a_removed_device_is_gone_and_its_number_free,
    a_device_that_does_not_fit_is_not_taken_over,
];

pub const GROUP: Group = Group { name: "ublk_front", disks: DISKS, cases: CASES, ..Group::DEFAULT };

pub const NEWEST_GROUP: Group = Group {
    name: "newest_ublk_front",
    kernel: NEWEST,
    soak: true,
    disks: DISKS,
    cases: NEWEST_CASES,
    ..Group::DEFAULT
};

/// What only newer kernels can, and the most important of the others.
const NEWEST_CASES: &[Case] = case_list![
    mixed_requests_come_back_and_reach_the_disk,
    payloads_copied_by_the_driver_come_back_too,
    a_killed_server_is_replaced_and_the_load_sees_nothing,
    a_server_killed_with_every_tag_busy_is_replaced_soon,
    a_server_that_leaves_hands_its_requests_to_the_next,
    a_device_without_server_is_removed_but_never_that_of_another,
    a_removed_device_is_gone_and_its_number_free,
    a_device_in_use_grows,
    a_device_in_use_is_not_removed,
];

pub const STEPS: &[Case] = case_list![serve];

const NUMBER: u32 = 5;
const OWNER: u64 = 0x7a11;
const LIMIT: Duration = Duration::from_secs(120);
const GRACE: Duration = Duration::from_secs(30);
pub const DEVICE: &str = "/dev/ublkb5";
/// For the server's process: how it shall serve.
const ARGUMENTS: &str = "FARSHORE_UBLK_FRONT";

/// A device of which only the beginning is shown, to grow later.
struct Shown {
    device: Arc<dyn Device>,
    bytes: AtomicU64,
}

impl Device for Shown {
    fn info(&self) -> DeviceInfo {
        let info = self.device.info();
        let size = VolumeSize::new(self.bytes.load(Ordering::Relaxed).min(info.size.get()));
        DeviceInfo { size: size.expect("a size"), ..info }
    }

    fn open_queue(self: Arc<Self>) -> Result<Box<dyn Queue>, DeviceError> {
        Arc::clone(&self.device).open_queue()
    }
}

fn shown(disk: &str, bytes: u64) -> Arc<Shown> {
    let backing = Backing::open(&guest::disk(disk), Mode::ReadWrite).expect("the disk is free");
    Arc::new(Shown { device: Arc::new(super::plain::Plain(backing)), bytes: bytes.into() })
}

fn config() -> Config {
    Config { number: Some(NUMBER), owner: OWNER, ..Config::default() }
}

/// Another process that serves a disk, so that it can be killed.
pub struct Serving {
    child: Child,
    first_line: String,
}

/// Words of `how`: the disk, and `depth=N`, `copy`. Never more than one queue: the driver makes no
/// more than the machine has CPUs.
pub fn start(how: &str) -> Serving {
    guest::load("ublk_drv");
    let program = std::env::current_exe().expect("this program");
    let mut child = Command::new(program)
        .args(["--in-guest", "ublk_front::serve"])
        .env(ARGUMENTS, how)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a server");
    let mut first_line = String::new();
    let mut said = BufReader::new(child.stdout.take().expect("a pipe"));
    said.read_line(&mut first_line).expect("its first line");
    assert!(first_line.starts_with("serving"), "the server said {first_line:?}");
    guest::block_device(Path::new(DEVICE));
    Serving { child, first_line }
}

impl Serving {
    fn kill(mut self) {
        self.child.kill().expect("kill -9");
        self.child.wait().expect("reaped");
    }

    fn took_over(&self) -> bool {
        self.first_line.contains("recovered=true")
    }

    pub fn end(mut self, how: &str) {
        writeln!(self.child.stdin.take().expect("a pipe"), "{how}").expect("it listens");
        assert!(self.child.wait().expect("it ends").success(), "it did not {how}");
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.child.kill();
        }
    }
}

/// The server's process.
fn serve() {
    let how = std::env::var(ARGUMENTS).expect("arguments");
    let mut words = how.split_whitespace();
    let device = shown(words.next().expect("a disk"), u64::MAX);
    let mut config = config();
    for word in words {
        match word.split_once('=') {
            Some(("depth", n)) => config.depth = n.parse().expect("a number"),
            _ => config.copy = word == "copy",
        }
    }
    let server = Server::start(device, config).expect("it serves");
    println!("serving recovered={}", server.recovered());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("an order");
    assert_eq!(server.failed(), None);
    match line.trim() {
        "leave" => assert!(server.leave(GRACE), "something is in flight"),
        _ => server.remove(GRACE).expect("it can be removed"),
    }
}

fn every_limit_is_the_one_of_the_disk() {
    let server = start("source");
    let limit = |name: &str| queue_limit(Path::new(DEVICE), name);
    let disk = guest::disk("source");
    for same in ["logical_block_size", "physical_block_size", "write_cache"] {
        assert_eq!(limit(same), queue_limit(&disk, same), "{same}");
    }
    assert_eq!(limit("max_hw_sectors_kb"), "1024");
    assert_eq!(limit("discard_max_bytes"), (64 << 20).to_string());
    assert_eq!(limit("write_zeroes_max_bytes"), (64 << 20).to_string());
    let found = existing(NUMBER).expect("the driver answers").expect("it is there");
    assert_eq!((found.state, found.owner), (State::Live, OWNER));
    assert_eq!(found.size.map(VolumeSize::get), Some(64 << 20));
    server.end("remove");
}

/// A disk's bytes equal what its device showed, once it is gone.
fn load_and_compare(how: &str, sizes: &str) {
    let server = start(how);
    let device = Path::new(DEVICE);
    let halves = ["--numjobs=2", "--offset_increment=32m", "--size=24m", "--randseed=7"];
    fio(device, &[&["--rw=randwrite", sizes, "--iodepth=16"][..], &halves].concat());
    run("blkdiscard", &["-o", "57671680", "-l", "1048576", DEVICE]);
    run("blkdiscard", &["-z", "-o", "58720256", "-l", "1048576", DEVICE]);
    fio(device, &["--rw=write", "--bs=1m", "--offset=60m", "--size=4m", "--fdatasync=1"]);
    let shown = sha256(device);
    let mut zeroes = vec![1; 2 << 20];
    File::open(DEVICE).and_then(|f| f.read_exact_at(&mut zeroes, 55 << 20)).expect("read");
    assert!(zeroes.iter().all(|b| *b == 0), "not all that was discarded or zeroed is zero");
    server.end("remove");
    let disk = how.split_whitespace().next().expect("a disk");
    assert_eq!(sha256(&guest::disk(disk)), shown, "the disk is not what the device showed");
}

fn sha256(device: &Path) -> String {
    run("blockdev", &["--flushbufs", device.to_str().expect("UTF-8")]);
    let out = run("sha256sum", &[device.to_str().expect("UTF-8")]);
    String::from_utf8_lossy(&out.stdout).split_whitespace().next().expect("a sum").into()
}

fn mixed_requests_come_back_and_reach_the_disk() {
    load_and_compare("source", "--bsrange=512-1m");
}

fn a_disk_of_large_blocks_keeps_them() {
    load_and_compare("large", "--bsrange=4k-256k");
}

fn payloads_copied_by_the_driver_come_back_too() {
    load_and_compare("source copy", "--bsrange=512-1m");
}

/// Verified load on the device, in the background; dies with its case.
struct Load(Child);

impl Load {
    fn is_running(&mut self) -> bool {
        self.0.try_wait().expect("fio").is_none()
    }

    fn finish(mut self) {
        assert!(self.0.wait().expect("fio").success(), "the load saw an error");
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}

fn load(bytes: &str, depth: u32) -> Load {
    let depth = format!("--iodepth={depth}");
    let size = format!("--io_size={bytes}");
    let args = ["--rw=randwrite", "--bsrange=4k-64k", "--size=60m", &depth, &size];
    let fio = Command::new("fio").args(fio_arguments(Path::new(DEVICE), &args)).spawn();
    Load(fio.expect("fio"))
}

/// Kills servers under verified load, each as soon as the one before has written something.
fn kill_under_load(how: &str, depth: u32, kills: u32) {
    let mut server = start(how);
    let mut load = load("48m", depth);
    for kill in 0..kills {
        let before = sectors_written();
        wait_for("something written", LIMIT, || (sectors_written() > before + 4096).then_some(()));
        assert!(load.is_running(), "the load was over before kill {kill}");
        server.kill();
        server = start(how);
        assert!(server.took_over(), "the device was made anew");
    }
    load.finish();
    server.end("remove");
}

fn sectors_written() -> u64 {
    let stat = std::fs::read_to_string("/sys/block/ublkb5/stat").expect("sysfs");
    stat.split_whitespace().nth(6).and_then(|n| n.parse().ok()).expect("sectors written")
}

fn a_killed_server_is_replaced_and_the_load_sees_nothing() {
    kill_under_load("source", 8, 4);
}

fn a_server_killed_with_every_tag_busy_is_replaced_soon() {
    kill_under_load("source depth=2", 16, 2);
}

fn a_server_that_leaves_hands_its_requests_to_the_next() {
    let mut server = start("source");
    let load = load("32m", 16);
    for _ in 0..3 {
        let before = sectors_written();
        wait_for("something written", LIMIT, || (sectors_written() > before + 4096).then_some(()));
        server.end("leave");
        server = start("source");
        assert!(server.took_over());
    }
    load.finish();
    server.end("remove");
}

fn a_device_without_server_is_removed_but_never_that_of_another() {
    let patience = Duration::from_secs(1);
    let server = start("source");
    assert_eq!(
        remove_stale(NUMBER, OWNER, patience),
        Err(UblkError::Served { number: NUMBER }),
        "it is served"
    );
    let other = Config { owner: OWNER + 1, patience, ..config() };
    let fresh = || shown("large", u64::MAX);
    let refused = Server::start(fresh(), other).expect_err("the number is taken");
    assert_eq!(refused, UblkError::NotOurs { number: NUMBER });
    let late = Server::start(fresh(), Config { patience, ..config() });
    assert!(late.is_err(), "two servers for one device");
    server.kill();
    wait_for("the driver sees that the server is dead", LIMIT, || {
        let found = existing(NUMBER).expect("the driver answers").expect("it is there");
        (found.state == State::Quiesced).then_some(())
    });
    assert_eq!(remove_stale(NUMBER, OWNER + 1, LIMIT), Err(UblkError::NotOurs { number: NUMBER }));
    assert_eq!(remove_stale(NUMBER, OWNER, LIMIT), Ok(true));
    assert_eq!(remove_stale(NUMBER, OWNER, LIMIT), Ok(false));
    assert_eq!(existing(NUMBER), Ok(None));
}

fn a_removed_device_is_gone_and_its_number_free() {
    guest::load("ublk_drv");
    for round in 0..3 {
        let server = Server::start(shown("source", u64::MAX), config()).expect("it serves");
        assert!(!server.recovered(), "round {round}");
        assert_eq!(server.block_device(), PathBuf::from(DEVICE));
        assert_eq!(server.remove(GRACE), Ok(()));
        assert!(!Path::new(DEVICE).exists());
        assert_eq!(existing(NUMBER), Ok(None));
    }
    let any = Config { number: None, ..config() };
    let server = Server::start(shown("source", u64::MAX), any).expect("it serves");
    guest::block_device(&server.block_device());
    assert_eq!(server.remove(GRACE), Ok(()));
}

fn a_device_that_does_not_fit_is_not_taken_over() {
    start("source").end("leave");
    let smaller = Server::start(shown("source", 32 << 20), config()).expect_err("too small");
    assert!(matches!(&smaller, UblkError::Unfit { why, .. } if why.contains("larger")));
    let blocks = Server::start(shown("large", u64::MAX), config()).expect_err("other blocks");
    assert!(matches!(&blocks, UblkError::Unfit { why, .. } if why.contains("blocks")));
    let server = start("source");
    assert!(server.took_over(), "it stayed as it was");
    server.end("remove");
}

fn a_device_in_use_grows() {
    guest::load("ublk_drv");
    assert!(features().expect("the driver answers").update_size());
    let disk = shown("source", 32 << 20);
    let server = Server::start(disk.clone(), config()).expect("it serves");
    run("mkfs.ext4", &["-q", DEVICE]);
    let at = "/vm/scratch/grown";
    std::fs::create_dir_all(at).expect("a folder");
    run("mount", &[DEVICE, at]);
    let size = VolumeSize::new(64 << 20).expect("a size");
    disk.bytes.store(size.get(), Ordering::Relaxed);
    assert_eq!(server.resize(size), Ok(()));
    run("resize2fs", &[DEVICE]);
    std::fs::write(Path::new(at).join("file"), vec![7; 40 << 20]).expect("there is room now");
    run("umount", &[at]);
    run("fsck.ext4", &["-fn", DEVICE]);
    assert_eq!(server.remove(GRACE), Ok(()));
}

fn a_device_in_use_is_not_removed() {
    guest::load("ublk_drv");
    let server = Server::start(shown("source", u64::MAX), config()).expect("it serves");
    let open = File::open(DEVICE).expect("open");
    assert_eq!(server.remove(GRACE), Err(UblkError::InUse { number: NUMBER }));
    assert_eq!(server.failed(), None);
    let mut bytes = vec![0; 4096];
    open.read_exact_at(&mut bytes, 0).expect("it is served on");
    drop(open);
    // udev or the kernel may have it open for a moment after we do not.
    wait_for("nobody has it open", LIMIT, || match server.remove(GRACE) {
        Ok(()) => Some(()),
        Err(UblkError::InUse { .. }) => {
            pause(Duration::from_millis(50));
            None
        }
        Err(error) => panic!("{error}"),
    });
    assert_eq!(existing(NUMBER), Ok(None));
}
