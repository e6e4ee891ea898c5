//! `farshore check`: the answer for a monitoring system. It alone uses the plug-in exit codes
//! 0 ok, 1 warning, 2 critical, 3 unknown.

use std::time::Duration;

use clap::Args;
use farshore_extent::{PairState, VolumeName, WallTime};

use crate::args::{Global, interval, volume_name};
use crate::exit::{Exit, Failure};
use crate::output::Out;
use crate::status::{Row, Sides, StatusReport, merge};
use crate::units::{self, Interval};

/// Options of `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Critical when the newest point is older
    #[arg(long, value_name = "TIME", value_parser = interval)]
    rpo: Interval,
    /// Only these volumes
    #[arg(value_parser = volume_name)]
    volumes: Vec<VolumeName>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Grade {
    Ok,
    Warning,
    Critical,
    Unknown,
}

impl Grade {
    const fn word(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Warning => "WARNING",
            Self::Critical => "CRITICAL",
            Self::Unknown => "UNKNOWN",
        }
    }

    const fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Warning => 1,
            Self::Critical => 2,
            Self::Unknown => 3,
        }
    }
}

/// `farshore check`.
pub fn run(args: &CheckArgs, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let (grade, line) = match Sides::ask(&global.paths()) {
        Ok(sides) => judge(&merge(&sides, WallTime::now()), args.rpo.0, &args.volumes),
        Err(problem) => (Grade::Unknown, problem.to_string()),
    };
    if out.json {
        let verdict = serde_json::json!({"grade": grade.word(), "text": line});
        out.document("farshore.check/1", "check", &verdict);
    } else {
        out.line(format!("FARSHORE {} - {line}", grade.word()));
    }
    Ok(Exit::Plugin(grade.code()))
}

fn grade(row: &Row, limit: Duration) -> Grade {
    let old = row.rpo_ms.is_none_or(|ms| u128::from(ms) > limit.as_millis());
    match row.state {
        PairState::Broken | PairState::Unprotected => Grade::Critical,
        _ if old => Grade::Critical,
        PairState::Protected | PairState::FailedOverPending | PairState::FailedOverCommitted => {
            Grade::Ok
        }
        PairState::InitialSync
        | PairState::Lagging
        | PairState::CatchUp
        | PairState::Resync
        | PairState::Paused
        | PairState::Reversing => Grade::Warning,
    }
}

fn judge(report: &StatusReport, limit: Duration, only: &[VolumeName]) -> (Grade, String) {
    let wanted = |r: &&Row| only.is_empty() || only.contains(&r.volume);
    let rows: Vec<&Row> = report.volumes.iter().filter(wanted).collect();
    let absent: Vec<String> = only
        .iter()
        .filter(|name| !rows.iter().any(|r| r.volume == **name))
        .map(|name| format!("{name} is not protected"))
        .collect();
    if !absent.is_empty() {
        return (Grade::Critical, absent.join(", "));
    }
    let worst = rows.iter().map(|r| grade(r, limit)).max();
    let Some(worst) = worst else {
        return (Grade::Unknown, "nothing is protected".into());
    };
    let rpo = |r: &Row| r.rpo_ms.map_or("none".into(), |ms| units::span(Duration::from_millis(ms)));
    let words: Vec<_> =
        rows.iter().map(|r| format!("{} {} rpo {}", r.volume, r.state.as_str(), rpo(r))).collect();
    let data: Vec<_> = rows
        .iter()
        .filter_map(|r| {
            let seconds = Duration::from_millis(r.rpo_ms?).as_secs_f64();
            Some(format!("{}={seconds:.3}s;;{};0", r.volume, limit.as_secs_f64()))
        })
        .collect();
    (worst, format!("{} | {}", words.join(", "), data.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests_data::{NOW, sides};

    #[test]
    fn the_worst_volume_decides_and_an_absent_one_is_critical() {
        let report = merge(&sides(), NOW);
        let judge = |seconds, only: &[&str]| {
            let only: Vec<_> = only.iter().map(|n| VolumeName::new(n).unwrap()).collect();
            judge(&report, Duration::from_secs(seconds), &only)
        };
        assert_eq!(judge(30, &["pgdata"]).0, Grade::Ok);
        assert_eq!(judge(1, &["pgdata"]).0, Grade::Critical);
        assert_eq!(judge(30, &["mail"]).0, Grade::Warning, "being compared");
        assert_eq!(judge(30, &[]).0, Grade::Critical, "files is 4 minutes behind");
        assert_eq!(judge(30, &["nosuch"]).0, Grade::Critical);
        let text = judge(30, &["pgdata"]).1;
        assert_eq!(text, "pgdata protected rpo 3.1s | pgdata=3.120s;;30;0");
    }

    #[test]
    fn silence_is_unknown_not_ok() {
        let empty = StatusReport { now: NOW, volumes: vec![], problems: vec![] };
        assert_eq!(judge(&empty, Duration::from_secs(30), &[]).0, Grade::Unknown);
    }
}
