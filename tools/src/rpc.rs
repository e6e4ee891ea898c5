//! Asking the daemons of this machine over their owner-only sockets: one request, one answer.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use farshore_blkfilter::control::client::Client;
use farshore_changelog::codec;
use farshore_extent::{PointKind, Problem};
use farshore_protocol::admin::{AgentReply, AgentRequest, AgentStatus, TargetReply, TargetRequest};
use farshore_protocol::paths::Paths;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest wait for an ordinary answer.
const ANSWER: Duration = Duration::from_secs(30);

/// Longest wait for a point that waits for hooks; the daemons give up before.
const HOOKS: Duration = Duration::from_secs(480);

/// A role with a local socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The agent.
    Agent,
    /// The target daemon.
    Target,
}

impl Role {
    /// For people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Agent => "the agent",
            Self::Target => "the target daemon",
        }
    }

    const fn start(self) -> &'static str {
        match self {
            Self::Agent => "start it: farshore agent",
            Self::Target => "start it: farshore target run",
        }
    }

    const fn codes(self) -> (u16, u16) {
        match self {
            Self::Agent => (5902, 5905),
            Self::Target => (5903, 5906),
        }
    }
}

fn unreachable(role: Role, socket: &Path, error: &std::io::Error) -> Problem {
    let (absent, broken) = role.codes();
    let name = role.name();
    let place = socket.display();
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => Problem::harmless(
            absent,
            format!("{name} does not answer"),
            format!("nothing listens on {place}"),
            format!("{}, or give the same --root as the daemon", role.start()),
        ),
        ErrorKind::PermissionDenied => Problem::harmless(
            4901,
            format!("{name} may only be asked by its owner"),
            format!("{place} belongs to another user"),
            "run this as the user of the daemon",
        ),
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Problem::harmless(
            broken,
            format!("{name} did not answer in time"),
            format!("asked on {place}"),
            "look at its log; `farshore status` shows whether it works",
        )
        .with_risk("unknown: the request may still be carried out"),
        _ => Problem::harmless(
            broken,
            format!("{name} closed the connection"),
            format!("{place}: {error}"),
            "look at its log; program and daemon must be of one version",
        )
        .with_risk("unknown: the request may have been carried out"),
    }
}

fn exchange<Q: Serialize, R: DeserializeOwned>(
    role: Role,
    socket: &Path,
    request: &Q,
    limit: Duration,
) -> Result<R, Problem> {
    let run = || -> std::io::Result<Result<R, Problem>> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(ANSWER))?;
        codec::write_message(&mut stream, request)?;
        codec::read_message(&mut stream)
    };
    run().unwrap_or_else(|error| Err(unreachable(role, socket, &error)))
}

/// A connection to the source daemon.
///
/// # Errors
/// FS-5901 when it does not answer, FS-4901 when this user may not ask it.
pub fn filterd(paths: &Paths) -> Result<Client, Problem> {
    Client::connect(&paths.filterd_socket())
}

/// Asks the agent.
///
/// # Errors
/// Its own problem, or 5xxx when it does not answer.
pub fn agent(paths: &Paths, request: &AgentRequest) -> Result<AgentReply, Problem> {
    let limit = if matches!(request, AgentRequest::Tag { .. }) { HOOKS } else { ANSWER };
    exchange(Role::Agent, &paths.agent_socket(), request, limit)
}

/// What the agent says of itself and its volumes.
///
/// # Errors
/// As [`agent`].
pub fn agent_status(paths: &Paths) -> Result<AgentStatus, Problem> {
    match agent(paths, &AgentRequest::Status)? {
        AgentReply::Status(status) => Ok(status),
        AgentReply::Events(_) | AgentReply::Tagged(_) => Err(unexpected(Role::Agent)),
    }
}

/// Asks the target daemon.
///
/// # Errors
/// Its own problem, or 5xxx when it does not answer.
pub fn target(paths: &Paths, request: &TargetRequest) -> Result<TargetReply, Problem> {
    // Tagging waits for the source and for the disk.
    let limit = match request {
        TargetRequest::Tag { kind: PointKind::App, .. } => HOOKS,
        TargetRequest::Tag { .. } => ANSWER * 4,
        _ => ANSWER,
    };
    exchange(Role::Target, &paths.target_socket(), request, limit)
}

/// An answer of another kind than the question: versions differ.
#[must_use]
pub fn unexpected(role: Role) -> Problem {
    Problem::harmless(
        5907,
        format!("{} gave an answer of the wrong kind", role.name()),
        "program and daemon are of different versions",
        "restart the daemon with this program",
    )
    .with_risk("unknown: the request may have been carried out")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_daemon_is_named_with_the_command_that_starts_it() {
        let paths = Paths::under(Path::new("/nonexistent-for-this-test"));
        let problem = target(&paths, &TargetRequest::Status).unwrap_err();
        assert_eq!(problem.code.0, 5903);
        assert!(problem.next.contains("farshore target run"));
    }
}
