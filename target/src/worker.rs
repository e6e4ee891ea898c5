//! One thread a volume: the only owner of its store.
//!
//! Takes what waits in the queue, appends all of it, makes it durable with one commit, and only
//! then acknowledges; while it commits, the next batches gather. Moves the watermark `journaled`.
//! Turns markers that became points into rows of the catalogue. Never talks to a network.

mod compare;
mod damage;
mod fence;
mod points;

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use farshore_changelog::RawBatch;
use farshore_extent::{Generation, Lsn, Problem, VolumeName, VolumeSize, WallTime};
use farshore_protocol::message::{FromTarget, OpenVolume};
use tokio::sync::{mpsc, oneshot};

use crate::catalogue::{NewPoint, SharedCatalogue};
use crate::clock::AgeClock;
use crate::failover::pair::Pair;
use crate::problem;
use crate::replica::Replica;
use crate::session::verdict::FIRST_GENERATION;
use crate::session::{Outbox, SessionId, VerifiedBatch};
use crate::store::{
    AppendError, Behind, Committed, FileDisk, OpenViews, PointReader, RecoveryReport, Store,
    StoreConfig, StoreError, StoreEvent, StoreMeta, limits,
};

/// Something for a worker to do, in the order in which it was sent.
pub(crate) enum Work {
    /// A session wants to send the volume.
    Open { session: SessionId, outbox: Arc<Outbox>, open: OpenVolume },
    /// A batch of the session that has it open.
    Batch { session: SessionId, batch: VerifiedBatch },
    /// A batch was damaged on the way.
    Damaged { session: SessionId, why: String },
    /// The session has ended or closed the volume.
    Detach { session: SessionId },
    /// Open a place for reading.
    View { at: Place, reply: oneshot::Sender<Result<(PointReader, WallTime), Problem>> },
    /// Points before this place have expired.
    Retain { floor: Lsn },
    /// How many bytes of journal lie before this place; none when the store is not open.
    JournalBefore { at: Lsn, reply: oneshot::Sender<Option<u64>> },
    /// Points were dropped: count them again.
    Recount,
    /// Raise the generation durably, at least to this one. Answers what it is then.
    Raise { to: Generation, reply: oneshot::Sender<Result<Generation, Problem>> },
    /// What the journal has behind this place.
    Behind { after: Lsn, reply: oneshot::Sender<Result<Behind, Problem>> },
    /// A second has passed: so many bytes of what is kept may be read, when nothing else waits.
    Scrub { bytes: u64, begin: bool },
    /// End.
    Stop,
}

/// Which place of the history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Exactly this one.
    At(Lsn),
    /// The last one captured at or before this time.
    Time(WallTime),
}

/// On a volume that is never idle, expiry (20-50 ms) and the merging of runs get one step in so many
/// turns.
const BACKGROUND_TURNS: u32 = 16;

/// A running worker.
pub(crate) struct WorkerThread(JoinHandle<()>);

impl WorkerThread {
    /// Waits for its end; send [`Work::Stop`] first.
    pub(crate) fn join(self) {
        if self.0.join().is_err() {
            tracing::error!("a volume's worker has panicked");
        }
    }
}

/// Starts the worker of `replica`, whose store is in `dir` (made when it is not there).
pub(crate) fn spawn(
    dir: PathBuf,
    replica: Arc<Replica>,
    queue: mpsc::Receiver<Work>,
    catalogue: SharedCatalogue,
    clock: Arc<AgeClock>,
) -> Result<WorkerThread, Problem> {
    let name = replica.name();
    let worker = Worker {
        dir,
        replica,
        catalogue,
        clock,
        store: None,
        orphans: Vec::new(),
        sender: None,
        unrecorded: points::Unrecorded::default(),
        expiring: None,
        turns: 0,
        scrubbing: damage::Scrubbing::default(),
    };
    let thread = std::thread::Builder::new().name(format!("volume-{name}"));
    let thread = thread.spawn(move || worker.run(queue));
    thread.map(WorkerThread).map_err(|e| problem::store(&name, &e))
}

/// Segments of a small volume are small, so that its reserve is not larger than itself: a
/// sixteenth of the volume, 8 MiB (a group fits) to 64 MiB.
fn segment_bytes(size: VolumeSize) -> u64 {
    const SMALLEST: u64 = 8 << 20;
    let part = (size.get() / 16).clamp(SMALLEST, limits::SEGMENT_BYTES);
    part.next_power_of_two().min(limits::SEGMENT_BYTES)
}

/// The session that sends the volume.
struct Sender {
    session: SessionId,
    outbox: Arc<Outbox>,
    /// False after a batch that did not fit: what follows it is dropped until the next open.
    accepting: bool,
    /// A duplicate came: acknowledge even when nothing new is durable.
    owes_ack: bool,
}

