//! What waits to be written to one agent. Bounded: acknowledgements are cumulative, so one a
//! volume is enough; more than [`MAX_MESSAGES`] unread messages end the session.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use farshore_extent::{Chain, Lsn, VolumeId};
use farshore_protocol::message::FromTarget;
use tokio::sync::Notify;

/// An agent reads its messages within milliseconds; the largest are some hundred bytes.
const MAX_MESSAGES: usize = 1024;

#[derive(Default)]
struct Waiting {
    messages: VecDeque<FromTarget>,
    acks: BTreeMap<VolumeId, (Lsn, Chain)>,
    /// No more is taken; what waits is still written.
    closed: bool,
}

/// Filled by workers and the session, emptied by the session's writer.
#[derive(Default)]
pub(crate) struct Outbox {
    waiting: Mutex<Waiting>,
    wake: Notify,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a message. After too many unread ones the outbox closes itself.
    pub(crate) fn send(&self, message: FromTarget) {
        let mut waiting = self.lock();
        if waiting.messages.len() >= MAX_MESSAGES {
            waiting.closed = true;
        }
        if !waiting.closed {
            waiting.messages.push_back(message);
        }
        drop(waiting);
        self.wake.notify_one();
    }

    /// Everything up to `durable` is durable.
    pub(crate) fn ack(&self, volume: VolumeId, durable: Lsn, chain: Chain) {
        let mut waiting = self.lock();
        if !waiting.closed {
            waiting.acks.insert(volume, (durable, chain));
        }
        drop(waiting);
        self.wake.notify_one();
    }

    /// Takes no more; the writer writes what waits and ends.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.wake.notify_one();
    }

    /// Waits for something to write; empty means closed. Loses nothing when cancelled.
    pub(super) async fn take(&self) -> Vec<FromTarget> {
        loop {
            {
                let mut waiting = self.lock();
                let mut out: Vec<FromTarget> = waiting.messages.drain(..).collect();
                let acks = std::mem::take(&mut waiting.acks);
                out.extend(acks.into_iter().map(|(volume, (durable, chain))| FromTarget::Ack {
                    volume,
                    durable,
                    chain,
                }));
                if !out.is_empty() || waiting.closed {
                    return out;
                }
            }
            self.wake.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use farshore_extent::{Epoch, Seq};

    use super::*;

    #[tokio::test]
    async fn acks_are_merged_and_a_reader_that_stopped_costs_bounded_memory() {
        let outbox = Outbox::default();
        let volume = VolumeId::random();
        for n in 1..100_000 {
            outbox.ack(volume, Lsn::new(Epoch::new(1), Seq::new(n)), Chain::EMPTY);
        }
        assert_eq!(outbox.take().await.len(), 1);
        for n in 0..100_000 {
            outbox.send(FromTarget::Pong(n));
        }
        assert_eq!(outbox.take().await.len(), MAX_MESSAGES);
        assert!(outbox.take().await.is_empty(), "closed");
    }
}
