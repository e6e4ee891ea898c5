//! The NBD server: fixed newstyle negotiation, simple and structured replies, over any stream
//! socket, in front of any [`Device`](crate::device::Device).
//!
//! One thread a connection, one [`Queue`](crate::device::Queue) each; the thread that received a
//! request answers it. Owns sockets and the bytes of the protocol; decides nothing about data and
//! keeps none. Peers are not trusted: malformed input gets the protocol's errors, the stream stays
//! in step where the protocol allows it and ends where it does not, and everything a peer can make
//! us hold is bounded in [`limits`].
//!
//! Protocol: `doc/proto.md` of the NetworkBlockDevice project. Not offered: oldstyle, extended
//! headers, fast zero, cache, resize.

mod direct;
mod export;
mod handshake;
mod inbox;
mod incoming;
mod jobs;
pub mod limits;
mod negotiation;
mod outbox;
mod request;
mod server;
mod socket;
pub mod starttls;
mod status;
#[cfg(test)]
mod tests;
mod transmission;
pub mod wire;

pub use direct::Direct;
pub use export::{Export, ExportError, ExportSummary, Exports};
pub use request::export_flags;
pub use server::{Config, Server, serve, serve_after_starttls};
