//! Comparing instead of sending: what a crash leaves, what a verify says, what a resync repairs.

mod harness;

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use farshore_protocol::admin::PointChoice;
use harness::load::Load;
use harness::{Site, assert_same_bytes, run, said, wait_for};

const SIZE: u64 = 64 << 20;
const LOAD: [&str; 3] = ["--bsrange=4k-64k", "--size=64m", "--rate=16m"];

/// Fills the volume with bytes that do not compress.
fn fill(uri: &str) {
    let script = "import os\nfor i in range(64): h.pwrite(os.urandom(1 << 20), i << 20)\nh.flush()";
    run("nbdsh", &["-u", uri, "-c", script]);
}

#[test]
fn after_a_crash_only_what_differs_is_sent() {
    let site = Site::new();
    let daemons = site.start_all();
    let (image, uri) = site.protect("disk", SIZE, "1s");
    fill(&uri);
    site.wait_protected("disk");
    site.assert_point_equals("disk", "filled", &image);
    let before = site.wait_protected("disk").journaled;

    // Writes that nobody outside has: they are in the pool of the filterd that dies.
    daemons.agent.kill();
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'q' * 3145728, 20 << 20)\nh.flush()"]);
    daemons.filterd.kill();
    let _again = (site.start_filterd(), site.start_agent());
    wait_for("a point of the new epoch", Duration::from_secs(60), || {
        site.points("disk").into_iter().find(|p| p.lsn.epoch > before.epoch)
    });
    let agent = site.agent_status().expect("the agent runs");
    let sent = agent.volumes[0].raw_bytes;
    site.assert_point_equals("disk", "after", &image);
    assert!((3 << 20..16 << 20).contains(&sent), "{sent} bytes were sent for 3 MiB that differ");
}

#[test]
fn a_seeded_replica_gets_what_differs_and_has_no_point_before_everything_was_compared() {
    let site = Site::new();
    let _daemons = site.start_all();
    let image = site.root().join("disk.img");
    let mut bytes = vec![0; usize::try_from(SIZE).expect("size")];
    std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)).expect("bytes");
    std::fs::write(&image, &bytes).expect("image");
    // What was carried to the target is older: one percent has changed since.
    let seed = site.root().join("carried.img");
    for place in [0, 20, 63] {
        bytes[place << 20..(place << 20) + (200 << 10)].fill(7);
    }
    std::fs::write(&seed, &bytes).expect("seed");
    let (seed, path) = (seed.to_str().expect("UTF-8"), image.to_str().expect("UTF-8"));
    let told = site.cli(&["target", "seed", seed, "--host", "test-host", "--name", "disk"]);
    assert!(told.contains("will begin with 64 MiB"), "{told}");

    let later = run("date", &["-d", "2 days", "+%Y-%m-%d 12:30"]);
    let later = String::from_utf8(later.stdout).expect("UTF-8");
    let how = ["--policy", "300ms", "--attach", "socket", "--seeded", "--start-at", later.trim()];
    site.cli(&[&["protect", path, "--name", "disk"][..], &how].concat());
    wait_for("the replica", Duration::from_secs(60), || {
        site.replica("disk").filter(|r| r.connected)
    });
    assert!(site.points("disk").is_empty());
    assert!(!site.try_cli(&["failover", "test", "disk", "--point", "latest"]).status.success());
    let out = site.try_cli(&["target", "seed", seed, "--host", "test-host", "--name", "disk"]);
    assert!(said(&out).contains("FS-6533"), "{}", said(&out));

    site.cli(&["resync", "disk", "--yes", "--wait"]);
    site.wait_protected("disk");
    site.assert_point_equals("disk", "seeded", &image);
    let sent = site.agent_status().expect("the agent runs").volumes[0].raw_bytes;
    assert!((600 << 10..4 << 20).contains(&sent), "{sent} bytes were sent for 600 KiB that differ");
}

