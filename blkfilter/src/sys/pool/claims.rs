//! Which pages of a pool are in a slice: one bit each, without a lock.
//!
//! The capture core decides where payload lies; this holds the one promise that memory safety
//! needs, that two slices never share a page, whatever the core does.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::pool::POOL_UNIT;

/// One bit a page.
#[derive(Debug)]
pub(super) struct Claims {
    words: Box<[AtomicU64]>,
    pages: u64,
}

/// The words that the pages of a range have bits in, with their masks.
fn masks(first: u64, end: u64) -> impl Iterator<Item = (usize, u64)> {
    (first / 64..end.div_ceil(64)).map(move |word| {
        let low = first.max(word * 64) - word * 64;
        let high = end.min(word * 64 + 64) - word * 64;
        let mask = (u64::MAX >> (64 - (high - low))) << low;
        (usize::try_from(word).unwrap_or(usize::MAX), mask)
    })
}

impl Claims {
    /// No page of `bytes` is claimed.
    pub(super) fn new(bytes: u64) -> Self {
        let pages = bytes / POOL_UNIT;
        Self { words: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(), pages }
    }

    fn pages(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        let first = offset / POOL_UNIT;
        let end = offset.checked_add(len)?.div_ceil(POOL_UNIT);
        let possible = len > 0 && offset.is_multiple_of(POOL_UNIT) && end <= self.pages;
        possible.then_some((first, end))
    }

    /// Claims all pages of the range, or none.
    pub(super) fn take(&self, offset: u64, len: u64) -> bool {
        let Some((first, end)) = self.pages(offset, len) else { return false };
        for (word, mask) in masks(first, end) {
            // Acquire: what the page's last owner did is seen.
            let before = self.words[word].fetch_or(mask, Ordering::Acquire);
            if before & mask != 0 {
                self.words[word].fetch_and(before | !mask, Ordering::Release);
                let taken = masks(first, end).take_while(|(other, _)| *other < word);
                taken.for_each(|(word, mask)| self.clear(word, mask));
                return false;
            }
        }
        true
    }

    /// Gives back what [`Self::take`] gave.
    pub(super) fn give_back(&self, offset: u64, len: u64) {
        if let Some((first, end)) = self.pages(offset, len) {
            masks(first, end).for_each(|(word, mask)| self.clear(word, mask));
        }
    }

    fn clear(&self, word: usize, mask: u64) {
        self.words[word].fetch_and(!mask, Ordering::Release);
    }

    /// Bytes claimed.
    pub(super) fn used(&self) -> u64 {
        let bits = |word: &AtomicU64| u64::from(word.load(Ordering::Relaxed).count_ones());
        self.words.iter().map(bits).sum::<u64>() * POOL_UNIT
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sys::pool::PoolMemory;

    proptest! {
        #[test]
        fn no_page_is_ever_claimed_twice_and_a_refusal_changes_nothing(
            steps in prop::collection::vec((0u64..200, 1u64..150, any::<bool>()), 1..100),
        ) {
            let claims = Claims::new(200 * POOL_UNIT);
            let mut held: Vec<(u64, u64)> = vec![];
            for (first, count, release) in steps {
                let free = held.iter().all(|(f, c)| first + count <= *f || f + c <= first);
                let taken = claims.take(first * POOL_UNIT, count * POOL_UNIT - 7);
                prop_assert_eq!(taken, free && first + count <= 200);
                if taken {
                    held.push((first, count));
                }
                prop_assert_eq!(claims.used(), held.iter().map(|(_, c)| c * POOL_UNIT).sum::<u64>());
                if release && let Some((first, count)) = held.pop() {
                    claims.give_back(first * POOL_UNIT, count * POOL_UNIT - 7);
                }
            }
        }
    }

    #[test]
    fn a_claimed_slice_is_exclusive_until_it_is_dropped() {
        let pool = PoolMemory::shared_for_claims(1 << 20).unwrap();
        let mut slice = pool.claim(8192, 5000).unwrap();
        slice.bytes_mut().fill(7);
        assert_eq!((slice.offset(), slice.len(), pool.used()), (8192, 5000, 8192));
        assert!(pool.claim(12288, 1).is_none() && pool.claim(100, 1).is_none());
        assert!(pool.claim(1 << 20, 1).is_none() && pool.reserve(1).is_none());
        drop(slice);
        assert!(pool.claim(12288, 1).is_some());
    }
}
