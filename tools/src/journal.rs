//! `farshore journal inspect`: what a replica's journal holds, without the daemon.

use clap::Subcommand;

use crate::args::Global;
use crate::exit::{Exit, Failure};
use crate::output::Out;

/// `journal …`
#[derive(Debug, Subcommand)]
pub enum JournalCommand {
    /// Read a journal from its files and say what is in it and whether it is whole
    Inspect {
        /// A replica's directory, or the name of a volume of this target
        replica: String,
    },
}

/// `farshore journal …`
pub fn run(command: &JournalCommand, _global: &Global, _out: &Out) -> Result<Exit, Failure> {
    let JournalCommand::Inspect { replica } = command;
    Err(farshore_extent::Problem::harmless(6030, format!("no {replica}"), "", "").into())
}
