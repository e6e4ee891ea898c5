//! Byte ranges of a volume and the sizes they must respect.

use core::fmt;

use serde::{Deserialize, Serialize};

/// The unit of all block devices in Linux, in bytes. Smaller units do not exist on a volume.
pub const SECTOR: u64 = 512;

/// Why an extent or a size is impossible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExtentError {
    /// A length of zero describes nothing.
    #[error("an extent of length zero at offset {offset}")]
    Empty {
        /// Where.
        offset: u64,
    },
    /// Offset plus length does not fit 63 bits.
    #[error("extent at {offset} with length {len} ends beyond the largest possible volume")]
    TooFar {
        /// Where it begins.
        offset: u64,
        /// Its length.
        len: u64,
    },
    /// Not a multiple of the unit.
    #[error("extent at {offset} with length {len} is not aligned to {unit} bytes")]
    Unaligned {
        /// Where it begins.
        offset: u64,
        /// Its length.
        len: u64,
        /// The unit in bytes.
        unit: u64,
    },
    /// A size or block size that no device has.
    #[error("{value} bytes is not a possible {what}")]
    BadSize {
        /// Which size.
        what: &'static str,
        /// The value.
        value: u64,
    },
}

/// A contiguous, non-empty byte range of a volume: `[offset, offset + len)`.
///
/// `offset + len` never overflows and fits `i64`, so it can be used as a file position.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "(u64, u64)", into = "(u64, u64)")]
pub struct Extent {
    offset: u64,
    len: u64,
}

impl Extent {
    /// The range of `len` bytes from `offset`.
    ///
    /// # Errors
    /// [`ExtentError::Empty`] or [`ExtentError::TooFar`].
    pub const fn new(offset: u64, len: u64) -> Result<Self, ExtentError> {
        if len == 0 {
            return Err(ExtentError::Empty { offset });
        }
        match offset.checked_add(len) {
            Some(end) if end <= i64::MAX as u64 => Ok(Self { offset, len }),
            _ => Err(ExtentError::TooFar { offset, len }),
        }
    }

    /// The range from `start` up to, not including, `end`; `None` when it is empty or impossible.
    #[must_use]
    pub const fn between(start: u64, end: u64) -> Option<Self> {
        if end <= start || end > i64::MAX as u64 {
            return None;
        }
        Some(Self { offset: start, len: end - start })
    }

    /// First byte.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.offset
    }

    /// Length in bytes; never zero.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // an extent is never empty
    pub const fn len(self) -> u64 {
        self.len
    }

    /// First byte after the range.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.offset + self.len
    }

    /// Whether the two share a byte.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }

    /// Whether `other` lies wholly inside.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.offset <= other.offset && other.end() <= self.end()
    }

    /// The bytes both share.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::between(self.offset.max(other.offset), self.end().min(other.end()))
    }

    /// Whether both ends are multiples of `unit`.
    #[must_use]
    pub const fn is_aligned_to(self, unit: u64) -> bool {
        self.offset.is_multiple_of(unit) && self.len.is_multiple_of(unit)
    }

    /// The same, as an error that names the range.
    ///
    /// # Errors
    /// [`ExtentError::Unaligned`].
    pub const fn require_aligned(self, unit: u64) -> Result<Self, ExtentError> {
        if self.is_aligned_to(unit) {
            Ok(self)
        } else {
            Err(ExtentError::Unaligned { offset: self.offset, len: self.len, unit })
        }
    }

    /// Cuts the range into pieces that do not cross multiples of `unit`.
    pub fn split_at_multiples_of(self, unit: u64) -> impl Iterator<Item = Self> {
        let mut at = self.offset;
        core::iter::from_fn(move || {
            let stop = (at / unit).saturating_add(1).saturating_mul(unit).min(self.end());
            let piece = Self::between(at, stop)?;
            at = stop;
            Some(piece)
        })
    }
}

impl TryFrom<(u64, u64)> for Extent {
    type Error = ExtentError;
    fn try_from((offset, len): (u64, u64)) -> Result<Self, ExtentError> {
        Self::new(offset, len)
    }
}

impl From<Extent> for (u64, u64) {
    fn from(extent: Extent) -> Self {
        (extent.offset, extent.len)
    }
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.offset, self.len)
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.offset, self.len)
    }
}

/// Size of a volume in bytes: a multiple of [`SECTOR`], at least one sector, at most 2^63 - 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct VolumeSize(u64);

