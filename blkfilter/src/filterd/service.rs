//! What the control socket asks for, done.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use farshore_extent::{CaptureOrder, Problem, VolumeId, VolumeName};

use super::attached::{Attached, Ground, open};
use super::attaching::Missing;
use super::choice::{Impossible, choose};
use super::marker;
use super::problem;
use super::schedule::Wait;
use super::state::{Front, VolumeRecord};
use super::turns::Turns;
use crate::control::server::{Response, Serve};
use crate::control::{
    AttachKind, Grown, MarkerPlaced, MarkerRequest, ProtectRequest, Readiness, Reply, Request,
    VolumeInfo,
};
use crate::core::MarkerSpec;
use crate::filter::FetchWait;
use crate::frontend::users::Users;
use crate::preflight::{OwnPlaces, Running, hints, preflight};
use crate::sys::wake::Event;

/// Longest wait of one Fetch, so that a client that went away is noticed.
const MAX_IDLE: Duration = Duration::from_secs(60);

/// Longest wait of one Drain.
const MAX_DRAIN: Duration = Duration::from_secs(3600);

/// Possible sizes of a pool, in bytes.
const POOL_SIZES: std::ops::RangeInclusive<u64> = 8 << 20..=64 << 30;

/// How long udev and its like may look at a device that is to go away.
const PASSING: Duration = Duration::from_secs(3);

/// The daemon's volumes.
pub(super) struct Service {
    pub(super) ground: Ground,
    pub(super) volumes: Mutex<BTreeMap<VolumeName, Arc<Attached>>>,
    /// On record, but not attached.
    pub(super) missing: Mutex<Vec<Missing>>,
    /// Goes with `missing`: an attempt has ended.
    pub(super) attempted: Condvar,
    /// Of those who make volumes come or go. The two locks above are held for a moment only.
    pub(super) turns: Arc<Turns>,
    /// Set when whoever attaches has something to do.
    pub(super) news: Event,
    pub(super) started: Instant,
    pub(super) stopping: AtomicBool,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner) // plain data
}

impl Service {
    /// A service that knows the volumes on record and has attached none.
    ///
    /// # Errors
    /// Out of descriptors.
    pub(super) fn new(ground: Ground, records: Vec<VolumeRecord>) -> io::Result<Self> {
        Ok(Self {
            ground,
            volumes: Mutex::new(BTreeMap::new()),
            missing: Mutex::new(records.into_iter().map(Missing::new).collect()),
            attempted: Condvar::new(),
            turns: Arc::default(),
            news: Event::new()?,
            started: Instant::now(),
            stopping: AtomicBool::new(false),
        })
    }

    pub(super) fn all(&self) -> Vec<Arc<Attached>> {
        lock(&self.volumes).values().cloned().collect()
    }

    fn find(&self, id: VolumeId) -> Result<Arc<Attached>, Problem> {
        let found = lock(&self.volumes).values().find(|v| v.id() == id).cloned();
        found.ok_or_else(|| problem::no_such_volume(id))
    }

    fn missing_named(&self, name: &VolumeName) -> Option<VolumeRecord> {
        lock(&self.missing).iter().map(|m| &m.record).find(|r| r.name == *name).cloned()
    }

    fn places(&self) -> OwnPlaces {
        let config = &self.ground.config;
        OwnPlaces { state: config.state.clone(), run: config.run.clone() }
    }

    /// What stands in the way, and how it would be attached.
    fn preflight(&self, request: &ProtectRequest) -> Readiness {
        let asked = request.attach.or(request.nbd_socket.as_ref().map(|_| AttachKind::Socket));
        let choice = choose(asked);
        let attach = choice.as_ref().ok().cloned();
        let kind = attach.as_ref().map(|a| a.kind).or(asked);
        let fence = self.fence_of(&request.name).map(|f| problem::fenced(&request.name, &f));
        let mut problems: Vec<Problem> = fence.into_iter().collect();
        problems.extend(self.obstacles(&ProtectRequest { attach: kind, ..request.clone() }));
        // What is on record keeps its name.
        if request.name.looks_like_a_partition() && self.missing_named(&request.name).is_none() {
            problems.push(problem::name_of_a_partition(&request.backing, &request.name));
        }
        let impossible = |e: Impossible| problem::impossible(&request.backing, e.kind, e.why);
        problems.extend(choice.err().map(impossible));
        let hints = hints(&self.ground.roots, &request.name, &request.backing);
        Readiness { problems, attach, hints }
    }

