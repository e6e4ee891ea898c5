//! Agent and target are killed with SIGKILL at random moments while a ledger workload runs: nothing
//! that was acknowledged is lost, every point is a consistent cut, and the guest never notices.
//! `FARSHORE_KILLS` sets how often (10 in CI, 200 in the soak run).

mod harness;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use farshore::disk::Place;
use farshore::ledger::{Bounds, Instant, Ledger, Workload};
use farshore::nbd_client::NbdClient;
use farshore_blkfilter::control::Client;
use farshore_blkfilter::volume_state::{FileMedium, Found, Left, StateFile, Stored};
use farshore_extent::PointId;
use farshore_protocol::admin::PointChoice;
use harness::{Site, assert_same_bytes, chance, kills, pause, wait_for};

const SIZE: u64 = 32 << 20;
/// Opens the point and proves that it is a cut of the ledger within the bounds.
fn prove(site: &Site, ledger: &Ledger, point: PointId, bounds: Bounds) {
    let view = site.open("disk", PointChoice::Id(point));
    let mut client = NbdClient::connect(&view.nbd_socket, &view.export).expect("the view answers");
    let checked = ledger.check(|offset, to| client.read_at(offset, to), bounds);
    if let Err(why) = checked {
        panic!("{point} at {} is wrong: {why}\n{}", view.lsn, site.logs());
    }
    drop(client);
    site.close(&view);
}

#[test]
fn kill_9_of_agent_and_target_under_load_loses_nothing_and_no_point_is_wrong() {
    let site = Site::new();
    let harness::Daemons { target, filterd: _filterd, agent } = site.start_all();
    let (image, _) = site.protect("disk", SIZE, "200ms");
    site.wait_protected("disk");
    let ledger = Arc::new(Ledger::new(0, SIZE));
    let workload = Workload {
        place: Place::Nbd { socket: site.paths.run.join("nbd/disk.sock"), export: "disk".into() },
        writers: 2,
        depth: 8,
        bytes_per_second: 12 << 20,
        seed: 1,
    };
    let running = workload.start(&ledger).expect("the workload starts");

    let (mut target, mut agent) = (Some(target), Some(agent));
    let mut dice = 0x5eed;
    let mut named: BTreeMap<PointId, Bounds> = BTreeMap::new();
    let mut acknowledged = site.replica("disk").expect("replica").journaled;
    for round in 0..kills() {
        pause(Duration::from_millis(50 + chance(&mut dice, 700)));
        if chance(&mut dice, 2) == 0 {
            agent.take().expect("it runs").kill();
            pause(Duration::from_millis(chance(&mut dice, 300)));
            agent = Some(site.start_agent());
        } else {
            if let Some(replica) = site.replica("disk") {
                acknowledged = acknowledged.max(replica.journaled);
            }
            target.take().expect("it runs").kill();
            pause(Duration::from_millis(chance(&mut dice, 300)));
            target = Some(site.start_target());
            let now = site.replica("disk").expect("the replica is there after a restart").journaled;
            assert!(now >= acknowledged, "{acknowledged} was durable, now only {now} is");
        }
        assert!(!running.broken(), "the guest got an error in round {round}\n{}", site.logs());
        if round % 3 == 2 {
            let not_before = ledger.now();
            let point = site.tag("disk", &format!("round-{round}"));
            let not_after = ledger.now();
            named.insert(point.point, Bounds { not_before, not_after });
        }
    }

    let stats = running.finish().expect("no write failed");
    assert_eq!(stats.errors, 0);
    assert!(stats.writes > 500, "there was load: {} writes", stats.writes);
    let end = site.tag("disk", "end");
    named.insert(end.point, Bounds { not_before: ledger.now(), not_after: Instant::NEVER });
    let points = site.points("disk");
    assert!(points.len() > named.len(), "points by the policy were cut as well");
    for (point, bounds) in &named {
        prove(&site, &ledger, *point, *bounds);
    }
    // Of the others some, spread over the whole run.
    let step = (points.len() / 12).max(1);
    for point in points.iter().step_by(step) {
        prove(&site, &ledger, point.point, Bounds::ANY);
    }
    let view = site.open("disk", PointChoice::Id(end.point));
    let copy = site.fetch_view(&view, "end.img");
    assert_same_bytes(&image, &copy, "source and the last point differ");
}

