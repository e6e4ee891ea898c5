//! One protected volume of the running daemon: device, copy loop, front end, and its record.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use farshore_extent::{CaptureOrder, Problem, VolumeId, VolumeName};

use super::config::Config;
use super::filtering::{Filtering, Lingering};
use super::names::Names;
use super::namespace::OwnDevices;
use super::problem;
use super::schedule::Plan;
use super::serving::{NotRemoved, NotStarted, Serving};
use super::state::{Front, StateDir, VolumeRecord};
use crate::backing::{Backing, Mode};
use crate::control::{
    AttachKind, CopyProgress, IntentInfo, ThrottleInfo, VolumeInfo, VolumeStatus,
};
use crate::core::{Attach, IntentLoss, IntentStart};
use crate::filter::{CopyLoop, FilterConfig, Host, SharedState};
use crate::frontend::users::Users;
use crate::preflight::HostRoots;
use crate::sys::pool::PoolMemory;
use crate::volume_state::{Begin, Found, Geometry, plan};

/// Numbers to try for a block device before giving up.
const MAX_TRIES: usize = 16;

/// What every volume is attached with.
#[derive(Debug, Clone)]
pub(super) struct Ground {
    pub(super) config: Arc<Config>,
    pub(super) state: Arc<StateDir>,
    pub(super) host: Arc<Host>,
    pub(super) names: Names,
    pub(super) own: OwnDevices,
    pub(super) roots: HostRoots,
    pub(super) lingering: Arc<Lingering>,
}

/// An attached volume.
pub(super) struct Attached {
    /// With the size it had at its attach.
    pub(super) info: VolumeInfo,
    pub(super) filtering: Arc<Filtering>,
    pub(super) record: Mutex<VolumeRecord>,
    state: SharedState,
    /// When its copy may run.
    pub(super) plan: Mutex<Plan>,
    /// None once it has ended, and while it is being ended.
    pub(super) serving: Mutex<Option<Serving>>,
    /// The disk behind it, as the kernel calls it; none for a file.
    origin: Option<String>,
    pub(super) ground: Ground,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner) // plain data
}

impl Ground {
    /// A block device with a number that nobody has, from now on one of ours. Not one of `others`.
    pub(super) fn free_front(
        &self,
        name: &VolumeName,
        kind: AttachKind,
        mut others: Vec<Front>,
    ) -> Result<Front, Problem> {
        let failed = |why: String| problem::no_device(name, kind, why);
        loop {
            let free = Front::free(kind, &others).map_err(failed)?;
            let free = free.ok_or_else(|| failed("every number is taken".into()))?;
            // Somebody else may be at it at this moment.
            if free.kernel_name().is_none_or(|kernel| self.own.add(kernel)) {
                return Ok(free);
            }
            others.push(free);
        }
    }

    /// From now on the device `kernel` is not the volume's.
    fn give_up(&self, kernel: &str, record: &VolumeRecord) {
        let mut announced = self.names.announced().into_iter();
        if announced.any(|a| a.kernel == kernel && a.volume == record.volume) {
            self.names.withdraw(kernel, record.name.as_str());
        }
        self.own.remove(kernel);
    }
}

/// Starts the front end on record. A number that somebody else has taken meanwhile is replaced: the
/// stable name stays.
fn start_serving(
    ground: &Ground,
    device: &Arc<dyn crate::device::Device>,
    record: &mut VolumeRecord,
    known: bool,
) -> Result<Serving, Problem> {
    let mut tried = Vec::new();
    loop {
        let kernel = record.front.kernel_name();
        let error = match serve_as(ground, device, record) {
            Ok(serving) => return Ok(serving),
            Err(error) => error,
        };
        let problem = match error {
            NotStarted::Taken => None,
            NotStarted::Failed(problem) => Some(problem),
            // It may come about yet: it stays announced as ours, so that it is found and removed.
            NotStarted::Stuck(problem) => return Err(problem),
        };
        if let Some(kernel) = kernel.filter(|_| !known || problem.is_none()) {
            ground.give_up(&kernel, record);
        }
        if let Some(problem) = problem {
            return Err(problem);
        }
        tried.push(record.front.clone());
        if tried.len() >= MAX_TRIES {
            let why = "its number is taken";
            return Err(problem::no_device(&record.name, record.front.kind(), why));
        }
        let free = ground.free_front(&record.name, record.front.kind(), tried.clone())?;
        tracing::warn!(volume = %record.name, from = ?record.front, to = ?free, "its number is taken");
        record.front = free;
        ground.state.save(record)?;
    }
}

