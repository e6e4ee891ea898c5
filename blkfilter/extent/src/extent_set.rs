//! A sorted set of bytes, kept as disjoint, non-touching extents.

use std::collections::BTreeMap;

use crate::Extent;

/// Sorted, merged extents. Adding and removing cost O(log n) plus the extents swallowed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExtentSet {
    /// start -> end; no two touch.
    ranges: BTreeMap<u64, u64>,
}

impl ExtentSet {
    /// The empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds all bytes of `extent`.
    pub fn insert(&mut self, extent: Extent) {
        let (mut start, mut end) = (extent.offset(), extent.end());
        // Swallow every range that touches [start, end], from the right to the left.
        while let Some((&s, &e)) = self.ranges.range(..=end).next_back() {
            if e < start {
                break;
            }
            start = start.min(s);
            end = end.max(e);
            self.ranges.remove(&s);
        }
        self.ranges.insert(start, end);
    }

    /// Takes all bytes of `extent` out.
    pub fn remove(&mut self, extent: Extent) {
        let (start, end) = (extent.offset(), extent.end());
        while let Some((&s, &e)) = self.ranges.range(..end).next_back() {
            if e <= start {
                break;
            }
            self.ranges.remove(&s);
            if s < start {
                self.ranges.insert(s, start);
            }
            if e > end {
                self.ranges.insert(end, e);
            }
        }
    }

    /// Whether any byte of `extent` is in the set.
    #[must_use]
    pub fn overlaps(&self, extent: Extent) -> bool {
        self.ranges.range(..extent.end()).next_back().is_some_and(|(_, &e)| e > extent.offset())
    }

    /// Whether all bytes of `extent` are in the set.
    #[must_use]
    pub fn contains(&self, extent: Extent) -> bool {
        self.ranges.range(..=extent.offset()).next_back().is_some_and(|(_, &e)| e >= extent.end())
    }

    /// The parts of the set inside `extent`, ascending.
    pub fn inside(&self, extent: Extent) -> impl Iterator<Item = Extent> {
        let first =
            self.ranges.range(..=extent.offset()).next_back().map_or(extent.offset(), |(&s, _)| s);
        self.ranges.range(first..extent.end()).filter_map(move |(&s, &e)| {
            Extent::between(s.max(extent.offset()), e.min(extent.end()))
        })
    }

    /// All extents, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Extent> {
        self.ranges.iter().filter_map(|(&s, &e)| Extent::between(s, e))
    }

    /// Number of disjoint extents.
    #[must_use]
    pub fn extents(&self) -> usize {
        self.ranges.len()
    }

    /// Number of bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|(s, e)| e - s).sum()
    }

    /// Whether there is no byte in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

impl FromIterator<Extent> for ExtentSet {
    fn from_iter<I: IntoIterator<Item = Extent>>(extents: I) -> Self {
        let mut set = Self::new();
        extents.into_iter().for_each(|e| set.insert(e));
        set
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set_of_bytes(ops in prop::collection::vec((any::<bool>(), 0u64..60, 1u64..20), 0..60)) {
            let mut set = ExtentSet::new();
            let mut model = BTreeSet::new();
            for (add, offset, len) in ops {
                let extent = Extent::new(offset, len).unwrap();
                if add {
                    set.insert(extent);
                    model.extend(offset..offset + len);
                } else {
                    set.remove(extent);
                    model.retain(|b| !(offset..offset + len).contains(b));
                }
                let flat: BTreeSet<u64> = set.iter().flat_map(|e| e.offset()..e.end()).collect();
                prop_assert_eq!(&flat, &model);
                prop_assert_eq!(set.bytes(), model.len() as u64);
                let parts: Vec<_> = set.iter().collect();
                prop_assert!(parts.windows(2).all(|w| w[0].end() < w[1].offset()), "touching parts");
                prop_assert_eq!(set.overlaps(extent), model.range(offset..offset + len).next().is_some());
                prop_assert_eq!(set.contains(extent), (offset..offset + len).all(|b| model.contains(&b)));
                let inside: BTreeSet<u64> = set.inside(extent).flat_map(|e| e.offset()..e.end()).collect();
                let wanted: BTreeSet<u64> = model.range(offset..offset + len).copied().collect();
                prop_assert_eq!(inside, wanted);
            }
        }
    }
}
