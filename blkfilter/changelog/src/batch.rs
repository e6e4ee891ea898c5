//! Batches: the atomic unit. All of it is visible at the target or none.

use farshore_extent::{Chain, Epoch, Generation, Lsn, Seq, VolumeId, WallTime};

use crate::frame::FrameEntry;
use crate::layout::{
    FRAME_ENTRY_LEN, HEADER_LEN, RECORD_LEN, array, header, i64_at, len_at, u16_at, u32_at, u64_at,
};
use crate::limits::{FRAME_RAW, MAX_AUX, MAX_BATCH_RAW, MAX_FRAMES, MAX_RECORDS};
use crate::record::{PayloadRef, Record, RecordError};

pub(crate) const MAGIC: [u8; 8] = *b"FARSHBAT";
pub(crate) const VERSION: u16 = 1;
/// Bit 0 of the header's flags: the payload is sealed (encrypted). No writer sets it yet.
const FLAG_SEALED: u32 = 1;

/// Why bytes are not a batch. Names the failing check.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// The magic is missing: not a batch at all (a zeroed or foreign place).
    #[error("no batch begins here")]
    NotABatch,
    /// A later version of the format.
    #[error("batch format version {0} is newer than this program understands")]
    Version(u16),
    /// Fewer bytes than the header says.
    #[error("batch of {needed} bytes, but only {have} are there")]
    Truncated {
        /// Bytes needed.
        needed: usize,
        /// Bytes there.
        have: usize,
    },
    /// The header's checksum is wrong.
    #[error("checksum of the batch header does not match")]
    HeaderChecksum,
    /// The checksum of header and tables is wrong.
    #[error("checksum of the batch's tables does not match")]
    FrontChecksum,
    /// A length, count or order that no writer produces.
    #[error("batch header field {0} is impossible")]
    Field(&'static str),
    /// The chain does not follow from the content.
    #[error("the content of the batch does not match its chain")]
    Chain,
    /// A frame is damaged.
    #[error("frame {index}: {why}")]
    Frame {
        /// Which frame.
        index: usize,
        /// Which check.
        why: &'static str,
    },
    /// A record is malformed.
    #[error("record {index}: {source}")]
    Record {
        /// Which record.
        index: usize,
        /// What is wrong.
        source: RecordError,
    },
    /// The payload of a record does not match the checksum made at capture.
    #[error("the payload of record {seq} does not match the checksum made at capture")]
    Payload {
        /// Its number.
        seq: Seq,
    },
    /// Sealed payload, and this version has no keys.
    #[error("the payload is sealed and this version cannot open it")]
    Sealed,
}

/// The fields of a batch header that the rest of the product needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    /// The volume.
    pub volume: VolumeId,
    /// Fencing number of the source that made it.
    pub generation: Generation,
    /// Last number of the batch before; contiguity is `prev == own last`.
    pub prev: Lsn,
    /// Epoch of all records.
    pub epoch: Epoch,
    /// Number of the first record.
    pub first_seq: Seq,
    /// Number of the last record: the batch covers `(prev, last]`.
    pub last_seq: Seq,
    /// Capture time of the first record.
    pub first_time: WallTime,
    /// Capture time of the last record.
    pub last_time: WallTime,
    /// What the source knew to be durable at the target when it made the batch: a bad place at or
    /// below it is corruption, never a torn tail.
    pub durable: Lsn,
    /// Chain before this batch.
    pub prev_chain: Chain,
    /// Chain after this batch.
    pub chain: Chain,
    /// Number of records.
    pub record_count: u32,
    /// Bytes of the auxiliary area.
    pub aux_len: u32,
    /// Number of frames.
    pub frame_count: u32,
    /// Bytes of all stored frames.
    pub stored_len: u32,
    /// Bytes of the raw stream.
    pub raw_len: u32,
    /// Whether the payload is sealed.
    pub sealed: bool,
}

impl BatchHeader {
    /// Bytes of a header; read this many to learn the length of the rest.
    pub const LEN: usize = HEADER_LEN;

    /// The place of the last record.
    #[must_use]
    pub const fn last(&self) -> Lsn {
        Lsn::new(self.epoch, self.last_seq)
    }

    /// Bytes of the whole batch.
    #[must_use]
    pub const fn total_len(&self) -> usize {
        self.payload_offset() + self.stored_len as usize
    }

    /// Where the record table begins, relative to the batch.
    #[must_use]
    pub const fn records_offset(&self) -> usize {
        HEADER_LEN
    }

    /// Where the first stored frame begins, relative to the batch. Everything before it is what
    /// an index needs to read.
    #[must_use]
    pub const fn payload_offset(&self) -> usize {
        HEADER_LEN
            + self.record_count as usize * RECORD_LEN
            + self.aux_len as usize
            + self.frame_count as usize * FRAME_ENTRY_LEN
    }

