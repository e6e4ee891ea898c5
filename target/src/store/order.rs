//! Which places of the history are consistent states, and which markers became points.
//!
//! Fed with the events of the journal in order; knows no file and no clock.

use std::collections::BTreeMap;

use farshore_changelog::{Marker, MarkerState, RecordBody, SegmentEvent, order_after};
use farshore_extent::{CaptureOrder, GroupId, Lsn, MarkerId, PointKind, Seq, VolumeSize, WallTime};

use super::limits::MAX_PENDING_MARKERS;

/// A marker that became a recovery point: durable, committed, in an ordered stretch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommittedPoint {
    /// Its place: the state after every record up to it.
    pub lsn: Lsn,
    /// The place of the record that made it a point: the marker's own, or behind it that of its
    /// commit.
    pub known: Lsn,
    /// Capture time of the marker.
    pub time: WallTime,
    /// Its identity.
    pub marker: MarkerId,
    /// What it promises.
    pub kind: PointKind,
    /// Its group, or nil.
    pub group: GroupId,
    /// Name tag, or empty.
    pub name: String,
}

/// Something in the journal that others must know of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreEvent {
    /// A point came into being.
    Point(CommittedPoint),
    /// A marker that will never be a point: cut while catching up, or aborted.
    MarkerDropped {
        /// Which.
        marker: MarkerId,
        /// Where it lies (an aborted one: where the abort lies).
        lsn: Lsn,
    },
    /// From here on writes are missing.
    OrderLost {
        /// Where.
        lsn: Lsn,
        /// When.
        time: WallTime,
    },
    /// Every write is here again.
    OrderRestored {
        /// Where.
        lsn: Lsn,
        /// When.
        time: WallTime,
    },
    /// The volume has a new size.
    Resized {
        /// Where.
        lsn: Lsn,
        /// In bytes.
        size: VolumeSize,
    },
    /// A new run of `filterd`.
    EpochStarted {
        /// Where.
        lsn: Lsn,
        /// Without a gap.
        continues: bool,
    },
}

/// A stretch of the history in which every place is a consistent state: `[from, to]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OrderedStretch {
    /// First place.
    pub from: Lsn,
    /// Capture time there.
    pub from_time: WallTime,
    /// First place that is not part of it: behind the last record before order was lost, because
    /// what is missing may be as old as that. None while it goes on.
    pub until: Option<Lsn>,
}

/// The order of the history and the markers that wait.
#[derive(Debug, Clone)]
pub(crate) struct OrderBook {
    /// (place, state from there on, time), ascending, states alternate.
    changes: Vec<(Lsn, CaptureOrder, WallTime)>,
    pending: BTreeMap<MarkerId, (Lsn, WallTime, Marker)>,
}

impl OrderBook {
    /// Begins at `base`.
    pub(crate) fn new(base: Lsn, order: CaptureOrder, time: WallTime) -> Self {
        Self { changes: vec![(base, order, time)], pending: BTreeMap::new() }
    }

    pub(crate) fn current(&self) -> CaptureOrder {
        self.changes.last().map_or(CaptureOrder::CatchUp, |c| c.1)
    }

    pub(crate) fn at(&self, lsn: Lsn) -> CaptureOrder {
        let n = self.changes.partition_point(|c| c.0 <= lsn);
        // Before the first change lies nothing that can be opened.
        n.checked_sub(1).map_or(CaptureOrder::CatchUp, |n| self.changes[n].1)
    }

    pub(crate) fn stretches(&self) -> Vec<OrderedStretch> {
        let ends = self.changes.iter().skip(1).map(|c| Some(c.0)).chain([None]);
        self.changes
            .iter()
            .zip(ends)
            .filter(|(c, until)| c.1 == CaptureOrder::Ordered && *until != Some(c.0))
            .map(|(c, until)| OrderedStretch { from: c.0, from_time: c.2, until })
            .collect()
    }

    /// Whether an ordered stretch ends with the record at `lsn`.
    pub(crate) fn ends_with(&self, lsn: Lsn) -> bool {
        let behind = behind(lsn);
        self.stretches().iter().any(|stretch| stretch.until == Some(behind))
    }

    /// Whether the event ends the ordered stretch that goes on.
    pub(crate) fn is_ended_by(&self, event: &SegmentEvent) -> bool {
        let before = self.current();
        let after = order_after(before, &event.record.body);
        before == CaptureOrder::Ordered && after == CaptureOrder::CatchUp
    }

