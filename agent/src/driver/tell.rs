//! What the driver tells of its volumes: to the target, and to people at this host.

use farshore_extent::WallTime;
use farshore_protocol::message::{FromAgent, VolumeReport};

use super::Driver;
use crate::event_log::Sight;
use crate::session::LinkState;

impl Driver {
    pub(super) fn send_reports(&self) {
        if !matches!(self.session.link(), LinkState::Up { .. }) || self.filterd_problem.is_some() {
            return;
        }
        for status in self.volumes.values() {
            self.send(FromAgent::Report(VolumeReport {
                volume: status.info.volume,
                captured: status.captured,
                backlog_bytes: status.pool_used + self.reporter.spooled(status.info.volume),
                copy_remaining: status.copy.remaining_bytes,
                copy_total: status.copy.total_bytes,
                copy_rate: status.copy.bytes_per_second,
                reason: status.reason.clone(),
                now: WallTime::now(),
            }));
        }
    }

    pub(crate) fn show(&mut self) {
        let address = self.config.target.as_deref().unwrap_or(&self.identity.target);
        let since = self.start.elapsed();
        let filterd = self.filterd_problem.as_ref();
        let status = self.reporter.status(address, &self.session, filterd, since);
        let (link, volumes, shipped) = (self.session.link(), &self.volumes, &status.volumes);
        let sight = Sight { address, link, filterd, volumes, shipped };
        let events = self.changes.look(&sight, WallTime::now());
        events.into_iter().for_each(|event| self.events.add(event));
        self.board.show(status);
    }
}
