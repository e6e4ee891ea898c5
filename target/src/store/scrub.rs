//! A scrub: every sealed segment and the base are read once and verified, in bounded steps.
//!
//! Finds what nobody would read for weeks while it can still be sent again. Changes nothing.

use farshore_changelog::{BatchError, BatchPlace, IndexPlace, RawBatch, SegmentId};
use farshore_extent::{Extent, ExtentSet, Lsn};

use super::Store;
use super::base::join_if_many;
use super::error::{ReadError, StoreError};
use super::segment::{Pages, Segment, file_name};
use super::view::{PointReader, Source};

/// Read of the base at once, in bytes.
const PIECE: u64 = 256 << 10;

/// Larger ranges are not read to find out which part of them the newest state lacks.
const MOST_READ: u64 = 16 << 20;

/// Something that a scrub could not read, or that is not what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScrubFinding {
    /// File, place in it, and what is wrong.
    pub what: String,
    /// Ranges of the volume whose newest version up to the end of the file lies there; all of the
    /// volume when that cannot be told.
    pub extents: Vec<Extent>,
    /// First place that may need it; places before are not affected.
    pub from: Lsn,
}

/// How far a scrub came in one call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Bytes read.
    pub read: u64,
    /// The pass is over.
    pub done: bool,
    /// It waits for the end of a merge.
    pub waits: bool,
    /// What is wrong with the journal, or cannot be read.
    pub findings: Vec<ScrubFinding>,
    /// Pieces of the base, 256 KiB at most, with rot; [`Store::take_rot`] says where.
    pub rotten: u64,
}

/// A pass under way.
#[derive(Default)]
pub(super) struct Pass {
    /// The segment being read, and its batches that are not read yet, the last one first.
    segment: Option<(SegmentId, Vec<BatchPlace>)>,
    /// Segments up to here are done.
    done: Option<SegmentId>,
    /// The base is verified up to here.
    base: u64,
    /// Bytes verified.
    read: u64,
}

impl Store {
    /// Bytes that the pass under way has verified.
    #[must_use]
    pub fn scrubbing(&self) -> Option<u64> {
        self.pass.as_ref().map(|pass| pass.read)
    }

    /// Goes on with the pass under way, or begins one, reading about `bytes`.
    ///
    /// # Errors
    /// [`StoreError::Poisoned`]; what cannot be read is a finding.
    pub fn scrub(&mut self, bytes: u64) -> Result<Scrubbed, StoreError> {
        self.check_alive()?;
        let mut pass = self.pass.take().unwrap_or_default();
        let mut out = Scrubbed::default();
        while out.read < bytes && !out.done && !out.waits {
            match self.next_segment_to_scrub(&mut pass, &mut out) {
                Some(id) => self.scrub_segment(id, &mut pass, &mut out),
                None => self.scrub_base(&mut pass, &mut out),
            }
        }
        pass.read += out.read;
        if !out.findings.is_empty() {
            self.count_as_rotten(&out.findings);
        }
        if !out.done {
            self.pass = Some(pass);
        }
        Ok(out)
    }

    /// The segment that is being read, or the next one that is not written any more.
    fn next_segment_to_scrub(&self, pass: &mut Pass, out: &mut Scrubbed) -> Option<SegmentId> {
        if let Some((id, _)) = &pass.segment {
            return Some(*id);
        }
        let next = self.segments.iter().find(|s| pass.done.is_none_or(|done| s.id() > done))?;
        let batches = next.batches().map(|mut batches| {
            batches.reverse();
            batches
        });
        let batches = batches.and_then(|batches| verify_index(next, &batches).map(|()| batches));
        let batches = batches.unwrap_or_else(|why| {
            let all = self.position().size.extent();
            out.findings.push(ScrubFinding {
                what: format!("the index of {} is damaged: {why}", file_name(next.id())),
                extents: vec![all],
                from: next.header.prev,
            });
            Vec::new()
        });
        pass.segment = Some((next.id(), batches));
        Some(next.id())
    }

    fn scrub_segment(&self, id: SegmentId, pass: &mut Pass, out: &mut Scrubbed) {
        let segment = self.segments.iter().find(|s| s.id() == id);
        let batch = pass.segment.as_mut().and_then(|(_, left)| left.pop());
        // Expired meanwhile, or all read.
        let Some((segment, batch)) = segment.zip(batch) else {
            (pass.segment, pass.done) = (None, Some(id));
            return;
        };
        out.read += u64::from(batch.len);
        if let Err(why) = verify_batch(segment, &batch) {
            out.findings.push(ScrubFinding {
                what: format!("{} is damaged at {}: {why}", file_name(id), batch.place),
                extents: extents_of(segment, &batch),
                from: Lsn::new(batch.epoch, batch.first_seq),
            });
        }
    }

