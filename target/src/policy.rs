//! Retention policies of volumes: which one each has, what it keeps, and giving it another.
//!
//! What expires is decided by `retention` alone and done by `upkeep`.

use farshore_extent::{Problem, WallTime};
use farshore_protocol::admin::{PolicyInfo, PolicyReport, SetPolicy, TierReport};
use tokio::sync::oneshot;

use crate::catalogue::{Age, PointRow, VolumeRow};
use crate::daemon::Daemon;
use crate::problem;
use crate::replica::Replica;
use crate::retention::policy::{self, DEFAULT, Policy};
use crate::retention::{self, Reasons};
use crate::worker::Work;

/// From a shorter history nothing is told about the size of the journal to come, in milliseconds.
const TELLING: u64 = 600_000;

/// The policy of a volume as it was given: its own, or that of the configuration.
fn given<'a>(daemon: &'a Daemon, row: &'a VolumeRow) -> &'a str {
    if row.policy.is_empty() { &daemon.config.retention } else { &row.policy }
}

/// The policy of a volume.
///
/// # Errors
/// FS-6541 when it had a name that the configuration does not know any more.
pub(crate) fn of(daemon: &Daemon, row: &VolumeRow) -> Result<Policy, Problem> {
    let policy = daemon.config.policy(given(daemon, row));
    policy.map_err(|why| problem::unknown_policy(&row.name, &why))
}

/// Says once, at the start, of which volumes nothing expires.
pub(crate) fn warn(daemon: &Daemon) {
    for replica in daemon.replicas() {
        let row = replica.facts().row;
        if let Err(problem) = of(daemon, &row) {
            let text = format!("{}: {}", problem.what, problem.why);
            daemon.catalogue.note(problem.code.0, Some(&row.name), text);
        }
    }
}

/// Every policy with a name, built-in ones first.
pub(crate) fn list(daemon: &Daemon) -> Result<Vec<PolicyInfo>, Problem> {
    let built_in = policy::built_in().into_iter().map(|(name, policy)| (name, policy, true));
    let named = daemon.config.policies.keys();
    let own =
        named.filter_map(|name| Some((name.clone(), daemon.config.policy(name).ok()?, false)));
    let rows: Vec<VolumeRow> = daemon.replicas().iter().map(|r| r.facts().row).collect();
    let info = |(name, policy, built_in): (String, Policy, bool)| {
        let has = |row: &&VolumeRow| given(daemon, row) == name;
        let mut volumes: Vec<_> = rows.iter().filter(has).map(|row| row.name.clone()).collect();
        volumes.sort();
        PolicyInfo {
            tiers: policy.to_string(),
            default: daemon.config.retention == name,
            interval_ms: policy.interval,
            name,
            built_in,
            volumes,
        }
    };
    Ok(built_in.chain(own).map(info).collect())
}

/// The policy of a volume and what it keeps now.
pub(crate) fn show(daemon: &Daemon, replica: &Replica) -> Result<PolicyReport, Problem> {
    let row = replica.facts().row;
    report(daemon, replica, &row, &of(daemon, &row)?)
}

/// Gives a volume another policy, unless it is a preview, and tells what that does.
pub(crate) fn set(
    daemon: &Daemon,
    replica: &Replica,
    set: &SetPolicy,
) -> Result<PolicyReport, Problem> {
    let mut row = replica.facts().row;
    row.policy = if set.policy == DEFAULT { String::new() } else { set.policy.clone() };
    let bad = |why: String| problem::bad_policy(&set.policy, &why);
    let policy = daemon.config.policy(given(daemon, &row)).map_err(bad)?;
    let interval = set.interval_ms.or(policy.interval);
    if interval.is_some_and(|ms| (1..100).contains(&ms)) {
        return Err(bad("points are at least 100 ms apart".into()));
    }
    row.point_interval_ms = interval.unwrap_or(row.point_interval_ms);
    let told = report(daemon, replica, &row, &policy)?;
    if set.preview {
        return Ok(told);
    }
    daemon.change_row(replica, |now| now.policy.clone_from(&row.policy))?;
    let text = format!("retention is {} from now on ({policy})", told.policy);
    daemon.catalogue.note(0, Some(&row.name), text);
    if let Some(ms) = interval {
        daemon.set_interval(replica, ms)?;
    }
    Ok(told)
}

/// What `policy` keeps of the volume; `row` says how it was given.
fn report(
    daemon: &Daemon,
    replica: &Replica,
    row: &VolumeRow,
    policy: &Policy,
) -> Result<PolicyReport, Problem> {
    let points = daemon.catalogue.lock().points(replica.volume, None, 0)?;
    let now = daemon.clock.now();
    let why = retention::reasons(&points, now, policy);
    let stay = why.iter().filter(|reasons| reasons.stays()).count();
    let oldest = |kept: &dyn Fn(&Reasons) -> bool| {
        let kept = points.iter().zip(&why).filter(|(_, reasons)| kept(reasons));
        kept.map(|(point, _)| point).min_by_key(|point| point.at.lsn)
    };
    let facts = replica.facts();
    let floor_then = match oldest(&|reasons| reasons.stays()) {
        Some(point) if stay < points.len() => point.at.lsn.max(facts.floor).max(facts.expired),
        _ => facts.floor.max(facts.expired),
    };
    let freed_bytes = if floor_then > facts.floor {
        let (reply, answer) = oneshot::channel();
        replica.send_blocking(Work::JournalBefore { at: floor_then, reply });
        answer.blocking_recv().ok().flatten()
    } else {
        Some(0)
    };
    Ok(PolicyReport {
        volume: row.name.clone(),
        policy: given(daemon, row).to_owned(),
        default: row.policy.is_empty(),
        tiers: tiers(policy, &points, &why),
        interval_ms: row.point_interval_ms,
        stay: count(stay),
        go: count(points.len() - stay),
        oldest_point: oldest(&|reasons| reasons.stays()).map(|point| point.at.time),
        floor: facts.floor,
        floor_then,
        journal_bytes: facts.journal_bytes,
        freed_bytes,
        full_bytes: full_bytes(&points, now, policy, facts.journal_bytes),
    })
}

/// What each tier keeps, then what stays without one.
fn tiers(policy: &Policy, points: &[PointRow], why: &[Reasons]) -> Vec<TierReport> {
    let part = |tier: String, kept: &dyn Fn(&Reasons) -> bool| {
        let kept: Vec<_> = points.iter().zip(why).filter(|(_, r)| kept(r)).collect();
        let oldest = kept.iter().min_by_key(|(point, _)| point.at.lsn);
        let oldest_point: Option<WallTime> = oldest.map(|(point, _)| point.at.time);
        TierReport { tier, points: count(kept.len()), oldest_point }
    };
    let mut all: Vec<TierReport> = Vec::new();
    for (number, (tier, app)) in policy.all_tiers().enumerate() {
        let written = format!("{}{tier}", if app { "app-" } else { "" });
        all.push(part(written, &|reasons| reasons.by_tier(number)));
    }
    all.push(part("named".into(), &|reasons| reasons.held));
    all.push(part("newest".into(), &|reasons| reasons.newest));
    all
}

fn full_bytes(points: &[PointRow], now: Age, policy: &Policy, journal: u64) -> Option<u64> {
    let oldest = points.iter().min_by_key(|point| point.at.lsn)?;
    let history = now.0.saturating_sub(oldest.recorded.0);
    if history < TELLING {
        return None;
    }
    let full = u128::from(journal) * u128::from(policy.longest()) / u128::from(history);
    u64::try_from(full).ok()
}

fn count(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}
