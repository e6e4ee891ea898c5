//! Points for which applications are made quiet: executes what `quiet` decides.

use std::path::PathBuf;

use farshore_blkfilter::control::MarkerRequest;
use farshore_blkfilter::freezer::{ApplicationInfo, Quiet};
use farshore_extent::{GroupId, Lsn, MarkerId, PointKind, Problem, VolumeId, VolumeName, WallTime};
use farshore_protocol::admin::{CutPoint, EventInfo};
use farshore_protocol::message::FromAgent;
use farshore_protocol::paths::Paths;
use tokio::sync::{mpsc, oneshot};

use super::{Driver, Input};
use crate::freezer_line::{FreezerLine, FromFreezer};
use crate::line::{self, Purpose};
use crate::problem;
use crate::quiet::{Action, By, Cut, Event, QuietPoints, Schedule, Wish};

/// A person at this host wants a point.
#[derive(Debug)]
pub(crate) struct LocalTag {
    pub(crate) volumes: Vec<VolumeName>,
    pub(crate) name: String,
    pub(crate) app: bool,
    pub(crate) reply: oneshot::Sender<Result<CutPoint, Problem>>,
}

/// What the driver keeps for it.
pub(super) struct Quieting {
    line: FreezerLine,
    points: QuietPoints,
    schedule: Schedule,
    applications: Vec<ApplicationInfo>,
    /// Why the freezer tells nothing, as last told to people.
    problem: Option<Problem>,
    /// The pending marker that is being committed.
    committing: Option<MarkerId>,
    /// Who waits at this host.
    persons: std::collections::BTreeMap<u64, oneshot::Sender<Result<CutPoint, Problem>>>,
    next_person: u64,
}

impl Quieting {
    pub(super) fn new(paths: &Paths, inputs: &mpsc::Sender<Input>) -> Result<Self, Problem> {
        let (socket, sender) = (paths.freezer_socket(), inputs.clone());
        let sink = move |report| drop(sender.blocking_send(Input::Freezer(report)));
        let configuration = paths.etc.join("freezer.toml");
        let line = FreezerLine::spawn(socket.clone(), configuration, Box::new(sink));
        let line = line.map_err(|e| problem::file("start the thread for", &socket, &e))?;
        Ok(Self {
            line,
            points: QuietPoints::default(),
            schedule: Schedule::default(),
            applications: Vec::new(),
            problem: None,
            committing: None,
            persons: std::collections::BTreeMap::new(),
            next_person: 0,
        })
    }
}

impl Driver {
    /// Points of applications by their schedule.
    pub(super) fn cut_app_points(&mut self) {
        if self.quiet.applications.is_empty() || self.filterd_problem.is_some() {
            return;
        }
        let applications = std::mem::take(&mut self.quiet.applications);
        let mut schedule = std::mem::take(&mut self.quiet.schedule);
        let of = |app: &ApplicationInfo| -> Vec<VolumeId> {
            let here = self.volumes.values().filter(|v| app.volumes.contains(&v.info.name));
            here.map(|v| v.info.volume).collect()
        };
        let ready = |app: &ApplicationInfo| {
            let here = of(app);
            !here.is_empty() && here.iter().all(|v| self.is_ordered(*v))
        };
        let due = schedule.due(WallTime::now(), &applications, ready);
        let wanted: Vec<_> = due.into_iter().map(of).collect();
        (self.quiet.applications, self.quiet.schedule) = (applications, schedule);
        for volumes in wanted {
            self.want(By::Schedule, volumes, String::new(), true);
        }
    }

    /// Wants a point of volumes that are attached here.
    pub(super) fn want(&mut self, by: By, volumes: Vec<VolumeId>, point: String, app: bool) {
        let name = |v: &VolumeId| self.volumes.get(v).map(|s| s.info.name.clone());
        let names = volumes.iter().filter_map(name).collect();
        let markers = [MarkerId::random(), MarkerId::random()];
        self.quiet_step(Event::Wanted(Wish { by, volumes, names, point, app, markers }));
    }

    /// The same by a person at this host.
    pub(super) fn tag_here(&mut self, tag: LocalTag) {
        let LocalTag { volumes: names, name, app, reply } = tag;
        let find = |name: &VolumeName| {
            let found = self.volumes.values().find(|v| v.info.name == *name);
            let found = found.map(|v| v.info.volume).filter(|v| self.is_ordered(*v));
            found.ok_or_else(|| name.clone())
        };
        let found: Result<Vec<_>, _> = names.iter().map(find).collect();
        let problem = match found {
            Ok(volumes) if !volumes.is_empty() => {
                self.quiet.next_person += 1;
                let person = self.quiet.next_person;
                self.quiet.persons.insert(person, reply);
                return self.want(By::Person(person), volumes, name, app);
            }
            Ok(_) => problem::not_ordered("no volume"),
            Err(name) => problem::not_ordered(name.as_str()),
        };
        // Whoever asked may have left.
        let _ = reply.send(Err(problem));
    }

