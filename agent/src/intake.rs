//! One blocking thread for each volume: fetches records from `filterd`, builds batches, and hands
//! them over one for each pull; while the pool is too full it spools them.
//!
//! The thread holds what [`Supply`] holds and one batch being built; everything else stays in the
//! pool. A lost or restarted `filterd` is waited for: the pool is mapped again, the feed goes on
//! where it was (records of a new epoch follow those of the old).

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use farshore_blkfilter::control::{Client, Descriptor, FetchWish, ReadOnlyPool};
use farshore_changelog::EncodedBatch;
use farshore_extent::{Epoch, Lsn, Problem, VolumeId, VolumeName};

use crate::batch::{FeedError, FeedOptions, PayloadSource};
use crate::keeper::{Keeper, SpoolState};
use crate::limits::{FETCH_BYTES, FETCH_IDLE, FETCH_WAIT, POOL_LOOK, POOL_LOOK_IDLE};
use crate::line::is_refusal;
use crate::session::{FeedFailure, Resume, VolumeMemory};
use crate::spool::FolderDisk;
use crate::supply::Supply;

/// How long to wait before `filterd` is asked again after it failed.
const RETRY: Duration = Duration::from_millis(200);

/// Refusals in a row after which the place is given up and everything is copied again. One can come
/// from a volume that is just being opened.
const MAX_REFUSALS: u32 = 5;

impl PayloadSource for ReadOnlyPool {
    fn payload(&self, offset: u64, len: u64) -> Option<&[u8]> {
        self.bytes(offset, len)
    }
}

/// What a thread reports.
#[derive(Debug)]
pub enum Report {
    /// The answer to one pull.
    Batch(Arc<EncodedBatch>),
    /// The feed cannot go on.
    Failed(FeedFailure),
    /// The spool has changed.
    Spool(SpoolState),
}

/// Takes reports: volume, number of the feed, what.
pub type Sink = Box<dyn Fn(VolumeId, u64, Report) + Send>;

/// A feed the session wants.
#[derive(Debug, Clone)]
struct Order {
    feed: u64,
    resume: Resume,
    recopy: Option<String>,
}

#[derive(Debug, Default)]
struct Wanted {
    order: Option<Order>,
    pulls: u32,
    durable: Lsn,
    /// Durable at the target.
    trim: Lsn,
    /// Durable on this host, too.
    remembered: Option<VolumeMemory>,
    exit: bool,
}

#[derive(Debug, Default)]
struct Cell {
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

impl Cell {
    fn lock(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Wanted)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits until a batch or an end is wanted, or until the time has passed.
    fn wait(&self, limit: Duration) {
        let idle = |w: &mut Wanted| !w.exit && (w.order.is_none() || w.pulls == 0);
        let _ = self.changed.wait_timeout_while(self.lock(), limit, idle);
    }

    /// Whether `feed` is still the one that is wanted.
    fn wants(&self, feed: Option<u64>) -> bool {
        let wanted = self.lock();
        !wanted.exit && wanted.order.as_ref().map(|o| o.feed) == feed
    }

    /// Waits a little, less when something else is wanted.
    fn pause(&self, feed: Option<u64>) {
        let same = |w: &mut Wanted| !w.exit && w.order.as_ref().map(|o| o.feed) == feed;
        let _ = self.changed.wait_timeout_while(self.lock(), RETRY, same);
    }
}

/// The handle of a volume's thread. Dropping it ends the thread within [`FETCH_IDLE`].
#[derive(Debug)]
pub struct Intake {
    cell: Arc<Cell>,
}

impl Intake {
    /// Starts the thread of a volume. `memory` is what an earlier run of the agent kept.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn spawn(
        socket: PathBuf,
        (volume, name): (VolumeId, VolumeName),
        options: FeedOptions,
        keeper: Keeper,
        memory: VolumeMemory,
        sink: Sink,
    ) -> std::io::Result<Self> {
        let cell = Arc::new(Cell::default());
        let worker = Worker {
            cell: cell.clone(),
            source: Source { socket, volume, name, client: None, pool: None },
            supply: Supply::new(volume, options, None, crate::spool::SpoolFaults::default()),
            keeper,
            sink,
            running: Running::default(),
            next_look: Instant::now(),
            retry_at: Instant::now(),
        };
        std::thread::Builder::new().name("intake".to_owned()).spawn(move || worker.run(memory))?;
        Ok(Self { cell })
    }

    /// Begins a feed; the one before ends.
    pub fn start(&self, feed: u64, resume: Resume, recopy: Option<String>) {
        self.cell.change(|w| {
            w.order = Some(Order { feed, resume, recopy });
            w.pulls = 0;
        });
    }

    /// Ends the feed.
    pub fn stop(&self) {
        self.cell.change(|w| {
            w.order = None;
            w.pulls = 0;
        });
    }

