//! Executes what the session core decides: starts and feeds the threads, owns the connection, and
//! turns everything that happens into events. Decides nothing about the log itself.

mod drain;
mod quiet;
mod renewal;
mod tell;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farshore_blkfilter::control::{MarkerPlaced, MarkerRequest, VolumeStatus};
use farshore_extent::{CaptureOrder, GroupId, Lsn, MarkerId, PointKind, Problem, Seq, VolumeId};
use farshore_protocol::failover::FENCED;
use farshore_protocol::message::{FromAgent, FromTarget};
use farshore_protocol::paths::Paths;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::batch::FeedOptions;
use crate::config::Config;
use crate::event_log::{Changes, EventLog};
use crate::freezer_line::FromFreezer;
use crate::identity::{Identity, NewKey};
use crate::intake::{self, Intake};
use crate::keeper::{Budget, Keeper};
use crate::leftover::Leftovers;
use crate::limits::{CHANNEL, LIST_INTERVAL};
use crate::line::{self, FromFilterd, Line, Purpose};
use crate::link::{Greeting, Link, LinkConfig, Outbox};
use crate::memory::MemoryFile;
use crate::points::Points;
use crate::problem;
use crate::quiet::{self as quiet_points, By};
use crate::report::{Replica, Reporter};
use crate::session::{
    Action, Event, Jitter, LinkFailure, LinkState, Session, SessionConfig, VolumeFacts,
};
use crate::status::Board;
pub(crate) use quiet::LocalTag;
use quiet::Quieting;

/// Everything that can happen to the driver.
#[derive(Debug)]
pub(crate) enum Input {
    /// Of an intake thread.
    Intake(VolumeId, u64, intake::Report),
    /// Of the line to `filterd`.
    Filterd(FromFilterd),
    /// The connection with this number is up.
    Up(u64),
    /// A message on the connection with this number.
    Received(u64, FromTarget),
    /// The connection with this number is gone.
    Down(u64, LinkFailure),
    /// Of the line to the freezer.
    Freezer(FromFreezer),
    /// A person at this host wants a point.
    Local(LocalTag),
}

struct Connection {
    number: u64,
    outbox: Arc<Outbox>,
    task: JoinHandle<()>,
    up: bool,
}

/// See the module.
pub(crate) struct Driver {
    paths: Paths,
    config: Config,
    identity: Identity,
    session: Session,
    start: Instant,
    inputs: mpsc::Sender<Input>,
    connection: Option<Connection>,
    connections: u64,
    intakes: BTreeMap<VolumeId, Intake>,
    line: Line,
    memory: MemoryFile,
    budget: Arc<Budget>,
    leftovers: Leftovers,
    points: Points,
    quiet: Quieting,
    volumes: BTreeMap<VolumeId, VolumeStatus>,
    /// How often filterd has listed them.
    listings: u64,
    reporter: Reporter,
    filterd_problem: Option<Problem>,
    renewing: Option<NewKey>,
    next_report: Duration,
    board: Board,
    changes: Changes,
    events: EventLog,
}

