//! Rare things that must have happened at least once in a run of many seeds: a simulator that never
//! reaches them proves nothing about them.

use std::collections::BTreeMap;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Seen {
    Answered,
    BackingError,
    PoolFull,
    Copied,
    Asked,
    AnswersTaken,
    AnswersLost,
    FoundEqual,
    FoundDifferent,
    Verified,
    Grown,
    GrownInOrder,
    HoleFilled,
    Marker,
    NotOrdered,
    Held,
    HoldBroken,
    Recopy,
    SourceCrash,
    PowerCut,
    CrashBetweenMarkAndWrite,
    CrashAfterClear,
    CrashInBegin,
    TornIntentBlock,
    RegionCleared,
    CopiedInPart,
    IntentLost,
    IntentResumed,
    StoppedWithNothingLeft,
    StoppedWithRanges,
    AgentCrash,
    LinkCut,
    TargetCrash,
    CrashInCommit,
    CrashInRecovery,
    CrashInExpiry,
    CrashInMerge,
    RunMade,
    PointThroughRun,
    TornTailCut,
    SyncFailed,
    Resent,
    Repeated,
    PointChecked,
    MomentChecked,
    Expired,
    RotRefused,
    RotHarmless,
    PinnedView,
    Spooled,
    SpoolSent,
    SpoolFound,
    SpoolFailed,
    Merged,
    MergedSent,
    HostCrash,
    Drained,
}

impl Seen {
    pub const ALL: &[Self] = &[
        Self::Answered,
        Self::BackingError,
        Self::PoolFull,
        Self::Copied,
        Self::Asked,
        Self::AnswersTaken,
        Self::AnswersLost,
        Self::FoundEqual,
        Self::FoundDifferent,
        Self::Verified,
        Self::Grown,
        Self::GrownInOrder,
        Self::HoleFilled,
        Self::Marker,
        Self::NotOrdered,
        Self::Held,
        Self::HoldBroken,
        Self::Recopy,
        Self::SourceCrash,
        Self::PowerCut,
        Self::CrashBetweenMarkAndWrite,
        Self::CrashAfterClear,
        Self::CrashInBegin,
        Self::TornIntentBlock,
        Self::RegionCleared,
        Self::CopiedInPart,
        Self::IntentLost,
        Self::IntentResumed,
        Self::StoppedWithNothingLeft,
        Self::StoppedWithRanges,
        Self::AgentCrash,
        Self::LinkCut,
        Self::TargetCrash,
        Self::CrashInCommit,
        Self::CrashInRecovery,
        Self::CrashInExpiry,
        Self::CrashInMerge,
        Self::RunMade,
        Self::PointThroughRun,
        Self::TornTailCut,
        Self::SyncFailed,
        Self::Resent,
        Self::Repeated,
        Self::PointChecked,
        Self::MomentChecked,
        Self::Expired,
        Self::RotRefused,
        Self::RotHarmless,
        Self::PinnedView,
        Self::Spooled,
        Self::SpoolSent,
        Self::SpoolFound,
        Self::SpoolFailed,
        Self::Merged,
        Self::MergedSent,
        Self::HostCrash,
        Self::Drained,
    ];
}

/// How often each was seen.
#[derive(Debug, Clone, Default)]
pub struct Coverage(BTreeMap<Seen, u64>);

impl Coverage {
    pub fn saw(&mut self, what: Seen) {
        *self.0.entry(what).or_default() += 1;
    }

    pub fn add(&mut self, other: &Self) {
        for (what, n) in &other.0 {
            *self.0.entry(*what).or_default() += n;
        }
    }

    pub fn never(&self) -> Vec<Seen> {
        Seen::ALL.iter().copied().filter(|s| !self.0.contains_key(s)).collect()
    }
}

impl std::fmt::Display for Coverage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|(what, n)| write!(f, "{what:?} {n}  "))
    }
}
