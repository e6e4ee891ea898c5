//! What becomes of a view whose block device has stopped by itself.
//!
//! A device that the kernel still has is served again, and its users notice nothing but the wait.
//! One that somebody took away is not made again: whoever did that meant it. Its view stays,
//! because what was written to it may be all that a person has, can be reached by its export, and
//! is closed when nobody has used that for as long as the configuration says: it holds the
//! journal at its point, which could not expire otherwise.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farshore_blkfilter::device::Device;
use farshore_extent::ViewId;

use super::block::{BlockDevice, Mark};
use super::{View, Views};
use crate::clock;
use crate::daemon::Daemon;

/// What is kept as evidence of such a view.
const NOTE: &str = "closed by the daemon: its block device was taken away, and nobody used it";

/// A block device that was taken away.
pub(super) struct Lost {
    /// What the front end says.
    pub(super) why: String,
    /// When the view was last seen in use.
    used: Instant,
}

impl Lost {
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
    /// Looks after block devices that have stopped. Blocks as long as the kernel takes.
    pub(crate) fn tend(&self, daemon: &Daemon) {
        for stopped in self.take_stopped() {
            self.follow(daemon, stopped);
        }
        let keep = daemon.config.limits.view_without_device.duration();
        for view in self.abandoned(Instant::now(), keep) {
            if let Err(problem) = self.close(daemon, view, NOTE) {
                tracing::warn!(%view, why = problem.why, "not closed: {problem}");
            }
        }
    }

    fn take_stopped(&self) -> Vec<Stopped> {
        let take = |(id, view): (&ViewId, &mut View)| {
            let why = view.block.as_ref()?.stopped()?;
            let (block, served) = (view.block.take()?, Arc::clone(&view.device) as _);
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
        let Some(found) = open.views.get_mut(&view) else {
            drop(open);
            // Closed meanwhile, and the device goes with it.
            again.into_iter().for_each(BlockDevice::remove);
            return;
        };
        let (volume, time) = (found.info.volume.clone(), clock::show(found.info.time));
        let (code, text) = match again {
            Ok(block) => {
                found.block = Some(block);
                (6609, format!("{path}, a view of {time}, had stopped and is served again: {why}"))
            }
            Err(why) => {
                let keep = daemon.config.limits.view_without_device;
                let text = format!(
                    "{path}, a view of {time}, was taken away: {why}. The view stays at its NBD \
                     export and is closed when nobody has used it for {keep}"
                );
                found.lost = Some(Lost { why, used: Instant::now() });
                (6608, text)
            }
        };
        drop(open);
        daemon.catalogue.note(code, Some(&volume), text);
    }

    fn abandoned(&self, now: Instant, keep: Duration) -> Vec<ViewId> {
        let over = |(id, view): (&ViewId, &mut View)| {
            let in_use = view.device.in_use();
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
        let mut lost = Lost { why: "gone".into(), used: at };
        assert!(!lost.is_over(at + keep / 2, false, keep));
        assert!(!lost.is_over(at + keep, true, keep), "a client is connected");
        assert!(!lost.is_over(at + keep * 3 / 2, false, keep), "it left half the time ago");
        assert!(lost.is_over(at + keep * 2, false, keep));
    }
}
