//! The capture core at work: real queues, rings, pools and threads around [`crate::core`].
//!
//! Owns the one [`Host`] (the core behind a short lock), the [`FilterDevice`] that front ends
//! serve, the copy loop, and the keeper of the intent map. No lock is held over I/O or a system call; a write is stepped twice,
//! together with what arrived or ended beside it, and handed over to the agent without a system
//! call of its own.

mod copy_loop;
mod device;
mod fetch;
mod host;
mod inbox;
mod intent;
mod queue;
mod slots;
#[cfg(test)]
mod tests;

pub use copy_loop::CopyLoop;
pub use device::{FilterConfig, FilterDevice};
pub use fetch::FetchWait;
pub use host::{Host, Left};
pub use intent::{IntentKeeper, SharedState};
