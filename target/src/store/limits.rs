//! Limits of a store: every memory ceiling with its arithmetic.

/// Size of a segment file in bytes (design 04).
pub const SEGMENT_BYTES: u64 = 64 << 20;

/// A group is worth committing at this size in bytes: where O_DIRECT|O_DSYNC reaches its speed.
pub const GROUP_TARGET_BYTES: usize = 1 << 20;

/// Most bytes of batches waiting for a commit. One store holds at most this much in its group.
pub const MAX_GROUP_BYTES: usize = 8 << 20;

/// Prewritten segments kept so that expiry finds room on a full disk (design 04 rule 8).
pub const RESERVE_SEGMENTS: usize = 2;

/// Recycled segments kept at most: 4 x 64 MiB of disk a volume.
pub const MAX_SPARES: usize = 4;

/// Decoded frames that a view keeps: 256 x 64 KiB = 16 MiB.
pub const VIEW_FRAMES: usize = 256;

/// Pages of segments' runs, of frame directories, and of runs over several segments that a view
/// keeps, of each: 2,048 x 255 x (32 B + 20 B + 40 B in memory) = 48 MB at most; enough for the index
/// of 8 GiB of journal at 16 KiB an extent.
pub const VIEW_PAGES: usize = 2048;

/// Segments merged into the base at once: 16 x about 16,000 extents x 64 B in the map = 16 MB.
pub const APPLY_SEGMENTS: usize = 16;

/// Bytes written to the base in one step of expiry, about 20 ms of a disk.
pub const APPLY_STEP_BYTES: u64 = 8 << 20;

/// Runs of one level that become one of the next: any place within 4^7 segments of 64 MiB (1 TiB of
/// journal) is reached by at most 3 x 7 = 21 runs, about 10 on average, and each entry is copied 7
/// times, 16 B each: 0.7 % of extents of 16 KiB.
pub const RUN_FANOUT: u64 = 4;

/// Entries merged into a run in one step: 1 MiB of them, a few milliseconds.
pub const MERGE_STEP: usize = 64 << 10;

/// Markers that wait for their commit. The oldest is forgotten (and is then no point).
pub const MAX_PENDING_MARKERS: usize = 1024;

/// Ranges of unknown content that super can name.
pub const MAX_UNKNOWN: usize = 200;

/// Chains of recent batches, to recognise a duplicate of another history.
pub const RECENT_CHAINS: usize = 256;

/// Extents in one answer about digests: 4,096 x 16 B = 64 KiB.
pub const MAX_DIFFERING: usize = 4096;

/// Commits whose digests wait to be compared: each holds the index of the open segment, about
/// 1 MiB, and its digests, 80 B each, at most [`MAX_GROUP_BYTES`] / 80 B.
pub const MAX_ROUNDS: usize = 16;

/// Content read at once to be compared, in bytes.
pub const COMPARE_PIECE: u64 = 256 << 10;

/// Content compared in one step, in bytes: a few milliseconds.
pub const COMPARE_STEP_BYTES: u64 = 1 << 20;

/// Read in one step of a scrub, in bytes: some 10 ms of a disk.
pub const SCRUB_STEP_BYTES: u64 = 1 << 20;

/// Ranges that verification found to be wrong are joined when there are more.
pub const MAX_WRONG: usize = 1024;
