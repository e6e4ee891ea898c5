//! Coarser history in less room, for a spool that is nearly full.
//!
//! A *group* of neighbouring segments keeps one point, its last. Of what was written before that
//! point only the newest content of each place stays, between `OrderLost` and `OrderRestored`: the
//! target offers nothing in between and has the same bytes at the point. Groups of two segments come
//! first, the oldest first; then those of four, and so on, each aligned to its size.
//!
//! The segments of a group are rewritten one by one from the newest to the oldest, each put in the
//! place of the old one as a whole. `OrderRestored` is in place before anything is dropped for its
//! sake, and the stretch grows backwards: after each step the spool is a true history.
//!
//! Every record that stays keeps its number. Nothing that may have been sent is touched, and
//! nothing in front of a record that says more than content: a named point, a digest, a new size.

use std::io;

use farshore_changelog::{Marker, MarkerState, Record, RecordBody, SegmentId};
use farshore_extent::{Epoch, Extent, ExtentSet, GroupId, PointKind, WallTime};

use super::rewrite::{Rewrite, TEMPORARY, room_for};
use super::{ALIGN, Cursor, ReadError, Segment, Spool, SpoolDisk, SpoolFaults};

/// Groups of `2^12` segments are 256 GiB.
const MAX_LEVEL: u8 = 12;

/// A group must lose at least this part of its content to be worth the writing.
const WORTH: u64 = 8;

/// Most extents that are remembered as written again, and most records of a segment that stay:
/// about 16 MiB of memory together. What has more is left as it is.
const MAX_EXTENTS: usize = 1 << 18;

/// Extents are cut at multiples of this many bytes from the begin of their record: pieces that were
/// looked through for zeroes stay the same pieces, so a number never gets more records.
const CUT: u64 = 4096;

/// What was merged since the spool was empty or opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Merged {
    /// Points that are not offered any more.
    pub points: u64,
    /// Capture time of the oldest change in a merged stretch.
    pub from: WallTime,
    /// Time of the point behind the newest merged stretch.
    pub to: WallTime,
}

/// Place of a record in its segment: which batch, which record.
pub(super) type At = (u32, u32);

/// What becomes of one segment.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// First record of the merged stretch.
    from: At,
    /// The point that is kept, if it lies here: the stretch ends before it.
    pub(super) point: Option<At>,
    /// Some of the segment is in the stretch.
    covered: bool,
    /// Records of the stretch that stay, and what of each; descending while it is being made.
    pub(super) stay: Vec<(At, Extent)>,
    /// Something is dropped or no longer offered.
    changed: bool,
    points: u64,
    times: Option<(WallTime, WallTime)>,
    dropped: u64,
    total: u64,
}

impl Plan {
    /// Whether a record is in the merged stretch.
    pub(super) fn covers(&self, at: At) -> bool {
        self.covered && at >= self.from && self.point.is_none_or(|point| at < point)
    }
}

/// What is written again later, up to the point that is kept. None until that is found.
#[derive(Debug, Default)]
struct Sweep {
    cover: Option<Cover>,
    faults: SpoolFaults,
    /// Planted fault: what is written after the point.
    beyond: ExtentSet,
}

#[derive(Debug)]
struct Cover {
    set: ExtentSet,
    epoch: Epoch,
    until: WallTime,
}

