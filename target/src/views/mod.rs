//! Views: recovery points opened as writable NBD exports and block devices, each with a private
//! scratch.
//!
//! A view reads its point from the store and keeps its own writes; replication goes on under it
//! and never waits for it. A view is there until it is closed: its row in the catalogue and its
//! scratch outlive the daemon, and the next one serves it again, at the same places.

mod block;
mod device;
mod export;
mod flatten;
mod open;
mod scratch;
mod tend;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use farshore_blkfilter::frontend::nbd::Server;
use farshore_extent::{Problem, ViewId, VolumeId, WallTime};
use farshore_protocol::admin::ViewInfo;
use farshore_protocol::paths::Paths;
use tokio::task::JoinHandle;

use crate::catalogue::ViewRow;
use crate::daemon::Daemon;
use crate::replica::Replica;
use crate::{clock, durable_fs, problem};
use block::BlockDevice;
pub(crate) use block::Mark;
use device::{Refused, ViewDevice};
use flatten::Flatten;
pub(crate) use flatten::{begin as flatten, stop as stop_flatten};
pub(crate) use open::{locate, open, open_as};
use tend::Lost;
pub(crate) use tend::serve_again;

/// How long clients of a view that is closed get to end in good order.
const CLOSE_GRACE: Duration = Duration::from_secs(2);

/// A view that was opened and not closed.
struct View {
    row: ViewRow,
    replica: Arc<Replica>,
    /// None: it is not served now.
    serving: Option<Serving>,
    /// Why not.
    broken: Option<Problem>,
    /// When it is tried again.
    retry: Instant,
    /// Codes of the problems that are in the event log.
    told: BTreeSet<u16>,
    /// Its block device was taken away.
    lost: Option<Lost>,
    flatten: Option<Flatten>,
}

/// What serves a view.
struct Serving {
    device: Arc<ViewDevice>,
    server: Server,
    block: Option<BlockDevice>,
    tls: Option<JoinHandle<()>>,
}

impl View {
    fn new(row: ViewRow, replica: Arc<Replica>, serving: Option<Serving>) -> Self {
        if row.image.is_none() {
            replica.hold(row.view, row.lsn);
        }
        replica.update(|facts| facts.views += 1);
        let lost = row.device_lost.is_some().then(Lost::new);
        Self {
            row,
            replica,
            serving,
            broken: None,
            retry: Instant::now(),
            told: BTreeSet::new(),
            lost,
            flatten: None,
        }
    }

    fn info(&self, daemon: &Daemon) -> ViewInfo {
        let row = self.row.clone();
        let device = self.serving.as_ref().map(|serving| &serving.device);
        ViewInfo {
            nbd_socket: open::socket_path(&daemon.paths, &row),
            view: row.view,
            volume: self.replica.name(),
            size: row.size,
            lsn: row.lsn,
            time: row.time,
            point: row.point,
            export: row.export.as_str().to_owned(),
            tls_address: row.tls_address,
            opened: row.opened,
            open_micros: row.open_micros,
            scratch_used: device.map_or(0, |device| device.used()),
            scratch_bytes: row.scratch_bytes,
            device: row.device,
            device_lost: row.device_lost,
            image: row.image,
            flatten: flatten::info(self),
            read_only: row.read_only,
            problems: self.problems(daemon),
        }
    }

    fn problems(&self, daemon: &Daemon) -> Vec<Problem> {
        let (shown, view) = (self.shown(), self.row.view);
        let mut all = Vec::new();
        if let Some(why) = &self.broken {
            all.push(problem::view_not_served(&shown, &scratch_dir(daemon, view), why));
        }
        if let Some(device) = self.serving.as_ref().map(|serving| &serving.device) {
            let (used, quota) = (device.used(), self.row.scratch_bytes);
            if let Some(why) = device.failed() {
                all.push(problem::scratch_failed(&shown, &why));
            }
            match device.refused() {
                Some(Refused::Quota) => all.push(problem::scratch_full(&shown, quota)),
                Some(Refused::Disk) => all.push(problem::no_room_for_views(&shown)),
                // One as large as the volume never is full.
                None if quota < self.row.size.get() && used > quota / 5 * 4 => {
                    all.push(problem::scratch_nearly_full(&shown, used, quota));
                }
                None => {}
            }
        }
        all.extend(flatten::failed(self));
        let facts = self.replica.facts();
        let limits = &daemon.config.limits;
        let long = WallTime::now().since(self.row.opened) > limits.view_hold_time.duration();
        if self.row.image.is_none()
            && self.row.lsn < facts.expired
            && (facts.held_bytes > limits.view_hold.bytes() || (long && facts.held_bytes > 0))
        {
            all.push(problem::view_holds_journal(&shown, view, facts.held_bytes));
        }
        all
    }

    /// For people.
    fn shown(&self) -> String {
        format!("the view of {} at {}", self.replica.name(), clock::show(self.row.time))
    }

    /// It is gone for good.
    fn forget(self) {
        self.replica.release(self.row.view);
        self.replica.update(|facts| facts.views = facts.views.saturating_sub(1));
    }
}

