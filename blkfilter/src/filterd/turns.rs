//! One at a time for each volume: whoever attaches, takes away or changes a volume has its turn.
//! Work on other volumes is not held up by it.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use farshore_extent::VolumeName;

/// The turns that are taken, and since when.
#[derive(Debug, Default)]
pub(super) struct Turns {
    taken: Mutex<BTreeMap<VolumeName, Instant>>,
    given_back: Condvar,
}

/// Somebody's turn with a volume, until dropped.
#[derive(Debug)]
pub(super) struct Turn {
    turns: Arc<Turns>,
    name: VolumeName,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.lock().remove(&self.name);
        self.turns.given_back.notify_all();
    }
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<VolumeName, Instant>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner) // plain data
    }

    /// The turn with a volume, waited for for at most `limit`; `None`: somebody else has it still.
    pub(super) fn take(self: &Arc<Self>, name: &VolumeName, limit: Duration) -> Option<Turn> {
        let taken =
            self.given_back.wait_timeout_while(self.lock(), limit, |t| t.contains_key(name));
        let mut taken = taken.unwrap_or_else(PoisonError::into_inner).0;
        if taken.contains_key(name) {
            return None;
        }
        taken.insert(name.clone(), Instant::now());
        Some(Turn { turns: Arc::clone(self), name: name.clone() })
    }

    /// Waits until nobody has a turn. False: somebody has after `limit`.
    pub(super) fn wait_all(&self, limit: Duration) -> bool {
        let taken = self.given_back.wait_timeout_while(self.lock(), limit, |t| !t.is_empty());
        taken.unwrap_or_else(PoisonError::into_inner).0.is_empty()
    }

    /// How many turns were taken less than `age` ago.
    pub(super) fn younger_than(&self, age: Duration) -> usize {
        self.lock().values().filter(|since| since.elapsed() < age).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_one_persons_at_a_time_and_others_are_free() {
        let turns = Arc::<Turns>::default();
        let (one, two) = (VolumeName::new("one").unwrap(), VolumeName::new("two").unwrap());
        let first = turns.take(&one, Duration::ZERO).unwrap();
        assert!(turns.take(&one, Duration::ZERO).is_none());
        let second = turns.take(&two, Duration::ZERO).unwrap();
        assert_eq!(turns.younger_than(Duration::from_secs(600)), 2);
        assert_eq!(turns.younger_than(Duration::ZERO), 0);
        assert!(!turns.wait_all(Duration::ZERO));
        let waiter = std::thread::spawn({
            let (turns, one) = (Arc::clone(&turns), one.clone());
            move || turns.take(&one, Duration::from_secs(60)).is_some()
        });
        drop(first);
        assert!(waiter.join().unwrap(), "it waits for its turn");
        drop(second);
        assert!(turns.wait_all(Duration::from_secs(60)));
    }
}
