//! Bounds of the core, with the memory they cost, and the faults that the simulator plants.

/// Bounds of one [`super::CaptureCore`].
#[derive(Debug, Clone)]
pub struct Limits {
    /// Most records kept for one volume until they are released. A record takes about 120 bytes:
    /// 131,072 of them 15 MiB. A pool of 512 MiB full of 4 KiB writes has as many.
    pub max_records: usize,
    /// Records that order the stream (markers, order lost) may exceed `max_records` by this many.
    pub control_headroom: usize,
    /// Pending markers of the host; 40 bytes each.
    pub max_pending_markers: usize,
    /// Longest time the acknowledgement gate may stay closed, in milliseconds.
    pub max_hold_ms: u64,
    /// Longest time in milliseconds for which the answer to one write is held back while its pool
    /// is nearly full; 0: never.
    pub throttle_ms: u64,
    /// Room in a pool is given in multiples of this many bytes (direct I/O needs whole pages).
    pub pool_align: u64,
    /// Deliberate defects; all off outside of tests.
    pub faults: Faults,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_records: 131_072,
            control_headroom: 4096,
            max_pending_markers: 1024,
            max_hold_ms: 300,
            throttle_ms: 0,
            pool_align: 4096,
            faults: Faults::default(),
        }
    }
}

/// Deliberate defects: a checker counts only when it has found each of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Faults {
    /// Overlapping requests run at the same time.
    pub no_range_lock: bool,
    /// The number is taken at arrival instead of at the backing's completion.
    pub number_before_backing: bool,
    /// Answers pass a closed gate.
    pub gate_ignored: bool,
    /// A hold takes its marker's number one event before its gate closes.
    pub marker_before_gate: bool,
    /// The copy loop reads without the shared range lock.
    pub copy_without_lock: bool,
    /// The copy loop clears a chunk's bit when it picks the chunk.
    pub clear_bit_before_read_recorded: bool,
    /// A write that completes in a chunk whose digest is being compared does not count.
    pub touched_chunk_is_answered: bool,
    /// Answers that were lost count as "equal".
    pub lost_answer_is_equal: bool,
    /// A record's room in the pool is free as soon as the record exists.
    pub reuse_pool_before_release: bool,
    /// What a disk holds in its new part is taken for zeroes.
    pub new_part_not_sent: bool,
    /// A write goes to the backing before its region's bit is durable.
    pub intent_not_waited_for: bool,
    /// A region's bit is cleared although the backing was not flushed since its last write.
    pub intent_cleared_without_flush: bool,
    /// A region's bit is cleared although the target may not have its last record.
    pub intent_cleared_before_release: bool,
}
