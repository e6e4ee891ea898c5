//! Points on their way from the journal to the catalogue, and both brought in line when a store is
//! opened. Never changes the store itself.

use farshore_extent::Lsn;

use super::Worker;
use crate::catalogue::{CatalogueError, NewPoint};
use crate::store::StoreEvent;

/// Points that could not be recorded yet; beyond this many they wait for the next start.
const MAX_UNRECORDED: usize = 10_000;

impl Worker {
    /// Writes points into the catalogue. When that fails they are kept and tried again with the
    /// next commit, and at the next start the journal still knows them.
    pub(super) fn record(&mut self, points: Vec<NewPoint>, upto: Lsn) {
        let room = MAX_UNRECORDED.saturating_sub(self.unrecorded.len());
        self.unrecorded.extend(points.into_iter().take(room));
        if !self.unrecorded.is_empty() {
            let recorded = self.catalogue.lock().add_points(
                self.replica.volume,
                &self.unrecorded,
                upto,
                self.clock.now(),
            );
            if let Err(error) = recorded {
                tracing::error!(volume = %self.name(), %error, "points were not recorded");
                return;
            }
            self.unrecorded.clear();
            self.replica.update(|facts| {
                facts.row.points_upto = facts.row.points_upto.max(upto);
            });
            self.recount();
        }
        self.replica.points_reach(upto);
    }

    pub(super) fn recount(&self) {
        match self.catalogue.lock().point_summary(self.replica.volume) {
            Ok(points) => self.replica.update(|facts| facts.points = points),
            Err(error) => tracing::error!(%error, "points cannot be counted"),
        }
    }

    /// Points beyond the end of the journal were lost with a damaged part of it. Their numbers lie
    /// before those of the new copy: left in the catalogue they could be opened again once it has
    /// come, and would show the state before the damage.
    pub(super) fn forget_lost_points(&mut self, durable: Lsn) -> Result<(), CatalogueError> {
        self.unrecorded.retain(|point| point.lsn <= durable);
        let volume = self.replica.volume;
        let gone = self.catalogue.lock().forget_points_after(volume, durable)?;
        if gone > 0 {
            let text = format!("{gone} recovery points after {durable} were lost with the journal");
            self.catalogue.note(6009, Some(&self.name()), text);
        }
        self.replica.update(|facts| {
            facts.row.points_upto = facts.row.points_upto.min(durable);
        });
        Ok(())
    }

    /// Rows of points that were durable but not recorded when the daemon stopped, or whose
    /// catalogue was lost. Those at or before `upto` were recorded; they may have expired since.
    pub(super) fn replay_points(&mut self, upto: Lsn) {
        let Some(store) = &mut self.store else { return };
        let durable = store.position().durable;
        let mut points = Vec::new();
        for event in store.history() {
            if let StoreEvent::Point(_) = event {
                self.event(event, &mut points);
            }
        }
        points.retain(|point| point.lsn > upto);
        self.record(points, durable);
    }
}
