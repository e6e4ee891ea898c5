//! Planted faults: mistakes that the simulator must find. Never set outside of tests.

/// Each switch makes the store commit one known mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(clippy::struct_excessive_bools)] // independent switches, not a state
pub struct Faults {
    /// Journal writes are acknowledged before they are durable.
    pub ack_before_sync: bool,
    /// The chain of a batch is not compared with the store's own.
    pub no_chain_check: bool,
    /// A torn tail is left in place.
    pub tail_not_cut: bool,
    /// After a crash in an apply the floor falls back to the base.
    pub floor_lowered_after_crash: bool,
    /// Segments go before the base that replaces them is durable.
    pub segments_deleted_before_base_synced: bool,
    /// Super says what the base does not hold durably yet.
    pub super_before_base_sync: bool,
    /// In a merge of runs the oldest version stays.
    pub run_oldest_wins: bool,
    /// A failed sync is tried again and believed.
    pub sync_retried: bool,
    /// New files are used before their names are durable.
    pub no_dir_sync: bool,
    /// A batch that is durable already is taken again.
    pub no_duplicate_filter: bool,
    /// Batches of an older generation are taken.
    pub no_generation_fence: bool,
    /// Digests are compared with the newest content instead of that at their number.
    pub judge_newest_content: bool,
    /// Digests are compared when they arrive, before they are durable.
    pub judge_before_durable: bool,
    /// What is read from the base is not verified.
    pub base_not_verified: bool,
    /// Super relies on checksums that are not durable yet.
    pub sums_not_synced: bool,
    /// A volume that shrinks leaves checksums behind its end.
    pub sums_left_behind_the_end: bool,
}
