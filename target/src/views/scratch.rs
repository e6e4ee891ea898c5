//! Writes made to a view: a sparse file of its own and a map of what it holds.
//!
//! Lives and dies with the view: the file has no name, so a crash leaves nothing behind. Never
//! touches base or journal.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use farshore_extent::{Extent, ExtentSet};

/// Most disjoint ranges of one scratch: 1 Mi x about 64 B in the map = 64 MiB.
const MAX_RANGES: usize = 1 << 20;

/// Where the bytes of a range of a view are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In the scratch file, at the same offset.
    Scratch,
    /// Zeroed by the view's user.
    Zero,
    /// Untouched: at the recovery point.
    Point,
}

/// Why a write was not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum ScratchError {
    /// Quota or file system full. Only this view fails.
    #[error("the scratch of the view is full")]
    Full,
    /// The file system failed.
    #[error("{0}")]
    Io(io::Error),
}

impl From<io::Error> for ScratchError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full,
            _ => Self::Io(error),
        }
    }
}

#[derive(Debug, Default)]
struct Map {
    written: ExtentSet,
    zeroed: ExtentSet,
    /// Bytes in `written`.
    used: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Scratch {
    file: File,
    quota: u64,
    map: RwLock<Map>,
}

impl Scratch {
    /// An empty scratch of at most `quota` bytes, in a nameless file below `dir`.
    pub(super) fn create(dir: &Path, name: &str, quota: u64) -> io::Result<Self> {
        let path = dir.join(name);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(Self { file, quota, map: RwLock::default() })
    }

    fn read_map(&self) -> RwLockReadGuard<'_, Map> {
        self.map.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_map(&self) -> RwLockWriteGuard<'_, Map> {
        self.map.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes written so far.
    pub(super) fn used(&self) -> u64 {
        self.read_map().used
    }

    /// Most bytes that may be written.
    pub(super) const fn quota(&self) -> u64 {
        self.quota
    }

    /// Cuts `extent` into pieces by where their bytes are, ascending, without gaps.
    pub(super) fn places(&self, extent: Extent) -> Vec<(Extent, Place)> {
        let map = self.read_map();
        let mut known: Vec<(Extent, Place)> =
            map.written.inside(extent).map(|e| (e, Place::Scratch)).collect();
        known.extend(map.zeroed.inside(extent).map(|e| (e, Place::Zero)));
        drop(map);
        known.sort_unstable_by_key(|(e, _)| e.offset());
        let mut pieces = Vec::with_capacity(known.len() * 2 + 1);
        let mut at = extent.offset();
        for (piece, place) in known {
            pieces.extend(Extent::between(at, piece.offset()).map(|gap| (gap, Place::Point)));
            pieces.push((piece, place));
            at = piece.end();
        }
        pieces.extend(Extent::between(at, extent.end()).map(|gap| (gap, Place::Point)));
        pieces
    }

    /// Reads bytes that [`Self::places`] said are here.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, offset)
    }

    /// Takes a write. When it fails nothing of it is visible.
    pub(super) fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), ScratchError> {
        // Exclusive over the write: the map must never point at bytes that are not there, and a
        // zero request for the same range must not slip in between.
        let mut map = self.write_map();
        let there: u64 = map.written.inside(extent).map(Extent::len).sum();
        let used = map.used + extent.len() - there;
        if used > self.quota || map.is_full() {
            return Err(ScratchError::Full);
        }
        self.file.write_all_at(bytes, extent.offset())?;
        map.zeroed.remove(extent);
        map.written.insert(extent);
        map.used = used;
        Ok(())
    }

    /// Makes the range read as zero. Costs no space in the file.
    pub(super) fn zero(&self, extent: Extent) -> Result<(), ScratchError> {
        let mut map = self.write_map();
        if map.is_full() {
            return Err(ScratchError::Full);
        }
        let there: u64 = map.written.inside(extent).map(Extent::len).sum();
        map.written.remove(extent);
        map.zeroed.insert(extent);
        map.used -= there;
        Ok(())
    }
}

impl Map {
    fn is_full(&self) -> bool {
        self.written.extents() + self.zeroed.extents() >= MAX_RANGES
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ext(offset: u64, len: u64) -> Extent {
        Extent::new(offset, len).unwrap()
    }

    fn size(n: u64) -> usize {
        usize::try_from(n).unwrap()
    }

    proptest! {
        #[test]
        fn a_scratch_over_a_point_reads_like_a_disk(
            ops in prop::collection::vec((0u8..3, 0u64..60, 1u64..9), 1..40),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let scratch = Scratch::create(dir.path(), "s", 1 << 20).unwrap();
            let mut model = vec![0xEEu8; 64];
            for (n, (op, offset, len)) in ops.into_iter().enumerate() {
                let len = len.min(64 - offset);
                let extent = ext(offset, len);
                let range = size(offset)..size(offset + len);
                let value = u8::try_from(n).unwrap();
                match op {
                    0 => { scratch.zero(extent).unwrap(); model[range].fill(0) }
                    _ => {
                        scratch.write(extent, &vec![value; size(len)]).unwrap();
                        model[range].fill(value);
                    }
                }
                let mut seen = Vec::new();
                for (piece, place) in scratch.places(ext(0, 64)) {
                    prop_assert_eq!(piece.offset(), seen.len() as u64, "no gap, no overlap");
                    let mut bytes = vec![0; size(piece.len())];
                    match place {
                        Place::Scratch => scratch.read(piece.offset(), &mut bytes).unwrap(),
                        Place::Zero => {}
                        Place::Point => bytes.fill(0xEE),
                    }
                    seen.extend(bytes);
                }
                prop_assert_eq!(&seen, &model);
            }
        }
    }

    #[test]
    fn the_quota_counts_each_byte_once_and_zeroing_gives_back() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::create(dir.path(), "s", 8192).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the file has no name");
        scratch.write(ext(0, 8192), &[1; 8192]).unwrap();
        scratch.write(ext(4096, 4096), &[2; 4096]).unwrap();
        assert!(matches!(scratch.write(ext(8192, 512), &[3; 512]), Err(ScratchError::Full)));
        assert_eq!(scratch.places(ext(8192, 512)), [(ext(8192, 512), Place::Point)]);
        scratch.zero(ext(0, 4096)).unwrap();
        assert_eq!(scratch.used(), 4096);
        scratch.write(ext(8192, 512), &[3; 512]).unwrap();
        assert_eq!(scratch.used(), 4608);
    }
}
