//! Bytes of the state file. See `FORMAT.md` beside this file.

use farshore_extent::{BlockSizes, Epoch, Extent, Lsn, Seq, VolumeId, VolumeSize};

use crate::backing::{BlockIdentity, FileIdentity, Identity};
use crate::core::{BLOCK_WORDS, IntentBlock};

/// Length of a superblock and of a block of bits: what a disk writes whole or not at all.
pub(super) const SECTOR: usize = 512;

/// Where the two superblocks lie; a page each, so that no page is rewritten for both.
pub(super) const SUPER_AT: [u64; 2] = [0, 4096];

/// Where the blocks of bits begin.
pub(super) const BLOCKS_AT: u64 = 8192;

const MAGIC: &[u8; 8] = b"FSVOLST1";
const VERSION: u32 = 1;
const SUPER_CRC: usize = SECTOR - 4;

const BLOCK_MAGIC: u32 = 0x4d49_5346; // "FSIM"
const BLOCK_CRC: usize = 44;
const BITS: usize = 48;

/// A longer one is not kept: then nothing tells in another boot that it is the same device.
const MAX_LASTING: u8 = 200;

const RANGES_MAGIC: &[u8; 8] = b"FSRANGE1";
const RANGES_HEAD: usize = 32;

/// What never changes while a volume keeps its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Whose state it is.
    pub volume: VolumeId,
    /// Size in bytes.
    pub size: VolumeSize,
    /// Block sizes in bytes.
    pub blocks: BlockSizes,
    /// Bytes of a region of the intent map.
    pub region: u64,
}

/// How far the state file can be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// What is not set in the bits lies with the target.
    Tracking,
    /// The bits count for nothing.
    AllMayDiffer,
    /// Stopped in order at `last`; nothing was written since. A file of ranges tells what the
    /// target lacks, unless its length is zero: then it lacks nothing.
    Stopped { released: Lsn, ranges_len: u64, ranges_crc: u32 },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Superblock {
    pub(super) geometry: Geometry,
    pub(super) sequence: u64,
    pub(super) epoch: Epoch,
    pub(super) state: State,
    pub(super) identity: Option<Identity>,
}

fn put<const N: usize>(to: &mut [u8], at: usize, bytes: [u8; N]) {
    if let Some(place) = to.get_mut(at..at + N) {
        place.copy_from_slice(&bytes);
    }
}

fn get<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    from.get(at..at + N).and_then(|b| b.try_into().ok()).unwrap_or([0; N])
}

fn get_u32(from: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(get(from, at))
}

fn get_u64(from: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(get(from, at))
}

fn put_u64(to: &mut [u8], at: usize, value: u64) {
    put(to, at, value.to_le_bytes());
}

fn put_lsn(to: &mut [u8], at: usize, lsn: Lsn) {
    put_u64(to, at, lsn.epoch.get());
    put_u64(to, at + 8, lsn.seq.get());
}

fn get_lsn(from: &[u8], at: usize) -> Lsn {
    Lsn::new(Epoch::new(get_u64(from, at)), Seq::new(get_u64(from, at + 8)))
}

impl Superblock {
    pub(super) fn encode(&self) -> [u8; SECTOR] {
        let mut b = [0; SECTOR];
        put(&mut b, 0, *MAGIC);
        put(&mut b, 8, VERSION.to_le_bytes());
        put(&mut b, 16, self.geometry.volume.to_bytes());
        put_u64(&mut b, 32, self.sequence);
        put_u64(&mut b, 40, self.epoch.get());
        put_u64(&mut b, 48, self.geometry.size.get());
        put(&mut b, 56, self.geometry.blocks.logical().to_le_bytes());
        put(&mut b, 60, self.geometry.blocks.physical().to_le_bytes());
        put_u64(&mut b, 64, self.geometry.region);
        match self.state {
            State::Tracking => b[12] = 1,
            State::AllMayDiffer => b[12] = 2,
            State::Stopped { released, ranges_len, ranges_crc } => {
                b[12] = 3;
                put_lsn(&mut b, 72, released);
                put_u64(&mut b, 88, ranges_len);
                put(&mut b, 96, ranges_crc.to_le_bytes());
            }
        }
        if let Some(identity) = &self.identity {
            put_identity(&mut b, identity);
        }
        let crc = crc32c::crc32c(&b[..SUPER_CRC]);
        put(&mut b, SUPER_CRC, crc.to_le_bytes());
        b
    }

