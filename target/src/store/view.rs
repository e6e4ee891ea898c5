//! Reading the volume as it was at one place: base, whole segments by the runs that cover them, and
//! the part of the segment in which the place lies.
//!
//! Never sees later writes: it holds its own list of segments and pins them and the base. Safe to
//! use from many threads.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use farshore_changelog::{IndexEntry, IndexPlace, SegmentId};
use farshore_extent::{BlockSizes, Extent, ExtentSet, Lsn, SECTOR, VolumeSize};

use super::base::Base;
use super::cache::Cache;
use super::error::{ReadError, StoreError};
use super::limits::{VIEW_FRAMES, VIEW_PAGES};
use super::runs::{Layer, OpenRun};
use super::segment::{Pages, Segment, guard};

/// Places that views hold; apply must not pass the smallest.
pub(crate) type Pins = Arc<Mutex<BTreeMap<u64, Lsn>>>;

/// Holds a place until it is dropped.
pub(crate) struct Pin {
    pins: Pins,
    id: u64,
}

impl Pin {
    pub(crate) fn new(pins: &Pins, at: Lsn) -> Self {
        let mut held = guard(pins);
        let id = held.last_key_value().map_or(0, |(id, _)| id + 1);
        held.insert(id, at);
        Self { pins: Arc::clone(pins), id }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        guard(&self.pins).remove(&self.id);
    }
}

/// The views of a store, watched from outside: they may outlive it.
pub struct OpenViews(pub(crate) Pins);

impl OpenViews {
    /// Whether one is open.
    #[must_use]
    pub fn any(&self) -> bool {
        !guard(&self.0).is_empty()
    }
}

/// What a range of a point holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Bytes.
    Data,
    /// Zeroes; nothing is stored.
    Zero,
    /// Not known: reading it is an error.
    Unknown,
}

/// Where the bytes of a range come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Frame { segment: SegmentId, frame: u32, skip: usize },
    Zero,
    Unknown,
    Base,
}

type FrameCache = Cache<(SegmentId, u32), Arc<Vec<u8>>>;

/// One place of the history, readable. Dropping it releases what it pins.
pub struct PointReader {
    at: Lsn,
    size: VolumeSize,
    blocks: BlockSizes,
    /// Newest first.
    layers: Vec<Layer>,
    /// What the layers speak of, ascending. What an entry says of an older segment is in the base.
    segments: Vec<Arc<Segment>>,
    base: Arc<Base>,
    base_size: u64,
    base_summed: u64,
    base_unknown: ExtentSet,
    pages: Pages,
    frames: Mutex<FrameCache>,
    _pin: Option<Pin>,
}

/// What a reader is made of.
pub(crate) struct Parts {
    pub(crate) at: Lsn,
    pub(crate) size: VolumeSize,
    pub(crate) blocks: BlockSizes,
    pub(crate) layers: Vec<Layer>,
    pub(crate) segments: Vec<Arc<Segment>>,
    pub(crate) base: Arc<Base>,
    pub(crate) base_size: u64,
    /// Bytes of it that have checksums.
    pub(crate) base_summed: u64,
    pub(crate) base_unknown: ExtentSet,
    pub(crate) pin: Option<Pin>,
}

