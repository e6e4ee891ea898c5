//! The agent's line to `filterd` for everything but records: one blocking thread that lists
//! volumes about once a second, releases what is durable, cuts markers, and passes on what the
//! target said about digests.
//!
//! Releases are cumulative, so only the newest of each volume waits; after a failure it is tried
//! again with the next listing. Answers about digests keep their order, and wait until `filterd`
//! has heard them or has begun a new epoch.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use farshore_blkfilter::control::{
    Client, CompareAnswer, MarkerPlaced, MarkerRequest, VolumeStatus,
};
use farshore_extent::{Code, Lsn, MarkerId, Problem, VolumeId};

use crate::answers::Answers;
use crate::limits::LIST_INTERVAL;
use crate::problem;

/// The volume is not attached any more.
const NO_SUCH_VOLUME: Code = Code(2035);

/// Markers that wait; more are refused.
const MAX_MARKERS: usize = 256;

/// Why a marker is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The interval of the policy.
    Policy,
    /// The target asked.
    Tag {
        /// Comes back in the answer.
        request: u64,
    },
    /// Applications were to be made quiet for it.
    Quiet,
}

/// What the thread reports.
#[derive(Debug)]
pub enum FromFilterd {
    /// Every attached volume, and the identities of all on record.
    Volumes(Vec<VolumeStatus>, BTreeSet<VolumeId>),
    /// `filterd` does not answer.
    Lost(Problem),
    /// The outcome of a marker.
    Marked(Purpose, Result<MarkerPlaced, Problem>),
    /// The outcome of a pending marker was told, or could not be.
    Resolved(MarkerId, bool, Result<(), Problem>),
}

/// Takes reports.
pub type Sink = Box<dyn Fn(FromFilterd) + Send>;

#[derive(Default)]
struct Work {
    releases: BTreeMap<VolumeId, Lsn>,
    answers: BTreeMap<VolumeId, Answers>,
    markers: VecDeque<(Purpose, MarkerRequest)>,
    fences: BTreeMap<VolumeId, Option<Problem>>,
    /// Told in order, each once, before new markers are cut.
    resolves: VecDeque<(MarkerId, bool)>,
    /// List the volumes at once.
    look: bool,
    exit: bool,
}

impl Work {
    fn is_idle(&self) -> bool {
        !self.exit
            && self.fences.is_empty()
            && !self.look
            && self.markers.is_empty()
            && self.resolves.is_empty()
            && self.releases.is_empty()
            && self.answers.is_empty()
    }
}

#[derive(Default)]
struct Shared {
    work: Mutex<Work>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The handle of the thread. Dropping it ends the thread when its present call is answered.
pub struct Line {
    shared: Arc<Shared>,
}

impl Line {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn spawn(socket: PathBuf, sink: Sink) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let worker = Worker {
            socket,
            sink,
            shared: shared.clone(),
            client: None,
            failed: BTreeMap::new(),
            fences: BTreeMap::new(),
            answers: BTreeMap::new(),
        };
        std::thread::Builder::new().name("filterd-line".to_owned()).spawn(|| worker.run())?;
        Ok(Self { shared })
    }

    /// Everything up to `upto` is durable at the target.
    pub fn release(&self, volume: VolumeId, upto: Lsn) {
        let mut work = self.shared.lock();
        let entry = work.releases.entry(volume).or_default();
        *entry = upto.max(*entry);
        drop(work);
        self.shared.changed.notify_all();
    }

    /// The target has refused the volume for good, or has taken it back: said again until `filterd`
    /// has kept it.
    pub fn fence(&self, volume: VolumeId, fence: Option<Problem>) {
        self.shared.lock().fences.insert(volume, fence);
        self.shared.changed.notify_all();
    }

    /// Lists the volumes at once.
    pub fn look(&self) {
        self.shared.lock().look = true;
        self.shared.changed.notify_all();
    }

    /// What the target said about digests up to `upto`.
    pub fn compared(&self, volume: VolumeId, upto: Lsn, answer: CompareAnswer) {
        self.shared.lock().answers.entry(volume).or_default().push(upto, answer);
        self.shared.changed.notify_all();
    }

    /// Cuts a marker; answered by [`FromFilterd::Marked`]. False when too many wait.
    #[must_use]
    pub fn mark(&self, purpose: Purpose, request: MarkerRequest) -> bool {
        let mut work = self.shared.lock();
        if work.markers.len() >= MAX_MARKERS {
            return false;
        }
        work.markers.push_back((purpose, request));
        drop(work);
        self.shared.changed.notify_all();
        true
    }

    /// Commits or aborts a pending marker; answered by [`FromFilterd::Resolved`].
    pub fn resolve(&self, marker: MarkerId, commit: bool) {
        self.shared.lock().resolves.push_back((marker, commit));
        self.shared.changed.notify_all();
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.shared.lock().exit = true;
        self.shared.changed.notify_all();
    }
}