    /// Why it cannot be believed, in words.
    pub(super) fn decode(b: &[u8]) -> Result<Self, &'static str> {
        if b.len() < SECTOR {
            return Err("it is too short");
        }
        if get(b, 0) != *MAGIC {
            return Err("it is no superblock");
        }
        if get_u32(b, SUPER_CRC) != crc32c::crc32c(&b[..SUPER_CRC]) {
            return Err("its checksum is wrong");
        }
        if get_u32(b, 8) != VERSION {
            return Err("its version is unknown");
        }
        let state = match b[12] {
            1 => State::Tracking,
            2 => State::AllMayDiffer,
            3 => State::Stopped {
                released: get_lsn(b, 72),
                ranges_len: get_u64(b, 88),
                ranges_crc: get_u32(b, 96),
            },
            _ => return Err("its state is unknown"),
        };
        let region = get_u64(b, 64);
        if !region.is_power_of_two() {
            return Err("its region size is impossible");
        }
        let size = VolumeSize::new(get_u64(b, 48)).map_err(|_| "its volume size is impossible")?;
        let blocks = BlockSizes::new(get_u32(b, 56), get_u32(b, 60));
        let blocks = blocks.map_err(|_| "its block sizes are impossible")?;
        let volume = VolumeId::from_bytes(get(b, 16));
        Ok(Self {
            geometry: Geometry { volume, size, blocks, region },
            sequence: get_u64(b, 32),
            epoch: Epoch::new(get_u64(b, 40)),
            state,
            identity: get_identity(b)?,
        })
    }
}

fn put_identity(b: &mut [u8], identity: &Identity) {
    match identity {
        Identity::File(FileIdentity { dev, ino, size, mtime_ns, ctime_ns }) => {
            b[13] = 1;
            put_u64(b, 104, *dev);
            put_u64(b, 112, *ino);
            put_u64(b, 120, *size);
            put(b, 128, mtime_ns.to_le_bytes());
            put(b, 136, ctime_ns.to_le_bytes());
        }
        Identity::Block(BlockIdentity {
            boot_id,
            rdev,
            disk_sequence,
            written_sectors,
            size,
            lasting,
        }) => {
            // A boot identity is 36 characters; another one must not look equal when cut off.
            let boot = boot_id.as_bytes();
            let Ok(len) = u8::try_from(boot.len()) else { return };
            if boot.len() > 64 {
                return;
            }
            b[13] = 2;
            b[14] = u8::from(disk_sequence.is_some());
            b[15] = len;
            put_u64(b, 104, *rdev);
            put_u64(b, 112, disk_sequence.unwrap_or(0));
            put_u64(b, 120, *size);
            put_u64(b, 128, *written_sectors);
            b[144..144 + boot.len()].copy_from_slice(boot);
            let lasting = lasting.as_deref().unwrap_or_default().as_bytes();
            if let Some(len) = u8::try_from(lasting.len()).ok().filter(|len| *len <= MAX_LASTING) {
                b[208] = len;
                b[209..209 + lasting.len()].copy_from_slice(lasting);
            }
        }
    }
}

