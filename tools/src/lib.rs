//! The command line of Farshore, the demo, and what the system tests share with it.
//!
//! One executable carries every role, so versions cannot drift on a host. This crate parses what a
//! person types, asks the daemons over their local sockets and renders answers; it never touches a
//! protected volume, a journal or a certificate itself.
#![forbid(unsafe_code)]

pub mod disk;
pub mod flag;
pub mod ledger;
pub mod nbd_client;
pub mod rpc;

mod args;
mod ask;
mod check;
mod choose;
mod compare;
mod demo;
mod doctor;
mod exit;
mod explain;
mod extract;
mod failover;
mod filterd_file;
mod freezer_file;
mod hosts;
mod jobs;
mod journal;
mod notify;
mod output;
mod points;
mod policy;
mod protect;
mod roles;
mod scrub;
mod signals;
mod start_at;
mod status;
mod store;
mod units;
mod volume;

use std::process::ExitCode;

pub use exit::{Exit, Failure};
use farshore_blkfilter::freezer;
use farshore_blkfilter::frontend::ublk;

/// The first word with which this program starts itself to be a daemon's helper.
const UBLK_HELPER: &str = "ublk-helper";

/// Parses the arguments, does what they ask and turns the outcome into an exit code
/// (design of the interfaces: 0 ok, 1 failed, 2 usage, 3 not found, 4 refused, 5 unreachable,
/// 6 partial, 130 interrupted).
#[must_use]
pub fn command_line() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|word| word == UBLK_HELPER) {
        return if ublk::help().is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    if std::env::args_os().nth(1).is_some_and(|word| word == freezer::WATCHDOG) {
        let watched = freezer::watch(std::env::args_os().skip(2));
        return if watched.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    ublk::use_helper(UBLK_HELPER);
    let cli = match args::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(done) => return done.into(),
    };
    let out = output::Out::new(&cli.global);
    if cli.global.die_with_parent {
        signals::die_with_parent();
    }
    match args::dispatch(&cli, &out) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            out.failure(&failure);
            failure.exit().into()
        }
    }
}
