//! Making batches at the source: zero detection, frames, chain. Bytes are made once.

use farshore_extent::{Chain, Epoch, Extent, Generation, Lsn, SECTOR, Seq, VolumeId, WallTime};

use crate::batch::{BatchHeader, MAGIC, VERSION, chain_of};
use crate::frame::{FrameEncoder, FrameEntry};
use crate::layout::{HEADER_LEN, header};
use crate::limits::{
    BATCH_RAW_TARGET, FRAME_RAW, MAX_AUX, MAX_MARKER_NAME, MAX_RECORD_PAYLOAD, MAX_RECORDS,
};
use crate::record::{PayloadRef, Record, RecordBody};

/// What a batch follows and belongs to.
#[derive(Debug, Clone, Copy)]
pub struct BatchContext {
    /// The volume.
    pub volume: VolumeId,
    /// Generation this source was given.
    pub generation: Generation,
    /// Last place of the batch before.
    pub prev: Lsn,
    /// Chain after the batch before.
    pub prev_chain: Chain,
    /// Durable watermark known now.
    pub durable: Lsn,
}

/// A finished batch: the bytes that wire, spool and journal hold.
#[derive(Debug, Clone)]
pub struct EncodedBatch {
    /// Its header, decoded.
    pub header: BatchHeader,
    /// Header, tables and payload.
    pub bytes: Vec<u8>,
}

impl EncodedBatch {
    /// The same records behind another history. Costs a copy and a digest of all bytes.
    #[must_use]
    pub fn chained(&self, prev_chain: Chain) -> Self {
        let mut header = BatchHeader { prev_chain, ..self.header };
        let mut bytes = self.bytes.clone();
        seal(&mut header, &mut bytes);
        Self { header, bytes }
    }
}

/// Zeroes are looked for in pieces of this many bytes: what file systems zero.
const ZERO_UNIT: usize = 4096;

/// Records with several zero pieces may split; this many are kept free for one write.
const SPLIT_ROOM: usize = MAX_RECORD_PAYLOAD / ZERO_UNIT + 2;

/// Gathers records of one volume and one epoch until a batch is full.
pub struct BatchBuilder {
    encoder: FrameEncoder,
    records: Vec<u8>,
    aux: Vec<u8>,
    frames: Vec<FrameEntry>,
    stored: Vec<u8>,
    /// Raw bytes not yet in a frame, always less than [`FRAME_RAW`].
    pending: Vec<u8>,
    raw_len: usize,
    count: u32,
    first: Option<(Seq, WallTime)>,
    last: (Seq, WallTime),
}

impl BatchBuilder {
    /// `zstd_level` 1 is the product's default; `None` never compresses.
    #[must_use]
    pub fn new(zstd_level: Option<i32>) -> Self {
        Self {
            encoder: FrameEncoder::new(zstd_level),
            records: Vec::new(),
            aux: Vec::new(),
            frames: Vec::new(),
            stored: Vec::with_capacity(BATCH_RAW_TARGET),
            pending: Vec::with_capacity(FRAME_RAW),
            raw_len: 0,
            count: 0,
            first: None,
            last: (Seq::ZERO, WallTime::default()),
        }
    }

    /// Whether no record was added since the last [`Self::finish`].
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether the batch must be finished before another record *with a new number* is added.
    /// Records that share a number always fit: a batch never divides one.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.raw_len >= BATCH_RAW_TARGET
            || self.count as usize + SPLIT_ROOM > MAX_RECORDS
            || self.aux.len() + 64 + MAX_MARKER_NAME > MAX_AUX
    }

    /// Adds a record without payload.
    pub fn push(&mut self, record: &Record) {
        debug_assert!(record.body.payload().is_none(), "use push_data");
        self.note(record.seq, record.time);
        record.encode(&mut self.records, &mut self.aux);
    }

    /// Adds a write (`copied` false) or a copy of the initial sync with its bytes. `crc` is the
    /// crc32c made at capture. Pieces of 4 KiB that are all zero become zero records under the
    /// same number.
    pub fn push_data(
        &mut self,
        seq: Seq,
        time: WallTime,
        extent: Extent,
        data: &[u8],
        crc: u32,
        copied: bool,
    ) {
        debug_assert_eq!(data.len() as u64, extent.len());
        debug_assert!(data.len() <= MAX_RECORD_PAYLOAD && extent.is_aligned_to(SECTOR));
        let pieces = ZeroPieces { extent, data };
        for (piece, bytes, zero) in pieces {
            let body = if zero {
                RecordBody::Zero { extent: piece, copied }
            } else {
                let whole = piece == extent;
                let crc = if whole { crc } else { crc32c::crc32c(bytes) };
                let raw_off = u32::try_from(self.raw_len).unwrap_or(u32::MAX);
                self.push_raw(bytes);
                let payload = PayloadRef { raw_off, crc };
                if copied {
                    RecordBody::Copy { extent: piece, payload }
                } else {
                    RecordBody::Write { extent: piece, payload }
                }
            };
            self.note(seq, time);
            Record { seq, time, body }.encode(&mut self.records, &mut self.aux);
        }
    }

    /// Closes the batch and returns its bytes; the builder is empty afterwards and its buffers
    /// are kept. `None` when no record was added.
    pub fn finish(&mut self, epoch: Epoch, context: &BatchContext) -> Option<EncodedBatch> {
        let (first_seq, first_time) = self.first.take()?;
        if !self.pending.is_empty() {
            self.frames.push(self.encoder.encode(&self.pending, &mut self.stored));
            self.pending.clear();
        }
        let len = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let mut head = BatchHeader {
            volume: context.volume,
            generation: context.generation,
            prev: context.prev,
            epoch,
            first_seq,
            last_seq: self.last.0,
            first_time,
            last_time: self.last.1,
            durable: context.durable,
            prev_chain: context.prev_chain,
            chain: Chain::EMPTY,
            record_count: self.count,
            aux_len: len(self.aux.len()),
            frame_count: len(self.frames.len()),
            stored_len: len(self.stored.len()),
            raw_len: len(self.raw_len),
            sealed: false,
        };
        let mut bytes = Vec::with_capacity(head.total_len());
        bytes.resize(HEADER_LEN, 0);
        bytes.extend_from_slice(&self.records);
        bytes.extend_from_slice(&self.aux);
        self.frames.iter().for_each(|f| bytes.extend_from_slice(&f.to_bytes()));
        bytes.extend_from_slice(&self.stored);
        seal(&mut head, &mut bytes);
        self.clear();
        Some(EncodedBatch { header: head, bytes })
    }

    fn clear(&mut self) {
        self.records.clear();
        self.aux.clear();
        self.frames.clear();
        self.stored.clear();
        self.pending.clear();
        self.raw_len = 0;
        self.count = 0;
        self.first = None;
    }

    fn note(&mut self, seq: Seq, time: WallTime) {
        debug_assert!(self.first.is_none() || seq >= self.last.0, "records out of order");
        self.first.get_or_insert((seq, time));
        self.last = (seq, time);
        self.count += 1;
    }

    fn push_raw(&mut self, mut bytes: &[u8]) {
        self.raw_len += bytes.len();
        if !self.pending.is_empty() {
            let take = bytes.len().min(FRAME_RAW - self.pending.len());
            self.pending.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.pending.len() == FRAME_RAW {
                self.frames.push(self.encoder.encode(&self.pending, &mut self.stored));
                self.pending.clear();
            }
        }
        // Whole frames go from the pool to the compressor without a copy.
        while bytes.len() >= FRAME_RAW {
            let (frame, rest) = bytes.split_at(FRAME_RAW);
            self.frames.push(self.encoder.encode(frame, &mut self.stored));
            bytes = rest;
        }
        self.pending.extend_from_slice(bytes);
    }
}

