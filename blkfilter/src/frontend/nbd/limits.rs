//! Every bound of the NBD server, with the arithmetic of what a hostile peer can cost.
//!
//! One connection costs at most: staging 256 KiB + option data 64 KiB + payload in slots or copied
//! next to replies ([`BUSY_BYTES`] + one more request of [`MAX_REQUEST_UNTOLD`]) = 80.3 MiB, and
//! only while it has real requests in flight and the device's queue lends that many buffers; an
//! idle one costs about 330 KiB, after a burst 1 MiB more.

/// Largest READ or WRITE of a client in bytes: what the protocol makes every server accept.
pub const MAX_REQUEST: u32 = 32 << 20;

/// The same for a client that entered by EXPORT_NAME and so was told no sizes. The protocol's own
/// test client asks for 48 MiB at once.
pub const MAX_REQUEST_UNTOLD: u32 = 64 << 20;

/// Largest piece of a zero or trim handed to a device, in bytes (the seam's rule).
pub const MAX_ZERO: u64 = farshore_changelog::limits::MAX_DATALESS_LEN;

/// Requests in flight of one connection. At 4 KiB each: 1 MiB of payload.
pub const MAX_REQUESTS: usize = 256;

/// A connection with this many bytes of payload in flight or unsent takes no further request.
/// nbdcopy keeps 64 x 256 KiB = 16 MiB in flight.
pub const BUSY_BYTES: u64 = 16 << 20;

/// Requests taken, or replies gathered, before the answers are sent. Answering the whole queue
/// at once puts client and server in lock-step; one by one costs a system call each.
pub const GROUP: usize = 8;

/// Bytes one receive may bring: 62 writes of 4 KiB.
pub const STAGING: usize = 256 << 10;

/// A write of at least this many bytes is worth receiving straight into its slot: the copy
/// would cost more than the extra receive.
pub const STRAIGHT: u32 = 32 << 10;

/// Bytes received behind a large payload: enough for the next header and a small request.
pub const STAGING_BEHIND_LARGE: usize = 4 << 10;

/// Read payload up to this size is copied next to its header, so that a group of replies leaves
/// in one send and its slot is free at once; larger payload is sent from the slot.
pub const COPY_REPLY: usize = 16 << 10;

/// Longest export name and description the protocol allows, in bytes.
pub const MAX_STRING: usize = 4096;

/// Largest option data that is looked at; more is drained and refused. Ample for a name of
/// 4096 bytes and dozens of meta context queries.
pub const MAX_OPTION: u32 = 64 << 10;

/// Largest option data that is drained to stay in step; beyond it the peer is dropped.
pub const MAX_OPTION_DRAINED: u32 = 16 << 20;

/// Options of one negotiation. A person at a prompt needs a few dozen.
pub const MAX_OPTIONS: u32 = 1024;

/// Exports in one registry. A LIST of that many with the longest names is 4.2 MiB.
pub const MAX_EXPORTS: usize = 1024;

/// Extents in one BLOCK_STATUS reply: 8 KiB.
pub const MAX_EXTENTS: usize = 1024;

/// How long to wait before a buffer is asked for again when nothing of the connection's own can
/// free one, in milliseconds.
pub const STARVED_WAIT_MS: u16 = 10;

/// So many waits in vain, and the request fails with ENOMEM: two seconds.
pub const STARVED_TRIES: u32 = 200;

const _: () = assert!(MAX_REQUEST as usize >= crate::device::MAX_PAYLOAD);
const _: () = assert!(BUSY_BYTES <= MAX_REQUEST as u64);
const _: () = assert!(STAGING > STAGING_BEHIND_LARGE && STAGING_BEHIND_LARGE > 64);
