//! What filterd keeps durably of each volume for its next start: which regions may differ from the
//! replica, and how the last run ended.
//!
//! Owns the bytes of one volume (`FORMAT.md`) and the decision how the volume begins. Damage of
//! any kind means that more is sent again, never less. Never knows a directory or a thread: the
//! [`Medium`] does the I/O, so that the simulator cuts the power between any two sectors.

mod file;
mod layout;
mod medium;
mod start;
#[cfg(test)]
mod tests;

pub use file::{Begin, Found, Left, StateFile, Stored};
pub use layout::Geometry;
pub use medium::{FileMedium, Medium};
pub use start::{Plan, plan};
