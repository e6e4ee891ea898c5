//! Points for which applications are made quiet: what is asked of the freezer and of `filterd`, in
//! which order, and what may be said of the point then. No I/O and no clock.
//!
//! A point is called application-consistent only when the freezer says, after its marker was placed,
//! that it was quiet until then. The marker is therefore cut pending: with that answer it is committed;
//! with any other it is aborted, and a crash-consistent one is cut. Whatever fails, a point is cut.

use std::collections::{BTreeMap, VecDeque};

use farshore_blkfilter::control::MarkerPlaced;
use farshore_blkfilter::freezer::ApplicationInfo;
use farshore_extent::{Lsn, MarkerId, PointKind, Problem, VolumeId, VolumeName, WallTime};

/// Wishes that wait; more are refused.
const MAX_WAITING: usize = 64;

/// Who wants a point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum By {
    /// The target, by this request.
    Target(u64),
    /// A person at this host, by this request.
    Person(u64),
    /// The schedule of an application.
    Schedule,
}

/// A point that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// By whom.
    pub by: By,
    /// Of which volumes.
    pub volumes: Vec<VolumeId>,
    /// Their names, in the same order.
    pub names: Vec<VolumeName>,
    /// Name of the point; may be empty.
    pub point: String,
    /// Make the applications quiet.
    pub app: bool,
    /// Identities for the marker, and for the crash-consistent one in its place.
    pub markers: [MarkerId; 2],
}

/// A point that was cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Where.
    pub lsn: Lsn,
    /// When.
    pub time: WallTime,
    /// What it promises.
    pub kind: PointKind,
    /// Why that is less than was wanted.
    pub reason: Option<Problem>,
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// A point is wanted.
    Wanted(Wish),
    /// The freezer's answer to [`Action::Quiet`].
    Quiet(Result<(), Problem>),
    /// The answer of `filterd` to [`Action::Mark`].
    Marked(Result<MarkerPlaced, Problem>),
    /// The freezer's answer to [`Action::Thaw`].
    Thawed(Result<(), Problem>),
    /// The answer of `filterd` to a commit.
    Committed(Result<(), Problem>),
    /// The freezer's answer to [`Action::Finish`].
    Finished(Vec<Problem>),
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Ask the freezer for quiet.
    Quiet(Wish),
    /// Place a marker.
    Mark {
        /// For what.
        wish: Wish,
        /// Its identity.
        marker: MarkerId,
        /// App is cut pending, crash is a point at once.
        kind: PointKind,
    },
    /// Ask the freezer to end the quiet.
    Thaw,
    /// Resolve the pending marker. Only a commit is answered.
    Resolve {
        /// Which.
        marker: MarkerId,
        /// It is a point, or never will be.
        commit: bool,
    },
    /// Tell whoever wanted it.
    Done(Wish, Result<Cut, Problem>),
    /// Ask the freezer what became of the post hooks.
    Finish,
    /// Something to be said of a point that was cut.
    Note {
        /// Of which volumes.
        volumes: Vec<VolumeId>,
        /// Where it is.
        lsn: Lsn,
        /// What there is to say.
        problem: Problem,
    },
}

#[derive(Debug)]
enum Stage {
    /// The freezer was asked.
    Asked,
    /// The pending marker is being placed.
    MarkingQuiet,
    /// The freezer was asked to end it; the marker, or why there is none.
    Thawing(Result<MarkerPlaced, Problem>),
    /// The marker is being committed.
    Committing(MarkerPlaced),
    /// A crash-consistent marker is being placed; why it is one.
    Marking(Option<Problem>),
    /// The point was cut here, or not; post hooks may be running.
    Finishing(Option<Lsn>),
}

/// One point after the other.
#[derive(Debug, Default)]
pub struct QuietPoints {
    running: Option<(Wish, Stage)>,
    waiting: VecDeque<Wish>,
}

