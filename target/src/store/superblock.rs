//! The super block: what the store promises about floor, base, generation and segments.
//!
//! Two generations with two copies each: four blocks of 4096 bytes in the file `super`. Version
//! `n` goes to blocks `2(n mod 2)` and the next, one after the other, each durable before the
//! next; so a power cut tears one copy at most, and rot of one copy never leads back to an older
//! state. FORMAT.md in this folder gives the bytes.

use farshore_changelog::SegmentId;
use farshore_extent::{
    BlockSizes, CaptureOrder, Epoch, Extent, ExtentSet, Generation, Lsn, Seq, VolumeId, VolumeSize,
    WallTime,
};

use super::disk::{ALIGN, AlignedBuf, DiskFile};
use super::error::StoreError;
use super::limits::MAX_UNKNOWN;

pub(crate) const NAME: &str = "super";
const MAGIC: [u8; 8] = *b"FARSHSUP";
/// Version 1 had no checksums of the base.
const VERSION: u16 = 2;
/// Behind the ranges of unknown content.
const SUMMED_AT: usize = 144 + MAX_UNKNOWN * 16;
const CRC_AT: usize = ALIGN - 4;

/// What the super block says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Super {
    /// Counts up with every change.
    pub version: u64,
    /// The volume.
    pub volume: VolumeId,
    /// Fencing number.
    pub generation: Generation,
    /// Oldest place that can be opened. Never goes down.
    pub floor: Lsn,
    /// The base image holds exactly this place (and, while `base < floor`, perhaps parts of later
    /// versions up to `floor`).
    pub base: Lsn,
    /// Capture time of `base`; a label.
    pub base_time: WallTime,
    /// Order at `base`.
    pub base_order: CaptureOrder,
    /// Size of the volume at `base`.
    pub size: VolumeSize,
    /// Its block sizes.
    pub blocks: BlockSizes,
    /// Segments before this one are rubbish.
    pub first_segment: SegmentId,
    /// Durable when this was written: a journal that ends before it lost data.
    pub durable: Lsn,
    /// When the store was made; a label.
    pub created: WallTime,
    /// Ranges of the base whose content is not known.
    pub unknown: ExtentSet,
    /// Bytes of the base, from its start, whose checksums are in `base.crc`; `u64::MAX`: all,
    /// however it grows.
    pub summed: u64,
}

impl Super {
    fn encode(&self) -> Option<Vec<u8>> {
        if self.unknown.extents() > MAX_UNKNOWN {
            return None;
        }
        let mut out = Vec::with_capacity(ALIGN);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.push(u8::from(self.base_order == CaptureOrder::Ordered));
        out.extend_from_slice(&[0; 5]);
        out.extend_from_slice(&self.volume.to_bytes());
        let numbers = [
            self.version,
            self.generation.get(),
            self.floor.epoch.get(),
            self.floor.seq.get(),
            self.base.epoch.get(),
            self.base.seq.get(),
            self.size.get(),
            self.first_segment.get(),
            self.durable.epoch.get(),
            self.durable.seq.get(),
        ];
        numbers.iter().for_each(|n| out.extend_from_slice(&n.to_le_bytes()));
        out.extend_from_slice(&self.base_time.nanos().to_le_bytes());
        out.extend_from_slice(&self.created.nanos().to_le_bytes());
        out.extend_from_slice(&self.blocks.logical().to_le_bytes());
        out.extend_from_slice(&self.blocks.physical().to_le_bytes());
        out.extend_from_slice(&(self.unknown.extents() as u64).to_le_bytes());
        for extent in self.unknown.iter() {
            out.extend_from_slice(&extent.offset().to_le_bytes());
            out.extend_from_slice(&extent.len().to_le_bytes());
        }
        out.resize(SUMMED_AT, 0);
        out.extend_from_slice(&self.summed.to_le_bytes());
        out.resize(CRC_AT, 0);
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        Some(out)
    }