fn get_identity(b: &[u8]) -> Result<Option<Identity>, &'static str> {
    Ok(match b[13] {
        0 => None,
        1 => Some(Identity::File(FileIdentity {
            dev: get_u64(b, 104),
            ino: get_u64(b, 112),
            size: get_u64(b, 120),
            mtime_ns: i64::from_le_bytes(get(b, 128)),
            ctime_ns: i64::from_le_bytes(get(b, 136)),
        })),
        2 => {
            let boot = b.get(144..144 + usize::from(b[15]).min(64)).unwrap_or_default();
            let boot_id = std::str::from_utf8(boot).map_err(|_| "its boot identity is no text")?;
            let lasting = b.get(209..209 + usize::from(b[208])).unwrap_or_default();
            let lasting =
                std::str::from_utf8(lasting).map_err(|_| "its lasting name is no text")?;
            Some(Identity::Block(BlockIdentity {
                boot_id: boot_id.to_owned(),
                rdev: get_u64(b, 104),
                disk_sequence: (b[14] != 0).then(|| get_u64(b, 112)),
                written_sectors: get_u64(b, 128),
                size: get_u64(b, 120),
                lasting: Some(lasting.to_owned()).filter(|name| !name.is_empty()),
            }))
        }
        _ => return Err("its kind of backing is unknown"),
    })
}

/// Where a block of bits lies.
pub(super) const fn block_at(index: usize) -> u64 {
    BLOCKS_AT + (index * SECTOR) as u64
}

pub(super) fn encode_block(volume: VolumeId, released: Lsn, block: &IntentBlock) -> [u8; SECTOR] {
    let mut b = [0; SECTOR];
    put(&mut b, 0, BLOCK_MAGIC.to_le_bytes());
    put(&mut b, 4, u32::try_from(block.index).unwrap_or(u32::MAX).to_le_bytes());
    put(&mut b, 8, volume.to_bytes());
    put_lsn(&mut b, 24, released);
    for (at, word) in block.words.iter().enumerate() {
        put_u64(&mut b, BITS + at * 8, *word);
    }
    let crc = crc32c::crc32c(&b);
    put(&mut b, BLOCK_CRC, crc.to_le_bytes());
    b
}

/// The block at `index` and the place that the target must have reached; `None` when it is torn,
/// damaged, or another's.
pub(super) fn decode_block(
    volume: VolumeId,
    index: usize,
    b: &[u8],
) -> Option<([u64; BLOCK_WORDS], Lsn)> {
    let mut b: [u8; SECTOR] = b.try_into().ok()?;
    let crc = get_u32(&b, BLOCK_CRC);
    put(&mut b, BLOCK_CRC, [0; 4]);
    let own = get_u32(&b, 0) == BLOCK_MAGIC
        && crc == crc32c::crc32c(&b)
        && usize::try_from(get_u32(&b, 4)).ok() == Some(index)
        && get::<16>(&b, 8) == volume.to_bytes();
    let mut words = [0; BLOCK_WORDS];
    for (at, word) in words.iter_mut().enumerate() {
        *word = get_u64(&b, BITS + at * 8);
    }
    own.then(|| (words, get_lsn(&b, 24)))
}

/// The file of ranges of an orderly stop: what the target lacks.
pub(super) fn encode_ranges(volume: VolumeId, ranges: &[Extent]) -> Vec<u8> {
    let mut b = Vec::with_capacity(RANGES_HEAD + ranges.len() * 16);
    b.extend_from_slice(RANGES_MAGIC);
    b.extend_from_slice(&volume.to_bytes());
    b.extend_from_slice(&(ranges.len() as u64).to_le_bytes());
    for range in ranges {
        b.extend_from_slice(&range.offset().to_le_bytes());
        b.extend_from_slice(&range.len().to_le_bytes());
    }
    b
}

/// `None` when it is not what an orderly stop wrote. The caller has compared its checksum.
pub(super) fn decode_ranges(volume: VolumeId, size: VolumeSize, b: &[u8]) -> Option<Vec<Extent>> {
    let own = b.get(..8)? == RANGES_MAGIC && get::<16>(b, 8) == volume.to_bytes();
    let count = usize::try_from(get_u64(b, 24)).ok()?;
    let body = b.get(RANGES_HEAD..)?;
    if !own || count.checked_mul(16) != Some(body.len()) {
        return None;
    }
    let range = |at: &[u8]| {
        let extent = Extent::new(get_u64(at, 0), get_u64(at, 8)).ok()?;
        size.extent().contains(extent).then_some(extent)
    };
    body.chunks_exact(16).map(range).collect()
}