    /// Everything that stands in the way, except of the way of attaching.
    pub(super) fn obstacles(&self, request: &ProtectRequest) -> Vec<Problem> {
        let running = |v: Arc<Attached>| Running {
            name: v.info.name.clone(),
            backing: v.info.backing.clone(),
            nbd_socket: v.info.attachment.socket().map(PathBuf::from),
            device: v.info.attachment.device().map(PathBuf::from),
        };
        let running: Vec<Running> = self.all().into_iter().map(running).collect();
        let known = self.missing_named(&request.name).map(|r| r.volume);
        let lingers = self.ground.lingering.obstacle(known, &request.backing);
        let mut problems: Vec<Problem> = lingers.into_iter().collect();
        problems.extend(preflight(&self.ground.roots, request, &self.places(), &running));
        let bytes = request.pool_bytes.unwrap_or(self.ground.config.pool_bytes);
        if !POOL_SIZES.contains(&bytes) {
            problems.push(problem::bad_pool(bytes));
        }
        let missing = lock(&self.missing);
        let other = missing
            .iter()
            .map(|m| &m.record)
            .find(|r| r.name == request.name && r.backing != request.backing);
        problems.extend(other.map(|r| problem::known_elsewhere(&r.name, &r.backing)));
        problems
    }

    fn protect(&self, request: &ProtectRequest) -> Result<VolumeInfo, Problem> {
        let _turn = self.turn(&request.name)?;
        let Readiness { problems, attach, .. } = self.preflight(request);
        if let Some(problem) = problems.into_iter().next() {
            return Err(problem);
        }
        let kind = attach.map_or(AttachKind::Socket, |choice| choice.kind);
        let backing = open(&request.backing)?;
        let known = self.missing_named(&request.name);
        let config = &self.ground.config;
        let record = VolumeRecord {
            version: VolumeRecord::VERSION,
            volume: known.as_ref().map_or_else(VolumeId::random, |r| r.volume),
            name: request.name.clone(),
            backing: request.backing.clone(),
            front: self.front(kind, request, known.as_ref())?,
            pool_bytes: request.pool_bytes.unwrap_or(config.pool_bytes),
            point_interval_ms: request.point_interval_ms,
            copy_rate: known.as_ref().map_or(config.copy_rate, |r| r.copy_rate),
            seeded: request.seeded || known.as_ref().is_some_and(|r| r.seeded),
            wait: request.copy_at.map(Wait::Until).or(known.as_ref().and_then(|r| r.wait)),
            size: backing.size(),
            blocks: backing.blocks(),
            epoch: self.ground.host.epoch(),
            fenced: None,
        };
        let (id, is_new, kernel) = (record.volume, known.is_none(), record.front.kernel_name());
        let attached =
            Attached::attach(&self.ground, backing, record, !is_new).inspect_err(|_| {
                if !is_new {
                    return;
                }
                kernel.iter().for_each(|kernel| self.ground.own.remove(kernel));
                if let Err(problem) = self.ground.state.remove(id) {
                    tracing::error!(%problem, "the record of a volume that failed stays behind");
                }
            })?;
        let info = attached.info.clone();
        self.enter(attached);
        Ok(info)
    }

    fn fence(&self, id: VolumeId, fence: Option<Problem>) -> Result<Reply, Problem> {
        self.find(id)?.fence(fence)?;
        self.news.set();
        Ok(Reply::Done)
    }

