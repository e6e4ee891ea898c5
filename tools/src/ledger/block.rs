//! What one block says of itself.
//!
//! Little-endian: 0 magic, 8 run (16 bytes), 24 block index, 32 number of the write, 40 first
//! block of the write, 48 its length in blocks (u32), 52 writer (u32), 56 highest number such that
//! it and all below were acknowledged when this write was issued, 64 crc32c of the whole block
//! with this field zero (u32), 72 body: half noise, half the number again and again.

/// Bytes in a block.
pub const BLOCK: usize = 4096;

const MAGIC: [u8; 8] = *b"FSLEDGR1";
const BODY: usize = 72;
const CRC: std::ops::Range<usize> = 64..68;

/// The self-description of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockHeader {
    /// Which ledger wrote it.
    pub run: u128,
    /// Where it belongs.
    pub block: u64,
    /// Which write it is; the first is 1.
    pub number: u64,
    /// First block of that write.
    pub first: u64,
    /// Blocks of that write.
    pub blocks: u32,
    /// Who wrote it.
    pub writer: u32,
    /// Every write up to this number had been acknowledged when this one was issued.
    pub seen: u64,
}

/// What the bytes of a block are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockContent {
    /// All zero.
    Zero,
    /// A block of a ledger, whole.
    Written(BlockHeader),
    /// Neither.
    Damaged,
}

impl BlockHeader {
    /// Fills `bytes` (one block).
    pub fn encode(&self, bytes: &mut [u8; BLOCK]) {
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..24].copy_from_slice(&self.run.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.block.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.number.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.first.to_le_bytes());
        bytes[48..52].copy_from_slice(&self.blocks.to_le_bytes());
        bytes[52..56].copy_from_slice(&self.writer.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.seen.to_le_bytes());
        bytes[64..BODY].fill(0);
        let (noise, text) = bytes[BODY..].split_at_mut((BLOCK - BODY) / 2);
        let mut state = self.number ^ self.block.rotate_left(32);
        for word in noise.chunks_mut(8) {
            state = mix(state);
            let bytes = state.to_le_bytes();
            word.copy_from_slice(&bytes[..word.len()]);
        }
        for word in text.chunks_mut(8) {
            word.copy_from_slice(&self.number.to_le_bytes()[..word.len()]);
        }
        let crc = crc32c::crc32c(bytes);
        bytes[CRC].copy_from_slice(&crc.to_le_bytes());
    }

    /// Reads a block of an image.
    #[must_use]
    pub fn decode(bytes: &[u8; BLOCK]) -> BlockContent {
        let u64_at = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        if bytes[..8] != MAGIC {
            let zero = bytes.iter().all(|b| *b == 0);
            return if zero { BlockContent::Zero } else { BlockContent::Damaged };
        }
        // crc of three pieces: the field itself counts as zero.
        let crc = crc32c::crc32c(&bytes[..CRC.start]);
        let crc = crc32c::crc32c_append(crc, &[0; 4]);
        let crc = crc32c::crc32c_append(crc, &bytes[CRC.end..]);
        if crc.to_le_bytes() != bytes[CRC] {
            return BlockContent::Damaged;
        }
        let (low, high) = (u128::from(u64_at(8)), u128::from(u64_at(16)));
        let sizes = u64_at(48).to_le_bytes();
        let half = |at: usize| {
            u32::from_le_bytes([sizes[at], sizes[at + 1], sizes[at + 2], sizes[at + 3]])
        };
        BlockContent::Written(Self {
            run: low | high << 64,
            block: u64_at(24),
            number: u64_at(32),
            first: u64_at(40),
            blocks: half(0),
            writer: half(4),
            seen: u64_at(56),
        })
    }
}

/// One step of splitmix64: cheap noise that does not compress.
#[must_use]
pub const fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_says_what_it_is_and_any_damage_shows() {
        let header = BlockHeader {
            run: u128::MAX / 3,
            block: 77,
            number: 1 << 40,
            first: 70,
            blocks: 16,
            writer: 3,
            seen: 12,
        };
        let mut bytes = [0; BLOCK];
        assert_eq!(BlockHeader::decode(&bytes), BlockContent::Zero);
        header.encode(&mut bytes);
        assert_eq!(BlockHeader::decode(&bytes), BlockContent::Written(header));
        for at in [0, 9, 30, 60, 65, 70, 100, 4000, 4095] {
            let mut bad = bytes;
            bad[at] ^= 0x10;
            assert_eq!(BlockHeader::decode(&bad), BlockContent::Damaged, "byte {at}");
        }
    }
}
