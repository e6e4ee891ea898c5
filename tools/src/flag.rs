//! Something that happens once, and waiting for it with a time limit: how loops pause and stop.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Not set, until it is. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Flag(Arc<(Mutex<bool>, Condvar)>);

impl Flag {
    /// Sets it and wakes everyone.
    pub fn set(&self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.1.notify_all();
    }

    /// Whether it is set.
    #[must_use]
    pub fn is_set(&self) -> bool {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it is set, at most `limit`; whether it is.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut set = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        while !*set {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.0.1.wait_timeout(set, left);
            set = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiter_is_woken_long_before_its_limit() {
        let flag = Flag::default();
        assert!(!flag.wait(Duration::from_millis(1)));
        let other = flag.clone();
        let thread = std::thread::spawn(move || other.wait(Duration::from_secs(60)));
        flag.set();
        assert!(thread.join().unwrap());
    }
}