struct Worker {
    dir: PathBuf,
    replica: Arc<Replica>,
    catalogue: SharedCatalogue,
    clock: Arc<AgeClock>,
    /// None: it failed, and is opened again when the source opens the volume.
    store: Option<Store>,
    /// Views of stores that failed. The store of now does not know what they read.
    orphans: Vec<OpenViews>,
    sender: Option<Sender>,
    unrecorded: points::Unrecorded,
    /// Expiry up to this place goes on whenever there is nothing else to do.
    expiring: Option<Lsn>,
    /// Turns since the last step of expiry.
    turns: u32,
    scrubbing: damage::Scrubbing,
}

impl Worker {
    fn run(mut self, mut queue: mpsc::Receiver<Work>) {
        self.recall_scrub();
        self.open_store();
        self.replica.has_started();
        while let Some(work) = self.next(&mut queue) {
            let mut going = self.take(work);
            // All that has gathered while the last commit was written.
            while going && let Ok(work) = queue.try_recv() {
                going = self.take(work);
            }
            self.commit();
            if !going {
                return;
            }
            self.compare_step();
            self.report_rot();
            self.turns += 1;
            if self.turns >= BACKGROUND_TURNS {
                self.expire_step();
                self.merge_step();
            }
        }
    }

    /// The next thing to do; expiry and the reserve fill the time until there is one.
    fn next(&mut self, queue: &mut mpsc::Receiver<Work>) -> Option<Work> {
        loop {
            match queue.try_recv() {
                Ok(work) => return Some(work),
                Err(mpsc::error::TryRecvError::Disconnected) => return None,
                Err(mpsc::error::TryRecvError::Empty) => {
                    self.report_rot();
                    if !self.idle_step() {
                        return queue.blocking_recv();
                    }
                }
            }
        }
    }

    /// One bounded step of what can wait; whether there is more.
    fn idle_step(&mut self) -> bool {
        if self.compare_step() {
            return true;
        }
        if self.expiring.is_some() {
            self.expire_step();
            return true;
        }
        if self.merge_step() {
            return true;
        }
        match self.store.as_mut().map(Store::prepare_reserve) {
            None | Some(Ok(false)) => self.scrub_step(),
            Some(Ok(true)) => true,
            Some(Err(error)) => {
                self.store_failed(&error);
                false
            }
        }
    }

    /// False: end.
    fn take(&mut self, work: Work) -> bool {
        match work {
            Work::Open { session, outbox, open } => self.open(session, outbox, &open),
            Work::Batch { session, batch } => {
                if self.accepts(session) {
                    self.batch(&batch);
                }
            }
            Work::Damaged { session, why } => {
                if self.accepts(session) {
                    self.reopen(&why);
                }
            }
            Work::Detach { session } => self.detach(session),
            Work::View { at, reply } => {
                self.commit();
                let view = self.view(at);
                // Who asked may have gone.
                let _ = reply.send(view);
            }
            Work::Retain { floor } => self.expiring = self.expiring.max(Some(floor)),
            Work::JournalBefore { at, reply } => {
                let bytes = self.store.as_ref().map(|store| store.journal_bytes_before(at));
                // Who asked may have gone.
                let _ = reply.send(bytes);
            }
            Work::Recount => self.recount(),
            // Who asked may have gone.
            Work::Raise { to, reply } => drop(reply.send(self.raise(to))),
            Work::Behind { after, reply } => drop(reply.send(self.behind(after))),
            Work::Scrub { bytes, begin } => self.may_scrub(bytes, begin),
            Work::Stop => return false,
        }
        true
    }

    fn name(&self) -> VolumeName {
        self.replica.name()
    }

    fn accepts(&self, session: SessionId) -> bool {
        self.sender.as_ref().is_some_and(|s| s.session == session && s.accepting)
    }

    fn detach(&mut self, session: SessionId) {
        if self.sender.as_ref().is_some_and(|s| s.session == session) {
            self.commit();
            self.forget_questions();
            self.sender = None;
            self.replica.update(|facts| {
                facts.session = None;
                facts.report = None;
            });
        }
    }