/// Tries the number on record. It is announced as ours only when nobody else has it: udev would give
/// the volume's names to another's device.
fn serve_as(
    ground: &Ground,
    device: &Arc<dyn crate::device::Device>,
    record: &VolumeRecord,
) -> Result<Serving, NotStarted> {
    let failed = |why| problem::no_device(&record.name, record.front.kind(), why);
    let existing = record.front.existing(record.volume);
    let existing = existing.map_err(|why| NotStarted::Failed(failed(why)))?;
    if existing == Some(false) {
        return Err(NotStarted::Taken);
    }
    let start = || Serving::start(Arc::clone(device), record, ground.config.queues);
    let Some(kernel) = record.front.kernel_name() else { return start() };
    ground.own.add(kernel.clone());
    let died_starting = ground.names.was_starting(&kernel, record.volume);
    let announce = |starting| {
        let announced = ground.names.announce(&kernel, &record.name, record.volume, starting);
        announced.map_err(|e| NotStarted::Failed(problem::socket(&ground.config.run, &e)))
    };
    announce(existing.is_none() || died_starting)?;
    match start() {
        Ok(serving) => announce(false).map(|()| serving),
        // Nobody has ever used it, and before Linux 7.0 nobody can have it again until a reboot.
        Err(NotStarted::Stuck(problem)) if died_starting => {
            let why = &problem.why;
            tracing::error!(volume = %record.name, kernel, why, "filterd died while it was made");
            ground.names.forget(&kernel);
            Err(NotStarted::Taken)
        }
        Err(error) => Err(error),
    }
}

/// Opens the backing of a new volume and fills in what only it knows.
pub(super) fn open(path: &Path) -> Result<Backing, Problem> {
    Backing::open(path, Mode::ReadWrite)
}

impl Attached {
    /// Attaches a volume. `known`: the record is from an earlier run, so it may continue.
    pub(super) fn attach(
        ground: &Ground,
        backing: Backing,
        mut record: VolumeRecord,
        known: bool,
    ) -> Result<Arc<Self>, Problem> {
        let identity = backing.identity().ok();
        let (size, blocks) = (backing.size(), backing.blocks());
        let region = ground.config.region.max(ground.config.chunk.get());
        let geometry = Geometry { volume: record.volume, size, blocks, region };
        let mut state = ground.state.volume_state(record.volume);
        let found = match state.load(record.volume) {
            Found::Nothing if known => Found::Damaged("it is missing".into()),
            found => found,
        };
        let plan = plan(&found, &geometry, identity.as_ref());
        tracing::info!(volume = %record.name, start = ?plan.start, "attaching a protected volume");
        let pool = PoolMemory::shared_for_claims(record.pool_bytes)
            .map_err(|e| problem::resources("memory for the capture pool", e))?;
        (record.size, record.blocks) = (size, blocks);
        record.epoch = ground.host.epoch();
        ground.state.save(&record)?;
        // From here on the disk says that what is set may differ.
        let (epoch, set, released) = (record.epoch, &plan.set, plan.released);
        let begin = Begin { geometry, epoch, identity, set, released };
        state.begin(&begin).map_err(|e| problem::state(&ground.config.state, &e))?;
        let chunk = ground.config.chunk;
        let attach = Attach {
            volume: record.volume,
            size,
            blocks,
            chunk,
            pool_bytes: pool.capacity(),
            start: if record.seeded { plan.start.compared() } else { plan.start },
            intent: Some(IntentStart { set: plan.set, cap: ground.config.max_regions }),
        };
        let key = ground.host.attach(attach).map_err(|e| problem::refused(&e))?;
        let held = ground.host.hold_copy(record.volume, record.wait.is_some());
        held.map_err(|e| problem::refused(&e))?;
        let filter = FilterConfig {
            host: Arc::clone(&ground.host),
            key,
            backing: Arc::new(backing),
            pool,
            chunk,
            engine: ground.config.engine,
        };
        let state = Arc::new(Mutex::new(state));
        let mut filtering = Filtering::new(record.volume, record.name.clone(), filter);
        // Before anybody can write.
        filtering.device().refuse_writes(record.fenced.is_some());
        let started = filtering.start(&state, record.copy_rate);
        let filtering = Arc::new(filtering);
        let attached = started.and_then(|()| Self::serve(ground, &filtering, record, known, state));
        if attached.is_err() {
            ground.lingering.let_go(filtering);
        }
        attached
    }

