//! Points from markers, and views of them read by real NBD clients.

use std::path::Path;
use std::process::Command;

use farshore_extent::{Lsn, PairState, PointKind, VolumeName};
use farshore_protocol::admin::{OpenView, PointChoice, TargetReply, TargetRequest, ViewInfo};
use farshore_protocol::message::FromTarget;

use crate::bed::{Bed, LONG};
use crate::connection::Connection;
use crate::source::{SIZE, Source};

/// A volume with three points and a write after each.
pub async fn replicated(bed: &Bed) -> (Source, Connection, [Lsn; 3]) {
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    source.write(0, 65_536, 1);
    let one = source.marker("", PointKind::Crash);
    source.write(4096, 8192, 2);
    source.ship(&mut connection).await;
    let two = source.marker("before-upgrade", PointKind::App);
    source.write(40_960, 512, 3);
    let three = source.marker("", PointKind::Crash);
    source.write(SIZE - 4096, 4096, 4);
    source.ship(&mut connection).await;
    (source, connection, [one, two, three])
}

fn name() -> VolumeName {
    VolumeName::new("pgdata").unwrap()
}

async fn points(bed: &Bed) -> Vec<Lsn> {
    let request = TargetRequest::Points { volume: name(), limit: 0 };
    match bed.ask(request).await {
        Ok(TargetReply::Points(points)) => points.into_iter().map(|p| p.lsn).collect(),
        other => panic!("{other:?}"),
    }
}

