//! Wall time as people write it, which orders nothing, and the clock of retention.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use farshore_extent::WallTime;

use crate::catalogue::Age;

/// The clock of retention goes on by at most so much at once. It is looked at every ten seconds or
/// more often; only a clock that jumped (a machine that stood still) ever has more to tell.
const LARGEST_STEP: Duration = Duration::from_secs(60);

/// `2026-11-21 10:14:05.123 UTC`.
pub(crate) fn show(time: WallTime) -> String {
    match jiff::Timestamp::from_nanosecond(i128::from(time.nanos())) {
        Ok(stamp) => stamp.strftime("%Y-%m-%d %H:%M:%S%.3f UTC").to_string(),
        Err(_) => format!("{} ns", time.nanos()),
    }
}

/// The clock of retention: see [`Age`].
pub(crate) struct AgeClock(Mutex<Reading>);

struct Reading {
    /// How long daemons have been running on this catalogue.
    age: Duration,
    at: Instant,
}

impl AgeClock {
    pub(crate) fn starting_at(age: Age) -> Self {
        Self(Mutex::new(Reading { age: Duration::from_millis(age.0), at: Instant::now() }))
    }

    /// How long daemons have been running on this catalogue.
    pub(crate) fn now(&self) -> Age {
        let mut reading = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        reading.age = older(reading.age, now.saturating_duration_since(reading.at));
        reading.at = now;
        Age(u64::try_from(reading.age.as_millis()).unwrap_or(u64::MAX))
    }
}

/// Design 04 rule 9: a jump forward expires at most one interval.
fn older(age: Duration, elapsed: Duration) -> Duration {
    age.saturating_add(elapsed.min(LARGEST_STEP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_of_retention_goes_on_where_it_was_and_never_back() {
        let clock = AgeClock::starting_at(Age(5_000));
        let first = clock.now();
        let second = clock.now();
        assert!(Age(5_000) <= first && first <= second && second < Age(65_000));
    }

    #[test]
    fn a_jump_forward_is_one_step() {
        let age = Duration::from_secs(100);
        assert_eq!(older(age, Duration::from_secs(10)), Duration::from_secs(110));
        assert_eq!(older(age, Duration::from_secs(30 * 86_400)), age + LARGEST_STEP);
        assert_eq!(older(Duration::MAX, Duration::from_secs(1)), Duration::MAX);
    }
}