    fn serve(
        ground: &Ground,
        filtering: &Arc<Filtering>,
        mut record: VolumeRecord,
        known: bool,
        state: SharedState,
    ) -> Result<Arc<Self>, Problem> {
        let origin = ground.roots.name_of(&record.backing);
        origin.iter().for_each(|disk| ground.names.claim_origin(disk, &record.name));
        let served = Arc::clone(filtering.device()) as Arc<dyn crate::device::Device>;
        let serving = start_serving(ground, &served, &mut record, known);
        let serving = serving.inspect_err(|_| {
            // A disk whose volume waits in the kernel stays hidden: it has the same contents.
            if !known {
                origin.iter().for_each(|disk| ground.names.free_origin(disk));
            }
        })?;
        if serving.recovered() {
            tracing::info!(volume = %record.name, "its users go on where filterd had stopped");
        }
        let info = VolumeInfo {
            volume: record.volume,
            name: record.name.clone(),
            backing: record.backing.clone(),
            backend: filtering.device().backing().kind(),
            size: record.size,
            blocks: record.blocks,
            attachment: serving.attachment(),
            link: record
                .front
                .kernel_name()
                .and_then(|k| ground.names.link(&k, record.name.as_str())),
            epoch: record.epoch,
            point_interval_ms: record.point_interval_ms,
        };
        let plan = Mutex::new(Plan { wait: record.wait, going: None });
        Ok(Arc::new(Self {
            info,
            filtering: Arc::clone(filtering),
            record: Mutex::new(record),
            state,
            plan,
            serving: Mutex::new(Some(serving)),
            origin,
            ground: ground.clone(),
        }))
    }

    pub(super) fn id(&self) -> VolumeId {
        self.info.volume
    }

    #[cfg(test)]
    pub(super) fn device(&self) -> &Arc<crate::filter::FilterDevice> {
        self.filtering.device()
    }

    pub(super) fn pool(&self) -> &Arc<PoolMemory> {
        self.filtering.device().pool()
    }

    /// None are told while the way to it is being changed: a kernel device has none, and whoever
    /// waits for a driver or a client must not make the status wait.
    pub(super) fn clients(&self) -> u32 {
        let Ok(serving) = self.serving.try_lock() else { return 0 };
        serving.as_ref().map_or(0, Serving::clients)
    }

    /// `None` when it was detached meanwhile.
    pub(super) fn status(&self) -> Option<VolumeStatus> {
        let core = self.ground.host.status(self.id())?;
        let device = self.filtering.device();
        let longest_ms = self.ground.config.limits.throttle_ms;
        Some(VolumeStatus {
            info: VolumeInfo { size: device.backing().size(), ..self.info.clone() },
            order: core.order,
            reason: reason(core.reason, core.intent.and_then(|intent| intent.loss)),
            copy: CopyProgress {
                remaining_bytes: core.dirty_bytes,
                total_bytes: core.catch_up_total,
                bytes_per_second: self.filtering.copy().map_or(0, CopyLoop::speed),
            },
            copy_waits: self.copy_waits(core.order),
            verify: core.verify,
            captured: core.captured,
            released: core.released,
            durable: core.durable,
            oldest_unreleased: core.oldest,
            pool_used: core.pool_used,
            pool_bytes: core.pool_bytes,
            clients: self.clients(),
            writes: core.writes,
            written_bytes: core.written_bytes,
            reads: device.reads(),
            backing_errors: core.backing_errors + device.read_errors(),
            fenced: lock(&self.record).fenced.clone(),
            read_only: device.refuses_writes(),
            throttle: (longest_ms > 0).then_some(ThrottleInfo {
                longest_ms,
                delay_ms: core.throttle_ms,
                writes: core.throttled,
            }),
            intent: core.intent.map(|intent| IntentInfo {
                marked: intent.set,
                cap: intent.cap,
                region_bytes: intent.region_bytes,
                kept: intent.loss.is_none(),
            }),
        })
    }

