//! What the target said about digests and `filterd` has not heard yet: in order, and bounded.
//!
//! Whatever happens to an answer, `filterd` never takes a digest for equal that was not: an answer
//! that cannot be kept becomes [`CompareAnswer::Lost`], and everything up to it is asked again.

use std::collections::VecDeque;

use farshore_blkfilter::control::CompareAnswer;
use farshore_extent::{Epoch, Lsn};

/// Extents that wait: 16 answers of 64 KiB a volume, while `filterd` does not answer.
const MAX_EXTENTS: usize = 16 * farshore_protocol::message::MAX_DIFFERING;

/// Answers that wait.
const MAX_ANSWERS: usize = 1024;

/// The answers of one volume.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    waiting: VecDeque<(Lsn, CompareAnswer)>,
    extents: usize,
}

impl Answers {
    /// Adds the next one. [`CompareAnswer::Lost`] takes the place of all before it.
    pub(crate) fn push(&mut self, upto: Lsn, answer: CompareAnswer) {
        let more = match &answer {
            CompareAnswer::Differing(extents) => extents.len(),
            CompareAnswer::Lost => usize::MAX,
        };
        let extents = self.extents.saturating_add(more);
        if extents > MAX_EXTENTS || self.waiting.len() >= MAX_ANSWERS {
            let newest = self.waiting.back().map_or(upto, |(last, _)| upto.max(*last));
            *self = Self::default();
            self.waiting.push_back((newest, CompareAnswer::Lost));
        } else {
            self.extents = extents;
            self.waiting.push_back((upto, answer));
        }
    }

    /// Adds all of `newer`.
    pub(crate) fn append(&mut self, newer: Self) {
        newer.waiting.into_iter().for_each(|(upto, answer)| self.push(upto, answer));
    }

    /// The next one to be said.
    pub(crate) fn front(&self) -> Option<&(Lsn, CompareAnswer)> {
        self.waiting.front()
    }

    /// The front one was heard.
    pub(crate) fn pop(&mut self) {
        if let Some((_, CompareAnswer::Differing(extents))) = self.waiting.pop_front() {
            self.extents -= extents.len();
        }
    }

    /// A new run of `filterd` knows nothing of digests of the ones before.
    pub(crate) fn forget_before(&mut self, epoch: Epoch) {
        while self.front().is_some_and(|(upto, _)| upto.epoch < epoch) {
            self.pop();
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use farshore_extent::{Extent, Seq};

    use super::*;

    fn at(seq: u64) -> Lsn {
        Lsn::new(Epoch::new(1 + seq / 100), Seq::new(seq))
    }

    fn differing(count: usize) -> CompareAnswer {
        CompareAnswer::Differing(vec![Extent::new(0, 4096).unwrap(); count])
    }

    fn all(mut answers: Answers) -> Vec<(Lsn, CompareAnswer)> {
        let mut out = Vec::new();
        while let Some(front) = answers.front().cloned() {
            out.push(front);
            answers.pop();
        }
        assert_eq!(answers.extents, 0);
        out
    }

    #[test]
    fn answers_come_in_order_and_a_loss_replaces_those_before_it() {
        let mut answers = Answers::default();
        answers.push(at(1), differing(1));
        answers.push(at(2), CompareAnswer::Lost);
        answers.push(at(3), differing(2));
        answers.push(at(4), differing(0));
        let expected = [(at(2), CompareAnswer::Lost), (at(3), differing(2)), (at(4), differing(0))];
        assert_eq!(all(answers), expected);
    }

    #[test]
    fn a_filterd_that_stays_away_costs_bounded_memory_and_hears_of_every_place() {
        for count in [0, 1, 4096] {
            let mut answers = Answers::default();
            for n in 1..5000 {
                answers.push(at(n), differing(count));
                assert!(answers.waiting.len() <= MAX_ANSWERS && answers.extents <= MAX_EXTENTS);
            }
            let all = all(answers);
            assert_eq!(all[0].1, CompareAnswer::Lost);
            assert_eq!(all.last().unwrap().0, at(4999));
        }
    }

    #[test]
    fn answers_for_an_epoch_that_is_over_are_dropped() {
        let mut answers = Answers::default();
        answers.push(at(50), differing(1));
        answers.push(at(150), differing(1));
        answers.forget_before(at(150).epoch);
        assert_eq!(all(answers), [(at(150), differing(1))]);
    }
}
