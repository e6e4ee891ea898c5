//! The two-host example of the README, word for word, typed at the terminals of two machines that a
//! cable joins; and what the example promises is there.

use std::path::Path;
use std::time::Duration;

use crate::Scenario;
use crate::image::Disk;
use crate::machine::Machine;
use crate::runner::{Lab, STABLE};

pub const SCENARIO: Scenario = Scenario {
    name: "readme::the_two_host_example_works_as_it_is_printed",
    kernel: STABLE,
    soak: false,
    run: the_two_host_example_works_as_it_is_printed,
};

const LIMIT: Duration = Duration::from_secs(120);
/// In the README, in place of what only a real run knows.
const A_TOKEN: &str = "fs1.eyJhIjoi...";
const A_TIME: &str = "2026-11-21 10:14:07";

/// A host and a command to type there.
struct Line {
    host: &'static str,
    command: String,
}

/// The commands of the section "Two hosts", in their order.
fn example() -> Vec<Line> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let text = std::fs::read_to_string(path).expect("README.md");
    let start = text.find("## Two hosts").expect("the section");
    let section = text[start + 3..].split("\n## ").next().expect("a section");
    let typed = section.lines().filter_map(|line| {
        ["backup", "db1"].into_iter().find_map(|host| {
            let command = line.strip_prefix(host)?.strip_prefix("# ")?;
            Some(Line { host, command: command.to_owned() })
        })
    });
    typed.collect()
}

/// Two hosts and what was learned on the way.
struct Hosts {
    backup: Machine,
    db1: Machine,
    token: String,
    time: String,
}

impl Hosts {
    fn boot(lab: &Lab) -> Result<Self, String> {
        let mut hosts = Self {
            backup: lab.boot_joined("backup", &[], 0, "192.0.2.10/24")?,
            db1: lab.boot_joined("db1", &[Disk::new("pgdata", 64)], 1, "192.0.2.1/24")?,
            token: String::new(),
            time: String::new(),
        };
        let bin = crate::harness::farshore_bin();
        for host in ["backup", "db1"] {
            // Installed, with its files on a real file system.
            hosts.sh(host, &format!("ln -s '{}' /usr/local/bin/farshore", bin.display()))?;
            let state = "mkdir -p /vm/scratch/state /var/lib/farshore";
            hosts.sh(
                host,
                &format!("{state} && mount --bind /vm/scratch/state /var/lib/farshore"),
            )?;
        }
        hosts.sh("db1", "[ -b /dev/vdb ]")?;
        Ok(hosts)
    }

    fn sh(&mut self, host: &str, script: &str) -> Result<String, String> {
        let machine = if host == "backup" { &mut self.backup } else { &mut self.db1 };
        let step = machine.start(&format!("{host}# {script}"), script, LIMIT);
        machine.finish(&step)
    }

    /// Types a command at a terminal and answers its question with yes.
    fn type_in(&mut self, line: &Line) -> Result<String, String> {
        let command = line.command.replace(A_TOKEN, &self.token).replace(A_TIME, &self.time);
        if command.trim_end().ends_with('&') {
            return self.sh(line.host, &command);
        }
        let quoted = command.replace('\'', r"'\''");
        let said = self.sh(line.host, &format!("echo y | script -qec '{quoted}' /dev/null"))?;
        if let Some(token) = said.split_whitespace().find(|w| w.starts_with("fs1.")) {
            token.clone_into(&mut self.token);
        }
        Ok(said)
    }

    /// Writes a word into a file on the protected volume and has a point cut after it.
    fn write(&mut self, letters: &str) -> Result<(), String> {
        let mounted = "[ -b /dev/farshore/pgdata ] && mountpoint -q /mnt";
        self.sh("db1", &format!("{mounted} && echo {letters} > /mnt/file && sync -f /mnt"))?;
        let tag = format!("farshore point tag pgdata --name {letters}");
        self.sh("backup", &format!("until {tag}; do sleep 1; done"))?;
        Ok(())
    }
}

fn the_two_host_example_works_as_it_is_printed(lab: &Lab) -> Result<(), String> {
    let lines = example();
    let mut hosts = Hosts::boot(lab)?;
    let mut opened = String::new();
    let (mut written, mut looked) = (false, false);
    for line in &lines {
        if line.host == "db1" && line.command.starts_with("farshore protect") {
            // The agent and filterd were started in the background a moment ago.
            hosts.sh("db1", "until farshore status; do sleep 1; done")?;
        }
        if line.host == "backup" && line.command.starts_with("farshore token") {
            hosts.sh("backup", "until farshore status; do sleep 1; done")?;
        }
        if line.host == "backup" && line.command.starts_with("farshore status") {
            hosts.write("one")?;
            hosts.time = hosts.sh("backup", "sleep 1; date '+%F %T'; sleep 1")?.trim().to_owned();
            hosts.write("two")?;
            written = true;
        }
        let said = hosts.type_in(line)?;
        if line.command.starts_with("farshore failover test") {
            let start = said.find("nbd+unix://").ok_or(format!("no address:\n{said}"))?;
            let address = said[start..].split_whitespace().next().unwrap_or_default();
            opened = address.trim_matches(['\'', '"']).to_owned();
        }
        if line.host == "backup" && line.command.starts_with("mount") {
            let found = hosts.sh("backup", "mountpoint -q /mnt && cat /mnt/file")?;
            looked = true;
            if found.trim() != "one" {
                return Err(format!("at {} the volume held {found:?}", hosts.time));
            }
        }
    }
    if !written || !looked || opened.is_empty() {
        return Err("the example of the README opens no point".into());
    }
    match hosts.sh("backup", &format!("nbdinfo '{opened}'")) {
        Ok(said) => Err(format!("the view is still there after the last command:\n{said}")),
        Err(_) => Ok(()),
    }
}
