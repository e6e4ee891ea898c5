//! Limits of the agent, each with the memory it stands for.
//!
//! Ceiling: the window (configured, 64 MiB) + for each volume one batch that exceeds it, the
//! batches being built ahead and the builder's buffers: at most
//! `(1 + PULLS_AHEAD) x 2.3 MiB + 3 MiB`, about 10 MiB and in practice 3; while it spools what is
//! not synced yet, [`SPOOL_SYNC_BYTES`] and one batch; while points are merged 16 MiB and two batches.

use std::time::Duration;

/// Batches of one volume that may be asked for before the first arrives: one is built while the
/// one before is sent.
pub const PULLS_AHEAD: usize = 2;

/// Bytes of batches built and not acknowledged, over all volumes of the host.
pub const DEFAULT_WINDOW_BYTES: u64 = 64 << 20;

/// Smallest configurable window: less than four large batches would wait for every answer.
pub const MIN_WINDOW_BYTES: u64 = 8 << 20;

/// Batches of one volume built and not acknowledged: bounds what many small ones cost.
pub const MAX_WINDOW_BATCHES: usize = 1024;

/// Payload that makes `filterd` answer a fetch at once, in bytes: one batch.
pub const FETCH_BYTES: u32 = 1 << 20;

/// Longest wait of a fetch after its first record: the age of a batch under little load.
pub const FETCH_WAIT: Duration = Duration::from_millis(20);

/// Longest wait of a fetch without any record; also how soon a feed notices that it has ended.
pub const FETCH_IDLE: Duration = Duration::from_secs(1);

/// How often `filterd` is asked for its volumes.
pub const LIST_INTERVAL: Duration = Duration::from_secs(1);

/// How often the newest acknowledged place is made durable, while it changes.
pub const MEMORY_INTERVAL: Duration = Duration::from_secs(5);

/// A connection that lived this long counts as a success for the retry policy.
pub const PROVEN_AFTER: Duration = Duration::from_secs(5);

/// Messages between the parts of the agent that wait to be taken. None is larger than a control
/// message, and batches are bounded by the window.
pub const CHANNEL: usize = 256;

/// Ping when nothing was received for this long.
pub const PING_AFTER: Duration = Duration::from_secs(5);

/// A peer that said nothing for this long is dead.
pub const PEER_TIMEOUT: Duration = Duration::from_secs(20);

/// Dial, TLS and handshake together.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an orderly stop goes on shipping what filterd holds.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Between two looks at it.
pub const DRAIN_LOOK: Duration = Duration::from_millis(20);

/// How long an orderly stop waits for acknowledgements.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// How often the fill level of the pool is looked at while the target takes batches.
pub const POOL_LOOK_IDLE: Duration = Duration::from_millis(100);

/// How often the fill level of the pool is looked at while it does not: 20 ms are 10 MB at
/// 500 MB/s.
pub const POOL_LOOK: Duration = Duration::from_millis(20);

/// Longest time between a write to the spool and its sync.
pub const SPOOL_SYNC: Duration = Duration::from_secs(1);

/// Bytes written to the spool after which it is synced, for a large pool. They are held in memory
/// until then.
pub const SPOOL_SYNC_BYTES: u64 = 16 << 20;

/// How long a spool rests after a failure of its disk.
pub const SPOOL_RETRY: Duration = Duration::from_secs(10);

/// A target that took a batch this long ago is not away.
pub const STREAMING_FOR: Duration = Duration::from_secs(2);

/// Points are merged while less than this part of what the spool may take is left: above 80 %.
pub const SPOOL_NEARLY_FULL: u64 = 5;

/// A segment of the spool is at most this part of what the spool may take: what is merged is
/// written beside the old.
pub const SPOOL_SEGMENTS: u64 = 32;

/// Longest time at once that is spent with merging, before records are taken again.
pub const MERGE_SLICE: Duration = Duration::from_millis(10);

/// Share of its disk that the spool may take, in percent: literal rule 4 of the goals.
pub const SPOOL_PERCENT: u8 = 50;

/// Events kept for status.
pub const MAX_EVENTS: usize = 64;
