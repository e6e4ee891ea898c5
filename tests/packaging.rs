//! What a distribution installs beside the executable: units and rules that systemd and udev accept.

mod harness;

use std::path::{Path, PathBuf};

use harness::{farshore_bin, run, said};

const UNITS: [&str; 4] = [
    "farshore-filterd.service",
    "farshore-agent.service",
    "farshore-target.service",
    "farshore-freezer.service",
];

fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tools").join(path)
}

/// The units with the executable under test in place of the installed one.
fn units() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temporary folder");
    let bin = farshore_bin().canonicalize().expect("the executable");
    for unit in UNITS {
        let text = std::fs::read_to_string(source("systemd").join(unit)).expect("unit");
        assert!(text.contains("ExecStart=/usr/bin/farshore "), "{unit}");
        let text = text.replace("/usr/bin/farshore", bin.to_str().expect("UTF-8"));
        std::fs::write(dir.path().join(unit), text).expect("unit");
    }
    dir
}

#[test]
fn systemd_finds_nothing_to_say_about_the_units() {
    let dir = units();
    for unit in UNITS {
        let path = dir.path().join(unit);
        let out = run("systemd-analyze", &["verify", path.to_str().expect("path")]);
        let complaints = said(&out);
        // Units of the machine itself are not ours to mend.
        let ours: Vec<&str> = complaints.lines().filter(|l| l.contains("farshore")).collect();
        assert!(ours.is_empty(), "{unit}: {ours:#?}");
    }
}

#[test]
fn a_unit_never_gives_filterd_a_mount_namespace_or_keeps_block_devices_from_it() {
    let text = std::fs::read_to_string(source("systemd/farshore-filterd.service")).expect("unit");
    let settings: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
    for forbidden in ["Private", "Protect", "ReadOnly", "ReadWrite", "Temporary", "Bind", "Device"]
    {
        let found = settings.iter().find(|l| l.starts_with(forbidden));
        assert!(found.is_none(), "{found:?}");
    }
    // At a shutdown these stop filterd before what lies on its volumes is unmounted.
    for stops in ["Requires", "BindsTo=", "PartOf=", "Conflicts=", "StateDirectory="] {
        let found = settings.iter().find(|l| l.starts_with(stops));
        assert!(found.is_none(), "{found:?}");
    }
    for needed in ["Restart=always", "RestartSec=100ms", "StartLimitIntervalSec=0"] {
        assert!(settings.contains(&needed), "{needed}");
    }
}

#[test]
fn a_unit_never_takes_the_freezers_mounts_or_kills_its_watchdog() {
    let text = std::fs::read_to_string(source("systemd/farshore-freezer.service")).expect("unit");
    let settings: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
    for forbidden in ["Private", "Protect", "ReadOnly", "ReadWrite", "Temporary", "Bind"] {
        let found = settings.iter().find(|l| l.starts_with(forbidden));
        assert!(found.is_none(), "{found:?}");
    }
    for needed in ["KillMode=process", "Restart=always", "StartLimitIntervalSec=0"] {
        assert!(settings.contains(&needed), "{needed}");
    }
}
