//! The footer of a sealed segment: pages of 4096 bytes, each with its own checksum.
//!
//! Three streams, one after the other: the *head* (directory of batches, events, fences), the
//! frame directory, the run. Whoever opens a segment reads the head; single pages of frames and
//! run are read when a view needs them. Survives any bytes.

use farshore_extent::{Chain, Epoch, Lsn, Seq, WallTime};

use crate::frame::{Codec, FrameEntry};
use crate::layout::{
    RECORD_LEN, array, batch_place as dir, event, footer_page as page, frame_place as fp, i64_at,
    len_at, u16_at, u32_at, u64_at,
};
use crate::limits::{FRAME_RAW, MAX_BATCH_BYTES, SEGMENT_ALIGN};
use crate::record::{Record, RecordBody};
use crate::run::{IndexEntry, IndexPlace};
use crate::segment::{SegmentError, SegmentId, SegmentTrailer};

/// Entries of 16 bytes in a page of the frame directory or the run.
pub const ENTRIES_PER_PAGE: usize = PAYLOAD / 16;

const PAYLOAD: usize = page::payload.end;
const KIND_HEAD: u8 = 1;
const KIND_FRAMES: u8 = 2;
const KIND_RUN: u8 = 3;

/// Where a batch lies in its segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPlace {
    /// Offset in the file, a multiple of 4096.
    pub place: u64,
    /// Bytes of the batch.
    pub len: u32,
    /// Epoch of its records.
    pub epoch: Epoch,
    /// First number.
    pub first_seq: Seq,
    /// Last number.
    pub last_seq: Seq,
    /// Capture time of the first record.
    pub first_time: WallTime,
    /// Capture time of the last record.
    pub last_time: WallTime,
    /// Chain after it.
    pub chain: Chain,
    /// Ordinal of its first frame in the segment.
    pub first_frame: u32,
    /// Number of its frames.
    pub frame_count: u32,
    /// [`crate::BatchFront::crc`] of the batch.
    pub front_crc: u32,
}

impl BatchPlace {
    /// The place of its last record.
    #[must_use]
    pub const fn last(&self) -> Lsn {
        Lsn::new(self.epoch, self.last_seq)
    }

    pub(crate) fn push_to(&self, out: &mut Vec<u8>) {
        let mut bytes = [0; dir::END];
        let mut put = |at: core::ops::Range<usize>, field: &[u8]| bytes[at].copy_from_slice(field);
        let block = u32::try_from(self.place / SEGMENT_ALIGN as u64).unwrap_or(u32::MAX);
        put(dir::block, &block.to_le_bytes());
        put(dir::len, &self.len.to_le_bytes());
        put(dir::epoch, &self.epoch.get().to_le_bytes());
        put(dir::first_seq, &self.first_seq.get().to_le_bytes());
        put(dir::last_seq, &self.last_seq.get().to_le_bytes());
        put(dir::first_time, &self.first_time.nanos().to_le_bytes());
        put(dir::last_time, &self.last_time.nanos().to_le_bytes());
        put(dir::chain, &self.chain.to_bytes());
        put(dir::first_frame, &self.first_frame.to_le_bytes());
        put(dir::frame_count, &self.frame_count.to_le_bytes());
        put(dir::front_crc, &self.front_crc.to_le_bytes());
        out.extend_from_slice(&bytes);
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let batch = Self {
            place: u64::from(u32_at(bytes, dir::block)) * SEGMENT_ALIGN as u64,
            len: u32_at(bytes, dir::len),
            epoch: Epoch::new(u64_at(bytes, dir::epoch)),
            first_seq: Seq::new(u64_at(bytes, dir::first_seq)),
            last_seq: Seq::new(u64_at(bytes, dir::last_seq)),
            first_time: WallTime::from_nanos(i64_at(bytes, dir::first_time)),
            last_time: WallTime::from_nanos(i64_at(bytes, dir::last_time)),
            chain: Chain::from_bytes(array(bytes, dir::chain)),
            first_frame: u32_at(bytes, dir::first_frame),
            frame_count: u32_at(bytes, dir::frame_count),
            front_crc: u32_at(bytes, dir::front_crc),
        };
        let possible = batch.place > 0
            && batch.len as usize <= MAX_BATCH_BYTES
            && batch.first_seq <= batch.last_seq
            && batch.first_frame.checked_add(batch.frame_count).is_some();
        possible.then_some(batch)
    }
}

/// A record that is not about content: marker, order change, resize, epoch start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentEvent {
    /// Its epoch.
    pub epoch: Epoch,
    /// The record.
    pub record: Record,
}

