//! Batches in, acks out, and what happens when things are lost or lied about.

use farshore_extent::{Chain, Generation, PairState};
use farshore_protocol::admin::{TargetReply, TargetRequest};
use farshore_protocol::message::{FromAgent, FromTarget, Verdict};

use crate::bed::Bed;
use crate::source::Source;

fn volume_refused(message: Option<FromTarget>) -> u16 {
    match message {
        Some(FromTarget::Refused { volume: Some(_), problem, retry: false }) => problem.code.0,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_acked_survives_restarts_of_both_sides_and_goes_on_where_it_was() {
    let mut bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    let opened = source.open(&mut connection).await;
    assert_eq!((opened.durable, opened.chain), (source.at, Chain::EMPTY));
    assert_eq!((opened.generation, opened.verdict), (Generation::new(1), Verdict::Continue));
    assert_eq!(opened.point_interval_ms, 5_000);
    source.begin();
    source.ship(&mut connection).await;
    for round in 0..3u8 {
        for n in 0..20 {
            source.write(n * 8192, 4096, round * 50 + n as u8);
            source.ship(&mut connection).await;
        }
        drop(connection);
        bed.stop().await;
        bed.resume().await;
        connection = bed.connect(&host).await;
        let opened = source.open(&mut connection).await;
        assert_eq!((opened.durable, opened.chain), (source.at, source.chain));
        assert_eq!(opened.verdict, Verdict::Continue);
    }
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_of_batches_is_acked_cumulatively_and_an_agent_without_memory_goes_on() {
    let bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    for n in 0..200usize {
        source.write((n * 4096) % (1 << 20), 4096, n as u8);
        let batch = source.batch();
        connection.batch(&batch.bytes).await;
    }
    connection.acked(source.volume, source.at).await;
    // A restarted agent knows nothing and is told where to go on.
    let mut connection = bed.connect(&host).await;
    let mut forgetful = Source { at: Default::default(), chain: Chain::EMPTY, ..source.clone() };
    forgetful.generation = Generation::ZERO;
    let opened = forgetful.open(&mut connection).await;
    assert_eq!((opened.durable, opened.chain), (source.at, source.chain));
    source.write(0, 512, 9);
    source.ship(&mut connection).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_duplicate_is_acked_again_and_changes_nothing() {
    let bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    let first = source.batch();
    connection.batch(&first.bytes).await;
    connection.acked(source.volume, source.at).await;
    connection.batch(&first.bytes).await;
    connection.acked(source.volume, source.at).await;
    source.write(0, 4096, 1);
    source.ship(&mut connection).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_a_wrong_chain_and_a_damaged_batch_make_the_source_reopen() {
    let bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    source.ship(&mut connection).await;
    let good = source.clone();
    for fault in ["gap", "chain", "damage"] {
        let mut source = good.clone();
        match fault {
            "gap" => {
                source.write(0, 512, 1);
                source.batch();
            }
            "chain" => source.chain = Chain::from_bytes([7; 32]),
            _ => {}
        }
        source.write(4096, 4096, 0x5A);
        let mut batch = source.batch();
        if fault == "damage" {
            let last = batch.bytes.len() - 1;
            batch.bytes[last] ^= 1;
        }
        connection.batch(&batch.bytes).await;
        // In flight behind the bad one: dropped without a word.
        source.write(8192, 4096, 2);
        let behind = source.batch();
        connection.batch(&behind.bytes).await;
        match connection.next().await {
            Some(FromTarget::Reopen { volume, reason }) => {
                assert_eq!(volume, source.volume);
                assert!(!reason.is_empty());
            }
            other => panic!("{fault}: {other:?}"),
        }
        let opened = good.clone().open(&mut connection).await;
        assert_eq!((opened.durable, opened.chain), (good.at, good.chain), "{fault}");
    }
    let mut source = good;
    source.write(0, 4096, 3);
    source.ship(&mut connection).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_data_and_foreign_history_are_answered_with_recopy() {
    let bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    source.ship(&mut connection).await;
    let mut ahead = source.clone();
    ahead.write(0, 512, 1);
    ahead.batch();
    let opened = ahead.open(&mut connection).await;
    assert_eq!((opened.verdict, opened.durable), (Verdict::Recopy, source.at));
    let mut foreign = source.clone();
    foreign.chain = Chain::from_bytes([1; 32]);
    assert_eq!(foreign.open(&mut connection).await.verdict, Verdict::Recopy);
    // The source goes on from what the target has, says that order was lost, and copies.
    source.open(&mut connection).await;
    source.lose_order();
    source.ship(&mut connection).await;
    let Ok(TargetReply::Status(status)) = bed.ask(TargetRequest::Status).await else { panic!() };
    assert_eq!(status[0].state, PairState::InitialSync, "no point yet, and no order");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_of_another_generation_is_refused_at_open_and_in_the_stream() {
    let bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    source.ship(&mut connection).await;
    let ahead = Source { generation: Generation::new(2), ..source.clone() };
    connection.send(&ahead.open_message()).await;
    assert_eq!(volume_refused(connection.next().await), 6514);
    let mut ahead = ahead;
    source.open(&mut connection).await;
    ahead.write(0, 512, 1);
    let batch = ahead.batch();
    connection.batch(&batch.bytes).await;
    assert_eq!(volume_refused(connection.next().await), 6514);
    let mut old = Source { generation: Generation::ZERO, ..source.clone() };
    source.open(&mut connection).await;
    old.write(0, 512, 1);
    let batch = old.batch();
    connection.batch(&batch.bytes).await;
    assert_eq!(volume_refused(connection.next().await), 6513, "fenced");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_belongs_to_the_host_that_made_it_and_names_are_unique() {
    let bed = Bed::start_with(|config| config.limits.volumes_per_host = 2).await;
    let (one, two) = (bed.enroll("db1").await, bed.enroll("db2").await);
    let mut source = Source::new("pgdata");
    let (mut first, mut second) = (bed.connect(&one).await, bed.connect(&two).await);
    source.open(&mut first).await;
    second.send(&source.open_message()).await;
    assert_eq!(volume_refused(second.next().await), 6510);
    second.send(&Source::new("pgdata").open_message()).await;
    assert_eq!(volume_refused(second.next().await), 6511);
    Source::new("files").open(&mut first).await;
    first.send(&Source::new("third").open_message()).await;
    assert_eq!(volume_refused(first.next().await), 6512);
    Source::new("third").open(&mut second).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_connection_of_the_same_host_replaces_the_old_one() {
    let bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut old = bed.connect(&host).await;
    source.open(&mut old).await;
    source.begin();
    source.ship(&mut old).await;
    let mut new = bed.connect(&host).await;
    source.open(&mut new).await;
    assert_eq!(old.next().await, None, "ended by the target");
    source.write(0, 4096, 7);
    source.ship(&mut new).await;
    let Ok(TargetReply::Status(status)) = bed.ask(TargetRequest::Status).await else { panic!() };
    assert!(status[0].connected, "the end of the old one does not count");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unprotected_volume_is_shown_as_such_and_keeps_its_replica() {
    let bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    source.ship(&mut connection).await;
    connection.send(&FromAgent::Close { volume: source.volume, unprotected: true }).await;
    connection.send(&FromAgent::Ping(1)).await;
    assert_eq!(connection.next().await, Some(FromTarget::Pong(1)));
    let Ok(TargetReply::Status(status)) = bed.ask(TargetRequest::Status).await else { panic!() };
    assert_eq!((status[0].state, status[0].journaled), (PairState::Unprotected, source.at));
    source.open(&mut connection).await;
    let Ok(TargetReply::Status(status)) = bed.ask(TargetRequest::Status).await else { panic!() };
    assert_ne!(status[0].state, PairState::Unprotected, "protected again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_is_told_to_try_again_while_the_catalogue_cannot_be_written() {
    let bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    let catalogue = bed.paths.state.join("target/catalogue.sqlite");
    let other = rusqlite::Connection::open(&catalogue).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    connection.send(&source.open_message()).await;
    match connection.next().await {
        Some(FromTarget::Refused { volume: Some(_), problem, retry }) => {
            assert_eq!(
                (problem.code.0, retry),
                (6503, true),
                "a refusal for good stops the source"
            );
        }
        other => panic!("{other:?}"),
    }
    other.execute_batch("ROLLBACK").unwrap();
    source.open(&mut connection).await;
}
