//! The roles a host can have, and setting them up: parses options, starts the daemons of the
//! other crates, and keeps their log on standard error.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use farshore_agent::EnrollOptions;
use farshore_agent::config::Config as AgentConfig;
use farshore_blkfilter::filterd::{Phase, Shutdown};
use farshore_extent::{Problem, VolumeName};
use farshore_protocol::admin::{TargetReply, TargetRequest};
use farshore_protocol::paths::Paths;
use farshore_protocol::token::{Token, TokenError};
use farshore_target::config::Config as TargetConfig;
use farshore_target::{InitOptions, init};

use crate::args::{Global, volume_name};
use crate::exit::{Exit, Failure};
use crate::output::Out;
use crate::{filterd_file, freezer_file, notify, rpc, units};

/// Between two lines of progress.
const TELL: Duration = Duration::from_secs(10);

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
    /// Begin the replica of a volume to come with an image of its disk that was carried here
    Seed {
        /// Raw image file or block device with the content of the disk
        image: PathBuf,
        /// Host that will protect it, as enrolled
        #[arg(long, value_parser = volume_name)]
        host: VolumeName,
        /// Name under which it will be protected
        #[arg(long, value_parser = volume_name)]
        name: VolumeName,
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
        TargetCommand::Seed { image, host, name } => target_seed(image, (host, name), global, out),
        TargetCommand::Run => target_run(global),
    }
}

fn target_run(global: &Global) -> Result<Exit, Failure> {
    start_log(global);
    let paths = global.paths();
    let config = match given_config(global)? {
        Some((text, name)) => TargetConfig::parse(&text, &name)?,
        None => TargetConfig::load(&paths)?,
    };
    runtime()?.block_on(farshore_target::run(config, paths, asked_to_stop()))?;
    Ok(Exit::Ok)
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

fn target_seed(
    image: &Path,
    (host, name): (&VolumeName, &VolumeName),
    global: &Global,
    out: &Out,
) -> Result<Exit, Failure> {
    let paths = global.paths();
    // A daemon that is not running has nothing to say against it.
    if let Ok(TargetReply::Status(all)) = rpc::target(&paths, &TargetRequest::Status)
        && all.iter().any(|replica| replica.name == *name)
    {
        return Err(farshore_target::problem::replica_exists(name).into());
    }
    let mut told = Instant::now();
    let seed = farshore_target::seed(&paths, (host, name), image, global.dry_run, |done| {
        if told.elapsed() >= TELL {
            told = Instant::now();
            out.hint(format!("{} read", units::bytes(done)));
        }
    })?;
    if out.json {
        let seed = serde_json::json!({ "file": seed.file, "bytes": seed.bytes });
        out.document("farshore.target-seed/1", "seed", &seed);
        return Ok(Exit::Ok);
    }
    let size = units::bytes(seed.bytes);
    if global.dry_run {
        out.line(format!("would begin the replica of {name} with {size}; nothing was changed"));
        return Ok(Exit::Ok);
    }
    out.line(format!("the replica of {name} will begin with {size}: {}", seed.file.display()));
    if let Ok(TargetReply::Hosts(hosts)) = rpc::target(&paths, &TargetRequest::Hosts)
        && !hosts.iter().any(|known| known.name == host.as_str())
    {
        out.hint(format!("no host {host} is enrolled yet; the name has to be exactly this"));
    }
    out.hint(format!("next, on {host}: farshore protect PATH --name {name} --seeded"));
    Ok(Exit::Ok)
}

/// Options of `enroll`.
#[derive(Debug, Args)]
pub struct EnrollArgs {
    /// As printed by `farshore token create`
    token: String,
    /// Name of this host; the machine's own if not given
    #[arg(long, value_parser = volume_name)]
    name: Option<VolumeName>,
    /// HTTP proxy that allows CONNECT to the target
    #[arg(long, value_name = "HOST:PORT")]
    proxy: Option<String>,
}

/// `farshore enroll`.
pub fn enroll(args: &EnrollArgs, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let paths = global.paths();
    if global.dry_run {
        let token: Token = args.token.parse().map_err(|e: TokenError| bad_token(&e))?;
        out.line(format!("would enrol with {}, whose authority is {}", token.address, token.ca));
        return Ok(Exit::Ok);
    }
    let options = EnrollOptions { host_name: args.name.clone(), proxy: args.proxy.clone() };
    let done = runtime()?.block_on(farshore_agent::enroll(&args.token, &paths, &options))?;
    if out.json {
        let done = serde_json::json!({
            "host": done.host,
            "host_name": done.host_name,
            "target": done.target,
            "fingerprint": done.ca.to_string(),
            "again": done.again,
        });
        out.document("farshore.enrolled/1", "enrolled", &done);
        return Ok(Exit::Ok);
    }
    let again = if done.again { " again" } else { "" };
    out.line(format!("enrolled{again} as {} with {}", done.host_name, done.target));
    out.line(format!("  authority  {}", done.ca));
    out.hint("next: farshore filterd, farshore agent, farshore protect PATH --name NAME");
    Ok(Exit::Ok)
}

fn bad_token(why: &TokenError) -> Problem {
    let next = "copy the whole line that farshore token create printed on the target";
    Problem::harmless(5202, "this is not a usable token", why.to_string(), next)
}

fn runtime() -> Result<tokio::runtime::Runtime, Problem> {
    tokio::runtime::Runtime::new().map_err(|e| no_resources(&e))
}

/// The system gives no threads or descriptors.
pub fn no_resources(error: &std::io::Error) -> Problem {
    Problem::harmless(
        2901,
        "cannot start: the system gives no threads or descriptors",
        error.to_string(),
        "look at the limits of this user (ulimit -a)",
    )
}

/// SIGTERM or SIGINT: stop in order.
async fn asked_to_stop() {
    use tokio::signal::unix::{SignalKind, signal};
    let (term, int) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    match (term, int) {
        (Ok(mut term), Ok(mut int)) => {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        }
        // Without handlers the signals keep their default action, which ends the process.
        _ => std::future::pending().await,
    }
}

/// The daemons' log: standard error, `RUST_LOG` or `-v` for more.
fn start_log(global: &Global) {
    use tracing_subscriber::EnvFilter;
    let usual = match (global.quiet, global.verbose) {
        (true, _) => "warn",
        (false, 0) => "info",
        (false, 1) => "debug",
        (false, _) => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(usual));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second subscriber (in tests) is no reason to fail.
    let _ = log.with_ansi(false).try_init();
}

/// The text of `--config`, or none: then the role reads its usual file.
fn given_config(global: &Global) -> Result<Option<(String, String)>, Problem> {
    let Some(file) = &global.config else { return Ok(None) };
    let name = file.display().to_string();
    match std::fs::read_to_string(file) {
        Ok(text) => Ok(Some((text, name))),
        Err(e) => Err(cannot_read(&name, &e)),
    }
}

/// A configuration file that is there, or was given, and cannot be read.
pub fn cannot_read(name: &str, error: &std::io::Error) -> Problem {
    Problem::harmless(
        1902,
        format!("the configuration {name} cannot be read"),
        error.to_string(),
        "check the path and who may read it",
    )
}

/// `farshore filterd`.
pub fn filterd(global: &Global) -> Result<Exit, Failure> {
    // Before any thread: later ones must not take the signals.
    let shutdown = Shutdown::on_signals().map_err(|e| no_resources(&e))?;
    start_log(global);
    let paths = global.paths();
    let config = match given_config(global)? {
        Some((text, name)) => filterd_file::parse(&text, &name, &paths)?,
        None => filterd_file::load(&paths)?,
    };
    // Nobody but root writes what the daemon makes; its directories say for themselves who reads.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    farshore_blkfilter::filterd::run(config, &shutdown, |phase| match phase {
        Phase::Ready => notify::ready(),
        Phase::Stopping => notify::stopping(),
    })?;
    Ok(Exit::Ok)
}

