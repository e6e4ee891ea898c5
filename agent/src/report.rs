//! What the agent tells people: the state of the session and of each volume.

use std::collections::BTreeMap;
use std::time::Duration;

use farshore_extent::{Problem, VolumeId, WallTime};
use farshore_protocol::admin::{AgentStatus, AgentVolume, SpoolInfo};

use crate::session::{LinkState, Session, VolumeSession};

/// What the target last said of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Replica {
    /// Points kept.
    pub(crate) points: u64,
    /// Capture time of the newest; zero when none.
    pub(crate) newest_point: WallTime,
    /// Capture time of the oldest; zero when none.
    pub(crate) oldest_point: WallTime,
}

/// Gathers what is shown.
#[derive(Debug, Default)]
pub(crate) struct Reporter {
    replicas: BTreeMap<VolumeId, Replica>,
    spools: BTreeMap<VolumeId, SpoolInfo>,
}

impl Reporter {
    pub(crate) fn replica(&mut self, volume: VolumeId, replica: Replica) {
        self.replicas.insert(volume, replica);
    }

    pub(crate) fn spool(&mut self, volume: VolumeId, spool: SpoolInfo) {
        self.spools.insert(volume, spool);
    }

    /// Bytes of a volume in the spool.
    pub(crate) fn spooled(&self, volume: VolumeId) -> u64 {
        self.spools.get(&volume).map_or(0, |spool| spool.bytes)
    }

    pub(crate) fn forget(&mut self, volume: VolumeId) {
        self.replicas.remove(&volume);
        self.spools.remove(&volume);
    }

    /// The status as people's tools read it.
    pub(crate) fn status(
        &self,
        target: &str,
        session: &Session,
        filterd: Option<&Problem>,
        now: Duration,
    ) -> AgentStatus {
        let (link, retry_at) = match session.link() {
            LinkState::Up { .. } => (None, None),
            LinkState::Down { retry_at, problem } => (problem.as_ref(), Some(*retry_at)),
            LinkState::Connecting { problem } => (problem.as_ref(), None),
            LinkState::Halted { problem } => (Some(problem), None),
        };
        let millis = |at: Duration| u64::try_from(at.saturating_sub(now).as_millis()).ok();
        AgentStatus {
            target: target.to_owned(),
            connected: matches!(session.link(), LinkState::Up { .. }),
            problem: link.or(filterd).cloned(),
            retry_in_ms: retry_at.and_then(millis),
            volumes: session.volumes().map(|v| self.volume(v)).collect(),
        }
    }

    fn volume(&self, session: &VolumeSession) -> AgentVolume {
        let facts = session.facts();
        let marks = session.watermarks();
        let replica = self.replicas.get(&facts.volume).copied().unwrap_or_default();
        let spool = self.spools.get(&facts.volume).cloned().unwrap_or_default();
        let known = |time: WallTime| (time != WallTime::default()).then_some(time);
        AgentVolume {
            volume: facts.volume,
            name: facts.name.clone(),
            problem: session.problem().or(spool.problem.as_ref()).cloned(),
            sent: marks.sent(),
            journaled: marks.journaled(),
            journaled_time: session.acked_time(),
            points: replica.points,
            newest_point: known(replica.newest_point),
            oldest_point: known(replica.oldest_point),
            raw_bytes: session.totals().raw_bytes,
            wire_bytes: session.totals().wire_bytes,
            spool,
        }
    }
}