impl PointReader {
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            at: parts.at,
            size: parts.size,
            blocks: parts.blocks,
            layers: parts.layers,
            segments: parts.segments,
            base: parts.base,
            base_size: parts.base_size,
            base_summed: parts.base_summed,
            base_unknown: parts.base_unknown,
            pages: Pages::new(VIEW_PAGES),
            frames: Mutex::new(Cache::new(VIEW_FRAMES)),
            _pin: parts.pin,
        }
    }

    /// The place it shows.
    #[must_use]
    pub const fn at(&self) -> Lsn {
        self.at
    }

    /// Size of the volume there, in bytes.
    #[must_use]
    pub const fn size(&self) -> VolumeSize {
        self.size
    }

    /// Block sizes of the volume.
    #[must_use]
    pub const fn blocks(&self) -> BlockSizes {
        self.blocks
    }

    /// Number of segments and runs that are asked for a byte, at most.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// How many of them are runs over several segments.
    #[must_use]
    pub fn runs(&self) -> usize {
        self.layers.iter().filter(|layer| matches!(layer, Layer::Run(_))).count()
    }

    pub(super) fn segments(&self) -> &[Arc<Segment>] {
        &self.segments
    }

    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    /// [`ReadError`]; `buf` may then be partly filled, but never with wrong bytes that count.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), ReadError> {
        if buf.is_empty() {
            return Ok(());
        }
        let extent = self.checked(offset, buf.len() as u64)?;
        for (piece, source) in self.resolve(extent)? {
            let from = at_usize(piece.offset() - offset);
            let out = &mut buf[from..from + at_usize(piece.len())];
            match source {
                Source::Zero => out.fill(0),
                Source::Unknown => return Err(ReadError::Unknown { extent: piece }),
                Source::Base => self.read_base(out, piece)?,
                Source::Frame { segment, frame, skip } => {
                    let raw = self.frame(segment, frame, piece)?;
                    let bytes = raw.get(skip..skip + out.len());
                    out.copy_from_slice(bytes.ok_or_else(|| {
                        damaged(segment, frame, piece, "shorter than its index entry")
                    })?);
                }
            }
        }
        Ok(())
    }

    /// What `extent` holds, in consecutive pieces that cover it; at most `max` of them, so the
    /// answer may end early.
    ///
    /// # Errors
    /// [`ReadError::Outside`] and [`ReadError::Store`].
    pub fn contents(
        &self,
        extent: Extent,
        max: usize,
    ) -> Result<Vec<(Extent, Content)>, ReadError> {
        self.checked(extent.offset(), extent.len())?;
        let mut out: Vec<(Extent, Content)> = Vec::new();
        for (piece, source) in self.resolve(extent)? {
            match source {
                Source::Frame { .. } => push(&mut out, piece, Content::Data),
                Source::Zero => push(&mut out, piece, Content::Zero),
                Source::Unknown => push(&mut out, piece, Content::Unknown),
                Source::Base => self.base_contents(piece, max, &mut out)?,
            }
            if out.len() > max {
                out.truncate(max);
                break;
            }
        }
        Ok(out)
    }

    fn base_contents(
        &self,
        piece: Extent,
        max: usize,
        out: &mut Vec<(Extent, Content)>,
    ) -> Result<(), ReadError> {
        let mut at = piece.offset();
        while let Some(rest) = Extent::between(at, piece.end()).filter(|_| out.len() <= max) {
            let (end, content) = match Extent::between(at, piece.end().min(self.base_size)) {
                None => (rest.end(), Content::Zero),
                Some(in_base) => {
                    let found = self.base.stretch(in_base, self.base_summed);
                    let found = found.map_err(|e| StoreError::io("looking at base.img", e))?;
                    let content = if found.hole { Content::Zero } else { Content::Data };
                    (found.end.max(at + 1).min(piece.end()), content)
                }
            };
            let Some(here) = Extent::between(at, end) else { break };
            push(out, here, content);
            at = end;
        }
        Ok(())
    }

    fn checked(&self, offset: u64, len: u64) -> Result<Extent, ReadError> {
        let whole = self.size.extent();
        let extent = Extent::new(offset, len).map_err(|_| ReadError::Outside { extent: whole })?;
        if whole.contains(extent) { Ok(extent) } else { Err(ReadError::Outside { extent }) }
    }

    /// Finds the newest version of every byte of `extent`; pieces come by address.
    pub(super) fn resolve(&self, extent: Extent) -> Result<Vec<(Extent, Source)>, StoreError> {
        let mut found = Vec::new();
        let mut gaps = vec![extent];
        for layer in &self.layers {
            match layer {
                Layer::Segment(segment) => self.ask_segment(segment, &mut gaps, &mut found)?,
                Layer::Run(run) => self.ask_run(run, &mut gaps, &mut found)?,
            }
            if gaps.is_empty() {
                break;
            }
        }
        let in_base = |(_, source): &(Extent, Source)| *source == Source::Base;
        gaps.extend(found.extract_if(.., |piece| in_base(piece)).map(|(piece, _)| piece));
        for gap in gaps {
            let mut at = gap.offset();
            for unknown in self.base_unknown.inside(gap) {
                found.extend(Extent::between(at, unknown.offset()).map(|e| (e, Source::Base)));
                found.push((unknown, Source::Unknown));
                at = unknown.end();
            }
            found.extend(Extent::between(at, gap.end()).map(|e| (e, Source::Base)));
        }
        found.sort_unstable_by_key(|(piece, _)| piece.offset());
        Ok(found)
    }

    fn ask_segment(
        &self,
        segment: &Segment,
        gaps: &mut Vec<Extent>,
        found: &mut Vec<(Extent, Source)>,
    ) -> Result<(), StoreError> {
        let mut entries = Vec::new();
        for gap in std::mem::take(gaps) {
            entries.clear();
            let (from, to) = (gap.offset() / SECTOR, gap.end().div_ceil(SECTOR));
            segment.lookup(from, to, &self.pages, &mut entries)?;
            let sourced = entries.iter().map(|entry| (*entry, Some(segment.id())));
            split(gap, sourced, found, gaps);
        }
        Ok(())
    }

    fn ask_run(
        &self,
        run: &OpenRun,
        gaps: &mut Vec<Extent>,
        found: &mut Vec<(Extent, Source)>,
    ) -> Result<(), StoreError> {
        let oldest = self.segments.first().map(|segment| segment.id());
        let mut entries = Vec::new();
        for gap in std::mem::take(gaps) {
            entries.clear();
            let (from, to) = (gap.offset() / SECTOR, gap.end().div_ceil(SECTOR));
            match run.lookup(from, to, &self.pages, &mut entries) {
                Ok(()) => {
                    let kept = |id: &SegmentId| oldest.is_some_and(|oldest| *id >= oldest);
                    let sourced = entries.iter().map(|e| (e.entry, Some(e.segment).filter(kept)));
                    split(gap, sourced, found, gaps);
                }
                // Its segments know the same.
                Err(StoreError::Run { .. }) => {
                    let mut left = vec![gap];
                    let covers = run.run.header.first..=run.run.header.newest;
                    let own = self.segments.iter().rev().filter(|s| covers.contains(&s.id()));
                    for segment in own {
                        self.ask_segment(segment, &mut left, found)?;
                    }
                    gaps.append(&mut left);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn read_base(&self, out: &mut [u8], piece: Extent) -> Result<(), ReadError> {
        let here = self.base_size.saturating_sub(piece.offset()).min(piece.len());
        let (inside, beyond) = out.split_at_mut(at_usize(here));
        beyond.fill(0);
        if inside.is_empty() {
            return Ok(());
        }
        self.base.read(inside, piece.offset(), self.base_summed)
    }

    pub(super) fn frame(
        &self,
        id: SegmentId,
        frame: u32,
        piece: Extent,
    ) -> Result<Arc<Vec<u8>>, ReadError> {
        let segment = self.segments.binary_search_by_key(&id, |s| s.id());
        let segment = segment.ok().and_then(|n| self.segments.get(n));
        let segment = segment.ok_or_else(|| damaged(id, frame, piece, "no such segment"))?;
        let key = (id, frame);
        if let Some(hit) = guard(&self.frames).get(&key) {
            return Ok(hit);
        }
        let place = segment
            .frame(frame, &self.pages)?
            .ok_or_else(|| damaged(id, frame, piece, "not in the frame directory"))?;
        let mut stored = vec![0; place.entry.stored_len as usize];
        segment.read(&mut stored, u64::from(place.place))?;
        let mut raw = Vec::new();
        place.entry.decode(&stored, &mut raw).map_err(|why| damaged(id, frame, piece, why))?;
        let raw = Arc::new(raw);
        guard(&self.frames).put(key, Arc::clone(&raw));
        Ok(raw)
    }
}

fn damaged(segment: SegmentId, frame: u32, extent: Extent, why: &str) -> ReadError {
    ReadError::Damaged { extent, segment, frame, why: why.to_owned() }
}

/// Divides `gap` into what `entries` hold and what older layers must say. An entry without a
/// segment is of one that the base has replaced.
fn split(
    gap: Extent,
    entries: impl Iterator<Item = (IndexEntry, Option<SegmentId>)>,
    found: &mut Vec<(Extent, Source)>,
    left: &mut Vec<Extent>,
) {
    let mut at = gap.offset();
    for (entry, segment) in entries {
        let Some(piece) = entry.extent().and_then(|e| e.intersection(gap)) else { continue };
        left.extend(Extent::between(at, piece.offset()));
        let within = at_usize(piece.offset() - entry.sector * SECTOR);
        let source = match (entry.place, segment) {
            (_, None) => Source::Base,
            (IndexPlace::Zero, _) => Source::Zero,
            (IndexPlace::Unknown, _) => Source::Unknown,
            (IndexPlace::Frame { frame, sector }, Some(segment)) => {
                let skip = usize::from(sector) * at_usize(SECTOR) + within;
                Source::Frame { segment, frame, skip }
            }
        };
        found.push((piece, source));
        at = piece.end();
    }
    left.extend(Extent::between(at, gap.end()));
}

fn push(out: &mut Vec<(Extent, Content)>, piece: Extent, content: Content) {
    if let Some((last, kind)) = out.last_mut()
        && *kind == content
        && last.end() == piece.offset()
        && let Some(joined) = Extent::between(last.offset(), piece.end())
    {
        *last = joined;
        return;
    }
    out.push((piece, content));
}

/// Lengths here are bounded by a buffer or a frame, so they fit.
fn at_usize(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
