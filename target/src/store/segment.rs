//! A segment as views, apply and recovery read it: its file, what is known of it, its index.
//!
//! Never writes. A sealed segment keeps only its fences in memory, so that memory does not grow with
//! the number of points; directory, events and pages of its run are read when they are needed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farshore_changelog::{
    BatchFront, BatchHeader, BatchPlace, ENTRIES_PER_PAGE, FooterHead, FramePlace, IndexEntry,
    SegmentError, SegmentEvent, SegmentHeader, SegmentId, SegmentIndexBuilder, SegmentTrailer,
    parse_frame_page, parse_run_page,
};
use farshore_extent::{Chain, Lsn, VolumeSize, WallTime};

use super::cache::Cache;
use super::disk::{ALIGN, DiskFile};
use super::error::StoreError;
use super::runs::{Run, RunEntry};

/// Name of a segment's file.
pub(crate) fn file_name(id: SegmentId) -> String {
    format!("seg-{id}")
}

/// The number in the name of a segment's file.
pub(crate) fn id_in_name(name: &str) -> Option<SegmentId> {
    let digits = name.strip_prefix("seg-").filter(|d| d.len() == 16)?;
    u64::from_str_radix(digits, 16).ok().map(SegmentId::new)
}

/// Where the index of a segment is.
pub(crate) enum Index {
    /// In its footer, on disk.
    Footer { trailer: SegmentTrailer, fences: Vec<u64> },
    /// In memory: the open segment, or a part of one.
    Memory {
        batches: Vec<BatchPlace>,
        events: Vec<SegmentEvent>,
        frames: Vec<FramePlace>,
        run: Vec<IndexEntry>,
    },
}

/// A segment that can be read.
pub(crate) struct Segment {
    pub(crate) header: SegmentHeader,
    pub(crate) file: Arc<dyn DiskFile>,
    pub(crate) last: Lsn,
    pub(crate) size: VolumeSize,
    pub(crate) min_time: WallTime,
    pub(crate) index: Index,
}

impl Segment {
    /// What the trailer and footer of a sealed segment say.
    pub(crate) fn sealed(
        header: SegmentHeader,
        trailer: SegmentTrailer,
        fences: Vec<u64>,
        file: Arc<dyn DiskFile>,
    ) -> Self {
        Self {
            header,
            file,
            last: trailer.last,
            size: trailer.size,
            min_time: trailer.min_time,
            index: Index::Footer { trailer, fences },
        }
    }

    /// What was added to `builder` until now.
    pub(crate) fn in_memory(builder: &SegmentIndexBuilder, file: Arc<dyn DiskFile>) -> Self {
        let (min_time, _) = builder.times();
        Self {
            header: *builder.header(),
            file,
            last: builder.last(),
            size: builder.size(),
            min_time,
            index: Index::Memory {
                batches: builder.batches().to_vec(),
                events: builder.events().to_vec(),
                frames: builder.frames().to_vec(),
                run: builder.run().entries().collect(),
            },
        }
    }

    pub(crate) const fn id(&self) -> SegmentId {
        self.header.segment
    }

    /// The directory of batches; read from the footer when the segment is sealed.
    pub(crate) fn batches(&self) -> Result<Vec<BatchPlace>, StoreError> {
        match &self.index {
            Index::Memory { batches, .. } => Ok(batches.clone()),
            Index::Footer { trailer, .. } => {
                Ok(read_head(self.file.as_ref(), &self.header, trailer)?.batches)
            }
        }
    }

    /// Its events, in order; read from the footer when the segment is sealed.
    pub(crate) fn events(&self) -> Result<Vec<SegmentEvent>, StoreError> {
        match &self.index {
            Index::Memory { events, .. } => Ok(events.clone()),
            Index::Footer { trailer, .. } => {
                Ok(read_head(self.file.as_ref(), &self.header, trailer)?.events)
            }
        }
    }

    /// The place of the last record before `lsn`, which lies within this segment.
    pub(crate) fn record_before(&self, lsn: Lsn) -> Result<Lsn, StoreError> {
        let mut newest = self.header.prev;
        for batch in self.batches()? {
            if Lsn::new(batch.epoch, batch.first_seq) >= lsn {
                break;
            }
            if batch.last() < lsn {
                newest = batch.last();
                continue;
            }
            self.with_front(&batch, &mut Vec::new(), |front| {
                let places = front.records().map(|r| Lsn::new(batch.epoch, r.seq));
                newest = places.take_while(|at| *at < lsn).last().unwrap_or(newest);
            })?;
        }
        Ok(newest)
    }

