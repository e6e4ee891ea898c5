//! The connection to the target: TCP (or HTTP CONNECT), TLS 1.3, frames, keep-alive.
//!
//! Who is the target: a certificate signed by the CA pinned at enrolment, with the fixed name
//! [`SERVER_NAME`]. The name or address that was dialled is not compared: targets are reached
//! through NAT, tunnels and changing addresses, the CA belongs to one target alone and signs that
//! name for nobody else (certificates of hosts carry none and may serve nobody), so the dialled
//! name would add nothing but failures.
//!
//! Owns no decision: what is sent comes from the [`Outbox`], what arrives goes to the session.

mod outbox;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use farshore_changelog::codec;
use farshore_extent::{HostId, Problem};
use farshore_protocol::frame::{FrameKind, HEADER_LEN};
use farshore_protocol::message::{FromAgent, FromTarget};
use farshore_protocol::token::SERVER_NAME;
use farshore_protocol::version;
use rustls::pki_types::ServerName;
use tokio::io::{
    AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf,
    WriteHalf,
};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::config::split_address;
use crate::limits::{CONNECT_TIMEOUT, PEER_TIMEOUT, PING_AFTER};
use crate::problem;
use crate::session::LinkFailure;

pub use outbox::{Item, Outbox};

/// Longest header of a proxy's answer, in bytes.
const MAX_PROXY_HEADER: u64 = 8 << 10;

/// Where to dial and how long to wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkConfig {
    /// `host:port` of the target.
    pub address: String,
    /// HTTP proxy, `host:port`.
    pub proxy: Option<String>,
    /// Dial, TLS and handshake together.
    pub connect_timeout: Duration,
    /// Between pings.
    pub ping_after: Duration,
    /// A peer that says nothing for so long is dead.
    pub peer_timeout: Duration,
}

impl LinkConfig {
    /// The product's times.
    #[must_use]
    pub const fn new(address: String, proxy: Option<String>) -> Self {
        Self {
            address,
            proxy,
            connect_timeout: CONNECT_TIMEOUT,
            ping_after: PING_AFTER,
            peer_timeout: PEER_TIMEOUT,
        }
    }
}

/// Who says hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// Identity in the certificate.
    pub host: HostId,
    /// Name of the host.
    pub host_name: String,
}

/// A connection with TLS done.
#[derive(Debug)]
pub struct Link {
    stream: TlsStream<TcpStream>,
    config: LinkConfig,
}

impl Link {
    /// Dials and does TLS.
    ///
    /// # Errors
    /// FS-5101 to FS-5106; no retry after an authentication error.
    pub async fn dial(
        config: &LinkConfig,
        tls: Arc<rustls::ClientConfig>,
    ) -> Result<Self, LinkFailure> {
        let address = &config.address;
        let connect = async {
            let socket = connect(config).await?;
            let name = ServerName::try_from(SERVER_NAME)
                .map_err(|e| retry(problem::violation(address, &e)))?;
            let stream = TlsConnector::from(tls)
                .connect(name, socket)
                .await
                .map_err(|e| classify(address, &e, problem::unreachable))?;
            Ok(Self { stream, config: config.clone() })
        };
        match timeout(config.connect_timeout, connect).await {
            Ok(result) => result,
            Err(_) => Err(retry(problem::unreachable(address, &"it does not answer"))),
        }
    }

    /// Whether the target takes this host's certificate: in TLS 1.3 the refusal comes after the
    /// handshake, so one that says nothing for `patience` is taken for content.
    ///
    /// # Errors
    /// FS-5102, FS-5104.
    pub async fn accepted(&mut self, patience: Duration) -> Result<(), LinkFailure> {
        let address = &self.config.address;
        let mut first = [0];
        match timeout(patience, self.stream.read(&mut first)).await {
            Err(_) => Ok(()),
            Ok(Ok(0)) => Err(retry(problem::lost(address, &"it closed the connection"))),
            Ok(Ok(_)) => Err(retry(problem::violation(address, &"it spoke first"))),
            Ok(Err(e)) => Err(classify(address, &e, problem::lost)),
        }
    }

    /// The certificates the target showed, DER.
    #[must_use]
    pub fn peer_certificates(&self) -> Vec<Vec<u8>> {
        let (_, connection) = self.stream.get_ref();
        connection.peer_certificates().unwrap_or_default().iter().map(|c| c.to_vec()).collect()
    }

