//! A source: what filterd and the agent need.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use farshore_agent::config::Config;
use farshore_agent::identity::Identity;
use farshore_agent::{Reached, reach};
use farshore_blkfilter::control::VolumeStatus;
use farshore_blkfilter::preflight::{HostRoots, fstab_hints};
use farshore_extent::{Problem, WallTime};
use farshore_protocol::paths::Paths;

use super::certificate::{Certificate, valid};
use super::daemons::{AGENT, Answers, FILTERD, answers, farshore, is_system, process};
use super::finding::Finding;
use super::host::Host;
use super::{places, process as limits, system};
use crate::filterd_file;
use crate::units;

/// Longest wait for the target.
const REACH: Duration = Duration::from_secs(4);

/// Daemons and what they may use.
pub fn daemons(host: &Host, paths: &Paths, asked: &Answers) -> Vec<Finding> {
    let filterd = process(&paths.filterd_socket(), FILTERD);
    let mut found = vec![
        answers(FILTERD, paths, &asked.filterd, |v: &Vec<VolumeStatus>| {
            format!("answers, {}", counted(v.len()))
        }),
        answers(AGENT, paths, &asked.agent, |status| {
            let word = if status.connected { "connected to" } else { "not connected to" };
            format!("answers, {word} {}", status.target)
        }),
        limits::privileges(host, &filterd),
        limits::locked_memory(host, &filterd),
        limits::source_files(host, &filterd),
        limits::memory(host, pools(paths, asked)),
    ];
    if is_system(paths) {
        for daemon in [FILTERD, AGENT] {
            let check = format!("{} service", daemon.check);
            found.push(Finding { check, ..system::unit(host, daemon.unit) });
        }
    }
    found
}

fn counted(volumes: usize) -> String {
    if volumes == 1 { "1 volume".into() } else { format!("{volumes} volumes") }
}

/// Bytes of pools: those of the volumes, or of the first one there will be.
fn pools(paths: &Paths, asked: &Answers) -> u64 {
    let running = match &asked.filterd {
        Some(Ok(volumes)) => volumes.iter().map(|v| v.pool_bytes).sum(),
        _ => 0,
    };
    let usual = filterd_file::load(paths).map_or(256 << 20, |config| config.pool_bytes);
    running.max(usual)
}

/// Volumes on record that filterd does not serve.
pub fn unserved(paths: &Paths, asked: &Answers) -> Vec<Finding> {
    let Some(Ok(served)) = &asked.filterd else { return Vec::new() };
    let directory = paths.state.join("filterd/volumes");
    let entries = std::fs::read_dir(&directory);
    let files = entries.into_iter().flatten().flatten().map(|entry| entry.path());
    let records = files.filter(|file| file.extension().is_some_and(|e| e == "json"));
    records
        .filter(|file| {
            let id = file.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
            !served.iter().any(|v| v.info.volume.to_string() == id)
        })
        .map(|file| {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            let record: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
            let field = |name: &str| record[name].as_str().unwrap_or("?").to_owned();
            let (name, backing) = (field("name"), field("backing"));
            Finding::problem(
                &format!("volume {name}"),
                format!("on record and not served: filterd could not open {backing} at its start"),
                format!("ls -l {backing} && systemctl restart {}", FILTERD.unit),
            )
        })
        .collect()
}

/// Ways past the filter that the next boot would take.
pub fn origins(asked: &Answers) -> Vec<Finding> {
    let Some(Ok(volumes)) = &asked.filterd else { return Vec::new() };
    let roots = HostRoots::default();
    let of_one = |v: &VolumeStatus| fstab_hints(&roots, &v.info.name, &v.info.backing);
    let all = volumes.iter().flat_map(of_one);
    all.map(|hint| Finding::warning("origin", hint.what, hint.next)).collect()
}

/// The state directories and who may read what is secret.
pub fn files(paths: &Paths) -> Vec<Finding> {
    let mut found = vec![places::space(&paths.state, places::STATE)];
    found.extend(places::keys("host key", &[Identity::file(paths)]));
    found
}

