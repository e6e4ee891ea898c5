//! A guest writes through fio with verification while everything is replicated; the point cut
//! afterwards equals the source byte for byte.

mod harness;

use std::path::Path;
use std::time::Duration;

use farshore_protocol::admin::{PointChoice, PointInfo};
use harness::{Site, assert_same_bytes, run, wait_for};

fn fio(uri: &str, extra: &[&str]) {
    let uri = format!("--uri={uri}");
    let mut args = vec![
        "--name=load",
        "--ioengine=nbd",
        &uri,
        "--direct=1",
        "--thread=1",
        "--group_reporting=1",
        "--verify=crc32c",
        "--verify_state_save=0",
        "--verify_fatal=1",
        "--do_verify=1",
        "--minimal",
    ];
    args.extend(extra);
    run("fio", &args);
}

#[test]
fn a_point_equals_the_source_after_verified_random_writes() {
    let site = Site::new();
    let _daemons = site.start_all();
    let (image, uri) = site.protect("disk", 64 << 20, "1s");
    site.wait_protected("disk");
    fio(
        &uri,
        &[
            "--rw=randwrite",
            "--bsrange=512-128k",
            "--blockalign=512",
            "--size=64m",
            "--io_size=96m",
            "--iodepth=16",
            "--randseed=7",
            "--norandommap=0",
        ],
    );
    let point = site.tag("disk", "after-fio");
    let view = site.open("disk", PointChoice::Id(point.point));
    let copy = site.fetch_view(&view, "view.img");
    assert_same_bytes(&image, &copy, "source and point differ");
}

#[test]
fn a_disk_that_holds_data_already_is_copied_and_then_followed() {
    let site = Site::new();
    let _daemons = site.start_all();
    let image = site.root().join("old.img");
    run(
        "dd",
        &[
            "if=/dev/urandom",
            &format!("of={}", image.display()),
            "bs=1M",
            "count=24",
            "status=none",
        ],
    );
    // A hole in the middle and one at the end.
    run("fallocate", &["-p", "-o", "4M", "-l", "8M", image.to_str().expect("path")]);
    run("truncate", &["-s", "40M", image.to_str().expect("path")]);
    site.protect_image("old", &image, "1s");
    let uri = site.nbd_uri("old");
    fio(&uri, &["--rw=randwrite", "--bs=4k", "--size=40m", "--io_size=8m", "--iodepth=8"]);
    site.wait_protected("old");
    let point = site.tag("old", "copied");
    let view = site.open("old", PointChoice::Id(point.point));
    let copy = site.fetch_view(&view, "view.img");
    assert_same_bytes(&image, &copy, "source and point differ");
}

#[test]
fn trim_and_zeroes_read_as_zero_in_the_point() {
    let site = Site::new();
    let _daemons = site.start_all();
    let (image, uri) = site.protect("thin", 32 << 20, "1s");
    site.wait_protected("thin");
    let script = "h.pwrite(b'x' * (4 << 20), 0)\nh.trim(1 << 20, 0)\nh.zero(1 << 20, 2 << 20)\nh.zero(65536, 3 << 20, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)\nh.flush()\n";
    run("nbdsh", &["-u", &uri, "-c", script]);
    let point = site.tag("thin", "zeroed");
    let view = site.open("thin", PointChoice::Id(point.point));
    let copy = site.fetch_view(&view, "view.img");
    assert_same_bytes(&image, &copy, "source and point differ");
    let bytes = std::fs::read(&copy).expect("copy");
    assert!(bytes[..1 << 20].iter().all(|b| *b == 0), "trimmed range is not zero");
    assert!(bytes[1 << 20..2 << 20].iter().all(|b| *b == b'x'), "kept range changed");
}

#[test]
fn a_view_is_private_and_the_next_one_does_not_see_its_writes() {
    let site = Site::new();
    let _daemons = site.start_all();
    let (_, uri) = site.protect("disk", 16 << 20, "1s");
    site.wait_protected("disk");
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'a' * 65536, 0)"]);
    let point = site.tag("disk", "a");
    let first = site.open("disk", PointChoice::Id(point.point));
    let second = site.open("disk", PointChoice::Id(point.point));
    let scribble = "h.pwrite(b'z' * 4096, 4096)\nh.zero(4096, 0)\nassert h.pread(4096, 4096) == b'z' * 4096\nassert h.pread(4096, 0) == bytes(4096)\nassert h.pread(4096, 8192) == b'a' * 4096";
    run("nbdsh", &["-u", &harness::view_uri(&first), "-c", scribble]);
    run(
        "nbdsh",
        &["-u", &harness::view_uri(&second), "-c", "assert h.pread(65536, 0) == b'a' * 65536"],
    );
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'b' * 65536, 0)"]);
    let later = site.tag("disk", "b");
    run(
        "nbdsh",
        &["-u", &harness::view_uri(&second), "-c", "assert h.pread(65536, 0) == b'a' * 65536"],
    );
    let third = site.open("disk", PointChoice::Id(later.point));
    run(
        "nbdsh",
        &["-u", &harness::view_uri(&third), "-c", "assert h.pread(65536, 0) == b'b' * 65536"],
    );
    for view in [&first, &second, &third] {
        site.close(view);
    }
}

