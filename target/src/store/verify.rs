//! One segment verified in whole, a step at a time: so that a check from the command line and a
//! scrub in the background look at the same things.
//!
//! Everything found is a [`Flaw`], an error of the disk as well: a check that ends at the first bad
//! sector does not say what else is bad.

use std::sync::Arc;

use farshore_changelog::{
    BatchError, BatchHeader, BatchPlace, CheckedBatch, ENTRIES_PER_PAGE, FramePlace, IndexEntry,
    IndexPlace, RawBatch, Record, RecordBody, SegmentHeader, SegmentId, SegmentIndexBuilder,
    SegmentTrailer, parse_frame_page, parse_run_page,
};
use farshore_extent::{Chain, Extent, ExtentSet, Lsn, SECTOR};

use super::disk::ALIGN;
use super::segment::{Index, Segment, read_head};

/// Raw bytes of a frame; all but the last of a batch are full.
const FRAME_RAW: u64 = farshore_changelog::limits::FRAME_RAW as u64;

/// Behind every volume, in bytes.
const END: u64 = i64::MAX as u64;

/// Where header and trailer have their checksum.
const CRC_AT: usize = ALIGN - 4;

/// Something of a segment that is not as it was written.
#[derive(Debug, Clone)]
pub(crate) struct Flaw {
    /// Where in the file.
    pub(crate) place: u64,
    /// Which check failed.
    pub(crate) what: String,
    /// Places from the first to before the second cannot be opened at all.
    pub(crate) shut: Option<(Lsn, Lsn)>,
    /// These ranges cannot be read at any place at or behind `from` until they are written again.
    pub(crate) ranges: ExtentSet,
    /// See `ranges`.
    pub(crate) from: Lsn,
}

/// Verifies header to trailer of one segment.
pub(crate) struct SegmentCheck {
    segment: Arc<Segment>,
    batches: Vec<BatchPlace>,
    next: usize,
    /// Where the next batch has to begin, and what it has to follow.
    place: u64,
    at: (Lsn, Chain),
    /// What the batches say, to be compared with the footer; none once a batch is missing in it.
    builder: Option<SegmentIndexBuilder>,
    frames: Vec<Option<FramePlace>>,
    run: Vec<IndexEntry>,
    flaws: Vec<Flaw>,
    buf: Vec<u8>,
    read: u64,
    frame_count: u64,
}

impl SegmentCheck {
    /// Reads the footer at once; the batches are for [`Self::step`].
    pub(crate) fn new(segment: Arc<Segment>) -> Self {
        let header = segment.header;
        let mut check = Self {
            batches: Vec::new(),
            next: 0,
            place: ALIGN as u64,
            at: (header.prev, header.prev_chain),
            builder: Some(SegmentIndexBuilder::new(header)),
            frames: Vec::new(),
            run: Vec::new(),
            flaws: Vec::new(),
            buf: Vec::new(),
            read: ALIGN as u64,
            frame_count: 0,
            segment,
        };
        let segment = Arc::clone(&check.segment);
        match segment.batches() {
            Ok(batches) => check.batches = batches,
            Err(why) => check.flaw(0, why.to_string(), ExtentSet::new(), header.prev),
        }
        check.ends(&segment);
        match &segment.index {
            Index::Memory { frames, run, .. } => {
                check.frames = frames.iter().copied().map(Some).collect();
                check.run.clone_from(run);
            }
            Index::Footer { trailer, fences } => check.footer(trailer, fences),
        }
        check
    }