impl SegmentEvent {
    /// Whether a record belongs among the events.
    #[must_use]
    pub const fn is_event(body: &RecordBody) -> bool {
        match body {
            RecordBody::Marker(_)
            | RecordBody::MarkerCommit(_)
            | RecordBody::MarkerAbort(_)
            | RecordBody::OrderLost
            | RecordBody::OrderRestored
            | RecordBody::Resize(_)
            | RecordBody::EpochStart(_) => true,
            RecordBody::Write { .. }
            | RecordBody::Zero { .. }
            | RecordBody::Unknown { .. }
            | RecordBody::Copy { .. }
            | RecordBody::Hash { .. } => false,
        }
    }

    /// Its place in the change log.
    #[must_use]
    pub const fn lsn(&self) -> Lsn {
        Lsn::new(self.epoch, self.record.seq)
    }
}

/// Where a frame lies in its segment, and how to check it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FramePlace {
    /// Offset of the stored bytes in the file.
    pub place: u32,
    /// Lengths, codec and checksum.
    pub entry: FrameEntry,
}

impl FramePlace {
    pub(crate) fn to_bytes(self) -> [u8; 16] {
        let mut out = [0; 16];
        let less_one = |n: u32| u16::try_from(n.saturating_sub(1)).unwrap_or(u16::MAX);
        out[fp::place].copy_from_slice(&self.place.to_le_bytes());
        out[fp::crc].copy_from_slice(&self.entry.crc.to_le_bytes());
        let (stored, raw) = (less_one(self.entry.stored_len), less_one(self.entry.raw_len));
        out[fp::stored_less_one].copy_from_slice(&stored.to_le_bytes());
        out[fp::raw_less_one].copy_from_slice(&raw.to_le_bytes());
        out[fp::codec][0] = self.entry.codec.to_byte();
        out
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let entry = FrameEntry {
            raw_len: u32::from(u16_at(bytes, fp::raw_less_one)) + 1,
            stored_len: u32::from(u16_at(bytes, fp::stored_less_one)) + 1,
            crc: u32_at(bytes, fp::crc),
            codec: Codec::from_byte(bytes[fp::codec][0])?,
        };
        let possible = entry.raw_len as usize <= FRAME_RAW
            && entry.stored_len <= entry.raw_len
            && (entry.codec == Codec::Zstd || entry.stored_len == entry.raw_len)
            && bytes[fp::padding] == [0; 3];
        possible.then(|| Self { place: u32_at(bytes, fp::place), entry })
    }
}

impl SegmentTrailer {
    const fn head_len(&self) -> usize {
        self.batch_count as usize * dir::END
            + self.event_count as usize * event::END
            + self.event_aux_len as usize
            + self.run_pages() * 8
    }

    /// Pages of the head.
    #[must_use]
    pub const fn head_pages(&self) -> usize {
        self.head_len().div_ceil(PAYLOAD)
    }

    /// Pages of the frame directory.
    #[must_use]
    pub const fn frame_pages(&self) -> usize {
        (self.frame_count as usize).div_ceil(ENTRIES_PER_PAGE)
    }

    /// Pages of the run.
    #[must_use]
    pub const fn run_pages(&self) -> usize {
        (self.extent_count as usize).div_ceil(ENTRIES_PER_PAGE)
    }

    /// Bytes of all pages.
    #[must_use]
    pub const fn footer_len(&self) -> usize {
        (self.head_pages() + self.frame_pages() + self.run_pages()) * SEGMENT_ALIGN
    }

    /// Where page `n` of the frame directory lies in the file.
    #[must_use]
    pub const fn frame_page_place(&self, n: usize) -> u64 {
        self.footer_place() + ((self.head_pages() + n) * SEGMENT_ALIGN) as u64
    }

    /// Where page `n` of the run lies in the file.
    #[must_use]
    pub const fn run_page_place(&self, n: usize) -> u64 {
        self.frame_page_place(self.frame_pages() + n)
    }
}

/// The part of a footer that is read when a segment is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FooterHead {
    /// Every batch, in order.
    pub batches: Vec<BatchPlace>,
    /// Every event, in order.
    pub events: Vec<SegmentEvent>,
    /// First sector of each page of the run: which page to read for an address.
    pub fences: Vec<u64>,
}