/// Who this host is, and whether the target agrees.
pub fn enrolment(paths: &Paths, now: WallTime) -> Vec<Finding> {
    if let Some(hidden) = unreadable("identity", &Identity::file(paths)) {
        return vec![hidden];
    }
    let identity = match Identity::load(paths) {
        Ok(identity) => identity,
        Err(problem) => {
            let again =
                "farshore token create --for HOST   # on the target; here: farshore enroll TOKEN";
            return vec![Finding {
                fix: Some(again.into()),
                ..Finding::said("identity", &problem)
            }];
        }
    };
    let mut found = vec![Finding::ok("identity", format!("{} ({})", identity.name, identity.host))];
    found.push(match identity.validity() {
        Ok((from, to)) => {
            let ended = now.nanos() / 1_000_000_000 >= to;
            let restart = format!("systemctl restart {}   # it renews while connected", AGENT.unit);
            let fix = &if ended { enroll(paths) } else { restart };
            let validity = (from, to);
            // The agent renews when a third is left.
            let renewed = (to - from) / 3 - 86_400;
            valid(&Certificate { check: "certificate", validity, renewed, fix }, now)
        }
        Err(problem) => Finding::said("certificate", &problem),
    });
    found.push(match Config::load(paths) {
        Ok(config) => link(&config, knock(&config, &identity)),
        Err(problem) => Finding::said("link", &problem),
    });
    found
}

fn enroll(paths: &Paths) -> String {
    let farshore = farshore(paths);
    format!("farshore token create --for HOST   # on the target; here: {farshore} enroll TOKEN")
}

/// A file that is there and may not be read.
pub fn unreadable(check: &str, file: &Path) -> Option<Finding> {
    match std::fs::File::open(file) {
        Err(e) if e.kind() == ErrorKind::PermissionDenied => {
            let text = format!("{} may be read by its owner only", file.display());
            Some(Finding::unseen(check, text, "sudo farshore doctor"))
        }
        _ => None,
    }
}

fn knock(config: &Config, identity: &Identity) -> Result<Reached, Problem> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| crate::roles::no_resources(&e))?;
    let outcome = runtime.block_on(reach(config, identity, REACH));
    // A name server that does not answer must not be waited for.
    runtime.shutdown_background();
    outcome
}

fn link(config: &Config, outcome: Result<Reached, Problem>) -> Finding {
    match outcome {
        Ok(Reached { address, took }) => {
            let took = units::moment(took);
            let by = config.proxy.as_ref().map_or(String::new(), |proxy| format!(" by {proxy}"));
            Finding::ok("link", format!("{address} takes this host's certificate ({took}{by})"))
        }
        Err(problem) => Finding::said("link", &problem),
    }
}

/// Configuration files of a source.
pub fn is_ours(file: &Path) -> bool {
    file.file_name().is_some_and(|n| n != "target.toml")
}

/// What only a source has.
pub fn traces(paths: &Paths) -> [PathBuf; 6] {
    [
        paths.etc.join("agent.toml"),
        paths.etc.join("filterd.toml"),
        paths.state.join("agent"),
        paths.state.join("filterd"),
        paths.agent_socket(),
        paths.filterd_socket(),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::*;

    #[test]
    fn a_host_that_is_not_enrolled_is_told_how() {
        let root = tempfile::tempdir().unwrap();
        let found = enrolment(&Paths::under(root.path()), WallTime::now());
        assert_eq!((found.len(), found[0].state), (1, State::Problem));
        assert!(found[0].fix.as_ref().unwrap().contains("farshore enroll TOKEN"));
    }

    #[test]
    fn a_record_that_nobody_serves_is_a_problem() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::under(root.path());
        let volumes = paths.state.join("filterd/volumes");
        std::fs::create_dir_all(&volumes).unwrap();
        let record = r#"{"name": "pgdata", "backing": "/dev/vdb"}"#;
        std::fs::write(volumes.join("1.json"), record).unwrap();
        let mut asked = Answers { filterd: Some(Ok(Vec::new())), agent: None, target: None };
        let found = unserved(&paths, &asked);
        assert_eq!((found.len(), found[0].check.as_str()), (1, "volume pgdata"));
        assert!(found[0].fix.as_ref().unwrap().contains("/dev/vdb"));
        asked.filterd = None;
        assert!(unserved(&paths, &asked).is_empty(), "without filterd's word nothing is known");
    }

    #[test]
    fn a_target_that_is_not_there_is_found_out_in_time() {
        let problem = Problem::harmless(5101, "cannot be reached", "refused", "check it");
        let found = link(&Config::default(), Err(problem));
        assert_eq!((found.state, found.code.unwrap().0), (State::Problem, 5101));
    }
}