    /// What the target has said of a volume on record that was failed over.
    fn fence_of(&self, name: &VolumeName) -> Option<Problem> {
        let attached = lock(&self.volumes).get(name).cloned();
        let record = attached.map(|v| v.record()).or_else(|| self.missing_named(name));
        record.and_then(|record| record.fenced)
    }

    /// Where a new volume will be found.
    fn front(
        &self,
        kind: AttachKind,
        request: &ProtectRequest,
        known: Option<&VolumeRecord>,
    ) -> Result<Front, Problem> {
        if kind == AttachKind::Socket {
            return Ok(Front::Socket { path: self.places().nbd_socket(request) });
        }
        if let Some(front) = known.map(|r| &r.front).filter(|front| front.kind() == kind) {
            return Ok(front.clone());
        }
        let mut others: Vec<Front> = self.all().iter().map(|v| v.record().front).collect();
        others.extend(lock(&self.missing).iter().map(|m| m.record.front.clone()));
        self.ground.free_front(&request.name, kind, others)
    }

    /// Has the marker outside of the state say whether there are volumes.
    pub(super) fn keep_marker(&self) {
        let Ground { config, state, .. } = &self.ground;
        if let Some(marker) = &config.marker {
            marker::keep(marker, &config.state, || {
                state.recorded().map_or(true, |all| !all.is_empty())
            });
        }
    }

    fn unprotect(&self, name: &VolumeName, force: bool) -> Result<(), Problem> {
        let _turn = self.turn(name)?;
        if let Some(record) = self.missing_named(name) {
            let id = record.volume;
            self.remove_left(&record.front, name.as_str(), id)?;
            self.ground.state.remove(id)?;
            lock(&self.missing).retain(|m| m.record.volume != id);
            return Ok(());
        }
        let volume = lock(&self.volumes).get(name).cloned();
        let volume = volume.ok_or_else(|| problem::no_such_volume(name))?;
        match volume.clients() {
            0 => {}
            clients if !force => return Err(problem::clients_connected(name, clients)),
            _ => {}
        }
        if let Some(device) = volume.info.attachment.device() {
            may_be_removed(name.as_str(), device, &settled(|| volume.users()))?;
        }
        if let Err(problem) = volume.end_serving(self.ground.config.client_grace) {
            if !volume.is_served() {
                self.put_aside(&volume);
            }
            return Err(problem);
        }
        volume.detach(self.ground.config.client_grace)?;
        self.ground.state.remove(volume.id())?;
        lock(&self.volumes).remove(name);
        Ok(())
    }

    fn grow(&self, name: &VolumeName, dry_run: bool) -> Result<Grown, Problem> {
        let _turn = self.turn(name)?;
        let volume = lock(&self.volumes).get(name).cloned();
        volume.ok_or_else(|| problem::no_such_volume(name))?.grow(dry_run)
    }

    /// Lets a volume go whose front end has ended although it should not have. The attach thread
    /// takes it up again.
    pub(super) fn put_aside(&self, volume: &Arc<Attached>) {
        volume.let_go();
        lock(&self.volumes).remove(&volume.info.name);
        lock(&self.missing).push(Missing::new(volume.record()));
        self.news.set();
    }

    /// Removes block devices of volumes that are not on record any more.
    pub(super) fn sweep(&self) {
        for old in self.ground.names.announced() {
            let known = lock(&self.missing).iter().any(|m| m.record.volume == old.volume);
            let Some(front) = Front::of_kernel_name(&old.kernel) else { continue };
            if known || self.ground.state.has(old.volume) {
                continue;
            }
            match self.remove_left(&front, &old.name, old.volume) {
                Ok(()) => tracing::info!(
                    device = old.kernel,
                    volume = old.name,
                    "removed: the \
                    volume is not protected any more"
                ),
                Err(problem) => tracing::error!(%problem, why = problem.why, "it stays"),
            }
        }
    }

