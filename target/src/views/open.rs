//! How a view is opened: for the first time, and again after a restart.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use farshore_blkfilter::device::Device;
use farshore_blkfilter::frontend::nbd::{self, Export, Exports, Server};
use farshore_extent::{
    BlockSizes, Extent, Lsn, PointId, PointKind, Problem, ViewId, VolumeSize, WallTime,
};
use farshore_protocol::admin::{OpenView, PointChoice, ViewInfo};
use farshore_protocol::paths::{MAX_SOCKET_PATH, Paths};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_rustls::TlsAcceptor;

use super::block::{BlockDevice, Mark};
use super::device::{Backing, PointBytes, PointReadError, ViewDevice};
use super::flatten::{self, Image};
use super::scratch::{Identity, Limits, Scratch};
use super::{Serving, View, drop_scratch, export, scratch_dir, sockets};
use crate::catalogue::{PointRow, ViewRow, Wanted};
use crate::config::LARGEST_SCRATCH;
use crate::daemon::{Daemon, blocking};
use crate::replica::Replica;
use crate::store::{Content, FileDisk, PointReader};
use crate::worker::{Place, Work};
use crate::{clock, problem};

impl PointBytes for PointReader {
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

/// A place that can be opened.
pub(crate) struct Located {
    pub(crate) lsn: Lsn,
    /// Its capture time.
    pub(crate) time: WallTime,
    /// The point, when it is one.
    pub(crate) point: Option<PointId>,
}

/// The place that a person means; it can be opened.
pub(crate) async fn locate(
    daemon: &Arc<Daemon>,
    replica: &Arc<Replica>,
    choice: &PointChoice,
) -> Result<Located, Problem> {
    let (place, chosen) = choose(daemon, replica, choice).await?;
    let (reader, time) = read(replica, place).await?;
    let (lsn, volume) = (reader.at(), replica.volume);
    let known =
        blocking(daemon, move |d| Ok(d.catalogue.lock().find_point(volume, &Wanted::At(lsn))?));
    let point = if chosen.is_some() { chosen } else { known.await? };
    let time = point.as_ref().map_or(time, |row| row.at.time);
    Ok(Located { lsn, time, point: point.map(|row| row.point) })
}

/// Opens a view as `request` says.
pub(crate) async fn open(daemon: &Arc<Daemon>, request: OpenView) -> Result<ViewInfo, Problem> {
    open_as(daemon, request, ViewId::random()).await
}

/// The same under an identity that was chosen before.
pub(crate) async fn open_as(
    daemon: &Arc<Daemon>,
    request: OpenView,
    view: ViewId,
) -> Result<ViewInfo, Problem> {
    let begun = Instant::now();
    let replica = daemon.replica(&request.volume)?;
    let _ticket = daemon.views.ticket(daemon.config.limits.views)?;
    let (place, point) = choose(daemon, &replica, &request.point).await?;
    let (reader, time) = read(&replica, place).await?;
    let tls = listen_tls(daemon, request.tls_listen.as_deref()).await?;
    let tls_address = tls.as_ref().map(|(_, address, _)| address.clone());
    let making = {
        let replica = Arc::clone(&replica);
        move |d: &Daemon| {
            let point = match point {
                Some(point) => Some(point),
                // A place that happens to be a point is one.
                None => d.catalogue.lock().find_point(replica.volume, &Wanted::At(reader.at()))?,
            };
            let size = reader.size();
            let scratch_bytes = match request.scratch_bytes {
                0 => size.get(),
                bytes => bytes.min(LARGEST_SCRATCH.bytes()),
            };
            let row = ViewRow {
                view,
                volume: replica.volume,
                lsn: reader.at(),
                opened: WallTime::now(),
                open_micros: 0,
                time: point.as_ref().map_or(time, |row| row.at.time),
                point: point.map(|row| row.point),
                size,
                export: request.volume,
                read_only: request.read_only,
                scratch_bytes,
                tls_address,
                device: None,
                device_lost: None,
                image: None,
                flatten: None,
            };
            make(d, replica, reader, row, request.device, begun)
        }
    };
    let (info, exports) = blocking(daemon, making).await?;
    begin_tls(daemon, info.view, tls, exports);
    Ok(info)
}

/// The bytes of a place, pinned, and its time.
async fn read(replica: &Replica, at: Place) -> Result<(PointReader, WallTime), Problem> {
    let (reply, answer) = oneshot::channel();
    if !replica.send(Work::View { at, reply }).await {
        return Err(problem::stopping());
    }
    answer.await.map_err(|_| problem::stopping())?
}

fn begin_tls(daemon: &Arc<Daemon>, view: ViewId, tls: Option<Listening>, exports: Exports) {
    let Some((listener, _, acceptor)) = tls else { return };
    let task = tokio::spawn(export::serve(listener, acceptor, exports));
    let mut open = daemon.views.lock();
    match open.views.get_mut(&view).and_then(|view| view.serving.as_mut()) {
        Some(serving) => serving.tls = Some(task),
        None => task.abort(),
    }
}

fn make(
    daemon: &Daemon,
    replica: Arc<Replica>,
    reader: PointReader,
    mut row: ViewRow,
    device: bool,
    begun: Instant,
) -> Result<(ViewInfo, Exports), Problem> {
    let dir = scratch_dir(daemon, row.view);
    let bad = |e| problem::file("create a scratch in", &dir, &e);
    let made = FileDisk::open(&dir)
        .and_then(|disk| Scratch::create(Arc::new(disk), identity(&row), limits(daemon, &row)));
    let undo = |problem| {
        drop_scratch(&dir);
        Err(problem)
    };
    let scratch = match made {
        Ok(scratch) => scratch,
        Err(error) => return undo(bad(error)),
    };
    let shape = (reader.size(), reader.blocks());
    let layers = Backing::Layers { point: Box::new(reader), scratch: Box::new(scratch) };
    let (serving, exports) = match serve(daemon, &row, shape, layers, device) {
        Ok(served) => served,
        Err(problem) => return undo(problem),
    };
    row.device = serving.block.as_ref().map(BlockDevice::path);
    row.open_micros = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
    // From here on the next daemon would serve it.
    if let Err(error) = daemon.catalogue.lock().put_view(&row) {
        serving.end(false);
        return undo(error.into());
    }
    let text = format!("a view of {} was opened", clock::show(row.time));
    let view = View::new(row, replica, Some(serving));
    let info = view.info(daemon);
    daemon.views.lock().views.insert(info.view, view);
    daemon.catalogue.note(0, Some(&info.volume), text);
    Ok((info, exports))
}

/// Serves a view again that an earlier daemon has opened.
///
/// # Errors
/// Why it cannot be now; nothing has changed.
pub(super) async fn reopen(daemon: &Arc<Daemon>, view: ViewId) -> Result<(), Problem> {
    let known = daemon.views.lock().views.get(&view).map(|v| (v.row.clone(), v.replica.clone()));
    let (row, replica) = known.ok_or_else(|| problem::no_view(&view))?;
    let reader = match row.image {
        // Nothing of the store is needed.
        Some(_) => None,
        None => Some(read(&replica, Place::At(row.lsn)).await?.0),
    };
    let tls = match listen_tls(daemon, row.tls_address.as_deref()).await {
        Ok(tls) => tls,
        Err(unable) => {
            // What is served on this host goes on without it.
            crate::daemon::note(daemon, 6612, Some(replica.name()), unable.what).await;
            None
        }
    };
    let blocks = replica.facts().row.blocks;
    let exports = blocking(daemon, move |d| make_again(d, row, reader, blocks)).await?;
    begin_tls(daemon, view, tls, exports);
    let shared = Arc::clone(daemon);
    let resuming = blocking(daemon, move |_| {
        flatten::resume(&shared, view);
        Ok(())
    });
    resuming.await
}

fn make_again(
    daemon: &Daemon,
    mut row: ViewRow,
    reader: Option<PointReader>,
    blocks: BlockSizes,
) -> Result<Exports, Problem> {
    let dir = scratch_dir(daemon, row.view);
    let (blocks, backing) = match (reader, &row.image) {
        (Some(reader), _) => {
            // Not made anew by looking for it.
            let there = std::fs::metadata(&dir).and_then(|_| FileDisk::open(&dir));
            let disk = there.map_err(|e| problem::bad_scratch(&dir, &e))?;
            let scratch = Scratch::open(Arc::new(disk), identity(&row), limits(daemon, &row))
                .map_err(|e| problem::bad_scratch(&dir, &e))?;
            let blocks = reader.blocks();
            let scratch = Box::new(scratch);
            (blocks, Backing::Layers { point: Box::new(reader), scratch })
        }
        (None, Some(path)) => {
            let image = Image::open(path, row.size.get());
            let image = image.map_err(|e| problem::bad_image(path, &e))?;
            // Left by a crash just after the view was flattened.
            drop_scratch(&dir);
            (blocks, Backing::Image(Arc::new(image)))
        }
        (None, None) => return Err(problem::no_view(&row.view)),
    };
    let shape = (row.size, blocks);
    let (serving, exports) = serve(daemon, &row, shape, backing, row.device.is_some())?;
    let device = serving.block.as_ref().map(BlockDevice::path);
    if row.device != device {
        row.device = device;
        if let Err(error) = daemon.catalogue.lock().put_view(&row) {
            serving.end(true);
            return Err(error.into());
        }
    }
    let mut open = daemon.views.lock();
    let Some(view) = open.views.get_mut(&row.view) else {
        drop(open);
        // Closed meanwhile.
        serving.end(false);
        return Err(problem::no_view(&row.view));
    };
    (view.row, view.serving, view.broken) = (row, Some(serving), None);
    Ok(exports)
}

fn limits(daemon: &Daemon, row: &ViewRow) -> Limits {
    let reserve = daemon.config.limits.view_reserve.bytes();
    Limits { quota: row.scratch_bytes, reserve: Some((daemon.data.views(), reserve)) }
}

const fn identity(row: &ViewRow) -> Identity {
    Identity { view: row.view, volume: row.volume, at: row.lsn, size: row.size }
}

/// Exports a view on its socket and, when `device`, as a block device: the one that it had, if the
/// kernel still has it.
fn serve(
    daemon: &Daemon,
    row: &ViewRow,
    shape: (VolumeSize, BlockSizes),
    backing: Backing,
    device: bool,
) -> Result<(Serving, Exports), Problem> {
    let socket = socket_path(&daemon.paths, row);
    let len = socket.as_os_str().len();
    if len > MAX_SOCKET_PATH {
        let why = format!(
            "{} has {len} bytes, a socket's path at most {MAX_SOCKET_PATH}",
            socket.display()
        );
        return Err(problem::export(&why));
    }
    let view = ViewDevice::new(row.view.to_string(), shape, backing, row.read_only);
    let view = Arc::new(view);
    let exports = Exports::new();
    let offered = exports.add(Export {
        name: row.export.as_str().to_owned(),
        description: format!("{} at {}", row.export, clock::show(row.time)),
        device: Arc::clone(&view) as _,
    });
    offered.map_err(|e| problem::export(&e))?;
    let server = Server::bind_unix(&socket, exports.clone(), nbd::Config::default())
        .map_err(|e| problem::export(&format!("{}: {e}", socket.display())))?;
    let block = match device {
        false => None,
        true => {
            let served: Arc<dyn Device> = Arc::clone(&view) as _;
            let mark = Mark::of(daemon.authority.fingerprint());
            Some(BlockDevice::start(&served, mark, row.view, row.device.as_deref())?)
        }
    };
    Ok((Serving { device: view, server, block, tls: None }, exports))
}

/// `run/views/NAME-xxxx.sock`.
pub(super) fn socket_path(paths: &Paths, row: &ViewRow) -> PathBuf {
    let short: String = row.view.to_string().chars().take(8).collect();
    sockets(paths).join(format!("{}-{short}.sock", row.export))
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
