//! The daemons of this host: do they answer, which process are they, what do they say of volumes.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use farshore_extent::{PairState, Problem, WallTime};
use farshore_protocol::admin::{TargetReply, TargetRequest};
use farshore_protocol::paths::Paths;
use nix::sys::socket::{getsockopt, sockopt};

use super::bounded::{Pending, begin};
use super::finding::{Area, Finding};
use super::process::Process;
use crate::rpc::{self, Role};
use crate::status::{Row, Sides, merge};
use crate::units;

/// One daemon: its unit, and how it is started without systemd.
#[derive(Debug, Clone, Copy)]
pub struct Daemon {
    /// Name of its line.
    pub check: &'static str,
    /// Systemd unit.
    pub unit: &'static str,
    /// Words of the command line that run it.
    command: &'static str,
}

/// The source daemon.
pub const FILTERD: Daemon =
    Daemon { check: "filterd", unit: "farshore-filterd.service", command: "filterd" };
/// The agent.
pub const AGENT: Daemon =
    Daemon { check: "agent", unit: "farshore-agent.service", command: "agent" };
/// The target daemon.
pub const TARGET: Daemon =
    Daemon { check: "target", unit: "farshore-target.service", command: "target run" };

/// What a daemon answered; none when it took too long.
pub type Answer<T> = Option<Result<T, Problem>>;

/// What all answered.
pub struct Answers {
    /// The source daemon's volumes, and its process.
    pub filterd: Answer<Vec<farshore_blkfilter::control::VolumeStatus>>,
    /// The agent's state.
    pub agent: Answer<farshore_protocol::admin::AgentStatus>,
    /// The target's replicas.
    pub target: Answer<Vec<farshore_protocol::admin::ReplicaStatus>>,
}

impl Answers {
    /// Asks all of them side by side.
    pub fn ask(paths: &Paths, deadline: Instant) -> Self {
        let asked = |paths: &Paths| paths.clone();
        let (a, b, c) = (asked(paths), asked(paths), asked(paths));
        let filterd = begin(move || rpc::filterd(&a)?.list());
        let agent = begin(move || rpc::agent_status(&b));
        let target: Pending<Result<_, Problem>> =
            begin(move || match rpc::target(&c, &TargetRequest::Status)? {
                TargetReply::Status(replicas) => Ok(replicas),
                _ => Err(rpc::unexpected(Role::Target)),
            });
        Self {
            filterd: filterd.by(deadline),
            agent: agent.by(deadline),
            target: target.by(deadline),
        }
    }

    /// One line a volume, one a problem that a daemon names.
    pub fn volumes(&self, paths: &Paths, now: WallTime) -> Vec<Finding> {
        fn said<T: Clone>(answer: &Answer<T>) -> Option<T> {
            answer.as_ref().and_then(|a| a.as_ref().ok()).cloned()
        }
        let sides = Sides {
            filterd: said(&self.filterd),
            agent: said(&self.agent),
            target: said(&self.target),
            silent: Vec::new(),
        };
        let report = merge(&sides, now);
        let area = |source: bool| if source { Area::Source } else { Area::Target };
        let mut found: Vec<Finding> = report
            .volumes
            .iter()
            .map(|row| volume(row, paths).of(area(row.backing.is_some())))
            .collect();
        for trouble in &report.problems {
            let row = report.volumes.iter().find(|r| Some(&r.volume) == trouble.volume.as_ref());
            let name = trouble.volume.as_ref();
            let check = name.map_or("replication".to_owned(), |name| format!("volume {name}"));
            let source = row.is_none_or(|r| r.backing.is_some());
            found.push(Finding::said(&check, &trouble.problem).of(area(source)));
        }
        found
    }
}

/// Whether it answers, in `words` when it does.
pub fn answers<T>(
    daemon: Daemon,
    paths: &Paths,
    answer: &Answer<T>,
    words: impl FnOnce(&T) -> String,
) -> Finding {
    let check = daemon.check;
    match answer {
        Some(Ok(answer)) => Finding::ok(check, words(answer)),
        Some(Err(problem)) if matches!(problem.code.0, 5901..=5903) => {
            Finding { fix: Some(daemon.start(paths)), ..Finding::said(check, problem) }
        }
        Some(Err(problem)) => Finding::said(check, problem),
        None => {
            Finding::problem(check, "it takes connections and does not answer", daemon.log(paths))
        }
    }
}

