//! One bit for each region of a volume.

use farshore_extent::{Extent, VolumeSize};

/// Words of a block of bits: the unit in which a map is kept on disk.
pub const BLOCK_WORDS: usize = 58;

/// Regions of a block of bits.
pub const BLOCK_REGIONS: u64 = BLOCK_WORDS as u64 * 64;

/// A set of regions. A region is an equal piece of the volume; the last one may be short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionMap {
    /// Whole blocks; bits behind the last region are clear.
    words: Vec<u64>,
    size: VolumeSize,
    region: u64,
    regions: u64,
    set: u64,
}

impl RegionMap {
    /// Default size of a region in bytes.
    pub const DEFAULT_REGION: u64 = 16 << 20;

    /// The empty set. `region`: bytes, a power of two not below the volume's chunk.
    #[must_use]
    pub fn new(size: VolumeSize, region: u64) -> Self {
        let regions = size.get().div_ceil(region);
        let blocks = usize::try_from(regions.div_ceil(BLOCK_REGIONS)).unwrap_or(usize::MAX);
        Self { words: vec![0; blocks * BLOCK_WORDS], size, region, regions, set: 0 }
    }

    /// All regions.
    #[must_use]
    pub fn full(size: VolumeSize, region: u64) -> Self {
        let mut map = Self::new(size, region);
        map.fill();
        map
    }

    /// Adds all regions.
    pub fn fill(&mut self) {
        for region in 0..self.regions {
            self.set(region);
        }
    }

    /// Makes room for a larger volume; new regions are not in the set. A last region that was short
    /// keeps what it is.
    pub fn grow(&mut self, size: VolumeSize) {
        debug_assert!(size >= self.size);
        let larger = Self::new(size, self.region);
        self.words.resize(larger.words.len(), 0);
        (self.size, self.regions) = (size, larger.regions);
    }

    /// Size of the volume.
    #[must_use]
    pub const fn size(&self) -> VolumeSize {
        self.size
    }

    /// Bytes of a region.
    #[must_use]
    pub const fn region(&self) -> u64 {
        self.region
    }

    /// Regions of the volume.
    #[must_use]
    pub const fn regions(&self) -> u64 {
        self.regions
    }

    /// Regions in the set.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.set
    }

    /// Blocks of bits.
    #[must_use]
    pub const fn blocks(&self) -> usize {
        self.words.len() / BLOCK_WORDS
    }

    /// The regions that `extent` touches.
    #[must_use]
    pub const fn touched(&self, extent: Extent) -> std::ops::Range<u64> {
        extent.offset() / self.region..extent.end().div_ceil(self.region)
    }

    /// Where a region lies. `None` behind the last one.
    #[must_use]
    pub fn extent(&self, region: u64) -> Option<Extent> {
        let start = region.checked_mul(self.region)?;
        Extent::between(start, (start + self.region).min(self.size.get()))
    }

    /// Whether a region is in the set.
    #[must_use]
    pub fn has(&self, region: u64) -> bool {
        let (word, bit) = place(region);
        self.words.get(word).is_some_and(|w| w & bit != 0)
    }

    /// Adds a region; false when it was in the set.
    pub fn set(&mut self, region: u64) -> bool {
        let (word, bit) = place(region);
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        self.set += u64::from(new);
        new
    }

    /// Takes a region out; false when it was not in the set.
    pub fn clear(&mut self, region: u64) -> bool {
        let (word, bit) = place(region);
        let was = self.words[word] & bit != 0;
        self.words[word] &= !bit;
        self.set -= u64::from(was);
        was
    }

    /// Takes out what is not in `block` too.
    pub fn keep_in_block(&mut self, index: usize, block: &[u64; BLOCK_WORDS]) {
        self.change_block(index, block, |own, other| own & other);
    }

    /// Adds what is in `block`. Bits behind the last region count for nothing.
    pub fn add_block(&mut self, index: usize, block: &[u64; BLOCK_WORDS]) {
        self.change_block(index, block, |own, other| own | other);
    }

    fn change_block(&mut self, index: usize, block: &[u64; BLOCK_WORDS], op: fn(u64, u64) -> u64) {
        let first = index * BLOCK_WORDS;
        let words = self.words.iter_mut().enumerate().skip(first);
        for ((at, own), other) in words.zip(block) {
            let valid = match self.regions.saturating_sub(at as u64 * 64) {
                64.. => u64::MAX,
                left => (1 << left) - 1,
            };
            let after = op(*own, *other) & valid;
            self.set = self.set + u64::from(after.count_ones()) - u64::from(own.count_ones());
            *own = after;
        }
    }

    /// The bits of a block.
    #[must_use]
    pub fn block(&self, index: usize) -> [u64; BLOCK_WORDS] {
        let mut block = [0; BLOCK_WORDS];
        let words = self.words.iter().skip(index * BLOCK_WORDS);
        block.iter_mut().zip(words).for_each(|(to, from)| *to = *from);
        block
    }

    /// The regions of the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        let words = self.words.iter().enumerate().filter(|(_, word)| **word != 0);
        words.flat_map(|(at, word)| {
            (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| at as u64 * 64 + bit)
        })
    }

    /// The block that a region's bit lies in.
    #[must_use]
    pub fn block_of(region: u64) -> usize {
        usize::try_from(region / BLOCK_REGIONS).unwrap_or(usize::MAX)
    }
}

fn place(region: u64) -> (usize, u64) {
    (usize::try_from(region / 64).unwrap_or(usize::MAX), 1 << (region % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set(
            regions in 1u64..9000,
            ops in prop::collection::vec((0u8..4, any::<prop::sample::Index>()), 0..60),
        ) {
            let size = VolumeSize::new(regions * 4096 - 512).unwrap();
            let mut map = RegionMap::new(size, 4096);
            let mut model = BTreeSet::new();
            let index = |i: &prop::sample::Index| i.index(usize::try_from(regions).unwrap()) as u64;
            for (op, region) in ops {
                let region = index(&region);
                let block = RegionMap::block_of(region);
                let mut own = |r: &u64| RegionMap::block_of(*r) == block;
                match op {
                    0 => prop_assert_eq!(map.set(region), model.insert(region)),
                    1 => prop_assert_eq!(map.clear(region), model.remove(&region)),
                    2 => {
                        map.add_block(block, &[u64::MAX; BLOCK_WORDS]);
                        model.extend((0..regions).filter(&mut own));
                    }
                    _ => {
                        let mut keep = RegionMap::new(size, 4096);
                        keep.set(region);
                        map.keep_in_block(block, &keep.block(block));
                        model.retain(|r| !own(r) || *r == region);
                    }
                }
            }
            prop_assert_eq!(map.count(), model.len() as u64);
            prop_assert_eq!(map.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert!(map.extent(regions).is_none());
            prop_assert_eq!(map.extent(regions - 1).unwrap().end(), size.get());
            let mut again = RegionMap::new(size, 4096);
            (0..map.blocks()).for_each(|block| again.add_block(block, &map.block(block)));
            prop_assert_eq!(again, map);
        }
    }
}
