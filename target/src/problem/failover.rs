//! What people are told about failovers and jobs: 68xx.

use farshore_extent::{Problem, VolumeName};
use farshore_protocol::failover::JobId;

use crate::failover::pair::Pair;

/// FS-6802: another job has the volume.
#[must_use]
pub fn job_under_way(name: &VolumeName, job: JobId) -> Problem {
    Problem::harmless(
        6802,
        format!("{name} is being changed by {job}"),
        "one failover at a time; it goes on by itself, also after a restart",
        format!("farshore job wait {job}, then look again: farshore failover show {name}"),
    )
}

/// FS-6803: a person decided on what is not so any more.
#[must_use]
pub fn changed_meanwhile(name: &VolumeName) -> Problem {
    Problem::harmless(
        6803,
        format!("the failover of {name} has changed since you looked at it"),
        "somebody else has failed it over, chosen another point, or cancelled",
        format!("look again and decide again: farshore failover show {name}"),
    )
}

/// FS-6804: not from this phase.
#[must_use]
pub fn not_in_this_phase(name: &VolumeName, phase: &str) -> Problem {
    Problem::harmless(
        6804,
        format!("{name} is not failed over"),
        format!("the failover is in the phase `{phase}`: there is nothing to take back or to end"),
        format!("farshore failover show {name}"),
    )
}

/// FS-6805: the view is what people work with.
#[must_use]
pub fn failed_over_view(name: &VolumeName) -> Problem {
    Problem::harmless(
        6805,
        format!("the view is not closed: {name} was failed over to it"),
        "it is not a test: what was written to it is nowhere else",
        format!("to go back to the source and drop it: farshore failover cancel {name}"),
    )
}

/// FS-6806 and FS-6807: in status, for as long as it is so.
pub(crate) fn failed_over(name: &VolumeName, pair: &Pair) -> Problem {
    if pair.open.is_none() && pair.next.is_none() {
        return Problem::harmless(
            6807,
            format!("{name} is fenced, and nothing is open"),
            "a failover has stopped before its point was opened",
            format!(
                "open a point: farshore failover unplanned {name}; or take the source back: \
                 farshore failover cancel {name}"
            ),
        )
        .with_risk("nobody can write to the volume here, and nothing of its source arrives");
    }
    Problem::harmless(
        6806,
        format!("{name} is failed over: its source is fenced, the point can still be changed"),
        "what is written here is kept on this host only",
        format!(
            "another point: farshore failover unplanned {name} --point P; back to the source: \
             farshore failover cancel {name}"
        ),
    )
    .with_risk("without a copy anywhere else until the volume is protected again")
}

/// FS-6808: no such job.
#[must_use]
pub fn no_job(job: JobId) -> Problem {
    Problem::harmless(
        6808,
        format!("there is no job {job}"),
        "it was never begun, or ended long ago",
        "farshore job list shows those that are kept",
    )
}
