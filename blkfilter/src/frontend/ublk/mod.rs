//! ublk front end: a device of ours as `/dev/ublkbN`, over the kernel's ublk driver.
//!
//! Every queue has a thread and a ring; the thread takes a request, gives it to the device and
//! answers the guest. Payload goes straight between the driver and the slots of the queue
//! (`USER_COPY`), or through a buffer per tag where the driver cannot. A write alone on its queue
//! costs four system calls: one that commits the last answer and waits for the request, one that
//! takes the payload, one that starts the write on the backing device, one that waits for its end.
//! A read costs the same. Sixteen at a time cost one for each payload, and three for all.
//!
//! **At least once.** The device outlives its server. When the server dies, every request whose
//! answer the kernel has not taken is given to the next one, also when it was done already and only
//! its answer was still on the way; tags and order change. So whatever is behind a queue must be
//! able to do a request twice, and the rule for the capture core is: the extent of a write is
//! recorded before its answer is committed. It is: a completion comes out of
//! [`Queue::reap`](crate::device::Queue::reap) only after that. No write of an earlier server may
//! still be under way when the next begins. One that leaves lets go of the character device, which
//! the next needs, only when the backing device has ended everything. One that was killed keeps its
//! claim of the backing device until then, which the next needs too.
//!
//! **Times.** Every control command has a limit and a thread of its own, as some kernels never
//! finish some of them. At most one a device that was given up is with the driver. What may get
//! stuck is done by a helper program where there is one ([`use_helper`]): before Linux 7.0 a server
//! that dies while its new device is searched for partitions leaves START_DEV in the kernel for
//! ever, and with it everything that the process had open. What a device is, is decided by the state the driver reports, and what it
//! can do by its feature bits: never by process numbers or kernel versions.
//!
//! The process should have made itself an I/O flusher and locked its memory: see
//! [`sys::process`](crate::sys::process).

mod driver;
mod error;
mod existing;
mod features;
mod limits;
mod plane;
mod request;
mod server;
mod worker;

pub use crate::sys::ublk::control::{help, use_helper};
pub use error::UblkError;
pub use existing::{DeviceState, State, existing, owner};
pub use features::{Features, Unavailable, features};
pub use server::{Config, Server, remove_stale, remove_stale_unused};
