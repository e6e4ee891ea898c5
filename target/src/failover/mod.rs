//! Failover: what it would cost, the row that says where it is, and the job that goes on from it.
//!
//! Needs nothing of the source. A job is its row: after a restart it goes on with what the row says
//! is to be done next.

pub(crate) mod pair;
mod preview;

use std::sync::Arc;
use std::time::Duration;

use farshore_extent::{Generation, Problem, ViewId, VolumeName, WallTime};
use farshore_protocol::admin::{OpenView, PointChoice, TargetReply, TargetRequest};
use farshore_protocol::failover::{
    Failover, FailoverInfo, FailoverPhase, JobId, JobInfo, JobKind, JobState, Seen,
};
use farshore_protocol::message::FromTarget;
use tokio::sync::oneshot;

use crate::catalogue::JobRow;
use crate::daemon::{Daemon, blocking};
use crate::replica::Replica;
use crate::worker::Work;
use crate::{clock, failpoint, problem, views};
use pair::{Opening, Pair, Todo};
use preview::preview;

/// Between two attempts to write a row that the catalogue did not take.
const AGAIN: Duration = Duration::from_secs(1);

/// What the command line asks.
pub(crate) async fn answer(
    daemon: &Arc<Daemon>,
    request: TargetRequest,
) -> Result<TargetReply, Problem> {
    let job = match request {
        TargetRequest::PreviewFailover(wish) => {
            let preview = preview(daemon, wish).await?;
            return Ok(TargetReply::FailoverPreview(Box::new(preview)));
        }
        TargetRequest::Jobs { limit } => {
            return blocking(daemon, move |d| jobs(d, limit)).await.map(TargetReply::Jobs);
        }
        TargetRequest::Job { job: id } => blocking(daemon, move |d| job(d, id)).await?,
        TargetRequest::Failover(wish) => begin(daemon, wish).await?,
        TargetRequest::CancelFailover { volume, seen } => cancel(daemon, volume, seen).await?,
        other => return Err(problem::violation(format!("{other:?} is no matter of failovers"))),
    };
    Ok(TargetReply::Job(Box::new(job)))
}

/// Fences the source and opens a point, or opens another one.
async fn begin(daemon: &Arc<Daemon>, wish: Failover) -> Result<JobInfo, Problem> {
    let replica = daemon.replica(&wish.volume)?;
    // Before anything is changed: whether it can be opened at all.
    let found = views::locate(daemon, &replica, &PointChoice::At(wish.lsn)).await?;
    let next = Opening {
        view: ViewId::random(),
        lsn: found.lsn,
        time: found.time,
        point: found.point,
        device: wish.device,
        tls_listen: wish.tls_listen,
    };
    let change = move |pair: &Pair| pair.fail_over(next, WallTime::now());
    start(daemon, replica, wish.seen, change).await
}

/// Closes what a failover has opened and takes the source back.
async fn cancel(daemon: &Arc<Daemon>, volume: VolumeName, seen: Seen) -> Result<JobInfo, Problem> {
    start(daemon, daemon.replica(&volume)?, seen, Pair::cancel).await
}

/// Makes a change durable, and begins the job that carries it out.
async fn start(
    daemon: &Arc<Daemon>,
    replica: Arc<Replica>,
    seen: Seen,
    change: impl FnOnce(&Pair) -> Option<(JobKind, Pair)> + Send + 'static,
) -> Result<JobInfo, Problem> {
    let own = store_generation(&replica).await?;
    let changing = Arc::clone(&replica);
    let job = blocking(daemon, move |d| {
        // One change at a time: of two operators the second is told.
        let _one = d.failovers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (facts, name) = (changing.facts(), changing.name());
        if let Some(job) = facts.job {
            return Err(problem::job_under_way(&name, job));
        }
        let pair = facts.pair.unwrap_or_else(|| Pair::new(own));
        let open = pair.open.as_ref().map(|open| open.view);
        if (pair.generation, open) != (seen.generation, seen.view) {
            return Err(problem::changed_meanwhile(&name));
        }
        let Some((kind, pair)) = change(&pair) else {
            return Err(problem::not_in_this_phase(&name, pair.phase.as_str()));
        };
        let mut job = JobRow {
            job: JobId::new(0),
            kind,
            volume: changing.volume,
            name,
            state: JobState::Running,
            step: pair.todo().step().to_owned(),
            begun: WallTime::now(),
            ended: None,
            result: String::new(),
            problem: None,
        };
        job.job = d.catalogue.lock().put_failover(changing.volume, &pair, &job)?;
        changing.update(|facts| (facts.pair, facts.job) = (Some(pair), Some(job.job)));
        Ok(job)
    });
    let job = job.await?;
    failpoint::reach("failover: begun");
    tokio::spawn(drive(Arc::clone(daemon), replica, job.clone()));
    Ok(info(daemon, job))
}

