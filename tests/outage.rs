//! The target is away while a ledger workload runs: the guest never notices, changes are spooled in
//! order, and every point of the outage arrives afterwards and is right. When the spool cannot take
//! more, order is given up, is said to be, and comes back.

mod harness;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use farshore::disk::Place;
use farshore::ledger::{Bounds, Instant, Ledger, Running, Workload};
use farshore::nbd_client::NbdClient;
use farshore_blkfilter::control::{Client, MarkerPlaced, MarkerRequest};
use farshore_extent::{CaptureOrder, GroupId, MarkerId, PairState, PointKind, WallTime};
use farshore_protocol::admin::{AgentVolume, PointChoice, PointInfo, SpoolLevel, ViewInfo};
use harness::{Site, assert_same_bytes, pause, run, said, wait_for};

const SIZE: u64 = 32 << 20;
const MIB: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(90);

/// Protects an empty disk with the smallest pool, so that an outage does not have to be long.
fn protect(site: &Site) -> std::path::PathBuf {
    let image = site.root().join("disk.img");
    std::fs::File::create(&image).and_then(|f| f.set_len(SIZE)).expect("image");
    let path = image.to_str().expect("UTF-8");
    let how = ["--policy", "300ms", "--pool", "8MiB", "--attach", "socket", "--yes"];
    site.cli(&[&["protect", path, "--name", "disk"][..], &how].concat());
    site.wait_protected("disk");
    image
}

fn load(site: &Site, bytes_per_second: u64) -> (Arc<Ledger>, Running) {
    load_at(site, SIZE, bytes_per_second)
}

/// Writes to the first `len` bytes.
fn load_at(site: &Site, len: u64, bytes_per_second: u64) -> (Arc<Ledger>, Running) {
    let ledger = Arc::new(Ledger::new(0, len));
    let workload = Workload {
        place: Place::Nbd { socket: site.paths.run.join("nbd/disk.sock"), export: "disk".into() },
        writers: 2,
        depth: 8,
        bytes_per_second,
        seed: 7,
    };
    let running = workload.start(&ledger).expect("the workload starts");
    (ledger, running)
}

fn volume(site: &Site) -> Option<AgentVolume> {
    site.agent_status()?.volumes.into_iter().find(|v| v.name.as_str() == "disk")
}

fn wait_level(site: &Site, level: SpoolLevel) -> AgentVolume {
    let there = || volume(site).filter(|v| v.spool.level == level);
    wait_for(&format!("the spool to be {level:?}\n{}", site.logs()), LONG, there)
}

/// Proves that these points are cuts of the ledger.
fn prove<'a>(site: &Site, ledger: &Ledger, points: impl Iterator<Item = &'a PointInfo>) -> usize {
    let mut proven = 0;
    for point in points {
        let view = site.open("disk", PointChoice::Id(point.point));
        prove_view(site, ledger, &view);
        proven += 1;
    }
    proven
}

/// Proves that the view is a cut of the ledger, and closes it.
fn prove_view(site: &Site, ledger: &Ledger, view: &ViewInfo) {
    let mut client = NbdClient::connect(&view.nbd_socket, &view.export).expect("it answers");
    let checked = ledger.check(|offset, to| client.read_at(offset, to), Bounds::ANY);
    if let Err(why) = checked {
        panic!("what is shown at {} is wrong: {why}\n{}", view.lsn, site.logs());
    }
    drop(client);
    site.close(view);
}

/// The newest state arrives and is what the source holds.
fn prove_end(site: &Site, ledger: &Ledger, image: &std::path::Path) {
    wait_for("the copy to end", LONG, || {
        site.replica("disk").filter(|r| r.connected && r.state == PairState::Protected)
    });
    // The target may not have heard yet that order was lost.
    wait_for("a point to be possible", LONG, || {
        let out = site.try_cli(&["point", "tag", "disk", "--name", "probe"]);
        out.status.success().then_some(())
    });
    let end = site.tag("disk", "end");
    let view = site.open("disk", PointChoice::Id(end.point));
    let mut client = NbdClient::connect(&view.nbd_socket, &view.export).expect("it answers");
    let bounds = Bounds { not_before: ledger.now(), not_after: Instant::NEVER };
    let checked = ledger.check(|offset, to| client.read_at(offset, to), bounds);
    assert!(checked.is_ok(), "the end is wrong: {checked:?}\n{}", site.logs());
    drop(client);
    let copy = site.fetch_view(&view, "end.img");
    assert_same_bytes(image, &copy, "source and the last point differ");
}

