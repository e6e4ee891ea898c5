//! The numbers that order everything: epoch, sequence number, LSN, generation, chain; and wall
//! time, which orders nothing.

use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};

/// One run of `filterd` on a host. Raised durably at each start, so numbers never repeat.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Epoch(u64);

/// The host-wide counter within an epoch. The first number given out is 1.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Seq(u64);

/// Fencing number of a replica, raised at failover and reverse. A source with a lower one is
/// refused.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Generation(u64);

macro_rules! counter {
    ($name:ident) => {
        impl $name {
            /// Before the first.
            pub const ZERO: Self = Self(0);

            /// Wraps the raw number, as formats and tests need it.
            #[must_use]
            pub const fn new(n: u64) -> Self {
                Self(n)
            }

            /// The raw number, as formats store it.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The one after this.
            ///
            /// # Panics
            /// After 2^64 - 1 steps, which no machine reaches (500 years at 10^9 a second).
            #[must_use]
            pub const fn next(self) -> Self {
                match self.0.checked_add(1) {
                    Some(n) => Self(n),
                    None => panic!("a counter of the domain wrapped"),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}
counter!(Epoch);
counter!(Seq);
counter!(Generation);

/// A place in a change log: ordered, never reused. Written `epoch.seq`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn {
    /// The run of `filterd`; compares first.
    pub epoch: Epoch,
    /// The number within that run.
    pub seq: Seq,
}

impl Lsn {
    /// Before every record of every epoch.
    pub const ZERO: Self = Self { epoch: Epoch::ZERO, seq: Seq::ZERO };

    /// The place `seq` of `epoch`.
    #[must_use]
    pub const fn new(epoch: Epoch, seq: Seq) -> Self {
        Self { epoch, seq }
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.seq)
    }
}

impl FromStr for Lsn {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text
            .split_once('.')
            .and_then(|(e, s)| Some(Self::new(Epoch(e.parse().ok()?), Seq(s.parse().ok()?))));
        parsed.ok_or_else(|| format!("`{text}` is not a place in a change log such as 3.1042"))
    }
}

impl Serialize for Lsn {
    /// Text for people (JSON, TOML), two numbers for programs.
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        if to.is_human_readable() {
            to.collect_str(self)
        } else {
            (self.epoch, self.seq).serialize(to)
        }
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        if from.is_human_readable() {
            String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
        } else {
            <(Epoch, Seq)>::deserialize(from).map(|(epoch, seq)| Self { epoch, seq })
        }
    }
}

/// Running BLAKE3 hash over all batches of a change log, made by the source. Two logs with the
/// same chain at the same LSN hold the same history.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Chain([u8; 32]);

impl Chain {
    /// The chain of an empty log.
    pub const EMPTY: Self = Self([0; 32]);

    /// From its 32 bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its 32 bytes.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 32] {
        self.0
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chain({:02x}{:02x}{:02x}{:02x}..)", self.0[0], self.0[1], self.0[2], self.0[3])
    }
}

/// Wall clock time in nanoseconds since 1970-01-01 UTC. A label for people: order and expiry
/// never use it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct WallTime(i64);

impl WallTime {
    /// From nanoseconds since 1970.
    #[must_use]
    pub const fn from_nanos(nanos: i64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since 1970.
    #[must_use]
    pub const fn nanos(self) -> i64 {
        self.0
    }

    /// The machine's clock now. Cores never call this; drivers hand the time in.
    #[must_use]
    pub fn now() -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self(since.map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX)))
    }

    /// How long ago `earlier` was, seen from `self`; zero when the clock went back.
    #[must_use]
    pub fn since(self, earlier: Self) -> core::time::Duration {
        let nanos = self.0.saturating_sub(earlier.0);
        core::time::Duration::from_nanos(u64::try_from(nanos).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_lsn_orders_by_epoch_first_and_survives_text() {
        let old = Lsn::new(Epoch::new(1), Seq::new(900));
        let new = Lsn::new(Epoch::new(2), Seq::new(1));
        assert!(old < new && Lsn::ZERO < old);
        assert_eq!(new.to_string().parse::<Lsn>().unwrap(), new);
        assert!("12".parse::<Lsn>().is_err());
    }

    #[test]
    fn wall_time_never_runs_backwards_in_a_difference() {
        let (a, b) = (WallTime::from_nanos(5), WallTime::from_nanos(9));
        assert_eq!(b.since(a).as_nanos(), 4);
        assert_eq!(a.since(b).as_nanos(), 0);
    }
}
