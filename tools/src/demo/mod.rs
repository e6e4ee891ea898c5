//! `farshore demo`.
use clap::Args;

use crate::exit::{Exit, Failure};
use crate::output::Out;

/// Options of the demo.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// How long the workload runs
    #[arg(long, default_value_t = 12)]
    seconds: u64,
    /// Size of the protected volume
    #[arg(long, default_value = "256MiB", value_parser = crate::args::bytes)]
    size: u64,
    /// Work in this directory and leave everything there
    #[arg(long, value_name = "DIR")]
    keep: Option<std::path::PathBuf>,
}

/// `farshore demo`.
pub fn run(_args: &DemoArgs, _out: &Out) -> Result<Exit, Failure> {
    Ok(Exit::Failed)
}
