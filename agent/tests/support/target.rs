//! A target that keeps batches in memory, with a CA of its own, and can be made hostile.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use farshore_changelog::codec::{decode, encode};
use farshore_changelog::{RawBatch, Record};
use farshore_extent::{Chain, Generation, HostId, Lsn, Problem, VolumeId, WallTime};
use farshore_protocol::frame::{FrameKind, HEADER_LEN};
use farshore_protocol::message::{FromAgent, FromTarget, Opened, Verdict};
use farshore_protocol::token::{CaFingerprint, SERVER_NAME, Token, TokenSecret};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use rustls::pki_types::{
    CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// A CA that signs the server and hosts.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pub der: CertificateDer<'static>,
}

impl Ca {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.distinguished_name.push(DnType::CommonName, "test CA");
        let der = params.self_signed(&key).unwrap().der().clone();
        Self { issuer: Issuer::new(params, key), der }
    }

    pub fn sign_host(&self, csr: &[u8], host: HostId, days: i64) -> Vec<u8> {
        let csr = CertificateSigningRequestDer::from(csr);
        let mut request = CertificateSigningRequestParams::from_der(&csr).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, host.to_string());
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let now = time::OffsetDateTime::now_utc();
        params.not_before = now - time::Duration::days(30);
        params.not_after = now + time::Duration::days(days);
        request.params = params;
        request.signed_by(&self.issuer).unwrap().der().to_vec()
    }

    fn server_tls(&self, name: &str) -> Arc<rustls::ServerConfig> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.der.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
            Arc::new(roots),
            provider.clone(),
        )
        .allow_unauthenticated()
        .build()
        .unwrap();
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![certificate.der().clone(), self.der.clone()],
                PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der())),
            )
            .unwrap();
        Arc::new(config)
    }
}

/// What the target does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    Honest,
    /// Bytes that are no frame, instead of Welcome.
    Garbage,
    /// A header that announces 4 GiB.
    HugeFrame,
    /// A version nobody speaks.
    StrangeVersion,
    /// Acknowledges what was never sent.
    AcksTheFuture,
    /// Welcome, then silence; reads nothing.
    Mute,
    /// Refuses every Hello, for ever.
    Refuses,
}

#[derive(Default, Clone)]
pub struct Replica {
    pub durable: Lsn,
    pub chain: Chain,
    pub records: Vec<Record>,
    pub payloads: BTreeMap<u64, Vec<u8>>,
    pub opens: u32,
    pub reopens: u32,
}

pub struct Shared {
    pub replicas: BTreeMap<VolumeId, Replica>,
    pub secret: Option<TokenSecret>,
    pub mood: Mood,
    pub hellos: u32,
    pub accepts: u32,
    pub renewals: u32,
    pub certificate_days: i64,
    pub point_interval_ms: u64,
    pub tagged: Vec<(u64, Result<Lsn, Problem>)>,
    pub notes: Vec<u16>,
    pub reports: u32,
    /// Wakes connections: a message for all of them; none closes them.
    pub say: Vec<mpsc::UnboundedSender<Option<FromTarget>>>,
}

pub struct FakeTarget {
    pub ca: Arc<Ca>,
    pub address: SocketAddr,
    pub shared: Arc<Mutex<Shared>>,
    name: &'static str,
    task: tokio::task::JoinHandle<()>,
}

impl FakeTarget {
    pub async fn serve() -> Self {
        Self::start(Arc::new(Ca::new()), "127.0.0.1:0".parse().unwrap(), SERVER_NAME).await
    }