    fn scrub_base(&self, pass: &mut Pass, out: &mut Scrubbed) {
        // Until a merge has ended, parts of the base are of no place that can be told.
        if self.expiry.is_some() || self.sb.floor > self.sb.base {
            out.waits = true;
            return;
        }
        let summed = self.sb.summed;
        let Some(rest) = Extent::between(pass.base, self.sb.size.get().min(summed)) else {
            out.done = true;
            return;
        };
        // A hole whose checksums say so too has nothing to read.
        let hole = self.base.stretch(rest, summed).ok().filter(|found| found.hole);
        let end = hole.map_or(rest.end().min(rest.offset() + PIECE), |hole| hole.end);
        if let Some(extent) = Extent::between(rest.offset(), end).filter(|_| hole.is_none()) {
            out.read += extent.len();
            self.verify_base(extent, out);
        }
        pass.base = end;
    }

    fn verify_base(&self, extent: Extent, out: &mut Scrubbed) {
        let mut known: ExtentSet = [extent].into_iter().collect();
        self.sb.unknown.inside(extent).for_each(|unknown| known.remove(unknown));
        for part in known.iter() {
            let mut bytes = vec![0; usize::try_from(part.len()).unwrap_or_default()];
            match self.base.read(&mut bytes, part.offset(), self.sb.summed) {
                Ok(()) => {}
                Err(ReadError::Base { .. }) => out.rotten += 1,
                Err(why) => out.findings.push(ScrubFinding {
                    what: format!("base.img cannot be read at {part}: {why}"),
                    extents: vec![part],
                    from: self.sb.base,
                }),
            }
        }
    }

    /// What the newest state needs of it is to be sent again.
    fn count_as_rotten(&mut self, findings: &[ScrubFinding]) {
        let newest = self.reader(self.durable, None);
        let lost = |extent: &Extent| match &newest {
            Ok(view) if extent.len() <= MOST_READ => unreadable(view, *extent),
            Ok(_) | Err(_) => vec![*extent],
        };
        let extents = findings.iter().flat_map(|finding| &finding.extents);
        let lost: ExtentSet = extents.flat_map(lost).collect();
        let rotten = self.comparer.rotten_mut();
        lost.iter().for_each(|extent| rotten.insert(extent));
        join_if_many(rotten);
    }
}

/// Every byte of a batch, and that it is the one that the directory means.
fn verify_batch(segment: &Segment, batch: &BatchPlace) -> Result<(), StoreError> {
    let damaged = |source| StoreError::Batch { segment: segment.id(), place: batch.place, source };
    let mut bytes = vec![0; batch.len as usize];
    segment.read(&mut bytes, batch.place)?;
    let checked = RawBatch::parse(&bytes).and_then(RawBatch::check).map_err(damaged)?;
    if checked.header().chain == batch.chain { Ok(()) } else { Err(damaged(BatchError::Chain)) }
}

/// The pages of the index and of the directory of frames have checksums of their own.
fn verify_index(segment: &Segment, batches: &[BatchPlace]) -> Result<(), StoreError> {
    let pages = Pages::new(1);
    segment.lookup(0, u64::MAX, &pages, &mut Vec::new())?;
    let mut frames = batches.iter().flat_map(frames_of);
    frames.try_for_each(|frame| segment.frame(frame, &pages).map(drop))
}

fn frames_of(batch: &BatchPlace) -> std::ops::Range<u32> {
    batch.first_frame..batch.first_frame.saturating_add(batch.frame_count)
}

/// The parts of `extent` that are known and cannot be read.
fn unreadable(view: &PointReader, extent: Extent) -> Vec<Extent> {
    let Some(inside) = extent.intersection(view.size().extent()) else { return Vec::new() };
    let Ok(pieces) = view.resolve(inside) else { return vec![inside] };
    let known = pieces.into_iter().filter(|(_, source)| *source != Source::Unknown);
    let lost = known.filter(|(piece, _)| {
        let mut bytes = vec![0; usize::try_from(piece.len()).unwrap_or_default()];
        view.read_at(&mut bytes, piece.offset()).is_err()
    });
    lost.map(|(piece, _)| piece).collect()
}

/// Ranges whose newest version within the segment lies in this batch.
fn extents_of(segment: &Segment, batch: &BatchPlace) -> Vec<Extent> {
    let mut entries = Vec::new();
    if segment.lookup(0, u64::MAX, &Pages::new(1), &mut entries).is_err() {
        return vec![segment.size.extent()];
    }
    let frames = frames_of(batch);
    let here = entries.iter().filter(|entry| match entry.place {
        IndexPlace::Frame { frame, .. } => frames.contains(&frame),
        IndexPlace::Zero | IndexPlace::Unknown => false,
    });
    let all: ExtentSet = here.filter_map(|entry| entry.extent()).collect();
    all.iter().collect()
}
