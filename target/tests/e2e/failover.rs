//! Failover as the daemon does it: exact loss, fencing that outlives restart and catalogue, one
//! operator at a time, and the way back.

use std::time::Duration;

use farshore_extent::{Generation, PairState, PointKind};
use farshore_protocol::admin::{PointChoice, TargetReply, TargetRequest};
use farshore_protocol::failover::{
    Failover, FailoverPhase, FailoverPreview, JobInfo, JobState, PreviewFailover, Seen,
};
use farshore_protocol::message::FromTarget;

use crate::bed::{Bed, Host, LONG};
use crate::connection::Connection;
use crate::source::Source;

fn refused(message: Option<FromTarget>) -> u16 {
    match message {
        Some(FromTarget::Refused { volume: Some(_), problem, retry: false }) => problem.code.0,
        other => panic!("{other:?}"),
    }
}

/// A volume with a point, and three writes of 4096 bytes behind it.
async fn protected(bed: &Bed) -> (Host, Source, Connection) {
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    source.write(0, 4096, 1);
    source.marker("one", PointKind::Crash);
    for n in 2..5 {
        source.write(8192, 4096, n);
    }
    source.ship(&mut connection).await;
    // The row of a point follows its acknowledgement.
    let point = async {
        let newest =
            || PreviewFailover { volume: "pgdata".parse_name(), point: PointChoice::Latest };
        while bed.ask(TargetRequest::PreviewFailover(newest())).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LONG, point).await.expect("there is no point");
    (host, source, connection)
}

async fn preview(bed: &Bed, point: PointChoice) -> FailoverPreview {
    let volume = "pgdata".parse_name();
    let wish = PreviewFailover { volume, point };
    match bed.ask(TargetRequest::PreviewFailover(wish)).await {
        Ok(TargetReply::FailoverPreview(seen)) => *seen,
        other => panic!("{other:?}"),
    }
}

trait ParseName {
    fn parse_name(self) -> farshore_extent::VolumeName;
}

impl ParseName for &str {
    fn parse_name(self) -> farshore_extent::VolumeName {
        farshore_extent::VolumeName::new(self).unwrap()
    }
}

fn wish(seen: &FailoverPreview) -> TargetRequest {
    TargetRequest::Failover(Failover {
        volume: seen.volume.clone(),
        lsn: seen.lsn,
        seen: seen.seen(),
        device: false,
        tls_listen: None,
    })
}

fn cancel(seen: Seen) -> TargetRequest {
    TargetRequest::CancelFailover { volume: "pgdata".parse_name(), seen }
}

/// The end of a job that was begun.
async fn ended(bed: &Bed, request: TargetRequest) -> JobInfo {
    let Ok(TargetReply::Job(job)) = bed.ask(request).await else { panic!("no job was begun") };
    let end = async {
        loop {
            match bed.ask(TargetRequest::Job { job: job.job }).await {
                Ok(TargetReply::Job(now)) if now.state != JobState::Running => return *now,
                Ok(TargetReply::Job(_)) => tokio::time::sleep(Duration::from_millis(10)).await,
                other => panic!("{other:?}"),
            }
        }
    };
    tokio::time::timeout(LONG, end).await.expect("the job does not end")
}

async fn code(bed: &Bed, request: TargetRequest) -> u16 {
    bed.ask(request).await.expect_err("it is refused").code.0
}

async fn state(bed: &Bed) -> PairState {
    let Ok(TargetReply::Status(status)) = bed.ask(TargetRequest::Status).await else { panic!() };
    status[0].state
}

