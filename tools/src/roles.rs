//! The roles a host can have, and setting them up: parses options, starts the daemons of the
//! other crates, and keeps their log on standard error.

use std::path::PathBuf;

use clap::Subcommand;
use farshore_extent::Problem;
use farshore_target::config::Config as TargetConfig;
use farshore_target::{InitOptions, init};

use crate::args::Global;
use crate::exit::{Exit, Failure};
use crate::output::Out;

/// `target …`
#[derive(Debug, Subcommand)]
pub enum TargetCommand {
    /// Make the data directory, the certificate authority and the configuration
    Init {
        /// Where replicas, journals and points are kept
        #[arg(long, value_name = "DIR")]
        data: Option<PathBuf>,
        /// Where agents connect
        #[arg(long, value_name = "ADDRESS:PORT")]
        listen: Option<String>,
        /// Further name or address under which sources reach this machine
        #[arg(long = "name", value_name = "NAME")]
        names: Vec<String>,
    },
    /// Run the target daemon
    Run,
}

/// `config …`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Read every configuration file of this host and say what is wrong
    Check,
}

/// `farshore target …`
pub fn target(command: &TargetCommand, global: &Global, out: &Out) -> Result<Exit, Failure> {
    match command {
        TargetCommand::Init { data, listen, names } => {
            let absolute = |p: &PathBuf| std::path::absolute(p).unwrap_or_else(|_| p.clone());
            let options = InitOptions {
                data: data.as_ref().map(absolute),
                listen: listen.clone(),
                names: names.clone(),
            };
            target_init(&options, global, out)
        }
        TargetCommand::Run => Err(not_yet("target daemon").into()),
    }
}

fn not_yet(what: &str) -> Problem {
    Problem::harmless(1909, format!("this build has no {what}"), "", "")
}

fn target_init(options: &InitOptions, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let paths = global.paths();
    if global.dry_run {
        let data = options.data.clone().unwrap_or_else(|| paths.state.join("target"));
        out.line(format!("would set up a target with its data in {}", data.display()));
        return Ok(Exit::Ok);
    }
    let report = init(&paths, options)?;
    if out.json {
        let report_json = serde_json::json!({
            "created": report.created,
            "data": report.data,
            "config": report.config,
            "listen": report.listen,
            "fingerprint": report.fingerprint.to_string(),
        });
        out.document("farshore.target-init/1", "target", &report_json);
        return Ok(Exit::Ok);
    }
    let word = if report.created { "set up" } else { "is set up already; nothing was changed" };
    out.line(format!("target {word}: data in {}", report.data.display()));
    out.line(format!("  configuration  {}", report.config.display()));
    out.line(format!("  listens on     {}", report.listen));
    out.line(format!("  fingerprint    {}", report.fingerprint));
    out.hint("start it: farshore target run      then: farshore token create --for HOST");
    Ok(Exit::Ok)
}

/// `farshore enroll`.
pub fn enroll(_token: &str, _global: &Global, _out: &Out) -> Result<Exit, Failure> {
    Err(not_yet("agent").into())
}

/// `farshore filterd`.
pub fn filterd(_global: &Global) -> Result<Exit, Failure> {
    Err(not_yet("source daemon").into())
}

/// `farshore agent`.
pub fn agent(_global: &Global) -> Result<Exit, Failure> {
    Err(not_yet("agent").into())
}

/// `farshore config …`
pub fn config(command: &ConfigCommand, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let ConfigCommand::Check = command;
    let paths = global.paths();
    let file = TargetConfig::file(&paths);
    let mut problems = Vec::new();
    let mut fine = Vec::new();
    if file.exists() {
        match TargetConfig::load(&paths) {
            Ok(_) => fine.push(file),
            Err(problem) => problems.push(problem),
        }
    }
    for file in &fine {
        out.line(format!("ok  {}", file.display()));
    }
    if fine.is_empty() && problems.is_empty() {
        out.hint(format!("no configuration under {}; defaults apply", paths.etc.display()));
    }
    Failure::from_list(problems).map_or(Ok(Exit::Ok), Err)
}