    /// Changes the copy loop's rate, durably.
    pub(super) fn set_copy_rate(&self, bytes_per_second: u64) -> Result<(), Problem> {
        let mut record = lock(&self.record);
        record.copy_rate = bytes_per_second;
        self.ground.state.save(&record)?;
        if let Some(copy) = self.filtering.copy() {
            copy.set_rate(bytes_per_second);
        }
        Ok(())
    }

    /// Keeps durably that the target has refused this source, or has taken it back. The way to it
    /// stays as it is; when it takes no writes any more, it is made anew as soon as nobody uses it.
    pub(super) fn fence(&self, fence: Option<Problem>) -> Result<(), Problem> {
        let mut record = lock(&self.record);
        if record.fenced == fence {
            return Ok(());
        }
        let next = VolumeRecord { fenced: fence, ..record.clone() };
        self.ground.state.save(&next)?;
        *record = next;
        match &record.fenced {
            Some(problem) => tracing::warn!(volume = %self.info.name, %problem, "fenced"),
            None => tracing::info!(volume = %self.info.name, "not fenced any more"),
        }
        Ok(())
    }

    /// It takes no writes although it might, and nobody would notice that it is attached anew.
    pub(super) fn is_to_take_writes(&self) -> bool {
        self.filtering.device().refuses_writes()
            && lock(&self.record).fenced.is_none()
            && self.clients() == 0
            && self.users().only_passing()
    }

    /// Starts a verify at this rate, or ends it.
    pub(super) fn verify(&self, start: bool, bytes_per_second: u64) -> Result<(), Problem> {
        if let Some(copy) = self.filtering.copy() {
            copy.set_verify_rate(bytes_per_second);
        }
        self.ground.host.verify(self.id(), start).map_err(|e| problem::refused(&e))
    }

    /// Why its front end has ended by itself.
    pub(super) fn failed(&self) -> Option<String> {
        // Whoever has it changes it at this moment: the next look tells.
        self.serving.try_lock().ok()?.as_ref().and_then(Serving::failed)
    }

    /// Who uses its block device.
    pub(super) fn users(&self) -> Users {
        let kernel = lock(&self.record).front.kernel_name();
        let device = self.info.attachment.device();
        let of =
            |(kernel, device): (String, _)| Users::of_served(&self.ground.roots, &kernel, device);
        kernel.zip(device).map(of).unwrap_or_default()
    }

    /// For the end of the daemon: takes no more requests. A block device in use is left to the next
    /// start, for which its users wait; one that nobody uses goes away.
    pub(super) fn stop_serving(&self, grace: Duration) {
        let users = self.users();
        if users.only_passing() {
            let Err(problem) = self.end_serving(grace) else { return };
            tracing::warn!(volume = %self.info.name, %problem, why = problem.why, "it stays");
        } else {
            tracing::info!(volume = %self.info.name, %users, "its users wait for the next start");
        }
        self.filtering.end();
        let serving = lock(&self.serving).take();
        if !serving.is_none_or(|serving| serving.leave(grace)) {
            tracing::warn!(volume = %self.info.name, "a client did not end in time");
        }
    }

