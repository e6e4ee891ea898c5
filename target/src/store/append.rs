//! Taking batches and making them durable.
//!
//! `append` checks that a batch may follow and keeps a copy; `commit` writes all copies with one
//! durable write per segment and moves `journaled`. Nothing is told to anybody in between.

use farshore_changelog::limits::MAX_INDEXED_BYTES;
use farshore_changelog::{
    BatchHeader, CheckedBatch, RawBatch, RecordBody, SegmentEvent, SegmentIndexBuilder,
};
use farshore_extent::{Chain, Extent, Lsn, VolumeSize};

use super::disk::ALIGN;
use super::error::{AppendError, StoreError};
use super::limits::{GROUP_TARGET_BYTES, MAX_GROUP_BYTES, RECENT_CHAINS};
use super::order::OrderBook;
use super::{Pending, Store, StoreEvent, compare};

/// What a commit made durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Everything up to here is durable: acknowledge it.
    pub durable: Lsn,
    /// Chain there.
    pub chain: Chain,
    /// Points and changes of order that became durable since the last commit, in order.
    pub events: Vec<StoreEvent>,
}

impl Store {
    /// Takes a batch for the next commit. It must follow [`super::Position::received`].
    ///
    /// # Errors
    /// [`AppendError`]; nothing changed then.
    pub fn append(&mut self, batch: CheckedBatch<'_>) -> Result<(), AppendError> {
        if let Some(first) = &self.poisoned {
            return Err(AppendError::Poisoned { first: first.clone() });
        }
        let header = *batch.header();
        self.check_identity(&header)?;
        self.check_follows(&header)?;
        let size = check_extents(&batch, self.received_size)?;
        let padded = header.total_len().next_multiple_of(ALIGN);
        if !self.pending.is_empty() && self.group.len() + padded > MAX_GROUP_BYTES {
            return Err(AppendError::GroupFull);
        }
        let asks = batch.records().any(|record| compare::asks(&record.body));
        let at = self.group.push_padded(batch.bytes());
        self.pending.push(Pending { header, at, asks });
        if self.config.faults.judge_before_durable {
            self.ask(compare::questions(&[batch]), header.last());
        }
        self.received = header.last();
        self.received_chain = header.chain;
        self.received_size = size;
        Ok(())
    }

    /// Bytes that wait for [`Self::commit`].
    #[must_use]
    pub const fn uncommitted_bytes(&self) -> usize {
        self.group.len()
    }

    /// Whether enough waits for a commit to be efficient. A worker also commits after 20 ms and
    /// when a batch carries a marker.
    #[must_use]
    pub const fn group_is_worth_it(&self) -> bool {
        self.group.len() >= GROUP_TARGET_BYTES
    }

    /// Makes everything appended durable.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`]: nothing was lost, the group is kept; expire or give space, then
    /// call again. Anything else poisons the store: reopen it.
    pub fn commit(&mut self) -> Result<Committed, StoreError> {
        self.check_alive()?;
        while !self.pending.is_empty() {
            let count = self.make_room()?;
            self.write_group(count)?;
        }
        let events = std::mem::take(&mut self.undelivered);
        Ok(Committed { durable: self.durable, chain: self.chain, events })
    }

    fn check_identity(&self, header: &BatchHeader) -> Result<(), AppendError> {
        if header.volume != self.sb.volume {
            return Err(AppendError::WrongVolume(header.volume));
        }
        let (batch, own) = (header.generation, self.sb.generation);
        if batch < own && !self.config.faults.no_generation_fence {
            return Err(AppendError::Fenced { batch, own });
        }
        if batch > own {
            return Err(AppendError::Ahead { batch, own });
        }
        if header.sealed {
            return Err(AppendError::Sealed);
        }
        Ok(())
    }

    fn check_follows(&self, header: &BatchHeader) -> Result<(), AppendError> {
        let last = header.last();
        if last <= self.received && !self.config.faults.no_duplicate_filter {
            return Err(self.behind(header));
        }
        if header.epoch < self.received.epoch {
            return Err(AppendError::EpochBack { batch: header.epoch, own: self.received.epoch });
        }
        let again = self.config.faults.no_duplicate_filter && last <= self.received;
        if header.prev != self.received && !again {
            return Err(AppendError::Gap { prev: header.prev, expected: self.received });
        }
        let unchecked = self.config.faults.no_chain_check || again;
        if header.prev_chain != self.received_chain && !unchecked {
            return Err(AppendError::Diverged { at: header.prev, own: self.received_chain });
        }
        Ok(())
    }

    /// What to say about a batch that lies behind: the same history, or another one.
    fn behind(&self, header: &BatchHeader) -> AppendError {
        let last = header.last();
        match self.recent.get(&last) {
            Some(own) if *own != header.chain => AppendError::Diverged { at: last, own: *own },
            None if header.epoch < self.received.epoch => {
                AppendError::EpochBack { batch: header.epoch, own: self.received.epoch }
            }
            Some(_) | None => AppendError::Duplicate { last },
        }
    }