    fn batch(&mut self, batch: &VerifiedBatch) {
        // Verified by the session; this only finds the tables again.
        let Ok(checked) = RawBatch::parse(batch.bytes()).and_then(RawBatch::check_without_chain)
        else {
            return self.reopen("a batch changed in memory");
        };
        let Some(store) = &mut self.store else { return };
        let mut taken = store.append(checked);
        if matches!(taken, Err(AppendError::GroupFull)) {
            self.commit();
            let Some(store) = &mut self.store else { return };
            taken = store.append(checked);
        }
        match taken {
            Ok(()) => {}
            Err(AppendError::Duplicate { .. }) => {
                if let Some(sender) = &mut self.sender {
                    sender.owes_ack = true;
                }
            }
            Err(
                error @ (AppendError::Gap { .. }
                | AppendError::Diverged { .. }
                | AppendError::EpochBack { .. }),
            ) => self.reopen(&error.to_string()),
            Err(AppendError::Fenced { batch, own }) => {
                self.refuse(problem::fenced(&self.name(), own, batch), false);
            }
            Err(AppendError::Ahead { batch, own }) => {
                self.refuse(problem::unknown_generation(&self.name(), own, batch), false);
            }
            Err(
                error @ (AppendError::WrongVolume(_)
                | AppendError::Outside { .. }
                | AppendError::Sealed),
            ) => self.refuse(problem::violation(error), false),
            Err(error @ AppendError::GroupFull) => self.fail(problem::store(&self.name(), &error)),
            Err(error @ AppendError::Poisoned { .. }) => {
                self.give_up_store();
                self.fail(problem::store(&self.name(), &error));
            }
        }
    }

    /// The source is to say again where it is. What it has sent meanwhile is dropped.
    fn reopen(&mut self, why: &str) {
        self.commit();
        let volume = self.replica.volume;
        if let Some(sender) = &mut self.sender {
            tracing::info!(volume = %self.replica.name(), why, "the source must reopen the volume");
            sender.accepting = false;
            sender.outbox.send(FromTarget::Reopen { volume, reason: why.to_owned() });
        }
    }

    fn refuse(&mut self, problem: Problem, retry: bool) {
        self.catalogue.note(problem.code.0, Some(&self.name()), problem.what.clone());
        if let Some(sender) = &mut self.sender {
            sender.accepting = false;
            let volume = Some(self.replica.volume);
            sender.outbox.send(FromTarget::Refused { volume, problem, retry });
        }
    }

    /// The store does not work: nothing is acknowledged until it has been read again.
    fn fail(&mut self, problem: Problem) {
        tracing::error!(volume = %self.name(), why = problem.why, "{problem}");
        self.replica.update(|facts| facts.problem = Some(problem.clone()));
        if self.sender.as_ref().is_some_and(|s| s.accepting) {
            self.refuse(problem, true);
        }
    }

    fn commit(&mut self) {
        let Some(store) = &mut self.store else { return };
        let idle = store.uncommitted_bytes() == 0;
        if idle && !self.sender.as_ref().is_some_and(|s| s.owes_ack) {
            return;
        }
        match store.commit() {
            Ok(committed) => self.publish(committed),
            Err(error) => self.store_failed(&error),
        }
    }

    fn store_failed(&mut self, error: &StoreError) {
        let problem = error.problem(self.name().as_str());
        let poisoned = self.store.as_ref().is_some_and(|store| store.poisoned().is_some());
        if poisoned || !matches!(error, StoreError::DiskFull { .. }) {
            self.give_up_store();
        }
        self.fail(problem);
    }

    /// It is opened again, from the medium, when the source opens the volume.
    fn give_up_store(&mut self) {
        self.orphans.extend(self.store.take().map(|store| store.open_views()));
        self.expiring = None;
    }

    /// Acknowledges what is durable; points follow.
    fn publish(&mut self, committed: Committed) {
        // First, so that whoever saw the acknowledgement sees the position.
        self.publish_position();
        if let Some(sender) = &mut self.sender {
            sender.owes_ack = false;
            sender.outbox.ack(self.replica.volume, committed.durable, committed.chain);
        }
        let mut points = Vec::new();
        for event in committed.events {
            self.event(event, &mut points);
        }
        self.record(points, committed.durable);
    }

    fn publish_position(&self) {
        let Some(store) = &self.store else { return };
        let at = store.position();
        self.replica.update(|facts| {
            facts.durable = at.durable;
            facts.floor = at.floor;
            facts.order = at.order;
            facts.journal_bytes = store.journal_bytes();
            facts.wrong_bytes = store.wrong().bytes();
            facts.rotten_bytes = store.rotten().bytes();
            facts.scrub.bytes = store.scrubbing();
            facts.scrub.unsummed = at.size.get().saturating_sub(store.summed());
        });
    }

