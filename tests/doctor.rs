//! `farshore doctor` beside real daemons: what is well, what is not, and that nothing hangs it.

mod harness;

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use harness::{Daemon, Site, said};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// The findings, and the exit code.
fn doctor(site: &Site, args: &[&str]) -> (Vec<Value>, i32) {
    let out = site.try_cli(&[&["doctor", "--json"], args].concat());
    let document: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| {
        panic!("no document: {e}\n{}", said(&out));
    });
    assert_eq!(document["schema"], "farshore.doctor/1");
    let findings = document["doctor"]["findings"].as_array().expect("findings").clone();
    for finding in &findings {
        let ok = finding["state"] == "ok";
        assert_eq!(ok, finding["fix"].is_null(), "each line that is not ok has a fix: {finding}");
    }
    (findings, out.status.code().expect("an exit code"))
}

fn find<'a>(findings: &'a [Value], area: &str, check: &str) -> &'a Value {
    let found = findings.iter().find(|f| f["area"] == area && f["check"] == check);
    found.unwrap_or_else(|| panic!("no line {area} {check} in {findings:#?}"))
}

fn freeze(daemon: &Daemon, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(daemon.pid()).expect("pid"));
    kill(pid, signal).expect("the daemon runs");
}

#[test]
fn a_working_host_is_found_well_and_what_breaks_is_named_with_its_cure() {
    let site = Site::new();
    let daemons = site.start_all();
    site.protect("pgdata", 16 << 20, "1s");
    site.wait_protected("pgdata");
    let (well, _) = doctor(&site, &[]);
    for (area, check) in [
        ("source", "filterd"),
        ("source", "agent"),
        ("source", "identity"),
        ("source", "certificate"),
        ("source", "link"),
        ("source", "host key"),
        ("source", "volume pgdata"),
        ("target", "target"),
        ("target", "authority"),
        ("target", "authority keys"),
        ("target", "settings"),
    ] {
        let finding = find(&well, area, check);
        assert_eq!(finding["state"], "ok", "{finding}\n{}", site.logs());
    }
    assert!(site.agent_status().expect("the agent").connected, "knocking disturbs no session");
    let events = site.cli(&["event", "list"]);
    assert!(!events.contains("refused"), "knocking is no event:\n{events}");

    let key = site.paths.state.join("agent/identity.json");
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o644)).expect("chmod");
    let (open, code) = doctor(&site, &["--source"]);
    assert_eq!((code, &find(&open, "source", "host key")["state"]), (1, &Value::from("problem")));
    assert!(open.iter().all(|f| f["area"] != "target"), "only what was asked for");
    let fix = find(&open, "source", "host key")["fix"].as_str().expect("a fix").to_owned();
    assert!(Command::new("sh").args(["-c", &fix]).status().expect("sh").success(), "{fix}");
    let (closed, _) = doctor(&site, &["--source"]);
    assert_eq!(find(&closed, "source", "host key")["state"], "ok");

    daemons.agent.kill();
    let (gone, code) = doctor(&site, &[]);
    let agent = find(&gone, "source", "agent");
    assert_eq!((code, agent["code"].as_str()), (1, Some("FS-5902")), "{agent}");
    assert!(agent["fix"].as_str().is_some_and(|fix| fix.ends_with(" agent &")), "{agent}");
}

#[test]
fn daemons_that_hang_cost_their_lines_and_not_the_report() {
    let site = Site::new();
    let daemons = site.start_all();
    freeze(&daemons.filterd, Signal::SIGSTOP);
    freeze(&daemons.target, Signal::SIGSTOP);
    let started = Instant::now();
    let (findings, code) = doctor(&site, &[]);
    let took = started.elapsed();
    freeze(&daemons.filterd, Signal::SIGCONT);
    freeze(&daemons.target, Signal::SIGCONT);
    assert!(took < Duration::from_secs(30), "it took {took:?}");
    assert_eq!(code, 1);
    for (area, check) in [("source", "filterd"), ("target", "target"), ("source", "link")] {
        assert_eq!(find(&findings, area, check)["state"], "problem", "{findings:#?}");
    }
    assert_eq!(find(&findings, "source", "identity")["state"], "ok", "others are still looked at");
    assert_eq!(find(&findings, "host", "kernel")["state"], "ok");
}