    pub async fn start(ca: Arc<Ca>, address: SocketAddr, name: &'static str) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Mutex::new(Shared {
            replicas: BTreeMap::new(),
            secret: None,
            mood: Mood::Honest,
            hellos: 0,
            accepts: 0,
            renewals: 0,
            certificate_days: 365,
            point_interval_ms: 0,
            tagged: Vec::new(),
            notes: Vec::new(),
            reports: 0,
            say: Vec::new(),
        }));
        let task = tokio::spawn(accept(listener, ca.clone(), shared.clone(), name));
        Self { ca, address, shared, name, task }
    }

    /// Everything received so far is kept; connections break.
    pub fn disconnect_all(&self) {
        let said: Vec<_> = self.with(|s| s.say.drain(..).collect());
        said.iter().for_each(|c| drop(c.send(None)));
    }

    pub fn say(&self, message: &FromTarget) {
        self.with(|s| s.say.iter().for_each(|c| drop(c.send(Some(message.clone())))));
    }

    pub fn with<T>(&self, act: impl FnOnce(&mut Shared) -> T) -> T {
        act(&mut self.shared.lock().unwrap())
    }

    pub fn replica(&self, volume: VolumeId) -> Replica {
        self.with(|s| s.replicas.get(&volume).cloned().unwrap_or_default())
    }

    pub fn token(&self) -> String {
        let secret = TokenSecret::generate().unwrap();
        self.with(|s| s.secret = Some(secret.clone()));
        let (address, ca) = (self.address.to_string(), CaFingerprint::of(&self.ca.der));
        Token { address, ca, secret }.to_string()
    }
}

impl Drop for FakeTarget {
    fn drop(&mut self) {
        self.task.abort();
        self.disconnect_all();
    }
}

async fn accept(
    listener: TcpListener,
    ca: Arc<Ca>,
    shared: Arc<Mutex<Shared>>,
    name: &'static str,
) {
    let acceptor = TlsAcceptor::from(ca.server_tls(name));
    while let Ok((socket, _)) = listener.accept().await {
        shared.lock().unwrap().accepts += 1;
        let (acceptor, ca, shared) = (acceptor.clone(), ca.clone(), shared.clone());
        tokio::spawn(async move {
            if let Ok(stream) = acceptor.accept(socket).await {
                let _ = connection(stream, &ca, &shared).await;
            }
        });
    }
}

type Stream = TlsStream<TcpStream>;

async fn send(stream: &mut Stream, message: &FromTarget) -> std::io::Result<()> {
    let body = encode(message).unwrap();
    stream.write_all(&FrameKind::Control.header(body.len()).unwrap()).await?;
    stream.write_all(&body).await?;
    stream.flush().await
}

enum Frame {
    Message(FromAgent),
    Batch(Vec<u8>),
}

async fn connection(mut stream: Stream, ca: &Ca, shared: &Mutex<Shared>) -> std::io::Result<()> {
    let (sender, mut said) = mpsc::unbounded_channel();
    shared.lock().unwrap().say.push(sender);
    let authenticated = stream.get_ref().1.peer_certificates().is_some();
    let mut header = [0; HEADER_LEN];
    let mut have = 0;
    loop {
        while have < HEADER_LEN {
            tokio::select! {
                read = stream.read(&mut header[have..]) => match read? {
                    0 => return Ok(()),
                    n => have += n,
                },
                message = said.recv() => match message {
                    Some(Some(message)) => send(&mut stream, &message).await?,
                    _ => return Ok(()),
                },
            }
        }
        have = 0;
        let (kind, len) = FrameKind::parse(header).unwrap();
        let mut body = vec![0; len];
        stream.read_exact(&mut body).await?;
        let frame = match kind {
            FrameKind::Control => Frame::Message(decode(&body).unwrap()),
            FrameKind::Batch => Frame::Batch(body),
        };
        if matches!(&frame, Frame::Message(FromAgent::Hello { .. })) {
            assert!(authenticated, "Hello without a certificate");
            if !welcome(&mut stream, shared).await? {
                return Ok(());
            }
            continue;
        }
        for answer in take(frame, ca, shared) {
            send(&mut stream, &answer).await?;
        }
    }
}

/// False when the connection is to be closed.
async fn welcome(stream: &mut Stream, shared: &Mutex<Shared>) -> std::io::Result<bool> {
    let mood = {
        let mut shared = shared.lock().unwrap();
        shared.hellos += 1;
        shared.mood
    };
    let now = WallTime::now();
    match mood {
        Mood::Garbage => stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await?,
        Mood::HugeFrame => stream.write_all(&[1, 0xff, 0xff, 0xff, 0xff]).await?,
        Mood::StrangeVersion => send(stream, &FromTarget::Welcome { version: 99, now }).await?,
        Mood::Refuses => {
            let problem = Problem::harmless(5004, "host removed", "test", "enroll");
            send(stream, &FromTarget::Refused { volume: None, problem, retry: false }).await?;
        }
        Mood::Honest | Mood::AcksTheFuture => {
            send(stream, &FromTarget::Welcome { version: 1, now }).await?;
            return Ok(true);
        }
        Mood::Mute => {
            send(stream, &FromTarget::Welcome { version: 1, now }).await?;
            std::future::pending::<()>().await;
        }
    }
    stream.flush().await?;
    Ok(false)
}