/// Regions that the state files of filterd below `root` say may differ; none: they say nothing.
fn regions_that_may_differ(site: &Site) -> Option<u64> {
    let volumes = site.paths.state.join("filterd/volumes");
    let entry = std::fs::read_dir(volumes)
        .ok()?
        .flatten()
        .find(|entry| entry.path().extension().is_some_and(|end| end == "state"))?;
    let stem = entry.path().file_stem()?.to_str()?.to_owned();
    let medium = FileMedium::new(entry.path().parent()?, &stem);
    match StateFile::new(medium).load(stem.parse().ok()?) {
        Found::Stored(Stored { left: Left::Regions { set, .. }, .. }) => Some(set.count()),
        Found::Stored(_) | Found::Nothing | Found::Damaged(_) => None,
    }
}

#[test]
fn kill_9_of_filterd_under_load_sends_only_what_may_differ() {
    // 256 regions, of which the load writes four.
    const LARGE: u64 = 4 << 30;
    let site = Site::new();
    let harness::Daemons { target: _target, filterd, agent: _agent } = site.start_all();
    let (image, _) = site.protect("disk", LARGE, "200ms");
    site.wait_protected("disk");
    wait_for("the copied regions to be cleared", Duration::from_secs(30), || {
        regions_that_may_differ(&site).filter(|set| *set == 0)
    });
    let before = site.tag("disk", "before");
    let ledger = Arc::new(Ledger::new(0, 64 << 20));
    let workload = Workload {
        place: Place::Nbd { socket: site.paths.run.join("nbd/disk.sock"), export: "disk".into() },
        writers: 2,
        depth: 8,
        bytes_per_second: 12 << 20,
        seed: 3,
    };
    let running = workload.start(&ledger).expect("the workload starts");
    pause(Duration::from_secs(1));
    filterd.kill();
    // Its clients lose their connection; that is what this test does to them.
    drop(running.finish());
    let set = regions_that_may_differ(&site).expect("the map is kept");
    assert!((1..=8).contains(&set), "{set} regions of 256 may differ");

    let _filterd = site.start_filterd();
    wait_for("order to be restored", Duration::from_secs(60), || {
        site.points("disk").into_iter().find(|p| p.lsn.epoch > before.lsn.epoch)
    });
    let mut client = Client::connect(&site.paths.filterd_socket()).expect("filterd answers");
    let copied = client.list().expect("list").remove(0).copy.total_bytes;
    assert!(copied > 0 && copied <= set * (16 << 20), "{copied} bytes were sent again");
    let end = site.tag("disk", "end");
    let view = site.open("disk", PointChoice::Id(end.point));
    let copy = site.fetch_view(&view, "end.img");
    assert_same_bytes(&image, &copy, "source and replica differ after a kill of filterd");
    site.close(&view);
    prove(&site, &ledger, before.point, Bounds::ANY);
}

#[test]
fn a_dead_agent_never_stalls_the_guest_and_everything_arrives_afterwards() {
    let site = Site::new();
    let daemons = site.start_all();
    // The smallest pool, so that it overflows soon.
    let image = site.root().join("disk.img");
    std::fs::File::create(&image).and_then(|f| f.set_len(SIZE)).expect("image");
    let path = image.to_str().expect("UTF-8");
    let how = ["--policy", "200ms", "--pool", "8MiB", "--attach", "socket", "--yes"];
    site.cli(&[&["protect", path, "--name", "disk"][..], &how].concat());
    site.wait_protected("disk");
    let before = site.tag("disk", "before");
    daemons.agent.kill();
    let ledger = Arc::new(Ledger::new(0, SIZE));
    let workload = Workload {
        place: Place::Nbd { socket: site.paths.run.join("nbd/disk.sock"), export: "disk".into() },
        writers: 1,
        depth: 8,
        bytes_per_second: 24 << 20,
        seed: 2,
    };
    let running = workload.start(&ledger).expect("the workload starts");
    let mut client = Client::connect(&site.paths.filterd_socket()).expect("filterd answers");
    let mut written = || client.list().expect("list").remove(0).written_bytes;
    let at_the_kill = written();
    wait_for("the guest to write twice what the pool holds", Duration::from_secs(60), || {
        assert!(!running.broken(), "the guest got an error\n{}", site.logs());
        (written() - at_the_kill > 16 << 20).then_some(())
    });
    running.finish().expect("no write failed while the agent was dead");
    let _agent = site.start_agent();
    wait_for("order to be restored", Duration::from_secs(60), || {
        site.points("disk").into_iter().find(|p| p.lsn > before.lsn)
    });
    let after = site.tag("disk", "after");
    prove(
        &site,
        &ledger,
        after.point,
        Bounds { not_before: ledger.now(), not_after: Instant::NEVER },
    );
    prove(&site, &ledger, before.point, Bounds { not_before: Instant(0), not_after: Instant(0) });
    let view = site.open("disk", PointChoice::Id(after.point));
    let copy = site.fetch_view(&view, "after.img");
    assert_same_bytes(&image, &copy, "source and point differ");
}
