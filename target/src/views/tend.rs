//! What becomes of a view that is not served, and of one whose block device has stopped by itself.
//!
//! A view that cannot be served is tried again and again: its point is held and its scratch is
//! kept until somebody closes it.
//!
//! A device that the kernel still has is served again, and its users notice nothing but the wait.
//! One that somebody took away is not made again: whoever did that meant it. Its view stays,
//! because what was written to it may be all that a person has, can be reached by its export, and
//! is closed when nobody has used that for as long as the configuration says: it holds the
//! journal at its point, which could not expire otherwise.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farshore_blkfilter::device::Device;
use farshore_extent::{Problem, ViewId, VolumeName};
use tokio::task::JoinSet;

use super::block::{BlockDevice, Mark};
use super::{View, Views, open};
use crate::clock;
use crate::daemon::{self, Daemon};
use crate::failover;

/// What is kept as evidence of such a view.
const NOTE: &str = "closed by the daemon: its block device was taken away, and nobody used it";

/// How long after a failure a view is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// Serves every view again that is not served and whose time has come.
pub(crate) async fn serve_again(daemon: &Arc<Daemon>) {
    let mut opening = JoinSet::new();
    for view in daemon.views.due(Instant::now()) {
        let daemon = Arc::clone(daemon);
        // Side by side: a store that takes long to open holds up no other.
        opening.spawn(async move {
            let opened = open::reopen(&daemon, view).await;
            let Some((code, volume, text)) = daemon.views.tried(view, opened) else { return };
            daemon::note(&daemon, code, Some(volume), text).await;
        });
    }
    opening.join_all().await;
}

/// A block device that was taken away.
pub(super) struct Lost {
    /// When the view was last seen in use.
    used: Instant,
}

impl Lost {
    pub(super) fn new() -> Self {
        Self { used: Instant::now() }
    }

    /// Whether nobody has used the view for `keep`; to be asked again and again.
    fn is_over(&mut self, now: Instant, in_use: bool, keep: Duration) -> bool {
        if in_use {
            self.used = now;
        }
        now.duration_since(self.used) >= keep
    }
}

/// A device that has stopped, out of its view.
struct Stopped {
    view: ViewId,
    served: Arc<dyn Device>,
    block: BlockDevice,
    why: String,
}

impl Views {
    fn due(&self, now: Instant) -> Vec<ViewId> {
        let due = |view: &View| view.serving.is_none() && view.retry <= now;
        let open = self.lock();
        open.views.iter().filter(|(_, view)| due(view)).map(|(id, _)| *id).collect()
    }

    /// Remembers how it went; what there is to tell.
    fn tried(
        &self,
        view: ViewId,
        opened: Result<(), Problem>,
    ) -> Option<(u16, VolumeName, String)> {
        let mut open = self.lock();
        let found = open.views.get_mut(&view)?;
        let shown = found.shown();
        let (code, text) = match opened {
            Ok(()) => (0, format!("{shown} is served again")),
            Err(problem) => {
                found.retry = Instant::now() + RETRY;
                let known = found.broken.replace(problem.clone());
                if known.is_some_and(|known| known.why == problem.why) {
                    return None;
                }
                (6610, format!("{shown} cannot be served: {}: {}", problem.what, problem.why))
            }
        };
        Some((code, found.replica.name(), text))
    }

    /// Looks after block devices that have stopped. Blocks as long as the kernel takes.
    pub(crate) fn tend(&self, daemon: &Daemon) {
        for (volume, problem) in self.untold(daemon) {
            let text = format!("{}: {}", problem.what, problem.why);
            daemon.catalogue.note(problem.code.0, Some(&volume), text);
        }
        for stopped in self.take_stopped() {
            self.follow(daemon, stopped);
        }
        let keep = daemon.config.limits.view_without_device.duration();
        for view in self.abandoned(Instant::now(), keep) {
            if failover::owner_of(daemon, view).is_some() {
                continue;
            }
            if let Err(problem) = self.close(daemon, view, NOTE) {
                tracing::warn!(%view, why = problem.why, "not closed: {problem}");
            }
        }
    }

    /// Problems of views that the event log does not have yet. One that has gone and comes again is
    /// told again.
    fn untold(&self, daemon: &Daemon) -> Vec<(VolumeName, Problem)> {
        let mut all = Vec::new();
        for view in self.lock().views.values_mut() {
            let now = view.problems(daemon);
            let codes = now.iter().map(|problem| problem.code.0).collect();
            let told = std::mem::replace(&mut view.told, codes);
            // Why a view is not served is told when it was tried.
            let new = now.into_iter().filter(|p| p.code.0 != 6610 && !told.contains(&p.code.0));
            all.extend(new.map(|problem| (view.replica.name(), problem)));
        }
        all
    }

    fn take_stopped(&self) -> Vec<Stopped> {
        let take = |(id, view): (&ViewId, &mut View)| {
            let serving = view.serving.as_mut()?;
            let why = serving.block.as_ref()?.stopped()?;
            let (block, served) = (serving.block.take()?, Arc::clone(&serving.device) as _);
            Some(Stopped { view: *id, served, block, why })
        };
        self.lock().views.iter_mut().filter_map(take).collect()
    }

    fn follow(&self, daemon: &Daemon, stopped: Stopped) {
        let Stopped { view, served, block, why } = stopped;
        let path = block.path();
        let path = path.display();
        let mark = Mark::of(daemon.authority.fingerprint());
        let again = block.again(&served, mark, why.clone());
        let mut open = self.lock();
        let found = open.views.get_mut(&view);
        let Some(found) = found.filter(|found| found.serving.is_some()) else {
            drop(open);
            // Closed meanwhile, and the device goes with it.
            again.into_iter().for_each(BlockDevice::remove);
            return;
        };
        let (volume, time) = (found.replica.name(), clock::show(found.row.time));
        let (code, text) = match again {
            Ok(block) => {
                if let Some(serving) = &mut found.serving {
                    serving.block = Some(block);
                }
                (6609, format!("{path}, a view of {time}, had stopped and is served again: {why}"))
            }
            Err(why) => {
                let keep = daemon.config.limits.view_without_device;
                let text = format!(
                    "{path}, a view of {time}, was taken away: {why}. The view stays at its NBD \
                     export and is closed when nobody has used it for {keep}"
                );
                found.lost = Some(Lost::new());
                (found.row.device, found.row.device_lost) = (None, Some(why));
                (6608, text)
            }
        };
        let row = found.row.clone();
        drop(open);
        if let Err(error) = daemon.catalogue.lock().put_view(&row) {
            // The next daemon makes the device again.
            tracing::warn!(%error, "that a view has lost its device is not recorded");
        }
        daemon.catalogue.note(code, Some(&volume), text);
    }

    fn abandoned(&self, now: Instant, keep: Duration) -> Vec<ViewId> {
        let over = |(id, view): (&ViewId, &mut View)| {
            let in_use = view.serving.as_ref()?.device.in_use();
            view.lost.as_mut()?.is_over(now, in_use, keep).then_some(*id)
        };
        self.lock().views.iter_mut().filter_map(over).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_without_its_device_ends_when_nobody_has_used_it_for_the_time() {
        let keep = Duration::from_secs(60);
        let at = Instant::now();
        let mut lost = Lost { used: at };
        assert!(!lost.is_over(at + keep / 2, false, keep));
        assert!(!lost.is_over(at + keep, true, keep), "a client is connected");
        assert!(!lost.is_over(at + keep * 3 / 2, false, keep), "it left half the time ago");
        assert!(lost.is_over(at + keep * 2, false, keep));
    }
}