    /// Parses and checks a header alone (magic, version, checksum, limits).
    ///
    /// # Errors
    /// [`BatchError`] naming the check.
    pub fn parse(bytes: &[u8]) -> Result<Self, BatchError> {
        if bytes.len() < HEADER_LEN {
            return Err(BatchError::Truncated { needed: HEADER_LEN, have: bytes.len() });
        }
        let bytes = &bytes[..HEADER_LEN];
        if bytes[header::magic] != MAGIC {
            return Err(BatchError::NotABatch);
        }
        let version = u16_at(bytes, header::version);
        if version != VERSION {
            return Err(BatchError::Version(version));
        }
        if crc32c::crc32c(&bytes[..header::crc.start]) != u32_at(bytes, header::crc) {
            return Err(BatchError::HeaderChecksum);
        }
        Self::check_limits(bytes)?;
        let lsn =
            |epoch, seq| Lsn::new(Epoch::new(u64_at(bytes, epoch)), Seq::new(u64_at(bytes, seq)));
        Ok(Self {
            volume: VolumeId::from_bytes(array(bytes, header::volume)),
            generation: Generation::new(u64_at(bytes, header::generation)),
            prev: lsn(header::prev_epoch, header::prev_seq),
            epoch: Epoch::new(u64_at(bytes, header::epoch)),
            first_seq: Seq::new(u64_at(bytes, header::first_seq)),
            last_seq: Seq::new(u64_at(bytes, header::last_seq)),
            first_time: WallTime::from_nanos(i64_at(bytes, header::first_time)),
            last_time: WallTime::from_nanos(i64_at(bytes, header::last_time)),
            durable: lsn(header::durable_epoch, header::durable_seq),
            prev_chain: Chain::from_bytes(array(bytes, header::prev_chain)),
            chain: Chain::from_bytes(array(bytes, header::chain)),
            record_count: u32_at(bytes, header::record_count),
            aux_len: u32_at(bytes, header::aux_len),
            frame_count: u32_at(bytes, header::frame_count),
            stored_len: u32_at(bytes, header::stored_len),
            raw_len: u32_at(bytes, header::raw_len),
            sealed: u32_at(bytes, header::flags) & FLAG_SEALED != 0,
        })
    }

    /// The records of a batch of which only the front was read, [`Self::payload_offset`] bytes.
    /// Nothing vouches for them: the chain covers the payload, too. For estimates.
    ///
    /// # Errors
    /// [`BatchError::Truncated`] and [`BatchError::Record`].
    pub fn records_of(&self, front: &[u8]) -> Result<Vec<Record>, BatchError> {
        let needed = self.payload_offset();
        let front =
            front.get(..needed).ok_or(BatchError::Truncated { needed, have: front.len() })?;
        let batch = BatchFront { header: *self, bytes: front };
        let bad = |(index, record): (usize, Result<Record, _>)| {
            record.map_err(|source| BatchError::Record { index, source })
        };
        batch.raw_records().enumerate().map(bad).collect()
    }

    fn check_limits(bytes: &[u8]) -> Result<(), BatchError> {
        let require = |ok: bool, field| if ok { Ok(()) } else { Err(BatchError::Field(field)) };
        let raw = len_at(bytes, header::raw_len);
        let frames = len_at(bytes, header::frame_count);
        require(usize::from(u16_at(bytes, header::header_len)) == HEADER_LEN, "header length")?;
        require(u32_at(bytes, header::flags) & !FLAG_SEALED == 0, "flags")?;
        require((1..=MAX_RECORDS).contains(&len_at(bytes, header::record_count)), "record count")?;
        require(len_at(bytes, header::aux_len) <= MAX_AUX, "auxiliary length")?;
        require(raw <= MAX_BATCH_RAW, "raw length")?;
        require(frames <= MAX_FRAMES && frames == raw.div_ceil(FRAME_RAW), "frame count")?;
        require(len_at(bytes, header::stored_len) <= raw, "stored length")?;
        let (epoch, prev_epoch) = (u64_at(bytes, header::epoch), u64_at(bytes, header::prev_epoch));
        let (first, last) = (u64_at(bytes, header::first_seq), u64_at(bytes, header::last_seq));
        require(first <= last && first > 0, "sequence range")?;
        let follows = (prev_epoch, u64_at(bytes, header::prev_seq)) < (epoch, first);
        require(follows, "previous place")
    }
}

/// The chain after a batch: BLAKE3 over its header up to the chain field (which includes the
/// chain before it) and the BLAKE3 digest of its body.
pub(crate) fn chain_of(header_bytes: &[u8], body: &[u8]) -> Chain {
    let digest = blake3::hash(body);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header_bytes[..header::chain.start]);
    hasher.update(digest.as_bytes());
    Chain::from_bytes(*hasher.finalize().as_bytes())
}

