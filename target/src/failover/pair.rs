//! Where a volume and its replica stand: the durable state of a failover, and how it goes on.
//!
//! Pure. Each change is durable before the next piece of work begins, and each piece of work can be
//! done again: whatever a crash leaves is gone on with from the row alone. The order is the promise:
//! a source is refused from the moment the row says so, a generation is raised on disk before
//! anything is opened, and what was opened is closed before a source is taken back.

use farshore_extent::{Generation, Lsn, PointId, ViewId, WallTime};
use farshore_protocol::failover::{FailoverPhase as Phase, JobKind};
use serde::{Deserialize, Serialize};

use crate::session::verdict::FIRST_GENERATION;

/// A point that is open for writing, or is to be.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Opening {
    /// The view, named before it is opened, so that it is found again after a crash.
    pub view: ViewId,
    /// The place.
    pub lsn: Lsn,
    /// Its capture time.
    pub time: WallTime,
    /// The point, when it is one.
    pub point: Option<PointId>,
    /// It is also a block device.
    pub device: bool,
    /// It is also served here, with TLS.
    pub tls_listen: Option<String>,
}

/// The row of a volume that was failed over at least once.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pair {
    /// Where it is.
    pub phase: Phase,
    /// What the store must have at least. Raised there before anything is opened.
    pub generation: Generation,
    /// The oldest generation whose sources hold the same history, and are taken back when the
    /// phase is [`Phase::Source`].
    pub admits: Generation,
    /// What may be open for writing.
    pub open: Option<Opening>,
    /// What is to be opened.
    pub next: Option<Opening>,
    /// Since when the source is fenced, or the end of that.
    pub since: WallTime,
}

/// The next piece of work. Doing it twice is doing it once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Todo {
    /// None: it rests.
    Rest,
    /// Raise the generation of the store, durably.
    Raise(Generation),
    /// Open this for writing, unless it is open.
    Open(Opening),
    /// Close this view with what was written to it, unless it is closed.
    Close(ViewId),
}

impl Todo {
    /// As the step of a job.
    #[must_use]
    pub const fn step(&self) -> &'static str {
        match self {
            Self::Rest => "done",
            Self::Raise(_) => "raise the generation",
            Self::Open(_) => "open the point",
            Self::Close(_) => "close the view",
        }
    }
}

impl Pair {
    /// A volume whose replica was never failed over.
    #[must_use]
    pub const fn new(generation: Generation) -> Self {
        Self {
            phase: Phase::Source,
            generation,
            admits: generation,
            open: None,
            next: None,
            since: WallTime::from_nanos(0),
        }
    }

    /// The row with which a failover to `next` begins, and what that is. None: not from this phase.
    /// Each begins with a generation of its own, which tells what a person had seen who asks for it.
    #[must_use]
    pub fn fail_over(&self, next: Opening, now: WallTime) -> Option<(JobKind, Self)> {
        let (kind, phase, since) = match self.phase {
            Phase::Source => (JobKind::Failover, Phase::Fencing, now),
            Phase::Opening | Phase::Pending => (JobKind::ChangePoint, Phase::Changing, self.since),
            Phase::Fencing | Phase::Changing | Phase::Cancelling => return None,
        };
        let generation = self.generation.next();
        Some((kind, Self { phase, generation, next: Some(next), since, ..self.clone() }))
    }

    /// The row with which the source is taken back. The generation rises once more: nothing that
    /// was made under the failover is ever taken for the source's.
    #[must_use]
    pub fn cancel(&self) -> Option<(JobKind, Self)> {
        match self.phase {
            Phase::Opening | Phase::Pending => {
                let generation = self.generation.next();
                let row = Self { phase: Phase::Cancelling, generation, ..self.clone() };
                Some((JobKind::CancelFailover, row))
            }
            Phase::Source | Phase::Fencing | Phase::Changing | Phase::Cancelling => None,
        }
    }

    /// What is to be done now.
    #[must_use]
    pub fn todo(&self) -> Todo {
        match (self.phase, &self.open) {
            (Phase::Source | Phase::Pending, _) | (Phase::Opening, None) => Todo::Rest,
            (Phase::Opening, Some(open)) => Todo::Open(open.clone()),
            (Phase::Changing | Phase::Cancelling, Some(open)) => Todo::Close(open.view),
            (Phase::Fencing, _) | (Phase::Changing | Phase::Cancelling, None) => {
                Todo::Raise(self.generation)
            }
        }
    }

    /// The row after what is to be done was done.
    #[must_use]
    pub fn done(&self, now: WallTime) -> Self {
        let row = self.clone();
        match (self.phase, &self.open) {
            (Phase::Source | Phase::Pending, _) | (Phase::Opening, None) => row,
            (Phase::Opening, Some(_)) => Self { phase: Phase::Pending, ..row },
            (Phase::Changing | Phase::Cancelling, Some(_)) => Self { open: None, ..row },
            (Phase::Fencing, _) | (Phase::Changing, None) => {
                Self { phase: Phase::Opening, open: row.next, next: None, ..self.clone() }
            }
            (Phase::Cancelling, None) => Self { phase: Phase::Source, since: now, ..row },
        }
    }

    /// The row after what is to be done could not be done: back to where it began when nothing was
    /// changed, else where it rests safely. Never to an open view and a source at once.
    #[must_use]
    pub fn failed(&self, now: WallTime) -> Self {
        let row = Self { next: None, ..self.clone() };
        match (self.phase, &self.open) {
            // Perhaps the store has it already, perhaps not: a source that comes is taken back.
            (Phase::Fencing, _) => Self { phase: Phase::Source, since: now, ..row },
            // Fenced, and nothing is open.
            (Phase::Opening, _) => Self { open: None, ..row },
            (Phase::Changing | Phase::Cancelling, Some(_)) => Self { phase: Phase::Pending, ..row },
            (Phase::Changing | Phase::Cancelling, None) => Self { phase: Phase::Opening, ..row },
            (Phase::Source | Phase::Pending, _) => row,
        }
    }

    /// The generation that the store was raised to already.
    #[must_use]
    pub fn raised(&self) -> Generation {
        match self.todo() {
            Todo::Raise(_) | Todo::Close(_) => Generation::ZERO,
            Todo::Rest | Todo::Open(_) => self.generation,
        }
    }

    /// Whether sources are refused whatever they are.
    #[must_use]
    pub fn fences(&self) -> bool {
        self.phase != Phase::Source
    }

    /// The generation that counts for a source of generation `theirs`, when the store has `own`: a
    /// source of before a failover that was cancelled is one of now.
    #[must_use]
    pub fn taken_for(&self, theirs: Generation, own: Generation) -> Generation {
        let never_opened = theirs == Generation::ZERO && self.admits <= FIRST_GENERATION;
        let same_line = theirs >= self.admits || never_opened;
        if same_line && theirs < own && !self.fences() { own } else { theirs }
    }
}

#[cfg(test)]
mod explorer;
#[cfg(test)]
mod tests;
