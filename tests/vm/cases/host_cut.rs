//! A whole host loses its power: source, target and their disks. What the application was told is on
//! the disk is there; the points that the target had announced are there and unchanged; and after
//! the daemons have started again a new point equals the disk.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use farshore_protocol::admin::{PointChoice, PointInfo};

use crate::guest;
use crate::harness::{Site, run};
use crate::image::{Disk, SCRATCH};
use crate::runner::{Lab, STABLE};
use crate::volume::{Volume, Way, queue_limit};
use crate::{Case, Scenario, case_list};

pub const SCENARIO: Scenario = Scenario {
    name: "host_cut::flushed_and_fua_writes_and_announced_points_survive_a_power_cut",
    kernel: STABLE,
    soak: false,
    run: flushed_and_fua_writes_and_announced_points_survive_a_power_cut,
};

pub const STEPS: &[Case] = case_list![write_and_wait, look_and_go_on];

const DISKS: [Disk; 2] = [Disk::new("source", 64).volatile(), SCRATCH.volatile()];
const WAY: Way = Way::Ublk;
const LIMIT: Duration = Duration::from_secs(240);
const SITE: &str = "/vm/scratch/site";
/// The digest of the point, as the host carries it from one boot to the next.
const DIGEST: &str = "digest";

const FLUSHED_MIB: u64 = 4;
const FUA_MIB: u64 = 20;
const UNFLUSHED_MIB: u64 = 40;

fn flushed_and_fua_writes_and_announced_points_survive_a_power_cut(
    lab: &Lab,
) -> Result<(), String> {
    let mut machine = lab.boot("machine", &DISKS)?;
    let step = machine.start_case("host_cut::write_and_wait", LIMIT);
    machine.wait_signal("cut", &step)?;
    let digest = std::fs::read(machine.out().join(DIGEST)).map_err(|e| e.to_string())?;
    machine.cut();
    let mut machine = lab.boot("machine", &DISKS)?;
    std::fs::write(machine.out().join(DIGEST), digest).map_err(|e| e.to_string())?;
    machine.run_case("host_cut::look_and_go_on", LIMIT).map(drop)
}

fn digest_of(site: &Site, point: &PointInfo) -> Vec<u8> {
    let view = site.open("source", PointChoice::Id(point.point));
    let copy = site.fetch_view(&view, "point.img");
    let digest = run("sha256sum", &[copy.to_str().expect("UTF-8")]).stdout;
    site.close(&view);
    digest
}

fn write_and_wait() {
    let site = Site::at(Path::new(SITE));
    let daemons = site.start_all();
    // No points by themselves: they might flush in place of what is being tested.
    let volume = Volume::protect(&site, WAY, "source", "1h");
    assert_eq!(queue_limit(&volume.device, "write_cache"), "write back");
    let write = |at_mib: u64, flag: &str, more: &str| {
        let (of, seek) = (format!("of={}", volume.path()), format!("seek={at_mib}"));
        let sh = format!("head -c 1M /dev/zero | tr '\\0' x | dd {of} {seek} {flag} {more}");
        run("bash", &["-c", &format!("{sh} bs=1M iflag=fullblock status=none")]);
    };
    write(FLUSHED_MIB, "oflag=direct", "conv=notrunc,fsync");
    let before = site.tag("source", "before");
    std::fs::write(Path::new("/vm/out").join(DIGEST), digest_of(&site, &before)).expect("digest");
    write(FLUSHED_MIB + 1, "oflag=direct", "conv=notrunc,fsync");
    write(FUA_MIB, "oflag=direct,dsync", "conv=notrunc");
    write(UNFLUSHED_MIB, "oflag=direct", "conv=notrunc");
    // The daemons live until the cut.
    std::mem::forget(daemons);
    guest::wait_for_the_cut();
}

fn look_and_go_on() {
    let disk = std::fs::File::open(guest::disk("source")).expect("disk");
    let all = |at_mib: u64, byte: u8| {
        let mut found = vec![!byte; 1 << 20];
        disk.read_exact_at(&mut found, at_mib << 20).expect("read");
        found.iter().all(|b| *b == byte)
    };
    assert!(all(FLUSHED_MIB, b'x') && all(FLUSHED_MIB + 1, b'x'), "flushed data was lost");
    assert!(all(FUA_MIB, b'x'), "data written with FUA was lost");
    assert!(all(UNFLUSHED_MIB, 0), "the cut destroyed nothing: it proves nothing");

    let site = Site::at(Path::new(SITE));
    WAY.load_driver();
    let _daemons = site.start_again();
    let points = site.points("source");
    let before = points.iter().find(|p| p.name == "before").expect("the announced point is gone");
    let wanted = std::fs::read(Path::new("/vm/out").join(DIGEST)).expect("digest");
    assert_eq!(digest_of(&site, before), wanted, "the announced point has changed");
    let volume = Volume::again(&site, WAY, "source");
    volume.assert_point_equals_disk("after");
    assert_eq!(digest_of(&site, before), wanted, "the announced point has changed since");
    volume.unprotect();
}