    /// This segment as it was at `at`, a place within it: the tables of its batches are read up to
    /// there, the payload is not.
    pub(crate) fn upto(&self, at: Lsn) -> Result<Self, StoreError> {
        self.part(&self.header, at)
    }

    /// The part of it behind `after`, where the volume had `size`, and up to `at`.
    pub(crate) fn between(
        &self,
        after: Lsn,
        size: VolumeSize,
        at: Lsn,
    ) -> Result<Self, StoreError> {
        self.part(&SegmentHeader { prev: after, size, ..self.header }, at)
    }

    fn part(&self, header: &SegmentHeader, at: Lsn) -> Result<Self, StoreError> {
        let mut builder = SegmentIndexBuilder::new(*header);
        let mut bytes = Vec::new();
        for batch in self.batches()?.iter().filter(|batch| batch.last() > header.prev) {
            if Lsn::new(batch.epoch, batch.first_seq) > at {
                break;
            }
            let upto = if batch.last() <= at { batch.last_seq } else { at.seq };
            self.with_front(batch, &mut bytes, |front| {
                builder.push_part(front, batch.place, header.prev, upto);
            })?;
        }
        Ok(Self::in_memory(&builder, Arc::clone(&self.file)))
    }

    /// Reads header and tables of a batch and verifies them against its directory entry.
    pub(crate) fn with_front(
        &self,
        batch: &BatchPlace,
        bytes: &mut Vec<u8>,
        with: impl FnOnce(&BatchFront<'_>),
    ) -> Result<(), StoreError> {
        let damaged = |source| StoreError::Batch { segment: self.id(), place: batch.place, source };
        bytes.resize(ALIGN.min(batch.len as usize), 0);
        self.read(bytes, batch.place)?;
        let front = BatchHeader::parse(bytes).map_err(damaged)?.payload_offset();
        // The rest of what is longer than a block.
        let have = bytes.len();
        bytes.resize(front.clamp(have, (batch.len as usize).max(have)), 0);
        self.read(&mut bytes[have..], batch.place + have as u64)?;
        let front = BatchFront::parse(bytes, batch.front_crc).map_err(damaged)?;
        if front.header().chain != batch.chain {
            return Err(damaged(farshore_changelog::BatchError::Chain));
        }
        with(&front);
        Ok(())
    }

    /// The last record of a batch, in order, that `wanted` accepts.
    pub(crate) fn last_record(
        &self,
        batch: &BatchPlace,
        wanted: impl Fn(WallTime, Lsn) -> bool,
    ) -> Result<Option<(Lsn, WallTime)>, StoreError> {
        let mut found = None;
        self.with_front(batch, &mut Vec::new(), |front| {
            let records = front.records().map(|r| (Lsn::new(batch.epoch, r.seq), r.time));
            found = records.filter(|(lsn, time)| wanted(*time, *lsn)).last();
        })?;
        Ok(found)
    }

    pub(crate) fn read(&self, buf: &mut [u8], at: u64) -> Result<(), StoreError> {
        let what = || format!("reading {} at {at}", file_name(self.id()));
        self.file.read_at(buf, at).map_err(|e| StoreError::io(what(), e))
    }

    /// Appends the entries that overlap `[from, to)` sectors to `out`, by address, not clipped.
    pub(crate) fn lookup(
        &self,
        from: u64,
        to: u64,
        pages: &Pages,
        out: &mut Vec<IndexEntry>,
    ) -> Result<(), StoreError> {
        let take = |run: &[IndexEntry], out: &mut Vec<IndexEntry>| {
            let first = run.partition_point(|e| e.end() <= from);
            out.extend(run[first..].iter().take_while(|e| e.sector < to));
        };
        match &self.index {
            Index::Memory { run, .. } => take(run, out),
            Index::Footer { trailer, fences } => {
                let first = fences.partition_point(|f| *f <= from).saturating_sub(1);
                for (n, fence) in fences.iter().enumerate().skip(first) {
                    if *fence >= to {
                        break;
                    }
                    take(&pages.run(self, trailer, n)?, out);
                }
            }
        }
        Ok(())
    }

    /// Chain at its last place.
    pub(crate) fn chain(&self) -> Chain {
        match &self.index {
            Index::Footer { trailer, .. } => trailer.chain,
            Index::Memory { batches, .. } => {
                batches.last().map_or(self.header.prev_chain, |batch| batch.chain)
            }
        }
    }

    /// Pages of its run.
    pub(crate) const fn run_pages(&self) -> usize {
        match &self.index {
            Index::Footer { trailer, .. } => trailer.run_pages(),
            Index::Memory { .. } => 1,
        }
    }

    /// The entries of page `n` of its run.
    pub(crate) fn run_page(&self, n: usize) -> Result<Vec<IndexEntry>, StoreError> {
        match &self.index {
            Index::Memory { run, .. } => Ok(run.clone()),
            Index::Footer { trailer, .. } => {
                let place = trailer.run_page_place(n);
                self.read_page(place, |bytes| parse_run_page(trailer, n, bytes))
            }
        }
    }

    fn read_page<T>(
        &self,
        place: u64,
        parse: impl FnOnce(&[u8]) -> Result<T, SegmentError>,
    ) -> Result<T, StoreError> {
        let mut bytes = vec![0; ALIGN];
        self.read(&mut bytes, place)?;
        parse(&bytes).map_err(|source| StoreError::Segment { segment: self.id(), source })
    }

    /// Where frame `ordinal` lies.
    pub(crate) fn frame(
        &self,
        ordinal: u32,
        pages: &Pages,
    ) -> Result<Option<FramePlace>, StoreError> {
        let ordinal = ordinal as usize;
        match &self.index {
            Index::Memory { frames, .. } => Ok(frames.get(ordinal).copied()),
            Index::Footer { trailer, .. } => {
                let page = pages.frames(self, trailer, ordinal / ENTRIES_PER_PAGE)?;
                Ok(page.get(ordinal % ENTRIES_PER_PAGE).copied())
            }
        }
    }
}

/// Reads and parses the head of a footer.
pub(crate) fn read_head(
    file: &dyn DiskFile,
    header: &SegmentHeader,
    trailer: &SegmentTrailer,
) -> Result<FooterHead, StoreError> {
    let mut bytes = vec![0; trailer.head_pages() * ALIGN];
    let what = || format!("reading footer of {}", file_name(header.segment));
    file.read_at(&mut bytes, trailer.footer_place()).map_err(|e| StoreError::io(what(), e))?;
    FooterHead::parse(trailer, &bytes)
        .map_err(|source| StoreError::Segment { segment: header.segment, source })
}

/// Index pages read so far, bounded; shared by all threads of a view.
pub(crate) struct Pages {
    run: PageCache<SegmentId, IndexEntry>,
    frames: PageCache<SegmentId, FramePlace>,
    merged: PageCache<(u8, SegmentId), RunEntry>,
}

impl Pages {
    pub(crate) const fn new(capacity: usize) -> Self {
        Self {
            run: Mutex::new(Cache::new(capacity)),
            frames: Mutex::new(Cache::new(capacity)),
            merged: Mutex::new(Cache::new(capacity)),
        }
    }

