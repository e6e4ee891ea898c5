//! One line of the report.

use farshore_extent::{Code, Problem};
use serde::Serialize;

/// How a prerequisite stands, the worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// As it should be.
    Ok,
    /// This user, or this moment, does not show it.
    Unseen,
    /// It works, with a loss that the text names.
    Warning,
    /// Something does not work, or data is less safe than it looks.
    Problem,
}

impl State {
    /// First column.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Unseen => "unseen",
            Self::Warning => "warning",
            Self::Problem => "problem",
        }
    }
}

/// What a line is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Area {
    /// This machine, whatever its roles.
    Host,
    /// filterd and the agent.
    Source,
    /// The target daemon.
    Target,
}

impl Area {
    /// Heading of its lines.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Host => "this host",
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

/// A prerequisite and how it stands. Every finding that is not ok has a fix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it belongs to.
    pub area: Area,
    /// The prerequisite, in one or two words.
    pub check: String,
    /// How it stands.
    pub state: State,
    /// What was seen, and what it means when it is not ok.
    pub text: String,
    /// A command to paste, or a comment in shell syntax; none only when it is ok.
    pub fix: Option<String>,
    /// Code of the problem behind it, for `farshore explain`.
    pub code: Option<Code>,
    /// What was seen in full, for support.
    pub details: Vec<String>,
}

impl Finding {
    fn new(check: &str, state: State, text: String, fix: Option<String>) -> Self {
        let check = check.to_owned();
        Self { area: Area::Host, check, state, text, fix, code: None, details: Vec::new() }
    }

    /// All is well.
    pub fn ok(check: &str, text: impl Into<String>) -> Self {
        Self::new(check, State::Ok, text.into(), None)
    }

    /// It could not be looked at; `fix` shows how it can.
    pub fn unseen(check: &str, text: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(check, State::Unseen, text.into(), Some(fix.into()))
    }

    /// It works, with a loss.
    pub fn warning(check: &str, text: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(check, State::Warning, text.into(), Some(fix.into()))
    }

    /// It does not work.
    pub fn problem(check: &str, text: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(check, State::Problem, text.into(), Some(fix.into()))
    }

    /// What a daemon or a file said of itself. FS-4901 means that this user may not ask.
    pub fn said(check: &str, problem: &Problem) -> Self {
        let text = format!("{}: {}", problem.what, problem.why);
        let found = if problem.code.0 == 4901 {
            Self::unseen(check, text, "sudo farshore doctor")
        } else {
            Self::problem(check, text, format!("# {}", problem.next))
        };
        Self { code: Some(problem.code), ..found }
    }

    /// The same with everything that was seen.
    pub fn with_details(mut self, details: Vec<String>) -> Self {
        self.details = details;
        self
    }

    /// The same, belonging to `area`.
    pub fn of(mut self, area: Area) -> Self {
        self.area = area;
        self
    }
}
