//! Frames: up to 64 KiB of raw payload, compressed or stored, with a checksum over the stored
//! bytes so that scrub, spool and relay can verify without decompressing or decrypting.

use crate::layout::{FRAME_ENTRY_LEN, frame, len_at, u32_at};
use crate::limits::FRAME_RAW;

/// How the bytes of a frame are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// As they are.
    Raw,
    /// One zstd frame.
    Zstd,
}

impl Codec {
    pub(crate) const fn to_byte(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Zstd => 1,
        }
    }

    pub(crate) const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Raw),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// One entry of a batch's frame table (16 bytes): also what an index keeps of a frame, together
/// with its place in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameEntry {
    /// Bytes after decompression, 1..=64 KiB.
    pub raw_len: u32,
    /// Bytes as stored, at most `raw_len`.
    pub stored_len: u32,
    /// crc32c of the stored bytes.
    pub crc: u32,
    /// How they are stored.
    pub codec: Codec,
}

impl FrameEntry {
    /// The 16 bytes of the entry.
    #[must_use]
    pub fn to_bytes(self) -> [u8; FRAME_ENTRY_LEN] {
        let mut out = [0; FRAME_ENTRY_LEN];
        out[frame::raw_len].copy_from_slice(&self.raw_len.to_le_bytes());
        out[frame::stored_len].copy_from_slice(&self.stored_len.to_le_bytes());
        out[frame::crc].copy_from_slice(&self.crc.to_le_bytes());
        out[frame::codec][0] = self.codec.to_byte();
        out
    }

    /// Reads an entry; `None` when a length or the codec is impossible.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; FRAME_ENTRY_LEN]) -> Option<Self> {
        let raw_len = len_at(bytes, frame::raw_len);
        let stored_len = len_at(bytes, frame::stored_len);
        let codec = Codec::from_byte(bytes[frame::codec][0])?;
        let possible = (1..=FRAME_RAW).contains(&raw_len)
            && (1..=raw_len).contains(&stored_len)
            && (codec == Codec::Zstd || stored_len == raw_len)
            && bytes[frame::padding] == [0; 3];
        possible.then(|| Self {
            raw_len: u32_at(bytes, frame::raw_len),
            stored_len: u32_at(bytes, frame::stored_len),
            crc: u32_at(bytes, frame::crc),
            codec,
        })
    }

    /// Verifies and unpacks the stored bytes of this frame into `out` (cleared first).
    ///
    /// # Errors
    /// A sentence naming the check that failed; the bytes are then worthless.
    pub fn decode(&self, stored: &[u8], out: &mut Vec<u8>) -> Result<(), &'static str> {
        out.clear();
        if stored.len() != self.stored_len as usize {
            return Err("frame is shorter than its table entry says");
        }
        if crc32c::crc32c(stored) != self.crc {
            return Err("frame checksum does not match");
        }
        match self.codec {
            Codec::Raw => out.extend_from_slice(stored),
            Codec::Zstd => {
                out.resize(self.raw_len as usize, 0);
                let got = zstd::bulk::decompress_to_buffer(stored, &mut out[..])
                    .map_err(|_| "frame does not decompress")?;
                if got != self.raw_len as usize {
                    return Err("frame decompresses to another length than its entry says");
                }
            }
        }
        Ok(())
    }
}

/// Compresses frames with a reused context.
pub(crate) struct FrameEncoder {
    context: Option<zstd::bulk::Compressor<'static>>,
    scratch: Vec<u8>,
}

impl FrameEncoder {
    /// `level` 1 is the default of the product; `None` stores everything raw.
    pub(crate) fn new(level: Option<i32>) -> Self {
        let context = level.and_then(|l| zstd::bulk::Compressor::new(l).ok());
        Self { context, scratch: Vec::with_capacity(FRAME_RAW) }
    }

    /// Appends `raw` (1..=64 KiB) to `out` and returns its entry. Stored raw when compression
    /// saves less than an eighth (12 %): decoding would cost more than the bytes are worth.
    pub(crate) fn encode(&mut self, raw: &[u8], out: &mut Vec<u8>) -> FrameEntry {
        debug_assert!((1..=FRAME_RAW).contains(&raw.len()));
        let worth = raw.len() - raw.len() / 8;
        let mut codec = Codec::Raw;
        if let Some(context) = &mut self.context {
            self.scratch.clear();
            self.scratch.resize(worth, 0);
            // A result that does not fit `worth` bytes is an error of the compressor: not worth it.
            if let Ok(len) = context.compress_to_buffer(raw, &mut self.scratch[..]) {
                self.scratch.truncate(len);
                codec = Codec::Zstd;
            }
        }
        let stored: &[u8] = if codec == Codec::Zstd { &self.scratch } else { raw };
        out.extend_from_slice(stored);
        let len = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        FrameEntry {
            raw_len: len(raw.len()),
            stored_len: len(stored.len()),
            crc: crc32c::crc32c(stored),
            codec,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut x = 0x9e37_79b9_7f4a_7c15_u64;
        let mut byte = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x.to_le_bytes()[0]
        };
        (0..len).map(|_| byte()).collect()
    }

    #[test]
    fn frames_round_trip_and_incompressible_ones_are_stored_raw() {
        let mut encoder = FrameEncoder::new(Some(1));
        for (raw, codec) in [(vec![7u8; 60_000], Codec::Zstd), (noise(65_536), Codec::Raw)] {
            let mut stored = Vec::new();
            let entry = encoder.encode(&raw, &mut stored);
            assert_eq!(entry.codec, codec);
            assert_eq!(FrameEntry::from_bytes(&entry.to_bytes()), Some(entry));
            let mut back = Vec::new();
            entry.decode(&stored, &mut back).unwrap();
            assert_eq!(back, raw);
            stored[3] ^= 1;
            assert!(entry.decode(&stored, &mut back).is_err());
        }
    }
}