impl Sweep {
    /// Takes the record before those taken so far. False at one that must stay as it is, with
    /// everything in front of it.
    fn take(&mut self, (epoch, at): (Epoch, At), record: &Record, plan: &mut Plan) -> bool {
        let Some(cover) = &mut self.cover else {
            if let (true, Some(extent)) = (self.faults.merged_beyond_point, record.body.extent()) {
                self.beyond.insert(extent);
            }
            // filterd cuts markers in ordered stretches only.
            if matches!(&record.body, RecordBody::Marker(m) if m.state == MarkerState::Committed) {
                let set = std::mem::take(&mut self.beyond);
                self.cover = Some(Cover { set, epoch, until: record.time });
                plan.point = Some(at);
            }
            return true;
        };
        if cover.epoch != epoch {
            return false;
        }
        match &record.body {
            RecordBody::Write { extent, .. }
            | RecordBody::Copy { extent, .. }
            | RecordBody::Zero { extent, .. }
            | RecordBody::Unknown { extent } => {
                let left = rest(*extent, &cover.set);
                plan.stay.extend(left.map(|extent| (at, extent)));
                cover.set.insert(*extent);
                plan.changed |= left != Some(*extent);
                if record.body.payload().is_some() {
                    plan.total += extent.len();
                    plan.dropped += extent.len() - left.map_or(0, Extent::len);
                }
            }
            RecordBody::Marker(marker) if is_automatic(marker) => {
                plan.points += 1;
                plan.changed = true;
            }
            RecordBody::OrderLost | RecordBody::OrderRestored => plan.changed = true,
            RecordBody::Marker(_)
            | RecordBody::MarkerCommit(_)
            | RecordBody::MarkerAbort(_)
            | RecordBody::Hash { .. }
            | RecordBody::Resize(_)
            | RecordBody::EpochStart(_) => return false,
        }
        let (_, to) = plan.times.unwrap_or((record.time, cover.until));
        plan.times = Some((record.time, to));
        plan.covered = true;
        true
    }

    fn is_too_large(&self, plan: &Plan) -> bool {
        plan.stay.len() > MAX_EXTENTS
            || self.cover.as_ref().is_some_and(|c| c.set.extents() > MAX_EXTENTS)
    }
}

/// Cut by the policy: nobody asked for this very point.
fn is_automatic(marker: &Marker) -> bool {
    marker.kind == PointKind::Crash
        && marker.state == MarkerState::Committed
        && marker.group == GroupId::NIL
        && marker.name.is_empty()
}

/// The smallest extent with everything of `extent` that is not in `set`.
fn rest(extent: Extent, set: &ExtentSet) -> Option<Extent> {
    let (mut start, mut end) = (extent.offset(), extent.end());
    let (mut first, mut last) = (None, None);
    for covered in set.inside(extent) {
        first.get_or_insert(covered);
        last = Some(covered);
    }
    if let Some(covered) = first.filter(|c| c.offset() == start) {
        start += covered.len() / CUT * CUT;
        if covered.end() == end {
            return None;
        }
    }
    if let Some(covered) = last.filter(|c| c.end() == end) {
        let kept = (covered.offset() - extent.offset()).next_multiple_of(CUT);
        end = end.min(extent.offset() + kept);
    }
    Extent::between(start, end)
}

/// A group being merged.
#[derive(Debug)]
pub(super) struct Merge {
    /// Oldest first.
    group: Vec<SegmentId>,
    level: u8,
    /// Everything is looked through once, to see whether it is worth it.
    worth: bool,
    dropped: u64,
    total: u64,
    /// How many of the group are still to be looked at.
    left: usize,
    sweep: Sweep,
    planning: Option<Planning>,
    rewrite: Option<Rewrite>,
}

/// A segment that is being looked through, from its last batch to its first.
#[derive(Debug)]
struct Planning {
    batches: Vec<Cursor>,
    left: usize,
    plan: Plan,
}

enum Step {
    More,
    /// There is no room to write.
    Wait,
    Done,
    /// The group stays as far as it is merged.
    Leave,
}

/// Why a group is left as it is.
#[derive(Debug, thiserror::Error)]
pub(super) enum MergeError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Write(#[from] io::Error),
}

