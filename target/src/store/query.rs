//! What a store can be asked: which places exist, which are consistent, and views of them.

use std::sync::Arc;

use farshore_extent::{CaptureOrder, Lsn, WallTime};

use super::Store;
use super::error::{StoreError, ViewError};
use super::order::{OrderBook, OrderedStretch, StoreEvent, behind};
use super::runs::Layer;
use super::segment::Segment;
use super::view::{OpenViews, Parts, Pin, PointReader};

impl Store {
    /// Whether the state at `lsn` is one the volume really had.
    #[must_use]
    pub fn is_ordered_at(&self, lsn: Lsn) -> bool {
        self.book.at(lsn) == CaptureOrder::Ordered
    }

    /// Stretches in which every place is a consistent state, oldest first. Parts below
    /// [`super::Position::floor`] cannot be opened any more.
    #[must_use]
    pub fn ordered_stretches(&self) -> Vec<OrderedStretch> {
        self.book.stretches()
    }

    /// Tells everything the kept journal says about points and order, oldest first: for a catalogue
    /// that is to be checked or built anew. Points below the floor are left out.
    ///
    /// # Errors
    /// [`StoreError`] when the journal cannot be read; what was told is right.
    pub fn history(&self, mut tell: impl FnMut(StoreEvent)) -> Result<(), StoreError> {
        let sb = &self.sb;
        let mut book = OrderBook::new(sb.base, sb.base_order, sb.base_time);
        let mut events = Vec::new();
        let mut newest = sb.base;
        for segment in self.all_segments() {
            for event in segment.events()? {
                // Only markers are asked for here, and those are events themselves.
                book.take_after(&event, newest, sb.base, &mut events);
                newest = event.lsn();
            }
            for event in events.drain(..) {
                let expired = matches!(&event, StoreEvent::Point(point) if point.lsn < sb.floor);
                if !expired {
                    tell(event);
                }
            }
        }
        Ok(())
    }

    /// Bytes of journal files on disk.
    #[must_use]
    pub fn journal_bytes(&self) -> u64 {
        let open = self.open.as_ref().map_or(0, |open| open.header().capacity);
        let kept = self.segments.iter().chain(&self.doomed).map(|s| s.header.capacity);
        kept.sum::<u64>() + open + self.runs.size().1
    }

    /// Bytes of sealed segments in which every place is at or before `at`: what expiry up to `at`
    /// frees, unless a view reads them.
    #[must_use]
    pub fn journal_bytes_before(&self, at: Lsn) -> u64 {
        self.segments.iter().filter(|s| s.last <= at).map(|s| s.header.capacity).sum()
    }

    /// The last durable place captured at or before `time` on the source's clock, going back from
    /// the newest; none when that has expired. The clock is a label: when it was set back, the
    /// later of two possible places is found. A time between the last record of an ordered stretch
    /// and the loss of order gives a place that is not ordered: writes of then may be missing.
    ///
    /// # Errors
    /// [`StoreError`] when the journal cannot be read.
    pub fn resolve_time(&self, time: WallTime) -> Result<Option<Lsn>, StoreError> {
        match self.newest_by(time)? {
            Some(lsn) if self.book.ends_with(lsn) && time > self.time_at(lsn)? => {
                Ok(Some(behind(lsn)))
            }
            found => Ok(found),
        }
    }

    fn newest_by(&self, time: WallTime) -> Result<Option<Lsn>, StoreError> {
        let sb = &self.sb;
        for segment in self.segments_between(sb.base, self.durable).iter().rev() {
            if segment.min_time > time {
                continue;
            }
            for batch in segment.batches()?.iter().rev() {
                if batch.first_time > time {
                    continue;
                }
                if batch.last_time <= time {
                    return Ok(self.kept(batch.last()));
                }
                let found = segment.last_record(batch, |at, _| at <= time)?;
                return Ok(found.and_then(|(lsn, _)| self.kept(lsn)));
            }
        }
        Ok(if time >= sb.base_time { self.kept(sb.base) } else { None })
    }

    fn kept(&self, lsn: Lsn) -> Option<Lsn> {
        (lsn >= self.sb.floor).then_some(lsn)
    }

