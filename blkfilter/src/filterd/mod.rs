//! The daemon on the source host: protected volumes, their front ends, the control socket.
//!
//! Owns the state directory (epoch, volumes) and the order of starting and stopping. What the next
//! start has to send is on disk all the time (`crate::volume_state`); an orderly stop only narrows it.

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
mod schedule;
mod service;
mod serving;
mod shutdown;
mod state;
#[cfg(test)]
mod tests;
mod turns;
mod window;

pub use config::Config;
pub use daemon::{Daemon, Phase, run};
pub use problem::{AHEAD_OF_LOG, RECORDS_GONE};
pub use shutdown::Shutdown;
pub use window::Window;