#[test]
fn any_moment_between_two_points_can_be_opened_by_its_time() {
    let site = Site::new();
    let _daemons = site.start_all();
    let (_, uri) = site.protect("disk", 16 << 20, "1h");
    wait_for("an ordered replica", Duration::from_secs(60), || {
        site.replica("disk").filter(|r| {
            r.order == farshore_extent::CaptureOrder::Ordered
                && r.copy_remaining == 0
                && r.journaled.seq.get() > 0
        })
    });
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'1' * 4096, 0)"]);
    let between = farshore_extent::WallTime::now();
    harness::pause(Duration::from_millis(50));
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'2' * 4096, 0)"]);
    site.tag("disk", "end");
    let view = site.open("disk", PointChoice::Time(between));
    run(
        "nbdsh",
        &["-u", &harness::view_uri(&view), "-c", "assert h.pread(4096, 0) == b'1' * 4096"],
    );
}

#[test]
fn a_clean_restart_of_filterd_continues_without_a_copy() {
    let site = Site::new();
    let daemons = site.start_all();
    let (image, uri) = site.protect("disk", 32 << 20, "1s");
    site.wait_protected("disk");
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'q' * 1048576, 1048576)"]);
    let before = site.tag("disk", "before");
    let status = daemons.filterd.stop();
    assert!(status.success(), "filterd stopped with {status}\n{}", site.logs());
    let _filterd = site.start_filterd();
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'r' * 4096, 0)"]);
    let after = site.tag("disk", "after");
    assert!(after.lsn.epoch > before.lsn.epoch, "a start takes a new epoch");
    let lost = site.points("disk").iter().any(|p| p.point == before.point);
    assert!(lost, "the old point stays");
    for (point, name) in [(after.point, "after.img"), (before.point, "before.img")] {
        let view = site.open("disk", PointChoice::Id(point));
        site.fetch_view(&view, name);
    }
    assert_same_bytes(&image, &site.root().join("after.img"), "source and point differ");
    let old = std::fs::read(site.root().join("before.img")).expect("copy");
    assert!(old[..4096].iter().all(|b| *b == 0), "the old point has a later write");
}

#[test]
fn an_unclean_restart_of_filterd_copies_again_and_keeps_old_points() {
    let site = Site::new();
    let daemons = site.start_all();
    let (image, uri) = site.protect("disk", 32 << 20, "1s");
    site.wait_protected("disk");
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'q' * 1048576, 1048576)"]);
    let before = site.tag("disk", "before");
    daemons.filterd.kill();
    let _filterd = site.start_filterd();
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'r' * 4096, 0)"]);
    wait_for("a point of the new epoch", Duration::from_secs(60), || {
        site.points("disk").into_iter().find(|p| p.lsn.epoch > before.lsn.epoch)
    });
    let after = site.tag("disk", "after");
    let view = site.open("disk", PointChoice::Id(after.point));
    let copy = site.fetch_view(&view, "after.img");
    assert_same_bytes(&image, &copy, "source and point differ");
    let view = site.open("disk", PointChoice::Id(before.point));
    let old = std::fs::read(site.fetch_view(&view, "before.img")).expect("copy");
    assert!(old[..4096].iter().all(|b| *b == 0), "the old point has a later write");
    assert!(old[1 << 20..2 << 20].iter().all(|b| *b == b'q'), "the old point lost a write");
}

/// Makes the image larger; what `fill` KiB of its new part hold is left from before.
fn enlarge(image: &Path, bytes: u64, fill: u64) {
    let from = std::fs::metadata(image).expect("image").len();
    let path = image.to_str().expect("path");
    run("truncate", &["-s", &bytes.to_string(), path]);
    let (to, seek) = (format!("of={path}"), format!("seek={}", from / 1024 + 192));
    let count = format!("count={fill}");
    let old = ["if=/dev/urandom", &to, "bs=1K", &seek, &count, "conv=notrunc", "status=none"];
    run("dd", &old);
}