    /// Removes the block device of a volume that is not attached, if there is one.
    fn remove_left(&self, front: &Front, name: &str, volume: VolumeId) -> Result<(), Problem> {
        let Ground { names, own, roots, .. } = &self.ground;
        let Some(kernel) = front.kernel_name() else { return Ok(()) };
        let device = PathBuf::from("/dev").join(&kernel);
        let users = settled(|| Users::of(roots, &kernel));
        may_be_removed(name, &device, &users)?;
        let left = |why: String| problem::not_removed(name, &device, why, &users);
        front.remove_stale(volume).map_err(left)?;
        names.withdraw(&kernel, name);
        own.remove(&kernel);
        Ok(())
    }

    /// A record that comes during a stop would be one that the target does not have: the volume
    /// could not be marked clean.
    pub(super) fn refuse_while_stopping(&self) -> Result<(), Problem> {
        if self.stopping.load(Ordering::Acquire) { Err(problem::stopping()) } else { Ok(()) }
    }

    fn marker(&self, request: MarkerRequest) -> Result<MarkerPlaced, Problem> {
        self.refuse_while_stopping()?;
        let MarkerRequest { marker, volumes, kind, group, name, pending } = request;
        let spec = MarkerSpec { marker, volumes: vec![], kind, group, name, pending };
        let placed = self.ground.host.marker(&volumes, spec).map_err(|e| problem::refused(&e))?;
        Ok(MarkerPlaced {
            lsn: placed.lsn,
            time: placed.time,
            volumes: placed.volumes,
            not_ordered: placed.not_ordered,
        })
    }

    fn open_pool(&self, id: VolumeId) -> Result<Response, Problem> {
        let volume = self.find(id)?;
        let fd = volume.pool().read_only_fd();
        let fd = fd.map_err(|e| problem::resources("a descriptor of the capture pool", e))?;
        Ok(Response { reply: Reply::Pool { len: volume.pool().capacity() }, fd: Some(fd) })
    }

    fn drain(&self, id: VolumeId, limit: Duration) -> Result<Reply, Problem> {
        let drained = self.ground.host.drain(id, limit.min(MAX_DRAIN));
        drained.map(Reply::Drained).map_err(|e| problem::refused(&e))
    }

    /// Stops serving and copying, then waits until the agent has released what it can.
    pub(super) fn quiesce(&self) {
        self.stopping.store(true, Ordering::Release);
        let config = &self.ground.config;
        let deadline = Instant::now() + config.client_grace;
        if !self.turns.wait_all(config.client_grace) {
            tracing::warn!("a disk or a driver does not answer; going on without its volume");
        }
        for volume in self.all() {
            volume.stop_serving(deadline.saturating_duration_since(Instant::now()));
        }
        for volume in self.all() {
            volume.is_at_rest(deadline.saturating_duration_since(Instant::now()));
        }
        let deadline = Instant::now() + config.release_grace;
        for volume in self.all() {
            let ordered = |s: crate::core::CoreStatus| s.order == CaptureOrder::Ordered;
            if self.ground.host.status(volume.id()).is_some_and(ordered) {
                let left = deadline.saturating_duration_since(Instant::now());
                // The outcome is looked at again when the record is written.
                let _ = self.ground.host.drain(volume.id(), left);
            }
        }
    }

    /// Writes what the target lacks of each volume and lets everything go. After [`Self::quiesce`], with nobody
    /// left who could ask for anything. Returns the volumes of which it lacks something.
    pub(super) fn finish(&self) -> Vec<VolumeName> {
        let mut dirty = Vec::new();
        for volume in self.all() {
            let name = &volume.info.name;
            match volume.mark_stopped() {
                Ok(true) => tracing::info!(volume = %name, "stopped clean"),
                Ok(false) => {
                    tracing::warn!(
                        volume = %name,
                        "not everything is durable at the target; the next start sends the rest"
                    );
                    dirty.push(name.clone());
                }
                Err(problem) => {
                    tracing::error!(volume = %name, %problem, "not clean");
                    dirty.push(name.clone());
                }
            }
            if let Err(problem) = volume.detach(Duration::ZERO) {
                tracing::error!(volume = %name, %problem, "not detached");
            }
        }
        lock(&self.volumes).clear();
        dirty
    }
}

