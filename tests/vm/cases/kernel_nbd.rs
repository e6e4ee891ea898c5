//! Devices of the kernel's NBD client, served by a process of their own over a bare disk: what
//! happens to their users when that process is killed, hangs, leaves or gives the device up.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use farshore_blkfilter::backing::{Backing, Mode};
use farshore_blkfilter::frontend::kernel_nbd::{Config, Server, available, existing, remove_stale};

use super::plain::Plain;
use crate::harness::{run, wait_for};
use crate::image::Disk;
use crate::volume::queue_limit;
use crate::{Case, Group, case_list, guest};

pub const GROUP: Group = Group {
    name: "kernel_nbd",
    disks: &[Disk::new("plain", 64), Disk::new("large-blocks", 64).blocks(4096, 4096)],
    cases: case_list![
        the_client_is_found_and_told_what_the_disk_is,
        writes_of_mixed_sizes_read_back,
        kills_under_load_are_survived_without_an_error,
        a_server_that_hangs_keeps_its_connection,
        an_orderly_restart_lets_nobody_wait_for_a_timer,
        a_strangers_device_is_never_touched,
        a_device_that_was_disconnected_is_served_no_more,
        partitions_appear,
    ],
    ..Group::DEFAULT
};

pub const STEPS: &[Case] = case_list![serve];

const LIMIT: Duration = Duration::from_secs(120);
const GRACE: Duration = Duration::from_secs(20);

/// The process that serves: started by [`Serving`], killed by the cases.
fn serve() {
    let [id, connections, disk] =
        ["ID", "CONNECTIONS", "DISK"].map(|name| std::env::var(name).expect(name));
    let backing = Backing::open(disk.as_ref(), Mode::ReadWrite).expect("backing");
    let connections = connections.parse().expect("a number");
    let config = Config { connections, ..Config::new(id) };
    let server = Server::start(std::sync::Arc::new(Plain(backing)), config).expect("attached");
    println!("{} {}", server.number(), server.recovered());
    for line in std::io::stdin().lines() {
        match line.expect("input").as_str() {
            "health" => println!("{:?}", server.health()),
            "leave" => return println!("{}", server.leave(GRACE)),
            "remove" => return println!("{:?}", server.remove(GRACE)),
            other => panic!("{other}?"),
        }
    }
}

/// Such a process.
struct Serving {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    number: u32,
    recovered: bool,
}

impl Serving {
    fn start(id: &str, connections: u16, disk: &str) -> Self {
        guest::load("nbd");
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--in-guest", "kernel_nbd::serve"])
            .env("ID", id)
            .env("CONNECTIONS", connections.to_string())
            .env("DISK", guest::disk(disk))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the server starts");
        let input = child.stdin.take().expect("input");
        let output = BufReader::new(child.stdout.take().expect("output"));
        let mut serving = Self { child, input, output, number: 0, recovered: false };
        let said = serving.line();
        let (number, recovered) = said.split_once(' ').expect("number and whether recovered");
        serving.number = number.parse().expect("a number");
        serving.recovered = recovered == "true";
        guest::block_device(&serving.device());
        serving
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the server speaks");
        line.trim_end().to_owned()
    }

    fn ask(&mut self, what: &str) -> String {
        writeln!(self.input, "{what}").expect("the server listens");
        self.line()
    }

    fn device(&self) -> PathBuf {
        PathBuf::from(format!("/dev/nbd{}", self.number))
    }

    fn is(&self, file: &str) -> String {
        let path = format!("/sys/block/nbd{}/{file}", self.number);
        std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
    }

    fn signal(&self, name: &str) {
        run("kill", &[&format!("-{name}"), &self.child.id().to_string()]);
    }

