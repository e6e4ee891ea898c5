//! The role that makes applications quiet for a point: hooks before and after, and frozen file
//! systems in between.
//!
//! A process of its own, because it may do what the agent must not (freeze, run programs as other
//! users) and `filterd` must not (hold a mount of a protected volume). It cuts nothing: the agent asks
//! for quiet, cuts its marker, and asks for the end. Everything it does stands in a file that only root
//! can write; whoever may ask names volumes, never programs or mounts.
//!
//! What was made quiet ends by itself, whoever dies: the agent (its connection ends), this process
//! (the watchdog, [`watch`], thaws; the next start runs the post hooks, [`sequence`]), the watchdog
//! (this process has the same time limit), and all of them (the next start thaws).

mod client;
mod config;
mod hook;
mod message;
mod mounts;
mod problem;
mod record;
mod sequence;
mod server;
mod trust;
mod watchdog;

pub use client::Client;
pub use config::{Application, Config, RunAs};
pub use message::{ApplicationInfo, Quiet, Reply, Request};
pub use problem::{lost, none_covers};
pub use server::{Freezer, run};
pub use trust::trusted_file;
pub use watchdog::{WORD as WATCHDOG, watch};
