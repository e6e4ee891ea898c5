//! When to try again after a failure: a pure function of the number of failures in a row.
//!
//! Owns no clock and no random source; both are handed in.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A random byte handed in by the driver, so that many hosts do not come back at the same instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Jitter(pub u8);

/// How literally failures are tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RetryPreset {
    /// 1 s, doubled up to 30 s, spread by a quarter in both directions.
    #[default]
    Fast,
    /// 1, 2, 4, 8 and 10 minutes, then every 30 minutes, to the letter (literal rule 3).
    Literal,
}

impl RetryPreset {
    const FAST_FIRST: Duration = Duration::from_secs(1);
    const FAST_LAST: Duration = Duration::from_secs(30);
    const LITERAL_MINUTES: [u64; 5] = [1, 2, 4, 8, 10];

    /// How long to wait after the `failures`-th failure in a row (the first is 1). Success resets
    /// the count; the caller keeps it.
    #[must_use]
    pub fn delay(self, failures: u32, jitter: Jitter) -> Duration {
        let steps = failures.saturating_sub(1);
        match self {
            Self::Fast => {
                let base = Self::FAST_FIRST.saturating_mul(1 << steps.min(16)).min(Self::FAST_LAST);
                // 3/4 .. 5/4 of the base.
                base * (3 * 256 + 2 * u32::from(jitter.0)) / (4 * 256)
            }
            Self::Literal => {
                let step = usize::try_from(steps).unwrap_or(usize::MAX);
                let minutes = Self::LITERAL_MINUTES.get(step).copied().unwrap_or(30);
                Duration::from_secs(minutes * 60)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_literal_preset_is_the_literal_rule() {
        let minutes: Vec<u64> =
            (1..=8).map(|n| RetryPreset::Literal.delay(n, Jitter(77)).as_secs() / 60).collect();
        assert_eq!(minutes, [1, 2, 4, 8, 10, 30, 30, 30]);
    }

    #[test]
    fn the_fast_preset_goes_from_one_second_to_thirty_and_never_overflows() {
        for failures in [0, 1, 2, 7, 31, 32, 33, u32::MAX] {
            for jitter in [0, 128, 255] {
                let delay = RetryPreset::Fast.delay(failures, Jitter(jitter));
                assert!(
                    delay >= Duration::from_millis(750) && delay <= Duration::from_millis(37_500)
                );
            }
        }
        assert!(RetryPreset::Fast.delay(1, Jitter(128)) < RetryPreset::Fast.delay(4, Jitter(128)));
    }
}