impl FooterHead {
    /// Parses the first [`SegmentTrailer::head_pages`] pages of a footer.
    ///
    /// # Errors
    /// [`SegmentError`] naming the check.
    pub fn parse(trailer: &SegmentTrailer, bytes: &[u8]) -> Result<Self, SegmentError> {
        let pages = trailer.head_pages();
        let needed = pages * SEGMENT_ALIGN;
        let bytes = bytes.get(..needed).ok_or(SegmentError::Truncated {
            what: "footer head",
            needed,
            have: bytes.len(),
        })?;
        let mut stream = Vec::with_capacity(pages * PAYLOAD);
        for (index, page) in bytes.chunks_exact(SEGMENT_ALIGN).enumerate() {
            stream.extend_from_slice(parse_page(KIND_HEAD, trailer.segment, index, page)?);
        }
        if stream.len() != trailer.head_len() {
            return Err(SegmentError::Field("head length"));
        }
        let (batches, rest) = stream.split_at(trailer.batch_count as usize * dir::END);
        let (events, rest) = rest.split_at(trailer.event_count as usize * event::END);
        let (aux, fences) = rest.split_at(trailer.event_aux_len as usize);
        let head = Self {
            batches: batches
                .chunks_exact(dir::END)
                .map(BatchPlace::parse)
                .collect::<Option<_>>()
                .ok_or(SegmentError::Field("batch directory"))?,
            events: parse_events(events, aux)?,
            fences: fences.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect(),
        };
        head.check_order(trailer)?;
        Ok(head)
    }

    fn check_order(&self, trailer: &SegmentTrailer) -> Result<(), SegmentError> {
        let ascending = self.batches.windows(2).all(|w| {
            w[0].last() < Lsn::new(w[1].epoch, w[1].first_seq)
                && w[0].place + u64::from(w[0].len) <= w[1].place
        });
        let ends = self.batches.last().is_none_or(|b| {
            b.last() == trailer.last && b.place + u64::from(b.len) <= trailer.footer_place()
        });
        let sorted = self.fences.is_sorted();
        if ascending && ends && sorted {
            Ok(())
        } else {
            Err(SegmentError::Field("order of the footer head"))
        }
    }
}

fn parse_events(table: &[u8], aux: &[u8]) -> Result<Vec<SegmentEvent>, SegmentError> {
    let parse = |(index, bytes): (usize, &[u8])| {
        let entry: [u8; RECORD_LEN] = array(bytes, event::record);
        let record = Record::decode(&entry, aux, 0)
            .map_err(|source| SegmentError::Event { index, source })?;
        if !SegmentEvent::is_event(&record.body) {
            return Err(SegmentError::Field("event kind"));
        }
        Ok(SegmentEvent { epoch: Epoch::new(u64_at(bytes, event::epoch)), record })
    };
    table.chunks_exact(event::END).enumerate().map(parse).collect()
}

/// A whole footer, for tools and tests; the store reads page by page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentFooter {
    /// Batches, events, fences.
    pub head: FooterHead,
    /// Every frame, by ordinal.
    pub frames: Vec<FramePlace>,
    /// The run, by address.
    pub run: Vec<IndexEntry>,
}

impl SegmentFooter {
    /// Parses all pages.
    ///
    /// # Errors
    /// [`SegmentError`] naming the check.
    pub fn parse(trailer: &SegmentTrailer, bytes: &[u8]) -> Result<Self, SegmentError> {
        let needed = trailer.footer_len();
        let bytes = bytes.get(..needed).ok_or(SegmentError::Truncated {
            what: "footer",
            needed,
            have: bytes.len(),
        })?;
        let head = FooterHead::parse(trailer, bytes)?;
        let page = |n: usize| &bytes[n * SEGMENT_ALIGN..(n + 1) * SEGMENT_ALIGN];
        let (first_frame, first_run) =
            (trailer.head_pages(), trailer.head_pages() + trailer.frame_pages());
        let mut frames = Vec::new();
        for n in 0..trailer.frame_pages() {
            frames.extend(parse_frame_page(trailer, n, page(first_frame + n))?);
        }
        let mut run = Vec::new();
        for n in 0..trailer.run_pages() {
            let entries = parse_run_page(trailer, n, page(first_run + n))?;
            if entries.first().map(|e| e.sector) != head.fences.get(n).copied() {
                return Err(SegmentError::Field("fence"));
            }
            run.extend(entries);
        }
        if !run.windows(2).all(|w: &[IndexEntry]| w[0].end() <= w[1].sector) {
            return Err(SegmentError::Field("order of the run"));
        }
        Ok(Self { head, frames, run })
    }
}

/// Parses page `n` of the frame directory.
///
/// # Errors
/// [`SegmentError`] naming the check.
pub fn parse_frame_page(
    trailer: &SegmentTrailer,
    n: usize,
    bytes: &[u8],
) -> Result<Vec<FramePlace>, SegmentError> {
    let index = trailer.head_pages() + n;
    let payload = parse_page(KIND_FRAMES, trailer.segment, index, bytes)?;
    check_count(payload, trailer.frame_count, n)?;
    payload
        .chunks_exact(fp::END)
        .map(|bytes| {
            FramePlace::parse(bytes).filter(|frame| {
                u64::from(frame.place) + u64::from(frame.entry.stored_len) <= trailer.footer_place()
            })
        })
        .collect::<Option<_>>()
        .ok_or(SegmentError::Field("frame directory"))
}

