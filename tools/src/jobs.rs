//! `farshore job`: long work of the target, as it goes on and as it ended.

use clap::Subcommand;
use farshore_extent::{Problem, WallTime};
use farshore_protocol::admin::{TargetReply, TargetRequest};
use farshore_protocol::failover::{JobId, JobInfo, JobState};
use farshore_protocol::paths::Paths;

use crate::args::Global;
use crate::exit::{Exit, Failure};
use crate::failover::LOOK;
use crate::output::{Out, table};
use crate::rpc::{self, Role};
use crate::units;

/// Version of the documents.
const SCHEMA: &str = "farshore.jobs/1";

/// `job …`
#[derive(Debug, Subcommand)]
pub enum JobCommand {
    /// Newest first
    List {
        /// At most so many; 0 is all that are kept
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// One job
    Show {
        /// Such as j-88
        job: JobId,
    },
    /// Return when it has ended; exits as the command that began it would have
    Wait {
        /// Such as j-88
        job: JobId,
    },
}

/// `farshore job`.
pub fn run(command: &JobCommand, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let paths = global.paths();
    match command {
        JobCommand::List { limit } => {
            let TargetReply::Jobs(jobs) =
                rpc::target(&paths, &TargetRequest::Jobs { limit: *limit })?
            else {
                return Err(rpc::unexpected(Role::Target).into());
            };
            if out.json {
                out.document(SCHEMA, "jobs", &jobs);
            } else {
                out.text(&text(&jobs, WallTime::now()));
            }
        }
        JobCommand::Show { job } => print(&look(&paths, *job)?, out),
        JobCommand::Wait { job } => {
            let job = wait(&paths, *job)?;
            print(&job, out);
            if let Some(problem) = job.problem {
                return Err(problem.into());
            }
        }
    }
    Ok(Exit::Ok)
}

fn look(paths: &Paths, job: JobId) -> Result<JobInfo, Problem> {
    match rpc::target(paths, &TargetRequest::Job { job })? {
        TargetReply::Job(job) => Ok(*job),
        _ => Err(rpc::unexpected(Role::Target)),
    }
}

/// Waits until a job has ended, however long that takes.
pub(crate) fn wait(paths: &Paths, job: JobId) -> Result<JobInfo, Problem> {
    loop {
        let now = look(paths, job)?;
        if now.state != JobState::Running {
            return Ok(now);
        }
        #[allow(clippy::disallowed_methods)] // between two looks; nobody tells us of the end
        std::thread::sleep(LOOK);
    }
}

/// One job, as text or as a document.
pub(crate) fn print(job: &JobInfo, out: &Out) {
    if out.json {
        return out.document(SCHEMA, "job", job);
    }
    let JobInfo { job, kind, volume, state, step, result, .. } = job;
    let more = if *state == JobState::Running { step } else { result };
    out.line(format!("{job} {} of {volume}: {}: {more}", kind.as_str(), state.as_str()));
}

fn text(jobs: &[JobInfo], now: WallTime) -> String {
    let head = ["JOB", "WHAT", "VOLUME", "STATE", "BEGUN", "TOOK", "RESULT"].map(str::to_owned);
    let row = |j: &JobInfo| {
        let more = if j.state == JobState::Running { &j.step } else { &j.result };
        vec![
            j.job.to_string(),
            j.kind.as_str().to_owned(),
            j.volume.to_string(),
            j.state.as_str().to_owned(),
            units::ago(now, j.begun),
            units::span(j.ended.unwrap_or(now).since(j.begun)),
            more.clone(),
        ]
    };
    table(&std::iter::once(head.to_vec()).chain(jobs.iter().map(row)).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use farshore_extent::VolumeName;
    use farshore_protocol::failover::JobKind;

    use super::*;

    #[test]
    fn a_job_as_json_is_a_contract() {
        let at = |seconds: i64| {
            WallTime::from_nanos(1_795_252_440_000_000_000 + seconds * 1_000_000_000)
        };
        let job = JobInfo {
            job: JobId::new(88),
            kind: JobKind::Failover,
            volume: VolumeName::new("pgdata").unwrap(),
            state: JobState::Done,
            step: "done".into(),
            begun: at(0),
            ended: Some(at(1)),
            result: "open for writing at p-312".into(),
            problem: None,
            view: None,
        };
        let jobs = [job];
        let document = crate::output::document(SCHEMA, "jobs", &jobs);
        crate::status::golden::same("jobs.json", &document);
        let text = text(&jobs, at(61));
        assert!(text.contains("j-88") && text.contains("1m01s ago"), "{text}");
    }
}
