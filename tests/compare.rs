//! Comparing instead of sending: what a crash leaves, what a verify says, what a resync repairs.

mod harness;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use farshore_protocol::admin::PointChoice;
use harness::{Site, assert_same_bytes, run, said, wait_for};

const SIZE: u64 = 64 << 20;

/// Fills the volume with bytes that do not compress.
fn fill(uri: &str) {
    let script = "import os\nfor i in range(64): h.pwrite(os.urandom(1 << 20), i << 20)\nh.flush()";
    run("nbdsh", &["-u", uri, "-c", script]);
}

fn assert_point_equals(site: &Site, image: &Path, name: &str) {
    let point = site.tag("disk", name);
    let view = site.open("disk", PointChoice::Id(point.point));
    let copy = site.fetch_view(&view, &format!("{name}.img"));
    assert_same_bytes(image, &copy, "source and point differ");
    site.close(&view);
}

/// A guest that writes until it is dropped.
struct Load(Child);

impl Load {
    fn start(uri: &str) -> Self {
        let uri = format!("--uri={uri}");
        let how = ["--name=load", "--ioengine=nbd", "--direct=1", "--thread=1", "--time_based"];
        let what = ["--rw=randwrite", "--bsrange=4k-64k", "--size=64m", "--iodepth=8"];
        let mut fio = Command::new("fio");
        fio.args(how).args(what).args(["--runtime=600", "--rate=16m", &uri]);
        Self(fio.stdout(Stdio::null()).spawn().expect("fio"))
    }

    fn stop(mut self) {
        assert!(self.0.try_wait().expect("fio").is_none(), "the guest had an error");
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.kill().and_then(|()| self.0.wait()).ok();
    }
}

#[test]
fn after_a_crash_only_what_differs_is_sent() {
    let site = Site::new();
    let daemons = site.start_all();
    let (image, uri) = site.protect("disk", SIZE, "1s");
    fill(&uri);
    site.wait_protected("disk");
    assert_point_equals(&site, &image, "filled");
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
    assert_point_equals(&site, &image, "after");
    assert!((3 << 20..16 << 20).contains(&sent), "{sent} bytes were sent for 3 MiB that differ");
}

#[test]
fn a_verify_raises_no_false_alarm_and_finds_exactly_what_differs() {
    let site = Site::new();
    let _daemons = site.start_all();
    let (image, uri) = site.protect("disk", SIZE, "1s");
    fill(&uri);
    site.wait_protected("disk");
    let load = Load::start(&uri);
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
    assert_point_equals(&site, &image, "repaired");
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
    let load = Load::start(&site.nbd_uri("disk"));
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
    assert_point_equals(&site, &image, "after");
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