/// The rows are written just after the ack.
async fn wait_for_points(bed: &Bed, count: usize) {
    let there = async {
        while points(bed).await.len() < count {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LONG, there).await.unwrap();
}

async fn open(bed: &Bed, point: PointChoice, scratch_bytes: u64) -> ViewInfo {
    let request = OpenView { scratch_bytes, ..OpenView::new(name(), point) };
    match bed.ask(TargetRequest::OpenView(request)).await {
        Ok(TargetReply::View(view)) => *view,
        other => panic!("{other:?}"),
    }
}

pub async fn run(program: &str, arguments: Vec<String>) -> (bool, String) {
    let mut command = Command::new(program);
    // The system's Python has the nbd module, whatever another one in PATH has.
    command.args(arguments).env("PATH", "/usr/bin:/bin");
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

fn uri(view: &ViewInfo) -> String {
    format!("nbd+unix:///{}?socket={}", view.export, view.nbd_socket.display())
}

async fn content(view: &ViewInfo, dir: &Path) -> Vec<u8> {
    copy(view, &dir.join(format!("{}.img", view.view))).await
}

/// Everything that the view shows, read by nbdcopy into `file`.
pub async fn copy(view: &ViewInfo, file: &Path) -> Vec<u8> {
    let (ok, text) = run("nbdcopy", vec![uri(view), file.display().to_string()]).await;
    assert!(ok, "{text}");
    std::fs::read(file).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_point_and_every_moment_opens_as_exactly_what_the_source_was() {
    let mut bed = Bed::start().await;
    let (source, connection, [one, two, three]) = replicated(&bed).await;
    wait_for_points(&bed, 3).await;
    assert_eq!(points(&bed).await, [three, two, one]);
    // Also from what is found at a restart.
    drop(connection);
    bed.stop().await;
    bed.resume().await;
    assert_eq!(points(&bed).await, [three, two, one]);
    let mut views = Vec::new();
    for (choice, lsn) in [
        (PointChoice::Latest, three),
        (PointChoice::LatestApp, two),
        (PointChoice::Name("before-upgrade".into()), two),
        (PointChoice::At(one), one),
    ] {
        let view = open(&bed, choice, 0).await;
        assert_eq!(view.lsn, lsn);
        assert!(view.point.is_some());
        views.push((view, lsn));
    }
    for (lsn, (time, _)) in source.history.iter().skip(2) {
        let view = open(&bed, PointChoice::Time(*time), 0).await;
        assert_eq!((view.lsn, view.time), (*lsn, *time));
        views.push((view, *lsn));
    }
    for (view, lsn) in &views {
        assert!(content(view, bed.root()).await == source.history[lsn].1, "{lsn}");
    }
    let Ok(TargetReply::Views(listed)) = bed.ask(TargetRequest::Views).await else { panic!() };
    assert_eq!(listed.len(), views.len());
    for (view, _) in views {
        let request = TargetRequest::CloseView { view: view.view, note: "equal".into() };
        assert_eq!(bed.ask(request).await, Ok(TargetReply::Done));
        assert!(!view.nbd_socket.exists());
    }
    let Ok(TargetReply::Status(status)) = bed.ask(TargetRequest::Status).await else { panic!() };
    assert_eq!((status[0].views, status[0].last_drill.is_some()), (0, true));
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn views_are_writable_apart_from_each_other_and_from_replication() {
    let bed = Bed::start().await;
    let (mut source, mut connection, [one, ..]) = replicated(&bed).await;
    wait_for_points(&bed, 3).await;
    let (a, b) =
        (open(&bed, PointChoice::At(one), 8192).await, open(&bed, PointChoice::At(one), 0).await);
    let script = "h.pwrite(b'\\x77' * 8192, 12288)\nh.flush()\nh.zero(4096, 0)\n\
                  try:\n  h.pwrite(b'x' * 4096, 65536)\n  print('taken')\n\
                  except nbd.Error as e:\n  print(e.errno)";
    let (ok, text) = run("nbdsh", vec!["-u".into(), uri(&a), "-c".into(), script.into()]).await;
    assert!(ok && text.contains("ENOSPC"), "{text}");
    // Replication goes on under them.
    source.write(0, 65_536, 0xEE);
    source.ship(&mut connection).await;
    let mut expected = source.history[&one].1.clone();
    assert!(content(&b, bed.root()).await == expected, "the other view saw nothing of it");
    expected[12288..20480].fill(0x77);
    expected[..4096].fill(0);
    assert!(content(&a, bed.root()).await == expected);
    let Ok(TargetReply::Views(views)) = bed.ask(TargetRequest::Views).await else { panic!() };
    let used: Vec<u64> =
        views.iter().filter(|v| v.view == a.view).map(|v| v.scratch_used).collect();
    assert_eq!(used, [8192]);
}

#[tokio::test(flavor = "multi_thread")]
async fn places_that_were_never_a_state_of_the_volume_cannot_be_opened() {
    let bed = Bed::start_with(|config| config.limits.views = 1).await;
    let (mut source, mut connection, [one, ..]) = replicated(&bed).await;
    wait_for_points(&bed, 3).await;
    source.lose_order();
    let inside = source.write(0, 512, 9);
    let dropped = source.marker("never", PointKind::Crash);
    source.ship(&mut connection).await;
    for (choice, code) in [
        (PointChoice::At(inside), 6012),
        (PointChoice::At(dropped), 6012),
        (PointChoice::Name("never".into()), 6601),
        (PointChoice::Time(farshore_extent::WallTime::from_nanos(5)), 6601),
        (PointChoice::At(Lsn::new(one.epoch, farshore_extent::Seq::new(1 << 40))), 6011),
    ] {
        let request = OpenView::new(name(), choice);
        let refused = bed.ask(TargetRequest::OpenView(request)).await.unwrap_err();
        assert_eq!(refused.code.0, code, "{refused:?}");
    }
    let Ok(TargetReply::Status(status)) = bed.ask(TargetRequest::Status).await else { panic!() };
    assert_eq!((status[0].state, status[0].points), (PairState::CatchUp, 3), "old points stay");
    open(&bed, PointChoice::Latest, 0).await;
    let request = OpenView::new(name(), PointChoice::Latest);
    let refused = bed.ask(TargetRequest::OpenView(request)).await.unwrap_err();
    assert_eq!(refused.code.0, 6603, "one view is the limit here");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_returns_when_the_point_is_durable_here() {
    let bed = Bed::start().await;
    let (mut source, mut connection, _) = replicated(&bed).await;
    let request = TargetRequest::Tag {
        volumes: vec![name()],
        name: "release-7".into(),
        kind: PointKind::App,
    };
    let paths = bed.paths.clone();
    let asked = tokio::spawn(async move { crate::admin::ask(&paths, request).await.unwrap() });
    let Some(FromTarget::Tag { request, volumes, kind, name }) = connection.next().await else {
        panic!()
    };
    assert_eq!(volumes, [source.volume]);
    let lsn = source.marker(&name, kind);
    connection
        .send(&farshore_protocol::message::FromAgent::Tagged { request, result: Ok(lsn) })
        .await;
    source.ship(&mut connection).await;
    let Ok(TargetReply::Tagged(made)) = asked.await.unwrap() else { panic!() };
    assert_eq!((made.len(), made[0].lsn, made[0].name.as_str()), (1, lsn, "release-7"));
    assert_eq!(open(&bed, PointChoice::Id(made[0].point), 0).await.lsn, lsn);
    let piece = TargetRequest::PointsBefore { volume: self::name(), before: lsn, limit: 1 };
    let Ok(TargetReply::Points(older)) = bed.ask(piece).await else { panic!() };
    assert!(older.len() == 1 && older[0].lsn < lsn);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_interval_is_pushed_to_the_source_and_kept() {
    let mut bed = Bed::start().await;
    let (source, mut connection, _) = replicated(&bed).await;
    let request = TargetRequest::SetInterval { volume: name(), interval_ms: 1_000 };
    assert_eq!(bed.ask(request).await, Ok(TargetReply::Done));
    let policy = FromTarget::Policy { volume: source.volume, point_interval_ms: 1_000 };
    assert_eq!(connection.next().await, Some(policy));
    bed.stop().await;
    bed.resume().await;
    let Ok(TargetReply::Hosts(hosts)) = bed.ask(TargetRequest::Hosts).await else { panic!() };
    assert!(!hosts[0].connected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_catalogue_is_rebuilt_from_the_journal_when_the_source_comes_back() {
    let mut bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    let lsn = source.marker("kept", PointKind::App);
    source.ship(&mut connection).await;
    wait_for_points(&bed, 1).await;
    bed.stop().await;
    // Only the volume's rows: the host would have to enrol again otherwise.
    let catalogue = bed.paths.state.join("target/catalogue.sqlite");
    let db = rusqlite::Connection::open(catalogue).unwrap();
    db.execute_batch("DELETE FROM points; DELETE FROM volumes;").unwrap();
    drop(db);
    bed.resume().await;
    let mut connection = bed.connect(&host).await;
    let opened = source.open(&mut connection).await;
    assert_eq!(opened.durable, source.at);
    wait_for_points(&bed, 1).await;
    let view = open(&bed, PointChoice::Name("kept".into()), 0).await;
    assert_eq!(view.lsn, lsn);
}
