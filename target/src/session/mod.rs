//! One connection of one agent: who it is, what it may send, and handing everything on.
//!
//! A session verifies batches and passes them to the workers; it never touches a store and never
//! acknowledges anything itself.

mod outbox;
mod registry;
pub mod verdict;
mod wire;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use farshore_changelog::limits::MAX_BATCH_BYTES;
use farshore_changelog::{BatchError, RawBatch};
use farshore_extent::{HostId, Lsn, Problem, VolumeId, WallTime};
use farshore_protocol::message::{FromAgent, FromTarget, OpenVolume, VolumeReport};
use farshore_protocol::version;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

pub(crate) use outbox::Outbox;
pub(crate) use registry::{Registry, Session, SessionId};
pub(crate) use wire::WireError;
use wire::{Incoming, MAX_FIRST_MESSAGE, read_frame, write_message};

use crate::daemon::{Daemon, blocking};
use crate::replica::{Heard, Replica};
use crate::worker::Work;
use crate::{enrol, problem};

/// Most characters of a peer's text that are kept and shown.
const MAX_SHOWN: usize = 200;

/// Bytes of a batch whose chain, and so every byte, was verified in this process.
#[derive(Debug)]
pub(crate) struct VerifiedBatch(Vec<u8>);

impl VerifiedBatch {
    fn verify(bytes: Vec<u8>) -> Result<Self, BatchError> {
        let raw = RawBatch::parse(&bytes)?;
        let len = raw.header().total_len();
        raw.check()?;
        if len == bytes.len() { Ok(Self(bytes)) } else { Err(BatchError::Field("frame length")) }
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionEnd {
    /// The connection did.
    #[error("{0}")]
    Wire(#[from] WireError),
    /// The peer is not wanted, and was told.
    #[error("{0}")]
    Refused(Problem),
    /// The same host has connected again.
    #[error("the host has connected again")]
    Replaced,
    /// The daemon stops.
    #[error("the daemon stops")]
    Stopping,
    /// What waits for the peer could not be written.
    #[error("the connection does not take what is written to it")]
    NotWritten,
    /// Enrolled; nothing else is done on such a connection.
    #[error("enrolled")]
    Enrolled,
}

/// Serves a connection whose TLS handshake is done, until it ends. `certified` is the host of the
/// verified client certificate.
pub(crate) async fn serve<S>(
    daemon: &Arc<Daemon>,
    stream: S,
    certified: Option<HostId>,
) -> SessionEnd
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let limit = daemon.config.limits.handshake_timeout.duration();
    let first = match read_frame(&mut reader, limit, MAX_FIRST_MESSAGE).await {
        Ok(Incoming::Message(message)) => message,
        Ok(Incoming::Batch(_)) => {
            return refuse(&mut writer, problem::violation("a batch before Hello")).await;
        }
        Err(error) => return broken(&mut writer, error).await,
    };
    let Some(host) = certified else { return enroll(daemon, &mut writer, first).await };
    match admit(daemon, host, first).await {
        Ok(version) => run(daemon, host, version, reader, writer).await,
        Err(problem) => refuse(&mut writer, problem).await,
    }
}

async fn admit(daemon: &Arc<Daemon>, host: HostId, first: FromAgent) -> Result<u16, Problem> {
    let FromAgent::Hello { versions, host: claimed, host_name, software } = first else {
        return Err(problem::violation("an enrolled host begins with Hello"));
    };
    if claimed != host {
        return Err(problem::wrong_host());
    }
    let version =
        version::choose(&versions).ok_or_else(|| problem::no_common_version(&versions))?;
    let row = blocking(daemon, move |d| enrol::require_enrolled(&d.catalogue, host)).await?;
    let (calls_itself, software) = (shorten(&host_name), shorten(&software));
    tracing::info!(host = row.name, ?calls_itself, ?software, "host connected");
    Ok(version)
}

/// A peer's text as it is shown to people: bounded.
fn shorten(text: &str) -> String {
    text.chars().take(MAX_SHOWN).collect()
}

async fn enroll<W>(daemon: &Arc<Daemon>, writer: &mut W, first: FromAgent) -> SessionEnd
where
    W: AsyncWrite + Unpin,
{
    let FromAgent::Enroll { secret, host, host_name, csr } = first else {
        return refuse(writer, problem::no_certificate()).await;
    };
    let signed = blocking(daemon, move |d| {
        let host_name = &shorten(&host_name);
        let request = enrol::Request { secret: &secret, host, host_name, csr: &csr };
        enrol::enroll(&d.authority, &d.catalogue, &request)
    });
    match signed.await {
        Ok(certificate) => {
            let ca = daemon.authority.ca_certificate().to_vec();
            say_last(writer, &FromTarget::Certificate { certificate, ca }).await;
            SessionEnd::Enrolled
        }
        Err(problem) => refuse(writer, problem).await,
    }
}

async fn refuse(writer: &mut (impl AsyncWrite + Unpin), problem: Problem) -> SessionEnd {
    let retry = problem::is_passing(&problem);
    let refused = FromTarget::Refused { volume: None, problem: problem.clone(), retry };
    say_last(writer, &refused).await;
    SessionEnd::Refused(problem)
}

async fn broken(writer: &mut (impl AsyncWrite + Unpin), error: WireError) -> SessionEnd {
    if error.is_violation() {
        refuse(writer, problem::violation(error)).await
    } else {
        error.into()
    }
}

/// The last word on a connection; whether it arrives is the peer's affair.
async fn say_last(writer: &mut (impl AsyncWrite + Unpin), message: &FromTarget) {
    let said = async {
        write_message(writer, message).await?;
        writer.flush().await?;
        writer.shutdown().await
    };
    let patience = std::time::Duration::from_secs(5);
    if !matches!(tokio::time::timeout(patience, said).await, Ok(Ok(()))) {
        tracing::debug!("the peer did not take the last message");
    }
}

async fn run<S>(
    daemon: &Arc<Daemon>,
    host: HostId,
    version: u16,
    mut reader: ReadHalf<S>,
    writer: WriteHalf<S>,
) -> SessionEnd
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let session = daemon.sessions.enter(host);
    session.outbox.send(FromTarget::Welcome { version, now: WallTime::now() });
    let mut peer = Peer {
        daemon: Arc::clone(daemon),
        host,
        session: Arc::clone(&session),
        volumes: BTreeMap::new(),
    };
    let limit = daemon.config.limits.idle_timeout.duration();
    let mut writing = tokio::spawn(write_outbox(Arc::clone(&session.outbox), writer, limit));
    let end = tokio::select! {
        end = peer.read_all(&mut reader) => end,
        () = session.replaced() => SessionEnd::Replaced,
        () = daemon.stopped() => SessionEnd::Stopping,
        _ = &mut writing => SessionEnd::NotWritten,
    };
    if let SessionEnd::Refused(problem) = &end {
        let (problem, retry) = (problem.clone(), problem::is_passing(problem));
        session.outbox.send(FromTarget::Refused { volume: None, problem, retry });
    }
    session.outbox.close();
    daemon.sessions.leave(host, session.id);
    peer.detach_all().await;
    if !writing.is_finished() {
        let patience = std::time::Duration::from_secs(5);
        if tokio::time::timeout(patience, &mut writing).await.is_err() {
            writing.abort();
        }
    }
    end
}

/// Writes what the outbox holds until it is closed and empty, or the peer takes nothing for
/// `limit`.
async fn write_outbox<S>(outbox: Arc<Outbox>, mut writer: WriteHalf<S>, limit: std::time::Duration)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    loop {
        let messages = outbox.take().await;
        let closed = messages.is_empty();
        let write = async {
            for message in &messages {
                write_message(&mut writer, message).await?;
            }
            if closed { writer.shutdown().await } else { writer.flush().await }
        };
        if closed || !matches!(tokio::time::timeout(limit, write).await, Ok(Ok(()))) {
            return;
        }
    }
}