#[test]
fn points_of_an_outage_arrive_afterwards_and_are_right() {
    let site = Site::new();
    let harness::Daemons { target, filterd: _filterd, agent } = site.start_all();
    let image = protect(&site);
    let (ledger, running) = load(&site, 4 * MIB);
    let before = site.tag("disk", "before");
    target.kill();
    wait_level(&site, SpoolLevel::Spooling);
    // The agent is killed during the outage: what it spooled stays, what it did not is in the pool.
    wait_for("the spool to hold twice the pool", LONG, || {
        volume(&site).filter(|v| v.spool.bytes > 16 * MIB)
    });
    agent.kill();
    let _agent = site.start_agent();
    wait_for("the spool to go on after the restart", LONG, || {
        volume(&site).filter(|v| v.spool.bytes > 24 * MIB)
    });
    assert!(!running.broken(), "the guest got an error\n{}", site.logs());
    let _target = site.start_target();
    wait_for(&format!("the spool to be sent\n{}", site.logs()), LONG, || {
        volume(&site).filter(|v| v.spool.bytes == 0 && v.spool.level == SpoolLevel::Direct)
    });
    let after = site.tag("disk", "after");
    let stats = running.finish().expect("no write failed");
    assert_eq!(stats.errors, 0);
    let inside = |p: &&PointInfo| p.lsn > before.lsn && p.lsn < after.lsn;
    let points = site.points("disk");
    let times: Vec<_> = points.iter().filter(inside).map(|p| p.time).collect();
    let (mut low, mut high) = (before.time, after.time);
    (low, high) = (low.min(high), low.max(high));
    let mut row: Vec<_> = times.iter().copied().chain([low, high]).collect();
    row.sort_unstable();
    let gap = row.windows(2).map(|w| w[1].since(w[0])).max().unwrap_or_default();
    assert!(
        gap < Duration::from_secs(8),
        "points are missing: {gap:?} without one\n{}",
        site.logs()
    );
    let step = (times.len() / 10).max(1);
    let proven = prove(&site, &ledger, points.iter().filter(inside).step_by(step));
    assert!(proven >= 8, "{proven} of {} points were proven", times.len());
    prove_end(&site, &ledger, &image);
}

#[test]
fn a_full_spool_gives_up_order_says_so_and_points_come_back() {
    let site = Site::new();
    let harness::Daemons { target, filterd: _filterd, agent } = site.start_all();
    let image = protect(&site);
    assert!(agent.stop().success());
    let file = site.paths.etc.join("agent.toml");
    // Too small to merge anything in it.
    std::fs::write(&file, "spool_max = \"4MiB\"\n").expect("agent.toml");
    let agent = site.start_agent();
    let (ledger, running) = load(&site, 6 * MIB);
    let before = site.tag("disk", "before");
    target.kill();
    let full = wait_level(&site, SpoolLevel::Full);
    assert_eq!(full.problem.map(|p| p.code.0), Some(5212));
    pause(Duration::from_secs(3));
    assert!(!running.broken(), "the guest got an error\n{}", site.logs());
    let _target = site.start_target();
    wait_for("order to be restored", LONG, || {
        site.points("disk")
            .into_iter()
            .max_by_key(|p| p.lsn)
            .filter(|p| p.lsn > before.lsn && volume(&site).is_some_and(|v| v.spool.bytes == 0))
    });
    let stats = running.finish().expect("no write failed");
    assert_eq!(stats.errors, 0);
    let points = site.points("disk");
    let step = (points.len() / 8).max(1);
    prove(&site, &ledger, points.iter().filter(|p| p.lsn >= before.lsn).step_by(step));
    prove_end(&site, &ledger, &image);
    // What happened is told afterwards, also by an agent that was started since.
    agent.kill();
    let _agent = site.start_agent();
    let told = wait_for("the agent's events", LONG, || {
        let out = site.try_cli(&["event", "list", "--limit", "0"]);
        let told = harness::said(&out);
        (out.status.success() && told.contains("protected here")).then_some(told)
    });
    for what in ["FS-5212", "FS-3103", "changes go to the spool", "in order: points are cut"] {
        assert!(told.contains(what), "{what} is not in\n{told}");
    }
}

fn filterd(site: &Site) -> Client {
    Client::connect(&site.paths.filterd_socket()).expect("filterd answers")
}

/// Whether `filterd` has captured every change in order.
fn captured_in_order(site: &Site) -> bool {
    let volumes = filterd(site).list().expect("filterd lists its volumes");
    volumes.iter().all(|v| v.order == CaptureOrder::Ordered)
}

/// Cuts a named point as an agent does.
fn name_a_point(site: &Site, name: &str) -> MarkerPlaced {
    let request = MarkerRequest {
        marker: MarkerId::random(),
        volumes: Vec::new(),
        kind: PointKind::Crash,
        group: GroupId::NIL,
        name: name.into(),
        pending: false,
    };
    filterd(site).marker(request).expect("the marker is cut")
}

