//! What the control socket asks for, done.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use farshore_extent::{CaptureOrder, Code, Problem, VolumeId, VolumeName};

use super::attached::{Attached, Ground, open};
use super::choice::{Impossible, choose};
use super::problem;
use super::state::{Front, VolumeRecord, VolumeState};
use crate::control::server::{Response, Serve};
use crate::control::{
    AttachKind, Grown, MarkerPlaced, MarkerRequest, ProtectRequest, Readiness, Reply, Request,
    VolumeInfo,
};
use crate::core::MarkerSpec;
use crate::filter::FetchWait;
use crate::frontend::users::Users;
use crate::preflight::{OwnPlaces, Running, hints, preflight};

/// Longest wait of one Fetch, so that a client that went away is noticed.
const MAX_IDLE: Duration = Duration::from_secs(60);

/// Longest wait of one Drain.
const MAX_DRAIN: Duration = Duration::from_secs(3600);

/// Possible sizes of a pool, in bytes.
const POOL_SIZES: std::ops::RangeInclusive<u64> = 8 << 20..=64 << 30;

/// How long udev and its like may look at a device that is to go away.
const PASSING: Duration = Duration::from_secs(3);

/// Somebody else holds the exclusive claim on the backing.
const CLAIMED: Code = Code(4016);

/// The daemon's volumes.
pub(super) struct Service {
    ground: Ground,
    volumes: Mutex<BTreeMap<VolumeName, Arc<Attached>>>,
    /// On record, but not attached.
    missing: Mutex<Vec<Missing>>,
    /// Held while volumes come or go; opening devices takes time.
    changing: Mutex<()>,
    stopping: AtomicBool,
}

/// A volume on record that is not attached.
#[derive(Debug)]
struct Missing {
    record: VolumeRecord,
    /// The reason that was logged last.
    told: Option<Code>,
}

/// How many volumes on record are not attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Absent {
    pub(super) volumes: usize,
    /// Of these, because somebody holds the claim: at a start most often the kernel, which
    /// finishes the last I/O of a killed daemon.
    pub(super) claimed: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner) // plain data
}

impl Service {
    /// A service that knows the volumes on record and has attached none.
    pub(super) fn new(ground: Ground, records: Vec<VolumeRecord>) -> Self {
        let missing = records.into_iter().map(|record| Missing { record, told: None }).collect();
        Self {
            ground,
            volumes: Mutex::new(BTreeMap::new()),
            missing: Mutex::new(missing),
            changing: Mutex::new(()),
            stopping: AtomicBool::new(false),
        }
    }

    /// Attaches every volume on record that can be. The reason why one cannot is logged when it is
    /// new.
    pub(super) fn attach_missing(&self) -> Absent {
        let _changing = lock(&self.changing);
        let known: Vec<VolumeRecord> =
            lock(&self.missing).iter().map(|m| m.record.clone()).collect();
        let mut absent = Absent::default();
        for record in known {
            if self.stopping.load(Ordering::Acquire) {
                break;
            }
            let id = record.volume;
            match self.attach_known(record) {
                Ok(attached) => {
                    lock(&self.missing).retain(|m| m.record.volume != id);
                    lock(&self.volumes).insert(attached.info.name.clone(), attached);
                }
                Err(problem) => {
                    absent.volumes += 1;
                    absent.claimed += usize::from(problem.code == CLAIMED);
                    let mut missing = lock(&self.missing);
                    let entry = missing.iter_mut().find(|m| m.record.volume == id);
                    if let Some(entry) = entry.filter(|m| m.told != Some(problem.code)) {
                        entry.told = Some(problem.code);
                        let (why, next) = (&problem.why, &problem.next);
                        let name = &entry.record.name;
                        if problem.code == CLAIMED {
                            tracing::info!(volume = %name, %problem, "waiting for the claim");
                            continue;
                        }
                        tracing::error!(volume = %name, %problem, why, next, "not attached");
                    }
                }
            }
        }
        absent
    }

    /// While the daemon was away the backing may have been mounted or taken by others.
    fn attach_known(&self, record: VolumeRecord) -> Result<Arc<Attached>, Problem> {
        let request = ProtectRequest {
            name: record.name.clone(),
            backing: record.backing.clone(),
            attach: Some(record.front.kind()),
            nbd_socket: record.front.socket(),
            pool_bytes: Some(record.pool_bytes),
            point_interval_ms: record.point_interval_ms,
        };
        if let Some(problem) = self.obstacles(&request).into_iter().next() {
            return Err(problem);
        }
        // Before anything is written: a clean volume stays clean while its driver is missing.
        let possible = choose(request.attach);
        possible.map_err(|e| problem::impossible(&record.backing, e.kind, e.why))?;
        Attached::attach(&self.ground, open(&record.backing)?, record, true)
    }

