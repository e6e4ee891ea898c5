//! Index runs: which bytes of a segment hold the newest version of which sectors.
//!
//! Owns the packed 16-byte entry and the map that cuts older versions away. Never reads a file.

use std::collections::BTreeMap;

use farshore_extent::{Extent, SECTOR};

use crate::layout::{index_entry, u16_at, u32_at, u64_at};
use crate::limits::FRAME_RAW;

/// Longest entry: the length has 24 bits, in sectors (8 GiB less one sector).
pub const MAX_ENTRY_SECTORS: u64 = (1 << 24) - 1;

/// Addresses have 40 bits, in sectors.
const MAX_ADDRESS: u64 = (1 << 40) - 1;

/// Sectors in a full frame.
const FRAME_SECTORS: u64 = FRAME_RAW as u64 / SECTOR;

/// Where the content of an indexed range comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndexPlace {
    /// Bytes of a frame.
    Frame {
        /// Ordinal of the frame in its segment.
        frame: u32,
        /// First sector within the raw frame.
        sector: u8,
    },
    /// Zeroes.
    Zero,
    /// Nobody knows: a write failed at the source and was not read again yet.
    Unknown,
}

/// A place that can be cut: what lies `sectors` further on.
pub trait SourcePlace: Copy {
    /// The place `sectors` behind this one.
    #[must_use]
    fn advanced(self, sectors: u64) -> Self;
    /// Whether `next`, `sectors` later, goes on where this leaves off.
    fn continues(self, sectors: u64, next: Self) -> bool;
}

impl SourcePlace for IndexPlace {
    fn advanced(self, sectors: u64) -> Self {
        match self {
            Self::Frame { frame, sector } => {
                let moved = u64::from(sector) + sectors;
                // A piece of an entry lies within its frame, so it never saturates.
                Self::Frame { frame, sector: u8::try_from(moved).unwrap_or(u8::MAX) }
            }
            Self::Zero => Self::Zero,
            Self::Unknown => Self::Unknown,
        }
    }

    fn continues(self, sectors: u64, next: Self) -> bool {
        match (self, next) {
            (Self::Frame { frame, sector }, Self::Frame { frame: after, sector: there }) => {
                frame == after && u64::from(sector) + sectors == u64::from(there)
            }
            (Self::Zero, Self::Zero) | (Self::Unknown, Self::Unknown) => true,
            (Self::Frame { .. } | Self::Zero | Self::Unknown, _) => false,
        }
    }
}

/// One entry of a run: these sectors are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexEntry {
    /// First sector of the volume.
    pub sector: u64,
    /// Number of sectors, 1..=[`MAX_ENTRY_SECTORS`].
    pub sectors: u64,
    /// Where their content is.
    pub place: IndexPlace,
}

impl IndexEntry {
    /// The bytes of the volume it describes.
    #[must_use]
    pub fn extent(&self) -> Option<Extent> {
        Extent::new(self.sector.checked_mul(SECTOR)?, self.sectors.checked_mul(SECTOR)?).ok()
    }

    /// First sector behind it.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.sector + self.sectors
    }

    /// The 16 bytes of the entry.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        let mut out = [0; 16];
        let word = (self.sector & MAX_ADDRESS) << 24 | (self.sectors & MAX_ENTRY_SECTORS);
        out[index_entry::address_and_len].copy_from_slice(&word.to_le_bytes());
        let (kind, frame, sector) = match self.place {
            IndexPlace::Frame { frame, sector } => (0, frame, sector),
            IndexPlace::Zero => (1, 0, 0),
            IndexPlace::Unknown => (2, 0, 0),
        };
        out[index_entry::frame].copy_from_slice(&frame.to_le_bytes());
        out[index_entry::sector_in_frame][0] = sector;
        out[index_entry::kind][0] = kind;
        out
    }

    /// Reads an entry; `None` for values that no writer produces.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 16]) -> Option<Self> {
        let word = u64_at(bytes, index_entry::address_and_len);
        let (sector, sectors) = (word >> 24, word & MAX_ENTRY_SECTORS);
        let frame = u32_at(bytes, index_entry::frame);
        let within = bytes[index_entry::sector_in_frame][0];
        let place = match bytes[index_entry::kind][0] {
            0 => IndexPlace::Frame { frame, sector: within },
            1 if frame == 0 && within == 0 => IndexPlace::Zero,
            2 if frame == 0 && within == 0 => IndexPlace::Unknown,
            _ => return None,
        };
        let in_frame = match place {
            IndexPlace::Frame { sector, .. } => u64::from(sector) + sectors <= FRAME_SECTORS,
            IndexPlace::Zero | IndexPlace::Unknown => true,
        };
        let possible = sectors > 0
            && sector + sectors <= MAX_ADDRESS + 1
            && in_frame
            && u16_at(bytes, index_entry::reserved) == 0;
        possible.then_some(Self { sector, sectors, place })
    }
}