    /// Takes the way to the volume away: a socket from whoever uses it, a block device only when
    /// nobody does.
    pub(super) fn end_serving(&self, grace: Duration) -> Result<(), Problem> {
        // Not held while the kernel or a client takes its time: the status looks at it.
        let Some(serving) = lock(&self.serving).take() else { return Ok(()) };
        match serving.remove(grace) {
            Ok(all) => {
                if !all {
                    tracing::warn!(volume = %self.info.name, "a client did not end in time");
                }
                self.filtering.end();
                self.forget_names();
                Ok(())
            }
            Err(NotRemoved { still, why }) => {
                if still.is_none() {
                    self.filtering.end();
                }
                let served = still.is_some();
                *lock(&self.serving) = still;
                let name = self.info.name.as_str();
                let device = self.info.attachment.device().unwrap_or(Path::new("it"));
                let kernel = lock(&self.record).front.kernel_name();
                let found = |kernel: String| Users::of(&self.ground.roots, &kernel);
                let users = if served { Some(self.users()) } else { kernel.map(found) };
                let users = users.unwrap_or_default();
                // Somebody was faster: it came into use after the caller had looked.
                if served && users.in_kernel() {
                    return Err(problem::in_kernel(name, device, &users));
                }
                Err(problem::not_removed(name, device, why, &users))
            }
        }
    }

    fn forget_names(&self) {
        let Ground { names, own, .. } = &self.ground;
        if let Some(kernel) = lock(&self.record).front.kernel_name() {
            names.withdraw(&kernel, self.info.name.as_str());
            own.remove(&kernel);
        }
        self.origin.iter().for_each(|disk| names.free_origin(disk));
    }

    /// Whether it is served at all.
    pub(super) fn is_served(&self) -> bool {
        lock(&self.serving).is_some()
    }

    /// As on disk.
    pub(super) fn record(&self) -> VolumeRecord {
        lock(&self.record).clone()
    }

    /// Whether nobody is at it any more, within `limit`; serving must have stopped.
    pub(super) fn is_at_rest(&self, limit: Duration) -> bool {
        self.filtering.end();
        self.filtering.is_at_rest(limit)
    }

    /// Writes what the target lacks, or that it lacks nothing, when nobody is left who may write.
    /// Serving must have stopped. Returns whether it lacks nothing.
    pub(super) fn mark_stopped(&self) -> Result<bool, Problem> {
        let _record = lock(&self.record); // from here on it does not grow
        if !self.is_at_rest(Duration::ZERO) {
            return Ok(false); // the regions that are set are sent
        }
        let Some(left) = self.ground.host.left(self.filtering.key()) else { return Ok(false) };
        let core = &left.status;
        let complete = core.order == CaptureOrder::Ordered && core.captured == core.durable;
        // Nothing has a place, and yet something is missing: a marker, or what is in the spool.
        if core.in_flight > 0 || (left.missing.is_empty() && !complete) {
            return Ok(false);
        }
        let backing = self.filtering.device().backing();
        let identity = backing.sync().and_then(|()| backing.identity());
        let identity = identity.map_err(|e| problem::state(backing.path(), &e))?;
        let stopped = lock(&self.state).stop(identity, core.released, &left.missing, &left.set);
        stopped.map_err(|e| problem::state(&self.ground.config.state, &e))?;
        Ok(complete)
    }

    /// Leaves the core, when everybody has let go within `grace`. Serving must have stopped.
    pub(super) fn detach(&self, grace: Duration) -> Result<(), Problem> {
        self.filtering.end();
        self.filtering.detach(grace)?;
        let backing = self.filtering.device().backing();
        backing.sync().map_err(|e| problem::state(backing.path(), &e))
    }

    /// The same for whoever cannot wait: as soon as everybody has let go.
    pub(super) fn let_go(&self) {
        self.ground.lingering.let_go(Arc::clone(&self.filtering));
    }
}

/// What status says; a map that is not kept is told also while the volume is in order.
fn reason(catching_up: String, loss: Option<IntentLoss>) -> String {
    let told = match loss {
        None => return catching_up,
        Some(IntentLoss::AllMayDiffer) => {
            "FS-2052: the state directory cannot be written; a crash now means a whole new copy"
        }
        Some(IntentLoss::UntilBoot) => {
            "FS-2052: nothing in the state directory can be written; after a power cut now, \
             unprotect the volume and protect it again, because the next start cannot know what \
             changed"
        }
        Some(IntentLoss::Nothing) => {
            "FS-2052: nothing in the state directory can be written; after a crash now, unprotect \
             the volume and protect it again, because the next start cannot know what changed"
        }
    };
    if catching_up.is_empty() { told.to_owned() } else { format!("{catching_up}; {told}") }
}