/// The generation of the store, which has no row while it was never failed over.
async fn store_generation(replica: &Replica) -> Result<Generation, Problem> {
    let (reply, answer) = oneshot::channel();
    if !replica.send(Work::Raise { to: Generation::ZERO, reply }).await {
        return Err(problem::stopping());
    }
    answer.await.map_err(|_| problem::stopping())?
}

/// Goes on with the jobs that an earlier daemon had under way.
pub(crate) fn resume(daemon: &Arc<Daemon>) -> Result<(), Problem> {
    let running = |job: &JobRow| job.state == JobState::Running;
    let jobs = daemon.catalogue.lock().jobs(0)?;
    for job in jobs.into_iter().filter(running) {
        let Some(replica) = daemon.replicas().into_iter().find(|r| r.volume == job.volume) else {
            continue;
        };
        tracing::info!(job = %job.job, volume = %job.name, step = job.step, "goes on");
        replica.update(|facts| facts.job = Some(job.job));
        tokio::spawn(drive(Arc::clone(daemon), replica, job));
    }
    Ok(())
}

/// One piece of work after the other, each durable before the next.
async fn drive(daemon: Arc<Daemon>, replica: Arc<Replica>, mut job: JobRow) {
    loop {
        let Some(pair) = replica.facts().pair else { return };
        let todo = pair.todo();
        let did = tokio::select! {
            did = perform(&daemon, &replica, &todo) => did,
            () = daemon.stopped() => return,
        };
        let now = WallTime::now();
        let pair = match did {
            Ok(()) => pair.done(now),
            // The next daemon goes on.
            Err(_) if daemon.is_stopping() => return,
            Err(problem) => {
                let pair = pair.failed(now);
                job.problem = Some(problem);
                pair
            }
        };
        failpoint::reach(&format!("failover: {}", todo.step()));
        let rests = job.problem.is_some() || pair.todo() == Todo::Rest;
        if rests {
            job.ended = Some(now);
            job.state = if job.problem.is_some() { JobState::Failed } else { JobState::Done };
            job.result = result(&job, &pair);
        }
        job.step = pair.todo().step().to_owned();
        if !record(&daemon, &replica, &pair, &job).await {
            return;
        }
        failpoint::reach(&format!("failover: {} is recorded", todo.step()));
        if rests {
            return ended(&daemon, &replica, &pair, &job).await;
        }
    }
}

/// Writes the rows, again until they are written. False: the daemon stops.
async fn record(daemon: &Arc<Daemon>, replica: &Arc<Replica>, pair: &Pair, job: &JobRow) -> bool {
    loop {
        let (row, end, of) = (pair.clone(), job.clone(), Arc::clone(replica));
        let written = blocking(daemon, move |d| {
            d.catalogue.lock().put_failover(of.volume, &row, &end)?;
            let job = end.ended.is_none().then_some(end.job);
            of.update(|facts| (facts.pair, facts.job) = (Some(row), job));
            Ok(())
        });
        let Err(problem) = written.await else { return true };
        tracing::error!(job = %job.job, why = problem.why, "{problem}");
        tokio::select! {
            () = tokio::time::sleep(AGAIN) => {}
            () = daemon.stopped() => return false,
        }
    }
}

async fn perform(daemon: &Arc<Daemon>, replica: &Arc<Replica>, todo: &Todo) -> Result<(), Problem> {
    match todo {
        Todo::Rest => Ok(()),
        Todo::Raise(to) => {
            let (reply, answer) = oneshot::channel();
            if !replica.send(Work::Raise { to: *to, reply }).await {
                return Err(problem::stopping());
            }
            answer.await.map_err(|_| problem::stopping())?.map(|_| ())
        }
        Todo::Open(open) => {
            if daemon.views.is_open(open.view) {
                return Ok(());
            }
            let request = OpenView {
                device: open.device,
                tls_listen: open.tls_listen.clone(),
                ..OpenView::new(replica.name(), PointChoice::At(open.lsn))
            };
            views::open_as(daemon, request, open.view).await.map(|_| ())
        }
        Todo::Close(view) => {
            let view = *view;
            blocking(daemon, move |d| {
                if !d.views.is_open(view) {
                    return Ok(());
                }
                d.views.close(d, view, "closed by a failover")
            })
            .await
        }
    }
}

