//! Points on their way from the journal to the catalogue, and both brought in line when a store is
//! opened. Never changes the store itself.

use farshore_extent::Lsn;

use super::Worker;
use crate::catalogue::{CatalogueError, NewPoint};
use crate::store::{StoreError, StoreEvent};

/// Points that could not be recorded yet; those beyond this many are taken from the journal later.
const MAX_UNRECORDED: usize = 10_000;

/// Points that the catalogue has not taken yet.
#[derive(Default)]
pub(super) struct Unrecorded {
    points: Vec<NewPoint>,
    /// There are more behind them, in the journal.
    more: bool,
}

impl Unrecorded {
    fn extend(&mut self, points: Vec<NewPoint>) {
        let room = if self.more { 0 } else { MAX_UNRECORDED - self.points.len() };
        self.more |= points.len() > room;
        self.points.extend(points.into_iter().take(room));
    }

    /// How far the catalogue knows everything once it has taken these; `upto` if these are all.
    fn reach(&self, upto: Lsn) -> Option<Lsn> {
        let last = self.points.last()?.lsn;
        Some(if self.more { last } else { upto })
    }
}

impl Worker {
    /// Writes points into the catalogue. When that fails they are tried again with the next
    /// commit, and at the next start the journal still knows them.
    pub(super) fn record(&mut self, points: Vec<NewPoint>, upto: Lsn) {
        self.unrecorded.extend(points);
        if let Some(reach) = self.unrecorded.reach(upto) {
            if !self.add(&self.unrecorded.points, reach) {
                return;
            }
            self.unrecorded.points.clear();
        }
        if !self.unrecorded.more {
            self.replica.points_reach(upto);
        } else if let Err(error) = self.replay_points(self.replica.facts().row.points_upto) {
            tracing::error!(volume = %self.name(), %error, "points were not recorded");
        }
    }

    /// Whether the catalogue took them; everything up to `upto` is recorded with them.
    fn add(&self, points: &[NewPoint], upto: Lsn) -> bool {
        let mut catalogue = self.catalogue.lock();
        let added = catalogue.add_points(self.replica.volume, points, upto, self.clock.now());
        drop(catalogue);
        if let Err(error) = added {
            tracing::error!(volume = %self.name(), %error, "points were not recorded");
            return false;
        }
        self.replica.update(|facts| {
            facts.row.points_upto = facts.row.points_upto.max(upto);
        });
        self.recount();
        true
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
        self.unrecorded.points.retain(|point| point.lsn <= durable);
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
    /// catalogue was lost. What was known at `upto` was recorded; it may have expired since.
    pub(super) fn replay_points(&mut self, upto: Lsn) -> Result<(), StoreError> {
        let Some(store) = &self.store else { return Ok(()) };
        let durable = store.position().durable;
        let mut missed = Vec::new();
        if upto < durable {
            store.history(|event| match event {
                StoreEvent::Point(point) if point.known > upto => missed.push(point),
                _ => {}
            })?;
        }
        self.unrecorded = Unrecorded::default();
        let mut points = Vec::new();
        for point in missed {
            self.event(StoreEvent::Point(point), &mut points);
        }
        for some in points.chunks(MAX_UNRECORDED) {
            if !some.last().is_some_and(|last| self.add(some, last.lsn)) {
                self.unrecorded.more = true;
                return Ok(());
            }
        }
        self.replica.points_reach(durable);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use farshore_extent::{Epoch, MarkerId, PointKind, Seq, WallTime};

    use super::*;

    fn points(seqs: std::ops::Range<u64>) -> Vec<NewPoint> {
        let point = |seq| NewPoint {
            lsn: Lsn::new(Epoch::new(1), Seq::new(seq)),
            time: WallTime::default(),
            kind: PointKind::Crash,
            name: String::new(),
            marker: MarkerId::random(),
        };
        seqs.map(point).collect()
    }

    #[test]
    fn points_that_found_no_room_are_never_taken_for_recorded() {
        let place = |seq| Lsn::new(Epoch::new(1), Seq::new(seq));
        let most = MAX_UNRECORDED as u64;
        let mut waiting = Unrecorded::default();
        assert_eq!(waiting.reach(place(5)), None);
        waiting.extend(points(0..10));
        assert_eq!(waiting.reach(place(50)), Some(place(50)), "these are all");
        waiting.extend(points(100..100 + most));
        let last = place(100 + most - 11);
        assert_eq!(waiting.reach(place(u64::MAX)), Some(last), "ten had no room");
        waiting.points.clear();
        waiting.extend(points(most * 2..most * 2 + 1));
        assert_eq!(waiting.reach(place(u64::MAX)), None, "the ten come first, from the journal");
    }
}
