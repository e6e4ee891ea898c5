//! `farshore status`: what filterd, the agent and the target on this machine know, as one table.

mod collect;
#[cfg(test)]
pub mod golden;
mod merge;
mod render;

use std::time::Duration;

use clap::Args;
use farshore_extent::WallTime;

use crate::args::Global;
use crate::exit::{Exit, Failure};
use crate::output::Out;
use crate::signals;

pub use collect::Sides;
pub use merge::{Row, StatusReport, merge};
#[cfg(test)]
pub use render::tests_data;

/// Version of the document.
pub const SCHEMA: &str = "farshore.status/1";

/// Options of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Show it again every second until Ctrl-C
    #[arg(long)]
    watch: bool,
}

/// `farshore status`.
pub fn run(args: &StatusArgs, global: &Global, out: &Out) -> Result<Exit, Failure> {
    if !args.watch {
        return show(global, out, "");
    }
    let interrupt = signals::interrupt();
    // On a terminal the table is drawn again in place; in a file, a line of history each time.
    let (clear, pause) =
        if Out::on_terminal() && !out.json { ("\x1b[H\x1b[J", 1) } else { ("", 10) };
    loop {
        if let Err(failure) = show(global, out, clear) {
            out.failure(&failure);
        }
        if interrupt.wait(Duration::from_secs(pause)) {
            return Ok(Exit::Interrupted);
        }
    }
}

fn show(global: &Global, out: &Out, before: &str) -> Result<Exit, Failure> {
    let sides = Sides::ask(&global.paths())?;
    let report = merge(&sides, WallTime::now());
    if out.json {
        out.text(&format!("{}\n", render::json(&report)));
    } else {
        out.text(&format!("{before}{}", render::text(&report, out)));
        if report.volumes.is_empty() && report.problems.is_empty() {
            out.hint("nothing is protected yet: farshore protect PATH --name NAME");
        }
    }
    Ok(if sides.silent.is_empty() { Exit::Ok } else { Exit::Partial })
}