/// What came of a job, in words.
fn result(job: &JobRow, pair: &Pair) -> String {
    let place = |open: &Opening| {
        let point = open.point.map_or_else(|| format!("lsn:{}", open.lsn), |p| p.to_string());
        format!("{point}, {}", clock::show(open.time))
    };
    match (&job.problem, &pair.open) {
        (Some(problem), Some(open)) => format!("{problem}; open as before: {}", place(open)),
        (Some(problem), None) if pair.fences() => {
            format!("{problem}; the source is fenced and nothing is open")
        }
        (Some(problem), None) => format!("{problem}; the source goes on"),
        (None, Some(open)) => format!("open for writing at {}; commit pending", place(open)),
        (None, None) => "the source is taken back".to_owned(),
    }
}

/// Tells people, and a source that may come back.
async fn ended(daemon: &Arc<Daemon>, replica: &Arc<Replica>, pair: &Pair, job: &JobRow) {
    let code = match (&job.problem, job.kind) {
        (Some(problem), _) => problem.code.0,
        (None, JobKind::Failover | JobKind::ChangePoint) => 6801,
        (None, JobKind::CancelFailover) => 6809,
    };
    let text = format!("{} {}: {}", job.kind.as_str(), job.job, job.result);
    crate::daemon::note(daemon, code, Some(job.name.clone()), text).await;
    if !pair.fences()
        && let Some(session) = daemon.sessions.get(replica.facts().row.host)
    {
        let reason = "the target takes this source back".to_owned();
        session.outbox.send(FromTarget::Reopen { volume: replica.volume, reason });
    }
}

/// Jobs, newest first.
fn jobs(daemon: &Daemon, limit: u32) -> Result<Vec<JobInfo>, Problem> {
    /// As many as fit one message whatever is in them.
    const MOST: u32 = 200;
    let limit = if limit == 0 { MOST } else { limit.min(MOST) };
    let jobs = daemon.catalogue.lock().jobs(limit)?;
    Ok(jobs.into_iter().map(|job| info(daemon, job)).collect())
}

/// One job.
fn job(daemon: &Daemon, job: JobId) -> Result<JobInfo, Problem> {
    let row = daemon.catalogue.lock().job(job)?;
    row.map(|row| info(daemon, row)).ok_or_else(|| problem::no_job(job))
}

fn info(daemon: &Daemon, job: JobRow) -> JobInfo {
    let replica = daemon.replicas().into_iter().find(|r| r.volume == job.volume);
    let facts = replica.map(|r| r.facts());
    let of = |view: ViewId| daemon.views.list(daemon).into_iter().find(|info| info.view == view);
    let open = facts.filter(|f| f.job.is_none()).and_then(|f| f.pair).and_then(|p| p.open);
    let JobRow { job, kind, name, state, step, begun, ended, result, problem, volume: _ } = job;
    let view = open.and_then(|open| of(open.view)).map(Box::new);
    JobInfo { job, kind, volume: name, state, step, begun, ended, result, problem, view }
}

/// For status; none when the source is the one that is written.
pub(crate) fn status(pair: Option<&Pair>) -> Option<FailoverInfo> {
    let pair = pair.filter(|pair| pair.phase != FailoverPhase::Source)?;
    let open = pair.open.as_ref().or(pair.next.as_ref());
    Some(FailoverInfo {
        phase: pair.phase,
        generation: pair.generation,
        lsn: open.map_or_else(Default::default, |open| open.lsn),
        time: open.map_or_else(Default::default, |open| open.time),
        view: pair.open.as_ref().map(|open| open.view),
        fenced_since: pair.since,
    })
}

/// Closes a view that a person has opened.
pub(crate) fn close_test(daemon: &Daemon, view: ViewId, note: &str) -> Result<(), Problem> {
    match owner_of(daemon, view) {
        Some(volume) => Err(problem::failed_over_view(&volume)),
        None => daemon.views.close(daemon, view, note),
    }
}

/// Whether a view belongs to a failover, which alone may close it.
pub(crate) fn owner_of(daemon: &Daemon, view: ViewId) -> Option<VolumeName> {
    let owns = |r: &Arc<Replica>| {
        let open = r.facts().pair.and_then(|pair| pair.open);
        open.is_some_and(|open| open.view == view)
    };
    daemon.replicas().iter().find(|r| owns(r)).map(|r| r.name())
}