impl Driver {
    pub(crate) fn new(
        (config, paths, identity): (Config, Paths, Identity),
        inputs: mpsc::Sender<Input>,
        (board, events): (Board, EventLog),
    ) -> Result<Self, Problem> {
        let sender = inputs.clone();
        let sink = move |report| drop(sender.blocking_send(Input::Filterd(report)));
        let socket = config.filterd_socket(&paths);
        let line = Line::spawn(socket.clone(), Box::new(sink));
        let line = line.map_err(|e| problem::file("start the thread for", &socket, &e))?;
        let quiet = Quieting::new(&paths, &inputs)?;
        let most = config.spool_max.map(|max| max.bytes());
        let spools = config.spool_dir(&paths);
        let budget = Budget::new(spools.clone(), most, config.spool_percent);
        let session = Session::new(SessionConfig {
            window_bytes: usize::try_from(config.window.bytes()).unwrap_or(usize::MAX),
            retry: config.retry,
            ..SessionConfig::default()
        });
        Ok(Self {
            memory: MemoryFile::load(&paths)?,
            budget: Arc::new(budget),
            leftovers: Leftovers::below(spools),
            paths,
            config,
            identity,
            session,
            start: Instant::now(),
            inputs,
            connection: None,
            connections: 0,
            intakes: BTreeMap::new(),
            line,
            points: Points::default(),
            quiet,
            volumes: BTreeMap::new(),
            listings: 0,
            reporter: Reporter::default(),
            filterd_problem: None,
            renewing: None,
            next_report: Duration::ZERO,
            board,
            changes: Changes::default(),
            events,
        })
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// How long until [`Self::tick`] has something to do.
    pub(crate) fn pause(&self) -> Duration {
        let wakes = [self.session.wakes_at(), self.points.wakes_at(), Some(self.next_report)];
        let next = wakes.into_iter().flatten().min().unwrap_or(self.next_report);
        next.saturating_sub(self.now()).min(LIST_INTERVAL)
    }

    pub(crate) async fn tick(&mut self) {
        self.step(Event::Tick).await;
        self.cut_points();
        self.cut_app_points();
        if self.next_report <= self.now() {
            self.next_report = self.now() + LIST_INTERVAL;
            self.send_reports();
            self.renew();
            self.show();
        }
    }

    pub(crate) fn is_drained(&self) -> bool {
        self.session.is_drained() || !matches!(self.session.link(), LinkState::Up { .. })
    }

    pub(crate) async fn stop(&mut self) {
        self.step(Event::Stop).await;
    }

    /// Reads agent.toml again and tries at once whatever had been given up.
    pub(crate) async fn reload(&mut self) {
        let new = match Config::load(&self.paths) {
            Ok(new) => new,
            Err(problem) => {
                let Problem { why, next, .. } = &problem;
                tracing::error!(%problem, why, next, "the settings stay as they are");
                return;
            }
        };
        for change in self.config.changes(&new) {
            tracing::info!(change, "agent.toml was read again (FS-5209)");
        }
        let fixed = (self.config.filterd_socket.clone(), self.config.spool_dir.clone());
        self.config = Config { filterd_socket: fixed.0, spool_dir: fixed.1, ..new };
        let most = self.config.spool_max.map(|max| max.bytes());
        self.budget.set(most, self.config.spool_percent);
        let window = usize::try_from(self.config.window.bytes()).unwrap_or(usize::MAX);
        self.step(Event::Reload { retry: self.config.retry, window_bytes: window }).await;
        self.show();
    }

    pub(crate) async fn take(&mut self, input: Input) {
        match input {
            Input::Intake(volume, feed, intake::Report::Batch(batch)) => {
                self.step(Event::BatchReady { volume, feed, batch }).await;
            }
            Input::Intake(volume, feed, intake::Report::Failed(failure)) => {
                tracing::error!(%volume, ?failure, "the changes of a volume cannot be shipped");
                self.step(Event::FeedFailed { volume, feed, failure }).await;
            }
            Input::Intake(volume, _, intake::Report::Spool(state)) => {
                self.reporter.spool(volume, state);
                self.show();
            }
            Input::Filterd(FromFilterd::Volumes(volumes, recorded)) => {
                self.listings += 1;
                self.listed(volumes, &recorded).await;
                self.leftovers.sweep(&recorded);
            }
            Input::Filterd(FromFilterd::Lost(problem)) => {
                if self.filterd_problem.is_none() {
                    tracing::warn!(%problem, why = problem.why, "filterd does not answer");
                }
                self.filterd_problem = Some(problem);
            }
            Input::Filterd(FromFilterd::Marked(purpose, result)) => self.marked(purpose, result),
            Input::Filterd(FromFilterd::Resolved(marker, commit, result)) => {
                self.resolved(marker, commit, result);
            }
            Input::Freezer(report) => self.freezer(report),
            Input::Local(tag) => self.tag_here(tag),
            Input::Up(number) if self.is_current(number) => {
                if let Some(connection) = &mut self.connection {
                    connection.up = true;
                }
                tracing::info!(target = self.address(), "connected to the target");
                self.step(Event::Connected).await;
                self.show();
            }
            Input::Received(number, message) if self.is_current(number) => {
                self.received(message).await;
            }
            Input::Down(number, failure) if self.is_current(number) => {
                self.lost(failure).await;
            }
            Input::Up(_) | Input::Received(..) | Input::Down(..) => {} // of a former connection
        }
    }

    fn is_current(&self, number: u64) -> bool {
        self.connection.as_ref().is_some_and(|c| c.number == number)
    }

    async fn lost(&mut self, failure: LinkFailure) {
        self.connection = None;
        self.renewing = None;
        // Once for each change of state: attempts that fail like the one before are not news.
        let before = match self.session.link() {
            LinkState::Connecting { problem } => problem.as_ref().map(|p| p.code),
            LinkState::Up { .. } | LinkState::Down { .. } | LinkState::Halted { .. } => None,
        };
        if before != Some(failure.problem.code) || !failure.retry {
            let Problem { why, next, .. } = &failure.problem;
            tracing::warn!(problem = %failure.problem, why, next, "no connection to the target");
        }
        self.step(Event::Disconnected { failure, jitter: jitter() }).await;
        self.show();
    }

    /// Steps the core and executes what it decides. Actions that fail become events.
    async fn step(&mut self, event: Event) {
        let mut events = std::collections::VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let mut actions = Vec::new();
            self.session.step(self.start.elapsed(), event, &mut actions);
            let mut failed = false;
            for action in actions {
                // After a failure nothing is sent, but the rest is executed: the core counts on a
                // feed that it has started and a batch that it has asked for.
                if let Err(failure) = self.execute(action).await
                    && !std::mem::replace(&mut failed, true)
                {
                    self.disconnect();
                    events.push_back(Event::Disconnected { failure, jitter: jitter() });
                }
            }
        }
    }