#[test]
fn points_are_merged_before_the_spool_is_full_and_order_is_kept() {
    const LIMIT: u64 = 48 * MIB;
    let site = Site::new();
    let harness::Daemons { target, filterd: _filterd, agent } = site.start_all();
    let image = protect(&site);
    assert!(agent.stop().success());
    std::fs::write(site.paths.etc.join("agent.toml"), "spool_max = \"48MiB\"\n")
        .expect("agent.toml");
    let agent = site.start_agent();
    // The same four MiB again and again: what they hold fits, what happened to them does not.
    let (ledger, running) = load_at(&site, 4 * MIB, 5 * MIB);
    let before = site.tag("disk", "before");
    target.kill();
    let merged = |v: &AgentVolume| v.spool.merged.is_some();
    wait_for(&format!("points to be merged\n{}", site.logs()), LONG, || {
        volume(&site).filter(merged)
    });
    let named = name_a_point(&site, "named");
    // The agent is killed while it merges; what it had merged stays.
    agent.kill();
    let _agent = site.start_agent();
    let since = running.bytes.load(Ordering::Relaxed);
    let told = wait_for("all the room to be written once more", 2 * LONG, || {
        let written = running.bytes.load(Ordering::Relaxed) - since;
        volume(&site).filter(|v| merged(v) && written > LIMIT)
    });
    let problem = told.spool.problem.expect("it is told");
    assert_eq!(problem.code.0, 5215, "{problem:?}\n{}", site.logs());
    assert!(told.spool.bytes <= LIMIT, "{} bytes are spooled", told.spool.bytes);
    assert!(captured_in_order(&site), "order was given up\n{}", site.logs());
    let _target = site.start_target();
    wait_for("the spool to be sent", LONG, || volume(&site).filter(|v| v.spool.bytes == 0));
    assert!(captured_in_order(&site), "order was given up\n{}", site.logs());
    let after = site.tag("disk", "after");
    let stats = running.finish().expect("no write failed");
    assert_eq!(stats.errors, 0);

    let points = site.points("disk");
    let inside: Vec<_> =
        points.iter().filter(|p| p.lsn > before.lsn && p.lsn < after.lsn).collect();
    assert!(inside.iter().any(|p| p.lsn == named.lsn), "a named point is gone\n{}", site.logs());
    let step = (inside.len() / 10).max(1);
    let proven = prove(&site, &ledger, inside.iter().copied().step_by(step));
    assert!(proven >= 3, "{proven} of {} points were proven\n{}", inside.len(), site.logs());
    // Any moment is refused, as part of a merged stretch, or shown as it was.
    let mut refused = 0;
    for part in 1..20i64 {
        let nanos = (after.time.nanos() - before.time.nanos()) / 20 * part;
        let time = WallTime::from_nanos(before.time.nanos() + nanos);
        match site.try_open("disk", PointChoice::Time(time)) {
            Ok(view) => prove_view(&site, &ledger, &view),
            Err(problem) => {
                assert_eq!(problem.code.0, 6012, "{problem:?}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0, "nothing is refused, {} points\n{}", inside.len(), site.logs());
    prove_end(&site, &ledger, &image);
}

#[test]
fn a_spool_that_cannot_be_written_is_told_and_the_guest_does_not_notice() {
    let site = Site::new();
    let harness::Daemons { target, filterd: _filterd, agent } = site.start_all();
    let image = protect(&site);
    assert!(agent.stop().success());
    let nowhere = site.root().join("nowhere");
    std::fs::write(&nowhere, "a file, not a folder").expect("file");
    let text = format!("spool_dir = \"{}\"\n", nowhere.display());
    std::fs::write(site.paths.etc.join("agent.toml"), text).expect("agent.toml");
    let _agent = site.start_agent();
    let (ledger, running) = load(&site, 6 * MIB);
    target.kill();
    let failed = wait_level(&site, SpoolLevel::Failed);
    assert_eq!(failed.problem.map(|p| p.code.0), Some(5211));
    pause(Duration::from_secs(2));
    let _target = site.start_target();
    let stats = running.finish().expect("no write failed");
    assert_eq!(stats.errors, 0);
    prove_end(&site, &ledger, &image);
}

/// The folders of spools.
fn spools(site: &Site) -> Vec<std::path::PathBuf> {
    let all = std::fs::read_dir(site.paths.state.join("agent/spool")).into_iter().flatten();
    all.flatten().map(|entry| entry.path()).collect()
}

fn move_file(from: &std::path::Path, to: &std::path::Path) {
    harness::run("mv", &[from.to_str().expect("UTF-8"), to.to_str().expect("UTF-8")]);
}

/// What was written while the target is away lies in the spool.
fn fill_the_spool(site: &Site, target: harness::Daemon) {
    let (_, running) = load(site, 4 * MIB);
    target.kill();
    wait_for("something in the spool", LONG, || volume(site).filter(|v| v.spool.bytes > MIB));
    running.finish().expect("no write failed");
}

#[test]
fn a_spool_goes_away_with_its_volume_and_not_with_its_disk() {
    let site = Site::new();
    let harness::Daemons { target, filterd, agent: _agent } = site.start_all();
    let image = protect(&site);
    fill_the_spool(&site, target);
    assert!(filterd.stop().success());
    let away = image.with_extension("away");
    move_file(&image, &away);
    let _filterd = site.start_filterd();
    let gone = |site: &Site| volume(site).is_none().then_some(());
    wait_for("the agent to see that the volume is not attached", LONG, || gone(&site));
    // What the thread of the volume still had in hand is written first.
    pause(Duration::from_secs(3));
    let [spool] = spools(&site).try_into().expect("one spool");
    assert!(std::fs::read_dir(&spool).expect("it is there").count() > 0, "{}", site.logs());
    move_file(&away, &image);
    wait_for("the volume and its spool", LONG, || volume(&site).filter(|v| v.spool.bytes > 0));
    site.cli(&["unprotect", "disk", "--yes"]);
    wait_for("the spool to be removed", LONG, || spools(&site).is_empty().then_some(()));
    let told = || site.logs().contains("the spool was removed").then_some(());
    wait_for("the log to tell of it", LONG, told);
}

#[test]
fn a_spool_whose_volume_was_unprotected_meanwhile_goes_when_the_agent_starts() {
    let site = Site::new();
    let harness::Daemons { target, filterd: _filterd, agent } = site.start_all();
    protect(&site);
    site.protect("other", MIB, "1s");
    fill_the_spool(&site, target);
    assert!(agent.stop().success());
    site.cli(&["unprotect", "disk", "--yes"]);
    let _agent = site.start_agent();
    let left = || (spools(&site).len() == 1).then_some(());
    wait_for("the spool of the volume that is gone to be removed", LONG, left);
    let told = || site.logs().contains("the spool was removed").then_some(());
    wait_for("the log to tell of it", LONG, told);
}

#[test]
fn a_throttled_writer_waits_a_bounded_time_and_only_while_the_pool_is_nearly_full() {
    let site = Site::new();
    std::fs::create_dir_all(&site.paths.etc).expect("folder");
    let file = site.paths.etc.join("filterd.toml");
    std::fs::write(file, "throttle = \"50ms\"\n").expect("configuration");
    let daemons = site.start_all();
    let image = protect(&site);
    let throttle = || {
        let mut filterd = Client::connect(&site.paths.filterd_socket()).expect("filterd answers");
        let volume = filterd.list().expect("volumes").into_iter().next().expect("a volume");
        let throttle = volume.throttle.expect("it is on");
        (throttle.delay_ms, throttle.writes)
    };
    let write = |count: u64, at: u64| {
        let step = format!("t = time.time(); h.pwrite(b'w' * 65536, ({at} + i) * 65536)");
        let script = format!(
            "import time\nw = 0\nfor i in range({count}): {step}; w = max(w, time.time() - t)\nprint(w)"
        );
        let out = run("nbdsh", &["-u", &site.nbd_uri("disk"), "-c", &script]);
        let told = String::from_utf8(out.stdout).expect("UTF-8");
        told.trim().parse::<f64>().expect("seconds")
    };
    daemons.agent.kill();
    write(80, 0);
    assert_eq!(throttle(), (0, 0), "5 MiB of a pool of 8: there is room");
    let longest = write(40, 80);
    let (delay, writes) = throttle();
    assert!((1..=50).contains(&delay), "{delay} ms");
    assert!((16..40).contains(&writes), "{writes} of 40 writes waited");
    assert!((0.001..5.0).contains(&longest), "one write took {longest} s");
    let told = said(&site.try_cli(&["status"]));
    assert!(told.contains("each write waits") && told.contains("at most 50"), "{told}");

    let _agent = site.start_agent();
    wait_for("room in the pool", LONG, || (throttle().0 == 0).then_some(()));
    let point = site.tag_when_ordered("disk", "after");
    let view = site.open("disk", PointChoice::Id(point.point));
    let copy = site.fetch_view(&view, "after.img");
    assert_same_bytes(&image, &copy, "source and point differ");
    site.close(&view);
    assert_eq!(site.replica("disk").map(|r| r.order), Some(CaptureOrder::Ordered));
}
