//! Damaged and expiring replicas.

use std::time::Duration;

use farshore_changelog::HashPurpose;
use farshore_extent::{Extent, PairState, PointKind, VolumeName, WallTime};
use farshore_protocol::admin::{OpenView, PointChoice, ReplicaStatus, TargetReply, TargetRequest};
use farshore_protocol::message::{FromTarget, Verdict};

use farshore_target::store::{FileDisk, inspect};

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
    let bed = Bed::start_with(|config| config.retention = "1s".into()).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn rot_of_the_base_is_an_event_and_a_problem_until_a_resync_has_sent_it_again() {
    let mut bed = Bed::start_with(|config| config.retention = "1s".into()).await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    source.write_noise(0, 65_536, 1);
    source.marker("", PointKind::Crash);
    source.ship(&mut connection).await;
    // The rest fills the segment with the first bytes, so that they are in the base alone.
    for value in 2..14 {
        source.write_noise(65_536, 900_000 / 512 * 512, value);
        source.ship(&mut connection).await;
    }
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let newest = source.marker("", PointKind::Crash);
    source.ship(&mut connection).await;
    let dir = bed.paths.state.join(format!("target/volumes/{}", source.volume));
    let merged = async {
        while inspect(&FileDisk::open(&dir).unwrap()).map_or(true, |(sb, _)| sb.base < newest) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(LONG, merged).await.expect("nothing is merged");
    bed.stop().await;
    let base = dir.join("base.img");
    let mut bytes = std::fs::read(&base).unwrap();
    assert_eq!(bytes[..65_536], source.content[..65_536]);
    bytes[5000] ^= 4;
    std::fs::write(&base, bytes).unwrap();
    bed.resume().await;
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    // What `farshore resync` asks: is it as on the source?
    source.hash(0, 65_536, HashPurpose::Resync);
    source.ship(&mut connection).await;
    match connection.next().await {
        Some(FromTarget::Compared { differing, .. }) => {
            assert_eq!(differing, [Extent::new(0, 65_536).unwrap()]);
        }
        other => panic!("{other:?}"),
    }
    let Ok(TargetReply::Status(status)) = bed.ask(TargetRequest::Status).await else { panic!() };
    let rotten = status[0].problems.iter().find(|p| p.code.0 == 6015).expect("a problem");
    assert_eq!(status[0].state, PairState::Broken);
    assert!(rotten.next.contains("farshore resync pgdata"), "{rotten:?}");
    let request = TargetRequest::Events { limit: 0 };
    let Ok(TargetReply::Events(events)) = bed.ask(request).await else { panic!() };
    let event = events.iter().find(|e| e.code == 6015).expect("an event");
    let extent = Extent::new(4608, 512).unwrap();
    assert!(event.text.contains(&extent.to_string()), "{}", event.text);
    // And what it sends then.
    source.write_noise(0, 65_536, 1);
    source.hash(0, 65_536, HashPurpose::Verify);
    source.ship(&mut connection).await;
    match connection.next().await {
        Some(FromTarget::Compared { differing, .. }) => assert_eq!(differing, []),
        other => panic!("{other:?}"),
    }
    let Ok(TargetReply::Status(status)) = bed.ask(TargetRequest::Status).await else { panic!() };
    assert!(status[0].problems.iter().all(|p| p.code.0 != 6015), "{:?}", status[0].problems);
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrub_that_was_asked_for_is_shown_with_its_end_and_what_it_found() {
    let mut bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    // Enough to fill a segment.
    for value in 1..14 {
        source.write_noise(65_536, 900_000 / 512 * 512, value);
        source.ship(&mut connection).await;
    }
    let first = scrubbed_after(&bed, None).await;
    assert_eq!((first.scrub_found, first.unverified_bytes), (0, 0));
    bed.stop().await;
    let segment = "seg-0000000000000001";
    let dir = bed.paths.state.join(format!("target/volumes/{}", source.volume));
    let mut bytes = std::fs::read(dir.join(segment)).unwrap();
    bytes[1 << 20] ^= 1;
    std::fs::write(dir.join(segment), bytes).unwrap();
    bed.resume().await;
    let volume = VolumeName::new("pgdata").unwrap();
    let asked = bed.ask(TargetRequest::Scrub { volume }).await;
    assert!(matches!(asked, Ok(TargetReply::Done)), "{asked:?}");
    assert_eq!(scrubbed_after(&bed, first.last_scrub).await.scrub_found, 1);
    let request = TargetRequest::Events { limit: 0 };
    let Ok(TargetReply::Events(events)) = bed.ask(request).await else { panic!() };
    let event = events.iter().find(|e| e.code == 6009).expect("an event");
    assert!(event.text.contains(segment), "{}", event.text);
    bed.stop().await;
}

/// The replica once a scrub has ended that is newer than `last`.
async fn scrubbed_after(bed: &Bed, last: Option<WallTime>) -> ReplicaStatus {
    let ended = async {
        loop {
            let Ok(TargetReply::Status(status)) = bed.ask(TargetRequest::Status).await else {
                panic!()
            };
            if status[0].last_scrub > last {
                return status[0].clone();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(LONG, ended).await.expect("no scrub ends")
}
