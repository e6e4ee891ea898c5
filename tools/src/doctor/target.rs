//! A target: what the target daemon needs.

use std::path::{Path, PathBuf};

use farshore_extent::WallTime;
use farshore_protocol::admin::ReplicaStatus;
use farshore_protocol::paths::Paths;
use farshore_target::authority;
use farshore_target::config::Config;

use super::certificate::{Certificate, valid};
use super::daemons::{Answers, TARGET, answers, farshore, is_system, process};
use super::finding::Finding;
use super::host::Host;
use super::source::unreadable;
use super::{places, process as limits, system};

const DAY: i64 = 86_400;

/// The daemon and what it may use.
pub fn daemons(host: &Host, paths: &Paths, asked: &Answers) -> Vec<Finding> {
    let target = process(&paths.target_socket(), TARGET);
    let mut found = vec![
        answers(TARGET, paths, &asked.target, |replicas: &Vec<ReplicaStatus>| {
            let listen = std::fs::read_to_string(paths.run.join("target.listen"));
            let listen = listen.unwrap_or_else(|_| "?".into());
            format!("answers, {} replicas, agents connect to {}", replicas.len(), listen.trim())
        }),
        limits::target_files(host, &target),
    ];
    if is_system(paths) {
        let check = "target service".to_owned();
        found.push(Finding { check, ..system::unit(host, TARGET.unit) });
    }
    found
}

/// The data directory, the keys and the certificates.
pub fn files(paths: &Paths, now: WallTime) -> Vec<Finding> {
    let check = "data";
    if let Some(hidden) = unreadable(check, &Config::file(paths)) {
        return vec![hidden];
    }
    let config = match Config::load(paths) {
        Ok(config) => config,
        Err(problem) => {
            let init = farshore(paths) + " target init --data /srv/farshore --listen :9443";
            let fix = if problem.code.0 == 6501 { init } else { format!("# {}", problem.next) };
            return vec![Finding { fix: Some(fix), ..Finding::said(check, &problem) }];
        }
    };
    let data = config.data_dir(paths);
    let mut found = vec![places::space(data.path(), places::DATA)];
    let keys = authority::key_files(&data.ca());
    found.extend(places::keys("authority keys", &keys));
    if let Some(hidden) = unreadable("authority", &data.ca().join("ca.pem")) {
        found.push(hidden);
        return found;
    }
    match authority::validity(&data.ca()) {
        Ok(validity) => found.extend(certificates(validity, now)),
        Err(problem) => found.push(Finding::said("authority", &problem)),
    }
    found
}

fn certificates(validity: authority::Validity, now: WallTime) -> [Finding; 2] {
    let restart = format!("systemctl restart {}   # its start renews the certificate", TARGET.unit);
    let server = Certificate {
        check: "certificate",
        validity: validity.server,
        renewed: 30 * DAY,
        fix: &restart,
    };
    let ca = Certificate {
        check: "authority",
        validity: validity.ca,
        renewed: 365 * DAY,
        fix: "farshore target init   # with another --root: a new authority; enrol every host anew",
    };
    [valid(&ca, now), valid(&server, now)]
}

/// Configuration files of a target.
pub fn is_ours(file: &Path) -> bool {
    file.file_name().is_some_and(|n| n == "target.toml")
}

/// What only a target has.
pub fn traces(paths: &Paths) -> [PathBuf; 3] {
    [Config::file(paths), paths.state.join("target"), paths.target_socket()]
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::*;

    #[test]
    fn a_target_that_was_never_set_up_is_told_how() {
        let root = tempfile::tempdir().unwrap();
        let found = files(&Paths::under(root.path()), WallTime::now());
        assert_eq!((found.len(), found[0].state), (1, State::Problem));
        assert!(found[0].fix.as_ref().unwrap().contains(" target init --data"));
    }

    #[test]
    fn a_fresh_target_has_valid_certificates_and_private_keys() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::under(root.path());
        farshore_target::init(&paths, &farshore_target::InitOptions::default()).unwrap();
        let found = files(&paths, WallTime::now());
        let of = |check: &str| found.iter().find(|f| f.check == check).unwrap();
        for check in ["authority keys", "authority", "certificate"] {
            assert_eq!(of(check).state, State::Ok, "{:?}", of(check));
        }
        let in_21_years =
            WallTime::from_nanos(WallTime::now().nanos() + 21 * 365 * DAY * 1_000_000_000);
        let late = files(&paths, in_21_years);
        assert_eq!(late.iter().filter(|f| f.state == State::Problem).count(), 2);
    }
}