    async fn execute(&mut self, action: Action) -> Result<(), LinkFailure> {
        match action {
            Action::Connect => self.connect(),
            Action::Disconnect { reason } => {
                tracing::warn!(reason, "the connection to the target was closed");
                self.disconnect();
            }
            Action::SendOpen(open) => self.send(FromAgent::Open(open)),
            Action::SendClose { volume, unprotected } => {
                self.send(FromAgent::Close { volume, unprotected });
            }
            Action::SendBatch { volume, batch } => {
                if let Some(connection) = &self.connection {
                    connection.outbox.batch(volume, batch);
                }
            }
            Action::StartFeed { volume, feed, resume, recopy } => {
                if let Some(reason) = &recopy {
                    tracing::warn!(%volume, reason, "everything is copied again");
                }
                let socket = self.config.filterd_socket(&self.paths);
                let intake = self.intake(volume, &socket).map_err(|e| LinkFailure {
                    problem: problem::file("start a thread for", &socket, &e),
                    retry: true,
                })?;
                if let Some(intake) = intake {
                    intake.start(feed, resume, recopy);
                }
            }
            Action::StopFeed { volume } => {
                if let Some(intake) = self.intakes.get(&volume) {
                    intake.stop();
                }
            }
            Action::Pull { volume, feed, durable } => {
                if let Some(intake) = self.intakes.get(&volume) {
                    intake.pull(feed, durable);
                }
            }
            Action::Release { volume, upto } => {
                if let Some(intake) = self.intakes.get(&volume) {
                    intake.trim(upto);
                }
                self.line.release(volume, upto);
            }
            Action::Compared { volume, upto, answer } => self.line.compared(volume, upto, answer),
            Action::Remember { volume, memory } => {
                // A few milliseconds at most every 5 s; nothing else may happen in between.
                tokio::task::block_in_place(|| self.memory.set(volume, memory))
                    .map_err(|problem| LinkFailure { problem, retry: true })?;
                if let Some(intake) = self.intakes.get(&volume) {
                    intake.remembered(memory);
                }
            }
        }
        Ok(())
    }

    fn intake(&mut self, volume: VolumeId, socket: &Path) -> std::io::Result<Option<&Intake>> {
        if !self.intakes.contains_key(&volume) {
            let Some(status) = self.volumes.get(&volume) else { return Ok(None) };
            let sender = self.inputs.clone();
            let sink = move |volume, feed, report| {
                drop(sender.blocking_send(Input::Intake(volume, feed, report)));
            };
            let options = FeedOptions { zstd_level: self.config.zstd(), ..FeedOptions::default() };
            let who = (volume, status.info.name.clone());
            let keeper = Keeper::new(self.budget.clone(), &status.info);
            let memory = self.memory.get(volume);
            let socket = socket.to_owned();
            let intake = Intake::spawn(socket, who, options, keeper, memory, Box::new(sink))?;
            self.intakes.insert(volume, intake);
        }
        Ok(self.intakes.get(&volume))
    }