    /// Parses one copy.
    ///
    /// # Errors
    /// A sentence naming the check, or a newer version.
    pub fn parse(bytes: &[u8]) -> Result<Self, SuperError> {
        let damaged = SuperError::Damaged;
        let bytes: &[u8; ALIGN] = bytes.try_into().map_err(|_| damaged("short"))?;
        if bytes[..8] != MAGIC {
            return Err(damaged("no magic"));
        }
        let mut at = Cursor { bytes, at: 8 };
        let version = at.u16();
        if crc32c::crc32c(&bytes[..CRC_AT]) != u32::from_le_bytes(last4(bytes)) {
            return Err(damaged("checksum"));
        }
        if !(1..=VERSION).contains(&version) {
            return Err(SuperError::Version(version));
        }
        let order = at.take::<6>()[0];
        let volume = VolumeId::from_bytes(at.take());
        let mut sb = Self {
            volume,
            version: at.u64(),
            generation: Generation::new(at.u64()),
            floor: at.lsn(),
            base: at.lsn(),
            size: VolumeSize::new(at.u64()).map_err(|_| damaged("volume size"))?,
            first_segment: SegmentId::new(at.u64()),
            durable: at.lsn(),
            base_time: at.time(),
            created: at.time(),
            blocks: BlockSizes::new(at.u32(), at.u32()).map_err(|_| damaged("block sizes"))?,
            base_order: match order {
                0 => CaptureOrder::CatchUp,
                1 => CaptureOrder::Ordered,
                _ => return Err(damaged("order")),
            },
            unknown: ExtentSet::new(),
            summed: 0,
        };
        let count = usize::try_from(at.u64()).unwrap_or(usize::MAX);
        if count > MAX_UNKNOWN || sb.floor < sb.base || sb.durable < sb.base {
            return Err(damaged("watermarks"));
        }
        for _ in 0..count {
            let extent = Extent::new(at.u64(), at.u64()).map_err(|_| damaged("unknown range"))?;
            sb.unknown.insert(extent);
        }
        if version > 1 {
            sb.summed = Cursor { bytes, at: SUMMED_AT }.u64();
        }
        Ok(sb)
    }

    /// Writes all four blocks of a new store.
    pub(crate) fn create(&self, file: &dyn DiskFile) -> Result<(), StoreError> {
        let block = self.encode().ok_or_else(too_many)?;
        for n in 0..4u64 {
            file.write_at(&block, n * ALIGN as u64).map_err(|e| StoreError::io("super", e))?;
        }
        file.sync().map_err(|e| StoreError::io("syncing super", e))
    }

    /// Writes the next version durably: both copies of the older generation, one by one.
    pub(crate) fn store_next(&mut self, file: &dyn DiskFile) -> Result<(), StoreError> {
        self.version += 1;
        let slot = self.version % 2 * 2;
        self.write_copy(file, slot)?;
        self.write_copy(file, slot + 1)
    }

    fn write_copy(&self, file: &dyn DiskFile, place: u64) -> Result<(), StoreError> {
        let mut buf = AlignedBuf::with_capacity(ALIGN);
        buf.push_padded(&self.encode().ok_or_else(too_many)?);
        file.write_durable(buf.as_slice(), place * ALIGN as u64)
            .map_err(|e| StoreError::io("writing super", e))
    }

    /// Reads all copies and takes the newest. A slot with no good copy is damage, not age: its
    /// content may have been newer than the other slot's.
    pub(crate) fn load(file: &dyn DiskFile) -> Result<(Self, SuperHealth), StoreError> {
        let mut copies = Vec::new();
        for n in 0..4u64 {
            let mut bytes = vec![0; ALIGN];
            let parsed = match file.read_at(&mut bytes, n * ALIGN as u64) {
                Ok(()) => Self::parse(&bytes),
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                    Err(SuperError::Damaged("short file"))
                }
                Err(e) => return Err(StoreError::io("reading super", e)),
            };
            if let Err(SuperError::Version(v)) = parsed {
                return Err(StoreError::Version(v));
            }
            copies.push(parsed.ok());
        }
        if copies.iter().all(Option::is_none) {
            return Err(StoreError::NotAStore);
        }
        let slots = [[&copies[0], &copies[1]], [&copies[2], &copies[3]]];
        if slots.iter().any(|slot| slot.iter().all(|copy| copy.is_none())) {
            let why = "both copies of one generation fail their checksum".to_owned();
            return Err(StoreError::Super { why });
        }
        let newest = copies.iter().flatten().max_by_key(|sb| sb.version).cloned();
        let bad_copies = copies.iter().filter(|c| c.is_none()).count();
        Ok((newest.ok_or(StoreError::NotAStore)?, SuperHealth { bad_copies, copies }))
    }
}

/// How the four copies looked.
pub(crate) struct SuperHealth {
    pub(crate) bad_copies: usize,
    copies: Vec<Option<Super>>,
}

impl SuperHealth {
    /// Makes the two copies of each generation alike again, by writing the bad or older one only:
    /// the good one must survive a power cut in the middle.
    pub(crate) fn repair(&self, file: &dyn DiskFile) -> Result<(), StoreError> {
        let copies = (0u64..).zip(&self.copies);
        for ((place, copy), twin) in copies.zip([1usize, 0, 3, 2]) {
            let twin = self.copies.get(twin).and_then(Option::as_ref);
            let Some(twin) = twin else { continue };
            if copy.as_ref().is_none_or(|copy| copy.version < twin.version) {
                twin.write_copy(file, place)?;
            }
        }
        Ok(())
    }
}