    /// Sees to an open segment that takes at least the first waiting batch; returns how many fit.
    fn make_room(&mut self) -> Result<usize, StoreError> {
        loop {
            if let Some(open) = &self.open {
                let fitting = fitting(&open.builder, &self.pending);
                if fitting > 0 {
                    return Ok(fitting);
                }
                self.seal()?;
            }
            self.begin_segment()?;
        }
    }

    /// Writes the first `count` waiting batches and counts them as durable.
    fn write_group(&mut self, count: usize) -> Result<(), StoreError> {
        let end = self.pending.get(count).map_or(self.group.len(), |next| next.at);
        let Some(open) = &mut self.open else { return Ok(()) };
        let place = open.builder.end();
        let bytes = &self.group.as_slice()[..end];
        let written = if self.config.faults.ack_before_sync {
            open.file.write_at(bytes, place)
        } else {
            open.file.write_durable(bytes, place)
        };
        let written = match written {
            Err(_) if self.config.faults.sync_retried => open.file.sync(),
            other => other,
        };
        if let Err(e) = written {
            let what = format!("writing the journal at {place}: {e}");
            return Err(self.poison(StoreError::Io { what, source: e }));
        }
        let mut asking = Vec::new();
        for batch in self.pending.drain(..count) {
            let whole = RawBatch::parse(&bytes[batch.at..]).and_then(RawBatch::check_without_chain);
            // Checked by append, and nobody else has the buffer.
            if let Ok(checked) = whole {
                let events = open.builder.events().len();
                open.builder.push(&checked, place + batch.at as u64);
                if open.builder.events().len() > events {
                    take_events(&mut self.book, &checked, self.durable, &mut self.undelivered);
                }
                if self.comparer.has_wrong() {
                    self.comparer.repaired_by(&checked);
                }
                // What follows the first one may overtake it.
                if batch.asks || !asking.is_empty() {
                    asking.push(checked);
                }
            }
            self.durable = batch.header.last();
            self.chain = batch.header.chain;
            self.recent.insert(self.durable, self.chain);
        }
        while self.recent.len() > RECENT_CHAINS {
            self.recent.pop_first();
        }
        let questions = compare::questions(&asking);
        self.group.drop_front(end);
        if !self.config.faults.judge_before_durable {
            self.ask(questions, self.durable);
        }
        self.pending.iter_mut().for_each(|waiting| waiting.at -= end);
        Ok(())
    }
}

/// Tells the book what happens in a batch that follows the record at `newest`.
fn take_events(
    book: &mut OrderBook,
    batch: &CheckedBatch<'_>,
    mut newest: Lsn,
    out: &mut Vec<StoreEvent>,
) {
    for record in batch.records() {
        let event = SegmentEvent { epoch: batch.header().epoch, record };
        if SegmentEvent::is_event(&event.record.body) {
            book.take(&event, newest, out);
        }
        newest = event.lsn();
    }
}

/// How many of the waiting batches fit the segment, with room left for its footer.
fn fitting(builder: &SegmentIndexBuilder, waiting: &[Pending]) -> usize {
    let room = builder.header().capacity - builder.end().min(builder.header().capacity);
    let fits = |count: usize| {
        let lens = waiting[..count].iter();
        let bytes: usize = lens.map(|w| w.header.total_len().next_multiple_of(ALIGN)).sum();
        let footer = builder.footer_bound(waiting[..count].iter().map(|w| &w.header));
        (bytes + footer) as u64 <= room
    };
    if fits(waiting.len()) {
        return waiting.len();
    }
    let (mut good, mut bad) = (0, waiting.len());
    while bad - good > 1 {
        let middle = good.midpoint(bad);
        if fits(middle) {
            good = middle;
        } else {
            bad = middle;
        }
    }
    good
}

/// Every record must lie within the volume as it is at that record. Returns the size at the end.
fn check_extents(
    batch: &CheckedBatch<'_>,
    mut size: VolumeSize,
) -> Result<VolumeSize, AppendError> {
    for record in batch.records() {
        match record.body {
            RecordBody::Resize(new) => size = new,
            RecordBody::EpochStart(start) => size = start.size,
            RecordBody::Write { .. }
            | RecordBody::Zero { .. }
            | RecordBody::Unknown { .. }
            | RecordBody::Copy { .. }
            | RecordBody::Hash { .. }
            | RecordBody::Marker(_)
            | RecordBody::MarkerCommit(_)
            | RecordBody::MarkerAbort(_)
            | RecordBody::OrderLost
            | RecordBody::OrderRestored => {}
        }
        let indexed = Extent::between(MAX_INDEXED_BYTES, size.get());
        let outside = record.body.extent().filter(|e| !size.extent().contains(*e));
        if let Some(extent) = indexed.or(outside) {
            return Err(AppendError::Outside { extent });
        }
    }
    Ok(size)
}