    fn send(&self, message: FromAgent) {
        if let Some(connection) = &self.connection {
            connection.outbox.control(message);
        }
    }

    pub(crate) fn address(&self) -> &str {
        self.config.target.as_deref().unwrap_or(&self.identity.target)
    }

    fn connect(&mut self) {
        self.connections += 1;
        let number = self.connections;
        let config = LinkConfig::new(self.address().to_owned(), self.config.proxy.clone());
        let greeting =
            Greeting { host: self.identity.host, host_name: self.identity.name.to_string() };
        let (tls, outbox) = (self.identity.tls(), Arc::new(Outbox::default()));
        let (inputs, queue) = (self.inputs.clone(), outbox.clone());
        let task = tokio::spawn(async move {
            let life = async {
                let tls = tls.map_err(|problem| LinkFailure { problem, retry: false })?;
                let mut link = Link::dial(&config, tls).await?;
                link.greet(&greeting).await?;
                drop(inputs.send(Input::Up(number)).await);
                let (sender, mut receiver) = mpsc::channel(CHANNEL);
                let forward = async {
                    while let Some(message) = receiver.recv().await {
                        drop(inputs.send(Input::Received(number, message)).await);
                    }
                };
                let (failure, ()) = tokio::join!(link.run(queue, sender), forward);
                Err::<std::convert::Infallible, _>(failure)
            };
            let Err(failure) = life.await;
            drop(inputs.send(Input::Down(number, failure)).await);
        });
        self.connection = Some(Connection { number, outbox, task, up: false });
    }