/// Why bytes are no super block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SuperError {
    /// A check failed.
    #[error("super block damaged: {0}")]
    Damaged(&'static str),
    /// Newer format.
    #[error("super block of version {0}")]
    Version(u16),
}

fn too_many() -> StoreError {
    StoreError::Super { why: format!("more than {MAX_UNKNOWN} ranges of unknown content") }
}

fn last4(bytes: &[u8; ALIGN]) -> [u8; 4] {
    let mut out = [0; 4];
    out.copy_from_slice(&bytes[CRC_AT..]);
    out
}

/// Reads fields one after the other; the block is longer than all of them together.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8; ALIGN],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) const fn new(bytes: &'a [u8; ALIGN]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(crate) fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&self.bytes[self.at..self.at + N]);
        self.at += N;
        out
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn time(&mut self) -> WallTime {
        WallTime::from_nanos(i64::from_le_bytes(self.take()))
    }

    pub(crate) fn lsn(&mut self) -> Lsn {
        Lsn::new(Epoch::new(self.u64()), Seq::new(self.u64()))
    }
}

const _: () = assert!(SUMMED_AT + 8 <= CRC_AT);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_super_block_has_the_places_that_format_md_gives() {
        let lsn = |n| Lsn::new(Epoch::new(n), Seq::new(n + 1));
        let sb = Super {
            version: 0x11,
            volume: VolumeId::from_bytes([0x22; 16]),
            generation: Generation::new(0x33),
            floor: lsn(0x50),
            base: lsn(0x40),
            base_time: WallTime::from_nanos(-2),
            base_order: CaptureOrder::Ordered,
            size: VolumeSize::new(0x6600).unwrap(),
            blocks: BlockSizes::E512,
            first_segment: SegmentId::new(0x77),
            durable: lsn(0x80),
            created: WallTime::from_nanos(0x99),
            unknown: [Extent::new(0xa00, 0xb00).unwrap()].into_iter().collect(),
            summed: 0xc00,
        };
        let bytes = sb.encode().unwrap();
        assert_eq!(Super::parse(&bytes), Ok(sb));
        let text = include_str!("FORMAT.md");
        let place = |field: &str| -> usize {
            let row = text.lines().find(|l| l.contains(&format!("| `{field}` |"))).unwrap();
            row.split('|').nth(1).unwrap().trim().parse().unwrap()
        };
        let at = |field| Cursor { bytes: bytes[..].try_into().unwrap(), at: place(field) };
        assert_eq!(at("magic").take(), MAGIC);
        assert_eq!(at("format").u16(), 2);
        assert_eq!(at("base_order").take(), [1]);
        assert_eq!(at("volume").take(), [0x22; 16]);
        assert_eq!(at("version").u64(), 0x11);
        assert_eq!(at("generation").u64(), 0x33);
        assert_eq!((at("floor").lsn(), at("base").lsn()), (lsn(0x50), lsn(0x40)));
        assert_eq!((at("size").u64(), at("first_segment").u64()), (0x6600, 0x77));
        assert_eq!(at("durable").lsn(), lsn(0x80));
        assert_eq!(at("base_time").time().nanos(), -2);
        assert_eq!(at("created").time().nanos(), 0x99);
        assert_eq!((at("block_logical").u32(), at("block_physical").u32()), (512, 4096));
        assert_eq!((at("unknown_count").u64(), at("unknown").u64()), (1, 0xa00));
        assert_eq!(at("summed").u64(), 0xc00);
        assert_eq!(place("crc"), CRC_AT);
    }

    #[test]
    fn a_super_block_from_before_the_checksums_says_that_there_are_none() {
        let sb = Super {
            version: 1,
            volume: VolumeId::NIL,
            generation: Generation::new(1),
            floor: Lsn::ZERO,
            base: Lsn::ZERO,
            base_time: WallTime::from_nanos(0),
            base_order: CaptureOrder::CatchUp,
            size: VolumeSize::new(512).unwrap(),
            blocks: BlockSizes::E512,
            first_segment: SegmentId::new(1),
            durable: Lsn::ZERO,
            created: WallTime::from_nanos(0),
            unknown: ExtentSet::new(),
            summed: 0,
        };
        let mut bytes = sb.encode().unwrap();
        let with_version = |bytes: &mut [u8], version: u16| {
            bytes[8..10].copy_from_slice(&version.to_le_bytes());
            let crc = crc32c::crc32c(&bytes[..CRC_AT]);
            bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        };
        with_version(&mut bytes, 1);
        assert_eq!(Super::parse(&bytes), Ok(sb));
        with_version(&mut bytes, VERSION + 1);
        assert_eq!(Super::parse(&bytes), Err(SuperError::Version(VERSION + 1)));
    }
}
