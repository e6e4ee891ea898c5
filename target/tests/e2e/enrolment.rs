//! Who gets in.

use farshore_extent::HostId;
use farshore_protocol::admin::{TargetReply, TargetRequest};
use farshore_protocol::message::{FromAgent, FromTarget};

use crate::bed::Bed;
use crate::connection::Connection;
use crate::source::Source;

fn code(message: Option<FromTarget>) -> u16 {
    match message {
        Some(FromTarget::Refused { volume: None, problem, retry: false }) => problem.code.0,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_pins_the_target_works_once_and_gives_a_certificate_that_connects() {
    let mut bed = Bed::start().await;
    let token = bed.token("db1").await;
    let host = bed.enroll_with(&token, HostId::random(), "db1").await.unwrap();
    bed.connect(&host).await;
    let again = bed.enroll_with(&token, HostId::random(), "db1").await;
    assert_eq!(again.err().unwrap().code.0, 5002, "used");
    let Ok(TargetReply::Hosts(hosts)) = bed.ask(TargetRequest::Hosts).await else { panic!() };
    assert_eq!((hosts.len(), hosts[0].host, hosts[0].name.as_str()), (1, host.id, "db1"));
    bed.stop().await;
    bed.resume().await;
    bed.connect(&host).await;
    let used = bed.enroll_with(&bed_token(&bed, &token), HostId::random(), "db1").await;
    assert_eq!(used.err().unwrap().code.0, 5002, "used, also after a restart");
    bed.stop().await;
}

/// The same token at the daemon's new port.
fn bed_token(
    bed: &Bed,
    token: &farshore_protocol::token::Token,
) -> farshore_protocol::token::Token {
    farshore_protocol::token::Token { address: bed.address(), ..token.clone() }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_token_is_refused() {
    let bed = Bed::start().await;
    let request = TargetRequest::NewToken {
        host_name: "db1".into(),
        valid_seconds: 1,
        address: bed.address(),
    };
    let Ok(TargetReply::Token(text)) = bed.ask(request).await else { panic!() };
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let late = bed.enroll_with(&text.parse().unwrap(), HostId::random(), "db1").await;
    assert_eq!(late.err().unwrap().code.0, 5002);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_certificate_nothing_but_enrolment_is_possible() {
    let bed = Bed::start().await;
    let token = bed.token("db1").await;
    let hello = FromAgent::Hello {
        versions: vec![1],
        host: HostId::random(),
        host_name: "db1".into(),
        software: "x".into(),
    };
    for message in [hello, FromAgent::Ping(1), Source::new("v").open_message()] {
        let mut connection = Connection::pinned(&bed.address(), token.ca).await;
        connection.send(&message).await;
        assert_eq!(code(connection.receive().await), 5001);
        assert_eq!(connection.receive().await, None, "closed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_another_authority_are_worthless_in_both_directions() {
    let (ours, theirs) = (Bed::start().await, Bed::start().await);
    let mut stranger = theirs.enroll("db1").await;
    let own = ours.enroll("db1").await;
    assert!(Connection::of_host(&ours.address(), &stranger).await.is_err(), "their server");
    let foreign = theirs.token("db2").await;
    assert!(Connection::try_pinned(&ours.address(), foreign.ca).await.is_err(), "their pin");
    // It believes our server, but shows their certificate: TLS ends at the first read or write.
    stranger.ca = own.ca.clone();
    let Ok(mut connection) = Connection::of_host(&ours.address(), &stranger).await else { return };
    let _ = connection.raw(&[1, 0, 0, 0, 0]).await;
    assert_eq!(connection.receive().await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_can_speak_only_in_its_own_name() {
    let bed = Bed::start().await;
    let (one, two) = (bed.enroll("db1").await, bed.enroll("db2").await);
    let mut connection = Connection::of_host(&bed.address(), &one).await.unwrap();
    connection.send(&two.hello()).await;
    assert_eq!(code(connection.receive().await), 5003);
    let mut connection = Connection::of_host(&bed.address(), &one).await.unwrap();
    let FromAgent::Hello { host, host_name, software, .. } = one.hello() else { panic!() };
    connection.send(&FromAgent::Hello { versions: vec![77], host, host_name, software }).await;
    assert_eq!(code(connection.receive().await), 5005);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_renews_itself_over_the_session() {
    let bed = Bed::start().await;
    let mut host = bed.enroll("db1").await;
    let mut connection = bed.connect(&host).await;
    let key = rcgen::KeyPair::generate().unwrap();
    let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
    connection.send(&FromAgent::Renew { csr: csr.der().to_vec() }).await;
    let Some(FromTarget::Certificate { certificate, .. }) = connection.next().await else {
        panic!()
    };
    host.certificate = certificate.into();
    host.key = key.serialize_der();
    bed.connect(&host).await;
}
