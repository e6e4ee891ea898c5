//! One bit for each chunk of a volume: chunks whose content is still to be sent.

use crate::{Extent, ExtentError, VolumeSize};

/// Size of a chunk in bytes: a power of two, 64 KiB to 1 MiB (glossary).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSize(u64);

impl ChunkSize {
    /// 256 KiB: one copy read is long enough for full disk speed and short enough to be waited for.
    pub const DEFAULT: Self = Self(256 << 10);

    /// Checks and wraps.
    ///
    /// # Errors
    /// [`ExtentError::BadSize`] when it is not a power of two in 64 KiB..=1 MiB.
    pub const fn new(bytes: u64) -> Result<Self, ExtentError> {
        if !bytes.is_power_of_two() || bytes < (64 << 10) || bytes > (1 << 20) {
            return Err(ExtentError::BadSize { what: "chunk size", value: bytes });
        }
        Ok(Self(bytes))
    }

    /// A chunk of a few sectors, so that a simulator reaches every edge with a tiny volume.
    #[must_use]
    pub const fn tiny(bytes: u64) -> Self {
        Self(bytes)
    }

    /// In bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// The dirty map. 1 TiB at 256 KiB takes 512 KiB of memory.
#[derive(Debug, Clone)]
pub struct ChunkMap {
    words: Vec<u64>,
    size: VolumeSize,
    chunk: ChunkSize,
    dirty: u64,
}

impl ChunkMap {
    /// A map with no chunk dirty.
    #[must_use]
    pub fn clean(size: VolumeSize, chunk: ChunkSize) -> Self {
        let chunks = size.get().div_ceil(chunk.get());
        let words = usize::try_from(chunks.div_ceil(64)).unwrap_or(usize::MAX);
        Self { words: vec![0; words], size, chunk, dirty: 0 }
    }

    /// A map with every chunk dirty: the start of an initial copy.
    #[must_use]
    pub fn all_dirty(size: VolumeSize, chunk: ChunkSize) -> Self {
        let mut map = Self::clean(size, chunk);
        map.mark(size.extent());
        map
    }

    /// Makes room for a larger volume; new chunks are clean. A last chunk that was short keeps what
    /// it is.
    pub fn grow(&mut self, size: VolumeSize) {
        debug_assert!(size >= self.size);
        let larger = Self::clean(size, self.chunk);
        self.words.resize(larger.words.len(), 0);
        self.size = size;
    }

    /// Marks every chunk that `extent` touches.
    pub fn mark(&mut self, extent: Extent) {
        for index in self.indices(extent) {
            let (word, bit) = Self::place(index);
            self.dirty += u64::from(self.words[word] & bit == 0);
            self.words[word] |= bit;
        }
    }

    /// Clears the chunk that starts at `chunk.offset()`; the caller holds its range lock.
    pub fn clear(&mut self, chunk: Extent) {
        for index in self.indices(chunk) {
            let (word, bit) = Self::place(index);
            self.dirty -= u64::from(self.words[word] & bit != 0);
            self.words[word] &= !bit;
        }
    }

    /// Whether any chunk that `extent` touches is dirty.
    #[must_use]
    pub fn touches_dirty(&self, extent: Extent) -> bool {
        self.dirty > 0
            && self.indices(extent).any(|index| {
                let (word, bit) = Self::place(index);
                self.words[word] & bit != 0
            })
    }

    /// The parts of `extent` that lie in clean chunks, ascending, neighbours joined.
    #[must_use]
    pub fn clean_parts(&self, extent: Extent) -> Vec<Extent> {
        if self.dirty == 0 {
            return vec![extent];
        }
        let mut parts: Vec<Extent> = Vec::new();
        for piece in extent.split_at_multiples_of(self.chunk.get()) {
            if self.touches_dirty(piece) {
                continue;
            }
            match parts.last_mut() {
                Some(last) if last.end() == piece.offset() => {
                    if let Some(joined) = Extent::between(last.offset(), piece.end()) {
                        *last = joined;
                    }
                }
                _ => parts.push(piece),
            }
        }
        parts
    }

