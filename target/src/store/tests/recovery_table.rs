//! Every combination of what recovery may find at the end of the history.

use crate::store::recover::{Evidence, Judgement, judge};

#[test]
fn every_combination_of_evidence_has_the_judgement_of_the_table() {
    for bits in 0..16u8 {
        let evidence = Evidence {
            something: bits & 1 != 0,
            later_batch_claims: bits & 2 != 0,
            super_claims: bits & 4 != 0,
            later_segment: bits & 8 != 0,
        };
        // Whoever says that more was durable is believed: then it is damage, never a torn tail.
        let expected = match (bits >> 1, bits & 1) {
            (0, 0) => Judgement::End,
            (0, _) => Judgement::Torn,
            (_, _) => Judgement::Damaged,
        };
        assert_eq!(judge(evidence), expected, "{evidence:?}");
    }
}