/// An admitted agent.
struct Peer {
    daemon: Arc<Daemon>,
    host: HostId,
    session: Arc<Session>,
    /// Volumes opened on this connection.
    volumes: BTreeMap<VolumeId, Arc<Replica>>,
}

impl Peer {
    async fn read_all(&mut self, reader: &mut (impl AsyncRead + Unpin)) -> SessionEnd {
        let limit = self.daemon.config.limits.idle_timeout.duration();
        loop {
            let handled = match read_frame(reader, limit, MAX_BATCH_BYTES).await {
                Ok(Incoming::Message(message)) => self.message(message).await,
                Ok(Incoming::Batch(bytes)) => self.batch(bytes).await,
                Err(error) if error.is_violation() => Err(problem::violation(error)),
                Err(error) => return error.into(),
            };
            if let Err(problem) = handled {
                return SessionEnd::Refused(problem);
            }
        }
    }

    /// An error ends the connection.
    async fn message(&mut self, message: FromAgent) -> Result<(), Problem> {
        match message {
            FromAgent::Hello { .. } | FromAgent::Enroll { .. } => {
                Err(problem::violation("Hello or Enroll in the middle of a session"))
            }
            FromAgent::Renew { csr } => self.renew(csr).await,
            FromAgent::Open(open) => self.open(open).await,
            FromAgent::Close { volume, unprotected } => self.close(volume, unprotected).await,
            FromAgent::Report(report) => self.report(report),
            FromAgent::Tagged { request, result } => {
                self.session.tagged(request, result);
                Ok(())
            }
            FromAgent::Ping(n) => {
                self.session.outbox.send(FromTarget::Pong(n));
                Ok(())
            }
            FromAgent::PointNote { volumes, lsn, problem } => {
                self.point_note(&volumes, lsn, problem).await;
                Ok(())
            }
        }
    }

