//! Messages about failovers and jobs.

use farshore_extent::{Generation, PointId};
use farshore_protocol::admin::{PointChoice, TargetRequest};
use farshore_protocol::failover::{
    Failover, FailoverInfo, FailoverPhase, FailoverPreview, JobId, JobInfo, JobKind, JobState,
    PreviewFailover, Seen,
};

use super::{lsn, name, problem, time, view, view_info};

pub fn requests() -> Vec<TargetRequest> {
    vec![
        TargetRequest::PreviewFailover(PreviewFailover {
            volume: name(),
            point: PointChoice::Latest,
        }),
        TargetRequest::Failover(Failover {
            volume: name(),
            lsn: lsn(),
            seen: Seen { generation: Generation::new(2), view: Some(view()) },
            device: true,
            tls_listen: Some(":10809".into()),
        }),
        TargetRequest::CancelFailover {
            volume: name(),
            seen: Seen { generation: Generation::new(3), view: None },
        },
        TargetRequest::Jobs { limit: 5 },
        TargetRequest::Job { job: JobId::new(88) },
    ]
}

pub fn info() -> FailoverInfo {
    FailoverInfo {
        phase: FailoverPhase::Pending,
        generation: Generation::new(2),
        lsn: lsn(),
        time: time(),
        view: Some(view()),
        fenced_since: time(),
    }
}

pub fn preview() -> FailoverPreview {
    FailoverPreview {
        volume: name(),
        phase: FailoverPhase::Source,
        generation: Generation::new(1),
        lsn: lsn(),
        time: time(),
        point: Some(PointId::new(312)),
        journaled: lsn(),
        journaled_time: time(),
        ordered: true,
        lost_writes: 1,
        lost_bytes: 2,
        connected: true,
        last_contact: Some(time()),
        unsent_bytes: 3,
        view: Some(Box::new(view_info())),
    }
}

pub fn job() -> JobInfo {
    JobInfo {
        job: JobId::new(88),
        kind: JobKind::Failover,
        volume: name(),
        state: JobState::Failed,
        step: "open the point".into(),
        begun: time(),
        ended: Some(time()),
        result: "nothing is open".into(),
        problem: Some(problem()),
        view: None,
    }
}
