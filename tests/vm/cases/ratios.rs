//! How fast the ways to a disk are beside each other, in one boot: figures for `./tools/bench vm`, no
//! verdict on them. What was written is compared, else the figures would be worth nothing.
//! `FARSHORE_ROUNDS` sets how often everything is measured.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::ublk_front;
use crate::harness::{Site, run, wait_for};
use crate::image::Disk;
use crate::volume::{Attached, Volume, Way};
use crate::{Group, case_list, guest};

const SIZE_MIB: u64 = 64;

pub const GROUP: Group = Group {
    name: "ratios",
    soak: true,
    disks: &[
        Disk::new("raw", SIZE_MIB),
        Disk::new("off", SIZE_MIB),
        Disk::new("ublk", SIZE_MIB),
        Disk::new("nbd", SIZE_MIB),
        Disk::new("nbdkit", SIZE_MIB),
        Disk::new("loop", SIZE_MIB),
    ],
    limit: Duration::from_secs(3600),
    cases: case_list![the_ways_to_a_disk_beside_each_other],
    ..Group::DEFAULT
};

/// Seconds of each measurement.
const SECONDS: &str = "2";
/// Name, kind, size of a request, requests in flight.
const LOADS: &[(&str, &str, &str, &str)] = &[
    ("4k random write qd1", "randwrite", "4k", "1"),
    ("4k random write qd16", "randwrite", "4k", "16"),
    ("4k random read qd16", "randread", "4k", "16"),
    ("128k write qd4", "write", "128k", "4"),
];

/// A process of somebody else; killed when dropped.
struct Other(Child);

impl Drop for Other {
    fn drop(&mut self) {
        self.0.kill().and_then(|()| self.0.wait()).ok();
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Requests a second.
fn measure(device: &Path, (_, kind, size, depth): (&str, &str, &str, &str)) -> f64 {
    let device = guest::block_device(device);
    let (file, rw) = (format!("--filename={}", device.display()), format!("--rw={kind}"));
    let (bs, depth) = (format!("--bs={size}"), format!("--iodepth={depth}"));
    let time = format!("--runtime={SECONDS}");
    let how = ["--name=load", "--ioengine=libaio", "--direct=1", "--thread=1", "--time_based"];
    let where_to = ["--size=60m", "--norandommap", "--randrepeat=0", "--output-format=json"];
    let limited = ["--kill-after=5", "60", "fio"];
    let fio = [&limited[..], &how, &where_to, &[&file, &rw, &bs, &depth, &time]].concat();
    let out = run("timeout", &fio);
    let said = String::from_utf8(out.stdout).expect("UTF-8");
    let json = &said[said.find('{').expect("fio speaks JSON")..];
    let report: serde_json::Value = serde_json::from_str(json).expect("fio speaks JSON");
    let job = &report["jobs"][0];
    let side = if kind.contains("read") { &job["read"] } else { &job["write"] };
    assert_eq!(job["error"], 0, "{said}");
    side["iops"].as_f64().expect("a figure")
}

/// Everything written is at the target: nothing of it runs beside the next measurement.
fn let_it_drain(site: &Site, volume: &str, tag: &str) {
    wait_for("everything to be at the target", Duration::from_secs(300), || {
        let tagged = site.try_cli(&["point", "tag", volume, "--name", tag]);
        tagged.status.success().then_some(())
    });
}

fn the_ways_to_a_disk_beside_each_other() {
    let rounds: u32 = std::env::var("FARSHORE_ROUNDS").map_or(1, |n| n.parse().expect("a number"));
    let site = Site::new();
    let _daemons = site.start_all();
    let bare = ublk_front::start("off");
    let ublk = Volume::protect(&site, Way::Ublk, "ublk", "1s");
    let nbd = Volume::protect(&site, Way::Nbd, "nbd", "1s");
    let socket = site.root().join("kit.sock");
    let mut nbdkit = Command::new("nbdkit");
    nbdkit.args(["--foreground", "--unix", text(&socket), "file"]);
    nbdkit.arg(guest::disk("nbdkit")).stdin(Stdio::null());
    let _nbdkit = Other(nbdkit.spawn().expect("nbdkit"));
    wait_for("nbdkit", Duration::from_secs(30), || {
        std::os::unix::net::UnixStream::connect(&socket).ok()
    });
    let kit = Attached::new(&format!("nbd+unix:///disk?socket={}", socket.display()), "512");
    guest::load("loop");
    let found = run("losetup", &["--find", "--show", "--direct-io=on", text(&guest::disk("loop"))]);
    let looped = PathBuf::from(String::from_utf8(found.stdout).expect("UTF-8").trim());

    let ways: [(&str, PathBuf); 6] = [
        ("raw", guest::disk("raw")),
        ("ours by ublk, capture off", ublk_front::DEVICE.into()),
        ("ours by ublk, protected", ublk.device.clone()),
        ("ours by kernel NBD, protected", nbd.device.clone()),
        ("nbdkit by kernel NBD", kit.device.clone()),
        ("loop", looped.clone()),
    ];
    let mut figures: BTreeMap<&str, BTreeMap<&str, Vec<f64>>> = BTreeMap::new();
    ublk.wait_protected();
    nbd.wait_protected();
    for round in 0..rounds {
        for load in LOADS {
            let mut order: Vec<usize> = (0..ways.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for at in order {
                let (name, device) = &ways[at];
                let figure = measure(device, *load);
                figures.entry(load.0).or_default().entry(name).or_default().push(figure);
                println!("round {round}  {}  {name}: {figure:.0}", load.0);
                if let Some(volume) = [&ublk, &nbd].into_iter().find(|v| v.device == *device) {
                    let tag = format!("r{round}-{}-{}", load.1, load.3);
                    let_it_drain(&site, &volume.name, &tag);
                }
            }
        }
    }
    let json = serde_json::to_string_pretty(&figures).expect("JSON");
    std::fs::write("/vm/out/ratios.json", json).expect("the result is kept");
    for volume in [ublk, nbd] {
        volume.assert_point_equals_disk("the-end");
        volume.unprotect();
    }
    drop(kit);
    run("losetup", &["--detach", text(&looped)]);
    bare.end("remove");
}