struct Worker {
    socket: PathBuf,
    sink: Sink,
    shared: Arc<Shared>,
    client: Option<Client>,
    /// Releases that did not arrive: said again after the next listing.
    failed: BTreeMap<VolumeId, Lsn>,
    /// Fences that were not kept yet.
    fences: BTreeMap<VolumeId, Option<Problem>>,
    /// Answers that were not heard yet.
    answers: BTreeMap<VolumeId, Answers>,
}

impl Worker {
    fn run(mut self) {
        let mut next_list = Instant::now();
        loop {
            let Work { releases, answers, markers, fences, resolves, look, exit } =
                self.wait(next_list);
            self.fence(fences);
            for (marker, commit) in resolves {
                let result = self.call(|c| c.resolve_marker(marker, commit));
                (self.sink)(FromFilterd::Resolved(marker, commit, result));
            }
            for (purpose, request) in markers {
                let result = self.call(|c| c.marker(request));
                (self.sink)(FromFilterd::Marked(purpose, result));
            }
            if !answers.is_empty() {
                for (volume, newer) in answers {
                    self.answers.entry(volume).or_default().append(newer);
                }
                self.answer();
            }
            self.release(releases);
            if exit {
                return;
            }
            if look || next_list <= Instant::now() {
                next_list = Instant::now() + LIST_INTERVAL;
                let listed = self.call(|c| Ok((c.list()?, c.recorded()?)));
                let report = match listed {
                    Ok((volumes, recorded)) => {
                        let attached = volumes.iter().map(|v| v.info.volume);
                        let recorded = recorded.into_iter().chain(attached).collect();
                        self.forget_old_answers(&volumes);
                        self.answer();
                        let again = std::mem::take(&mut self.failed);
                        self.release(again);
                        self.fence(BTreeMap::new());
                        FromFilterd::Volumes(volumes, recorded)
                    }
                    Err(problem) => FromFilterd::Lost(problem),
                };
                (self.sink)(report);
            }
        }
    }

    /// Takes the work that there is; `exit` stays.
    fn wait(&self, until: Instant) -> Work {
        let limit = until.saturating_duration_since(Instant::now());
        let idle = |w: &mut Work| w.is_idle();
        let guard = self.shared.changed.wait_timeout_while(self.shared.lock(), limit, idle);
        let (mut work, _) = guard.unwrap_or_else(PoisonError::into_inner);
        let exit = work.exit;
        std::mem::replace(&mut work, Work { exit, ..Work::default() })
    }

    /// Says what waits; what was not heard waits on.
    fn answer(&mut self) {
        let mut all = std::mem::take(&mut self.answers);
        for (volume, answers) in &mut all {
            while let Some((upto, answer)) = answers.front() {
                match self.call(|c| c.compared(*volume, *upto, answer.clone())) {
                    Ok(()) => {}
                    Err(problem) if is_refusal(&problem) => {
                        tracing::warn!(%volume, %upto, %problem, "filterd does not want an answer");
                    }
                    Err(problem) => {
                        tracing::debug!(%volume, %upto, %problem, "an answer did not arrive");
                        break;
                    }
                }
                answers.pop();
            }
        }
        all.retain(|_, answers| !answers.is_empty());
        self.answers = all;
    }

    fn forget_old_answers(&mut self, volumes: &[VolumeStatus]) {
        self.answers.retain(|volume, answers| {
            let status = volumes.iter().find(|v| v.info.volume == *volume);
            status.is_some_and(|status| {
                answers.forget_before(status.info.epoch);
                !answers.is_empty()
            })
        });
    }

    /// Says the newest of each volume; what was not heard is said again.
    fn fence(&mut self, newer: BTreeMap<VolumeId, Option<Problem>>) {
        self.fences.extend(newer);
        for (volume, fence) in std::mem::take(&mut self.fences) {
            match self.call(|c| c.fence(volume, fence.clone())) {
                Ok(()) => {}
                Err(problem) if problem.code == NO_SUCH_VOLUME => {}
                Err(problem) => {
                    tracing::error!(%volume, %problem, "filterd has not kept a fence");
                    self.fences.insert(volume, fence);
                }
            }
        }
    }

    fn release(&mut self, releases: BTreeMap<VolumeId, Lsn>) {
        for (volume, upto) in releases {
            if let Err(problem) = self.call(|c| c.release(volume, upto)) {
                tracing::debug!(%volume, %upto, %problem, "a release did not arrive");
                if !is_refusal(&problem) {
                    let entry = self.failed.entry(volume).or_default();
                    *entry = upto.max(*entry);
                }
            }
        }
    }

    fn call<T>(
        &mut self,
        call: impl FnOnce(&mut Client) -> Result<T, Problem>,
    ) -> Result<T, Problem> {
        let client = match &mut self.client {
            Some(client) => client,
            none => none.insert(Client::connect(&self.socket)?),
        };
        call(client)
    }
}

/// Whether `filterd` answered and refused; otherwise it could not be asked.
pub(crate) const fn is_refusal(problem: &Problem) -> bool {
    !matches!(problem.code.0, 4901 | 5900..=5999)
}

/// The problem of a tag that could not be placed.
#[must_use]
pub fn busy() -> Problem {
    problem::not_ordered("the host has too many markers waiting, and")
}