impl<D: SpoolDisk> Spool<D> {
    /// One bounded step of merging: at most one batch is read and written. Only segments for which
    /// `may` holds and that were never sent are touched, and never the newest. `room` is what the
    /// spool may take beside what it holds. False when there is nothing to do.
    ///
    /// # Errors
    /// Of the medium, when it cannot be written; the spool is as it was, or smaller.
    pub fn merge(
        &mut self,
        may: impl Fn(SegmentId) -> bool,
        room: u64,
        zstd_level: Option<i32>,
    ) -> io::Result<bool> {
        // Its end is looked at record by record after a crash, and it may still be written.
        let newest = self.segments.back().map(|s| s.id);
        let sent = self.sent;
        let may = |id: SegmentId| {
            may(id) && sent.is_none_or(|sent| id > sent) && newest.is_some_and(|n| id < n)
        };
        let next = self.merge.take().or_else(|| self.next_group(&may));
        let Some(mut merge) = next.filter(|_| !self.sent_unknown) else { return Ok(false) };
        if !merge.group.iter().all(|id| may(*id) && self.segment(*id).is_some()) {
            self.forget(&merge);
            return Ok(true);
        }
        let step = self.merge_step(&mut merge, room, zstd_level);
        if matches!(step, Ok(Step::Wait)) {
            return Ok(false);
        }
        if matches!(step, Ok(Step::More)) {
            self.merge = Some(merge);
            return Ok(true);
        }
        self.forget(&merge);
        for segment in self.segments.iter_mut().filter(|s| merge.group.contains(&s.id)) {
            segment.level = segment.level.max(merge.level);
        }
        match step {
            Ok(_) => Ok(true),
            Err(MergeError::Read(error)) => {
                // Told when it is to be sent.
                tracing::warn!(%error, "a part of the spool is not merged");
                Ok(true)
            }
            Err(MergeError::Write(error)) => Err(error),
        }
    }

    /// What was merged since the spool was empty.
    #[must_use]
    pub const fn merged(&self) -> Option<Merged> {
        self.merged
    }

    pub(super) fn stop_merging(&mut self) {
        if let Some(merge) = self.merge.take() {
            self.forget(&merge);
        }
    }

    fn forget(&mut self, merge: &Merge) {
        if merge.rewrite.is_some() {
            // Best effort: it is removed before the next one, and when the spool is opened.
            let _ = self.disk.delete(TEMPORARY);
        }
    }

    fn segment(&self, id: SegmentId) -> Option<&Segment> {
        self.segments.iter().find(|s| s.id == id)
    }

    /// The densest neighbours, the oldest of them first.
    fn next_group(&self, may: &impl Fn(SegmentId) -> bool) -> Option<Merge> {
        let row: Vec<(SegmentId, u8)> =
            self.segments.iter().filter(|s| may(s.id)).map(|s| (s.id, s.level)).collect();
        let last = row.last()?.0;
        // Its group is not whole yet.
        let after = self.segments.iter().map(|s| s.id).find(|id| *id > last);
        for level in 1..=MAX_LEVEL {
            let of = |id: SegmentId| id.get() >> level;
            for group in row.chunk_by(|a, b| of(a.0) == of(b.0)) {
                let whole = group.last().map(|(id, _)| of(*id)) != after.map(of);
                if whole && group.len() > 1 && group.iter().any(|(_, done)| *done < level) {
                    let group: Vec<SegmentId> = group.iter().map(|(id, _)| *id).collect();
                    return Some(Merge::new(group, level, self.faults));
                }
            }
        }
        None
    }

    fn merge_step(
        &mut self,
        merge: &mut Merge,
        room: u64,
        zstd_level: Option<i32>,
    ) -> Result<Step, MergeError> {
        if let Some(rewrite) = &mut merge.rewrite {
            return match rewrite.step(self)? {
                None => Ok(Step::More),
                Some(false) => Ok(Step::Leave),
                Some(true) => {
                    self.count(&rewrite.plan);
                    merge.rewrite = None;
                    Ok(Step::More)
                }
            };
        }
        let Some(planning) = &mut merge.planning else { return self.next_segment(merge) };
        if planning.left > 0 {
            return self.look_at_batch(merge);
        }
        let Some(Planning { batches, mut plan, .. }) = merge.planning.take() else {
            return Ok(Step::More);
        };
        if !merge.worth {
            merge.dropped += plan.dropped;
            merge.total += plan.total;
        } else if plan.changed || plan.point.is_some() {
            let id = merge.group[merge.left];
            let Some(segment) = self.segment(id).map(|s| (s.id, s.first, s.end)) else {
                return Ok(Step::Leave);
            };
            if room < room_for(segment.2) {
                return Ok(Step::Wait);
            }
            plan.stay.reverse();
            merge.rewrite = Some(Rewrite::begin(self, segment, batches, plan, zstd_level)?);
        }
        Ok(Step::More)
    }

