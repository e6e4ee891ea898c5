//! What agent and target say to each other, and what people's tools say to both.
//!
//! Every frame on the replication connection is `u8 kind | u32 length | body` (little-endian):
//! control messages by the one limited codec, or the bytes of a batch unchanged. Golden bytes pin
//! every message. No tokio, no sockets.
#![forbid(unsafe_code)]

pub mod admin;
pub mod config;
pub mod failover;
pub mod frame;
pub mod message;
pub mod paths;
pub mod token;
pub mod version;
