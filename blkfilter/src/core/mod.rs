//! The capture core: what is decided about every write, as a state machine without I/O.
//!
//! One [`CaptureCore`] serves all volumes of a host, because one counter for all of them makes
//! every prefix of the numbers a consistent cut. Events go in, actions come out; the real driver
//! (`crate::filter`), the simulator and the unit tests run the same code.
//!
//! Owns: the host's counter, the range locks, the retained records and the room of every pool,
//! the dirty maps, the intent maps, the acknowledgement gate. Moves the watermarks *captured* and *released*.
//! Never does: I/O, threads, clocks, allocation of payload, iteration over hash maps. The bytes of
//! a pool belong to the driver; the core only says which of them are in use.
//!
//! How a driver uses it:
//! 1. [`CaptureCore::attach`] a volume, then [`CaptureCore::reserve`] room before a payload
//!    arrives (no room: a private spare buffer, [`Buffer::Spare`]; the guest never waits for the
//!    replication).
//! 2. [`CaptureCore::step`] with [`Event::Write`], [`Event::Zero`] or [`Event::Flush`]; carry out
//!    each [`Action::Backing`]; report it with [`Event::BackingDone`]; answer the guest at
//!    [`Action::Answer`]. Actions for another queue than the stepping one are handed to that queue.
//! 3. While a volume catches up: [`Event::Copy`] again and again until [`CopyEnd::Clean`].
//! 4. At [`Action::IntentWanted`]: [`CaptureCore::take_intent`], make it durable, report it with
//!    [`Event::IntentDone`]. At [`Action::FlushWanted`]: flush the backing.
//! 5. The agent's side: [`CaptureCore::fetch`], [`CaptureCore::release`].

mod brake;
mod capture;
mod command;
mod compare;
mod copy;
mod event;
mod gate;
mod grow;
mod intent;
mod limits;
mod log;
mod query;
mod range_lock;
mod region_map;
mod ring;
mod slab;
mod volume;

#[cfg(test)]
mod tests;

pub use capture::CaptureCore;
pub use command::{Attach, HoldEnd, IntentStart, MarkerSpec, Placed, Refused, Start};
pub use event::{
    Action, Backing, Buffer, CopyEnd, Event, IntentBlock, IntentCommit, IntentEnd, IntentLoss,
    IoKey, Now, Outcome, PoolSlot, QueueId, Token, VolumeKey,
};
pub use grow::NewPart;
pub use limits::{Faults, Limits};
pub use query::{CoreStatus, IntentStatus, Waiting};
pub use region_map::{BLOCK_REGIONS, BLOCK_WORDS, RegionMap};
