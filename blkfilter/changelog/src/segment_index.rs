//! Builds the footer of a segment while batches are added to it.
//!
//! Owns what the store keeps in memory of its open segment. Moves no watermark: batches are added
//! after they are durable.

use farshore_extent::{CaptureOrder, Chain, Extent, Lsn, SECTOR, Seq, VolumeSize, WallTime};

use crate::batch::{BatchFront, CheckedBatch};
use crate::layout::{RECORD_LEN, batch_place, event};
use crate::limits::{FRAME_RAW, SEGMENT_ALIGN};
use crate::record::{PayloadRef, RecordBody};
use crate::run::{IndexPlace, RunMap};
use crate::segment::{SegmentHeader, SegmentTrailer, order_after};
use crate::segment_footer::{
    BatchPlace, ENTRIES_PER_PAGE, FramePlace, PAGE_PAYLOAD, SegmentEvent, encode_pages,
};

/// A footer ready to be written.
#[derive(Debug, Clone)]
pub struct EncodedFooter {
    /// What the last block of the file must say once the pages are durable.
    pub trailer: SegmentTrailer,
    /// The pages, for [`SegmentTrailer::footer_place`].
    pub pages: Vec<u8>,
}

/// Gathers what the footer of one segment will say.
#[derive(Debug, Clone)]
pub struct SegmentIndexBuilder {
    header: SegmentHeader,
    batches: Vec<BatchPlace>,
    events: Vec<SegmentEvent>,
    event_aux: usize,
    frames: Vec<FramePlace>,
    run: RunMap<IndexPlace>,
    order: CaptureOrder,
    size: VolumeSize,
    times: Option<(WallTime, WallTime)>,
    raw_bytes: u64,
    stored_bytes: u64,
}

impl SegmentIndexBuilder {
    /// For the segment that begins with `header`.
    #[must_use]
    pub const fn new(header: SegmentHeader) -> Self {
        Self {
            header,
            batches: Vec::new(),
            events: Vec::new(),
            event_aux: 0,
            frames: Vec::new(),
            run: RunMap::new(),
            order: header.order,
            size: header.size,
            times: None,
            raw_bytes: 0,
            stored_bytes: 0,
        }
    }

    /// Adds the batch that lies at `place` (a multiple of 4096) of the file.
    pub fn push(&mut self, batch: &CheckedBatch<'_>, place: u64) {
        self.push_part(&batch.front(), place, Lsn::ZERO, batch.header().last_seq);
    }

    /// Adds the records of the batch behind `after`, up to and including number `upto`: for places
    /// that lie within the batch. No footer can be made of it then.
    pub fn push_part(&mut self, batch: &BatchFront<'_>, place: u64, after: Lsn, upto: Seq) {
        let header = batch.header();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let first_frame = count(self.frames.len());
        for (entry, at) in batch.frames() {
            // A segment is at most 1 GiB, so places fit 32 bits.
            let place = u32::try_from(place + at as u64).unwrap_or(u32::MAX);
            self.frames.push(FramePlace { place, entry });
        }
        let mut last_time = header.first_time;
        let wanted = |seq| Lsn::new(header.epoch, seq) > after && seq <= upto;
        for record in batch.records().filter(|r| wanted(r.seq)) {
            last_time = record.time;
            self.note_time(record.time);
            match &record.body {
                RecordBody::Write { extent, payload } | RecordBody::Copy { extent, payload } => {
                    self.add_data(first_frame, *extent, *payload);
                }
                RecordBody::Zero { extent, .. } => self.add(*extent, IndexPlace::Zero),
                RecordBody::Unknown { extent } => self.add(*extent, IndexPlace::Unknown),
                RecordBody::Resize(size) => self.resize(*size),
                RecordBody::EpochStart(start) => self.resize(start.size),
                RecordBody::Hash { .. }
                | RecordBody::Marker(_)
                | RecordBody::MarkerCommit(_)
                | RecordBody::MarkerAbort(_)
                | RecordBody::OrderLost
                | RecordBody::OrderRestored => {}
            }
            self.order = order_after(self.order, &record.body);
            if SegmentEvent::is_event(&record.body) {
                let (mut table, mut aux) = (Vec::with_capacity(RECORD_LEN), Vec::new());
                record.encode(&mut table, &mut aux);
                self.event_aux += aux.len();
                self.events.push(SegmentEvent { epoch: header.epoch, record });
            }
        }
        self.raw_bytes += u64::from(header.raw_len);
        self.stored_bytes += u64::from(header.stored_len);
        self.batches.push(BatchPlace {
            place,
            len: count(header.total_len()),
            epoch: header.epoch,
            first_seq: header.first_seq,
            last_seq: header.last_seq.min(upto),
            first_time: header.first_time,
            last_time,
            chain: header.chain,
            first_frame,
            frame_count: header.frame_count,
            front_crc: batch.crc(),
        });
    }

    fn add(&mut self, extent: Extent, place: IndexPlace) {
        self.run.insert(extent.offset() / SECTOR, extent.len() / SECTOR, place);
    }

    fn add_data(&mut self, first_frame: u32, extent: Extent, payload: PayloadRef) {
        let frame_raw = FRAME_RAW as u64;
        let raw = u64::from(payload.raw_off);
        let Some(whole) = Extent::between(raw, raw + extent.len()) else { return };
        for piece in whole.split_at_multiples_of(frame_raw) {
            let frame = u32::try_from(piece.offset() / frame_raw).unwrap_or(u32::MAX);
            let within = piece.offset() % frame_raw / SECTOR;
            let place = IndexPlace::Frame {
                frame: first_frame.saturating_add(frame),
                sector: u8::try_from(within).unwrap_or(u8::MAX),
            };
            let offset = extent.offset() + (piece.offset() - raw);
            self.run.insert(offset / SECTOR, piece.len() / SECTOR, place);
        }
    }