    /// Capture time of the newest record at or before `lsn`.
    ///
    /// # Errors
    /// [`StoreError`] when the journal cannot be read.
    pub fn time_at(&self, lsn: Lsn) -> Result<WallTime, StoreError> {
        for segment in self.segments_between(self.sb.base, lsn).iter().rev() {
            for batch in segment.batches()?.iter().rev() {
                if batch.last() <= lsn {
                    return Ok(batch.last_time);
                }
                if Lsn::new(batch.epoch, batch.first_seq) <= lsn {
                    let found = segment.last_record(batch, |_, at| at <= lsn)?;
                    return Ok(found.map_or(batch.first_time, |(_, time)| time));
                }
            }
        }
        Ok(self.sb.base_time)
    }

    /// Opens the state after every record up to `at` for reading. The view pins what it needs:
    /// while it lives the base does not pass `at`, and its segments stay.
    ///
    /// # Errors
    /// [`ViewError`] when there is no such state.
    pub fn open_view(&self, at: Lsn) -> Result<PointReader, ViewError> {
        if at < self.sb.floor {
            return Err(ViewError::Expired { at, floor: self.sb.floor });
        }
        if at > self.durable {
            return Err(ViewError::NotYet { at, durable: self.durable });
        }
        if !self.is_ordered_at(at) {
            return Err(ViewError::NotOrdered { at });
        }
        Ok(self.reader(at, Some(Pin::new(&self.pins, at)))?)
    }

    /// Its views. A store that is opened anew knows nothing of the views of the one before it: it
    /// must not expire anything while one of them is open.
    #[must_use]
    pub fn open_views(&self) -> OpenViews {
        OpenViews(Arc::clone(&self.pins))
    }

    /// As [`Self::open_view`] for any place, also one inside a catch-up, where the content is a
    /// state that the volume never had: for salvage and comparison only.
    ///
    /// # Errors
    /// [`ViewError`] when there is no such place.
    pub fn open_unordered_view(&self, at: Lsn) -> Result<PointReader, ViewError> {
        match self.open_view(at) {
            Err(ViewError::NotOrdered { .. }) => {
                Ok(self.reader(at, Some(Pin::new(&self.pins, at)))?)
            }
            other => other,
        }
    }

    /// A reader of base + journal up to `at`, which lies between base and `durable`.
    pub(super) fn reader(&self, at: Lsn, pin: Option<Pin>) -> Result<PointReader, StoreError> {
        let mut segments = self.segments_between(self.sb.base, at);
        // Runs know segments that are sealed, as they are at their end.
        let open = self.open.as_ref().map(|open| open.header().segment);
        let alone = |newest: &Arc<Segment>| newest.last > at || Some(newest.id()) == open;
        let alone = segments.pop_if(|newest| alone(newest));
        let mut layers = self.runs.layers(&segments);
        if let Some(newest) = alone {
            let newest = if newest.last > at { Arc::new(newest.upto(at)?) } else { newest };
            layers.insert(0, Layer::Segment(Arc::clone(&newest)));
            segments.push(newest);
        }
        Ok(self.reader_of(at, layers, segments, pin))
    }

    /// The same for expiry: only what lies behind the base, which must not be merged again and again
    /// when the base moves within a segment. The segments are asked one by one: a run would bring
    /// in what it has of segments that are merged already.
    pub(super) fn journal_reader(&self, at: Lsn) -> Result<PointReader, StoreError> {
        let base = self.sb.base;
        let mut segments = self.segments_between(base, at);
        if let Some(oldest) = segments.first_mut().filter(|oldest| oldest.header.prev < base) {
            *oldest = Arc::new(oldest.between(base, self.sb.size, at)?);
        }
        if let Some(newest) = segments.last_mut().filter(|newest| newest.last > at) {
            *newest = Arc::new(newest.upto(at)?);
        }
        let layers = segments.iter().rev().cloned().map(Layer::Segment).collect();
        Ok(self.reader_of(at, layers, segments, None))
    }

    fn reader_of(
        &self,
        at: Lsn,
        layers: Vec<Layer>,
        segments: Vec<Arc<Segment>>,
        pin: Option<Pin>,
    ) -> PointReader {
        PointReader::new(Parts {
            at,
            size: segments.last().map_or(self.sb.size, |newest| newest.size),
            blocks: self.sb.blocks,
            layers,
            segments,
            base: Arc::clone(&self.base),
            base_size: self.sb.size.get(),
            base_summed: self.sb.summed,
            base_unknown: self.sb.unknown.clone(),
            pin,
        })
    }
}
