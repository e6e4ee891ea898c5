//! `farshore demo`: every role as a process of its own on this machine, without a fixed port; real
//! work, kills on the way, and a proof at the end. Where it may, the disk is a block device by ublk;
//! without root or without the kernel module it is an NBD socket.
//!
//! It uses nothing that a person could not use: the commands, the local sockets, devices and NBD.

mod figures;
mod load;
mod proof;
mod stage;
mod story;

use std::path::PathBuf;

use clap::Args;
use farshore_extent::Problem;

use crate::args::bytes;
use crate::exit::{Exit, Failure};
use crate::output::Out;
use crate::protect::Way;
use crate::signals;
use stage::Stage;
use story::Story;

/// Smallest volume with which the demo makes sense.
const MIN_SIZE: u64 = 16 << 20;

/// Options of the demo.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// How long the workload runs
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u64).range(4..=3600))]
    seconds: u64,
    /// Size of the protected volume
    #[arg(long, default_value = "256MiB", value_parser = bytes)]
    size: u64,
    /// Most that the ledger writes a second; 0 is no limit
    #[arg(long, default_value = "24MiB", value_parser = bytes)]
    rate: u64,
    /// Work in this directory and leave everything there
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// How the disk is reached: ublk if this host has it and you may, else a socket
    #[arg(long, value_name = "WAY")]
    attach: Option<Way>,
    /// The built-in workload only, even where fio is installed
    #[arg(long)]
    no_fio: bool,
}

/// Why the demo ended early.
#[derive(Debug)]
enum End {
    /// Ctrl-C.
    Interrupted,
    /// Something is wrong.
    Problem(Problem),
}

impl From<Problem> for End {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

/// A step of the demo could not be done.
fn cannot(what: impl Into<String>, why: impl ToString) -> End {
    let next = "run it again with --keep DIR and look at DIR/log";
    End::Problem(Problem::harmless(6992, what, why.to_string(), next))
}

/// A proof failed: the one thing that must never happen.
fn disproved(what: impl Into<String>, why: impl ToString) -> End {
    let problem = Problem::harmless(
        6991,
        what,
        why.to_string(),
        "this is a defect of Farshore: report it with the directory that was left behind",
    );
    End::Problem(problem.with_risk("do not trust this build with data"))
}

/// `farshore demo`.
pub fn run(args: &DemoArgs, out: &Out) -> Result<Exit, Failure> {
    let interrupt = signals::interrupt();
    let story = Story::new(out.clone());
    let size = args.size.next_multiple_of(1 << 20).max(MIN_SIZE);
    let mut stage = match Stage::set_up(args.keep.clone(), size, interrupt) {
        Ok(stage) => stage,
        Err(end) => return finish(end),
    };
    let played = play(args, &mut stage, &story);
    stage.stop_all();
    match played {
        Ok(()) => {
            stage.clear_away();
            story.last("demo: ok");
            Ok(Exit::Ok)
        }
        Err(End::Interrupted) => {
            stage.clear_away();
            story.last("demo: stopped; every process has ended, every file is gone");
            Ok(Exit::Interrupted)
        }
        Err(end) => {
            story.last(&format!("demo: FAILED   (files and logs are left in {})", stage.place()));
            finish(end)
        }
    }
}

fn finish(end: End) -> Result<Exit, Failure> {
    match end {
        End::Interrupted => Ok(Exit::Interrupted),
        End::Problem(problem) => Err(problem.into()),
    }
}

fn play(args: &DemoArgs, stage: &mut Stage, story: &Story) -> Result<(), End> {
    let who = if nix::unistd::geteuid().is_root() { "root" } else { "an ordinary user" };
    story.title(&format!(
        "Farshore demo: source and target on this machine, as {who}, in {}",
        stage.place()
    ));
    let first_copy = stage.protect(args.attach, story)?;
    let load = load::run(args, stage, story)?;
    let proof = proof::run(stage, &load, story)?;
    figures::show(&first_copy, &load, &proof, story);
    Ok(())
}
