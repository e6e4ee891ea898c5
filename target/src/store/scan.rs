//! Reading a segment that was not sealed, batch by batch, and looking at what lies behind the end.

use std::sync::Arc;

use farshore_changelog::{BatchError, BatchHeader, RawBatch, SegmentIndexBuilder};
use farshore_extent::{Generation, Lsn, VolumeId};

use super::disk::{ALIGN, DiskFile};
use super::error::StoreError;
use super::segment::file_name;
use super::segment_files::write_zeroes;

/// The end of what can be read in a segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tail {
    /// The first byte that is not read.
    pub(super) place: u64,
    /// There is something behind that place.
    pub(super) something: bool,
    /// End of the last batch header found behind it.
    end: u64,
    /// Highest place that a later batch of this history knew to be durable.
    pub(super) claimed: Lsn,
}

/// The tail is read in pieces of this many bytes.
const PIECE: usize = 1 << 20;

/// Reading one unsealed segment.
pub(super) struct Scan {
    pub(super) builder: SegmentIndexBuilder,
    pub(super) file: Arc<dyn DiskFile>,
    pub(super) volume: VolumeId,
    pub(super) generation: Generation,
}

impl Scan {
    fn capacity(&self) -> u64 {
        self.builder.header().capacity
    }

    fn read(&self, len: usize, at: u64) -> Result<Option<Vec<u8>>, StoreError> {
        if at + len as u64 > self.capacity() {
            return Ok(None);
        }
        let mut bytes = vec![0; len];
        match self.file.read_at(&mut bytes, at) {
            Ok(()) => Ok(Some(bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
            Err(e) => {
                let name = file_name(self.builder.header().segment);
                Err(StoreError::io(format!("reading {name} at {at}"), e))
            }
        }
    }

    /// Takes the batch at the end of what was read so far; false when there is none.
    pub(super) fn one(&mut self, any_chain: bool) -> Result<bool, StoreError> {
        let place = self.builder.end();
        let Some(block) = self.read(ALIGN, place)? else { return Ok(false) };
        let Ok(header) = BatchHeader::parse(&block) else { return Ok(false) };
        if !self.follows(&header, any_chain) {
            return Ok(false);
        }
        let Some(bytes) = self.read(header.total_len(), place)? else { return Ok(false) };
        match RawBatch::parse(&bytes).and_then(RawBatch::check) {
            Ok(batch) => {
                self.builder.push(&batch, place);
                Ok(true)
            }
            Err(BatchError::Version(v)) => Err(StoreError::Version(v)),
            Err(_) => Ok(false),
        }
    }

    fn follows(&self, header: &BatchHeader, any_chain: bool) -> bool {
        header.volume == self.volume
            && header.prev == self.builder.last()
            && (any_chain || header.prev_chain == self.builder.chain())
            && header.generation <= self.generation
    }

    /// Looks behind the last good batch. Batches that an earlier life of the file left behind lie
    /// at or before the last good place and count as nothing.
    pub(super) fn tail(&self) -> Result<Tail, StoreError> {
        let last = self.builder.last();
        let place = self.builder.end();
        let mut tail = Tail { place, something: false, end: place, claimed: Lsn::ZERO };
        let mut at = place;
        while at < self.capacity() {
            let piece = usize::try_from(self.capacity() - at).unwrap_or(PIECE).min(PIECE);
            let Some(bytes) = self.read(piece, at)? else { break };
            for block in bytes.chunks(ALIGN) {
                at += block.len() as u64;
                let Ok(header) = BatchHeader::parse(block) else { continue };
                if header.volume == self.volume && header.last() > last {
                    tail.something = true;
                    tail.end = at;
                    tail.claimed = tail.claimed.max(header.durable);
                }
            }
        }
        Ok(tail)
    }

    /// Wipes what lies behind the last good batch, so that it can never be taken for a part of
    /// the history that comes now.
    pub(super) fn cut(&self, tail: Tail) -> Result<(), StoreError> {
        let done =
            write_zeroes(self.file.as_ref(), tail.place, tail.end).and_then(|()| self.file.sync());
        done.map_err(|e| {
            let name = file_name(self.builder.header().segment);
            StoreError::io(format!("cutting the torn tail of {name}"), e)
        })
    }
}
