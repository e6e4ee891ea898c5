//! The throttle, off unless configured: while a pool is nearly full, answers to writes are held back
//! for a moment, so that a writer that is a little too fast does not cost its volume the order.
//!
//! From three quarters of the pool on the delay grows with what is used, up to its limit. It is for
//! each answer by itself: nothing waits for the replica, and a full pool loses order as ever.

use std::collections::BTreeMap;

use super::event::{Action, QueueId, Token};
use crate::device::DeviceError;

type Result = std::result::Result<(), DeviceError>;

/// Answers that are held back, by the time when they are given.
#[derive(Debug, Default)]
pub(super) struct Brake {
    waiting: BTreeMap<(u64, u64), (QueueId, Token, Result)>,
    held: u64,
}

/// For how many milliseconds an answer is held back; 0 is not at all.
pub(super) fn delay_ms(longest_ms: u64, used: u64, capacity: u64) -> u64 {
    let start = capacity - capacity / 4;
    let Some(over) = used.checked_sub(start).filter(|_| longest_ms > 0) else { return 0 };
    let share = u128::from(longest_ms) * u128::from(over) / u128::from(capacity / 4).max(1);
    u64::try_from(share).unwrap_or(longest_ms).clamp(1, longest_ms)
}

impl Brake {
    pub(super) fn hold(&mut self, until_ms: u64, queue: QueueId, token: Token, result: Result) {
        self.held += 1;
        self.waiting.insert((until_ms, self.held), (queue, token, result));
    }

    /// Gives the answers whose time has come.
    pub(super) fn expire(&mut self, mono_ms: u64, out: &mut Vec<Action>) {
        while let Some(first) = self.waiting.first_entry().filter(|e| e.key().0 <= mono_ms) {
            let (queue, token, result) = first.remove();
            out.push(Action::Answer { queue, token, result });
        }
    }

    pub(super) fn deadline_ms(&self) -> Option<u64> {
        self.waiting.first_key_value().map(|((until, _), _)| *until)
    }
}