    /// The first dirty chunk at or after byte `from`, wrapping round once; `None` when all are
    /// clean. The last chunk of a volume may be short.
    #[must_use]
    pub fn next_dirty(&self, from: u64) -> Option<Extent> {
        if self.dirty == 0 {
            return None;
        }
        let chunks = self.size.get().div_ceil(self.chunk.get());
        let start = (from / self.chunk.get()) % chunks;
        self.scan(start, chunks).or_else(|| self.scan(0, start)).and_then(|index| {
            let offset = index * self.chunk.get();
            Extent::between(offset, (offset + self.chunk.get()).min(self.size.get()))
        })
    }

    /// Number of dirty chunks.
    #[must_use]
    pub const fn dirty_chunks(&self) -> u64 {
        self.dirty
    }

    /// Upper bound of the bytes still to be sent.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty.saturating_mul(self.chunk.get()).min(self.size.get())
    }

    fn scan(&self, from: u64, to: u64) -> Option<u64> {
        let mut index = from;
        while index < to {
            let (word, _) = Self::place(index);
            let rest = self.words[word] >> (index % 64);
            if rest == 0 {
                index = (index / 64 + 1) * 64;
            } else {
                index += u64::from(rest.trailing_zeros());
                return (index < to).then_some(index);
            }
        }
        None
    }

    fn indices(&self, extent: Extent) -> impl Iterator<Item = u64> + use<> {
        let end = extent.end().min(self.size.get());
        extent.offset() / self.chunk.get()..end.div_ceil(self.chunk.get())
    }

    fn place(index: u64) -> (usize, u64) {
        (usize::try_from(index / 64).unwrap_or(usize::MAX), 1 << (index % 64))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set_of_chunks(
            size in 1u64..400,
            ops in prop::collection::vec((any::<bool>(), 0u64..400, 1u64..64), 0..40),
            from in 0u64..400,
        ) {
            let (unit, chunk) = (512, 2048);
            let size = VolumeSize::new(size * unit).unwrap();
            let mut map = ChunkMap::clean(size, ChunkSize::tiny(chunk));
            let mut model = BTreeSet::new();
            for (mark, offset, len) in ops {
                let Some(extent) = Extent::between(offset * unit, ((offset + len) * unit).min(size.get())) else { continue };
                let touched = extent.offset() / chunk..extent.end().div_ceil(chunk);
                if mark {
                    map.mark(extent);
                    model.extend(touched);
                } else {
                    map.clear(extent);
                    model.retain(|c| !touched.contains(c));
                }
                prop_assert_eq!(map.dirty_chunks(), model.len() as u64);
                let clean: Vec<u64> = map.clean_parts(extent).into_iter().flat_map(|e| e.offset()..e.end()).collect();
                let wanted: Vec<u64> = (extent.offset()..extent.end()).filter(|b| !model.contains(&(b / chunk))).collect();
                prop_assert_eq!(clean, wanted);
            }
            let start = (from * unit / chunk) % size.get().div_ceil(chunk);
            let wanted = model.range(start..).next().or_else(|| model.first());
            prop_assert_eq!(map.next_dirty(from * unit).map(|e| e.offset() / chunk), wanted.copied());
        }
    }

    #[test]
    fn a_map_that_grows_keeps_its_bits_and_has_room_for_the_new_chunks() {
        let (unit, chunk) = (512, ChunkSize::tiny(2048));
        let size = |units: u64| VolumeSize::new(units * unit).unwrap();
        // From within a chunk, at its end, and over the words of 64 chunks.
        for (from, to) in [(5, 6), (8, 9), (255, 256), (256, 257), (3, 1000)] {
            let mut map = ChunkMap::clean(size(from), chunk);
            map.mark(Extent::new(0, 1).unwrap());
            let before = map.dirty_chunks();
            map.grow(size(to));
            assert_eq!(map.dirty_chunks(), before);
            map.mark(Extent::between(from * unit, to * unit).unwrap());
            map.clear(Extent::new(0, 2048).unwrap());
            let first = if from < 4 { 4 } else { from - from % 4 };
            let last = ((first + 4) * unit).min(to * unit);
            assert_eq!(map.next_dirty(0), Extent::between(first * unit, last));
        }
    }
}
