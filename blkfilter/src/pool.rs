//! Who holds which part of a pool: a pure allocator, without memory behind it.
//!
//! [`crate::sys::pool::PoolMemory`] puts memory behind it and relies on it for exclusivity: no two
//! ranges handed out and not yet given back ever overlap. The simulator uses it alone.

use std::collections::BTreeMap;

/// Granularity of reservations in bytes.
pub const POOL_UNIT: u64 = 4096;

/// A range handed out by a [`PoolSpace`], in bytes; both numbers are multiples of [`POOL_UNIT`].
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct PoolRange {
    offset: u64,
    len: u64,
}

impl PoolRange {
    /// First byte in the pool.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Length in bytes, rounded up to [`POOL_UNIT`].
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // never empty
    pub const fn len(&self) -> u64 {
        self.len
    }
}

/// Free and used parts of a pool.
///
/// Next fit: reservations walk through the pool like through a ring, because the log releases in
/// about the order it reserves; what is free then stays one large piece.
#[derive(Debug)]
pub struct PoolSpace {
    /// Start → length of the free pieces; never touching each other.
    free: BTreeMap<u64, u64>,
    /// Where the last reservation ended.
    cursor: u64,
    capacity: u64,
    used: u64,
}

impl PoolSpace {
    /// A free pool of `bytes`, rounded down to [`POOL_UNIT`].
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        let capacity = bytes - bytes % POOL_UNIT;
        let free = if capacity == 0 { BTreeMap::new() } else { BTreeMap::from([(0, capacity)]) };
        Self { free, cursor: 0, capacity, used: 0 }
    }

    /// Size in bytes.
    #[must_use]
    pub const fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Bytes handed out.
    #[must_use]
    pub const fn used(&self) -> u64 {
        self.used
    }

    /// A range of at least `len` bytes, one piece; `None` when there is none, or `len` is zero.
    pub fn reserve(&mut self, len: u64) -> Option<PoolRange> {
        let len = len.checked_next_multiple_of(POOL_UNIT)?;
        if len == 0 || len > self.capacity - self.used {
            return None;
        }
        let fits = |(&start, &size): (&u64, &u64)| (size >= len).then_some((start, size));
        let (start, size) = self
            .free
            .range(self.cursor..)
            .find_map(fits)
            .or_else(|| self.free.range(..self.cursor).find_map(fits))?;
        self.free.remove(&start);
        if size > len {
            self.free.insert(start + len, size - len);
        }
        self.cursor = start + len;
        self.used += len;
        Some(PoolRange { offset: start, len })
    }

    /// Takes a range back. It must come from this pool; ranges cannot be copied, so none can come
    /// back twice.
    pub fn give_back(&mut self, range: PoolRange) {
        let PoolRange { offset, mut len } = range;
        debug_assert!(offset + len <= self.capacity, "a range of another pool");
        self.used -= len;
        if let Some(next) = self.free.remove(&(offset + len)) {
            len += next;
        }
        if let Some((&before, size)) = self.free.range_mut(..offset).next_back()
            && before + *size == offset
        {
            *size += len;
            return;
        }
        self.free.insert(offset, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_full_pool_refuses_and_is_whole_again_after_release() {
        let mut space = PoolSpace::new(16 * POOL_UNIT + 100);
        assert_eq!(space.capacity(), 16 * POOL_UNIT);
        assert_eq!(space.reserve(0), None);
        let held: Vec<_> = (0..16).map(|_| space.reserve(1).unwrap()).collect();
        assert_eq!(space.reserve(1), None);
        for range in held {
            space.give_back(range);
        }
        assert_eq!(space.used(), 0);
        assert!(space.reserve(16 * POOL_UNIT).is_some());
    }

    proptest! {
        #[test]
        fn held_ranges_never_overlap_and_nothing_is_lost(
            steps in proptest::collection::vec((any::<bool>(), 1u64..40_000, any::<usize>()), 1..300),
        ) {
            let mut space = PoolSpace::new(64 * POOL_UNIT);
            let mut held: Vec<PoolRange> = Vec::new();
            for (reserve, len, which) in steps {
                if reserve {
                    if let Some(range) = space.reserve(len) {
                        prop_assert!(range.len() >= len && range.offset() + range.len() <= space.capacity());
                        prop_assert!(held.iter().all(|h| h.offset + h.len <= range.offset
                            || range.offset + range.len <= h.offset));
                        held.push(range);
                    }
                } else if !held.is_empty() {
                    let range = held.swap_remove(which % held.len());
                    space.give_back(range);
                }
                prop_assert_eq!(space.used(), held.iter().map(PoolRange::len).sum::<u64>());
                let free: u64 = space.free.values().sum();
                prop_assert_eq!(free + space.used(), space.capacity());
            }
            for range in held { space.give_back(range); }
            prop_assert_eq!(space.free.len(), 1);
        }
    }
}
