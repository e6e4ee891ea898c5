//! The control socket of `filterd`: what the agent and the command line ask of it.
//!
//! A unix stream socket, owner-only, peer credentials checked. Every exchange is one [`Request`]
//! and one `Result<Reply, Problem>`, framed by `farshore_changelog::codec`; the only descriptor
//! passed is the pool's (read-only, by SCM_RIGHTS, in the same message as [`Reply::Pool`]).
//!
//! The agent pulls: [`Request::Fetch`] waits until there is a batch worth of records, so the write
//! path makes no system call to hand a record over.

pub mod client;
mod message;
pub mod server;

pub use crate::sys::pool_reader::ReadOnlyPool;
pub use client::{Client, FetchWish};
pub use message::{
    AttachChoice, AttachKind, Attachment, BackendKind, CompareAnswer, CopyProgress, CopyWait,
    CopyWaits, Descriptor, DescriptorBody, Fetched, Grown, Hint, IntentInfo, MarkerPlaced,
    MarkerRequest, PoolPlace, ProtectRequest, Readiness, Reply, Request, ThrottleInfo,
    VerifyProgress, VolumeInfo, VolumeStatus,
};