    fn event(&self, event: StoreEvent, points: &mut Vec<NewPoint>) {
        let name = self.name();
        let note = |code, text: String| self.catalogue.note(code, Some(&name), text);
        match event {
            StoreEvent::Point(point) => points.push(NewPoint {
                lsn: point.lsn,
                time: point.time,
                kind: point.kind,
                name: point.name,
                marker: point.marker,
            }),
            StoreEvent::MarkerDropped { marker, lsn } => {
                tracing::debug!(volume = %name, %marker, %lsn, "a marker is no point");
            }
            StoreEvent::OrderLost { lsn, .. } => {
                note(3002, format!("order was lost at {lsn}: no points until it is restored"));
            }
            StoreEvent::OrderRestored { lsn, .. } => {
                note(0, format!("order was restored at {lsn}: points are cut again"));
            }
            StoreEvent::Resized { lsn, size } => {
                self.replica.update(|facts| facts.row.size = size);
                note(0, format!("the volume has {} bytes from {lsn} on", size.get()));
            }
            StoreEvent::EpochStarted { lsn, continues: false } => {
                note(0, format!("a new run of the source's filter begins at {lsn}"));
            }
            StoreEvent::EpochStarted { lsn, continues: true } => {
                tracing::debug!(volume = %name, %lsn, "a new run goes on without a gap");
            }
        }
    }

    fn view(&mut self, at: Place) -> Result<(PointReader, WallTime), Problem> {
        let name = self.name();
        let Some(store) = &mut self.store else {
            return Err(problem::store(&name, &"it is not open; see farshore status"));
        };
        let lsn = match at {
            Place::At(lsn) => lsn,
            Place::Time(time) => {
                let wanted = || crate::clock::show(time);
                let found = store.resolve_time(time).map_err(|e| e.problem(name.as_str()))?;
                found.ok_or_else(|| problem::no_point(&name, &format!("at {}", wanted())))?
            }
        };
        let reader = store.open_view(lsn).map_err(|e| e.problem(name.as_str()))?;
        let time = store.time_at(lsn).map_err(|e| e.problem(name.as_str()))?;
        Ok((reader, time))
    }

    fn expire_step(&mut self) {
        self.turns = 0;
        self.orphans.retain(OpenViews::any);
        if !self.orphans.is_empty() {
            // Asked for again by the next round of retention.
            self.expiring = None;
            return;
        }
        let (Some(floor), Some(store)) = (self.expiring, &mut self.store) else {
            self.expiring = None;
            return;
        };
        // Also for views that the store does not know of: they are not served yet, or never again.
        let upto = self.replica.oldest_held().map_or(floor, |held| held.min(floor));
        match store.expire(upto) {
            Ok(progress) => {
                if progress.done {
                    self.expiring = None;
                    let held = if upto < floor { store.journal_bytes_before(floor) } else { 0 };
                    self.replica.update(|facts| facts.held_bytes = held);
                }
                self.publish_position();
            }
            Err(error) => self.store_failed(&error),
        }
    }

    /// One bounded step of merging runs; whether there is more.
    fn merge_step(&mut self) -> bool {
        match self.store.as_mut().map(Store::merge_runs) {
            None => false,
            Some(Ok(more)) => more,
            Some(Err(error)) => {
                self.store_failed(&error);
                false
            }
        }
    }

    fn open_store(&mut self) {
        let facts = self.replica.facts();
        let raised = facts.pair.as_ref().map_or(Generation::ZERO, Pair::raised);
        let opened = self.open_or_create(&facts.row).and_then(|(mut store, report)| {
            // A store that was put back from a backup: its generation is known here.
            store.raise_generation_to(raised).map(|()| (store, report))
        });
        match opened {
            Ok((store, report)) => {
                self.report_recovery(&report);
                let apply_pending = report.apply_pending.then(|| store.position().floor);
                let durable = store.position().durable;
                if let Err(error) = self.forget_lost_points(durable) {
                    // Better no replica than one that offers points it does not have.
                    self.fail(error.into());
                    return self.recount();
                }
                self.expiring = self.expiring.max(apply_pending);
                let size = store.position().size;
                self.store = Some(store);
                self.replica.update(|facts| (facts.problem, facts.row.size) = (None, size));
                if let Err(error) = self.replay_points(self.replica.facts().row.points_upto) {
                    self.store = None;
                    self.fail(error.problem(facts.row.name.as_str()));
                    return self.recount();
                }
                self.publish_position();
            }
            Err(error) => self.fail(error.problem(facts.row.name.as_str())),
        }
        self.recount();
    }

    fn open_or_create(
        &self,
        row: &crate::catalogue::VolumeRow,
    ) -> Result<(Store, RecoveryReport), StoreError> {
        let io = |e| StoreError::Io { what: self.dir.display().to_string(), source: e };
        let disk = Arc::new(FileDisk::open(&self.dir).map_err(io)?);
        let config =
            StoreConfig { segment_bytes: segment_bytes(row.size), ..StoreConfig::default() };
        match Store::open(Arc::clone(&disk) as _, config) {
            Err(StoreError::NotAStore) if row.points_upto == Lsn::ZERO => {
                let meta = StoreMeta {
                    volume: row.volume,
                    size: row.size,
                    blocks: row.blocks,
                    generation: FIRST_GENERATION,
                    created: WallTime::now(),
                };
                Store::create(disk, &meta, config)
            }
            other => other,
        }
    }
}
