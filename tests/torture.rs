//! The worst that users and hosts do to a source, by real daemons over NBD; the same on a real kernel is in
//! tests/vm/cases/torture.rs. SPECIFICATION.md lists all of it.

mod harness;

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::{Command, Stdio};
use std::time::Duration;

use farshore_extent::CaptureOrder;
use harness::load::{Load, fio};
use harness::{Site, pause, run, said, wait_for};

const MIB: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(120);

#[test]
fn writers_that_race_on_overlapping_ranges_leave_replica_and_disk_equal() {
    let site = Site::new();
    let _daemons = site.start_all();
    let (image, uri) = site.protect("disk", MIB, "1s");
    site.wait_protected("disk");
    // A connection for each job; three sizes, at any sector, all in one MiB.
    let jobs = ["--numjobs=4", "--iodepth=16", "--rw=randwrite", "--norandommap", "--size=1m"];
    let sizes = ["--bssplit=512/60:4k/30:68k/10", "--blockalign=512", "--number_ios=5000"];
    for round in 0..5 {
        let seed = format!("--randseed={round}");
        let mut fio = fio(&uri, &[&jobs[..], &sizes, &["--scramble_buffers=1", &seed]].concat());
        let out = fio.output().expect("fio");
        assert!(out.status.success(), "{}", said(&out));
        site.assert_point_equals("disk", &format!("round-{round}"), &image);
    }
}

#[test]
fn a_first_copy_under_full_load_outlives_kills_and_offers_no_point_before_its_end() {
    const SIZE: u64 = 256 * MIB;
    let site = Site::new();
    let mut daemons = site.start_all();
    let image = site.root().join("disk.img");
    let of = format!("of={}", image.display());
    run("dd", &["if=/dev/urandom", &of, "bs=1M", "count=256", "status=none"]);
    site.protect_image("disk", &image, "100ms");
    let load = Load::start(&site.nbd_uri("disk"), &["--bs=64k", "--size=32m"]);
    for round in 0..3 {
        pause(Duration::from_millis(200));
        daemons.agent.kill();
        daemons.agent = site.start_agent();
        daemons.target.kill();
        daemons.target = site.start_target();
        let replica = site.replica("disk");
        let early = replica.filter(|r| r.order != CaptureOrder::Ordered && r.points > 0);
        assert!(early.is_none(), "round {round}: a point before the copy's end: {early:?}");
    }
    pause(Duration::from_secs(1));
    load.stop();
    wait_for("order", LONG, || site.replica("disk").filter(|r| r.order == CaptureOrder::Ordered));
    let sent = site.agent_status().expect("the agent runs").volumes[0].raw_bytes;
    site.assert_point_equals("disk", "copied", &image);
    assert!(sent < 8 * SIZE, "{sent} bytes were sent for {SIZE}");
}

#[test]
fn a_disk_that_was_written_behind_a_clean_stop_is_found_and_compared() {
    let site = Site::new();
    let mut daemons = site.start_all();
    let (image, uri) = site.protect("disk", 32 * MIB, "1s");
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'q' * 1048576, 1048576)\nh.flush()"]);
    let before = site.wait_protected("disk").journaled;
    assert!(daemons.filterd.stop().success(), "{}", site.logs());
    let file = OpenOptions::new().write(true).open(&image).expect("image");
    file.write_all_at(&[0xEE; 512], 20 * MIB).expect("write");
    drop(file);
    daemons.filterd = site.start_filterd();
    wait_for("a point of the new epoch", LONG, || {
        site.points("disk").into_iter().find(|p| p.lsn.epoch > before.epoch)
    });
    site.assert_point_equals("disk", "compared", &image);
}

#[test]
fn an_agent_that_may_not_read_its_folders_says_so_and_the_guest_does_not_notice() {
    let site = Site::new();
    let daemons = site.start_all();
    let (image, uri) = site.protect("disk", 32 * MIB, "1s");
    site.wait_protected("disk");
    assert!(daemons.agent.stop().success());
    // Nobody but root gets into it now, and the next agent is not root.
    let folder = site.paths.state.join("agent");
    std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o700)).expect("mode");
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "--"];
    let mut agent = Command::new("setpriv");
    agent.args(nobody).arg(harness::farshore_bin()).arg("--root").arg(site.root()).arg("agent");
    let out = agent.stdin(Stdio::null()).output().expect("setpriv");
    let told = said(&out);
    assert!(!out.status.success() && told.contains("FS-"), "{told}");
    assert!(told.contains("ermission denied"), "{told}");
    let named = told.contains(&site.root().display().to_string());
    assert!(named && !told.contains("panicked"), "{told}");
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'n' * 1048576, 5 << 20)\nh.flush()"]);
    let _agent = site.start_agent();
    site.assert_point_equals("disk", "after", &image);
}