/// Writes the header before the body that is there, with chain and checksum.
fn seal(head: &mut BatchHeader, bytes: &mut [u8]) {
    let (front, body) = bytes.split_at_mut(HEADER_LEN);
    front.copy_from_slice(&encode_header(head));
    head.chain = chain_of(front, body);
    front[header::chain].copy_from_slice(&head.chain.to_bytes());
    let crc = crc32c::crc32c(&front[..header::crc.start]);
    front[header::crc].copy_from_slice(&crc.to_le_bytes());
}

fn encode_header(head: &BatchHeader) -> [u8; HEADER_LEN] {
    let mut out = [0u8; HEADER_LEN];
    let mut put = |at: core::ops::Range<usize>, bytes: &[u8]| out[at].copy_from_slice(bytes);
    put(header::magic, &MAGIC);
    put(header::version, &VERSION.to_le_bytes());
    put(header::header_len, &u16::try_from(HEADER_LEN).unwrap_or(0).to_le_bytes());
    put(header::volume, &head.volume.to_bytes());
    put(header::generation, &head.generation.get().to_le_bytes());
    put(header::prev_epoch, &head.prev.epoch.get().to_le_bytes());
    put(header::prev_seq, &head.prev.seq.get().to_le_bytes());
    put(header::epoch, &head.epoch.get().to_le_bytes());
    put(header::first_seq, &head.first_seq.get().to_le_bytes());
    put(header::last_seq, &head.last_seq.get().to_le_bytes());
    put(header::first_time, &head.first_time.nanos().to_le_bytes());
    put(header::last_time, &head.last_time.nanos().to_le_bytes());
    put(header::durable_epoch, &head.durable.epoch.get().to_le_bytes());
    put(header::durable_seq, &head.durable.seq.get().to_le_bytes());
    put(header::record_count, &head.record_count.to_le_bytes());
    put(header::aux_len, &head.aux_len.to_le_bytes());
    put(header::frame_count, &head.frame_count.to_le_bytes());
    put(header::stored_len, &head.stored_len.to_le_bytes());
    put(header::raw_len, &head.raw_len.to_le_bytes());
    put(header::prev_chain, &head.prev_chain.to_bytes());
    out
}

/// Cuts a write into maximal runs of zero and non-zero pieces.
struct ZeroPieces<'a> {
    extent: Extent,
    data: &'a [u8],
}

impl<'a> Iterator for ZeroPieces<'a> {
    type Item = (Extent, &'a [u8], bool);

    fn next(&mut self) -> Option<Self::Item> {
        if self.data.is_empty() {
            return None;
        }
        let piece = |at: usize| &self.data[at..self.data.len().min(at + ZERO_UNIT)];
        let zero = is_zero(piece(0));
        let mut end = piece(0).len();
        while end < self.data.len() && is_zero(piece(end)) == zero {
            end += piece(end).len();
        }
        let (bytes, rest) = self.data.split_at(end);
        let start = self.extent.end() - self.data.len() as u64;
        self.data = rest;
        Some((Extent::between(start, start + end as u64)?, bytes, zero))
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // The first word decides for nearly every non-zero piece; the rest runs at memory speed.
    let (words, tail) = bytes.as_chunks::<16>();
    words.iter().all(|w| u128::from_ne_bytes(*w) == 0) && tail.iter().all(|b| *b == 0)
}
