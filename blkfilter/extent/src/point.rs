//! Words for the state of capture, of a pair and of a recovery point.

use serde::{Deserialize, Serialize};

/// What a recovery point promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PointKind {
    /// What a power cut at that instant would have left.
    Crash,
    /// Cut while the application was quiet (hooks or a file system freeze).
    App,
    /// Consistent over all members of a group.
    Group,
}

/// Whether the records of a volume are complete and in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaptureOrder {
    /// Every write is in the log, in order: any place in it is consistent.
    Ordered,
    /// Some chunks are still to be sent; no point can be cut.
    CatchUp,
}

/// State of the pair of a protected volume and its replica, as people see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PairState {
    /// Not replicated.
    Unprotected,
    /// The first full copy is under way; no point yet.
    InitialSync,
    /// Ordered, and the lag is within its target.
    Protected,
    /// Ordered, but the lag is above its target or the link is down.
    Lagging,
    /// Order was lost; changed chunks are being sent.
    CatchUp,
    /// Compared with the replica; only differences are sent.
    Resync,
    /// Stopped by an operator.
    Paused,
    /// Needs an operator: diverged, refused or damaged.
    Broken,
    /// Failed over; the point can still be changed.
    FailedOverPending,
    /// Failed over and committed.
    FailedOverCommitted,
    /// Being sent the other way.
    Reversing,
}

impl PairState {
    /// The word shown in tables; equal to its form in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unprotected => "unprotected",
            Self::InitialSync => "initial-sync",
            Self::Protected => "protected",
            Self::Lagging => "lagging",
            Self::CatchUp => "catch-up",
            Self::Resync => "resync",
            Self::Paused => "paused",
            Self::Broken => "broken",
            Self::FailedOverPending => "failed-over-pending",
            Self::FailedOverCommitted => "failed-over-committed",
            Self::Reversing => "reversing",
        }
    }
}

impl PointKind {
    /// The word shown in tables; equal to its form in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::App => "app",
            Self::Group => "group",
        }
    }
}
