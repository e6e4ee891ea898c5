//! One row a volume out of what the roles know. Pure: no sockets, no clock.

use std::collections::BTreeMap;
use std::path::PathBuf;

use farshore_blkfilter::control::{
    CopyWaits, IntentInfo, ThrottleInfo, VerifyProgress, VolumeStatus,
};
use farshore_extent::{CaptureOrder, PairState, Problem, VolumeId, VolumeName, WallTime};
use farshore_protocol::admin::{AgentStatus, AgentVolume, ReplicaStatus, SpoolInfo};
use farshore_protocol::failover::FailoverInfo;
use serde::Serialize;

use super::collect::Sides;
use crate::compare;

/// Everything `status` shows; also its JSON document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StatusReport {
    /// Instant of the answer.
    pub now: WallTime,
    /// One row a volume, by name.
    pub volumes: Vec<Row>,
    /// What is wrong, each with its code.
    pub problems: Vec<Trouble>,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Name.
    pub volume: VolumeName,
    /// Identity.
    pub id: VolumeId,
    /// Host it is written on.
    pub host: Option<String>,
    /// Consistency group.
    pub group: Option<String>,
    /// State of the pair.
    pub state: PairState,
    /// Done of a copy, in percent.
    pub copy_percent: Option<u8>,
    /// Rate of that copy, bytes per second.
    pub copy_rate: u64,
    /// Left of that copy, in bytes.
    pub copy_remaining: u64,
    /// Source: what that copy waits for.
    pub copy_waits: Option<CopyWaits>,
    /// Now minus the newest durable point, in milliseconds.
    pub rpo_ms: Option<u64>,
    /// Wanted, in milliseconds.
    pub rpo_target_ms: Option<u64>,
    /// Bytes captured and not durable at the target.
    pub lag_bytes: u64,
    /// Oldest point that can be opened.
    pub oldest_point: Option<WallTime>,
    /// Newest point that can be opened.
    pub newest_point: Option<WallTime>,
    /// Points kept.
    pub points: u64,
    /// Last test failover that was cleaned up.
    pub last_drill: Option<WallTime>,
    /// Size in bytes.
    pub size: u64,
    /// Bytes of journal at the target.
    pub journal_bytes: Option<u64>,
    /// Bytes of it that have expired and stay because views need them.
    pub held_bytes: Option<u64>,
    /// Views open at the target.
    pub views: Option<u32>,
    /// Source: the block device to use, when there is one.
    pub device: Option<PathBuf>,
    /// Source: where clients connect, when there is no block device.
    pub nbd_socket: Option<PathBuf>,
    /// Source: the protected device.
    pub backing: Option<PathBuf>,
    /// Source: writes since filterd started.
    pub writes: Option<u64>,
    /// Source: where its changes go, and what waits in the spool.
    pub spool: Option<SpoolInfo>,
    /// Source: the last verify, or the one under way.
    pub verify: Option<VerifyProgress>,
    /// Source: regions that a crash of filterd now would have sent again.
    pub intent: Option<IntentInfo>,
    /// Source: the throttle; none when it is off.
    pub throttle: Option<ThrottleInfo>,
    /// Target: what of the replica was read and verified.
    pub scrub: Option<ScrubInfo>,
    /// Target: the failover, when there is one.
    pub failover: Option<FailoverInfo>,
    /// Source: it takes no writes, because it was failed over.
    pub read_only: bool,
}

/// What of a replica was read and verified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ScrubInfo {
    /// When all of it was, last; none: never yet.
    pub ended: Option<WallTime>,
    /// Damaged places that this has found.
    pub found: u64,
    /// Bytes verified by the scrub under way.
    pub verified_bytes: Option<u64>,
    /// Bytes of the base that have no checksums yet.
    pub unverified_bytes: u64,
}

/// What is wrong, and with what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Trouble {
    /// The volume; none when it is about a role.
    pub volume: Option<VolumeName>,
    /// The cause.
    #[serde(flatten)]
    pub problem: Problem,
}

/// Codes of what can be wrong with a view.
const VIEWS: std::ops::Range<u16> = 6600..6700;

