//! Copies that wait: for the start time of a first copy, and for the window of a large resync.

mod harness;

use std::path::PathBuf;
use std::time::Duration;

use farshore_blkfilter::control::{Client, CopyWait, ProtectRequest, VolumeStatus};
use farshore_extent::{CaptureOrder, VolumeName, WallTime};
use harness::{Site, run, said, wait_for};

const SIZE: u64 = 64 << 20;
const LONG: Duration = Duration::from_secs(60);
const SECOND: i64 = 1_000_000_000;

fn image(site: &Site) -> PathBuf {
    let image = site.root().join("disk.img");
    std::fs::File::create(&image).and_then(|f| f.set_len(SIZE)).expect("image");
    image
}

/// Half past some hour, the day after tomorrow: far enough for every test.
fn far() -> String {
    let out = run("date", &["-d", "2 days", "+%Y-%m-%d 12:30"]);
    String::from_utf8(out.stdout).expect("UTF-8").trim().to_owned()
}

fn filterd(site: &Site) -> Client {
    Client::connect(&site.paths.filterd_socket()).expect("filterd answers")
}

fn volume(site: &Site) -> VolumeStatus {
    filterd(site).list().expect("volumes").into_iter().next().expect("a volume")
}

fn write(site: &Site, byte: char, mebibytes: u64, at: u64) {
    let uri = site.nbd_uri("disk");
    let script = format!("h.pwrite(b'{byte}' * (1 << 20), (i + {at}) << 20)");
    let script = format!("for i in range({mebibytes}): {script}\nh.flush()");
    run("nbdsh", &["-u", &uri, "-c", &script]);
}

#[test]
fn a_first_copy_waits_for_its_start_time_over_restarts_and_can_be_started_earlier() {
    let site = Site::new();
    let daemons = site.start_all();
    let (image, start) = (image(&site), far());
    let path = image.to_str().expect("UTF-8");
    let base = ["protect", path, "--name", "disk", "--policy", "300ms", "--attach", "socket"];
    let out = site.try_cli(&[&base[..], &["--start-at", "22:40"]].concat());
    assert_eq!(out.status.code(), Some(2), "{}", said(&out));
    assert!(said(&out).contains("22:30") && said(&out).contains("23:00"), "{}", said(&out));

    let told = site.cli(&[&base[..], &["--start-at", &start]].concat());
    assert!(told.contains(&format!("starts at {start}")), "{told}");
    write(&site, 'a', 8, 0);
    daemons.filterd.stop();
    daemons.agent.kill();
    let _again = (site.start_filterd(), site.start_agent());
    write(&site, 'b', 8, 4);

    let waiting = volume(&site);
    assert_eq!(waiting.copy_waits.map(|w| w.wait), Some(CopyWait::StartTime));
    assert_eq!(waiting.copy.remaining_bytes, SIZE, "the guest writes, and nothing is copied");
    let told = site.cli(&["status"]);
    assert!(told.contains(&format!("copy of disk starts at {start}")), "{told}");
    assert!(told.contains("farshore resync disk"), "{told}");
    wait_for("the target to know the volume", LONG, || site.replica("disk"));
    assert!(site.points("disk").is_empty(), "there is nothing to open yet");

    site.cli(&["resync", "disk", "--yes", "--wait"]);
    assert_eq!(volume(&site).copy_waits, None);
    site.assert_point_equals("disk", "early", &image);
}

#[test]
fn a_first_copy_starts_by_itself_at_its_time() {
    let site = Site::new();
    let _daemons = site.start_all();
    let image = image(&site);
    let start = WallTime::from_nanos(WallTime::now().nanos() + 3 * SECOND);
    let request = ProtectRequest {
        name: VolumeName::new("disk").expect("name"),
        backing: image.clone(),
        attach: Some(farshore_blkfilter::control::AttachKind::Socket),
        nbd_socket: None,
        pool_bytes: None,
        point_interval_ms: Some(300),
        seeded: false,
        copy_at: Some(start),
    };
    filterd(&site).protect(request).expect("protected");
    write(&site, 'a', 8, 0);
    site.wait_protected("disk");
    assert!(WallTime::now() >= start, "it started too early");
    site.assert_point_equals("disk", "in-time", &image);
}

#[test]
fn what_the_change_log_had_no_room_for_waits_for_the_window_and_starts_by_hand() {
    let site = Site::new();
    // One minute at the other side of the clock, on every day.
    let hour = run("date", &["-d", "12 hours", "+%H"]);
    let hour = String::from_utf8(hour.stdout).expect("UTF-8");
    let hour = hour.trim();
    let file = format!(
        "pool = \"8MiB\"\nresync_window = \"{hour}:30-{hour}:31\"\nresync_at_once = \"16MiB\"\n"
    );
    std::fs::create_dir_all(&site.paths.etc).expect("folder");
    std::fs::write(site.paths.etc.join("filterd.toml"), file).expect("configuration");
    let daemons = site.start_all();
    let image = image(&site);
    let content = vec![b'a'; usize::try_from(SIZE).expect("size")];
    std::fs::write(&image, content).expect("content");
    site.protect_image("disk", &image, "300ms");
    site.wait_protected("disk");

    // Little: the pool is full, and what is not in it goes as soon as the agent is back.
    daemons.agent.kill();
    write(&site, 'b', 12, 0);
    assert_eq!(volume(&site).order, CaptureOrder::CatchUp);
    let agent = site.start_agent();
    site.assert_point_equals("disk", "little", &image);

    // Much: it waits, and the guest writes on.
    agent.kill();
    write(&site, 'c', 40, 8);
    let waits = wait_for("the copy to wait", LONG, || volume(&site).copy_waits);
    let mut agent = Some(site.start_agent());
    assert_eq!(waits.wait, CopyWait::Window);
    assert!(waits.starts > WallTime::now());
    write(&site, 'd', 8, 2);
    daemons.filterd.stop();
    let filterd = site.start_filterd();
    assert_eq!(volume(&site).copy_waits.map(|w| w.wait), Some(CopyWait::Window), "a restart");
    filterd.kill();
    drop(agent.take());
    let _again = (site.start_filterd(), site.start_agent());
    assert_eq!(volume(&site).copy_waits.map(|w| w.wait), Some(CopyWait::Window), "a crash");
    write(&site, 'e', 4, 30);
    let told = site.cli(&["status"]);
    assert!(told.contains("resync-window is not open"), "{told}");
    let tagged = site.try_cli(&["point", "tag", "disk", "--name", "early"]);
    assert!(!tagged.status.success(), "no order, no point: {}", said(&tagged));

    site.cli(&["resync", "disk", "--yes", "--wait"]);
    assert_eq!(volume(&site).copy_waits, None);
    site.assert_point_equals("disk", "much", &image);
}
