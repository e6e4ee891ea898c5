//! Damaged and expiring replicas.

use std::time::Duration;

use farshore_extent::{PairState, PointKind, VolumeName};
use farshore_protocol::admin::{OpenView, PointChoice, TargetReply, TargetRequest};
use farshore_protocol::config::Millis;
use farshore_protocol::message::{FromTarget, Verdict};

use crate::bed::{Bed, LONG};
use crate::source::Source;

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_cannot_be_opened_is_broken_and_the_others_work() {
    let mut bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let (mut bad, mut good) = (Source::new("bad"), Source::new("good"));
    let mut connection = bed.connect(&host).await;
    for source in [&mut bad, &mut good] {
        source.open(&mut connection).await;
        source.begin();
        source.ship(&mut connection).await;
    }
    bed.stop().await;
    let file = bed.paths.state.join(format!("target/volumes/{}/super", bad.volume));
    let healthy = std::fs::read(&file).unwrap();
    std::fs::write(&file, vec![0xA5; healthy.len()]).unwrap();
    let stale = bed.paths.run.join("views/bad-00000000.sock");
    std::fs::write(&stale, b"").unwrap();
    bed.resume().await;
    assert!(!stale.exists(), "what a crash left is cleaned");
    let mut connection = bed.connect(&host).await;
    good.open(&mut connection).await;
    good.write(0, 4096, 1);
    good.ship(&mut connection).await;
    connection.send(&bad.open_message()).await;
    match connection.next().await {
        Some(FromTarget::Refused { volume: Some(volume), retry: true, .. }) => {
            assert_eq!(volume, bad.volume);
        }
        other => panic!("{other:?}"),
    }
    let Ok(TargetReply::Status(status)) = bed.ask(TargetRequest::Status).await else { panic!() };
    assert_eq!((status[0].state, status[0].problems.is_empty()), (PairState::Broken, false));
    assert_ne!(status[1].state, PairState::Broken);
    // Repaired: the next open finds it.
    std::fs::write(&file, healthy).unwrap();
    let opened = bad.open(&mut connection).await;
    assert_eq!(opened.durable, bad.at);
}

#[tokio::test(flavor = "multi_thread")]
async fn expired_points_go_and_what_stays_is_still_right() {
    let bed = Bed::start_with(|config| config.retention = Millis::from_secs(1)).await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    source.write(0, 65_536, 1);
    let old = source.marker("", PointKind::Crash);
    source.write(4096, 4096, 2);
    source.ship(&mut connection).await;
    let name = VolumeName::new("pgdata").unwrap();
    let open = |point| TargetRequest::OpenView(OpenView::new(name.clone(), point));
    // A view of the old point holds what it shows.
    let Ok(TargetReply::View(view)) = bed.ask(open(PointChoice::At(old))).await else { panic!() };
    tokio::time::sleep(Duration::from_millis(1100)).await;
    source.write(8192, 4096, 3);
    let new = source.marker("", PointKind::Crash);
    source.write(12_288, 4096, 4);
    source.ship(&mut connection).await;
    let wait = |done: fn(u64, bool) -> bool| {
        let bed = &bed;
        let expired = async move {
            loop {
                let Ok(TargetReply::Status(status)) = bed.ask(TargetRequest::Status).await else {
                    panic!()
                };
                if done(status[0].points, status[0].floor >= new) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        async move { tokio::time::timeout(LONG, expired).await.expect("nothing expires") }
    };
    wait(|points, _| points == 1).await;
    let image = bed.root().join("old.img");
    assert!(crate::points_and_views::copy(&view, &image).await == source.history[&old].1);
    let close = TargetRequest::CloseView { view: view.view, note: String::new() };
    bed.ask(close).await.unwrap();
    wait(|_, merged| merged).await;
    let refused = bed.ask(open(PointChoice::At(old))).await.unwrap_err();
    assert_eq!(refused.code.0, 6010, "expired");
    for (lsn, (_, content)) in source.history.range(new..) {
        let Ok(TargetReply::View(view)) = bed.ask(open(PointChoice::At(*lsn))).await else {
            panic!()
        };
        let image = bed.root().join("new.img");
        assert!(crate::points_and_views::copy(&view, &image).await == *content, "{lsn}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_that_was_lost_with_the_journal_is_not_offered_after_the_new_copy() {
    let mut bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    source.write(0, 4096, 1);
    source.marker("kept", PointKind::Crash);
    let first = source.batch();
    connection.batch(&first.bytes).await;
    connection.acked(source.volume, source.at).await;
    let before = source.clone();
    source.write(0, 4096, 2);
    source.marker("lost", PointKind::Crash);
    source.ship(&mut connection).await;
    bed.stop().await;
    // The medium forgets the second batch, which was acknowledged.
    let volumes = bed.paths.state.join("target/volumes");
    let file = volumes.join(format!("{}/seg-{:016x}", source.volume, 1));
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[4096 + first.bytes.len().next_multiple_of(4096)..].fill(0);
    std::fs::write(&file, bytes).unwrap();
    bed.resume().await;
    let mut connection = bed.connect(&host).await;
    let opened = source.open(&mut connection).await;
    assert_eq!((opened.verdict, opened.durable), (Verdict::Recopy, before.at));
    (source.at, source.chain) = (opened.durable, opened.chain);
    source.lose_order();
    source.write(0, 4096, 3);
    source.restore_order();
    source.ship(&mut connection).await;
    let open = |name: &str| {
        TargetRequest::OpenView(OpenView::new(
            VolumeName::new("pgdata").unwrap(),
            PointChoice::Name(name.into()),
        ))
    };
    bed.ask(open("lost")).await.expect_err("it would show the state at `kept`");
    bed.ask(open("kept")).await.unwrap();
}