    /// Begins to look at the next segment, or decides after the last one.
    fn next_segment(&mut self, merge: &mut Merge) -> Result<Step, MergeError> {
        if merge.left == 0 {
            if merge.worth || merge.dropped * WORTH < merge.total || merge.dropped == 0 {
                return Ok(Step::Done);
            }
            merge.worth = true;
            merge.left = merge.group.len();
            merge.sweep = Sweep { faults: self.faults, ..Sweep::default() };
        }
        merge.left -= 1;
        let Some(segment) = self.segment(merge.group[merge.left]) else { return Ok(Step::Leave) };
        let (mut cursor, last) = (segment.first(), segment.last.after);
        let mut batches = Vec::new();
        while cursor.border.after < last {
            batches.push(cursor);
            let header = self.header(cursor)?;
            cursor = cursor.behind(&header);
        }
        let left = batches.len();
        merge.planning = Some(Planning { batches, left, plan: Plan::default() });
        Ok(Step::More)
    }

    /// One batch before those that were looked at. What is only looked at to see whether it is
    /// worth it is not verified.
    fn look_at_batch(&mut self, merge: &mut Merge) -> Result<Step, MergeError> {
        let Some(planning) = &mut merge.planning else { return Ok(Step::More) };
        planning.left -= 1;
        let cursor = planning.batches[planning.left];
        let (epoch, records) = self.records(cursor, merge.worth)?;
        for (index, record) in records.iter().enumerate().rev() {
            let at = (number(planning.left), number(index));
            if !merge.sweep.take((epoch, at), record, &mut planning.plan) {
                // What is in front of it stays, and has no part in what comes before.
                planning.plan.from = (at.0, at.1 + 1);
                planning.left = 0;
                merge.sweep.cover = None;
                break;
            }
        }
        let large = merge.sweep.is_too_large(&planning.plan);
        Ok(if large { Step::Leave } else { Step::More })
    }

    fn records(
        &mut self,
        cursor: Cursor,
        verify: bool,
    ) -> Result<(Epoch, Vec<Record>), MergeError> {
        let header = self.header(cursor)?;
        let Cursor { segment, at, .. } = cursor;
        let damaged = |source| ReadError::Damaged { segment, at, source };
        let records = if verify {
            let bytes = self.bytes_of(cursor, &header)?;
            let batch = farshore_changelog::RawBatch::parse(&bytes).and_then(|b| b.check());
            batch.map_err(damaged)?.records().collect()
        } else {
            let mut front = vec![0; header.payload_offset()];
            let io = |source| ReadError::Io { segment, at, source };
            let read = self.disk.read_at(segment, at, &mut front).map_err(io)?;
            header.records_of(&front[..read]).map_err(damaged)?
        };
        Ok((header.epoch, records))
    }

    /// A rewritten segment is in its place.
    fn count(&mut self, plan: &Plan) {
        let Some((from, to)) = plan.times else { return };
        let merged = self.merged.get_or_insert(Merged { points: 0, from, to });
        merged.points += plan.points;
        merged.from = merged.from.min(from);
        merged.to = merged.to.max(to);
    }

    /// A smaller segment took the place of an old one.
    pub(super) fn replaced(&mut self, id: SegmentId, last: super::Border, end: u64) {
        if let Some(segment) = self.segments.iter_mut().find(|s| s.id == id) {
            self.bytes = self.bytes - segment.end.min(self.bytes) + end;
            segment.last = last;
            segment.end = end.max(ALIGN);
        }
    }
}

impl Merge {
    fn new(group: Vec<SegmentId>, level: u8, faults: SpoolFaults) -> Self {
        Self {
            left: group.len(),
            group,
            level,
            worth: false,
            dropped: 0,
            total: 0,
            sweep: Sweep { faults, ..Sweep::default() },
            planning: None,
            rewrite: None,
        }
    }
}

fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}
