//! What is on record gets attached: at once, again until it is there, and again when it ended by
//! itself. Each volume on a thread of its own, so that a disk or a driver that hangs holds up
//! nothing but its own volume.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use farshore_extent::{Code, Problem, VolumeId, VolumeName, WallTime};

use super::attached::{Attached, open};
use super::choice::choose;
use super::problem;
use super::service::{Service, lock};
use super::state::VolumeRecord;
use super::turns::Turn;
use crate::control::ProtectRequest;
use crate::sys::wake::{Event, wait_readable};

/// Volumes that are attached at a time. One that has taken longer than `SLOW` hangs with its disk
/// and does not count: it must not hold up the others.
const AT_ONCE: usize = 8;
const SLOW: Duration = Duration::from_secs(3);

/// Longest wait for somebody else who attaches or takes away the same volume.
const TURN: Duration = Duration::from_secs(10);

/// For how long a start expects that a claim ends soon, and between two looks at it.
const CLAIM_WAIT: Duration = Duration::from_secs(10);
const CLAIM_LOOK: Duration = Duration::from_millis(20);

/// Between two attempts to attach a volume, and between two looks whether there is one to attach.
const AGAIN: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_secs(1);

/// Somebody else holds the exclusive claim on the backing: at a start most often the kernel, which
/// finishes the last I/O of a killed daemon.
const CLAIMED: Code = Code(4016);

/// A volume on record that is not attached.
#[derive(Debug)]
pub(super) struct Missing {
    pub(super) record: VolumeRecord,
    /// When the last attempt ended.
    tried: Option<Instant>,
    /// The reason that was logged last.
    told: Option<Code>,
}

impl Missing {
    pub(super) const fn new(record: VolumeRecord) -> Self {
        Self { record, tried: None, told: None }
    }

    fn is_claimed(&self) -> bool {
        self.told == Some(CLAIMED)
    }
}

impl Service {
    /// The turn with a volume, for a change that somebody asked for.
    ///
    /// # Errors
    /// FS-2041, FS-2049.
    pub(super) fn turn(&self, name: &VolumeName) -> Result<Turn, Problem> {
        let turn = self.turns.take(name, TURN).ok_or_else(|| problem::in_change(name))?;
        self.refuse_while_stopping()?;
        Ok(turn)
    }

    /// An attached volume is one of ours from now on.
    pub(super) fn enter(&self, attached: Arc<Attached>) {
        let id = attached.id();
        let mut volumes = lock(&self.volumes);
        // Under the lock: whoever stops the daemon says so first and then looks here.
        if self.stopping.load(Ordering::Acquire) {
            drop(volumes);
            return attached.stop_serving(self.ground.config.client_grace);
        }
        volumes.insert(attached.info.name.clone(), attached);
        drop(volumes);
        lock(&self.missing).retain(|m| m.record.volume != id);
    }

    fn is_starting(&self) -> bool {
        self.started.elapsed() < CLAIM_WAIT
    }

    /// Begins to attach the volumes on record that are missing and due, those first whose users
    /// wait. What finds no room comes next time.
    pub(super) fn attach_missing(self: &Arc<Self>) {
        for (id, name) in self.due() {
            let full = self.turns.younger_than(SLOW) >= AT_ONCE;
            if full || self.stopping.load(Ordering::Acquire) {
                return;
            }
            let Some(turn) = self.turns.take(&name, Duration::ZERO) else { continue };
            self.in_a_thread(turn, move |service| service.attach_one(id));
        }
    }

    pub(super) fn due(&self) -> Vec<(VolumeId, VolumeName)> {
        let starting = self.is_starting();
        let is_due = |m: &&Missing| {
            let pause = if starting && m.is_claimed() { CLAIM_LOOK } else { AGAIN };
            m.tried.is_none_or(|tried| tried.elapsed() >= pause)
        };
        let missing = lock(&self.missing);
        let name = |m: &Missing| (m.record.volume, m.record.name.clone());
        let mut due: Vec<_> = missing.iter().filter(is_due).map(name).collect();
        drop(missing);
        if !due.is_empty() {
            // Their devices are there, and requests of their users wait in the kernel.
            let left = self.ground.names.announced();
            due.sort_by_key(|(id, _)| !left.iter().any(|device| device.volume == *id));
        }
        due
    }