impl Serving {
    /// Ends the exports; waits for clients a little. A block device goes too, unless it is to stay
    /// `for_users`, who wait for the next daemon then.
    fn end(mut self, for_users: bool) {
        if let Some(tls) = self.tls.take() {
            tls.abort();
        }
        if let Some(block) = self.block.take() {
            if for_users && block.unused().is_err() { block.leave() } else { block.remove() }
        }
        if !self.server.stop(CLOSE_GRACE) {
            tracing::warn!("clients of a view were cut off");
        }
        // What no flush has covered may be lost; nobody was told otherwise.
        if let Err(error) = self.device.flush() {
            tracing::warn!(%error, "the last writes to a view may be lost");
        }
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

    /// Whether this one is open.
    pub(crate) fn is_open(&self, view: ViewId) -> bool {
        self.lock().views.contains_key(&view)
    }

    /// The open ones.
    pub(crate) fn list(&self, daemon: &Daemon) -> Vec<ViewInfo> {
        self.lock().views.values().map(|view| view.info(daemon)).collect()
    }

    /// What is wrong with those of a volume.
    pub(crate) fn problems(&self, daemon: &Daemon, volume: VolumeId) -> Vec<Problem> {
        let open = self.lock();
        let of_it = open.views.values().filter(|view| view.row.volume == volume);
        of_it.flat_map(|view| view.problems(daemon)).collect()
    }

    /// Ends the exports of all of them; the next daemon serves them again.
    pub(crate) fn end_all(&self) {
        let views = std::mem::take(&mut self.lock().views);
        for mut view in views.into_values() {
            if let Some(flatten) = view.flatten.take() {
                flatten.end();
            }
            if let Some(serving) = view.serving {
                serving.end(true);
            }
        }
    }

    /// Closes a view and drops its scratch; `note` is kept as evidence. Blocks.
    ///
    /// # Errors
    /// FS-6607 while somebody uses its device: it stays open then.
    pub(crate) fn close(&self, daemon: &Daemon, view: ViewId, note: &str) -> Result<(), Problem> {
        let mut found = self.lock().views.remove(&view).ok_or_else(|| problem::no_view(&view))?;
        let block = found.serving.as_ref().and_then(|serving| serving.block.as_ref());
        if let Some(Err(problem)) = block.map(BlockDevice::unused) {
            self.lock().views.insert(view, found);
            return Err(problem);
        }
        let info = found.info(daemon);
        if let Some(flatten) = found.flatten.take() {
            flatten.end();
        }
        if let Some(serving) = found.serving.take() {
            serving.end(false);
        }
        if let Err(error) = daemon.catalogue.lock().close_view(view, WallTime::now(), note) {
            // Not closed: it is served again.
            self.lock().views.insert(view, found);
            return Err(error.into());
        }
        drop_scratch(&scratch_dir(daemon, view));
        if let Some(unfinished) = &info.flatten {
            flatten::drop_unfinished(&unfinished.to, view);
        }
        found.forget();
        let text = format!(
            "a view of {} was closed, {} bytes written to it",
            clock::show(info.time),
            info.scratch_used
        );
        daemon.catalogue.note(0, Some(&info.volume), text);
        Ok(())
    }
}

/// The files of a view's scratch.
fn scratch_dir(daemon: &Daemon, view: ViewId) -> PathBuf {
    daemon.data.views().join(view.to_string())
}

/// What stays is removed at the next start.
fn drop_scratch(dir: &Path) {
    let gone = match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => dir.parent().map_or(Ok(()), durable_fs::sync_dir),
    };
    if let Err(error) = gone {
        let dir = dir.display();
        tracing::warn!(%dir, %error, "the scratch of a closed view is still there");
    }
}

fn sockets(paths: &Paths) -> PathBuf {
    paths.run.join("views")
}

/// Makes the directories of scratches and sockets, removes what a crash left, and takes over the
/// views that were open: from now on nothing that they need expires. They are served by and by.
pub(crate) fn prepare(daemon: &Daemon) -> Result<(), Problem> {
    let rows = daemon.catalogue.lock().open_views()?;
    let devices: BTreeSet<PathBuf> = rows.iter().filter_map(|row| row.device.clone()).collect();
    block::remove_stale(Mark::of(daemon.authority.fingerprint()), &devices);
    let (scratches, sockets) = (daemon.data.views(), sockets(&daemon.paths));
    for dir in [&scratches, &sockets] {
        durable_fs::create_private_dir(dir).map_err(|e| problem::file("create", dir, &e))?;
    }
    for entry in entries(&sockets)? {
        std::fs::remove_file(&entry).map_err(|e| problem::file("clean", &entry, &e))?;
    }
    for entry in entries(&scratches)? {
        sweep(daemon, &entry)?;
    }
    let replicas = daemon.replicas();
    for row in rows {
        let Some(replica) = replicas.iter().find(|replica| replica.volume == row.volume) else {
            let dir = scratch_dir(daemon, row.view);
            daemon.catalogue.note(6611, None, problem::stray_scratch(&dir).what);
            continue;
        };
        let mut view = View::new(row, Arc::clone(replica), None);
        view.broken = Some(problem::view_being_opened());
        daemon.views.lock().views.insert(view.row.view, view);
    }
    Ok(())
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, Problem> {
    let read = || -> std::io::Result<Vec<PathBuf>> {
        std::fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect()
    };
    read().map_err(|e| problem::file("read", dir, &e))
}

/// Removes what is certainly nobody's; what nobody knows is kept and told.
fn sweep(daemon: &Daemon, entry: &Path) -> Result<(), Problem> {
    let name = entry.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if entry.is_file() {
        // Of an earlier release, whose views ended with the daemon.
        return std::fs::remove_file(entry).map_err(|e| problem::file("clean", entry, &e));
    }
    let view = name.parse::<ViewId>().ok();
    let closed = match view {
        Some(view) => daemon.catalogue.lock().is_closed(view)?,
        None => None,
    };
    match closed {
        Some(true) => drop_scratch(entry),
        Some(false) => {}
        // Made just before a crash, and nobody has heard of it.
        None if scratch::is_empty(entry) => drop_scratch(entry),
        None => {
            let stray = problem::stray_scratch(entry);
            daemon.catalogue.note(stray.code.0, None, stray.what);
        }
    }
    Ok(())
}
