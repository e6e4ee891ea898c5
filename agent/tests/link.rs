//! The connection alone: dead peers and proxies.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // a test that cannot go on fails

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use farshore_agent::identity::Identity;
use farshore_agent::link::{Greeting, Link, LinkConfig, Outbox};
use farshore_agent::{EnrollOptions, enroll};
use farshore_protocol::paths::Paths;
use support::block_on;
use support::target::{FakeTarget, Mood};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

async fn identity(target: &FakeTarget) -> (Identity, Greeting) {
    let dir = tempfile::tempdir().unwrap();
    let paths = Paths::under(dir.path());
    enroll(&target.token(), &paths, &EnrollOptions::default()).await.unwrap();
    let identity = Identity::load(&paths).unwrap();
    let greeting = Greeting { host: identity.host, host_name: identity.name.to_string() };
    (identity, greeting)
}

#[test]
fn a_peer_that_falls_silent_is_noticed_in_time() {
    block_on(async {
        let target = FakeTarget::serve().await;
        let (identity, greeting) = identity(&target).await;
        target.with(|s| s.mood = Mood::Mute);
        let config = LinkConfig {
            ping_after: Duration::from_millis(50),
            peer_timeout: Duration::from_millis(300),
            ..LinkConfig::new(target.address.to_string(), None)
        };
        let mut link = Link::dial(&config, identity.tls().unwrap()).await.unwrap();
        link.greet(&greeting).await.unwrap();
        let (sender, _receiver) = mpsc::channel(4);
        let start = Instant::now();
        let failure = link.run(Arc::new(Outbox::default()), sender).await;
        assert_eq!((failure.problem.code.0, failure.retry), (5102, true));
        assert!(start.elapsed() >= Duration::from_millis(300));
        assert!(start.elapsed() < Duration::from_secs(5));
    });
}

#[test]
fn an_address_where_nobody_answers_tls_is_given_up_in_time() {
    block_on(async {
        let target = FakeTarget::serve().await;
        let (identity, _) = identity(&target).await;
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = LinkConfig {
            connect_timeout: Duration::from_millis(200),
            ..LinkConfig::new(silent.local_addr().unwrap().to_string(), None)
        };
        let failure = Link::dial(&config, identity.tls().unwrap()).await.unwrap_err();
        assert_eq!((failure.problem.code.0, failure.retry), (5101, true));
    });
}

/// Answers one connection as an HTTP proxy would, with `answer`; returns what was asked.
async fn proxy(listener: TcpListener, answer: &'static str, tunnel: bool) -> String {
    let (mut client, _) = listener.accept().await.unwrap();
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        request.push(client.read_u8().await.unwrap());
    }
    let request = String::from_utf8(request).unwrap();
    client.write_all(answer.as_bytes()).await.unwrap();
    if tunnel {
        let address = request.split(' ').nth(1).unwrap();
        let mut server = TcpStream::connect(address).await.unwrap();
        let _ = copy_bidirectional(&mut client, &mut server).await;
    }
    request
}

#[test]
fn a_proxy_carries_the_connection_and_its_refusal_is_told() {
    block_on(async {
        let target = FakeTarget::serve().await;
        let (identity, greeting) = identity(&target).await;
        let config = async |listener: &TcpListener| {
            let proxy = listener.local_addr().unwrap().to_string();
            LinkConfig::new(target.address.to_string(), Some(proxy))
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good = config(&listener).await;
        let answer = "HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n";
        let served = tokio::spawn(proxy(listener, answer, true));
        let mut link = Link::dial(&good, identity.tls().unwrap()).await.unwrap();
        link.greet(&greeting).await.unwrap();
        drop(link);
        let asked = served.await.unwrap();
        assert!(asked.starts_with(&format!("CONNECT {} HTTP/1.1\r\n", target.address)), "{asked}");

        let long = "HTTP/1.1 200 OK\r\nX: never ends and never ends";
        for answer in ["HTTP/1.1 403 Forbidden\r\n\r\n", "SSH-2.0-OpenSSH\r\n", long] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let bad = config(&listener).await;
            tokio::spawn(proxy(listener, answer, false));
            let failure = Link::dial(&bad, identity.tls().unwrap()).await.unwrap_err();
            assert_eq!((failure.problem.code.0, failure.retry), (5106, true), "{answer}");
        }
    });
}
