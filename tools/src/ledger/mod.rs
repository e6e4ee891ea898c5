//! A workload that knows what must be on a disk: the ledger.
//!
//! Every 4 KiB block written says which write it is, where it belongs and which writes its writer
//! had seen acknowledged. The ledger remembers when each write was issued and acknowledged. From
//! that [`Ledger::check`] decides whether an image is a *consistent cut* (design of consistency:
//! w1 before w2 and w2 in the image imply w1 in the image), contains everything acknowledged
//! before an instant and nothing issued after another. Two writes in flight never touch the same
//! block, so what a block may hold is never ambiguous.
//!
//! It knows nothing of replication: images come as a function that reads bytes.

mod block;
mod check;
mod history;
mod workload;

pub use block::{BLOCK, BlockHeader};
pub use check::{Bounds, CutReport, Violation};
pub use history::{Instant, Ledger, Ticket};
pub use workload::{Running, Workload, WorkloadStats};