    /// Forgets what lies before the new base.
    pub(crate) fn rebase(&mut self, base: Lsn, time: WallTime) {
        let order = self.at(base);
        self.changes.retain(|c| c.0 > base);
        self.changes.insert(0, (base, order, time));
    }

    /// Takes the next event of the journal; what others must know is appended to `out`. `newest`
    /// is the place of the record before it: with that an ordered stretch ends.
    pub(crate) fn take(&mut self, event: &SegmentEvent, newest: Lsn, out: &mut Vec<StoreEvent>) {
        let (lsn, time) = (event.lsn(), event.record.time);
        let before = self.current();
        let after = order_after(before, &event.record.body);
        match &event.record.body {
            RecordBody::Marker(marker) => self.marker(lsn, time, marker, out),
            RecordBody::MarkerCommit(id) => {
                if let Some((at, time, marker)) = self.pending.remove(id) {
                    self.point((at, time), lsn, &marker, out);
                }
            }
            RecordBody::MarkerAbort(id) => {
                self.pending.remove(id);
                out.push(StoreEvent::MarkerDropped { marker: *id, lsn });
            }
            RecordBody::Resize(size) => out.push(StoreEvent::Resized { lsn, size: *size }),
            RecordBody::EpochStart(start) => {
                out.push(StoreEvent::EpochStarted { lsn, continues: start.continues });
            }
            RecordBody::OrderLost
            | RecordBody::OrderRestored
            | RecordBody::Write { .. }
            | RecordBody::Zero { .. }
            | RecordBody::Unknown { .. }
            | RecordBody::Copy { .. }
            | RecordBody::Hash { .. } => {}
        }
        if before != after {
            let from = match after {
                // Writes with the numbers from here on were dropped, by a full pool or a crash.
                CaptureOrder::CatchUp => behind(newest),
                CaptureOrder::Ordered => lsn,
            };
            // Never before the base, whose super block may be of a version that knew this not.
            let from = self.changes.last().map_or(from, |change| from.max(change.0));
            self.changes.push((from, after, time));
            out.push(match after {
                CaptureOrder::CatchUp => StoreEvent::OrderLost { lsn, time },
                CaptureOrder::Ordered => StoreEvent::OrderRestored { lsn, time },
            });
        }
    }

    /// As [`Self::take`], for the events of a history whose order is known from `base` on: of what
    /// lies before it only waiting markers count.
    pub(crate) fn take_after(
        &mut self,
        event: &SegmentEvent,
        newest: Lsn,
        base: Lsn,
        out: &mut Vec<StoreEvent>,
    ) {
        if event.lsn() > base {
            return self.take(event, newest, out);
        }
        match &event.record.body {
            RecordBody::Marker(marker) if marker.state == MarkerState::Pending => {
                self.marker(event.lsn(), event.record.time, marker, out);
            }
            RecordBody::MarkerCommit(id) | RecordBody::MarkerAbort(id) => {
                self.pending.remove(id);
            }
            _ => {}
        }
    }

    fn marker(&mut self, lsn: Lsn, time: WallTime, marker: &Marker, out: &mut Vec<StoreEvent>) {
        match marker.state {
            MarkerState::Committed => self.point((lsn, time), lsn, marker, out),
            MarkerState::Pending => {
                self.pending.insert(marker.id, (lsn, time, marker.clone()));
                if self.pending.len() > MAX_PENDING_MARKERS {
                    let oldest = self.pending.iter().min_by_key(|(_, p)| p.0).map(|(id, _)| *id);
                    if let Some(marker) = oldest {
                        self.pending.remove(&marker);
                        out.push(StoreEvent::MarkerDropped { marker, lsn });
                    }
                }
            }
        }
    }

    fn point(
        &self,
        (lsn, time): (Lsn, WallTime),
        known: Lsn,
        marker: &Marker,
        out: &mut Vec<StoreEvent>,
    ) {
        out.push(match self.at(lsn) {
            CaptureOrder::CatchUp => StoreEvent::MarkerDropped { marker: marker.id, lsn },
            CaptureOrder::Ordered => StoreEvent::Point(CommittedPoint {
                lsn,
                known,
                time,
                marker: marker.id,
                kind: marker.kind,
                group: marker.group,
                name: marker.name.clone(),
            }),
        });
    }
}

/// The first place after a record. The numbers are a peer's: no wrap, no panic.
pub(crate) const fn behind(lsn: Lsn) -> Lsn {
    Lsn::new(lsn.epoch, Seq::new(lsn.seq.get().saturating_add(1)))
}
