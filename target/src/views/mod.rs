//! Views: recovery points opened as writable NBD exports and block devices, each with a private
//! scratch.
//!
//! A view reads its point from the store and keeps its own writes; replication goes on under it
//! and never waits for it. Views end with the daemon.

mod block;
mod device;
mod export;
mod scratch;
mod tend;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use farshore_blkfilter::device::Device;
use farshore_blkfilter::frontend::nbd::{self, Export, Exports, Server};
use farshore_extent::{BlockSizes, Extent, Lsn, PointKind, Problem, ViewId, VolumeSize, WallTime};
use farshore_protocol::admin::{OpenView, PointChoice, ViewInfo};
use farshore_protocol::paths::{MAX_SOCKET_PATH, Paths};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use crate::catalogue::{PointRow, ViewRow, Wanted};
use crate::daemon::{Daemon, blocking};
use crate::replica::Replica;
use crate::store::{Content, PointReader};
use crate::worker::{Place, Work};
use crate::{clock, durable_fs, problem};
use block::BlockDevice;
pub(crate) use block::Mark;
use device::{PointBytes, PointReadError, ViewDevice};
use scratch::Scratch;
use tend::Lost;

/// How long clients of a view that is closed get to end in good order.
const CLOSE_GRACE: Duration = Duration::from_secs(2);

impl PointBytes for PointReader {
    fn size(&self) -> VolumeSize {
        PointReader::size(self)
    }

    fn blocks(&self) -> BlockSizes {
        PointReader::blocks(self)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), PointReadError> {
        self.read_at(out, offset).map_err(|e| PointReadError(e.to_string()))
    }

    fn zeroes(&self, extent: Extent, max: usize) -> Vec<(Extent, bool)> {
        match self.contents(extent, max) {
            Ok(pieces) => pieces.into_iter().map(|(e, c)| (e, c == Content::Zero)).collect(),
            // Reading it will say what is wrong.
            Err(_) => vec![(extent, false)],
        }
    }
}

/// An open view. Dropping it stops its exports.
struct View {
    info: ViewInfo,
    device: Arc<ViewDevice>,
    replica: Arc<Replica>,
    server: Server,
    block: Option<BlockDevice>,
    /// Its block device was taken away.
    lost: Option<Lost>,
    tls: Option<JoinHandle<()>>,
}

impl View {
    fn info(&self) -> ViewInfo {
        let mut info = ViewInfo { scratch_used: self.device.used(), ..self.info.clone() };
        if let Some(lost) = &self.lost {
            info.device = None;
            info.device_lost = Some(lost.why.clone());
        }
        info
    }

    /// Ends the exports; waits for clients a little.
    fn end(mut self) {
        if let Some(tls) = self.tls.take() {
            tls.abort();
        }
        if let Some(block) = self.block.take() {
            block.remove();
        }
        if !self.server.stop(CLOSE_GRACE) {
            tracing::warn!(view = %self.info.view, "clients of a closed view were cut off");
        }
        self.replica.update(|facts| facts.views = facts.views.saturating_sub(1));
    }
}

#[derive(Default)]
struct Open {
    views: BTreeMap<ViewId, View>,
    /// Places taken by views that are being opened.
    opening: usize,
}

/// All open views.
#[derive(Default)]
pub(crate) struct Views(Mutex<Open>);

/// One place among the open views, given back when dropped.
struct Ticket<'a>(&'a Views);

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.0.lock().opening -= 1;
    }
}

impl Views {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ticket(&self, limit: usize) -> Result<Ticket<'_>, Problem> {
        let mut open = self.lock();
        if open.views.len() + open.opening >= limit {
            return Err(problem::too_many_views(limit));
        }
        open.opening += 1;
        Ok(Ticket(self))
    }

    /// The open ones.
    pub(crate) fn list(&self) -> Vec<ViewInfo> {
        self.lock().views.values().map(View::info).collect()
    }

    /// Ends all of them.
    pub(crate) fn end_all(&self) {
        let views = std::mem::take(&mut self.lock().views);
        views.into_values().for_each(View::end);
    }

    /// Closes a view and forgets its scratch; `note` is kept as evidence. Blocks.
    ///
    /// # Errors
    /// FS-6607 while somebody uses its device: it stays open then.
    pub(crate) fn close(&self, daemon: &Daemon, view: ViewId, note: &str) -> Result<(), Problem> {
        let found = self.lock().views.remove(&view).ok_or_else(|| problem::no_view(&view))?;
        if let Some(Err(problem)) = found.block.as_ref().map(BlockDevice::unused) {
            self.lock().views.insert(view, found);
            return Err(problem);
        }
        let info = found.info();
        found.end();
        daemon.catalogue.lock().close_view(view, WallTime::now(), note)?;
        let text = format!(
            "a view of {} was closed, {} bytes written to it",
            clock::show(info.time),
            info.scratch_used
        );
        daemon.catalogue.note(0, Some(&info.volume), text);
        Ok(())
    }
}