impl QuietPoints {
    /// Takes what happened; what is to be done is appended to `out`. Answers that nobody waits for
    /// any more change nothing.
    pub fn step(&mut self, event: Event, out: &mut Vec<Action>) {
        let event = match event {
            Event::Wanted(wish) => return self.wanted(wish, out),
            other => other,
        };
        let Some((wish, stage)) = self.running.take() else { return };
        let next = match (stage, event) {
            (Stage::Asked, Event::Quiet(Ok(()))) => {
                out.push(mark(&wish, 0, PointKind::App));
                Some(Stage::MarkingQuiet)
            }
            (Stage::Asked, Event::Quiet(Err(problem))) => {
                out.push(mark(&wish, 1, PointKind::Crash));
                Some(Stage::Marking(Some(problem)))
            }
            (Stage::MarkingQuiet, Event::Marked(result)) => {
                out.push(Action::Thaw);
                Some(Stage::Thawing(result))
            }
            (Stage::Thawing(Ok(placed)), Event::Thawed(Ok(()))) => {
                out.push(Action::Resolve { marker: wish.markers[0], commit: true });
                Some(Stage::Committing(placed))
            }
            (Stage::Thawing(Ok(_)), Event::Thawed(Err(problem))) => {
                out.push(Action::Resolve { marker: wish.markers[0], commit: false });
                out.push(mark(&wish, 1, PointKind::Crash));
                Some(Stage::Marking(Some(problem)))
            }
            (Stage::Thawing(Err(problem)), Event::Thawed(_)) => {
                // It may have been placed in some volumes.
                out.push(Action::Resolve { marker: wish.markers[0], commit: false });
                Some(done(&wish, Err(problem), out))
            }
            (Stage::Committing(placed), Event::Committed(Ok(()))) => {
                let cut =
                    Cut { lsn: placed.lsn, time: placed.time, kind: PointKind::App, reason: None };
                Some(done(&wish, Ok(cut), out))
            }
            // filterd was started anew in between: the marker is gone.
            (Stage::Committing(_), Event::Committed(Err(problem))) => {
                out.push(mark(&wish, 1, PointKind::Crash));
                Some(Stage::Marking(Some(problem)))
            }
            (Stage::Marking(reason), Event::Marked(Ok(placed))) => {
                let cut =
                    Cut { lsn: placed.lsn, time: placed.time, kind: PointKind::Crash, reason };
                Some(done(&wish, Ok(cut), out))
            }
            (Stage::Marking(_), Event::Marked(Err(problem))) => {
                Some(done(&wish, Err(problem), out))
            }
            (Stage::Finishing(cut), Event::Finished(problems)) => {
                if let Some(lsn) = cut {
                    let note =
                        |problem| Action::Note { volumes: wish.volumes.clone(), lsn, problem };
                    out.extend(problems.into_iter().map(note));
                }
                None
            }
            (stage, _) => Some(stage),
        };
        self.running = next.map(|stage| (wish, stage));
        self.begin(out);
    }

    fn wanted(&mut self, wish: Wish, out: &mut Vec<Action>) {
        if self.waiting.len() >= MAX_WAITING {
            out.push(Action::Done(wish, Err(crate::line::busy())));
            return;
        }
        self.waiting.push_back(wish);
        self.begin(out);
    }

    fn begin(&mut self, out: &mut Vec<Action>) {
        if self.running.is_some() {
            return;
        }
        let Some(wish) = self.waiting.pop_front() else { return };
        let stage = if wish.app {
            out.push(Action::Quiet(wish.clone()));
            Stage::Asked
        } else {
            out.push(mark(&wish, 1, PointKind::Crash));
            Stage::Marking(None)
        };
        self.running = Some((wish, stage));
    }
}

fn mark(wish: &Wish, which: usize, kind: PointKind) -> Action {
    Action::Mark { wish: wish.clone(), marker: wish.markers[which], kind }
}

fn done(wish: &Wish, result: Result<Cut, Problem>, out: &mut Vec<Action>) -> Stage {
    let lsn = result.as_ref().ok().map(|cut| cut.lsn);
    if let Ok(Cut { lsn, reason: Some(problem), .. }) = &result {
        let (volumes, problem) = (wish.volumes.clone(), problem.clone());
        // Before the answer: who gets that looks for the note.
        out.push(Action::Note { volumes, lsn: *lsn, problem });
    }
    out.push(Action::Done(wish.clone(), result));
    out.push(Action::Finish);
    Stage::Finishing(lsn)
}

/// When the points of applications are due: at whole multiples of their interval since 1970 by the
/// host's clock, so that a restart shifts nothing.
#[derive(Debug, Default)]
pub struct Schedule(BTreeMap<VolumeName, u64>);

impl Schedule {
    /// Applications whose point is due at `now`. One that is not `ready` stays due. Each is told
    /// once, and after a pause only the last of what was missed is told.
    pub fn due<'a>(
        &mut self,
        now: WallTime,
        applications: &'a [ApplicationInfo],
        ready: impl Fn(&ApplicationInfo) -> bool,
    ) -> Vec<&'a ApplicationInfo> {
        let millis = u64::try_from(now.nanos() / 1_000_000).unwrap_or(0);
        self.0.retain(|name, _| applications.iter().any(|app| app.name == *name));
        let mut due = Vec::new();
        for app in applications {
            let Some(turn) = millis.checked_div(app.every_ms) else {
                self.0.remove(&app.name);
                continue;
            };
            let last = self.0.entry(app.name.clone()).or_insert(turn);
            // The clock was set back, or the interval is a longer one now.
            *last = turn.min(*last);
            if turn > *last && ready(app) {
                *last = turn;
                due.push(app);
            }
        }
        due
    }
}

#[cfg(test)]
mod tests;
