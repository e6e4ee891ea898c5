//! The catalogue's points, brought in line with the journal when a store is opened. Never touches
//! the store itself.

use farshore_extent::Lsn;

use super::Worker;
use crate::catalogue::CatalogueError;
use crate::store::StoreEvent;

impl Worker {
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