/// Makes the directories of scratches and sockets and empties them of what a crash left; removes
/// the block devices it left.
pub(crate) fn prepare(scratches: &Path, paths: &Paths, mark: Mark) -> Result<(), Problem> {
    block::remove_stale(mark);
    for dir in [scratches, &sockets(paths)] {
        durable_fs::create_private_dir(dir).map_err(|e| problem::file("create", dir, &e))?;
        let stale = std::fs::read_dir(dir).map_err(|e| problem::file("read", dir, &e))?;
        for entry in stale {
            let removed = entry.and_then(|entry| std::fs::remove_file(entry.path()));
            removed.map_err(|e| problem::file("clean", dir, &e))?;
        }
    }
    Ok(())
}

fn sockets(paths: &Paths) -> PathBuf {
    paths.run.join("views")
}

/// Opens a view as `request` says.
pub(crate) async fn open(daemon: &Arc<Daemon>, request: OpenView) -> Result<ViewInfo, Problem> {
    let begun = Instant::now();
    let replica = daemon.replica(&request.volume)?;
    let _ticket = daemon.views.ticket(daemon.config.limits.views)?;
    let (place, chosen) = choose(daemon, &replica, &request.point).await?;
    let (reply, answer) = oneshot::channel();
    if !replica.send(Work::View { at: place, reply }).await {
        return Err(problem::stopping());
    }
    let (reader, time) = answer.await.map_err(|_| problem::stopping())??;
    let lsn = reader.at();
    let tls = listen_tls(daemon, request.tls_listen.as_deref()).await?;
    let (info, exports) = {
        let (replica, point) = (Arc::clone(&replica), chosen);
        let tls_address = tls.as_ref().map(|(_, address, _)| address.clone());
        let making = move |d: &Daemon| {
            make(d, replica, reader, &request, Chosen { point, lsn, time, tls_address, begun })
        };
        blocking(daemon, making).await?
    };
    if let Some((listener, _, acceptor)) = tls {
        let task = tokio::spawn(export::serve(listener, acceptor, exports));
        match daemon.views.lock().views.get_mut(&info.view) {
            Some(view) => view.tls = Some(task),
            None => task.abort(),
        }
    }
    Ok(info)
}

/// What was found out before a view is made.
struct Chosen {
    point: Option<PointRow>,
    lsn: Lsn,
    time: WallTime,
    tls_address: Option<String>,
    begun: Instant,
}