/// Users of a device, after those that look at every device for a moment have gone.
fn settled(look: impl Fn() -> Users) -> Users {
    let until = Instant::now() + PASSING;
    loop {
        let users = look();
        if users.is_empty() || !users.only_passing() || Instant::now() > until {
            return users;
        }
        // Nobody announces that a device was closed.
        #[allow(clippy::disallowed_methods)]
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A block device in use is never taken away, not even by force: the kernel keeps it for those who
/// have it open, and what they write would be lost.
fn may_be_removed(name: &str, device: &Path, users: &Users) -> Result<(), Problem> {
    if users.in_kernel() {
        return Err(problem::in_kernel(name, device, users));
    }
    if users.only_passing() { Ok(()) } else { Err(problem::opened(name, device, users)) }
}

impl Serve for Service {
    fn serve(&self, request: Request) -> Result<Response, Problem> {
        let refused = |e| problem::refused(&e);
        let host = &self.ground.host;
        let millis = |ms: u32| Duration::from_millis(ms.into());
        let reply = match request {
            Request::List => Reply::Volumes(self.all().iter().filter_map(|v| v.status()).collect()),
            Request::Recorded => Reply::Recorded(self.ground.state.recorded()?),
            Request::Protect(request) => {
                let info = self.protect(&request)?;
                self.keep_marker();
                Reply::Protected(info)
            }
            Request::Preflight(request) => Reply::Preflight(self.preflight(&request)),
            Request::Unprotect { name, force } => {
                self.unprotect(&name, force)?;
                self.keep_marker();
                Reply::Done
            }
            Request::Grow { name, dry_run } => Reply::Grown(self.grow(&name, dry_run)?),
            Request::Marker(request) => Reply::Marker(self.marker(request)?),
            Request::ResolveMarker { marker, commit } => {
                self.refuse_while_stopping()?;
                host.resolve_marker(marker, commit).map_err(refused)?;
                Reply::Done
            }
            Request::Drain { volume, timeout_ms } => self.drain(volume, millis(timeout_ms))?,
            Request::OpenPool { volume } => return self.open_pool(volume),
            Request::Fetch { volume, after, want_bytes, wait_ms, idle_ms } => {
                let idle = millis(idle_ms).min(MAX_IDLE);
                let wait = millis(wait_ms).min(MAX_IDLE);
                let wait = FetchWait { want_bytes: want_bytes.into(), wait, idle };
                Reply::Fetched(host.fetch(volume, after, &wait).map_err(refused)?)
            }
            Request::Spooled { volume, upto } => {
                host.spooled(volume, upto).map_err(refused)?;
                Reply::Done
            }
            Request::Release { volume, upto } => {
                host.release(volume, upto).map_err(refused)?;
                Reply::Done
            }
            Request::Recopy { volume, reason } => {
                self.find(volume)?.recopy(reason)?;
                Reply::Done
            }
            Request::Resync { volume, reason } => {
                self.find(volume)?.resync(reason)?;
                Reply::Done
            }
            Request::StartCopy { volume } => {
                self.find(volume)?.start_copy()?;
                Reply::Done
            }
            Request::Verify { volume, start, bytes_per_second } => {
                self.find(volume)?.verify(start, bytes_per_second)?;
                Reply::Done
            }
            Request::Compared { volume, upto, answer } => {
                host.compared(volume, upto, &answer).map_err(refused)?;
                Reply::Done
            }
            Request::Fence { volume, fence } => self.fence(volume, fence)?,
            Request::CopyRate { volume, bytes_per_second } => {
                self.find(volume)?.set_copy_rate(bytes_per_second)?;
                Reply::Done
            }
        };
        Ok(reply.into())
    }
}
