//! How the history of a source relates to the replica's: a table, and its exhaustive test.
//!
//! Pure: decides, changes nothing.

use farshore_extent::{Chain, Generation, Lsn};

/// What one side says about a change log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Fencing number.
    pub generation: Generation,
    /// The source: last place acknowledged to it, zero when it does not know. The replica: last
    /// durable place.
    pub lsn: Lsn,
    /// Chain there.
    pub chain: Chain,
}

/// Generation of a replica that was never failed over.
pub const FIRST_GENERATION: Generation = Generation::new(1);

/// What to do with a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Both are at the same place, or the source does not know where it was: go on after the
    /// replica's durable place.
    Continue,
    /// The replica has more than the source heard of (the acknowledgement was lost on the way):
    /// go on after the replica's durable place.
    SkipAhead,
    /// The replica lost what it had acknowledged.
    RecopyLost,
    /// At the same place the histories differ.
    RecopyUnknownHistory,
    /// The replica was failed over since: the source must stop.
    Fenced,
    /// The source was given a generation that this replica has never heard of: the target runs on
    /// an old copy of its data.
    TargetIsOld,
}

/// The table.
///
/// | generation of the source | its place | decision |
/// |---|---|---|
/// | lower (or none, and the replica is past its first) | any | fenced |
/// | higher | any | target is old |
/// | equal, or none and the replica in its first | none | continue |
/// | | below durable | skip ahead |
/// | | equal, same chain | continue |
/// | | equal, other chain | recopy: unknown history |
/// | | above durable | recopy: lost |
#[must_use]
pub fn decide(source: Position, own: Position) -> Decision {
    let never_opened = source.generation == Generation::ZERO;
    let first_contact = never_opened && own.generation <= FIRST_GENERATION;
    if source.generation < own.generation && !first_contact {
        return Decision::Fenced;
    }
    if source.generation > own.generation {
        return Decision::TargetIsOld;
    }
    if source.lsn == Lsn::ZERO {
        return Decision::Continue;
    }
    match source.lsn.cmp(&own.lsn) {
        core::cmp::Ordering::Less => Decision::SkipAhead,
        core::cmp::Ordering::Equal if source.chain == own.chain => Decision::Continue,
        core::cmp::Ordering::Equal => Decision::RecopyUnknownHistory,
        core::cmp::Ordering::Greater => Decision::RecopyLost,
    }
}

#[cfg(test)]
mod tests {
    use farshore_extent::{Epoch, Seq};

    use super::*;

    fn at(generation: u64, seq: u64, chain: u8) -> Position {
        Position {
            generation: Generation::new(generation),
            lsn: Lsn::new(Epoch::new(u64::from(seq > 0)), Seq::new(seq)),
            chain: Chain::from_bytes([chain; 32]),
        }
    }

    /// Independent restatement of the promise, row by row, without the order of the code.
    fn allowed(source: Position, own: Position) -> Decision {
        let same_line = source.generation == own.generation
            || (source.generation.get() == 0 && own.generation.get() == 1);
        let knows = source.lsn != Lsn::ZERO;
        let (ahead, behind) = (source.lsn > own.lsn, source.lsn < own.lsn);
        let equal_chain = source.chain == own.chain;
        match (same_line, source.generation > own.generation) {
            (false, true) => Decision::TargetIsOld,
            (false, false) => Decision::Fenced,
            (true, _) => match (knows, ahead, behind, equal_chain) {
                (false, ..) | (true, false, false, true) => Decision::Continue,
                (true, true, ..) => Decision::RecopyLost,
                (true, false, true, _) => Decision::SkipAhead,
                (true, false, false, false) => Decision::RecopyUnknownHistory,
            },
        }
    }

    #[test]
    fn every_combination_of_positions_has_the_decision_of_the_table() {
        let mut seen = std::collections::BTreeMap::new();
        for own_generation in 1..4 {
            for own_seq in 0..4 {
                for source_generation in 0..4 {
                    for source_seq in 0..4 {
                        for chain in 0..2 {
                            let own = at(own_generation, own_seq, 0);
                            let source = at(source_generation, source_seq, chain);
                            let decision = decide(source, own);
                            assert_eq!(decision, allowed(source, own), "{source:?} {own:?}");
                            *seen.entry(format!("{decision:?}")).or_insert(0) += 1;
                        }
                    }
                }
            }
        }
        assert_eq!(seen.len(), 6, "every decision occurs: {seen:?}");
    }

    #[test]
    fn a_source_that_lost_its_state_cannot_slip_past_the_fence() {
        assert_eq!(decide(at(0, 0, 0), at(2, 5, 0)), Decision::Fenced);
        assert_eq!(decide(at(0, 0, 0), at(1, 5, 0)), Decision::Continue);
    }
}
