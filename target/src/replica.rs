//! One replica as the rest of the daemon sees it: its queue, and the facts its worker publishes.
//!
//! Decides nothing about data: the worker does, alone.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use farshore_extent::{CaptureOrder, Lsn, Problem, ViewId, VolumeId, VolumeName, WallTime};
use farshore_protocol::failover::JobId;
use farshore_protocol::message::VolumeReport;
use tokio::sync::{mpsc, watch};

use crate::catalogue::{PointSummary, Scrub, VolumeRow};
use crate::failover::pair::Pair;
use crate::session::SessionId;
use crate::worker::Work;

/// What is known about a replica now.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// Name, host, size and settings, as in the catalogue.
    pub(crate) row: VolumeRow,
    /// The session that sends it.
    pub(crate) session: Option<SessionId>,
    /// What the source said last, and when.
    pub(crate) report: Option<(VolumeReport, Instant)>,
    /// How far the source's clock is ahead of ours, in nanoseconds, at its last report.
    pub(crate) source_ahead: i64,
    /// Last durable place.
    pub(crate) durable: Lsn,
    /// Oldest place that can be opened.
    pub(crate) floor: Lsn,
    /// Places before this one have expired; the floor follows as fast as disk and views allow.
    pub(crate) expired: Lsn,
    /// Whether the journal's end is in an ordered stretch.
    pub(crate) order: CaptureOrder,
    /// Bytes of journal on disk.
    pub(crate) journal_bytes: u64,
    /// Bytes of it that have expired and that views keep.
    pub(crate) held_bytes: u64,
    /// Points kept.
    pub(crate) points: PointSummary,
    /// Digests of the session that has it open.
    pub(crate) compared: Comparison,
    /// Bytes that verification found to be wrong and that nothing has put right since.
    pub(crate) wrong_bytes: u64,
    /// Bytes of the newest state that rotted in the base and were not sent again since.
    pub(crate) rotten_bytes: u64,
    /// What was read to be verified.
    pub(crate) scrub: Scrubs,
    /// Views open.
    pub(crate) views: u32,
    /// Its failover, also one that was cancelled; none: it was never failed over.
    pub(crate) pair: Option<Pair>,
    /// The job under way.
    pub(crate) job: Option<JobId>,
    /// What the source said last, also when it is not connected any more.
    pub(crate) heard: Option<Heard>,
    /// Why it does not work; none when it does.
    pub(crate) problem: Option<Problem>,
}

/// The last word of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heard {
    /// When, on the clock of this host.
    pub(crate) at: WallTime,
    /// Bytes that it had and that were not durable here.
    pub(crate) unsent_bytes: u64,
}

/// What was compared with digests of the source since it opened the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Comparison {
    /// Digests looked at.
    pub(crate) digests: u64,
    /// How many of them differ.
    pub(crate) differing: u64,
}

/// What is read to be verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Scrubs {
    /// The last whole one.
    pub(crate) last: Option<Scrub>,
    /// Bytes verified by the one under way.
    pub(crate) bytes: Option<u64>,
    /// Bytes of the base that have no checksums yet.
    pub(crate) unsummed: u64,
}

/// A replica.
pub(crate) struct Replica {
    pub(crate) volume: VolumeId,
    queue: mpsc::Sender<Work>,
    facts: Mutex<Facts>,
    /// Places that open views need, whether they are served or not.
    held: Mutex<BTreeMap<ViewId, Lsn>>,
    /// Markers up to here are points in the catalogue, or never will be.
    points_upto: watch::Sender<Lsn>,
    /// The worker has opened the store once, or failed to: the facts are true from then on.
    started: Mutex<bool>,
    starting: Condvar,
}

impl Replica {
    pub(crate) fn new(row: VolumeRow, queue: mpsc::Sender<Work>) -> Arc<Self> {
        Arc::new(Self {
            volume: row.volume,
            queue,
            points_upto: watch::Sender::new(Lsn::ZERO),
            held: Mutex::default(),
            started: Mutex::new(false),
            starting: Condvar::new(),
            facts: Mutex::new(Facts {
                row,
                session: None,
                report: None,
                source_ahead: 0,
                durable: Lsn::ZERO,
                floor: Lsn::ZERO,
                expired: Lsn::ZERO,
                order: CaptureOrder::CatchUp,
                journal_bytes: 0,
                held_bytes: 0,
                points: PointSummary::default(),
                compared: Comparison::default(),
                wrong_bytes: 0,
                rotten_bytes: 0,
                scrub: Scrubs::default(),
                views: 0,
                pair: None,
                job: None,
                heard: None,
                problem: None,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The facts are true from now on.
    pub(crate) fn has_started(&self) {
        *self.started.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.starting.notify_all();
    }

    /// Waits until the facts are true, at most `limit`: opening a store takes as long as reading
    /// its last segment.
    pub(crate) fn wait_until_started(&self, limit: Duration) {
        let started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.starting.wait_timeout_while(started, limit, |started| !*started));
    }

    fn held(&self) -> MutexGuard<'_, BTreeMap<ViewId, Lsn>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the base does not pass `at`, whatever store is opened here, until the view is
    /// released.
    pub(crate) fn hold(&self, view: ViewId, at: Lsn) {
        self.held().insert(view, at);
    }

    /// The view needs nothing of the store any more.
    pub(crate) fn release(&self, view: ViewId) {
        self.held().remove(&view);
    }

    /// The oldest place that a view holds.
    pub(crate) fn oldest_held(&self) -> Option<Lsn> {
        self.held().values().min().copied()
    }

    /// A copy of what is known now.
    pub(crate) fn facts(&self) -> Facts {
        self.lock().clone()
    }

    /// Its name now.
    pub(crate) fn name(&self) -> VolumeName {
        self.lock().row.name.clone()
    }

    /// Publishes something new.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Facts)) {
        change(&mut self.lock());
    }

    /// Gives the worker something to do; waits while its queue is full. `false`: it has ended.
    pub(crate) async fn send(&self, work: Work) -> bool {
        self.queue.send(work).await.is_ok()
    }

    /// Gives the worker something to do unless its queue is full.
    pub(crate) fn offer(&self, work: Work) {
        // Full, or ended: it is offered again.
        let _ = self.queue.try_send(work);
    }

    /// As [`Self::send`], from a thread that may block.
    pub(crate) fn send_blocking(&self, work: Work) -> bool {
        self.queue.blocking_send(work).is_ok()
    }

    /// All markers up to `lsn` were looked at.
    pub(crate) fn points_reach(&self, lsn: Lsn) {
        self.points_upto.send_replace(lsn);
    }

    /// Waits until all markers up to `lsn` are points, are pending, or never will be. Returns up to
    /// where that is so.
    pub(crate) async fn wait_for_points(&self, lsn: Lsn) -> Lsn {
        let mut upto = self.points_upto.subscribe();
        // The sender lives in self, so this ends only with the value.
        upto.wait_for(|reached| *reached >= lsn).await.map_or(lsn, |reached| *reached)
    }
}
