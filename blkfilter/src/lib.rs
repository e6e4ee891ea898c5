//! The device in front of a protected volume.
//!
//! A write meets the modules in this order: a front end ([`frontend`]) takes the request and puts
//! its payload into a private buffer; the capture core ([`mod@core`], a state machine without I/O)
//! decides; the backing device is written; the core numbers and records the completion; the
//! guest is answered. The agent fetches records over the control socket ([`control`]) and reads
//! payload from the shared pool.
//!
//! Unsafe code lives in `sys` only.

pub mod backing;
pub mod control;
pub mod core;
pub mod device;
pub mod durable_fs;
pub mod filter;
pub mod filterd;
pub mod freezer;
pub mod frontend;
pub mod pool;
pub mod preflight;
pub mod sys;
pub mod volume_state;
