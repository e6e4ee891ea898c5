//! One protected volume of the running daemon: device, copy loop, front end, and its record.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use farshore_extent::{CaptureOrder, Problem, VolumeId};

use super::config::Config;
use super::problem;
use super::serving::Serving;
use super::state::{StateDir, VolumeRecord, VolumeState, start_of};
use crate::backing::{Backing, Mode};
use crate::control::{CopyProgress, VolumeInfo, VolumeStatus};
use crate::core::{Attach, Refused};
use crate::filter::{CopyLoop, FilterConfig, FilterDevice, Host};
use crate::sys::pool::PoolMemory;

/// What every volume is attached with.
#[derive(Debug, Clone)]
pub(super) struct Ground {
    pub(super) config: Arc<Config>,
    pub(super) state: Arc<StateDir>,
    pub(super) host: Arc<Host>,
}

/// An attached volume.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) info: VolumeInfo,
    device: Arc<FilterDevice>,
    key: crate::core::VolumeKey,
    record: Mutex<VolumeRecord>,
    copy: Mutex<CopyLoop>,
    serving: Mutex<Serving>,
    /// A client's thread was still there when serving stopped: it may write yet.
    client_left: AtomicBool,
    ground: Ground,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner) // plain data
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
        let start = start_of(known.then_some(&record), size, blocks, identity.as_ref());
        tracing::info!(volume = %record.name, ?start, "attaching a protected volume");
        let pool = PoolMemory::shared_for_claims(record.pool_bytes)
            .map_err(|e| problem::resources("memory for the capture pool", e))?;
        // From here on the disk says that the replica may be behind.
        (record.size, record.blocks) = (size, blocks);
        record.epoch = ground.host.epoch();
        record.state = VolumeState::Dirty;
        ground.state.save(&record)?;
        let chunk = ground.config.chunk;
        let attach = Attach {
            volume: record.volume,
            size,
            blocks,
            chunk,
            pool_bytes: pool.capacity(),
            start,
        };
        let key = ground.host.attach(attach).map_err(|e| problem::refused(&e))?;
        let filter = FilterConfig {
            host: Arc::clone(&ground.host),
            key,
            backing: Arc::new(backing),
            pool,
            chunk,
            engine: ground.config.engine,
        };
        let attached = Self::serve(ground, FilterDevice::new(filter), key, record);
        if attached.is_err()
            && let Err(error) = ground.host.detach(key)
        {
            tracing::error!(%error, "a volume that could not be served stays attached");
        }
        attached
    }

    fn serve(
        ground: &Ground,
        device: Arc<FilterDevice>,
        key: crate::core::VolumeKey,
        record: VolumeRecord,
    ) -> Result<Arc<Self>, Problem> {
        let copy = CopyLoop::start(&device, record.copy_rate)
            .map_err(|e| problem::resources("a thread for the copy loop", e))?;
        let served = Arc::clone(&device) as Arc<dyn crate::device::Device>;
        let serving = Serving::start(served, &record)?;
        let info = VolumeInfo {
            volume: record.volume,
            name: record.name.clone(),
            backing: record.backing.clone(),
            backend: device.backing().kind(),
            size: record.size,
            blocks: record.blocks,
            attachment: serving.attachment(),
            link: None,
            epoch: record.epoch,
            point_interval_ms: record.point_interval_ms,
        };
        Ok(Arc::new(Self {
            info,
            device,
            key,
            record: Mutex::new(record),
            copy: Mutex::new(copy),
            serving: Mutex::new(serving),
            client_left: AtomicBool::new(false),
            ground: ground.clone(),
        }))
    }

    pub(super) fn id(&self) -> VolumeId {
        self.info.volume
    }

    pub(super) fn pool(&self) -> &Arc<PoolMemory> {
        self.device.pool()
    }

    pub(super) fn clients(&self) -> u32 {
        lock(&self.serving).clients()
    }

    /// `None` when it was detached meanwhile.
    pub(super) fn status(&self) -> Option<VolumeStatus> {
        let core = self.ground.host.status(self.id())?;
        Some(VolumeStatus {
            info: self.info.clone(),
            order: core.order,
            reason: core.reason,
            copy: CopyProgress {
                remaining_bytes: core.dirty_bytes,
                total_bytes: core.catch_up_total,
                bytes_per_second: lock(&self.copy).speed(),
            },
            captured: core.captured,
            released: core.released,
            durable: core.durable,
            oldest_unreleased: core.oldest,
            pool_used: core.pool_used,
            pool_bytes: core.pool_bytes,
            clients: self.clients(),
            writes: core.writes,
            written_bytes: core.written_bytes,
            reads: self.device.reads(),
            backing_errors: core.backing_errors + self.device.read_errors(),
        })
    }

    /// Changes the copy loop's rate, durably.
    pub(super) fn set_copy_rate(&self, bytes_per_second: u64) -> Result<(), Problem> {
        let mut record = lock(&self.record);
        record.copy_rate = bytes_per_second;
        self.ground.state.save(&record)?;
        lock(&self.copy).set_rate(bytes_per_second);
        Ok(())
    }

    /// No more clients; those there are finish what they have sent.
    pub(super) fn stop_serving(&self, grace: Duration) {
        self.device.close();
        if !lock(&self.serving).stop(grace) {
            self.client_left.store(true, Ordering::Release);
            tracing::warn!(volume = %self.info.name, "a client did not end in time");
        }
    }

    pub(super) fn stop_copying(&self) {
        lock(&self.copy).stop();
    }

    /// Writes CLEAN when everything captured is durable at the target. Serving and copying must
    /// have stopped. Returns whether it is clean.
    pub(super) fn mark_clean(&self) -> Result<bool, Problem> {
        let Some(core) = self.ground.host.status(self.id()) else { return Ok(false) };
        let ended = !self.client_left.load(Ordering::Acquire);
        let quiet = ended && core.in_flight == 0 && core.order == CaptureOrder::Ordered;
        if !quiet || core.captured != core.durable {
            return Ok(false);
        }
        let backing = self.device.backing();
        let identity = backing.sync().and_then(|()| backing.identity());
        let identity = identity.map_err(|e| problem::state(backing.path(), &e))?;
        let mut record = lock(&self.record);
        record.state = VolumeState::Clean { last: core.captured, identity };
        self.ground.state.save(&record)?;
        Ok(true)
    }

    /// Leaves the core. Serving must have stopped.
    pub(super) fn detach(&self) -> Result<(), Problem> {
        self.stop_copying();
        match self.ground.host.detach(self.key) {
            Ok(()) | Err(Refused::NoSuchVolume) => {}
            Err(Refused::Busy(n)) => return Err(problem::busy(&self.info.name, n)),
            Err(other) => return Err(problem::refused(&other)),
        }
        let backing = self.device.backing();
        backing.sync().map_err(|e| problem::state(backing.path(), &e))
    }
}