/// The point has the size and the content of `is`.
fn assert_point_is(site: &Site, point: &PointInfo, is: &Path) {
    let view = site.open("disk", PointChoice::Id(point.point));
    assert_eq!(view.size.get(), std::fs::metadata(is).expect("image").len());
    let copy = site.fetch_view(&view, &format!("{}.img", point.name));
    assert_same_bytes(is, &copy, "a point differs from the source at its time");
    site.close(&view);
}

#[test]
fn a_volume_grows_in_use_and_points_keep_the_size_of_their_time() {
    let site = Site::new();
    let mut daemons = site.start_all();
    // Not whole chunks: the last one grows too.
    let before = (16 << 20) + 65536;
    let (image, uri) = site.protect("disk", before, "1s");
    site.wait_protected("disk");
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'a' * 65536, 16 << 20)"]);
    let old = site.tag("disk", "old");
    let kept = site.root().join("kept.img");
    std::fs::copy(&image, &kept).expect("copy of the image");

    enlarge(&image, 24 << 20, 1280);
    let would = site.cli(&["volume", "grow", "disk", "--dry-run"]);
    assert!(would.contains("nothing was changed"), "{would}");
    run("nbdsh", &["-u", &uri, "-c", &format!("assert h.get_size() == {before}")]);
    let grown: serde_json::Value =
        serde_json::from_str(&site.cli(&["volume", "grow", "disk", "--json"])).expect("a document");
    assert_eq!(grown["grown"]["to"], 24 << 20, "{grown}");
    let script = "assert h.get_size() == 24 << 20
h.pwrite(b'n' * 65536, (24 << 20) - 65536)
h.pwrite(b'm' * 131072, 16 << 20)
h.flush()";
    run("nbdsh", &["-u", &uri, "-c", script]);
    let new = site.tag_when_ordered("disk", "new");
    assert_point_is(&site, &old, &kept);
    assert_point_is(&site, &new, &image);
    assert_eq!(site.replica("disk").expect("status").size.get(), 24 << 20);
    let again = site.cli(&["volume", "grow", "disk"]);
    assert!(again.contains("already"), "{again}");

    // A growth that is not finished when filterd dies is made good by the next start.
    enlarge(&image, 40 << 20, 6144);
    site.cli(&["volume", "grow", "disk"]);
    daemons.filterd.kill();
    daemons.filterd = site.start_filterd();
    run("nbdsh", &["-u", &uri, "-c", "assert h.get_size() == 40 << 20"]);
    let killed = site.tag_when_ordered("disk", "killed");
    assert_point_is(&site, &killed, &image);

    run("truncate", &["-s", "20M", image.to_str().expect("path")]);
    let refused = site.try_cli(&["volume", "grow", "disk"]);
    assert_eq!(refused.status.code(), Some(4), "{}", harness::said(&refused));
    assert!(harness::said(&refused).contains("FS-2050"), "{}", harness::said(&refused));
}

#[test]
fn a_sparse_image_grows_without_losing_order() {
    let site = Site::new();
    let _daemons = site.start_all();
    let (image, uri) = site.protect("disk", 16 << 20, "1s");
    site.wait_protected("disk");
    enlarge(&image, 48 << 20, 0);
    site.cli(&["volume", "grow", "disk"]);
    // At once: nothing is to be copied before.
    let empty = site.tag("disk", "empty");
    assert_point_is(&site, &empty, &image);
    fio(&uri, &["--rw=randwrite", "--bs=64k", "--size=48m", "--io_size=8m", "--iodepth=8"]);
    let full = site.tag("disk", "full");
    assert_point_is(&site, &full, &image);
    let events = site.cli(&["event", "list", "--json"]);
    assert_eq!(events.matches("order was lost").count(), 0, "{events}");
}

#[test]
fn a_disk_that_grew_while_filterd_was_stopped_is_found_and_copied() {
    let site = Site::new();
    let mut daemons = site.start_all();
    let (image, uri) = site.protect("disk", 16 << 20, "1s");
    site.wait_protected("disk");
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'a' * 65536, 1 << 20)"]);
    let old = site.tag("disk", "old");
    let kept = site.root().join("kept.img");
    std::fs::copy(&image, &kept).expect("copy of the image");
    assert!(daemons.filterd.stop().success());
    enlarge(&image, 24 << 20, 2048);
    daemons.filterd = site.start_filterd();
    run("nbdsh", &["-u", &uri, "-c", "assert h.get_size() == 24 << 20"]);
    let new = site.tag_when_ordered("disk", "new");
    assert_point_is(&site, &old, &kept);
    assert_point_is(&site, &new, &image);
}
