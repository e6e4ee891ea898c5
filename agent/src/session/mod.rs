//! What the agent says to the target, and when: a state machine without I/O, clock or tokio.
//!
//! [`Session`] is one connection with all volumes of a host. It is driven by
//! [`Session::step`]`(now, event, actions)`; the real driver ([`crate::run`]) and the simulator
//! execute the same [`Action`]s. It moves the watermarks `sent` and `journaled` of the source
//! and never claims more than the target acknowledged.
//!
//! How a volume lives: `Open` → [`Event::Opened`] says where the target is → batches the target
//! already has leave the window, the others are sent again byte for byte, or, when the target is
//! somewhere else, a new feed is positioned exactly behind the target's durable place and batches
//! are built again. Every acknowledgement is cumulative and releases records in `filterd`.

mod core;
mod event;
mod retry;
mod volume;

pub use core::{LinkState, Session, SessionConfig};
pub use event::{
    Action, Event, Faults, FeedFailure, LinkFailure, Resume, VolumeFacts, VolumeMemory,
};
pub use retry::{Jitter, RetryPreset};
pub use volume::{Phase, Totals, VolumeSession};

#[cfg(test)]
mod tests;