    /// Sends one message and waits for one answer: handshake and enrolment.
    ///
    /// # Errors
    /// FS-5102, FS-5104, FS-5105, or the target's refusal.
    pub async fn ask(&mut self, message: &FromAgent) -> Result<FromTarget, LinkFailure> {
        let address = self.config.address.clone();
        let exchange = async {
            write_control(&mut self.stream, message).await?;
            self.stream.flush().await?;
            read_control(&mut self.stream).await
        };
        match timeout(self.config.connect_timeout, exchange).await {
            Ok(Ok(FromTarget::Refused { problem, retry, .. })) => {
                Err(LinkFailure { problem, retry })
            }
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(e)) => Err(classify(&address, &e, problem::lost)),
            Err(_) => Err(retry(problem::lost(&address, &"it did not answer the handshake"))),
        }
    }

    /// Hello and Welcome.
    ///
    /// # Errors
    /// As for [`Self::ask`].
    pub async fn greet(&mut self, greeting: &Greeting) -> Result<(), LinkFailure> {
        let hello = FromAgent::Hello {
            versions: version::SPOKEN.to_vec(),
            host: greeting.host,
            host_name: greeting.host_name.clone(),
            software: concat!("farshore ", env!("CARGO_PKG_VERSION")).to_owned(),
        };
        match self.ask(&hello).await? {
            FromTarget::Welcome { version, .. } if version::SPOKEN.contains(&version) => Ok(()),
            other => {
                let why = format!("it answered Hello with {}", kind(&other));
                Err(retry(problem::violation(&self.config.address, &why)))
            }
        }
    }

    /// Writes what is in the outbox and hands on what arrives, until the connection ends. Pongs
    /// are taken here.
    ///
    /// # Errors
    /// Always: why it ended.
    pub async fn run(self, outbox: Arc<Outbox>, incoming: mpsc::Sender<FromTarget>) -> LinkFailure {
        let address = self.config.address.clone();
        let (reader, writer) = tokio::io::split(self.stream);
        let error = tokio::select! {
            e = read_all(reader, incoming, self.config.peer_timeout) => e,
            e = write_all(writer, &outbox) => e,
            e = ping(&outbox, self.config.ping_after) => e,
        };
        classify(&address, &error, problem::lost)
    }
}

async fn connect(config: &LinkConfig) -> Result<TcpStream, LinkFailure> {
    let address = &config.address;
    let bad_address = || retry(problem::unreachable(address, &"the address is not HOST:PORT"));
    let target = split_address(address).ok_or_else(bad_address)?;
    let dialled = match config.proxy.as_deref() {
        None => target,
        Some(proxy) => split_address(proxy).ok_or_else(bad_address)?,
    };
    let socket = TcpStream::connect(dialled).await;
    let mut socket = match (&config.proxy, socket) {
        (_, Ok(socket)) => socket,
        (None, Err(e)) => return Err(retry(problem::unreachable(address, &e))),
        (Some(proxy), Err(e)) => return Err(retry(problem::proxy(proxy, address, &e))),
    };
    // Best effort: without it small messages wait a little.
    let _ = socket.set_nodelay(true);
    if let Some(proxy) = &config.proxy {
        let tunnel = tunnel(&mut socket, address).await;
        tunnel.map_err(|e| retry(problem::proxy(proxy, address, &e)))?;
    }
    Ok(socket)
}

/// HTTP CONNECT. Reads exactly the header of the answer: what follows is TLS.
async fn tunnel(socket: &mut TcpStream, address: &str) -> io::Result<()> {
    let request = format!("CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n\r\n");
    socket.write_all(request.as_bytes()).await?;
    let refused = |why: String| io::Error::new(io::ErrorKind::ConnectionRefused, why);
    // One byte at a time: a buffer could swallow the first bytes of TLS.
    let mut lines = BufReader::with_capacity(1, socket.take(MAX_PROXY_HEADER));
    let mut status = String::new();
    lines.read_line(&mut status).await?;
    let code = status.split(' ').nth(1).unwrap_or_default();
    if !status.starts_with("HTTP/1.") || !code.starts_with('2') {
        return Err(refused(format!("it answered: {}", status.trim())));
    }
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line).await? == 0 {
            return Err(refused("its answer has no end".to_owned()));
        }
        if line.trim_end().is_empty() {
            return Ok(());
        }
    }
}

async fn write_control(to: &mut (impl AsyncWrite + Unpin), message: &FromAgent) -> io::Result<()> {
    let invalid = |e: &dyn std::error::Error| io::Error::other(e.to_string());
    let body = codec::encode(message).map_err(|e| invalid(&e))?;
    let header = FrameKind::Control.header(body.len()).map_err(|e| invalid(&e))?;
    to.write_all(&[&header[..], &body].concat()).await
}