    /// Verifies one more batch; false when that was the last. `seen` hears of every record that
    /// gives a range new content, and where.
    pub(crate) fn step(&mut self, seen: &mut dyn FnMut(Lsn, Extent)) -> bool {
        let Some(batch) = self.batches.get(self.next).copied() else {
            self.compare_footer();
            return false;
        };
        self.next += 1;
        let mut bytes = std::mem::take(&mut self.buf);
        bytes.resize(batch.len as usize, 0);
        let checked = match self.segment.read(&mut bytes, batch.place) {
            Ok(()) => RawBatch::parse(&bytes).and_then(RawBatch::check).map_err(|e| e.to_string()),
            Err(why) => Err(why.to_string()),
        };
        self.read += u64::from(batch.len);
        match checked.and_then(|checked| self.follows(&batch, &checked).map(|()| checked)) {
            Ok(checked) => self.good(&batch, &checked, seen),
            Err(why) => self.bad(&batch, &bytes, why),
        }
        self.place = (batch.place + u64::from(batch.len)).next_multiple_of(ALIGN as u64);
        self.at = (batch.last(), batch.chain);
        self.buf = bytes;
        true
    }

    /// The segment.
    pub(crate) fn id(&self) -> SegmentId {
        self.segment.id()
    }

    /// Bytes read since the last call.
    pub(crate) const fn take_read(&mut self) -> u64 {
        std::mem::replace(&mut self.read, 0)
    }

    /// Frames decoded.
    pub(crate) const fn frames(&self) -> u64 {
        self.frame_count
    }

    /// Number of batches.
    pub(crate) fn batches(&self) -> u64 {
        self.batches.len() as u64
    }

    /// What was found since the last call.
    pub(crate) fn take_flaws(&mut self) -> Vec<Flaw> {
        std::mem::take(&mut self.flaws)
    }

    fn flaw(&mut self, place: u64, what: String, ranges: ExtentSet, from: Lsn) {
        self.flaws.push(Flaw { place, what, shut: None, ranges, from });
    }

    /// The first block, and the last: recovery can do without either when every batch is whole.
    fn ends(&mut self, segment: &Segment) {
        let mut block = vec![0; ALIGN];
        let read = segment.read(&mut block, 0).map_err(|e| e.to_string());
        let parsed = read.and_then(|()| SegmentHeader::parse(&block).map_err(|e| e.to_string()));
        match parsed {
            Ok(header) if header == segment.header => {}
            Ok(_) => self.useless(0, "the header is another segment's".to_owned()),
            Err(why) => self.useless(0, format!("header: {why}")),
        }
        let (header, place) = (&segment.header, segment.header.trailer_place());
        if segment.read(&mut block, place).is_err() {
            // The file ends before it: never sealed.
            return;
        }
        let stored = block[CRC_AT..].try_into().map(u32::from_le_bytes);
        let sound = stored.is_ok_and(|crc| crc == crc32c::crc32c(&block[..CRC_AT]));
        if !sound && block.iter().any(|byte| *byte != 0) {
            self.useless(place, "the trailer is damaged".to_owned());
        } else if matches!(segment.index, Index::Memory { .. })
            && let Ok(trailer) = SegmentTrailer::parse(&block, header)
            && let Err(why) = read_head(segment.file.as_ref(), header, &trailer)
        {
            self.useless(trailer.footer_place(), why.to_string());
        }
    }

    /// Something that is derived from the batches, which were read instead.
    fn useless(&mut self, place: u64, what: String) {
        let what = format!("{what}; the batches are read instead");
        self.flaw(place, what, ExtentSet::new(), self.segment.last);
    }

