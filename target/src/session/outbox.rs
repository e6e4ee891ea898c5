//! What waits to be written to one agent. Bounded: acknowledgements are cumulative, so one a
//! volume is enough; more than [`MAX_MESSAGES`] unread messages end the session.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use farshore_extent::{Chain, Extent, Lsn, VolumeId};
use farshore_protocol::message::{FromTarget, MAX_DIFFERING};
use tokio::sync::Notify;

/// An agent reads its messages within milliseconds; the largest are some hundred bytes, but for
/// answers about digests.
const MAX_MESSAGES: usize = 1024;

/// Answers about digests that wait: 64 x 64 KiB.
const MAX_ANSWERS: usize = 64;

const _: () = assert!(crate::store::limits::MAX_DIFFERING <= MAX_DIFFERING);

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

    /// All digests up to `upto` are compared, and these extents differ. Joined to the answer
    /// before it when that still waits and has room; after too many unread ones the outbox closes
    /// itself.
    pub(crate) fn compared(&self, volume: VolumeId, upto: Lsn, differing: Vec<Extent>) {
        let mut waiting = self.lock();
        if waiting.closed {
            return;
        }
        let last = waiting.messages.iter_mut().rev().find(|m| volume_of(m) == Some(volume));
        match last {
            Some(FromTarget::Compared { upto: last, differing: all, .. })
                if all.len() + differing.len() <= MAX_DIFFERING =>
            {
                *last = upto;
                all.extend(differing);
            }
            _ => waiting.messages.push_back(FromTarget::Compared { volume, upto, differing }),
        }
        let answer = |m: &&FromTarget| matches!(m, FromTarget::Compared { .. });
        waiting.closed = waiting.messages.iter().filter(answer).count() > MAX_ANSWERS;
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
                let mut acks = std::mem::take(&mut waiting.acks);
                let mut out = Vec::with_capacity(waiting.messages.len() + acks.len());
                for message in waiting.messages.drain(..) {
                    // What was compared is durable: nobody hears of the answer first.
                    if let FromTarget::Compared { volume, .. } = &message {
                        out.extend(acks.remove_entry(volume).map(ack));
                    }
                    out.push(message);
                }
                out.extend(acks.into_iter().map(ack));
                if !out.is_empty() || waiting.closed {
                    return out;
                }
            }
            self.wake.notified().await;
        }
    }
}

fn ack((volume, (durable, chain)): (VolumeId, (Lsn, Chain))) -> FromTarget {
    FromTarget::Ack { volume, durable, chain }
}

/// The volume whose state a message is about.
fn volume_of(message: &FromTarget) -> Option<VolumeId> {
    match message {
        FromTarget::Opened(opened) => Some(opened.volume),
        FromTarget::Reopen { volume, .. } | FromTarget::Compared { volume, .. } => Some(*volume),
        FromTarget::Refused { volume, .. } => *volume,
        FromTarget::Ack { .. }
        | FromTarget::Policy { .. }
        | FromTarget::Replica { .. }
        | FromTarget::Tag { .. }
        | FromTarget::Welcome { .. }
        | FromTarget::Certificate { .. }
        | FromTarget::Pong(_) => None,
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

    #[tokio::test]
    async fn answers_about_digests_are_joined_and_follow_their_acknowledgement() {
        let outbox = Outbox::default();
        let volume = VolumeId::random();
        let at = |n| Lsn::new(Epoch::new(1), Seq::new(n));
        let extent = |n: u64| Extent::new(n * 4096, 4096).unwrap();
        outbox.compared(volume, at(1), vec![extent(1)]);
        outbox.compared(VolumeId::random(), at(9), vec![]);
        outbox.ack(volume, at(2), Chain::EMPTY);
        outbox.compared(volume, at(2), vec![extent(5)]);
        outbox.send(FromTarget::Reopen { volume, reason: String::new() });
        outbox.compared(volume, at(3), vec![]);
        let out = outbox.take().await;
        assert!(matches!(out[0], FromTarget::Ack { .. }));
        let joined =
            FromTarget::Compared { volume, upto: at(2), differing: vec![extent(1), extent(5)] };
        assert_eq!(out[1], joined);
        assert!(matches!(out[3], FromTarget::Reopen { .. }));
        assert_eq!(out[4], FromTarget::Compared { volume, upto: at(3), differing: vec![] });
    }

    #[tokio::test]
    async fn a_reader_that_stopped_ends_the_session_before_answers_fill_the_memory() {
        let outbox = Outbox::default();
        let volume = VolumeId::random();
        let many = vec![Extent::new(0, 4096).unwrap(); MAX_DIFFERING];
        for n in 1..1000 {
            outbox.compared(volume, Lsn::new(Epoch::new(1), Seq::new(n)), many.clone());
        }
        let out = outbox.take().await;
        assert_eq!(out.len(), MAX_ANSWERS + 1);
        assert!(outbox.take().await.is_empty(), "closed");
    }
}
