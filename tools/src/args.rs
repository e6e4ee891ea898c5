//! What can be typed. Owns the grammar and the dispatch to the commands; no command's work.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};
use farshore_extent::{Problem, VolumeName};
use farshore_protocol::paths::Paths;

use crate::exit::{Exit, Failure};
use crate::output::Out;
use crate::units::{Interval, parse_bytes};
use crate::{
    check, compare, demo, doctor, explain, extract, failover, hosts, jobs, journal, points, policy,
    protect, roles, scrub, status, store, volume,
};

/// Continuous disaster recovery of block devices: every second of the past as a disk.
#[derive(Debug, Parser)]
#[command(name = "farshore", version, propagate_version = true, arg_required_else_help = true)]
#[command(after_help = "Begin with `farshore demo`: every role on this machine, no root needed.")]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Everywhere")]
pub struct Global {
    /// Keep configuration, state and sockets under DIR instead of /etc, /var/lib and /run
    #[arg(long, global = true, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Print results, and errors, as versioned JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// Show what would be done, and what stands in the way; change nothing
    #[arg(long, global = true)]
    pub dry_run: bool,
    /// Do not ask
    #[arg(long, short, global = true)]
    pub yes: bool,
    /// Configuration file of the role, instead of the usual one
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// No hints and no progress
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// More detail; twice for debugging
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// End when the process that started this one ends (used by the demo and by tests)
    #[arg(long, global = true, hide = true)]
    pub die_with_parent: bool,
}

impl Global {
    /// Where everything lives.
    pub fn paths(&self) -> Paths {
        self.root.as_deref().map_or_else(Paths::system, |root| {
            Paths::under(&std::path::absolute(root).unwrap_or_else(|_| root.to_path_buf()))
        })
    }
}

/// The commands, daily ones first.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show every role at work on this machine, and prove the result
    Demo(demo::DemoArgs),
    /// State of every protected volume: RPO now, oldest point, last drill
    Status(status::StatusArgs),
    /// Start protecting a block device or a raw image file
    Protect(protect::ProtectArgs),
    /// Stop protecting; the disk keeps its content, the replica its points
    Unprotect(protect::UnprotectArgs),
    /// Compare a volume with its replica; report what differs, repair nothing
    Verify(compare::VerifyArgs),
    /// Compare a volume with its replica and send what differs
    Resync(compare::ResyncArgs),
    /// Read and verify everything that a replica keeps (on the target host)
    Scrub(scrub::ScrubArgs),
    /// Change a protected volume while it is in use
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Points of the past that can be opened
    #[command(subcommand)]
    Point(points::PointCommand),
    /// Which points stay, and how long
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Open a point as a disk: to try it, or to go on from it
    #[command(subcommand)]
    Failover(failover::FailoverCommand),
    /// Long work of the target: what goes on, and how it ended
    #[command(subcommand)]
    Job(jobs::JobCommand),
    /// Monitoring plug-in: 0 ok, 1 warning, 2 critical, 3 unknown
    Check(check::CheckArgs),
    /// Every prerequisite of this host's roles, each with the command that mends it
    Doctor(doctor::DoctorArgs),
    /// What an error code means and what to do
    Explain {
        /// Such as FS-4012; without one, every code
        code: Option<String>,
    },
    /// Recent events, newest first
    #[command(subcommand)]
    Event(hosts::EventCommand),
    /// Hosts that replicate to this target
    #[command(subcommand)]
    Host(hosts::HostCommand),
    /// One-time tokens with which a source host enrols (on the target host)
    #[command(subcommand)]
    Token(hosts::TokenCommand),
    /// Enrol this host with a target (on the source host)
    Enroll(roles::EnrollArgs),
    /// The target host: set it up, run it
    #[command(subcommand)]
    Target(roles::TargetCommand),
    /// Run the source daemon that holds the protected volumes
    Filterd,
    /// Run the agent that ships changes to the target
    Agent,
    /// Run the role that makes applications quiet for a point (on the source host)
    Freezer,
    /// Copy a point out of a replica's folder, without daemons, catalogue or network
    Extract(extract::ExtractArgs),
    /// Verify a replica's folder
    #[command(subcommand)]
    Store(store::StoreCommand),
    /// Look into a replica's journal
    #[command(subcommand)]
    Journal(journal::JournalCommand),
    /// Configuration of this host
    #[command(subcommand)]
    Config(roles::ConfigCommand),
    /// Shell completion, to be sourced
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// Parses; help, version and usage errors are printed here and end the program.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, Exit> {
    let args: Vec<OsString> = args.into_iter().collect();
    let error = match Cli::try_parse_from(&args) {
        Ok(cli) => return Ok(cli),
        Err(error) => error,
    };
    let shown = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    if shown || !args.iter().any(|arg| arg == "--json") {
        // A closed pipe is no reason to fail here.
        let _ = error.print();
        return Err(if shown { Exit::Ok } else { Exit::Usage });
    }
    let text = error.to_string();
    let what = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
    let problem =
        Problem::harmless(1901, what, "the command line is not understood", "farshore help");
    Out::new(&Global { json: true, ..Global::default() }).failure(&Failure::from(problem));
    Err(Exit::Usage)
}