#[test]
fn a_seed_of_another_size_or_host_is_not_used_and_everything_is_sent() {
    let site = Site::new();
    let _daemons = site.start_all();
    let seed = site.root().join("carried.img");
    std::fs::write(&seed, vec![7; 8 << 20]).expect("seed");
    let seed = seed.to_str().expect("UTF-8");
    site.cli(&["target", "seed", seed, "--host", "test-host", "--name", "large"]);
    site.cli(&["target", "seed", seed, "--host", "another", "--name", "small"]);
    for (name, bytes) in [("large", SIZE), ("small", 8 << 20)] {
        let (image, uri) = site.protect(name, bytes, "300ms");
        run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'q' * 3145728, 1 << 20)\nh.flush()"]);
        site.wait_protected(name);
        let point = site.tag_when_ordered(name, "equal");
        let view = site.open(name, PointChoice::Id(point.point));
        assert_same_bytes(&image, &site.fetch_view(&view, "view.img"), "source and point differ");
        site.close(&view);
        std::fs::remove_file(site.root().join("view.img")).expect("removed");
    }
    let told = site.cli(&["event", "list", "--limit", "50"]);
    assert!(told.contains("FS-6532") && told.contains("67108864"), "{told}");
}

#[test]
fn a_verify_raises_no_false_alarm_and_finds_exactly_what_differs() {
    let site = Site::new();
    let _daemons = site.start_all();
    let (image, uri) = site.protect("disk", SIZE, "1s");
    fill(&uri);
    site.wait_protected("disk");
    let load = Load::start(&uri, &LOAD);
    for _ in 0..3 {
        let told = site.cli(&["verify", "disk", "--rate", "0", "--wait"]);
        assert!(told.contains("64 MiB compared"), "{told}");
    }
    load.stop();

    // Behind the back of filterd: what only a comparison can find.
    let file = OpenOptions::new().write(true).open(&image).expect("image");
    file.write_all_at(&[0xEE; 512], 37 << 20).expect("write");
    let out = site.try_cli(&["verify", "disk", "--rate", "0", "--wait"]);
    let told = said(&out);
    assert_eq!(out.status.code(), Some(1), "{told}");
    assert!(told.contains("FS-3120"), "{told}");
    assert!(told.contains(&format!("at bytes {}+262144", 37 << 20)), "{told}");

    let told = site.cli(&["resync", "disk", "--yes", "--wait"]);
    assert!(told.contains("equal to it again"), "{told}");
    site.assert_point_equals("disk", "repaired", &image);
    site.cli(&["verify", "disk", "--rate", "0", "--wait"]);
}

#[test]
fn a_first_copy_ends_while_a_guest_writes_without_a_pause() {
    let site = Site::new();
    let _daemons = site.start_all();
    let image = site.root().join("disk.img");
    std::fs::write(&image, vec![7; usize::try_from(SIZE).expect("size")]).expect("image");
    let later = run("date", &["-d", "2 days", "+%Y-%m-%d 12:30"]);
    let later = String::from_utf8(later.stdout).expect("UTF-8");
    let how = ["--policy", "300ms", "--attach", "socket", "--start-at", later.trim()];
    let path = image.to_str().expect("UTF-8");
    site.cli(&[&["protect", path, "--name", "disk"][..], &how].concat());
    let load = Load::start(&site.nbd_uri("disk"), &LOAD);
    let writes = || {
        let status: serde_json::Value =
            serde_json::from_str(&site.cli(&["status", "--json"])).ok()?;
        status["volumes"][0]["writes"].as_u64()
    };
    wait_for("the guest to write", Duration::from_secs(30), || writes().filter(|n| *n > 100));
    site.cli(&["resync", "disk", "--yes", "--wait"]);
    wait_for("a point under load", Duration::from_secs(60), || {
        site.points("disk").into_iter().next()
    });
    load.stop();
    site.assert_point_equals("disk", "after", &image);
}

#[test]
fn a_verify_outlives_a_lost_link_and_a_killed_target() {
    let site = Site::new();
    let daemons = site.start_all();
    let (_, uri) = site.protect("disk", SIZE, "1s");
    fill(&uri);
    site.wait_protected("disk");
    site.cli(&["verify", "disk", "--rate", "16MiB"]);
    daemons.target.kill();
    let _target = site.start_target();
    let verify = wait_for("the verify to end", Duration::from_secs(90), || {
        let status = site.cli(&["status", "--json"]);
        let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
        let verify = status["volumes"][0]["verify"].clone();
        (verify["running"] == false).then_some(verify)
    });
    assert_eq!(verify["checked_bytes"], SIZE, "{verify}");
    assert_eq!(verify["differing_bytes"], 0, "{verify}");
}