fn take(frame: Frame, ca: &Ca, shared: &Mutex<Shared>) -> Vec<FromTarget> {
    let mut shared = shared.lock().unwrap();
    let message = match frame {
        Frame::Batch(bytes) => return batch(&bytes, &mut shared),
        Frame::Message(message) => message,
    };
    let certificate = |csr: &[u8], host| FromTarget::Certificate {
        certificate: ca.sign_host(csr, host, shared.certificate_days),
        ca: ca.der.to_vec(),
    };
    match message {
        FromAgent::Enroll { secret, host, csr, .. } => {
            if shared.secret.as_ref().is_none_or(|s| s.as_str() != secret) {
                let problem = Problem::harmless(5002, "the token was refused", "used", "new one");
                return vec![FromTarget::Refused { volume: None, problem, retry: false }];
            }
            let answer = certificate(&csr, host);
            shared.secret = None;
            vec![answer]
        }
        FromAgent::Renew { csr } => {
            shared.renewals += 1;
            shared.certificate_days = 365;
            // The host is in the request's name, as ours is the only one.
            let (_, parsed) = x509_parser_host(&csr);
            let certificate = ca.sign_host(&csr, parsed, 365);
            vec![FromTarget::Certificate { certificate, ca: ca.der.to_vec() }]
        }
        FromAgent::Open(open) => {
            let point_interval_ms = shared.point_interval_ms;
            let replica = shared.replicas.entry(open.volume).or_default();
            replica.opens += 1;
            let verdict =
                if open.acked > replica.durable { Verdict::Recopy } else { Verdict::Continue };
            vec![FromTarget::Opened(Opened {
                volume: open.volume,
                generation: Generation::new(1),
                durable: replica.durable,
                chain: replica.chain,
                verdict,
                point_interval_ms,
            })]
        }
        FromAgent::Report(_) => {
            shared.reports += 1;
            vec![]
        }
        FromAgent::Tagged { request, result } => {
            shared.tagged.push((request, result));
            vec![]
        }
        FromAgent::PointNote { problem, .. } => {
            shared.notes.push(problem.code.0);
            vec![]
        }
        FromAgent::Ping(n) => vec![FromTarget::Pong(n)],
        FromAgent::Hello { .. } | FromAgent::Close { .. } => vec![],
    }
}

fn x509_parser_host(csr: &[u8]) -> ((), HostId) {
    let csr = CertificateSigningRequestDer::from(csr);
    let request = CertificateSigningRequestParams::from_der(&csr).unwrap();
    let name = request.params.distinguished_name.get(&DnType::CommonName).unwrap();
    let rcgen::DnValue::Utf8String(name) = name else { panic!("{name:?}") };
    ((), name.parse().unwrap())
}

fn batch(bytes: &[u8], shared: &mut Shared) -> Vec<FromTarget> {
    let checked = RawBatch::parse(bytes).unwrap().check().unwrap();
    let head = *checked.header();
    let mood = shared.mood;
    let replica = shared.replicas.get_mut(&head.volume).expect("a batch before Open");
    if (head.prev, head.prev_chain) != (replica.durable, replica.chain) {
        replica.reopens += 1;
        let reason = format!("{} does not follow {}", head.prev, replica.durable);
        return vec![FromTarget::Reopen { volume: head.volume, reason }];
    }
    for record in checked.records() {
        if let Some(payload) = record.body.payload() {
            let len = usize::try_from(record.body.extent().unwrap().len()).unwrap();
            let mut bytes = Vec::new();
            checked.read_payload(record.seq, payload, len, &mut bytes).unwrap();
            replica.payloads.insert(record.seq.get(), bytes);
        }
        replica.records.push(record);
    }
    (replica.durable, replica.chain) = (head.last(), head.chain);
    let durable = match mood {
        Mood::AcksTheFuture => Lsn::new(head.epoch, head.last_seq.next()),
        _ => head.last(),
    };
    vec![FromTarget::Ack { volume: head.volume, durable, chain: head.chain }]
}