/// Bytes that have the outer shape of a batch; nothing inside is believed yet.
#[derive(Debug, Clone, Copy)]
pub struct RawBatch<'a> {
    header: BatchHeader,
    bytes: &'a [u8],
}

impl<'a> RawBatch<'a> {
    /// Takes the batch at the start of `bytes`; bytes after it are left alone.
    ///
    /// # Errors
    /// [`BatchError`] when the header is bad or bytes are missing.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BatchError> {
        let header = BatchHeader::parse(bytes)?;
        let needed = header.total_len();
        let bytes =
            bytes.get(..needed).ok_or(BatchError::Truncated { needed, have: bytes.len() })?;
        Ok(Self { header, bytes })
    }

    /// The header.
    #[must_use]
    pub const fn header(&self) -> &BatchHeader {
        &self.header
    }

    /// Verifies the chain (so every byte), the frame table and every record. After this nothing
    /// about the batch needs to be doubted, except whether it may follow what came before.
    ///
    /// # Errors
    /// [`BatchError`] naming the check.
    pub fn check(self) -> Result<CheckedBatch<'a>, BatchError> {
        let (head, body) = self.bytes.split_at(HEADER_LEN);
        if chain_of(head, body) != self.header.chain {
            return Err(BatchError::Chain);
        }
        self.check_without_chain()
    }

    /// As [`Self::check`], for bytes whose chain this process has just made or verified itself.
    /// Frame checksums are not read here; whoever decodes a frame verifies it.
    ///
    /// # Errors
    /// [`BatchError`] naming the check.
    pub fn check_without_chain(self) -> Result<CheckedBatch<'a>, BatchError> {
        let checked = CheckedBatch { header: self.header, bytes: self.bytes };
        checked.front().check()?;
        Ok(checked)
    }
}

/// What an index of a batch is made of, header and tables: a percent or two of its bytes.
#[derive(Debug, Clone, Copy)]
pub struct BatchFront<'a> {
    header: BatchHeader,
    bytes: &'a [u8],
}

impl<'a> BatchFront<'a> {
    /// Takes the front at the start of `bytes`. Its checksum comes from elsewhere: the chain of the
    /// batch covers the payload, too.
    ///
    /// # Errors
    /// [`BatchError`] naming the check.
    pub fn parse(bytes: &'a [u8], crc: u32) -> Result<Self, BatchError> {
        let header = BatchHeader::parse(bytes)?;
        let needed = header.payload_offset();
        let have = bytes.len();
        let bytes = bytes.get(..needed).ok_or(BatchError::Truncated { needed, have })?;
        let front = Self { header, bytes };
        if front.crc() != crc {
            return Err(BatchError::FrontChecksum);
        }
        front.check()?;
        Ok(front)
    }

    /// The header.
    #[must_use]
    pub const fn header(&self) -> &BatchHeader {
        &self.header
    }

    /// crc32c of its bytes.
    #[must_use]
    pub fn crc(&self) -> u32 {
        crc32c::crc32c(self.bytes)
    }