    /// One more batch of this feed.
    pub fn pull(&self, feed: u64, durable: Lsn) {
        self.cell.change(|w| {
            if w.order.as_ref().is_some_and(|o| o.feed == feed) {
                w.pulls += 1;
                w.durable = durable;
            }
        });
    }

    /// Tells the thread to end.
    #[must_use]
    pub fn end(self) -> Ending {
        Ending(Arc::downgrade(&self.cell))
    }

    /// Everything up to `upto` is durable at the target.
    pub fn trim(&self, upto: Lsn) {
        // Not worth a wake-up: looked at with the next thing the thread does.
        let mut wanted = self.cell.lock();
        wanted.trim = wanted.trim.max(upto);
    }

    /// This was made durable: what the spool holds before it is not needed any more.
    pub fn remembered(&self, memory: VolumeMemory) {
        self.cell.lock().remembered = Some(memory);
    }
}

impl Drop for Intake {
    fn drop(&mut self) {
        self.cell.change(|w| w.exit = true);
    }
}

/// A thread that was told to end.
#[derive(Debug)]
pub struct Ending(Weak<Cell>);

impl Ending {
    /// Whether it has.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.strong_count() == 0
    }
}

/// `filterd` as one volume sees it.
struct Source {
    socket: PathBuf,
    volume: VolumeId,
    name: VolumeName,
    client: Option<Client>,
    pool: Option<(Epoch, ReadOnlyPool)>,
}

impl Source {
    fn client(&mut self) -> Result<&mut Client, Problem> {
        match &mut self.client {
            Some(client) => Ok(client),
            none => Ok(none.insert(Client::connect(&self.socket)?)),
        }
    }

    /// After any failure nothing is believed: connection and pool are made anew.
    fn forget(&mut self) {
        self.client = None;
        self.pool = None;
    }

    /// Records after `after` and the pool they lie in.
    fn fetch(
        &mut self,
        after: Lsn,
        (wait, idle): (Duration, Duration),
    ) -> Result<(Epoch, Vec<Descriptor>, bool), Problem> {
        let volume = self.volume;
        let wish = FetchWish { want_bytes: FETCH_BYTES, wait, idle };
        let fetched = self.client()?.fetch(volume, after, wish)?;
        if self.pool.as_ref().is_none_or(|(epoch, _)| *epoch != fetched.epoch) {
            let pool = self.client()?.open_pool(volume)?;
            self.pool = Some((fetched.epoch, pool));
        }
        Ok((fetched.epoch, fetched.records, fetched.more))
    }
}

/// The feed under way; without a number it was begun before the session asked for one.
#[derive(Default)]
struct Running {
    number: Option<u64>,
    recopy: Option<String>,
    pending: VecDeque<Descriptor>,
    epoch: Epoch,
    more: bool,
    refusals: u32,
}

struct Worker {
    cell: Arc<Cell>,
    source: Source,
    supply: Supply<FolderDisk>,
    keeper: Keeper,
    sink: Sink,
    running: Running,
    next_look: Instant,
    /// `filterd` failed: with something to hand out it is left alone until then.
    retry_at: Instant,
}

impl Worker {
    fn run(mut self, memory: VolumeMemory) {
        self.keeper.open(&mut self.supply);
        self.supply.begin(memory);
        loop {
            let (order, pulls, trim, remembered) = {
                let mut wanted = self.cell.lock();
                if wanted.exit {
                    break;
                }
                (wanted.order.clone(), wanted.pulls, wanted.trim, wanted.remembered.take())
            };
            self.supply.trim(trim);
            if let Some(memory) = remembered {
                self.supply.remembered(memory);
            }
            let turn = self.obey(order.as_ref()).and_then(|()| self.turn(order.is_some(), pulls));
            match turn {
                Ok(true) => {}
                Ok(false) => self.cell.wait(POOL_LOOK),
                Err(error) => self.failed(&error),
            }
            if let Some(state) = self.keeper.news(&self.supply) {
                self.report(Report::Spool(state));
            }
        }
        self.keep();
    }

    fn report(&self, report: Report) {
        (self.sink)(self.source.volume, self.running.number.unwrap_or(0), report);
    }

    /// Begins the feed that the session wants, unless it is under way.
    fn obey(&mut self, order: Option<&Order>) -> Result<(), FeedError> {
        let Some(order) = order else {
            if self.running.number.is_some() {
                self.supply.drop_feed();
                self.running = Running::default();
            }
            return Ok(());
        };
        if self.running.number == Some(order.feed) {
            return Ok(());
        }
        let found = self.supply.start(order.resume, order.recopy.is_some());
        if !matches!(found, Ok(true)) {
            self.running = Running { recopy: order.recopy.clone(), ..Running::default() };
        }
        self.running.number = Some(order.feed);
        self.running.refusals = 0;
        found.map_err(|e| FeedError::Spool { why: e.to_string() })?;
        Ok(())
    }