    pub(crate) fn disconnect(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.task.abort();
        }
        self.renewing = None;
    }

    async fn listed(&mut self, volumes: Vec<VolumeStatus>, recorded: &BTreeSet<VolumeId>) {
        if self.filterd_problem.take().is_some() {
            tracing::info!("filterd answers again");
        }
        let now = self.now();
        let before = std::mem::take(&mut self.volumes);
        self.volumes = volumes.into_iter().map(|v| (v.info.volume, v)).collect();
        for volume in
            before.keys().filter(|v| !self.volumes.contains_key(v)).copied().collect::<Vec<_>>()
        {
            let unprotected = !recorded.contains(&volume);
            tracing::info!(%volume, unprotected, "the volume is not attached any more");
            self.points.remove(volume);
            self.reporter.forget(volume);
            self.step(Event::VolumeGone { volume, unprotected }).await;
            if let Some(intake) = self.intakes.remove(&volume) {
                self.leftovers.wait_for(volume, intake.end());
            }
        }
        for (volume, status) in self.volumes.clone() {
            // Number 0: an epoch without any record yet.
            let captured = status.captured.max(Lsn::new(status.info.epoch, Seq::ZERO));
            let released = status.durable;
            let same = before.get(&volume).is_some_and(|b| facts(b) == facts(&status));
            let event = if same {
                Event::VolumeSeen { volume, captured, released }
            } else {
                let name = status.info.name.as_str();
                tracing::info!(%volume, name, "the volume is protected here");
                if let Some(interval) = status.info.point_interval_ms {
                    self.points.set(now, volume, interval);
                }
                let memory = self.memory.get(volume);
                Event::VolumeAdded { facts: facts(&status), memory, captured, released }
            };
            self.step(event).await;
            // From now on, whether or not the target answers: what it misses is spooled.
            let socket = self.config.filterd_socket(&self.paths);
            if let Err(e) = self.intake(volume, &socket) {
                tracing::warn!(%volume, error = %e, "no thread for the volume; tried again");
            }
        }
    }

    async fn received(&mut self, message: FromTarget) {
        if let FromTarget::Opened(opened) = &message {
            self.points.set(self.now(), opened.volume, opened.point_interval_ms);
            self.line.fence(opened.volume, None);
        }
        if let FromTarget::Refused { volume, problem, retry } = &message {
            let Problem { why, next, .. } = problem;
            tracing::warn!(?volume, %problem, why, next, retry, "the target refuses");
            if let Some(volume) = volume.filter(|_| problem.code.0 == FENCED) {
                self.line.fence(volume, Some(problem.clone()));
            }
        }
        let other = match Event::from_target(message, jitter()) {
            Ok(event) => return self.step(event).await,
            Err(other) => other,
        };
        match other {
            FromTarget::Policy { volume, point_interval_ms } => {
                self.points.set(self.now(), volume, point_interval_ms);
            }
            FromTarget::Tag { request, volumes, kind, name } => {
                self.tag(request, volumes, kind, name);
            }
            FromTarget::Replica { volume, points, newest_point, oldest_point } => {
                let replica = Replica { points, newest_point, oldest_point };
                self.reporter.replica(volume, replica);
            }
            FromTarget::Certificate { certificate, ca } => self.renewed(&certificate, &ca),
            FromTarget::Welcome { .. }
            | FromTarget::Pong(_)
            | FromTarget::Opened(_)
            | FromTarget::Refused { .. }
            | FromTarget::Ack { .. }
            | FromTarget::Compared { .. }
            | FromTarget::Reopen { .. } => {} // taken by the link or the core
        }
    }

    fn is_ordered(&self, volume: VolumeId) -> bool {
        self.volumes.get(&volume).is_some_and(|v| v.order == CaptureOrder::Ordered)
    }

    fn cut_points(&mut self) {
        let ordered =
            |v: VolumeId| self.volumes.get(&v).is_some_and(|v| v.order == CaptureOrder::Ordered);
        for volumes in self.points.due(self.start.elapsed(), ordered) {
            let request = marker(volumes, PointKind::Crash, String::new());
            let asked =
                self.filterd_problem.is_none() && self.line.mark(Purpose::Policy, request.clone());
            if !asked {
                self.points.skipped(&request.volumes);
            }
        }
    }

    fn tag(&mut self, request: u64, volumes: Vec<VolumeId>, kind: PointKind, name: String) {
        let ready = |v: &VolumeId| self.is_ordered(*v);
        // An empty list would mean all volumes of the host.
        let result = if volumes.is_empty() || !volumes.iter().all(ready) {
            Err(problem::not_ordered(&self.names(volumes.iter().filter(|v| !ready(v)))))
        } else if kind == PointKind::App {
            return self.want(By::Target(request), volumes, name, true);
        } else if self.line.mark(Purpose::Tag { request }, marker(volumes, kind, name)) {
            return;
        } else {
            Err(line::busy())
        };
        self.send(FromAgent::Tagged { request, result });
    }

    fn names<'a>(&self, volumes: impl Iterator<Item = &'a VolumeId>) -> String {
        let name = |v: &VolumeId| {
            self.volumes.get(v).map_or_else(|| v.to_string(), |s| s.info.name.to_string())
        };
        volumes.map(name).collect::<Vec<_>>().join(", ")
    }

    fn marked(&mut self, purpose: Purpose, result: Result<MarkerPlaced, Problem>) {
        if let Ok(placed) = &result {
            self.points.skipped(&placed.not_ordered);
        }
        match (purpose, result) {
            (Purpose::Policy, Ok(_)) => {}
            (Purpose::Policy, Err(problem)) => {
                tracing::debug!(%problem, "no point was cut");
            }
            (Purpose::Quiet, result) => {
                let result = result.and_then(|placed| self.whole(placed));
                self.quiet_step(quiet_points::Event::Marked(result));
            }
            (Purpose::Tag { request }, result) => {
                let result = result.and_then(|placed| self.whole(placed)).map(|p| p.lsn);
                self.send(FromAgent::Tagged { request, result });
            }
        }
    }

    /// The marker, when every volume carries it.
    fn whole(&self, placed: MarkerPlaced) -> Result<MarkerPlaced, Problem> {
        match &placed.not_ordered[..] {
            [] => Ok(placed),
            not => Err(problem::not_ordered(&self.names(not.iter()))),
        }
    }
}

fn facts(status: &VolumeStatus) -> VolumeFacts {
    VolumeFacts {
        volume: status.info.volume,
        name: status.info.name.clone(),
        size: status.info.size,
        blocks: status.info.blocks,
        point_interval_ms: status.info.point_interval_ms,
    }
}

fn marker(volumes: Vec<VolumeId>, kind: PointKind, name: String) -> MarkerRequest {
    let (marker, group, pending) = (MarkerId::random(), GroupId::NIL, false);
    MarkerRequest { marker, volumes, kind, group, name, pending }
}

/// A random byte; identities are made from the system's random source.
fn jitter() -> Jitter {
    Jitter(MarkerId::random().to_bytes()[0])
}