/// Parses page `n` of the run; entries are ascending and do not overlap.
///
/// # Errors
/// [`SegmentError`] naming the check.
pub fn parse_run_page(
    trailer: &SegmentTrailer,
    n: usize,
    bytes: &[u8],
) -> Result<Vec<IndexEntry>, SegmentError> {
    let index = trailer.head_pages() + trailer.frame_pages() + n;
    let payload = parse_page(KIND_RUN, trailer.segment, index, bytes)?;
    check_count(payload, trailer.extent_count, n)?;
    let (entries, _) = payload.as_chunks::<16>();
    let entries: Vec<_> = entries
        .iter()
        .map(IndexEntry::from_bytes)
        .collect::<Option<_>>()
        .ok_or(SegmentError::Field("run entry"))?;
    let known = |place: IndexPlace| match place {
        IndexPlace::Frame { frame, .. } => frame < trailer.frame_count,
        IndexPlace::Zero | IndexPlace::Unknown => true,
    };
    let sorted = entries.windows(2).all(|w| w[0].end() <= w[1].sector);
    if sorted && entries.iter().all(|e| known(e.place)) {
        Ok(entries)
    } else {
        Err(SegmentError::Field("run entry"))
    }
}

fn check_count(payload: &[u8], total: u32, n: usize) -> Result<(), SegmentError> {
    let expected = (total as usize).saturating_sub(n * ENTRIES_PER_PAGE).min(ENTRIES_PER_PAGE);
    if payload.len() == expected * 16 { Ok(()) } else { Err(SegmentError::Field("page length")) }
}

/// The payload of an index page, of a segment or of a run over several: `segment` is the number that
/// its writer gave, `index` its place in the file.
///
/// # Errors
/// [`SegmentError`] naming the check.
pub fn parse_page(
    kind: u8,
    segment: SegmentId,
    index: usize,
    bytes: &[u8],
) -> Result<&[u8], SegmentError> {
    let what = "footer page";
    if bytes.len() != SEGMENT_ALIGN {
        return Err(SegmentError::Truncated { what, needed: SEGMENT_ALIGN, have: bytes.len() });
    }
    if crc32c::crc32c(&bytes[..page::crc.start]) != u32_at(bytes, page::crc) {
        return Err(SegmentError::Checksum(what));
    }
    let used = usize::from(u16_at(bytes, page::used));
    let right = bytes[page::kind][0] == kind
        && len_at(bytes, page::index) == index
        && u32_at(bytes, page::segment_low) == low(segment)
        && used <= PAYLOAD;
    // A page with a good checksum in the wrong place was misdirected.
    if right { Ok(&bytes[..used]) } else { Err(SegmentError::Missing(what)) }
}

/// Cuts the three streams into pages.
pub(crate) fn encode_pages(segment: SegmentId, head: &[u8], frames: &[u8], run: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let streams = [(KIND_HEAD, head), (KIND_FRAMES, frames), (KIND_RUN, run)];
    let pages = streams.iter().flat_map(|(kind, s)| s.chunks(PAYLOAD).map(|c| (*kind, c)));
    for (index, (kind, payload)) in pages.enumerate() {
        out.extend_from_slice(&encode_page(kind, segment, index, payload));
    }
    out
}

/// An index page with at most [`PAGE_PAYLOAD`] bytes of payload.
#[must_use]
pub fn encode_page(
    kind: u8,
    segment: SegmentId,
    index: usize,
    payload: &[u8],
) -> [u8; SEGMENT_ALIGN] {
    let mut bytes = [0u8; SEGMENT_ALIGN];
    bytes[..payload.len()].copy_from_slice(payload);
    bytes[page::kind][0] = kind;
    let used = u16::try_from(payload.len()).unwrap_or(u16::MAX);
    bytes[page::used].copy_from_slice(&used.to_le_bytes());
    bytes[page::segment_low].copy_from_slice(&low(segment).to_le_bytes());
    let index = u32::try_from(index).unwrap_or(u32::MAX);
    bytes[page::index].copy_from_slice(&index.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..page::crc.start]);
    bytes[page::crc].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn low(segment: SegmentId) -> u32 {
    u32::try_from(segment.get() & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

/// Most bytes of payload of an index page.
pub const PAGE_PAYLOAD: usize = PAYLOAD;
