//! Digests in, answers out: only what is durable, only to who sent it, and defects are shown.

use farshore_changelog::HashPurpose;
use farshore_extent::{Extent, Lsn, PairState};
use farshore_protocol::admin::{ReplicaStatus, TargetReply, TargetRequest};
use farshore_protocol::message::FromTarget;

use crate::bed::Bed;
use crate::connection::Connection;
use crate::source::{SIZE, Source};

/// Sends what was made, and gives the extents that differ; all digests are answered.
async fn ask(source: &mut Source, connection: &mut Connection) -> Vec<Extent> {
    source.ship(connection).await;
    let (mut place, mut all) = (Lsn::ZERO, Vec::new());
    while place < source.at {
        match connection.next().await {
            Some(FromTarget::Compared { volume, upto, differing }) => {
                assert!(volume == source.volume && upto > place && upto <= source.at);
                place = upto;
                all.extend(differing);
            }
            other => panic!("instead of an answer: {other:?}"),
        }
    }
    all
}

async fn status(bed: &Bed) -> ReplicaStatus {
    let Ok(TargetReply::Status(status)) = bed.ask(TargetRequest::Status).await else { panic!() };
    status[0].clone()
}

fn codes(status: &ReplicaStatus) -> Vec<u16> {
    status.problems.iter().map(|p| p.code.0).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn digests_are_answered_after_their_acknowledgement_to_the_session_that_sent_them() {
    let mut bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    source.write(0, 65536, 1);
    source.hash(0, SIZE, HashPurpose::Resync);
    source.wrong_hash(4096, 8192, HashPurpose::Resync);
    source.write(0, 65536, 2);
    source.hash(0, 65536, HashPurpose::Verify);
    let differing = ask(&mut source, &mut connection).await;
    assert_eq!(differing, [Extent::new(4096, 8192).unwrap()]);
    let now = status(&bed).await;
    assert_eq!((now.digests, now.differing), (3, 1));
    // What was said about them is lost with the connection: nobody else hears of them, nor of a
    // batch that is sent twice.
    source.wrong_hash(0, 512, HashPurpose::Resync);
    source.ship(&mut connection).await;
    drop(connection);
    bed.stop().await;
    bed.resume().await;
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.hash(0, 512, HashPurpose::Resync);
    let last = source.batch();
    connection.batch(&last.bytes).await;
    connection.batch(&last.bytes).await;
    let mut answers = Vec::new();
    source.write(0, 512, 3);
    source.hash(0, 512, HashPurpose::Resync);
    let next = source.batch();
    connection.batch(&next.bytes).await;
    while answers.last().is_none_or(|(upto, _)| *upto < source.at) {
        match connection.next().await {
            Some(FromTarget::Ack { .. }) => {}
            Some(FromTarget::Compared { upto, differing, .. }) => answers.push((upto, differing)),
            other => panic!("{other:?}"),
        }
    }
    assert!(answers.iter().all(|(_, differing)| differing.is_empty()), "{answers:?}");
    assert_eq!(status(&bed).await.digests, 2);
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_verify_finds_is_an_event_and_a_problem_until_it_is_sent_again() {
    let bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    source.write(0, 65536, 1);
    source.wrong_hash(0, 65536, HashPurpose::Verify);
    let differing = ask(&mut source, &mut connection).await;
    let all = Extent::new(0, 65536).unwrap();
    assert_eq!(differing, [all]);
    let now = status(&bed).await;
    assert_eq!(now.state, PairState::Broken);
    assert!(codes(&now).contains(&3120), "{:?}", now.problems);
    let request = TargetRequest::Events { limit: 0 };
    let Ok(TargetReply::Events(events)) = bed.ask(request).await else { panic!() };
    let event = events.iter().find(|e| e.code == 3120).expect("an event");
    assert!(event.text.contains(&all.to_string()), "{}", event.text);
    source.write(0, 65536, 2);
    source.hash(0, 65536, HashPurpose::Verify);
    assert_eq!(ask(&mut source, &mut connection).await, []);
    assert!(!codes(&status(&bed).await).contains(&3120));
}
