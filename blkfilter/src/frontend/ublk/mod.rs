//! ublk front end: a device of ours as `/dev/ublkbN`, over the kernel's ublk driver.

#![allow(dead_code)] // the server does not use everything yet

mod driver;
mod error;
mod existing;
mod features;
mod limits;
mod request;
mod server;

pub use error::UblkError;
pub use existing::{DeviceState, State, existing};
pub use features::{Features, Unavailable, features};
pub use server::{Config, Server, remove_stale};
