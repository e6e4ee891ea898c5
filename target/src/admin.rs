//! The admin socket: what the command line asks of the daemon. Only root and the daemon's own
//! user get in.
//!
//! One request, one `Result<reply, Problem>`, any number of times a connection. Changes nothing
//! itself: asks the parts that own things.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use farshore_changelog::codec;
use farshore_changelog::limits::MAX_CONTROL_MESSAGE;
use farshore_extent::{Lsn, PointKind, Problem, VolumeName};
use farshore_protocol::admin::{EventInfo, HostInfo, PointInfo, TargetReply, TargetRequest};
use farshore_protocol::message::MAX_TAG_NAME;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::catalogue::{PointRow, Wanted};
use crate::daemon::{Daemon, blocking};
use crate::replica::Replica;
use crate::worker::Work;
use crate::{durable_fs, enrol, failover, policy, problem, status, upkeep, views};

/// Connections at a time.
const MAX_CONNECTIONS: usize = 64;
/// A connection that asks nothing for so long is closed.
const IDLE: Duration = Duration::from_secs(300);
/// Most bytes of entries in one answer: the rest of a message's limit is for its frame.
const ANSWER_BYTES: usize = MAX_CONTROL_MESSAGE - 4096;
/// What the hooks of a source may add to the time that a tag takes.
const HOOKS: Duration = Duration::from_secs(330);
/// Events that fit one answer whatever is in them.
const MAX_EVENTS: u32 = 1000;

/// Binds the socket, replacing a dead one.
pub(crate) fn bind(daemon: &Daemon) -> Result<UnixListener, Problem> {
    let path = daemon.paths.target_socket();
    let bad = |e: std::io::Error| problem::listen(&path.display().to_string(), &e);
    durable_fs::create_private_dir(&daemon.paths.run).map_err(bad)?;
    if std::os::unix::net::UnixStream::connect(&path).is_ok() {
        return Err(problem::listen(&path.display().to_string(), &"another daemon listens there"));
    }
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(bad(e)),
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(bad)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(bad)?;
    Ok(listener)
}

/// Serves until the daemon stops, then removes the socket.
pub(crate) async fn serve(daemon: Arc<Daemon>, listener: UnixListener) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = daemon.stopped() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors or the like: pause, so that the loop does not spin.
                tracing::warn!(%error, "an admin connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        if !is_owner(&stream) {
            tracing::warn!("a connection of another user to the admin socket was refused");
            continue;
        }
        let daemon = Arc::clone(&daemon);
        connections.spawn(async move {
            if let Err(error) = connection(&daemon, stream).await {
                tracing::debug!(%error, "admin connection ended");
            }
            drop(place);
        });
    }
    // Left behind, it is dead and gets replaced.
    let _ = std::fs::remove_file(daemon.paths.target_socket());
}

fn is_owner(stream: &UnixStream) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own)
}

async fn connection(daemon: &Arc<Daemon>, mut stream: UnixStream) -> std::io::Result<()> {
    loop {
        let Some(body) = tokio::time::timeout(IDLE, read_body(&mut stream)).await?? else {
            return Ok(());
        };
        let answer: Result<TargetReply, Problem> = match codec::decode(&body) {
            Ok(request) => tokio::select! {
                answer = handle(daemon, request) => answer,
                () = daemon.stopped() => Err(problem::stopping()),
            },
            Err(error) => Err(problem::violation(error)),
        };
        let body = codec::encode(&answer).map_err(std::io::Error::other)?;
        let len = u32::try_from(body.len()).map_err(std::io::Error::other)?;
        stream.write_all(&len.to_le_bytes()).await?;
        stream.write_all(&body).await?;
    }
}