/// Does what was asked.
pub fn dispatch(cli: &Cli, out: &Out) -> Result<Exit, Failure> {
    let global = &cli.global;
    match &cli.command {
        Command::Demo(args) => demo::run(args, out),
        Command::Status(args) => status::run(args, global, out),
        Command::Protect(args) => protect::protect(args, global, out),
        Command::Unprotect(args) => protect::unprotect(args, global, out),
        Command::Verify(args) => compare::verify(args, global, out),
        Command::Resync(args) => compare::resync(args, global, out),
        Command::Scrub(args) => scrub::run(args, global, out),
        Command::Volume(command) => volume::run(command, global, out),
        Command::Point(command) => points::run(command, global, out),
        Command::Policy(command) => policy::run(command, global, out),
        Command::Failover(command) => failover::run(command, global, out),
        Command::Job(command) => jobs::run(command, global, out),
        Command::Check(args) => check::run(args, global, out),
        Command::Doctor(args) => doctor::run(args, global, out),
        Command::Explain { code } => explain::run(code.as_deref(), out),
        Command::Event(command) => hosts::events(command, global, out),
        Command::Host(command) => hosts::hosts(command, global, out),
        Command::Token(command) => hosts::tokens(command, global, out),
        Command::Enroll(args) => roles::enroll(args, global, out),
        Command::Target(command) => roles::target(command, global, out),
        Command::Filterd => roles::filterd(global),
        Command::Agent => roles::agent(global),
        Command::Freezer => roles::freezer(global),
        Command::Extract(args) => extract::run(args, global, out),
        Command::Store(command) => store::run(command, global, out),
        Command::Journal(command) => journal::run(command, global, out),
        Command::Config(command) => roles::config(command, global, out),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "farshore", &mut script);
            out.text(&String::from_utf8_lossy(&script));
            Ok(Exit::Ok)
        }
    }
}

/// A volume's name as an argument: the rule is told when it is broken.
pub fn volume_name(text: &str) -> Result<VolumeName, String> {
    VolumeName::new(text).map_err(|e| e.to_string())
}

/// A time span as an argument (`30s`, `5m`, `off`).
pub fn interval(text: &str) -> Result<Interval, String> {
    text.parse()
}

/// A size as an argument (`256MiB`).
pub fn bytes(text: &str) -> Result<u64, String> {
    parse_bytes(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("farshore").chain(line.split(' ')))
    }

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_lines_of_the_documentation_are_understood() {
        for line in [
            "demo --seconds 5 --size 64MiB --keep /tmp/x",
            "target init --data /srv/farshore --listen :9443",
            "target run",
            "target seed /mnt/usb/pgdata.img --host db1 --name pgdata",
            "protect /dev/vdb --name pgdata --seeded --start-at now",
            "token create --for db1 --address backup:9443",
            "enroll fs1.eyJhIjoi",
            "protect /dev/vdb --name pgdata --policy 30s --dry-run",
            "protect /dev/vdb --name pgdata --yes",
            "protect /dev/vdb --name pgdata --start-at 22:30",
            "unprotect pgdata --yes",
            "verify pgdata --rate 40MiB --wait",
            "verify pgdata --stop",
            "resync pgdata --yes --wait",
            "volume grow pgdata --dry-run",
            "status --watch",
            "status --json --root /tmp/x",
            "point list pgdata --limit 5 --json",
            "point tag shop pgdata --app --name before-upgrade",
            "policy list",
            "policy show pgdata --json",
            "policy set pgdata all:1h,1m:24h,1h:7d --preview",
            "policy set pgdata every-30s-4h --dry-run",
            "policy set pgdata default --every 5s --yes",
            "failover test shop --point app",
            "failover test shop --point tag:NAME --tls 0.0.0.0:10809",
            "failover test shop --device --read-only",
            "failover cleanup",
            "failover cleanup shop --note fine",
            "failover list",
            "failover unplanned shop --point latest --dry-run",
            "failover unplanned shop --point lsn:3.1042 --device --yes",
            "failover show shop --json",
            "failover cancel shop --yes --no-wait",
            "job list --json",
            "job wait j-88",
            "volume unfence shop --yes",
            "journal inspect pgdata",
            "extract /srv/volumes/x --list --json",
            "extract /srv/volumes/x --point newest --to disk.img --verify",
            "extract /srv/volumes/x --point lsn:3.12 --to /dev/sdb --damaged zero --yes",
            "store check /srv/volumes/x --json",
            "host list",
            "event list --limit 3",
            "check --rpo 30s",
            "doctor",
            "doctor --source --json",
            "explain FS-4012",
            "completion bash",
            "config check",
        ] {
            assert!(args(line).is_ok(), "{line}: {}", args(line).unwrap_err());
        }
        for wrong in [
            "",
            "protect",
            "protect /dev/vdb",
            "protect x --name a_b",
            "status extra",
            "extract x",
            "extract x --list --to y",
        ] {
            assert!(args(wrong).is_err(), "{wrong}");
        }
    }
}