#[tokio::test(flavor = "multi_thread")]
async fn the_loss_is_exact_before_anything_is_done() {
    let bed = Bed::start().await;
    let (_, mut source, mut connection) = protected(&bed).await;
    let seen = preview(&bed, PointChoice::Latest).await;
    assert_eq!((seen.lost_writes, seen.lost_bytes), (3, 3 * 4096));
    let span = seen.journaled_time.since(seen.time);
    assert_eq!(span, Duration::from_millis(3), "one millisecond a record");
    assert_eq!((seen.journaled, seen.phase), (source.at, FailoverPhase::Source));
    assert!(seen.connected && seen.ordered);
    let all = preview(&bed, PointChoice::At(source.at)).await;
    assert_eq!((all.lost_writes, all.lost_bytes), (0, 0));
    assert_ne!(state(&bed).await, PairState::FailedOverPending, "nothing was changed");
    assert_eq!(source.open(&mut connection).await.generation, Generation::new(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_over_source_is_refused_in_the_stream_at_open_and_after_a_restart() {
    let mut bed = Bed::start().await;
    let (host, mut source, mut connection) = protected(&bed).await;
    let seen = preview(&bed, PointChoice::Latest).await;
    let job = ended(&bed, wish(&seen)).await;
    assert_eq!(job.state, JobState::Done, "{job:?}");
    assert!(job.view.is_some_and(|view| !view.read_only), "open for writing");
    assert_eq!(refused(connection.next().await), 6513, "the source that is connected is told");
    source.write(0, 512, 9);
    connection.send(&source.open_message()).await;
    assert_eq!(refused(connection.next().await), 6513);
    assert_eq!(state(&bed).await, PairState::FailedOverPending);
    bed.stop().await;
    bed.resume().await;
    let mut connection = bed.connect(&host).await;
    for generation in [0, 1] {
        let old = Source { generation: Generation::new(generation), ..source.clone() };
        connection.send(&old.open_message()).await;
        assert_eq!(refused(connection.next().await), 6513, "generation {generation}");
    }
    assert_eq!(state(&bed).await, PairState::FailedOverPending);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_catalogue_does_not_lift_the_fence() {
    let mut bed = Bed::start().await;
    let (host, source, connection) = protected(&bed).await;
    let seen = preview(&bed, PointChoice::Latest).await;
    assert_eq!(ended(&bed, wish(&seen)).await.state, JobState::Done);
    drop(connection);
    bed.stop().await;
    let mut removed = 0;
    for entry in walk(bed.root()) {
        if entry.file_name().is_some_and(|n| n.to_string_lossy().starts_with("catalogue")) {
            std::fs::remove_file(&entry).unwrap();
            removed += 1;
        }
    }
    assert!(removed > 0, "there is no catalogue");
    bed.resume().await;
    let token = bed.token("db1").await;
    let host = bed.enroll_with(&token, host.id, "db1").await.unwrap();
    let mut connection = bed.connect(&host).await;
    connection.send(&source.open_message()).await;
    assert_eq!(refused(connection.next().await), 6513, "the store remembers");
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_cancel_the_source_goes_on_without_a_gap() {
    let bed = Bed::start().await;
    let (_, mut source, mut connection) = protected(&bed).await;
    let seen = preview(&bed, PointChoice::Latest).await;
    ended(&bed, wish(&seen)).await;
    assert_eq!(refused(connection.next().await), 6513);
    let seen = preview(&bed, PointChoice::Latest).await;
    let job = ended(&bed, cancel(seen.seen())).await;
    assert_eq!(job.state, JobState::Done, "{job:?}");
    assert!(
        matches!(connection.next().await, Some(FromTarget::Reopen { .. })),
        "a source that is connected is told"
    );
    let opened = source.open(&mut connection).await;
    assert_eq!(opened.generation, Generation::new(3), "granted anew");
    assert_eq!(opened.durable, source.at, "nothing is sent twice");
    source.write(0, 512, 9);
    source.marker("two", PointKind::Crash);
    source.ship(&mut connection).await;
    assert_ne!(state(&bed).await, PairState::FailedOverPending);
    assert_eq!(code(&bed, cancel(seen.seen())).await, 6803, "what was shown is not so any more");
    let now = preview(&bed, PointChoice::Latest).await;
    assert_eq!(code(&bed, cancel(now.seen())).await, 6804, "there is nothing to take back");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_operators_the_second_is_told_and_nothing_unseen_is_dropped() {
    let bed = Bed::start().await;
    let (_, source, _connection) = protected(&bed).await;
    let (one, two) =
        (preview(&bed, PointChoice::Latest).await, preview(&bed, PointChoice::At(source.at)).await);
    assert_eq!(ended(&bed, wish(&one)).await.state, JobState::Done);
    assert_eq!(code(&bed, wish(&two)).await, 6803);
    let view = preview(&bed, PointChoice::Latest).await.view.unwrap();
    let close = TargetRequest::CloseView { view: view.view, note: String::new() };
    assert_eq!(code(&bed, close).await, 6805, "it is no test");
    // Another point is a decision of its own.
    let now = preview(&bed, PointChoice::At(source.at)).await;
    let job = ended(&bed, wish(&now)).await;
    assert_eq!(job.state, JobState::Done, "{job:?}");
    assert_eq!(job.view.unwrap().lsn, source.at);
    let Ok(TargetReply::Views(views)) = bed.ask(TargetRequest::Views).await else { panic!() };
    assert_eq!(views.len(), 1, "the first is closed");
    assert_eq!(code(&bed, cancel(one.seen())).await, 6803);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_that_cannot_be_opened_leaves_the_source_fenced_and_says_so() {
    let bed = Bed::start_with(|config| config.limits.views = 0).await;
    let (_, _, mut connection) = protected(&bed).await;
    let seen = preview(&bed, PointChoice::Latest).await;
    let job = ended(&bed, wish(&seen)).await;
    assert_eq!((job.state, job.problem.map(|p| p.code.0)), (JobState::Failed, Some(6603)));
    assert_eq!(refused(connection.next().await), 6513);
    let Ok(TargetReply::Status(status)) = bed.ask(TargetRequest::Status).await else { panic!() };
    assert_eq!(status[0].problems[0].code.0, 6807);
    let now = preview(&bed, PointChoice::Latest).await;
    assert_eq!(ended(&bed, cancel(now.seen())).await.state, JobState::Done);
    assert!(matches!(connection.next().await, Some(FromTarget::Reopen { .. })));
}