impl Daemon {
    /// The command that starts it.
    fn start(self, paths: &Paths) -> String {
        let (unit, by_hand) = (self.unit, format!("{} {}", farshore(paths), self.command));
        if is_system(paths) {
            format!("systemctl start {unit}   # without systemd: {by_hand}")
        } else {
            format!("{by_hand} &")
        }
    }

    /// The command that shows what it says.
    fn log(self, paths: &Paths) -> String {
        if is_system(paths) {
            format!("journalctl -u {} -n 50", self.unit)
        } else {
            "# look at its standard error".to_owned()
        }
    }
}

/// Whether the daemons are those of the system, and not of a `--root` of somebody's.
pub fn is_system(paths: &Paths) -> bool {
    *paths == Paths::system()
}

/// How the program is called for these paths.
pub fn farshore(paths: &Paths) -> String {
    match paths.etc.parent() {
        Some(root) if !is_system(paths) => format!("farshore --root {}", root.display()),
        _ => "farshore".to_owned(),
    }
}

/// The process behind a socket, or else this one.
pub fn process(socket: &Path, daemon: Daemon) -> Process {
    let peer = UnixStream::connect(socket).ok();
    let pid = peer.and_then(|s| getsockopt(&s, sockopt::PeerCredentials).ok()).map(|c| c.pid());
    let id = pid.map_or("self".to_owned(), |pid| pid.to_string());
    Process { id, unit: daemon.unit, daemon: pid.is_some() }
}

fn volume(row: &Row, paths: &Paths) -> Finding {
    let status = format!("{} status", farshore(paths));
    let check = format!("volume {}", row.volume);
    let rpo = row.rpo_ms.map(std::time::Duration::from_millis);
    let rpo = rpo.map_or("no point yet".to_owned(), |rpo| format!("RPO {}", units::span(rpo)));
    let text = format!("{}, {rpo}", row.state.as_str());
    match row.state {
        PairState::Protected | PairState::FailedOverPending | PairState::FailedOverCommitted => {
            Finding::ok(&check, text)
        }
        PairState::InitialSync
        | PairState::Lagging
        | PairState::CatchUp
        | PairState::Resync
        | PairState::Paused
        | PairState::Reversing => Finding::warning(&check, text, status + " --watch"),
        PairState::Broken | PairState::Unprotected => Finding::problem(&check, text, status),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::*;
    use crate::status::tests_data::{NOW, sides};

    #[test]
    fn each_volume_has_a_line_and_each_problem_its_code() {
        let sides = sides();
        let answers = Answers {
            filterd: sides.filterd.map(Ok),
            agent: sides.agent.map(Ok),
            target: sides.target.map(Ok),
        };
        let found = answers.volumes(&Paths::system(), NOW);
        let line = |check: &str| found.iter().find(|f| f.check == check).unwrap();
        assert_eq!(line("volume pgdata").state, State::Ok);
        assert_eq!(line("volume pgdata").area, Area::Source);
        assert_eq!(line("volume mail").state, State::Warning);
        assert!(found.iter().any(|f| f.code.is_some() && f.state == State::Problem));
        assert!(found.iter().all(|f| f.fix.is_some() == (f.state != State::Ok)));
    }

    #[test]
    fn silence_is_told_from_absence_and_from_another_owner() {
        let paths = Paths::system();
        let look = |answer: Answer<()>| answers(AGENT, &paths, &answer, |()| "answers".into());
        assert_eq!(look(Some(Ok(()))).state, State::Ok);
        let own = Paths::under(Path::new("/nonexistent"));
        let absent = rpc::agent_status(&own).map(drop);
        let by_hand = answers(AGENT, &own, &Some(absent.clone()), |()| String::new());
        assert_eq!(by_hand.fix.unwrap(), "farshore --root /nonexistent agent &");
        assert!(look(Some(absent)).fix.unwrap().starts_with("systemctl start farshore-agent"));
        let other = Problem::harmless(4901, "no", "another user's", "be that user");
        assert_eq!(look(Some(Err(other))).state, State::Unseen);
        assert!(look(None).fix.unwrap().starts_with("journalctl"));
    }

    #[test]
    fn the_process_behind_a_socket_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        assert!(!process(&socket, AGENT).daemon);
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let found = process(&socket, AGENT);
        assert_eq!((found.daemon, found.id), (true, std::process::id().to_string()));
    }
}
