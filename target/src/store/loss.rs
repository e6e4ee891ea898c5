//! What the journal has behind a place: the exact loss when somebody goes back to it.

use std::sync::Arc;

use farshore_changelog::RecordBody;
use farshore_extent::{Lsn, Seq, WallTime};

use super::Store;
use super::error::StoreError;
use super::segment::Segment;

/// The durable journal behind a place, as it was when it was asked for. Counting reads the tables
/// of its batches, not their payload, and may take its time on any thread.
pub struct Behind {
    segments: Vec<Arc<Segment>>,
    after: Lsn,
    upto: Lsn,
}

/// What guests wrote behind a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Written {
    /// Writes, zeroes and discards of guests.
    pub writes: u64,
    /// Bytes of them; what was overwritten counts again.
    pub bytes: u64,
    /// Capture time of the last record of any kind.
    pub last: Option<WallTime>,
}

impl Store {
    /// What is durable behind `after`.
    #[must_use]
    pub fn journal_behind(&self, after: Lsn) -> Behind {
        let upto = self.position().durable;
        Behind { segments: self.segments_between(after, upto), after, upto }
    }
}

impl Behind {
    /// Counts it.
    ///
    /// # Errors
    /// [`StoreError`] when the journal cannot be read.
    pub fn count(&self) -> Result<Written, StoreError> {
        let mut written = Written::default();
        let mut bytes = Vec::new();
        for segment in &self.segments {
            for batch in segment.batches()? {
                if batch.last() <= self.after || Lsn::new(batch.epoch, batch.first_seq) > self.upto
                {
                    continue;
                }
                // A write whose zeroes were cut out is several records with one number.
                let mut one = Seq::ZERO;
                segment.with_front(&batch, &mut bytes, |front| {
                    for record in front.records() {
                        let at = Lsn::new(batch.epoch, record.seq);
                        if at <= self.after || at > self.upto {
                            continue;
                        }
                        written.last = Some(record.time);
                        let extent = match record.body {
                            RecordBody::Write { extent, .. }
                            | RecordBody::Zero { extent, copied: false } => extent,
                            _ => continue,
                        };
                        written.bytes += extent.len();
                        written.writes +=
                            u64::from(std::mem::replace(&mut one, record.seq) != record.seq);
                    }
                })?;
            }
        }
        Ok(written)
    }
}
