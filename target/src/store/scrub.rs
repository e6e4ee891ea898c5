//! A scrub: every sealed segment and the base are read once and verified, in bounded steps.
//!
//! Finds what nobody would read for weeks while it can still be sent again. Changes nothing.

use std::sync::Arc;

use farshore_changelog::SegmentId;
use farshore_extent::{Extent, ExtentSet, Lsn};

use super::Store;
use super::base::join_if_many;
use super::error::{ReadError, StoreError};
use super::segment::{Segment, file_name};
use super::verify::{Flaw, SegmentCheck};
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
    /// Ranges of the volume that cannot be read from there on, until they are written again.
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
    /// The segment being read.
    check: Option<SegmentCheck>,
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
            let next = |s: &&Arc<Segment>| pass.done.is_none_or(|done| s.id() > done);
            let check = pass.check.take();
            let begin = || self.segments.iter().find(next).cloned().map(SegmentCheck::new);
            match check.or_else(begin) {
                Some(check) => self.scrub_segment(check, &mut pass, &mut out),
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

    /// One more batch of a segment.
    fn scrub_segment(&self, mut check: SegmentCheck, pass: &mut Pass, out: &mut Scrubbed) {
        let id = check.id();
        // Expired meanwhile?
        let kept = self.segments.binary_search_by_key(&id, |s| s.id()).is_ok();
        let more = kept && check.step(&mut |_, _| {});
        out.read += check.take_read();
        let flaws = check.take_flaws().into_iter().filter(|_| kept);
        out.findings.extend(flaws.map(|flaw| self.finding(id, flaw)));
        if more {
            pass.check = Some(check);
        } else {
            pass.done = Some(id);
        }
    }

    fn finding(&self, id: SegmentId, flaw: Flaw) -> ScrubFinding {
        let Flaw { place, what, shut, ranges, from } = flaw;
        let mut what = format!("{} is damaged at {place}: {what}", file_name(id));
        if let Some((first, end)) = shut {
            what += &format!("; no place from {first} to before {end} can be opened");
        }
        let extents = ranges.inside(self.position().size.extent()).collect();
        ScrubFinding { what, extents, from: shut.map_or(from, |(first, _)| first) }
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
