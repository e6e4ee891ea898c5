//! One blocking thread for each volume: fetches records from `filterd`, builds batches,
//! compresses them, and hands them over one for each pull.
//!
//! The thread holds at most one batch being built; what it was not asked for stays in the pool.
//! A lost or restarted `filterd` is waited for: the pool is mapped again, the feed goes on where it
//! was (records of a new epoch follow those of the old).

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use farshore_blkfilter::control::{Client, Descriptor, FetchWish, ReadOnlyPool};
use farshore_changelog::EncodedBatch;
use farshore_extent::{Epoch, Lsn, Problem, VolumeId, VolumeName};

use crate::batch::{Feed, FeedError, FeedOptions, PayloadSource};
use crate::limits::{FETCH_BYTES, FETCH_IDLE, FETCH_WAIT};
use crate::line::is_refusal;
use crate::session::{FeedFailure, Resume};

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

    /// Waits until a batch is wanted; none: the thread must end.
    fn wait(&self) -> Option<Order> {
        let idle = |w: &mut Wanted| !w.exit && (w.order.is_none() || w.pulls == 0);
        let wanted = self.changed.wait_while(self.lock(), idle);
        let wanted = wanted.unwrap_or_else(PoisonError::into_inner);
        if wanted.exit { None } else { wanted.order.clone() }
    }

    /// Whether `feed` is still the one that is wanted.
    fn wants(&self, feed: u64) -> bool {
        let wanted = self.lock();
        !wanted.exit && wanted.order.as_ref().is_some_and(|o| o.feed == feed)
    }

    /// Waits a little, less when something else is wanted.
    fn pause(&self, feed: u64) {
        let same = |w: &mut Wanted| !w.exit && w.order.as_ref().is_some_and(|o| o.feed == feed);
        let _ = self.changed.wait_timeout_while(self.lock(), RETRY, same);
    }
}

/// The handle of a volume's thread. Dropping it ends the thread within [`FETCH_IDLE`].
#[derive(Debug)]
pub struct Intake {
    cell: Arc<Cell>,
}

impl Intake {
    /// Starts the thread of a volume.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn spawn(
        socket: PathBuf,
        (volume, name): (VolumeId, VolumeName),
        options: FeedOptions,
        sink: Sink,
    ) -> std::io::Result<Self> {
        let cell = Arc::new(Cell::default());
        let worker = Worker {
            cell: cell.clone(),
            source: Source { socket, volume, name, client: None, pool: None },
            options,
            sink,
            feed: None,
        };
        std::thread::Builder::new().name("intake".to_owned()).spawn(|| worker.run())?;
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
}

impl Drop for Intake {
    fn drop(&mut self) {
        self.cell.change(|w| w.exit = true);
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

    fn recopy(&mut self, reason: &str) -> Result<(), Problem> {
        let volume = self.volume;
        self.client()?.recopy(volume, reason)
    }

    /// Records after `after` and the pool they lie in.
    fn fetch(&mut self, after: Lsn) -> Result<(Epoch, Vec<Descriptor>, bool), Problem> {
        let volume = self.volume;
        let wish = FetchWish { want_bytes: FETCH_BYTES, wait: FETCH_WAIT, idle: FETCH_IDLE };
        let fetched = self.client()?.fetch(volume, after, wish)?;
        if self.pool.as_ref().is_none_or(|(epoch, _)| *epoch != fetched.epoch) {
            let pool = self.client()?.open_pool(volume)?;
            self.pool = Some((fetched.epoch, pool));
        }
        Ok((fetched.epoch, fetched.records, fetched.more))
    }
}

/// A feed under way.
struct Running {
    number: u64,
    feed: Feed,
    recopy: Option<String>,
    pending: VecDeque<Descriptor>,
    epoch: Epoch,
    more: bool,
    refusals: u32,
}

struct Worker {
    cell: Arc<Cell>,
    source: Source,
    options: FeedOptions,
    sink: Sink,
    feed: Option<Running>,
}

impl Worker {
    fn run(mut self) {
        let volume = self.source.volume;
        while let Some(order) = self.cell.wait() {
            let number = order.feed;
            if self.feed.as_ref().is_none_or(|f| f.number != number) {
                self.feed = Some(Running {
                    number,
                    feed: Feed::new(volume, order.resume, self.options),
                    recopy: order.recopy,
                    pending: VecDeque::new(),
                    epoch: Epoch::ZERO,
                    more: false,
                    refusals: 0,
                });
            }
            match self.next_batch() {
                Ok(Some(batch)) => {
                    self.cell.change(|w| w.pulls = w.pulls.saturating_sub(1));
                    (self.sink)(volume, number, Report::Batch(Arc::new(batch)));
                }
                Ok(None) => {} // something else is wanted
                Err(error) => {
                    let failure = error.failure(self.source.name.as_str());
                    self.cell.change(|w| {
                        if w.order.as_ref().is_some_and(|o| o.feed == number) {
                            w.order = None;
                        }
                    });
                    self.feed = None;
                    (self.sink)(volume, number, Report::Failed(failure));
                }
            }
        }
    }

    /// The next batch of the feed; none when another feed is wanted.
    fn next_batch(&mut self) -> Result<Option<EncodedBatch>, FeedError> {
        let Some(running) = &mut self.feed else { return Ok(None) };
        loop {
            let durable = self.cell.lock().durable;
            if let Some((_, pool)) = &self.source.pool {
                while let Some(record) = running.pending.pop_front() {
                    if let Some(batch) = running.feed.add(running.epoch, &record, pool, durable)? {
                        return Ok(Some(batch));
                    }
                }
            }
            if !running.more && !running.feed.is_empty() {
                return Ok(running.feed.finish(durable));
            }
            if !self.cell.wants(running.number) {
                return Ok(None);
            }
            if let Err(problem) = fill(&mut self.source, running) {
                if is_refusal(&problem) {
                    running.refusals += 1;
                    if running.refusals >= MAX_REFUSALS {
                        return Err(FeedError::Refused { problem });
                    }
                }
                tracing::debug!(volume = %self.source.name, %problem, "filterd did not answer");
                self.source.forget();
                running.pending.clear();
                running.more = false;
                self.cell.pause(running.number);
            }
        }
    }
}

/// Has everything copied again if that was ordered, then fetches.
fn fill(source: &mut Source, running: &mut Running) -> Result<(), Problem> {
    if let Some(reason) = &running.recopy {
        source.recopy(reason)?;
        running.recopy = None;
    }
    let (epoch, records, more) = source.fetch(running.feed.place())?;
    running.epoch = epoch;
    running.pending.extend(records);
    running.more = more;
    running.refusals = 0;
    Ok(())
}