    async fn renew(&self, csr: Vec<u8>) -> Result<(), Problem> {
        let host = self.host;
        let certificate =
            blocking(&self.daemon, move |d| enrol::renew(&d.authority, &d.catalogue, host, &csr));
        let certificate = certificate.await?;
        let ca = self.daemon.authority.ca_certificate().to_vec();
        self.session.outbox.send(FromTarget::Certificate { certificate, ca });
        Ok(())
    }

    /// A volume that is refused does not disturb the others.
    async fn open(&mut self, open: OpenVolume) -> Result<(), Problem> {
        let volume = open.volume;
        let (host, request) = (self.host, open.clone());
        let replica = blocking(&self.daemon, move |d| d.admit_volume(host, &request)).await;
        match replica {
            Ok(replica) => {
                self.volumes.insert(volume, Arc::clone(&replica));
                let outbox = Arc::clone(&self.session.outbox);
                let work = Work::Open { session: self.session.id, outbox, open };
                if !replica.send(work).await {
                    return Err(problem::stopping());
                }
            }
            Err(problem) => {
                let retry = problem::is_passing(&problem);
                let refused = FromTarget::Refused { volume: Some(volume), problem, retry };
                self.session.outbox.send(refused);
            }
        }
        Ok(())
    }

    fn opened(&self, volume: VolumeId) -> Result<&Arc<Replica>, Problem> {
        let missing = || problem::violation(format!("volume {volume} was not opened"));
        self.volumes.get(&volume).ok_or_else(missing)
    }

    async fn batch(&self, bytes: Vec<u8>) -> Result<(), Problem> {
        let header = RawBatch::parse(&bytes).map(|raw| *raw.header());
        let header = header.map_err(problem::violation)?;
        let replica = self.opened(header.volume)?;
        let session = self.session.id;
        // BLAKE3 over up to 2.3 MiB takes about a millisecond: not on a thread of the runtime.
        let verified = tokio::task::spawn_blocking(move || VerifiedBatch::verify(bytes)).await;
        let work = match verified {
            Ok(Ok(batch)) => Work::Batch { session, batch },
            Ok(Err(why)) => Work::Damaged { session, why: why.to_string() },
            Err(_) => return Err(problem::stopping()),
        };
        if replica.send(work).await { Ok(()) } else { Err(problem::stopping()) }
    }

    async fn close(&mut self, volume: VolumeId, unprotected: bool) -> Result<(), Problem> {
        let replica = Arc::clone(self.opened(volume)?);
        self.volumes.remove(&volume);
        replica.send(Work::Detach { session: self.session.id }).await;
        if unprotected {
            blocking(&self.daemon, move |d| d.mark_unprotected(&replica)).await?;
        }
        Ok(())
    }

    fn report(&self, mut report: VolumeReport) -> Result<(), Problem> {
        // A report may cross a refusal on the way; only a replica of ours is updated.
        if let Some(replica) = self.volumes.get(&report.volume) {
            report.reason = shorten(&report.reason);
            let ahead = report.now.nanos().saturating_sub(WallTime::now().nanos());
            let unsent_bytes = report.backlog_bytes.saturating_add(report.copy_remaining);
            replica.update(|facts| {
                facts.heard = Some(Heard { at: WallTime::now(), unsent_bytes });
                facts.source_ahead = ahead;
                facts.report = Some((report, Instant::now()));
            });
        }
        Ok(())
    }

    /// Of volumes that this source has opened; others are none of its business.
    async fn point_note(&self, volumes: &[VolumeId], lsn: Lsn, mut problem: Problem) {
        for text in [&mut problem.what, &mut problem.risk, &mut problem.why, &mut problem.next] {
            *text = shorten(text);
        }
        let opened = volumes.iter().filter_map(|volume| self.volumes.get(volume));
        let opened: Vec<_> = opened.take(volumes.len().min(self.volumes.len())).cloned().collect();
        let noted = blocking(&self.daemon, move |d| {
            for replica in opened {
                let text = format!("point at {lsn}: {}: {}", problem.what, problem.why);
                d.catalogue.note(problem.code.0, Some(&replica.name()), text);
                d.catalogue.lock().add_point_note(replica.volume, lsn, &problem)?;
            }
            Ok(())
        });
        if let Err(problem) = noted.await {
            tracing::warn!(%problem, "a note on a point was not kept");
        }
    }

    async fn detach_all(&self) {
        for replica in self.volumes.values() {
            replica.send(Work::Detach { session: self.session.id }).await;
        }
    }
}