/// Puts the sides together.
pub fn merge(sides: &Sides, now: WallTime) -> StatusReport {
    let mut rows: BTreeMap<(VolumeName, VolumeId), Row> = BTreeMap::new();
    let mut problems: Vec<Trouble> = Vec::new();
    let mut add = |volume: Option<&VolumeName>, problem: &Problem| {
        let trouble = Trouble { volume: volume.cloned(), problem: problem.clone() };
        if !problems.iter().any(|t| t.volume == trouble.volume && t.problem.code == problem.code) {
            problems.push(trouble);
        }
    };
    for replica in sides.target.iter().flatten() {
        rows.insert((replica.name.clone(), replica.volume), of_replica(replica));
        replica.problems.iter().for_each(|p| add(Some(&replica.name), p));
    }
    for volume in sides.filterd.iter().flatten() {
        let (name, id) = (&volume.info.name, volume.info.volume);
        volume.fenced.iter().for_each(|p| add(Some(name), p));
        if volume.verify.differing_bytes > 0 {
            add(Some(name), &compare::differs(name, &volume.verify));
        }
        let agent = sides.agent.as_ref();
        let known = agent.and_then(|a| a.volumes.iter().find(|v| v.volume == id));
        let source = of_source(volume, agent, known, now);
        let row = rows.remove(&(name.clone(), id)).map_or(source.clone(), |r| both(r, source));
        rows.insert((name.clone(), id), row);
    }
    if let Some(agent) = &sides.agent {
        agent.problem.iter().for_each(|p| add(None, p));
        for volume in &agent.volumes {
            volume.problem.iter().for_each(|p| add(Some(&volume.name), p));
        }
    }
    sides.silent.iter().for_each(|p| add(None, p));
    let mut volumes: Vec<Row> = rows.into_values().collect();
    for row in &mut volumes {
        let of_it = |t: &&Trouble| t.volume.as_ref() == Some(&row.volume);
        // What is wrong with a view is not wrong with the pair.
        let troubled = problems.iter().filter(of_it).any(|t| !VIEWS.contains(&t.problem.code.0));
        // A state never says "ok" with warnings inside.
        if row.state == PairState::Protected && troubled {
            row.state = PairState::Lagging;
        }
    }
    StatusReport { now, volumes, problems }
}

fn percent(remaining: u64, total: u64) -> Option<u8> {
    let done = u128::from(total.checked_sub(remaining)?) * 100;
    u8::try_from(done.checked_div(u128::from(total))?).ok()
}

fn copying(state: PairState) -> bool {
    matches!(state, PairState::InitialSync | PairState::CatchUp | PairState::Resync)
}

fn of_replica(r: &ReplicaStatus) -> Row {
    let show_copy = copying(r.state);
    Row {
        volume: r.name.clone(),
        id: r.volume,
        host: Some(r.host_name.clone()),
        group: None,
        state: r.state,
        copy_percent: if show_copy { percent(r.copy_remaining, r.copy_total) } else { None },
        copy_rate: r.copy_rate,
        copy_remaining: r.copy_remaining,
        copy_waits: None,
        rpo_ms: r.rpo_ms,
        rpo_target_ms: Some(r.rpo_target_ms),
        lag_bytes: r.lag_bytes,
        oldest_point: r.oldest_point,
        newest_point: r.newest_point,
        points: r.points,
        last_drill: r.last_drill,
        size: r.size.get(),
        journal_bytes: Some(r.journal_bytes),
        held_bytes: Some(r.held_bytes),
        views: Some(r.views),
        device: None,
        nbd_socket: None,
        backing: None,
        writes: None,
        spool: None,
        verify: None,
        intent: None,
        throttle: None,
        scrub: Some(ScrubInfo {
            ended: r.last_scrub,
            found: r.scrub_found,
            verified_bytes: r.scrub_bytes,
            unverified_bytes: r.unverified_bytes,
        }),
        failover: r.failover.clone(),
        read_only: false,
    }
}

