//! What must not get through, hang or bring the daemon down.

use std::time::Duration;

use farshore_changelog::limits::MAX_BATCH_BYTES;
use farshore_protocol::config::Millis;
use farshore_protocol::frame::FrameKind;
use farshore_protocol::message::{FromAgent, FromTarget};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::bed::Bed;
use crate::connection::Connection;
use crate::source::Source;

fn is_violation(message: Option<FromTarget>) -> bool {
    match message {
        Some(FromTarget::Refused { volume: None, problem, .. }) => problem.code.0 == 5006,
        // Closed before the last word was read.
        None => true,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_bytes_end_their_connection_and_nothing_else() {
    let bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut good = bed.connect(&bed.enroll("db2").await).await;
    let mut too_long = FrameKind::Batch.header(MAX_BATCH_BYTES).unwrap();
    too_long[1..].copy_from_slice(&u32::MAX.to_le_bytes());
    let junk_batch = [&FrameKind::Batch.header(300).unwrap()[..], &[0xA5; 300]].concat();
    let junk_message = [&FrameKind::Control.header(80).unwrap()[..], &[0xFF; 80]].concat();
    let attacks: [&[u8]; 5] =
        [&too_long, &[9, 1, 0, 0, 0, 0], &junk_batch, &junk_message, b"GET / HTTP/1.1\r\n\r\n"];
    for attack in attacks {
        // In a session, and as the first bytes.
        let mut connection = bed.connect(&host).await;
        connection.raw(attack).await.unwrap();
        assert!(is_violation(connection.next().await), "{attack:?}");
        let mut connection = Connection::of_host(&bed.address(), &host).await.unwrap();
        connection.raw(attack).await.unwrap();
        assert!(is_violation(connection.next().await), "{attack:?}");
    }
    good.send(&FromAgent::Ping(5)).await;
    assert_eq!(good.next().await, Some(FromTarget::Pong(5)), "others are not disturbed");
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_out_of_place_end_the_connection() {
    let bed = Bed::start().await;
    let host = bed.enroll("db1").await;
    let mut source = Source::new("v");
    source.begin();
    let batch = source.batch();
    let mut connection = bed.connect(&host).await;
    connection.batch(&batch.bytes).await;
    assert!(is_violation(connection.next().await), "a batch of a volume that was not opened");
    let mut connection = bed.connect(&host).await;
    connection.send(&host.hello()).await;
    assert!(is_violation(connection.next().await), "a second Hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_nothing_is_let_go() {
    let bed = Bed::start_with(|config| {
        config.limits.handshake_timeout = Millis::from_millis(300);
        config.limits.idle_timeout = Millis::from_secs(1);
    })
    .await;
    let host = bed.enroll("db1").await;
    let mut silent = tokio::net::TcpStream::connect(bed.address()).await.unwrap();
    let mut buffer = [0; 16];
    assert_eq!(silent.read(&mut buffer).await.unwrap(), 0, "no TLS");
    let mut slow = Connection::of_host(&bed.address(), &host).await.unwrap();
    assert_eq!(slow.receive().await, None, "no Hello");
    let mut idle = bed.connect(&host).await;
    let closed = tokio::time::timeout(Duration::from_secs(20), idle.next()).await;
    assert_eq!(closed.unwrap(), None, "no Ping");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_over_the_limit_are_closed_and_places_come_back() {
    let bed = Bed::start_with(|config| config.limits.connections = 2).await;
    let host = bed.enroll("db1").await;
    let one = tokio::net::TcpStream::connect(bed.address()).await.unwrap();
    let mut two = tokio::net::TcpStream::connect(bed.address()).await.unwrap();
    // Something only the TLS layer reads: both hold their place.
    two.write_all(&[22]).await.unwrap();
    let mut three = tokio::net::TcpStream::connect(bed.address()).await.unwrap();
    let mut buffer = [0; 16];
    assert_eq!(three.read(&mut buffer).await.unwrap_or(0), 0);
    drop((one, two));
    let connected = async {
        while Connection::of_host(&bed.address(), &host).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), connected).await.unwrap();
}