    fn kill(mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    fn remove(mut self) {
        assert_eq!(self.ask("remove"), "Ok(())");
        assert_eq!(existing(self.number), None);
        assert!(self.child.wait().expect("wait").success());
    }
}

/// fio with verification on its own; writes `mib` at most at 200 requests a second.
fn load(device: &Path, mib: u32, more: &[&str]) -> Child {
    let (device, size) = (guest::block_device(device), format!("--size={mib}m"));
    let common = ["--name=load", "--direct=1", "--ioengine=libaio", "--verify=crc32c"];
    Command::new("fio")
        .args(common)
        .args(["--verify_fatal=1", "--do_verify=1", "--output=/vm/out/fio.log", &size])
        .arg(format!("--filename={}", device.display()))
        .args(more)
        .spawn()
        .expect("fio starts")
}

fn ends_well(mut load: Child) {
    let status = load.wait().expect("fio");
    let log = std::fs::read_to_string("/vm/out/fio.log").unwrap_or_default();
    assert!(status.success(), "fio saw an error: {log}");
    assert!(log.contains("err= 0"), "{log}");
}

fn completed_writes(serving: &Serving) -> u64 {
    let stat = serving.is("stat");
    stat.split_whitespace().nth(4).and_then(|n| n.parse().ok()).expect("stat")
}

/// Waits until the device answers writes again that come after this.
fn wait_for_writes(serving: &Serving) {
    let before = completed_writes(serving);
    wait_for("writes to go on", LIMIT, || (completed_writes(serving) > before + 50).then_some(()));
}

fn the_client_is_found_and_told_what_the_disk_is() {
    guest::load("nbd");
    assert!(available().expect("the module is loaded").max_part > 0);
    let serving = Serving::start("large", 1, "large-blocks");
    assert!(!serving.recovered);
    assert_eq!(serving.is("backend"), "farshore:large");
    assert_eq!(serving.is("size"), (64 * 2048).to_string());
    assert_eq!(serving.is("queue/logical_block_size"), "4096");
    let disk = guest::disk("large-blocks");
    let cache = queue_limit(&disk, "write_cache");
    assert_eq!(queue_limit(&serving.device(), "write_cache"), cache);
    // We take FUA wherever there is a cache, whatever the disk itself can.
    let fua = if cache == "write back" { "1" } else { "0" };
    assert_eq!(queue_limit(&serving.device(), "fua"), fua);
    serving.remove();
}

fn writes_of_mixed_sizes_read_back() {
    let serving = Serving::start("vol", 1, "plain");
    let mixed = ["--rw=randwrite", "--bsrange=512-1m", "--blockalign=512", "--iodepth=16"];
    ends_well(load(&serving.device(), 32, &mixed));
    let device = serving.device();
    run("blkdiscard", &["--offset", "0", "--length", "4MiB", device.to_str().expect("UTF-8")]);
    run("blkdiscard", &["--zeroout", device.to_str().expect("UTF-8")]);
    serving.remove();
}

fn kills_under_load_are_survived_without_an_error() {
    let mut serving = Serving::start("vol", 1, "plain");
    let number = serving.number;
    let paced = ["--rw=randwrite", "--bs=4k", "--iodepth=8", "--rate_iops=200"];
    let load = load(&serving.device(), 24, &paced);
    for _ in 0..3 {
        wait_for_writes(&serving);
        let killed = Instant::now();
        serving.kill();
        serving = Serving::start("vol", 1, "plain");
        let started = killed.elapsed();
        assert!(serving.recovered && serving.number == number);
        let in_flight = completed_writes(&serving);
        wait_for("requests", LIMIT, || (completed_writes(&serving) > in_flight).then_some(()));
        println!("served again after {started:?}, first answer after {:?}", killed.elapsed());
    }
    ends_well(load);
    let log = std::fs::read_to_string("/vm/out/fio.log").expect("fio's log");
    let longest = log.lines().filter(|line| line.trim_start().starts_with("clat ("));
    longest.for_each(|line| println!("fio: {}", line.trim()));
    serving.remove();
}

fn a_server_that_hangs_keeps_its_connection() {
    let mut serving = Serving::start("vol", 1, "plain");
    let load = load(&serving.device(), 8, &["--rw=randwrite", "--bs=4k", "--iodepth=8"]);
    wait_for_writes(&serving);
    serving.signal("STOP");
    let stuck = || run("dmesg", &[]).stdout;
    wait_for("the kernel to notice", LIMIT, || {
        let said = String::from_utf8_lossy(&stuck()).matches("Possible stuck request").count();
        (said > 8).then_some(())
    });
    serving.signal("CONT");
    ends_well(load);
    let health = serving.ask("health");
    assert_eq!(health, "Health { alive: 1, replaced: 0, gone: false }");
    serving.remove();
}

fn an_orderly_restart_lets_nobody_wait_for_a_timer() {
    let mut serving = Serving::start("vol", 1, "plain");
    let load = load(&serving.device(), 16, &["--rw=randwrite", "--bs=4k", "--iodepth=8"]);
    wait_for_writes(&serving);
    assert_eq!(serving.ask("leave"), "true", "everything that had arrived is answered");
    serving.child.wait().expect("wait");
    assert_eq!(existing(serving.number).and_then(|e| e.identifier).as_deref(), Some("vol"));
    let left = Instant::now();
    let serving = Serving::start("vol", 1, "plain");
    assert!(serving.recovered);
    wait_for_writes(&serving);
    println!("served again after {:?}", left.elapsed());
    ends_well(load);
    serving.remove();
}

fn a_strangers_device_is_never_touched() {
    let stranger = Serving::start("stranger", 1, "plain");
    let other = Serving::start("vol", 1, "large-blocks");
    assert_ne!(stranger.number, other.number);
    assert!(!remove_stale(stranger.number, "vol", GRACE).expect("no error"));
    assert_eq!(existing(stranger.number).and_then(|e| e.identifier).as_deref(), Some("stranger"));
    let number = other.number;
    other.kill();
    assert!(existing(number).is_some(), "it waits for its server");
    assert!(remove_stale(number, "vol", GRACE).expect("removed"));
    assert_eq!(existing(number), None);
    stranger.remove();
}

fn a_device_that_was_disconnected_is_served_no_more() {
    let mut serving = Serving::start("vol", 1, "plain");
    run("nbd-client", &["-d", serving.device().to_str().expect("UTF-8")]);
    wait_for("the server to notice", LIMIT, || {
        serving.ask("health").contains("alive: 0").then_some(())
    });
    assert!(serving.ask("health").contains("gone: true"));
    serving.remove();
}

fn partitions_appear() {
    let disk = guest::disk("plain");
    let table = "label: gpt\nsize=16MiB\nsize=16MiB\n";
    std::fs::write("/vm/scratch/table", table).expect("table");
    run("sh", &["-c", &format!("sfdisk --quiet {} < /vm/scratch/table", disk.display())]);
    let serving = Serving::start("vol", 1, "plain");
    guest::block_device(Path::new(&format!("/dev/nbd{}p2", serving.number)));
    serving.remove();
    run("wipefs", &["--all", "--quiet", disk.to_str().expect("UTF-8")]);
}