async fn read_control(from: &mut (impl AsyncRead + Unpin)) -> io::Result<FromTarget> {
    let invalid = |e: String| io::Error::new(io::ErrorKind::InvalidData, e);
    let mut header = [0; HEADER_LEN];
    from.read_exact(&mut header).await?;
    match FrameKind::parse(header).map_err(|e| invalid(e.to_string()))? {
        (FrameKind::Control, len) => {
            let mut body = vec![0; len];
            from.read_exact(&mut body).await?;
            codec::decode(&body).map_err(|e| invalid(e.to_string()))
        }
        (FrameKind::Batch, _) => Err(invalid("a target never sends batches".to_owned())),
    }
}

async fn read_all(
    reader: ReadHalf<TlsStream<TcpStream>>,
    incoming: mpsc::Sender<FromTarget>,
    limit: Duration,
) -> io::Error {
    let mut reader = BufReader::new(reader);
    loop {
        let message = match timeout(limit, read_control(&mut reader)).await {
            Ok(Ok(FromTarget::Pong(_))) => continue,
            Ok(Ok(message)) => message,
            Ok(Err(e)) => return e,
            Err(_) => {
                let why = format!("it has said nothing for {} s", limit.as_secs());
                return io::Error::new(io::ErrorKind::TimedOut, why);
            }
        };
        if incoming.send(message).await.is_err() {
            return io::Error::other("the agent is stopping");
        }
    }
}

async fn write_all(mut writer: WriteHalf<TlsStream<TcpStream>>, outbox: &Outbox) -> io::Error {
    loop {
        let written = match outbox.take() {
            Ok(Some(Item::Control(message))) => write_control(&mut writer, &message).await,
            Ok(Some(Item::Batch(batch))) => match FrameKind::Batch.header(batch.bytes.len()) {
                Ok(header) => match writer.write_all(&header).await {
                    Ok(()) => writer.write_all(&batch.bytes).await,
                    Err(e) => Err(e),
                },
                Err(e) => Err(io::Error::other(e.to_string())),
            },
            Ok(None) => match writer.flush().await {
                Ok(()) => {
                    outbox.ready().await;
                    Ok(())
                }
                Err(e) => Err(e),
            },
            Err(why) => Err(io::Error::new(io::ErrorKind::InvalidData, why)),
        };
        if let Err(e) = written {
            return e;
        }
    }
}

async fn ping(outbox: &Outbox, every: Duration) -> io::Error {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut n = 0;
    loop {
        ticks.tick().await;
        outbox.control(FromAgent::Ping(n));
        n += 1;
    }
}

const fn retry(problem: Problem) -> LinkFailure {
    LinkFailure { problem, retry: true }
}

/// An authentication error is not tried again; broken protocol and everything else is.
fn classify(
    address: &str,
    error: &io::Error,
    otherwise: fn(&str, &dyn std::fmt::Display) -> Problem,
) -> LinkFailure {
    use rustls::AlertDescription as Alert;
    let tls = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidCertificate(why)) => {
            LinkFailure { problem: problem::not_our_target(address, why), retry: false }
        }
        Some(rustls::Error::NoCertificatesPresented) => {
            LinkFailure { problem: problem::not_our_target(address, error), retry: false }
        }
        Some(rustls::Error::AlertReceived(
            alert @ (Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::AccessDenied
            | Alert::CertificateRequired),
        )) => {
            let why = format!("it said: {alert:?}");
            LinkFailure { problem: problem::certificate_refused(address, &why), retry: false }
        }
        Some(_) => retry(problem::violation(address, error)),
        None if error.kind() == io::ErrorKind::InvalidData => {
            retry(problem::violation(address, error))
        }
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            retry(otherwise(address, &"it closed the connection"))
        }
        None => retry(otherwise(address, error)),
    }
}

/// Name of a message for people; its content may be long.
const fn kind(message: &FromTarget) -> &'static str {
    match message {
        FromTarget::Welcome { .. } => "a version this program does not speak",
        FromTarget::Certificate { .. } => "Certificate",
        FromTarget::Opened(_) => "Opened",
        FromTarget::Refused { .. } => "Refused",
        FromTarget::Ack { .. } => "Ack",
        FromTarget::Reopen { .. } => "Reopen",
        FromTarget::Compared { .. } => "Compared",
        FromTarget::Policy { .. } => "Policy",
        FromTarget::Tag { .. } => "Tag",
        FromTarget::Replica { .. } => "Replica",
        FromTarget::Pong(_) => "Pong",
    }
}
