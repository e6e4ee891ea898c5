//! Retention policies of volumes: points thinned by tiers, previews, and what a restart keeps.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use farshore_extent::{Lsn, PointKind, VolumeName};
use farshore_protocol::admin::{
    OpenView, PointChoice, PointInfo, PolicyReport, SetPolicy, TargetReply, TargetRequest,
};
use farshore_protocol::message::FromTarget;

use crate::bed::{Bed, LONG};
use crate::points_and_views::{copy, replicated};
use crate::source::Source;

fn name() -> VolumeName {
    VolumeName::new("pgdata").unwrap()
}

fn set(policy: &str, preview: bool) -> TargetRequest {
    let policy = policy.into();
    TargetRequest::SetPolicy(SetPolicy { volume: name(), policy, interval_ms: None, preview })
}

async fn report(bed: &Bed, request: TargetRequest) -> PolicyReport {
    match bed.ask(request).await {
        Ok(TargetReply::Policy(report)) => *report,
        other => panic!("{other:?}"),
    }
}

async fn shown(bed: &Bed) -> PolicyReport {
    report(bed, TargetRequest::Policy { volume: name() }).await
}

async fn points(bed: &Bed) -> Vec<PointInfo> {
    match bed.ask(TargetRequest::Points { volume: name(), limit: 0 }).await {
        Ok(TargetReply::Points(points)) => points,
        other => panic!("{other:?}"),
    }
}

async fn wait_for_points(bed: &Bed, done: impl Fn(usize) -> bool) -> Vec<PointInfo> {
    let there = async {
        loop {
            let points = points(bed).await;
            if done(points.len()) {
                return points;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LONG, there).await.expect("the points do not become as many as expected")
}

async fn opens_right(bed: &Bed, source: &Source, at: Lsn) {
    let open = TargetRequest::OpenView(OpenView::new(name(), PointChoice::At(at)));
    let Ok(TargetReply::View(view)) = bed.ask(open).await else { panic!("{at} does not open") };
    let image = bed.root().join("view.img");
    assert!(copy(&view, &image).await == source.history[&at].1, "{at}");
    let close = TargetRequest::CloseView { view: view.view, note: String::new() };
    bed.ask(close).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn points_are_thinned_by_a_policy_and_every_moment_since_the_floor_still_opens() {
    let mut bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    let begun = Instant::now();
    let mut cut = Vec::new();
    // Spread over several slots: points get their age from when they arrive.
    while begun.elapsed() < Duration::from_secs(2) {
        source.write((cut.len() % 200) * 4096, 4096, cut.len() as u8);
        let tag = if cut.len() == 7 { "before-upgrade" } else { "" };
        cut.push(source.marker(tag, PointKind::Crash));
        source.ship(&mut connection).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let all = wait_for_points(&bed, |n| n == cut.len()).await;
    let before = shown(&bed).await;
    assert_eq!((before.policy.as_str(), before.default, before.go), ("standard", true, 0));

    let preview = report(&bed, set("500ms:1h", true)).await;
    assert_eq!(preview.stay + preview.go, all.len() as u64);
    assert!(preview.go > preview.stay, "{preview:?}");
    assert_eq!((preview.floor_then, preview.freed_bytes), (before.floor.max(cut[0]), Some(0)));
    assert_eq!(shown(&bed).await, before, "a preview changes nothing");

    let told = report(&bed, set("500ms:1h", false)).await;
    assert_eq!((told.policy.as_str(), told.default), ("500ms:1h", false));
    let kept = wait_for_points(&bed, |n| n < all.len()).await;
    assert_eq!(kept.len() as u64, told.stay, "as many as were told");
    let places: BTreeSet<Lsn> = kept.iter().map(|p| p.lsn).collect();
    let (first, last) = (cut[0], cut[cut.len() - 1]);
    assert!(places.contains(&first) && places.contains(&cut[7]) && places.contains(&last));
    let gone = all.iter().find(|p| !places.contains(&p.lsn)).unwrap();
    let refused = TargetRequest::OpenView(OpenView::new(name(), PointChoice::Id(gone.point)));
    assert_eq!(bed.ask(refused).await.unwrap_err().code.0, 6601, "it is no point any more");
    // What it showed is a moment like any other.
    opens_right(&bed, &source, gone.lsn).await;
    for at in places {
        opens_right(&bed, &source, at).await;
    }

    bed.stop().await;
    bed.resume().await;
    assert_eq!(shown(&bed).await.policy, "500ms:1h", "after a restart too");
    assert_eq!(points(&bed).await.len(), kept.len());
    assert!(report(&bed, set("default", false)).await.default);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preset_sets_the_interval_of_points_too() {
    let bed = Bed::start().await;
    let (source, mut connection, _) = replicated(&bed).await;
    assert_eq!(report(&bed, set("every-30s-4h", false)).await.interval_ms, 30_000);
    let told = FromTarget::Policy { volume: source.volume, point_interval_ms: 30_000 };
    assert_eq!(connection.next().await, Some(told));
    let Ok(TargetReply::Policies(policies)) = bed.ask(TargetRequest::Policies).await else {
        panic!()
    };
    let named = |name: &str| policies.iter().find(|p| p.name == name).unwrap();
    assert_eq!(named("every-30s").interval_ms, Some(30_000));
    assert!(named("standard").default && named("standard").volumes.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_cannot_be_used_is_refused_and_one_that_was_taken_away_expires_nothing() {
    let mut bed = Bed::start().await;
    let (_, connection, _) = replicated(&bed).await;
    drop(connection);
    for bad in ["weekly", "all:1d,1m:1h", "24", "every-30s-25h"] {
        assert_eq!(bed.ask(set(bad, false)).await.unwrap_err().code.0, 6540, "{bad}");
    }
    bed.stop().await;
    let own = |text: &str| {
        let text = text.to_owned();
        move |config: &mut farshore_target::config::Config| {
            config.policies.insert("ours".into(), text);
        }
    };
    bed.resume_with(own("all:2h")).await;
    assert_eq!(report(&bed, set("ours", false)).await.tiers[0].tier, "all:2h");
    bed.stop().await;
    bed.resume_with(|config| config.retention = "1ms".into()).await;
    let refused = bed.ask(TargetRequest::Policy { volume: name() }).await.unwrap_err();
    assert_eq!(refused.code.0, 6541);
    let Ok(TargetReply::Events(events)) = bed.ask(TargetRequest::Events { limit: 0 }).await else {
        panic!()
    };
    assert!(events.iter().any(|e| e.code == 6541 && e.volume == Some(name())));
    assert_eq!(points(&bed).await.len(), 3, "nothing expires by another volume's rule");
    report(&bed, set("default", false)).await;
    // The named one and the newest stay.
    wait_for_points(&bed, |n| n == 2).await;
}