fn of_source(
    v: &VolumeStatus,
    agent: Option<&AgentStatus>,
    known: Option<&AgentVolume>,
    now: WallTime,
) -> Row {
    let newest = known.and_then(|k| k.newest_point);
    let rpo = newest.map(|t| u64::try_from(now.since(t).as_millis()).unwrap_or(u64::MAX));
    let wanted = v.info.point_interval_ms.filter(|ms| *ms > 0);
    let late = rpo.is_none() || wanted.zip(rpo).is_some_and(|(w, r)| r > w.saturating_mul(2));
    let connected = agent.is_some_and(|a| a.connected);
    let broken = v.fenced.is_some() || known.is_some_and(AgentVolume::is_broken);
    let state = match (v.order, broken) {
        (_, true) => PairState::Broken,
        (CaptureOrder::CatchUp, false) if newest.is_none() => PairState::InitialSync,
        (CaptureOrder::CatchUp, false) => PairState::CatchUp,
        (CaptureOrder::Ordered, false) if late || !connected => PairState::Lagging,
        (CaptureOrder::Ordered, false) => PairState::Protected,
    };
    let copy = &v.copy;
    let show_copy = copying(state);
    Row {
        volume: v.info.name.clone(),
        id: v.info.volume,
        host: nix::unistd::gethostname().ok().and_then(|h| h.into_string().ok()),
        group: None,
        state,
        copy_percent: if show_copy {
            percent(copy.remaining_bytes, copy.total_bytes)
        } else {
            None
        },
        copy_rate: copy.bytes_per_second,
        copy_remaining: copy.remaining_bytes,
        copy_waits: v.copy_waits,
        rpo_ms: rpo,
        rpo_target_ms: wanted,
        lag_bytes: v
            .pool_used
            .saturating_add(copy.remaining_bytes)
            .saturating_add(known.map_or(0, |k| k.spool.bytes)),
        oldest_point: known.and_then(|k| k.oldest_point),
        newest_point: newest,
        points: known.map_or(0, |k| k.points),
        last_drill: None,
        size: v.info.size.get(),
        journal_bytes: None,
        held_bytes: None,
        views: None,
        device: v.info.link.clone().or_else(|| v.info.attachment.device().map(PathBuf::from)),
        nbd_socket: v.info.attachment.socket().map(PathBuf::from),
        backing: Some(v.info.backing.clone()),
        writes: Some(v.writes),
        spool: known.map(|k| k.spool.clone()),
        verify: Some(v.verify.clone()),
        intent: v.intent.clone(),
        throttle: v.throttle,
        scrub: None,
        failover: None,
        read_only: v.read_only,
    }
}

/// Both ends on this machine: points and state are the target's word, the lag the source's.
fn both(target: Row, source: Row) -> Row {
    Row {
        lag_bytes: source.lag_bytes,
        copy_rate: source.copy_rate,
        copy_waits: source.copy_waits,
        device: source.device,
        nbd_socket: source.nbd_socket,
        backing: source.backing,
        writes: source.writes,
        spool: source.spool,
        verify: source.verify,
        intent: source.intent,
        throttle: source.throttle,
        read_only: source.read_only,
        ..target
    }
}

#[cfg(test)]
mod tests {
    use farshore_protocol::admin::{MergedPoints, SpoolLevel};

    use super::*;
    use crate::status::render::tests_data::{NOW, sides};

    #[test]
    fn both_ends_on_one_machine_are_one_row() {
        let report = merge(&sides(), NOW);
        assert_eq!(report.volumes.len(), 3);
        let row = report.volumes.iter().find(|r| r.volume.as_str() == "pgdata").unwrap();
        assert_eq!(row.points, 288, "points are the target's word");
        assert_eq!(row.lag_bytes, 2_202_010, "the lag is the source's");
        assert!(row.device.is_some() && row.journal_bytes.is_some());
    }

    #[test]
    fn a_volume_with_a_problem_is_never_shown_as_protected() {
        let mut sides = sides();
        for replica in sides.target.iter_mut().flatten() {
            replica.state = PairState::Protected;
        }
        let report = merge(&sides, NOW);
        for row in &report.volumes {
            let troubled = report.problems.iter().any(|p| p.volume.as_ref() == Some(&row.volume));
            assert_eq!(row.state == PairState::Protected, !troubled, "{}", row.volume);
        }
    }

    #[test]
    fn merged_points_are_a_notice_and_a_spool_that_fails_is_not() {
        let mut sides = Sides { target: None, ..sides() };
        let volume = &mut sides.agent.as_mut().unwrap().volumes[0];
        let notice = Problem::harmless(5215, "points were merged", "the spool was full", "wait");
        volume.spool.merged = Some(MergedPoints { points: 3, from: NOW, to: NOW });
        volume.spool.problem = Some(notice.clone());
        volume.problem = Some(notice);
        assert_ne!(merge(&sides, NOW).volumes[0].state, PairState::Broken);
        sides.agent.as_mut().unwrap().volumes[0].spool.level = SpoolLevel::Full;
        assert_eq!(merge(&sides, NOW).volumes[0].state, PairState::Broken);
    }

    #[test]
    fn a_source_whose_agent_is_gone_is_not_protected() {
        let sides = Sides { agent: None, target: None, ..sides() };
        let report = merge(&sides, NOW);
        assert_eq!(report.volumes[0].state, PairState::Lagging);
        assert_eq!(report.volumes[0].rpo_ms, None);
    }
}
