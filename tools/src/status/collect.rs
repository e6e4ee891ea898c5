//! Asks every role that has a socket on this machine.

use farshore_blkfilter::control::VolumeStatus;
use farshore_extent::Problem;
use farshore_protocol::admin::{AgentStatus, ReplicaStatus, TargetReply, TargetRequest};
use farshore_protocol::paths::Paths;

use crate::rpc::{self, Role};

/// What each role answered; none for a role that is not on this machine.
#[derive(Debug, Clone, Default)]
pub struct Sides {
    /// The source daemon's volumes.
    pub filterd: Option<Vec<VolumeStatus>>,
    /// The agent.
    pub agent: Option<AgentStatus>,
    /// The target's replicas.
    pub target: Option<Vec<ReplicaStatus>>,
    /// Roles that belong here and do not answer.
    pub silent: Vec<Problem>,
}

impl Sides {
    /// Asks them all.
    ///
    /// # Errors
    /// When no role answers: then there is nothing to show.
    pub fn ask(paths: &Paths) -> Result<Self, Problem> {
        let mut sides = Self::default();
        let filterd = rpc::filterd(paths).and_then(|mut filterd| filterd.list());
        let agent = rpc::agent_status(paths);
        let target = rpc::target(paths, &TargetRequest::Status).and_then(|reply| match reply {
            TargetReply::Status(replicas) => Ok(replicas),
            _ => Err(rpc::unexpected(Role::Target)),
        });
        let source_here = filterd.is_ok() || agent.is_ok();
        let nobody = !source_here && target.is_err();
        // A role is missed when the other half of its host is there, or its state is.
        let state = |name: &str| paths.state.join(name).is_dir();
        sides.filterd = take(filterd, source_here || state("filterd"), &mut sides.silent);
        sides.agent = take(agent, source_here || state("agent"), &mut sides.silent);
        sides.target = take(target, state("target"), &mut sides.silent);
        if nobody { Err(nothing_here(paths, &sides.silent)) } else { Ok(sides) }
    }
}

fn take<T>(answer: Result<T, Problem>, expected: bool, silent: &mut Vec<Problem>) -> Option<T> {
    match answer {
        Ok(answer) => Some(answer),
        Err(problem) => {
            if expected {
                silent.push(problem);
            }
            None
        }
    }
}

fn nothing_here(paths: &Paths, silent: &[Problem]) -> Problem {
    if let [only] = silent {
        return only.clone();
    }
    Problem::harmless(
        5908,
        "no daemon answers on this machine",
        format!("there is no socket of filterd, agent or target under {}", paths.run.display()),
        "start the roles of this host, or give the same --root as the daemons",
    )
}