    fn all(&self) -> Vec<Arc<Attached>> {
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
        let mut problems = self.obstacles(&ProtectRequest { attach: kind, ..request.clone() });
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
    fn obstacles(&self, request: &ProtectRequest) -> Vec<Problem> {
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
        let _changing = lock(&self.changing);
        if self.stopping.load(Ordering::Acquire) {
            return Err(problem::stopping());
        }
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
            size: backing.size(),
            blocks: backing.blocks(),
            epoch: self.ground.host.epoch(),
            state: known.as_ref().map_or(VolumeState::Dirty, |r| r.state.clone()),
        };
        let (id, is_new) = (record.volume, known.is_none());
        let attached =
            Attached::attach(&self.ground, backing, record, !is_new).inspect_err(|_| {
                if is_new && let Err(problem) = self.ground.state.remove(id) {
                    tracing::error!(%problem, "the record of a volume that failed stays behind");
                }
            })?;
        let info = attached.info.clone();
        lock(&self.missing).retain(|m| m.record.volume != id);
        lock(&self.volumes).insert(info.name.clone(), attached);
        Ok(info)
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
        let none = || problem::no_device(&request.name, kind, "every number is taken");
        Front::free(kind, &others).ok_or_else(none)
    }

    fn unprotect(&self, name: &VolumeName, force: bool) -> Result<(), Problem> {
        let _changing = lock(&self.changing);
        if self.stopping.load(Ordering::Acquire) {
            return Err(problem::stopping());
        }
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
        let _changing = lock(&self.changing);
        self.refuse_while_stopping()?;
        let volume = lock(&self.volumes).get(name).cloned();
        volume.ok_or_else(|| problem::no_such_volume(name))?.grow(dry_run)
    }

    /// Lets a volume go whose front end has ended although it should not have. The attach thread
    /// takes it up again.
    fn put_aside(&self, volume: &Arc<Attached>) {
        volume.let_go();
        lock(&self.volumes).remove(&volume.info.name);
        lock(&self.missing).push(Missing { record: volume.record(), told: None });
    }

    /// Takes up again the volumes whose front ends have ended by themselves. Returns whether any
    /// volume on record is not attached now.
    pub(super) fn heal(&self) -> bool {
        let _changing = lock(&self.changing);
        self.ground.lingering.sweep();
        for volume in self.all() {
            if let Some(why) = volume.failed() {
                tracing::error!(volume = %volume.info.name, why, "its device has stopped; again");
                volume.stop_serving(self.ground.config.client_grace);
                self.put_aside(&volume);
            }
        }
        !lock(&self.missing).is_empty()
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
    fn refuse_while_stopping(&self) -> Result<(), Problem> {
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
        {
            let _changing = lock(&self.changing);
            self.stopping.store(true, Ordering::Release);
        }
        let config = &self.ground.config;
        let deadline = Instant::now() + config.client_grace;
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

    /// Writes CLEAN where it is true and lets everything go. After [`Self::quiesce`], with nobody
    /// left who could ask for anything. Returns the volumes that will be copied at the next start.
    pub(super) fn finish(&self) -> Vec<VolumeName> {
        let mut dirty = Vec::new();
        for volume in self.all() {
            let name = &volume.info.name;
            match volume.mark_clean() {
                Ok(true) => tracing::info!(volume = %name, "stopped clean"),
                Ok(false) => {
                    tracing::warn!(
                        volume = %name,
                        "not everything is durable at the target; the next start copies again"
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
            Request::Protect(request) => Reply::Protected(self.protect(&request)?),
            Request::Preflight(request) => Reply::Preflight(self.preflight(&request)),
            Request::Unprotect { name, force } => {
                self.unprotect(&name, force)?;
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
                tracing::warn!(%volume, reason, "the agent asks for a new copy");
                host.recopy(volume, reason).map_err(refused)?;
                Reply::Done
            }
            Request::CopyRate { volume, bytes_per_second } => {
                self.find(volume)?.set_copy_rate(bytes_per_second)?;
                Reply::Done
            }
        };
        Ok(reply.into())
    }
}
