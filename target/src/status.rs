//! The state of each replica in words and numbers, from facts alone.

use std::collections::BTreeMap;
use std::time::Duration;

use farshore_extent::{CaptureOrder, HostId, PairState, Problem, WallTime};
use farshore_protocol::admin::ReplicaStatus;

use crate::daemon::Daemon;
use crate::failover::pair::Pair;
use crate::replica::Facts;
use crate::{failover, problem};

/// A source that said nothing for so long is as good as disconnected; it reports every second.
const REPORT_STALE: Duration = Duration::from_secs(10);

/// A store that takes longer to open is shown as it is: not there yet.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// All replicas, by name.
pub(crate) fn all(daemon: &Daemon) -> Result<Vec<ReplicaStatus>, Problem> {
    let hosts: BTreeMap<HostId, String> =
        daemon.catalogue.lock().hosts()?.into_iter().map(|row| (row.host, row.name)).collect();
    let now = WallTime::now();
    let target = daemon.config.rpo_target.duration();
    let mut all = Vec::new();
    for replica in daemon.replicas() {
        replica.wait_until_started(START_PATIENCE);
        let facts = replica.facts();
        let host_name = hosts.get(&facts.row.host).cloned().unwrap_or_default();
        let last_drill = daemon.catalogue.lock().last_drill(replica.volume)?;
        let mut status = ReplicaStatus { last_drill, ..status(&facts, host_name, now, target) };
        status.problems.extend(daemon.views.problems(daemon, replica.volume));
        all.push(status);
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

fn status(facts: &Facts, host_name: String, now: WallTime, target: Duration) -> ReplicaStatus {
    let report = facts.report.as_ref().map(|(report, _)| report);
    // Points carry the source's time: clocks that differ must not hide or invent a loss.
    let there = WallTime::from_nanos(now.nanos().saturating_add(facts.source_ahead));
    let rpo = facts.points.newest.map(|newest| there.since(newest));
    let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    ReplicaStatus {
        volume: facts.row.volume,
        name: facts.row.name.clone(),
        host_name,
        size: facts.row.size,
        state: state(facts, rpo, target),
        order: facts.order,
        connected: facts.session.is_some(),
        rpo_ms: rpo.map(millis),
        rpo_target_ms: millis(target),
        lag_bytes: report.map_or(0, |r| r.backlog_bytes),
        copy_remaining: report.map_or(0, |r| r.copy_remaining),
        copy_total: report.map_or(0, |r| r.copy_total),
        copy_rate: report.map_or(0, |r| r.copy_rate),
        journaled: facts.durable,
        floor: facts.floor,
        points: facts.points.count,
        newest_point: facts.points.newest,
        oldest_point: facts.points.oldest,
        last_drill: None,
        views: facts.views,
        journal_bytes: facts.journal_bytes,
        held_bytes: facts.held_bytes,
        digests: facts.compared.digests,
        differing: facts.compared.differing,
        last_scrub: facts.scrub.last.map(|last| last.at),
        scrub_found: facts.scrub.last.map_or(0, |last| last.found),
        scrub_bytes: facts.scrub.bytes,
        unverified_bytes: facts.scrub.unsummed,
        problems: problems(facts, rpo, target),
        failover: failover::status(facts.pair.as_ref()),
    }
}

/// The worst that is true. Points cut by hand only (interval 0) make no volume lag.
fn state(facts: &Facts, rpo: Option<Duration>, target: Duration) -> PairState {
    let late = rpo.is_none_or(|rpo| rpo > target) && facts.row.point_interval_ms != 0;
    if facts.pair.as_ref().is_some_and(Pair::fences) {
        PairState::FailedOverPending
    } else if facts.problem.is_some()
        || (facts.wrong_bytes + facts.rotten_bytes > 0 && !facts.row.unprotected)
    {
        PairState::Broken
    } else if facts.row.unprotected {
        PairState::Unprotected
    } else if facts.order == CaptureOrder::CatchUp {
        if facts.points.count == 0 { PairState::InitialSync } else { PairState::CatchUp }
    } else if facts.session.is_none() || late {
        PairState::Lagging
    } else {
        PairState::Protected
    }
}

/// What is wrong, worst first; empty exactly when the state is "protected" (or not wanted).
fn problems(facts: &Facts, rpo: Option<Duration>, target: Duration) -> Vec<Problem> {
    let mut all: Vec<Problem> = facts.problem.clone().into_iter().collect();
    if let Some(pair) = facts.pair.as_ref().filter(|pair| pair.fences()) {
        all.push(problem::failed_over(&facts.row.name, pair));
        return all;
    }
    if facts.row.unprotected {
        return all;
    }
    let name = &facts.row.name;
    if facts.wrong_bytes > 0 {
        all.push(problem::differs(name, facts.wrong_bytes));
    }
    if facts.rotten_bytes > 0 {
        all.push(problem::rotten_base(name, facts.rotten_bytes));
    }
    let behind = "writes since the newest point are not on the replica yet";
    let silent = facts.report.as_ref().is_some_and(|(_, when)| when.elapsed() > REPORT_STALE);
    if facts.session.is_none() {
        let why = "the agent is stopped, the link is down, or it was refused";
        all.push(
            Problem::harmless(
                3101,
                format!("the source of {name} is not connected"),
                why,
                "on the source: farshore status shows what the agent says",
            )
            .with_risk(behind),
        );
    } else if silent {
        all.push(
            Problem::harmless(
                3102,
                format!("the source of {name} has stopped reporting"),
                "the agent hangs, or cannot reach filterd",
                "on the source: farshore status, and the log of filterd",
            )
            .with_risk(behind),
        );
    }
    if facts.order == CaptureOrder::CatchUp {
        let reason = facts.report.as_ref().map(|(r, _)| r.reason.as_str()).unwrap_or_default();
        let why = if reason.is_empty() { "chunks are still to be sent" } else { reason };
        let next = "wait: points are cut again as soon as everything is sent";
        all.push(
            Problem::harmless(3103, format!("{name} is catching up: no new points"), why, next)
                .with_risk("older points stay; newer states cannot be recovered until it is done"),
        );
    } else if let Some(rpo) = rpo
        && rpo > target
        && facts.row.point_interval_ms != 0
        && facts.session.is_some()
    {
        let (is, wanted) = (rpo.as_secs(), target.as_secs());
        let why = format!("the newest point is {is} s old, wanted {wanted} s");
        let next = "compare the change rate of the volume with the speed of the link";
        let lagging = Problem::harmless(3107, format!("{name} is lagging"), why, next);
        all.push(lagging.with_risk(behind));
    }
    all
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use farshore_extent::{BlockSizes, Lsn, VolumeId, VolumeName, VolumeSize};

    use super::*;
    use crate::catalogue::{PointSummary, VolumeRow};
    use crate::replica::Comparison;
    use crate::session::Registry;

    const TARGET: Duration = Duration::from_secs(30);

    fn healthy() -> Facts {
        let host = HostId::random();
        let newest = Some(WallTime::from_nanos(70_000_000_000));
        Facts {
            row: VolumeRow {
                volume: VolumeId::random(),
                name: VolumeName::new("v").unwrap(),
                host,
                size: VolumeSize::new(1 << 20).unwrap(),
                blocks: BlockSizes::E512,
                point_interval_ms: 5_000,
                unprotected: false,
                policy: String::new(),
                points_upto: Lsn::ZERO,
            },
            session: Some(Registry::default().enter(host).id),
            report: None,
            source_ahead: 0,
            durable: Lsn::ZERO,
            floor: Lsn::ZERO,
            expired: Lsn::ZERO,
            order: CaptureOrder::Ordered,
            journal_bytes: 0,
            held_bytes: 0,
            points: PointSummary { count: 3, newest, oldest: newest },
            compared: Comparison::default(),
            wrong_bytes: 0,
            rotten_bytes: 0,
            scrub: crate::replica::Scrubs::default(),
            views: 0,
            pair: None,
            job: None,
            heard: None,
            problem: None,
        }
    }

    fn told(facts: &Facts, now_seconds: i64) -> (PairState, Vec<u16>, Option<u64>) {
        let now = WallTime::from_nanos(now_seconds * 1_000_000_000);
        let status = status(facts, "db1".into(), now, TARGET);
        (status.state, status.problems.iter().map(|p| p.code.0).collect(), status.rpo_ms)
    }

    #[test]
    fn protected_never_has_problems_and_every_problem_changes_the_state() {
        assert_eq!(told(&healthy(), 75), (PairState::Protected, vec![], Some(5_000)));
        let gone = Facts { session: None, ..healthy() };
        assert_eq!(told(&gone, 75), (PairState::Lagging, vec![3101], Some(5_000)));
        assert_eq!(told(&gone, 500), (PairState::Lagging, vec![3101], Some(430_000)), "it grows");
        assert_eq!(told(&healthy(), 101), (PairState::Lagging, vec![3107], Some(31_000)));
        let broken = Facts { problem: Some(crate::problem::stopping()), ..healthy() };
        assert_eq!(told(&broken, 75).0, PairState::Broken);
        let wrong = Facts { wrong_bytes: 4096, ..healthy() };
        assert_eq!(told(&wrong, 75), (PairState::Broken, vec![3120], Some(5_000)));
        let rotten = Facts { rotten_bytes: 512, ..healthy() };
        assert_eq!(told(&rotten, 75), (PairState::Broken, vec![6015], Some(5_000)));
    }

    #[test]
    fn a_failed_over_volume_says_so_and_not_that_its_source_is_silent() {
        let next = crate::failover::pair::Opening {
            view: farshore_extent::ViewId::NIL,
            lsn: Lsn::ZERO,
            time: WallTime::from_nanos(0),
            point: None,
            device: false,
            tls_listen: None,
        };
        let now = WallTime::from_nanos(0);
        let source = Pair::new(farshore_extent::Generation::new(1));
        let (_, pair) = source.fail_over(next, now).unwrap();
        let unopened = pair.done(now).failed(now);
        let over = Facts { session: None, pair: Some(pair), ..healthy() };
        assert_eq!(told(&over, 75).0, PairState::FailedOverPending);
        assert_eq!(told(&over, 75).1, [6806]);
        let unopened = Facts { pair: Some(unopened), ..healthy() };
        assert_eq!(told(&unopened, 75).1, [6807]);
    }

    #[test]
    fn clocks_that_differ_do_not_change_the_age_of_the_newest_point() {
        let ahead = Facts { source_ahead: 60_000_000_000, ..healthy() };
        assert_eq!(told(&ahead, 15), (PairState::Protected, vec![], Some(5_000)));
        assert_eq!(told(&ahead, 75), (PairState::Lagging, vec![3107], Some(65_000)));
    }

    #[test]
    fn a_first_copy_is_told_from_a_later_catch_up() {
        let catch_up = Facts { order: CaptureOrder::CatchUp, ..healthy() };
        assert_eq!(told(&catch_up, 75), (PairState::CatchUp, vec![3103], Some(5_000)));
        let first = Facts { points: PointSummary::default(), ..catch_up };
        assert_eq!(told(&first, 75), (PairState::InitialSync, vec![3103], None));
    }

    #[test]
    fn a_volume_without_an_interval_does_not_lag() {
        let mut by_hand = healthy();
        by_hand.row.point_interval_ms = 0;
        assert_eq!(told(&by_hand, 5_000).0, PairState::Protected);
    }

    #[test]
    fn a_source_that_stopped_reporting_is_named() {
        let report = farshore_protocol::message::VolumeReport {
            volume: VolumeId::NIL,
            captured: Lsn::ZERO,
            backlog_bytes: 7,
            copy_remaining: 0,
            copy_total: 0,
            copy_rate: 0,
            reason: String::new(),
            now: WallTime::from_nanos(0),
        };
        let Some(old) = Instant::now().checked_sub(REPORT_STALE * 2) else { return };
        let silent = Facts { report: Some((report, old)), ..healthy() };
        assert_eq!(told(&silent, 75).1, [3102]);
    }
}
