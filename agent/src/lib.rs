//! The agent: ships captured changes to the target host.
//!
//! A record meets the modules in this order: [`intake`] fetches descriptors from `filterd` and
//! reads payload from the mapped pool; [`batch`] builds batches from them; [`supply`] keeps them in
//! order, in memory or in the [`spool`]; [`session`] (a state machine without I/O) decides what is
//! sent, resent and released; [`link`] carries it over TLS. [`keeper`] has the rules of the spool.
//! [`points`] cuts recovery points at the target's interval, [`quiet`] those for which applications
//! are made quiet by the freezer ([`freezer_line`]); [`status`] answers people, and [`event_log`]
//! keeps what has happened for them.
//!
//! The agent needs no privileges, opens no port, and holds nothing in memory that it could lose: what
//! is not durable at the target is durable in the spool or still in `filterd`.
#![forbid(unsafe_code)]

mod answers;
pub mod batch;
pub mod config;
mod driver;
mod durable_fs;
mod enroll;
pub mod event_log;
pub mod freezer_line;
pub mod identity;
pub mod intake;
pub mod keeper;
mod leftover;
pub mod limits;
pub mod line;
pub mod link;
pub mod memory;
pub mod points;
mod problem;
pub mod quiet;
mod reach;
mod report;
mod run;
pub mod session;
pub mod spool;
pub mod status;
pub mod supply;

pub use enroll::{EnrollOptions, Enrolled, enroll};
pub use reach::{Reached, reach};
pub use run::run;
