//! Exit codes, and failures on their way to a person.

use std::process::ExitCode;

use farshore_extent::{Code, Problem};

use crate::explain;

/// How the program ends. A contract with scripts; `farshore check` alone uses other numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Ok,
    /// It failed.
    Failed,
    /// The command line or the configuration is wrong.
    Usage,
    /// What was named does not exist.
    NotFound,
    /// A safety check refused.
    Refused,
    /// A daemon or a host does not answer.
    Unreachable,
    /// Some of it was done.
    Partial,
    /// Ctrl-C.
    Interrupted,
    /// Code of a monitoring plug-in.
    Plugin(u8),
}

impl Exit {
    /// The number.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Refused => 4,
            Self::Unreachable => 5,
            Self::Partial => 6,
            Self::Interrupted => 130,
            Self::Plugin(code) => code,
        }
    }

    /// The exit code of a cause: what the catalogue says, or else its range.
    #[must_use]
    pub fn of(code: Code) -> Self {
        match explain::entry(code).and_then(|e| e.exit) {
            Some(1) => return Self::Failed,
            Some(2) => return Self::Usage,
            Some(3) => return Self::NotFound,
            Some(4) => return Self::Refused,
            Some(5) => return Self::Unreachable,
            // No entry says anything else; a test holds it.
            Some(_) | None => {}
        }
        match code.0 / 1000 {
            1 => Self::Usage,
            4 => Self::Refused,
            5 => Self::Unreachable,
            _ => Self::Failed,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.number())
    }
}

/// One or several problems that ended a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// At least one; the first decides the exit code (a preflight names everything that stands
    /// in the way).
    problems: Vec<Problem>,
    /// Causes below the first, shown with `-v`.
    pub chain: Vec<String>,
}

impl Failure {
    /// From a list; none when it is empty.
    #[must_use]
    pub fn from_list(problems: Vec<Problem>) -> Option<Self> {
        (!problems.is_empty()).then_some(Self { problems, chain: Vec::new() })
    }

    /// A problem with the error that caused it.
    #[must_use]
    pub fn caused(problem: Problem, cause: &(dyn std::error::Error + 'static)) -> Self {
        let causes = std::iter::successors(Some(cause), |e| e.source());
        let chain = causes.map(ToString::to_string).collect();
        Self { problems: vec![problem], chain }
    }

    /// All of them, the decisive one first.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// How the program ends.
    #[must_use]
    pub fn exit(&self) -> Exit {
        self.problems.first().map_or(Exit::Failed, |p| Exit::of(p.code))
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self { problems: vec![problem], chain: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_codes_decide_the_exit_code() {
        for (code, exit) in [
            (1001, 2),
            (2999, 1),
            (3999, 1),
            (4012, 4),
            (5001, 5),
            (6999, 1),
            (6990, 3),
            (4011, 3),
            (5202, 2),
        ] {
            assert_eq!(Exit::of(Code(code)).number(), exit, "{code}");
        }
        assert_eq!(Exit::Interrupted.number(), 130);
    }
}