fn make(
    daemon: &Daemon,
    replica: Arc<Replica>,
    reader: PointReader,
    request: &OpenView,
    chosen: Chosen,
) -> Result<(ViewInfo, Exports), Problem> {
    let view = ViewId::random();
    let size = reader.size();
    let scratch_bytes = if request.scratch_bytes == 0 { size.get() } else { request.scratch_bytes };
    let dir = daemon.data.views();
    let scratch = Scratch::create(&dir, &view.to_string(), scratch_bytes)
        .map_err(|e| problem::file("create a scratch in", &dir, &e))?;
    let point = match chosen.point {
        Some(point) => Some(point),
        // A place that happens to be a point is one.
        None => daemon.catalogue.lock().find_point(replica.volume, &Wanted::At(chosen.lsn))?,
    };
    let time = point.as_ref().map_or(chosen.time, |row| row.at.time);
    let read_only = request.read_only;
    let device = ViewDevice::new(view.to_string(), Box::new(reader), scratch, read_only);
    let device = Arc::new(device);
    let export = request.volume.as_str().to_owned();
    let exports = Exports::new();
    let socket = socket_path(daemon, &request.volume, view)?;
    let offered = exports.add(Export {
        name: export.clone(),
        description: format!("{} at {}", request.volume, clock::show(time)),
        device: Arc::clone(&device) as _,
    });
    offered.map_err(|e| problem::export(&e))?;
    let server = Server::bind_unix(&socket, exports.clone(), nbd::Config::default())
        .map_err(|e| problem::export(&format!("{}: {e}", socket.display())))?;
    let served: Arc<dyn Device> = Arc::clone(&device) as _;
    let mark = Mark::of(daemon.authority.fingerprint());
    let block = request.device.then(|| BlockDevice::start(&served, mark, view)).transpose()?;
    let open_micros = u64::try_from(chosen.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    let info = ViewInfo {
        view,
        volume: request.volume.clone(),
        size,
        lsn: chosen.lsn,
        time,
        point: point.map(|row| row.point),
        nbd_socket: socket,
        export,
        tls_address: chosen.tls_address,
        opened: WallTime::now(),
        open_micros,
        scratch_used: 0,
        scratch_bytes: device.quota(),
        device: block.as_ref().map(BlockDevice::path),
        device_lost: None,
        read_only,
    };
    let row =
        ViewRow { view, volume: replica.volume, lsn: info.lsn, opened: info.opened, open_micros };
    if let Err(error) = daemon.catalogue.lock().put_view(&row) {
        block.into_iter().for_each(BlockDevice::remove);
        return Err(error.into());
    }
    let text = format!("a view of {} was opened", clock::show(time));
    daemon.catalogue.note(0, Some(&info.volume), text);
    replica.update(|facts| facts.views += 1);
    let opened = View { info: info.clone(), device, replica, server, block, lost: None, tls: None };
    daemon.views.lock().views.insert(view, opened);
    Ok((info, exports))
}

/// `run/views/NAME-xxxx.sock`.
fn socket_path(
    daemon: &Daemon,
    name: &farshore_extent::VolumeName,
    view: ViewId,
) -> Result<PathBuf, Problem> {
    let short: String = view.to_string().chars().take(8).collect();
    let path = sockets(&daemon.paths).join(format!("{name}-{short}.sock"));
    let len = path.as_os_str().len();
    if len > MAX_SOCKET_PATH {
        let why = format!(
            "{} has {len} bytes, a socket's path at most {MAX_SOCKET_PATH}",
            path.display()
        );
        return Err(problem::export(&why));
    }
    Ok(path)
}

type Listening = (TcpListener, String, TlsAcceptor);

async fn listen_tls(
    daemon: &Arc<Daemon>,
    address: Option<&str>,
) -> Result<Option<Listening>, Problem> {
    let Some(address) = address else { return Ok(None) };
    let listener = TcpListener::bind(address).await.map_err(|e| problem::listen(address, &e))?;
    let bound = listener.local_addr().map_err(|e| problem::listen(address, &e))?.to_string();
    let names = crate::init::certificate_names(&daemon.config);
    let tls = daemon.authority.export_tls(&names)?;
    Ok(Some((listener, bound, TlsAcceptor::from(tls))))
}

/// The place that a person means, with the point when it is one.
async fn choose(
    daemon: &Arc<Daemon>,
    replica: &Arc<Replica>,
    choice: &PointChoice,
) -> Result<(Place, Option<PointRow>), Problem> {
    let (wanted, words) = match choice {
        PointChoice::Time(time) => return Ok((Place::Time(*time), None)),
        PointChoice::At(lsn) => return Ok((Place::At(*lsn), None)),
        PointChoice::Latest => (Wanted::Newest, "yet".to_owned()),
        PointChoice::LatestApp => {
            (Wanted::OfKind(PointKind::App), "that is application-consistent".to_owned())
        }
        PointChoice::Id(id) => (Wanted::Numbered(*id), id.to_string()),
        PointChoice::Name(name) => (Wanted::Named(name.clone()), format!("named {name:?}")),
    };
    let replica = Arc::clone(replica);
    let found = blocking(daemon, move |d| {
        let row = d.catalogue.lock().find_point(replica.volume, &wanted)?;
        row.ok_or_else(|| problem::no_point(&replica.name(), &words))
    });
    let row = found.await?;
    Ok((Place::At(row.at.lsn), Some(row)))
}
