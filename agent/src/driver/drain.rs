//! The last of a stop: what filterd holds is still shipped.

use farshore_blkfilter::control::VolumeStatus;
use farshore_extent::CaptureOrder;

use super::Driver;
use crate::session::{Event, LinkState};

/// Listings of filterd in a row, during a stop, in which nothing was left to ship.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Calm {
    seen: u64,
    times: u32,
}

impl Driver {
    /// Goes on shipping before a stop, and cuts no more points. Returns whether everything that
    /// filterd holds is safe at the target, or cannot be made so now.
    pub(crate) async fn drain(&mut self, calm: &mut Calm) -> bool {
        self.step(Event::Tick).await;
        if self.filterd_problem.is_some() || !matches!(self.session.link(), LinkState::Up { .. }) {
            return true;
        }
        if self.listings != calm.seen {
            let safe =
                |v: &VolumeStatus| v.order != CaptureOrder::Ordered || v.captured == v.durable;
            let all = self.volumes.values().all(safe);
            *calm = Calm { seen: self.listings, times: if all { calm.times + 1 } else { 0 } };
        }
        self.line.look();
        // The first listing may be from before the stop.
        calm.times >= 2
    }

    /// Before the first [`Self::drain`].
    pub(crate) fn calm(&self) -> Calm {
        Calm { seen: self.listings, times: 0 }
    }
}