/// One framed message; none when the peer has left.
async fn read_body(stream: &mut UnixStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut len = [0; 4];
    match stream.read_exact(&mut len).await {
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    };
    let len = u32::from_le_bytes(len) as usize;
    if len > MAX_CONTROL_MESSAGE {
        return Err(std::io::Error::other(format!("request of {len} bytes refused")));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await?;
    Ok(Some(body))
}

async fn handle(daemon: &Arc<Daemon>, request: TargetRequest) -> Result<TargetReply, Problem> {
    match request {
        TargetRequest::Status => blocking(daemon, status::all).await.map(TargetReply::Status),
        TargetRequest::Points { volume, limit } => {
            points(daemon, volume, None, limit).await.map(TargetReply::Points)
        }
        TargetRequest::PointsBefore { volume, before, limit } => {
            points(daemon, volume, Some(before), limit).await.map(TargetReply::Points)
        }
        TargetRequest::Tag { volumes, name, kind } => {
            tag(daemon, volumes, name, kind).await.map(TargetReply::Tagged)
        }
        TargetRequest::NewToken { host_name, valid_seconds, address } => {
            let made = blocking(daemon, move |d| {
                enrol::new_token(&d.authority, &d.catalogue, &host_name, valid_seconds, &address)
            });
            made.await.map(TargetReply::Token)
        }
        TargetRequest::Hosts => blocking(daemon, hosts).await.map(TargetReply::Hosts),
        TargetRequest::OpenView(open) => {
            views::open(daemon, open).await.map(|view| TargetReply::View(Box::new(view)))
        }
        TargetRequest::Views => Ok(TargetReply::Views(daemon.views.list(daemon))),
        TargetRequest::CloseView { view, note } => {
            let closed = blocking(daemon, move |d| failover::close_test(d, view, &note));
            closed.await.map(|()| TargetReply::Done)
        }
        TargetRequest::SetInterval { volume, interval_ms } => {
            let replica = daemon.replica(&volume)?;
            let set = blocking(daemon, move |d| d.set_interval(&replica, interval_ms));
            set.await.map(|()| TargetReply::Done)
        }
        TargetRequest::Scrub { volume } => {
            let replica = daemon.replica(&volume)?;
            replica.send(Work::Scrub { bytes: upkeep::SLOWEST_SCRUB, begin: true }).await;
            Ok(TargetReply::Done)
        }
        TargetRequest::FlattenView(request) => {
            let shared = Arc::clone(daemon);
            let begun = blocking(daemon, move |_| views::flatten(&shared, &request));
            begun.await.map(|()| TargetReply::Done)
        }
        TargetRequest::StopFlatten { view } => {
            let stopped = blocking(daemon, move |d| views::stop_flatten(d, view));
            stopped.await.map(|()| TargetReply::Done)
        }
        request @ (TargetRequest::PreviewFailover(_)
        | TargetRequest::Failover(_)
        | TargetRequest::CancelFailover { .. }
        | TargetRequest::Jobs { .. }
        | TargetRequest::Job { .. }) => failover::answer(daemon, request).await,
        TargetRequest::Events { limit } => {
            let limit = if limit == 0 { MAX_EVENTS } else { limit.min(MAX_EVENTS) };
            blocking(daemon, move |d| events(d, limit)).await.map(TargetReply::Events)
        }
        TargetRequest::Policies => blocking(daemon, policy::list).await.map(TargetReply::Policies),
        TargetRequest::Policy { volume } => {
            let replica = daemon.replica(&volume)?;
            let report = blocking(daemon, move |d| policy::show(d, &replica));
            report.await.map(|report| TargetReply::Policy(Box::new(report)))
        }
        TargetRequest::SetPolicy(set) => {
            let replica = daemon.replica(&set.volume)?;
            let report = blocking(daemon, move |d| policy::set(d, &replica, &set));
            report.await.map(|report| TargetReply::Policy(Box::new(report)))
        }
    }
}

/// Newest first, before `before`, at most `limit` (0 is all), and never more than one message
/// holds: the caller asks on with the last one's place.
async fn points(
    daemon: &Arc<Daemon>,
    volume: VolumeName,
    before: Option<Lsn>,
    limit: u32,
) -> Result<Vec<PointInfo>, Problem> {
    let replica = daemon.replica(&volume)?;
    blocking(daemon, move |d| {
        let rows = d.catalogue.lock().points(replica.volume, before, limit)?;
        let mut bytes = 0;
        let mut fits = |info: &PointInfo| {
            // The texts, their lengths and the numbers, rounded up.
            let note = info.note.as_ref().map_or(0, |note| {
                note.what.len() + note.risk.len() + note.why.len() + note.next.len() + 64
            });
            bytes += 128 + info.name.len() + info.volume.as_str().len() + note;
            bytes <= ANSWER_BYTES
        };
        let infos = rows.into_iter().map(|row| info(d, &volume, row));
        infos.take_while(|info| info.as_ref().map_or(true, &mut fits)).collect()
    })
    .await
}

fn info(daemon: &Daemon, volume: &VolumeName, row: PointRow) -> Result<PointInfo, Problem> {
    let note = daemon.catalogue.lock().point_note(row.volume, row.at.lsn)?;
    Ok(PointInfo {
        point: row.point,
        volume: volume.clone(),
        lsn: row.at.lsn,
        time: row.at.time,
        kind: row.at.kind,
        name: row.at.name,
        pinned: row.pinned,
        note,
    })
}

/// Asks the source for a named marker and waits until it is a point here.
async fn tag(
    daemon: &Arc<Daemon>,
    names: Vec<VolumeName>,
    tag: String,
    kind: PointKind,
) -> Result<Vec<PointInfo>, Problem> {
    if tag.is_empty() || tag.len() > MAX_TAG_NAME {
        return Err(problem::not_tagged(format!("a tag has 1 to {MAX_TAG_NAME} bytes")));
    }
    let replicas: Result<Vec<Arc<Replica>>, Problem> =
        names.iter().map(|name| daemon.replica(name)).collect();
    let replicas = replicas?;
    let Some(first) = replicas.first() else {
        return Err(problem::not_tagged("no volume was named"));
    };
    let host = first.facts().row.host;
    if replicas.iter().any(|replica| replica.facts().row.host != host) {
        return Err(problem::not_tagged("the volumes are on more than one host"));
    }
    let ids = replicas.iter().map(|replica| replica.volume).collect();
    let answer = daemon.sessions.tag(host, ids, kind, tag);
    let answer = answer.ok_or_else(|| problem::not_tagged("the source is not connected"))?;
    let mut limit = daemon.config.limits.tag_timeout.duration();
    if kind == PointKind::App {
        limit += HOOKS;
    }
    let durable = async {
        let placed = answer.await;
        let lsn = placed.map_err(|_| problem::not_tagged("the source has disconnected"))??;
        for replica in &replicas {
            point_arrives(daemon, replica, lsn, kind).await?;
        }
        Ok(lsn)
    };
    let lsn = tokio::time::timeout(limit, durable).await.unwrap_or_else(|_| {
        Err(problem::not_tagged(format!("the marker was not durable here within {limit:?}")))
    })?;
    blocking(daemon, move |d| {
        let mut made = Vec::new();
        for replica in &replicas {
            let row = d.catalogue.lock().find_point(replica.volume, &Wanted::At(lsn))?;
            let row = row.ok_or_else(|| {
                problem::not_tagged(format!("{} was catching up at that moment", replica.name()))
            })?;
            made.push(info(d, &replica.name(), row)?);
        }
        Ok(made)
    })
    .await
}

/// Waits until the marker at `lsn` is a point, or, unless it may wait for its commit, never will be.
async fn point_arrives(
    daemon: &Arc<Daemon>,
    replica: &Arc<Replica>,
    lsn: Lsn,
    kind: PointKind,
) -> Result<(), Problem> {
    let mut upto = lsn;
    loop {
        let reached = replica.wait_for_points(upto).await;
        let volume = replica.volume;
        let found = blocking(daemon, move |d| {
            Ok(d.catalogue.lock().find_point(volume, &Wanted::At(lsn))?.is_some())
        });
        if found.await? || kind != PointKind::App {
            return Ok(());
        }
        upto = crate::store::behind(reached);
    }
}

fn hosts(daemon: &Daemon) -> Result<Vec<HostInfo>, Problem> {
    let rows = daemon.catalogue.lock().hosts()?;
    let enrolled = rows.into_iter().filter(|row| !row.removed);
    let info = |row: crate::catalogue::HostRow| HostInfo {
        host: row.host,
        name: row.name,
        enrolled: row.enrolled,
        connected: daemon.sessions.get(row.host).is_some(),
    };
    Ok(enrolled.map(info).collect())
}

fn events(daemon: &Daemon, limit: u32) -> Result<Vec<EventInfo>, Problem> {
    let rows = daemon.catalogue.lock().events(limit)?;
    let mut bytes = 0;
    let fits = |event: &EventInfo| {
        bytes += 64 + event.text.len() + event.volume.as_ref().map_or(0, |v| v.as_str().len());
        bytes <= ANSWER_BYTES
    };
    let info = |row: crate::catalogue::EventRow| EventInfo {
        time: row.time,
        code: row.code,
        volume: row.volume,
        text: row.text,
    };
    Ok(rows.into_iter().map(info).take_while(fits).collect())
}
