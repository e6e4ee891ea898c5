//! One life of the source, from boot to end: what its disk says, then the daemons, and a load on both
//! volumes until the power is cut or it is told to stop.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use farshore_blkfilter::control::Client;

use super::tree::Tree;
use super::{BLOCKS, FILES, LIMIT, LIST, REPORT, ROUND, TOKEN};
use crate::guest;
use crate::harness::{Site, run};
use crate::machine::FORWARDED;
use crate::volume::{Volume, Way};

const SITE: &str = "/vm/scratch/site";
const MOUNT: &str = "/mnt/files";
/// Few enough regions that old ones are cleared all the time; a pool that is soon made.
const SETTINGS: &str = "intent_max = \"64MiB\"\npool = \"32MiB\"\n";

/// A step: meets the host at the signals.
pub fn live() {
    let site = Site::at(Path::new(SITE));
    show_state(&site);
    guest::signal("shown");
    guest::wait_signal("start", LIMIT);
    Way::Ublk.load_driver();
    let token = fs::read_to_string(guest::shared(TOKEN)).ok();
    if let Some(token) = &token {
        site.cli(&["enroll", token]);
        fs::write(site.paths.etc.join("filterd.toml"), SETTINGS).expect("filterd.toml");
    }
    let (filterd, agent) = (site.start_filterd(), site.start_agent());
    let [blocks, files] = [&BLOCKS, &FILES].map(|disk| match &token {
        Some(_) => Volume::protect(&site, Way::Ublk, disk.name, "1s"),
        None => Volume::again(&site, Way::Ublk, disk.name),
    });
    if token.is_some() {
        run("mkfs.ext4", &["-q", "-E", "lazy_itable_init=0", files.path()]);
    }
    let export = Export::start(&blocks.device);
    fs::create_dir_all(MOUNT).expect("mount point");
    run("mount", &[files.path(), MOUNT]);
    let tree = Tree::new(Path::new(MOUNT), &guest::shared(LIST));
    println!("{} files were durable", tree.verify());
    guest::signal("serving");
    guest::wait_signal("settled", LIMIT);
    report(&site);
    let round = fs::read_to_string(guest::shared(ROUND)).expect("round");
    guest::signal("writing");
    // Never told where the power is to be cut.
    tree.write(round.parse().expect("a number"), || guest::signalled("stop"));
    tree.unmounting();
    run("umount", &[MOUNT]);
    guest::signal("unmounted");
    guest::wait_signal("off", LIMIT);
    drop(export);
    assert!(filterd.stop().success() && agent.stop().success(), "{}", site.logs());
    run("sync", &[]);
}

/// Copies what filterd finds of its volumes, before it does, and has its log and the agent's where
/// a reader of a failure finds them.
fn show_state(site: &Site) {
    for role in ["filterd", "agent"] {
        let log = format!("{role}.log");
        let own = site.root().join(&log);
        fs::remove_file(&own).ok();
        std::os::unix::fs::symlink(guest::shared(&log), own).expect("log");
    }
    let all = fs::read_dir(site.paths.state.join("filterd/volumes")).into_iter().flatten();
    for file in all.flatten() {
        fs::copy(file.path(), guest::shared("").join(file.file_name())).expect("copy");
    }
}

/// How much was compared or copied since the start: a line for each volume.
fn report(site: &Site) {
    let mut client = Client::connect(&site.paths.filterd_socket()).expect("filterd");
    let lines = client
        .list()
        .expect("list")
        .into_iter()
        .map(|volume| format!("{} {}\n", volume.info.name, volume.copy.total_bytes));
    fs::write(guest::shared(REPORT), lines.collect::<String>()).expect("report");
}

/// A block device at the port that the host reaches, past the page cache; gone when dropped.
struct Export(Child);

impl Export {
    fn start(device: &Path) -> Self {
        let mut command = Command::new("qemu-nbd");
        command.args(["-t", "-f", "raw", "-x", "", "--cache=none", "--aio=native", "-e", "8"]);
        command.args(["--discard=unmap", "-p", &FORWARDED.to_string()]).arg(device);
        let server = Self(command.spawn().expect("qemu-nbd: ./tools/test installs it"));
        let listens = || std::net::TcpStream::connect(("127.0.0.1", FORWARDED)).ok();
        crate::harness::wait_for("qemu-nbd", Duration::from_secs(60), listens);
        server
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.0.kill().expect("kill");
        self.0.wait().expect("reaped");
    }
}
