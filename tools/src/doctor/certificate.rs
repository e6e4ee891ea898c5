//! Validity of certificates.

use farshore_extent::WallTime;

use super::finding::Finding;
use crate::units;

/// A certificate as the check sees it.
pub struct Certificate<'a> {
    /// The line's name.
    pub check: &'a str,
    /// First and last second, since 1970.
    pub validity: (i64, i64),
    /// Seconds before the end at which it should have been renewed by itself.
    pub renewed: i64,
    /// What renews it.
    pub fix: &'a str,
}

/// How long it is still valid.
pub fn valid(certificate: &Certificate<'_>, now: WallTime) -> Finding {
    let Certificate { check, validity: (from, to), renewed, fix } = *certificate;
    let now = now.nanos() / 1_000_000_000;
    let day = |seconds: i64| {
        let text = units::rfc3339(WallTime::from_nanos(seconds.saturating_mul(1_000_000_000)));
        text.chars().take(10).collect::<String>()
    };
    let (first, last) = (day(from), day(to));
    if now < from {
        let text = format!("valid only from {first} on: a clock is wrong, here or at the target");
        return Finding::problem(check, text, "timedatectl set-ntp true");
    }
    if now >= to {
        return Finding::problem(check, format!("ended on {last}: connections are refused"), fix);
    }
    let left = (to - now) / 86_400;
    if now >= to - renewed {
        let text = format!("ends on {last} (in {left} days) and was not renewed by itself");
        return Finding::warning(check, text, fix);
    }
    Finding::ok(check, format!("valid until {last} ({left} days)"))
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::*;

    #[test]
    fn a_certificate_is_judged_by_what_is_left_of_it() {
        const DAY: i64 = 86_400;
        let certificate =
            Certificate { check: "c", validity: (0, 90 * DAY), renewed: 30 * DAY, fix: "renew" };
        let at = |day: i64| valid(&certificate, WallTime::from_nanos(day * DAY * 1_000_000_000));
        assert_eq!(at(-1).state, State::Problem);
        assert_eq!(at(1).text, "valid until 1970-04-01 (89 days)");
        assert_eq!(at(60).state, State::Warning);
        assert_eq!((at(90).state, at(90).fix.as_deref()), (State::Problem, Some("renew")));
    }
}