    /// Reads every page of frame directory and run.
    fn footer(&mut self, trailer: &SegmentTrailer, fences: &[u64]) {
        self.read += (trailer.footer_len() + ALIGN) as u64;
        let segment = Arc::clone(&self.segment);
        let last = segment.last;
        let mut page = vec![0; ALIGN];
        let mut read = |place| {
            let read = segment.read(&mut page, place).map_err(|e| e.to_string());
            read.map(|()| page.clone())
        };
        for (n, fence) in fences.iter().enumerate() {
            let place = trailer.run_page_place(n);
            let entries = read(place)
                .and_then(|bytes| parse_run_page(trailer, n, &bytes).map_err(|e| e.to_string()));
            match entries {
                Ok(entries) => self.run.extend(entries),
                Err(why) => {
                    self.builder = None;
                    let end = fences.get(n + 1).map_or(END, |next| next * SECTOR);
                    let ranges = Extent::between(fence * SECTOR, end).into_iter().collect();
                    self.flaw(place, format!("page {n} of the run: {why}"), ranges, last);
                }
            }
        }
        for n in 0..trailer.frame_pages() {
            let place = trailer.frame_page_place(n);
            let first = n * ENTRIES_PER_PAGE;
            let count = (trailer.frame_count as usize - first).min(ENTRIES_PER_PAGE);
            let frames = read(place)
                .and_then(|bytes| parse_frame_page(trailer, n, &bytes).map_err(|e| e.to_string()));
            match frames {
                Ok(frames) => self.frames.extend(frames.into_iter().map(Some)),
                Err(why) => {
                    self.builder = None;
                    self.frames.extend(std::iter::repeat_n(None, count));
                    let ranges = self.ranges_in(|frame| (first..first + count).contains(&frame));
                    let what = format!("page {n} of the frame directory: {why}");
                    self.flaw(place, what, ranges, last);
                }
            }
        }
    }

    /// Ranges whose newest version in this segment lies in such frames.
    fn ranges_in(&self, frames: impl Fn(usize) -> bool) -> ExtentSet {
        let held = |entry: &&IndexEntry| match entry.place {
            IndexPlace::Frame { frame, .. } => frames(frame as usize),
            IndexPlace::Zero | IndexPlace::Unknown => false,
        };
        self.run.iter().filter(held).filter_map(IndexEntry::extent).collect()
    }

    fn follows(&self, batch: &BatchPlace, checked: &CheckedBatch<'_>) -> Result<(), String> {
        let header = checked.header();
        let right = header.volume == self.segment.header.volume
            && (header.prev, header.prev_chain) == self.at
            && (header.last(), header.chain) == (batch.last(), batch.chain)
            && batch.place == self.place;
        if right { Ok(()) } else { Err("it does not follow the batch before it".to_owned()) }
    }

    fn good(
        &mut self,
        batch: &BatchPlace,
        checked: &CheckedBatch<'_>,
        seen: &mut dyn FnMut(Lsn, Extent),
    ) {
        let mut raw = Vec::new();
        // The chain was right: only a source that made it wrong can still be at fault.
        if let Err(why) = decode(checked, &mut raw) {
            let ranges = checked.records().filter_map(|r| payload(&r).map(|(e, _)| e)).collect();
            let from = Lsn::new(batch.epoch, batch.first_seq);
            self.flaw(batch.place, format!("batch: {why}"), ranges, from);
        } else {
            for record in checked.records() {
                let at = Lsn::new(batch.epoch, record.seq);
                content(&record).into_iter().for_each(|extent| seen(at, extent));
            }
        }
        self.frame_count += u64::from(checked.header().frame_count);
        if let Some(builder) = &mut self.builder {
            builder.push(checked, batch.place);
        }
    }

    /// Which parts of a bad batch are needed, and are bad.
    fn bad(&mut self, batch: &BatchPlace, bytes: &[u8], why: String) {
        self.builder = None;
        let first = Lsn::new(batch.epoch, batch.first_seq);
        let frames = batch.first_frame as usize..(batch.first_frame + batch.frame_count) as usize;
        let mut raw = Vec::new();
        let bad: Vec<usize> = frames
            .clone()
            .filter(|n| {
                let Some(frame) = self.frames.get(*n).copied().flatten() else { return false };
                let from = u64::from(frame.place).checked_sub(batch.place);
                let from = from.and_then(|from| usize::try_from(from).ok());
                let stored =
                    from.and_then(|from| bytes.get(from..)?.get(..frame.entry.stored_len as usize));
                stored.is_none_or(|stored| frame.entry.decode(stored, &mut raw).is_err())
            })
            .map(|n| n - frames.start)
            .collect();
        // A place within the segment is read by the tables of its batches.
        let shut = self.segment.upto(batch.last()).is_err();
        let shut = shut.then_some((first, self.segment.last));
        let (ranges, from) = match tables(batch, bytes).filter(|_| shut.is_none()) {
            Some(records) => {
                let in_bad = |raw: &Extent| {
                    let (from, to) = (raw.offset() / FRAME_RAW, raw.end().div_ceil(FRAME_RAW));
                    bad.iter().any(|n| (from..to).contains(&(*n as u64)))
                };
                let hit = records.iter().filter_map(payload);
                (hit.filter(|(_, raw)| in_bad(raw)).map(|(extent, _)| extent).collect(), first)
            }
            None => {
                let bad_here = |n: usize| frames.contains(&n) && bad.contains(&(n - frames.start));
                (self.ranges_in(bad_here), self.segment.last)
            }
        };
        let what = format!("batch: {why}");
        self.flaws.push(Flaw { place: batch.place, what, shut, ranges, from });
    }

