//! The capture side of one attached volume: its place in the core, its device, its copy loop, the
//! keeper of its intent map.
//!
//! It ends in two steps, because the backing device has the last word: [`Filtering::end`] asks,
//! and [`Filtering::detach`] works once everybody has let go of the device. Whoever cannot wait for
//! that gives it to [`Lingering`]. Until it is detached, the claim of the backing device and the
//! volume's place in the core are its own, and nobody can attach the volume a second time.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use farshore_extent::{Problem, VolumeId, VolumeName, VolumeSize};

use super::problem;
use crate::core::{NewPart, Refused, VolumeKey};
use crate::filter::{CopyLoop, FilterConfig, FilterDevice, Host, IntentKeeper, SharedState};

/// Between two looks whether everybody has let go.
const LOOK: Duration = Duration::from_millis(5);

/// See the module.
#[derive(Debug)]
pub(super) struct Filtering {
    volume: VolumeId,
    name: VolumeName,
    host: Arc<Host>,
    key: VolumeKey,
    device: Arc<FilterDevice>,
    copy: Option<CopyLoop>,
    /// Writes wait for it, so it ends after everybody else.
    keeper: Option<IntentKeeper>,
}

impl Filtering {
    /// For a volume that is attached to the core already.
    pub(super) fn new(volume: VolumeId, name: VolumeName, config: FilterConfig) -> Self {
        let (host, key) = (Arc::clone(&config.host), config.key);
        let device = FilterDevice::new(config);
        Self { volume, name, host, key, device, copy: None, keeper: None }
    }

    /// Starts keeping the intent map in `state`, and the copy loop.
    pub(super) fn start(&mut self, state: &SharedState, rate: u64) -> Result<(), Problem> {
        let keeper = IntentKeeper::start(&self.device, Arc::clone(state));
        let keeper = keeper.map_err(|e| problem::resources("a thread for the intent map", e))?;
        self.keeper = Some(keeper);
        let copy = CopyLoop::start(&self.device, rate);
        self.copy = Some(copy.map_err(|e| problem::resources("a thread for the copy loop", e))?);
        Ok(())
    }

    pub(super) fn device(&self) -> &Arc<FilterDevice> {
        &self.device
    }

    pub(super) fn key(&self) -> VolumeKey {
        self.key
    }

    pub(super) fn copy(&self) -> Option<&CopyLoop> {
        self.copy.as_ref()
    }

    /// Its backing is larger now; see [`Host::grow`].
    pub(super) fn grow(&self, size: VolumeSize, part: NewPart) -> Result<bool, Refused> {
        self.host.grow(self.key, size, part)
    }

    /// Whether the intent map is kept yet: nothing was written of how the volume stopped.
    pub(super) fn is_kept(&self) -> bool {
        self.keeper.as_ref().is_some_and(|keeper| !keeper.has_ended())
    }

    /// Whether the disk has marks for a volume of `size`, or says that all of it may differ. Waits
    /// for it for at most `limit`.
    pub(super) fn is_marked(&self, size: VolumeSize, limit: Duration) -> bool {
        let marked = || {
            let intent = self.host.status(self.volume).and_then(|status| status.intent);
            intent.is_none_or(|intent| intent.loss.is_some() || intent.durable_size >= size)
        };
        within(limit, marked)
    }

    /// Takes no new users and stops copying. Waits for nothing.
    pub(super) fn end(&self) {
        self.device.close();
        if let Some(copy) = &self.copy {
            copy.ask_to_stop();
        }
    }

    /// Whether everybody has let go: no client, no queue, no copy loop, so nothing is in flight and
    /// nothing will be; then the intent map is not changed any more either. Waits for it for at
    /// most `limit`. After [`Self::end`], and without the front end, it stays so.
    pub(super) fn is_at_rest(&self, limit: Duration) -> bool {
        within(limit, || {
            // Each of them has the device, but not the keeper.
            if Arc::strong_count(&self.device) > 1 {
                return false;
            }
            let keeper = self.keeper.as_ref();
            keeper.inspect(|keeper| keeper.ask_to_stop());
            keeper.is_none_or(IntentKeeper::has_ended)
        })
    }

    /// Leaves the core, when everybody has let go within `limit`.
    ///
    /// # Errors
    /// FS-2037: somebody has not; nothing has changed.
    pub(super) fn detach(&self, limit: Duration) -> Result<(), Problem> {
        if !self.is_at_rest(limit) {
            return Err(problem::busy(&self.name));
        }
        match self.host.detach(self.key) {
            Ok(()) | Err(Refused::NoSuchVolume) => {
                self.device.backing().forget_cached();
                Ok(())
            }
            Err(Refused::Busy(_)) => Err(problem::busy(&self.name)),
            Err(other) => Err(problem::refused(&other)),
        }
    }
}

/// Whether it is so, now or within `limit`. For what nobody announces.
fn within(limit: Duration, is_so: impl Fn() -> bool) -> bool {
    let until = Instant::now() + limit;
    loop {
        if is_so() {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        #[allow(clippy::disallowed_methods)]
        std::thread::sleep(LOOK);
    }
}

/// Volumes that were let go while a request or a driver still had them.
#[derive(Debug, Default)]
pub(super) struct Lingering(Mutex<Vec<Arc<Filtering>>>);

impl Lingering {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Filtering>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner) // plain data
    }

    /// Lets a volume go: now, or as soon as everybody else has ([`Self::sweep`]). Its front end must
    /// have ended.
    pub(super) fn let_go(&self, volume: Arc<Filtering>) {
        volume.end();
        if let Err(problem) = volume.detach(LOOK * 4) {
            tracing::warn!(volume = %volume.name, %problem, "it goes when it has come to rest");
            self.lock().push(volume);
        }
    }

    /// Detaches those that have come to rest.
    pub(super) fn sweep(&self) {
        self.lock().retain(|volume| match volume.detach(Duration::ZERO) {
            Ok(()) => {
                tracing::info!(volume = %volume.name, "it has come to rest and is let go");
                false
            }
            Err(_) => true,
        });
    }

    /// Why the volume, or anything on this backing, cannot be attached yet.
    pub(super) fn obstacle(&self, volume: Option<VolumeId>, backing: &Path) -> Option<Problem> {
        let same =
            |f: &&Arc<Filtering>| Some(f.volume) == volume || f.device.backing().path() == backing;
        self.lock().iter().find(same).map(|found| problem::busy(&found.name))
    }
}