impl VolumeSize {
    /// Checks and wraps a size in bytes.
    ///
    /// # Errors
    /// [`ExtentError::BadSize`] when it is zero, not whole sectors, or too large.
    pub const fn new(bytes: u64) -> Result<Self, ExtentError> {
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) || bytes > i64::MAX as u64 {
            return Err(ExtentError::BadSize { what: "volume size", value: bytes });
        }
        Ok(Self(bytes))
    }

    /// The size in bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The whole volume as one extent.
    #[must_use]
    pub const fn extent(self) -> Extent {
        Extent { offset: 0, len: self.0 }
    }
}

impl TryFrom<u64> for VolumeSize {
    type Error = ExtentError;
    fn try_from(bytes: u64) -> Result<Self, ExtentError> {
        Self::new(bytes)
    }
}

impl From<VolumeSize> for u64 {
    fn from(size: VolumeSize) -> u64 {
        size.0
    }
}

/// Logical (smallest addressable) and physical (smallest atomic) block size in bytes, passed
/// through from the backing device. Both are powers of two, 512 to 65536, logical ≤ physical.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "(u32, u32)", into = "(u32, u32)")]
pub struct BlockSizes {
    logical: u32,
    physical: u32,
}

impl BlockSizes {
    /// 512 logical and 4096 physical: what most disks say.
    pub const E512: Self = Self { logical: 512, physical: 4096 };

    /// Checks and wraps the two sizes.
    ///
    /// # Errors
    /// [`ExtentError::BadSize`] when a size is not a power of two in 512..=65536 or they are in
    /// the wrong order.
    pub const fn new(logical: u32, physical: u32) -> Result<Self, ExtentError> {
        const fn possible(n: u32) -> bool {
            n.is_power_of_two() && n >= 512 && n <= 65536
        }
        if !possible(logical) {
            return Err(ExtentError::BadSize { what: "logical block size", value: logical as u64 });
        }
        if !possible(physical) || physical < logical {
            return Err(ExtentError::BadSize {
                what: "physical block size",
                value: physical as u64,
            });
        }
        Ok(Self { logical, physical })
    }

    /// Smallest addressable unit in bytes.
    #[must_use]
    pub const fn logical(self) -> u32 {
        self.logical
    }

    /// Smallest atomic unit in bytes.
    #[must_use]
    pub const fn physical(self) -> u32 {
        self.physical
    }
}

impl TryFrom<(u32, u32)> for BlockSizes {
    type Error = ExtentError;
    fn try_from((logical, physical): (u32, u32)) -> Result<Self, ExtentError> {
        Self::new(logical, physical)
    }
}

impl From<BlockSizes> for (u32, u32) {
    fn from(blocks: BlockSizes) -> Self {
        (blocks.logical, blocks.physical)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ext(offset: u64, len: u64) -> Extent {
        Extent::new(offset, len).unwrap()
    }

    #[test]
    fn impossible_extents_cannot_be_made() {
        assert_eq!(Extent::new(7, 0), Err(ExtentError::Empty { offset: 7 }));
        assert!(Extent::new(u64::MAX, 2).is_err());
        assert!(Extent::new(i64::MAX as u64, 1).is_err());
        assert!(VolumeSize::new(0).is_err() && VolumeSize::new(513).is_err());
        assert!(BlockSizes::new(512, 4096).is_ok());
        assert!(BlockSizes::new(4096, 512).is_err() && BlockSizes::new(1000, 4096).is_err());
    }

    #[test]
    fn overlap_is_symmetric_and_touching_is_not_overlap() {
        let (a, b, c) = (ext(0, 10), ext(10, 5), ext(9, 3));
        assert!(!a.overlaps(b) && !b.overlaps(a));
        assert!(a.overlaps(c) && c.overlaps(a) && c.overlaps(b));
        assert_eq!(a.intersection(c), Some(ext(9, 1)));
        assert_eq!(a.intersection(b), None);
    }

    #[test]
    fn split_covers_everything_once_and_crosses_no_multiple() {
        let whole = ext(300, 1000);
        let pieces: Vec<_> = whole.split_at_multiples_of(256).collect();
        assert_eq!(
            pieces,
            [ext(300, 212), ext(512, 256), ext(768, 256), ext(1024, 256), ext(1280, 20)]
        );
    }
}
