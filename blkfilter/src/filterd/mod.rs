//! The daemon on the source host: protected volumes, their front ends, the control socket.
//!
//! Owns the state directory (epoch, volumes) and the order of starting and stopping. DIRTY is the
//! resting state of a volume on disk; CLEAN is written as the last step of an orderly stop, when
//! everything captured is durable at the target and the backing was flushed.

mod attached;
mod attaching;
mod choice;
mod config;
mod daemon;
mod filtering;
mod grow;
mod marker;
mod names;
mod namespace;
mod problem;
mod service;
mod serving;
mod shutdown;
mod state;
#[cfg(test)]
mod tests;
mod turns;

pub use config::Config;
pub use daemon::{Daemon, Phase, run};
pub use problem::{AHEAD_OF_LOG, RECORDS_GONE};
pub use shutdown::Shutdown;