    pub(super) fn freezer(&mut self, report: FromFreezer) {
        match report {
            FromFreezer::Applications(Ok(applications)) => {
                self.quiet.applications = applications;
                if self.quiet.problem.take().is_some() {
                    tracing::info!("the freezer answers again");
                }
            }
            FromFreezer::Applications(Err(problem)) => {
                if self.quiet.problem.as_ref() != Some(&problem) {
                    let Problem { why, next, .. } = &problem;
                    tracing::warn!(%problem, why, next, "no application-consistent points");
                    self.tell(None, &problem);
                }
                self.quiet.problem = Some(problem);
            }
            FromFreezer::Quiet(outcome) => self.quiet_step(Event::Quiet(outcome)),
            FromFreezer::Thawed(outcome) => self.quiet_step(Event::Thawed(outcome)),
            FromFreezer::Finished(problems) => self.quiet_step(Event::Finished(problems)),
        }
    }

    pub(super) fn resolved(&mut self, marker: MarkerId, commit: bool, result: Result<(), Problem>) {
        if commit && self.quiet.committing == Some(marker) {
            self.quiet.committing = None;
            self.quiet_step(Event::Committed(result));
        } else if let Err(problem) = result {
            tracing::debug!(%marker, commit, %problem, "a marker was not resolved");
        }
    }

    /// Steps the core and executes what it decides.
    pub(super) fn quiet_step(&mut self, event: Event) {
        let mut events = std::collections::VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let mut actions = Vec::new();
            self.quiet.points.step(event, &mut actions);
            events.extend(actions.into_iter().filter_map(|action| self.quiet_execute(action)));
        }
    }

    /// Returns what has happened at once.
    fn quiet_execute(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Quiet(wish) => {
                let (volumes, point) = (wish.names, wish.point);
                self.quiet.line.quiet(Quiet { volumes, point, needed: self.needed() });
            }
            Action::Mark { wish, marker, kind } => {
                let pending = kind == PointKind::App;
                let (volumes, name, group) = (wish.volumes, wish.point, GroupId::NIL);
                let request = MarkerRequest { marker, volumes, kind, group, name, pending };
                if !self.line.mark(Purpose::Quiet, request) {
                    return Some(Event::Marked(Err(line::busy())));
                }
            }
            Action::Thaw => self.quiet.line.thaw(),
            Action::Resolve { marker, commit } => {
                if commit {
                    self.quiet.committing = Some(marker);
                }
                self.line.resolve(marker, commit);
            }
            Action::Done(wish, result) => self.done(wish, result),
            Action::Finish => self.quiet.line.finish(),
            Action::Note { volumes, lsn, problem } => self.note(volumes, lsn, problem),
        }
        None
    }

    /// What this process and `filterd` write to.
    fn needed(&self) -> Vec<PathBuf> {
        let log = std::fs::read_link("/proc/self/fd/2").ok().filter(|log| log.is_file());
        let images = self.volumes.values().map(|v| v.info.backing.clone());
        let own = [self.paths.state.join("agent"), self.config.spool_dir(&self.paths)];
        own.into_iter().chain(images).chain(log).collect()
    }

    fn done(&mut self, wish: Wish, result: Result<Cut, Problem>) {
        if let Err(problem) = &result {
            tracing::warn!(volumes = ?wish.names, %problem, why = problem.why, "no point was cut");
        }
        match wish.by {
            By::Schedule => {}
            By::Target(request) => {
                self.send(FromAgent::Tagged { request, result: result.map(|cut| cut.lsn) });
            }
            By::Person(person) => {
                let Some(reply) = self.quiet.persons.remove(&person) else { return };
                let (volumes, name) = (wish.names, wish.point);
                let point = |Cut { lsn, time, kind, reason: note }| CutPoint {
                    volumes,
                    lsn,
                    time,
                    kind,
                    name,
                    note,
                };
                // Whoever asked may have left.
                let _ = reply.send(result.map(point));
            }
        }
    }

    /// Says something of a point, here and at the target.
    fn note(&mut self, volumes: Vec<VolumeId>, lsn: Lsn, problem: Problem) {
        let Problem { why, next, .. } = &problem;
        tracing::warn!(point = %lsn, %problem, why, next, "of an application's point");
        for volume in &volumes {
            let name = self.volumes.get(volume).map(|v| v.info.name.clone());
            self.tell(name, &problem);
        }
        self.send(FromAgent::PointNote { volumes, lsn, problem });
    }

    fn tell(&self, volume: Option<VolumeName>, problem: &Problem) {
        let (code, time) = (problem.code.0, WallTime::now());
        let text = format!("{}: {}", problem.what, problem.why);
        self.events.add(EventInfo { time, code, volume, text });
    }
}
