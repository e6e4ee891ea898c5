//! The target: receives batches, journals them, keeps recovery points, opens them as views.
//!
//! `listener` accepts connections, a `session` speaks with one agent, one `worker` thread a
//! volume owns its [`store`] and is the only writer; nothing is acknowledged before it is durable.
//! The [`catalogue`] remembers points, hosts and tokens; `views` export points; `admin` serves the
//! command line.
#![forbid(unsafe_code)]

pub mod authority;
pub mod catalogue;
pub mod config;
pub mod extract;
pub mod problem;
pub mod retention;
pub mod store;

mod admin;
mod clock;
mod daemon;
mod durable_fs;
mod enrol;
mod failover;
mod failpoint;
mod init;
mod listener;
mod policy;
mod replica;
mod seed;
mod session;
mod status;
mod upkeep;
mod views;
mod worker;

pub use daemon::run;
pub use init::{InitOptions, InitReport, init};
pub use seed::{SeedReport, seed};
pub use session::verdict;
pub use store::{inspect, inspect_segment};