    fn run(
        &self,
        segment: &Segment,
        trailer: &SegmentTrailer,
        n: usize,
    ) -> Result<Arc<Vec<IndexEntry>>, StoreError> {
        let place = trailer.run_page_place(n);
        page(&self.run, segment.id(), n, || {
            segment.read_page(place, |bytes| parse_run_page(trailer, n, bytes))
        })
    }

    fn frames(
        &self,
        segment: &Segment,
        trailer: &SegmentTrailer,
        n: usize,
    ) -> Result<Arc<Vec<FramePlace>>, StoreError> {
        let place = trailer.frame_page_place(n);
        page(&self.frames, segment.id(), n, || {
            segment.read_page(place, |bytes| parse_frame_page(trailer, n, bytes))
        })
    }

    /// Page `n` of a run over several segments.
    pub(crate) fn merged(&self, run: &Run, n: usize) -> Result<Arc<Vec<RunEntry>>, StoreError> {
        page(&self.merged, (run.header.level, run.header.first), n, || run.page(n))
    }
}

type PageCache<F, T> = Mutex<Cache<(F, usize), Arc<Vec<T>>>>;

fn page<F: Ord + Copy, T>(
    cache: &PageCache<F, T>,
    file: F,
    n: usize,
    read: impl FnOnce() -> Result<Vec<T>, StoreError>,
) -> Result<Arc<Vec<T>>, StoreError> {
    if let Some(hit) = guard(cache).get(&(file, n)) {
        return Ok(hit);
    }
    // Read outside of the lock: another thread may read the same page, which is harmless.
    let parsed = Arc::new(read()?);
    guard(cache).put((file, n), Arc::clone(&parsed));
    Ok(parsed)
}

/// A cache stays usable when a thread died while it held it: every value in it is whole.
pub(crate) fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