/// The newest version of every range: later insertions cut earlier ones away.
#[derive(Debug, Clone, Default)]
pub struct RunMap<P> {
    /// First sector -> (sectors, place); no two overlap.
    ranges: BTreeMap<u64, (u64, P)>,
}

impl<P: SourcePlace> RunMap<P> {
    /// An empty map.
    #[must_use]
    pub const fn new() -> Self {
        Self { ranges: BTreeMap::new() }
    }

    /// Number of ranges.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether nothing was inserted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// `sectors` from `sector` on are at `place` now, whatever was said before.
    pub fn insert(&mut self, sector: u64, sectors: u64, place: P) {
        if sectors == 0 {
            return;
        }
        let end = sector + sectors;
        while let Some((&start, &(len, old))) = self.ranges.range(..end).next_back() {
            let old_end = start + len;
            if old_end <= sector {
                break;
            }
            self.ranges.remove(&start);
            if start < sector {
                self.ranges.insert(start, (sector - start, old));
            }
            if old_end > end {
                self.ranges.insert(end, (old_end - end, old.advanced(end - start)));
            }
        }
        self.ranges.insert(sector, (sectors, place));
    }

    /// All ranges by address, neighbours joined when one goes on where the other leaves off and
    /// the whole does not exceed [`MAX_ENTRY_SECTORS`]; longer ranges are divided.
    pub fn joined(&self) -> impl Iterator<Item = (u64, u64, P)> + '_ {
        let mut pieces = self.ranges.iter().flat_map(|(&at, &(len, place))| {
            (0..len.div_ceil(MAX_ENTRY_SECTORS)).map(move |n| {
                let skip = n * MAX_ENTRY_SECTORS;
                (at + skip, (len - skip).min(MAX_ENTRY_SECTORS), place.advanced(skip))
            })
        });
        let mut held: Option<(u64, u64, P)> = None;
        core::iter::from_fn(move || {
            loop {
                let Some((at, len, place)) = pieces.next() else { return held.take() };
                match &mut held {
                    Some((start, have, before))
                        if *start + *have == at
                            && *have + len <= MAX_ENTRY_SECTORS
                            && before.continues(*have, place) =>
                    {
                        *have += len;
                    }
                    _ => {
                        if let Some(done) = held.replace((at, len, place)) {
                            return Some(done);
                        }
                    }
                }
            }
        })
    }
}

impl RunMap<IndexPlace> {
    /// The entries of a run, sorted by address.
    pub fn entries(&self) -> impl Iterator<Item = IndexEntry> + '_ {
        self.joined().map(|(sector, sectors, place)| IndexEntry { sector, sectors, place })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_map_agrees_with_a_flat_array(ops in prop::collection::vec((0u64..60, 1u64..20, 0u32..3), 0..60)) {
            let mut map = RunMap::new();
            let mut model = vec![None; 80];
            for (n, (at, len, kind)) in ops.into_iter().enumerate() {
                let frame = u32::try_from(n).unwrap();
                let place = match kind {
                    0 => IndexPlace::Frame { frame, sector: 3 },
                    1 => IndexPlace::Zero,
                    _ => IndexPlace::Unknown,
                };
                map.insert(at, len, place);
                for i in 0..len {
                    model[usize::try_from(at + i).unwrap()] = Some(place.advanced(i));
                }
            }
            let mut flat = vec![None; 80];
            let mut last = 0;
            for entry in map.entries() {
                prop_assert!(entry.sector >= last);
                last = entry.end();
                for i in 0..entry.sectors {
                    flat[usize::try_from(entry.sector + i).unwrap()] = Some(entry.place.advanced(i));
                }
                prop_assert_eq!(IndexEntry::from_bytes(&entry.to_bytes()), Some(entry));
            }
            prop_assert_eq!(flat, model);
        }

        #[test]
        fn an_entry_survives_any_bytes(bytes: [u8; 16]) {
            if let Some(entry) = IndexEntry::from_bytes(&bytes) {
                prop_assert_eq!(entry.to_bytes(), bytes);
                prop_assert!(entry.extent().is_some());
            }
        }
    }

    #[test]
    fn ranges_longer_than_an_entry_are_divided_and_short_ones_joined() {
        let mut map = RunMap::new();
        map.insert(0, MAX_ENTRY_SECTORS + 5, IndexPlace::Zero);
        map.insert(1 << 30, 4, IndexPlace::Frame { frame: 1, sector: 0 });
        map.insert((1 << 30) + 4, 4, IndexPlace::Frame { frame: 1, sector: 4 });
        let lens: Vec<_> = map.entries().map(|e| e.sectors).collect();
        assert_eq!(lens, [MAX_ENTRY_SECTORS, 5, 8]);
    }
}