    /// The records, in order.
    pub fn records(&self) -> impl Iterator<Item = Record> + use<'a> {
        // check() has decoded every entry; filter_map drops nothing.
        self.raw_records().filter_map(Result::ok)
    }

    /// The frame table, each entry with the place of its stored bytes relative to the batch.
    pub fn frames(&self) -> impl Iterator<Item = (FrameEntry, usize)> + use<'a> {
        let mut at = self.header.payload_offset();
        self.frame_entries().flatten().map(move |entry| {
            let here = at;
            at += entry.stored_len as usize;
            (entry, here)
        })
    }

    fn check(&self) -> Result<(), BatchError> {
        self.check_frames()?;
        self.check_records()
    }

    fn table(&self) -> (&'a [u8], &'a [u8], &'a [u8]) {
        let records_end = HEADER_LEN + self.header.record_count as usize * RECORD_LEN;
        let aux_end = records_end + self.header.aux_len as usize;
        let frames_end = self.header.payload_offset();
        (
            &self.bytes[HEADER_LEN..records_end],
            &self.bytes[records_end..aux_end],
            &self.bytes[aux_end..frames_end],
        )
    }

    fn raw_records(&self) -> impl Iterator<Item = Result<Record, RecordError>> + use<'a> {
        let (records, aux, _) = self.table();
        let raw_len = self.header.raw_len as usize;
        let (entries, _) = records.as_chunks::<RECORD_LEN>();
        entries.iter().map(move |entry| Record::decode(entry, aux, raw_len))
    }

    fn frame_entries(&self) -> impl Iterator<Item = Option<FrameEntry>> + use<'a> {
        let (_, _, frames) = self.table();
        let (entries, _) = frames.as_chunks::<FRAME_ENTRY_LEN>();
        entries.iter().map(FrameEntry::from_bytes)
    }

    fn check_frames(&self) -> Result<(), BatchError> {
        let last = (self.header.frame_count as usize).saturating_sub(1);
        let (mut raw, mut stored) = (0usize, 0usize);
        for (index, entry) in self.frame_entries().enumerate() {
            let bad = |why| BatchError::Frame { index, why };
            let entry = entry.ok_or(bad("impossible table entry"))?;
            if index < last && entry.raw_len as usize != FRAME_RAW {
                return Err(bad("only the last frame may be short"));
            }
            raw += entry.raw_len as usize;
            stored += entry.stored_len as usize;
        }
        if raw != self.header.raw_len as usize || stored != self.header.stored_len as usize {
            return Err(BatchError::Field("frame table"));
        }
        Ok(())
    }

    fn check_records(&self) -> Result<(), BatchError> {
        let mut at = self.header.first_seq;
        let mut first = None;
        for (index, record) in self.raw_records().enumerate() {
            let record = record.map_err(|source| BatchError::Record { index, source })?;
            first.get_or_insert(record.seq);
            if record.seq < at || record.seq > self.header.last_seq {
                return Err(BatchError::Field("record order"));
            }
            at = record.seq;
        }
        if first != Some(self.header.first_seq) || at != self.header.last_seq {
            return Err(BatchError::Field("sequence range"));
        }
        Ok(())
    }
}

/// A batch whose every table entry is known to be good.
#[derive(Debug, Clone, Copy)]
pub struct CheckedBatch<'a> {
    header: BatchHeader,
    bytes: &'a [u8],
}

impl<'a> CheckedBatch<'a> {
    /// The header.
    #[must_use]
    pub const fn header(&self) -> &BatchHeader {
        &self.header
    }

    /// The encoded bytes, as made by the source.
    #[must_use]
    pub const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Header and tables alone.
    #[must_use]
    pub fn front(&self) -> BatchFront<'a> {
        BatchFront { header: self.header, bytes: &self.bytes[..self.header.payload_offset()] }
    }

    /// The records, in order.
    pub fn records(&self) -> impl Iterator<Item = Record> + use<'a> {
        self.front().records()
    }

    /// The frame table, each entry with the place of its stored bytes relative to the batch.
    pub fn frames(&self) -> impl Iterator<Item = (FrameEntry, usize)> + use<'a> {
        self.front().frames()
    }

    /// Reads the payload of a record into `out` (cleared first), decompressing the one or more
    /// frames that hold it and verifying their checksums and the one made at capture.
    ///
    /// # Errors
    /// [`BatchError::Frame`], [`BatchError::Payload`] or [`BatchError::Sealed`].
    pub fn read_payload(
        &self,
        seq: Seq,
        payload: PayloadRef,
        len: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), BatchError> {
        if self.header.sealed {
            return Err(BatchError::Sealed);
        }
        out.clear();
        let (start, end) = (payload.raw_off as usize, payload.raw_off as usize + len);
        let mut frame_raw = Vec::new();
        for (index, (entry, place)) in self.frames().enumerate() {
            let frame_start = index * FRAME_RAW;
            let frame_end = frame_start + entry.raw_len as usize;
            if frame_end <= start || frame_start >= end {
                continue;
            }
            let stored = &self.bytes[place..place + entry.stored_len as usize];
            entry.decode(stored, &mut frame_raw).map_err(|why| BatchError::Frame { index, why })?;
            let from = start.max(frame_start) - frame_start;
            let to = end.min(frame_end) - frame_start;
            out.extend_from_slice(&frame_raw[from..to]);
        }
        if out.len() != len || crc32c::crc32c(out) != payload.crc {
            return Err(BatchError::Payload { seq });
        }
        Ok(())
    }

    /// Reads the payload of all records into `out` (cleared first), as one stream in which
    /// [`PayloadRef::raw_off`] counts. The checksums made at capture are left to the caller.
    ///
    /// # Errors
    /// [`BatchError::Frame`] or [`BatchError::Sealed`].
    pub fn read_all(&self, out: &mut Vec<u8>) -> Result<(), BatchError> {
        if self.header.sealed {
            return Err(BatchError::Sealed);
        }
        out.clear();
        let mut raw = Vec::new();
        for (index, (entry, place)) in self.frames().enumerate() {
            let stored = &self.bytes[place..place + entry.stored_len as usize];
            entry.decode(stored, &mut raw).map_err(|why| BatchError::Frame { index, why })?;
            out.extend_from_slice(&raw);
        }
        Ok(())
    }
}