    /// Hands out, looks at the pool, builds and syncs, each when it is due. False when there was
    /// nothing to do.
    fn turn(&mut self, ordered: bool, pulls: u32) -> Result<bool, FeedError> {
        let wanted = ordered && pulls > 0;
        let mut handed = false;
        if wanted {
            let next = self.supply.take().map_err(|e| FeedError::Spool { why: e.to_string() })?;
            if let Some(batch) = next {
                self.cell.change(|w| w.pulls = w.pulls.saturating_sub(1));
                self.keeper.handed_out();
                self.report(Report::Batch(batch));
                handed = true;
            }
        }
        self.look(wanted);
        let hungry = wanted && !handed;
        let silent = handed && Instant::now() < self.retry_at;
        if (hungry || self.supply.is_spooling()) && !silent {
            // With something to hand out this is only a look at what is there.
            let limit = if handed { Duration::ZERO } else { self.keeper.patience() };
            if let Some(batch) = self.build(limit)? {
                let pushed = self.supply.push(batch);
                self.keeper.outcome(pushed);
            }
        }
        if self.keeper.sync_is_due(&self.supply) {
            self.keep();
        }
        let merging = self.keeper.merge(&mut self.supply);
        Ok(handed || hungry || merging || self.supply.is_spooling())
    }

    /// Makes what was spooled durable, then lets `filterd` forget it: in this order.
    fn keep(&mut self) {
        let synced = self.supply.sync();
        let ok = synced.is_ok();
        self.keeper.outcome(synced);
        if let (true, Some(upto)) = (ok, self.supply.kept()) {
            let volume = self.source.volume;
            // A release that does not arrive is said again with the next sync.
            if self.source.client().and_then(|c| c.spooled(volume, upto)).is_err() {
                self.source.client = None;
            }
        }
    }

    /// Looks how full the pool is and decides whether to spool.
    fn look(&mut self, wanted: bool) {
        let now = Instant::now();
        if now < self.next_look || !self.keeper.is_on() {
            return;
        }
        self.next_look = now + if wanted { POOL_LOOK_IDLE } else { POOL_LOOK };
        let Ok(volumes) = self.source.client().and_then(Client::list) else {
            self.source.client = None;
            return;
        };
        let decided = self.keeper.decide(&mut self.supply, self.source.volume, &volumes);
        self.keeper.outcome(decided);
    }

    /// The next batch of the feed; none when another feed is wanted, or nothing came in time.
    fn build(&mut self, limit: Duration) -> Result<Option<EncodedBatch>, FeedError> {
        let Self { cell, source, supply, running, .. } = self;
        loop {
            let Some(feed) = supply.feed() else { return Ok(None) };
            let durable = cell.lock().durable;
            if let Some((_, pool)) = &source.pool {
                while let Some(record) = running.pending.pop_front() {
                    if let Some(batch) = feed.add(running.epoch, &record, pool, durable)? {
                        return Ok(Some(batch));
                    }
                }
            }
            if !running.more && !feed.is_empty() {
                return Ok(feed.finish(durable));
            }
            if !cell.wants(running.number) {
                return Ok(None);
            }
            match fill(source, running, feed.place(), limit) {
                Ok(()) if running.pending.is_empty() && feed.is_empty() => return Ok(None),
                Ok(()) => {}
                Err(problem) => {
                    if is_refusal(&problem) {
                        running.refusals += 1;
                        if running.refusals >= MAX_REFUSALS {
                            return Err(FeedError::Refused { problem });
                        }
                    }
                    tracing::debug!(volume = %source.name, %problem, "filterd did not answer");
                    source.forget();
                    running.pending.clear();
                    running.more = false;
                    self.retry_at = Instant::now() + RETRY;
                    cell.pause(running.number);
                    return Ok(None);
                }
            }
        }
    }

    fn failed(&mut self, error: &FeedError) {
        let number = self.running.number;
        self.supply.drop_feed();
        self.running = Running::default();
        let Some(number) = number else {
            tracing::info!(volume = %self.source.name, %error, "nothing is spooled before the target was heard");
            return;
        };
        self.cell.change(|w| {
            if w.order.as_ref().is_some_and(|o| o.feed == number) {
                w.order = None;
            }
        });
        let failure = error.failure(self.source.name.as_str());
        (self.sink)(self.source.volume, number, Report::Failed(failure));
    }
}

/// Has everything copied again if that was ordered, then fetches.
fn fill(
    source: &mut Source,
    running: &mut Running,
    after: Lsn,
    limit: Duration,
) -> Result<(), Problem> {
    if let Some(reason) = &running.recopy {
        let volume = source.volume;
        source.client()?.recopy(volume, reason)?;
        running.recopy = None;
    }
    let times = (FETCH_WAIT.min(limit), FETCH_IDLE.min(limit));
    let (epoch, records, more) = source.fetch(after, times)?;
    running.epoch = epoch;
    running.pending.extend(records);
    running.more = more;
    running.refusals = 0;
    Ok(())
}