    /// Attaches one volume on record, unless it is there already. The reason why it cannot be is
    /// logged when it is new.
    fn attach_one(&self, id: VolumeId) {
        let find = |m: &&Missing| m.record.volume == id;
        let record = lock(&self.missing).iter().find(find).map(|m| m.record.clone());
        let Some(record) = record else { return };
        let problem = match self.attach_known(record) {
            Ok(attached) => {
                self.enter(attached);
                None
            }
            Err(problem) => Some(problem),
        };
        let mut missing = lock(&self.missing);
        if let Some(problem) = problem
            && let Some(entry) = missing.iter_mut().find(|m| m.record.volume == id)
        {
            entry.tried = Some(Instant::now());
            if entry.told.replace(problem.code) != Some(problem.code) {
                let (name, why, next) = (&entry.record.name, &problem.why, &problem.next);
                if problem.code == CLAIMED {
                    tracing::info!(volume = %name, %problem, "waiting for the claim");
                } else {
                    tracing::error!(volume = %name, %problem, why, next, "not attached");
                }
            }
        }
        self.attempted.notify_all();
    }

    /// While the daemon was away the backing may have been mounted or taken by others.
    fn attach_known(&self, record: VolumeRecord) -> Result<Arc<Attached>, Problem> {
        let request = ProtectRequest {
            name: record.name.clone(),
            backing: record.backing.clone(),
            attach: Some(record.front.kind()),
            nbd_socket: record.front.socket(),
            pool_bytes: Some(record.pool_bytes),
            point_interval_ms: record.point_interval_ms,
            seeded: record.seeded,
            copy_at: None,
        };
        if let Some(problem) = self.obstacles(&request).into_iter().next() {
            return Err(problem);
        }
        // Before anything is written: a clean volume stays clean while its driver is missing.
        let possible = choose(request.attach);
        possible.map_err(|e| problem::impossible(&record.backing, e.kind, e.why))?;
        Attached::attach(&self.ground, open(&record.backing)?, record, true)
    }

    /// Lets volumes go that have come to rest, and has those taken up again whose front ends have
    /// ended by themselves.
    pub(super) fn heal(self: &Arc<Self>) {
        self.ground.lingering.sweep();
        for volume in self.all() {
            let taken_back = || volume.is_to_take_writes().then(|| "it takes writes again".into());
            let Some(why) = volume.failed().or_else(taken_back) else { continue };
            let name = volume.info.name.clone();
            let Some(turn) = self.turns.take(&name, Duration::ZERO) else { continue };
            self.in_a_thread(turn, move |service| {
                let now = lock(&service.volumes).get(&name).cloned();
                if now.is_some_and(|now| Arc::ptr_eq(&now, &volume)) {
                    tracing::warn!(volume = %name, why, "it is attached anew");
                    volume.stop_serving(service.ground.config.client_grace);
                    service.put_aside(&volume);
                }
            });
        }
    }

    fn in_a_thread(self: &Arc<Self>, turn: Turn, work: impl FnOnce(&Self) + Send + 'static) {
        let service = Arc::clone(self);
        let run = move || {
            work(&service);
            drop(turn);
            service.news.set();
        };
        if let Err(error) = Builder::new().name("attach".into()).spawn(run) {
            tracing::error!(%error, "no thread to attach a volume; tried again");
        }
    }

    /// Waits until every volume on record was tried once, and for claims that may end soon; at most
    /// `limit`. Returns whether that is so.
    pub(super) fn wait_settled(&self, limit: Duration) -> bool {
        let unsettled = |missing: &mut Vec<Missing>| {
            let starting = self.is_starting();
            missing.iter().any(|m| m.tried.is_none() || starting && m.is_claimed())
        };
        let waited = self.attempted.wait_timeout_while(lock(&self.missing), limit, unsettled);
        !unsettled(&mut waited.unwrap_or_else(PoisonError::into_inner).0)
    }
}

/// The thread that looks after what is missing. Dropping it stops it.
#[derive(Debug)]
pub(super) struct Attaching {
    stop: Arc<Event>,
    thread: Option<JoinHandle<()>>,
}

impl Attaching {
    pub(super) fn start(service: &Arc<Service>) -> io::Result<Self> {
        let stop = Arc::new(Event::new()?);
        let (service, stopped) = (Arc::clone(service), Arc::clone(&stop));
        let run = move || {
            loop {
                service.news.clear();
                service.heal();
                service.all().iter().for_each(|volume| volume.schedule(WallTime::now()));
                service.attach_missing();
                let claimed = lock(&service.missing).iter().any(Missing::is_claimed);
                let pause = if claimed && service.is_starting() { CLAIM_LOOK } else { LOOK };
                match wait_readable(&[stopped.as_fd(), service.news.as_fd()], Some(pause)) {
                    Ok(ready) if ready.first() != Some(&true) => {}
                    _ => return,
                }
            }
        };
        Ok(Self { stop, thread: Some(Builder::new().name("attaching".into()).spawn(run)?) })
    }

    pub(super) fn stop(&mut self) {
        self.stop.set();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic there was reported when it happened
        }
    }
}

impl Drop for Attaching {
    fn drop(&mut self) {
        self.stop();
    }
}