    /// The footer has to say what the batches say.
    fn compare_footer(&mut self) {
        let Some(builder) = self.builder.take() else { return };
        let Index::Footer { trailer, .. } = &self.segment.index else { return };
        let place = trailer.footer_place();
        let same = |same: bool, part: &str| (!same).then(|| part.to_owned());
        let made = builder.finish().trailer;
        let parts = [
            same(made == *trailer, "the trailer"),
            same(builder.batches() == self.batches, "the directory of batches"),
            same(self.segment.events().is_ok_and(|e| builder.events() == e), "the events"),
            same(
                builder.frames().iter().copied().map(Some).eq(self.frames.iter().copied()),
                "the frame directory",
            ),
            same(builder.run().entries().eq(self.run.iter().copied()), "the run"),
        ];
        let wrong: Vec<String> = parts.into_iter().flatten().collect();
        if !wrong.is_empty() {
            let what = format!("{} does not say what the batches say", wrong.join(", "));
            let ranges = self.run.iter().filter_map(IndexEntry::extent).collect();
            self.flaw(place, what, ranges, self.segment.last);
        }
    }
}

/// Decodes every frame and compares every payload with the checksum made at capture.
fn decode(batch: &CheckedBatch<'_>, raw: &mut Vec<u8>) -> Result<(), BatchError> {
    batch.read_all(raw)?;
    for record in batch.records() {
        if let RecordBody::Write { extent, payload } | RecordBody::Copy { extent, payload } =
            record.body
        {
            let from = payload.raw_off as usize;
            let len = usize::try_from(extent.len()).unwrap_or(usize::MAX);
            let bytes = raw.get(from..).and_then(|rest| rest.get(..len));
            if bytes.map(crc32c::crc32c) != Some(payload.crc) {
                return Err(BatchError::Payload { seq: record.seq });
            }
        }
    }
    Ok(())
}

/// The records of a batch that fails its check.
fn tables(batch: &BatchPlace, bytes: &[u8]) -> Option<Vec<Record>> {
    let header = BatchHeader::parse(bytes).ok()?;
    let same = (header.last(), header.chain) == (batch.last(), batch.chain);
    if same { header.records_of(bytes).ok() } else { None }
}

/// The range of a record's payload, and where that lies in the raw stream.
fn payload(record: &Record) -> Option<(Extent, Extent)> {
    match record.body {
        RecordBody::Write { extent, payload } | RecordBody::Copy { extent, payload } => {
            let raw = Extent::new(u64::from(payload.raw_off), extent.len()).ok()?;
            Some((extent, raw))
        }
        _ => None,
    }
}

/// The range that a record gives new content.
fn content(record: &Record) -> Option<Extent> {
    match record.body {
        RecordBody::Write { extent, .. }
        | RecordBody::Copy { extent, .. }
        | RecordBody::Zero { extent, .. }
        | RecordBody::Unknown { extent } => Some(extent),
        RecordBody::Hash { .. }
        | RecordBody::Marker(_)
        | RecordBody::MarkerCommit(_)
        | RecordBody::MarkerAbort(_)
        | RecordBody::OrderLost
        | RecordBody::OrderRestored
        | RecordBody::Resize(_)
        | RecordBody::EpochStart(_) => None,
    }
}
