//! What waits to be written: control messages first, then batches of the volumes in turn.
//!
//! Bounded: batches by the window of the session, reports and pings to the newest of each, other
//! messages by [`MAX_CONTROL`].

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farshore_changelog::EncodedBatch;
use farshore_extent::VolumeId;
use farshore_protocol::message::{FromAgent, VolumeReport};
use tokio::sync::Notify;

/// Most control messages that wait besides reports and pings; only a target that asks without
/// reading reaches it.
const MAX_CONTROL: usize = 4096;

/// One thing to write.
#[derive(Debug)]
pub enum Item {
    /// A control message.
    Control(FromAgent),
    /// The bytes of a batch, unchanged.
    Batch(Arc<EncodedBatch>),
}

#[derive(Debug, Default)]
struct Waiting {
    control: VecDeque<FromAgent>,
    ping: Option<u64>,
    reports: BTreeMap<VolumeId, VolumeReport>,
    batches: BTreeMap<VolumeId, VecDeque<Arc<EncodedBatch>>>,
    /// The volume served last.
    turn: VolumeId,
    overflow: bool,
}

/// Shared between the session and the writer of one connection.
#[derive(Debug, Default)]
pub struct Outbox {
    waiting: Mutex<Waiting>,
    ready: Notify,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Plain data: a panic elsewhere cannot have left it half changed.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a control message. An `Open` or `Close` drops the batches of its volume that were not
    /// written yet: what follows it goes on from the target's place.
    pub fn control(&self, message: FromAgent) {
        let mut waiting = self.lock();
        match message {
            FromAgent::Report(report) => {
                waiting.reports.insert(report.volume, report);
            }
            FromAgent::Ping(n) => waiting.ping = Some(n),
            FromAgent::Hello { .. }
            | FromAgent::Enroll { .. }
            | FromAgent::Renew { .. }
            | FromAgent::Open(_)
            | FromAgent::Close { .. }
            | FromAgent::Tagged { .. }
            | FromAgent::PointNote { .. } => {
                if let FromAgent::Open(open) = &message {
                    waiting.batches.remove(&open.volume);
                } else if let FromAgent::Close { volume, .. } = &message {
                    waiting.batches.remove(volume);
                }
                waiting.overflow |= waiting.control.len() >= MAX_CONTROL;
                if !waiting.overflow {
                    waiting.control.push_back(message);
                }
            }
        }
        drop(waiting);
        self.ready.notify_one();
    }

    /// Adds a batch.
    pub fn batch(&self, volume: VolumeId, batch: Arc<EncodedBatch>) {
        self.lock().batches.entry(volume).or_default().push_back(batch);
        self.ready.notify_one();
    }

    /// The next thing to write, if any. `Err` when the peer asks without reading.
    ///
    /// # Errors
    /// A sentence for the problem.
    pub fn take(&self) -> Result<Option<Item>, &'static str> {
        let mut waiting = self.lock();
        if waiting.overflow {
            return Err("it asks for more than it reads");
        }
        if let Some(message) = waiting.control.pop_front() {
            return Ok(Some(Item::Control(message)));
        }
        if let Some(n) = waiting.ping.take() {
            return Ok(Some(Item::Control(FromAgent::Ping(n))));
        }
        if let Some((_, report)) = waiting.reports.pop_first() {
            return Ok(Some(Item::Control(FromAgent::Report(report))));
        }
        Ok(Self::next_batch(&mut waiting).map(Item::Batch))
    }

    fn next_batch(waiting: &mut Waiting) -> Option<Arc<EncodedBatch>> {
        let turn = waiting.turn;
        let after = (std::ops::Bound::Excluded(turn), std::ops::Bound::Unbounded);
        let next = waiting.batches.range(after).next().or_else(|| waiting.batches.iter().next());
        let volume = *next?.0;
        waiting.turn = volume;
        let queue = waiting.batches.get_mut(&volume)?;
        let batch = queue.pop_front();
        if queue.is_empty() {
            waiting.batches.remove(&volume);
        }
        batch
    }

    /// Waits until something was added since the last wait.
    pub async fn ready(&self) {
        self.ready.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use farshore_changelog::{BatchBuilder, BatchContext, Record, RecordBody};
    use farshore_extent::{Chain, Epoch, Generation, Lsn, Seq, WallTime};

    use super::*;

    fn batch(volume: VolumeId, seq: u64) -> Arc<EncodedBatch> {
        let mut builder = BatchBuilder::new(None);
        let (seq, time) = (Seq::new(seq), WallTime::default());
        builder.push(&Record { seq, time, body: RecordBody::OrderLost });
        let context = BatchContext {
            volume,
            generation: Generation::ZERO,
            prev: Lsn::ZERO,
            prev_chain: Chain::EMPTY,
            durable: Lsn::ZERO,
        };
        Arc::new(builder.finish(Epoch::new(1), &context).unwrap())
    }

    fn order(outbox: &Outbox) -> Vec<(VolumeId, u64)> {
        let take = || match outbox.take().unwrap()? {
            Item::Batch(b) => Some((b.header.volume, b.header.last_seq.get())),
            Item::Control(_) => Some((VolumeId::NIL, 0)),
        };
        std::iter::from_fn(take).collect()
    }

    #[test]
    fn volumes_take_turns_and_control_messages_go_first() {
        let outbox = Outbox::default();
        let (a, b) = (VolumeId::from_bytes([1; 16]), VolumeId::from_bytes([2; 16]));
        (1..=3).for_each(|n| outbox.batch(a, batch(a, n)));
        outbox.batch(b, batch(b, 9));
        outbox.control(FromAgent::Ping(1));
        outbox.control(FromAgent::Ping(2));
        assert_eq!(order(&outbox), [(VolumeId::NIL, 0), (a, 1), (b, 9), (a, 2), (a, 3)]);
    }

    #[test]
    fn closing_a_volume_drops_what_was_not_written_of_it() {
        let outbox = Outbox::default();
        let (a, b) = (VolumeId::from_bytes([1; 16]), VolumeId::from_bytes([2; 16]));
        outbox.batch(a, batch(a, 1));
        outbox.batch(b, batch(b, 2));
        outbox.control(FromAgent::Close { volume: a, unprotected: true });
        assert_eq!(order(&outbox), [(VolumeId::NIL, 0), (b, 2)]);
    }
}