    /// What a shrunken volume loses reads as zeroes when it grows again.
    fn resize(&mut self, size: VolumeSize) {
        if let Some(lost) = Extent::between(size.get(), self.size.get()) {
            self.add(lost, IndexPlace::Zero);
        }
        self.size = size;
    }

    fn note_time(&mut self, time: WallTime) {
        let (min, max) = self.times.unwrap_or((time, time));
        self.times = Some((min.min(time), max.max(time)));
    }

    /// The header it was made for.
    #[must_use]
    pub const fn header(&self) -> &SegmentHeader {
        &self.header
    }

    /// Batches added, in order.
    #[must_use]
    pub fn batches(&self) -> &[BatchPlace] {
        &self.batches
    }

    /// Events found, in order.
    #[must_use]
    pub fn events(&self) -> &[SegmentEvent] {
        &self.events
    }

    /// Frames, by ordinal.
    #[must_use]
    pub fn frames(&self) -> &[FramePlace] {
        &self.frames
    }

    /// Newest version of every range.
    #[must_use]
    pub const fn run(&self) -> &RunMap<IndexPlace> {
        &self.run
    }

    /// Last place added.
    #[must_use]
    pub fn last(&self) -> Lsn {
        self.batches.last().map_or(self.header.prev, BatchPlace::last)
    }

    /// Chain there.
    #[must_use]
    pub fn chain(&self) -> Chain {
        self.batches.last().map_or(self.header.prev_chain, |b| b.chain)
    }

    /// Order there.
    #[must_use]
    pub const fn order(&self) -> CaptureOrder {
        self.order
    }

    /// Size of the volume there.
    #[must_use]
    pub const fn size(&self) -> VolumeSize {
        self.size
    }

    /// Earliest and latest capture time; `created` of the header when there is no batch.
    #[must_use]
    pub fn times(&self) -> (WallTime, WallTime) {
        self.times.unwrap_or((self.header.created, self.header.created))
    }

    /// First place behind the last batch, a multiple of 4096.
    #[must_use]
    pub fn end(&self) -> u64 {
        let align = SEGMENT_ALIGN as u64;
        self.batches.last().map_or(align, |b| (b.place + u64::from(b.len)).next_multiple_of(align))
    }

    /// Most bytes that footer and trailer can take once `more` further batches with these headers
    /// are added.
    pub fn footer_bound<'a>(
        &self,
        more: impl Iterator<Item = &'a crate::batch::BatchHeader>,
    ) -> usize {
        let (mut batches, mut frames) = (self.batches.len(), self.frames.len());
        let (mut extents, mut events) = (self.run.len(), self.events.len());
        let mut aux = self.event_aux;
        for header in more {
            let records = header.record_count as usize;
            batches += 1;
            frames += header.frame_count as usize;
            // A record splits at most one older range and is itself cut by frame borders.
            extents += 2 * records + header.frame_count as usize;
            events += records;
            aux += header.aux_len as usize;
        }
        // A resize can make one zero range of any length; ranges divide every 8 GiB.
        let divided = usize::try_from(self.size.get() >> 33).unwrap_or(usize::MAX);
        extents = extents.saturating_add(divided);
        let run_pages = extents.div_ceil(ENTRIES_PER_PAGE);
        let head = batches * batch_place::END + events * event::END + aux + run_pages * 8;
        let pages = head.div_ceil(PAGE_PAYLOAD) + frames.div_ceil(ENTRIES_PER_PAGE) + run_pages;
        (pages + 1).saturating_mul(SEGMENT_ALIGN)
    }

    /// The footer of what was added so far, for the first free place of the file.
    #[must_use]
    pub fn finish(&self) -> EncodedFooter {
        let (mut run, mut fences, mut extents) = (Vec::new(), Vec::new(), 0usize);
        for entry in self.run.entries() {
            if extents.is_multiple_of(ENTRIES_PER_PAGE) {
                fences.extend_from_slice(&entry.sector.to_le_bytes());
            }
            run.extend_from_slice(&entry.to_bytes());
            extents += 1;
        }
        let frames: Vec<u8> = self.frames.iter().flat_map(|f| f.to_bytes()).collect();
        let (mut head, mut aux) = (Vec::new(), Vec::new());
        self.batches.iter().for_each(|b| b.push_to(&mut head));
        for event in &self.events {
            head.extend_from_slice(&event.epoch.get().to_le_bytes());
            event.record.encode(&mut head, &mut aux);
        }
        head.extend_from_slice(&aux);
        head.extend_from_slice(&fences);
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let (min_time, max_time) = self.times();
        let trailer = SegmentTrailer {
            volume: self.header.volume,
            segment: self.header.segment,
            header_crc: self.header.crc(),
            footer_block: u32::try_from(self.end() / SEGMENT_ALIGN as u64).unwrap_or(u32::MAX),
            last: self.last(),
            chain: self.chain(),
            min_time,
            max_time,
            batch_count: count(self.batches.len()),
            event_count: count(self.events.len()),
            event_aux_len: count(aux.len()),
            frame_count: count(self.frames.len()),
            extent_count: count(extents),
            order: self.order,
            raw_bytes: self.raw_bytes,
            stored_bytes: self.stored_bytes,
            size: self.size,
        };
        EncodedFooter { trailer, pages: encode_pages(self.header.segment, &head, &frames, &run) }
    }
}