/// `farshore agent`.
pub fn agent(global: &Global) -> Result<Exit, Failure> {
    start_log(global);
    let paths = global.paths();
    let config = match given_config(global)? {
        Some((text, name)) => AgentConfig::parse(&text, &name)?,
        None => AgentConfig::load(&paths)?,
    };
    runtime()?.block_on(farshore_agent::run(config, paths, asked_to_stop()))?;
    Ok(Exit::Ok)
}

/// `farshore freezer`.
pub fn freezer(global: &Global) -> Result<Exit, Failure> {
    start_log(global);
    let paths = global.paths();
    let file = global.config.clone().unwrap_or_else(|| freezer_file::path(&paths));
    let load = Box::new(move || freezer_file::load(&file));
    farshore_blkfilter::freezer::run(&paths.run, &paths.state, load, notify::ready)?;
    Ok(Exit::Ok)
}

/// The configuration files that this host can have, each with what is wrong in it. One that does
/// not exist may be wrong, too.
pub fn configurations(paths: &Paths) -> [(PathBuf, Option<Problem>); 4] {
    let freezer = freezer_file::path(paths);
    let freezer_problem = freezer_file::load(&freezer).err();
    [
        (filterd_file::path(paths), filterd_file::load(paths).err()),
        (TargetConfig::file(paths), TargetConfig::load(paths).err()),
        (AgentConfig::file(paths), AgentConfig::load(paths).err()),
        (freezer, freezer_problem),
    ]
}

/// `farshore config …`
pub fn config(command: &ConfigCommand, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let ConfigCommand::Check = command;
    let paths = global.paths();
    let checks = configurations(&paths);
    let mut problems = Vec::new();
    let mut none = true;
    for (file, problem) in checks.into_iter().filter(|(file, _)| file.exists()) {
        none = false;
        match problem {
            None => out.line(format!("ok  {}", file.display())),
            Some(problem) => problems.push(problem),
        }
    }
    if none {
        out.hint(format!("no configuration under {}; defaults apply", paths.etc.display()));
    }
    Failure::from_list(problems).map_or(Ok(Exit::Ok), Err)
}
