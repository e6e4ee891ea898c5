//! What a person is told when something cannot be done: one shape for every daemon and the
//! command line (design of the errors: what failed, on what, whether data is at risk, what next).

use core::fmt;

use serde::{Deserialize, Serialize};

/// Stable number of a cause, shown as `FS-4012`. `farshore explain` knows every one.
///
/// 1xxx usage and configuration · 2xxx source daemon and devices · 3xxx replication state ·
/// 4xxx refused by a safety check · 5xxx link, enrolment and certificates · 6xxx target store,
/// points and views.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Code(pub u16);

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FS-{:04}", self.0)
    }
}

/// A failure as a person needs it. Daemons send it over their control sockets unchanged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {what}")]
pub struct Problem {
    /// The cause.
    pub code: Code,
    /// What failed, on what, in one sentence without a full stop.
    pub what: String,
    /// Whether data is at risk; "none, nothing was changed" when it is not.
    pub risk: String,
    /// Why.
    pub why: String,
    /// What to do now.
    pub next: String,
}

impl Problem {
    /// A problem that changed nothing and risks nothing.
    #[must_use]
    pub fn harmless(
        code: u16,
        what: impl Into<String>,
        why: impl Into<String>,
        next: impl Into<String>,
    ) -> Self {
        Self {
            code: Code(code),
            what: what.into(),
            risk: "none, nothing was changed".into(),
            why: why.into(),
            next: next.into(),
        }
    }

    /// The same problem with another statement about the risk.
    #[must_use]
    pub fn with_risk(mut self, risk: impl Into<String>) -> Self {
        self.risk = risk.into();
        self
    }
}
