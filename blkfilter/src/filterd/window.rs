//! Hours of the week, in the local zone of the host.

use std::fmt;
use std::str::FromStr;

use farshore_extent::WallTime;
use jiff::civil::{Date, DateTime, Time, Weekday};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};

const DAYS: [(&str, Weekday); 7] = [
    ("mon", Weekday::Monday),
    ("tue", Weekday::Tuesday),
    ("wed", Weekday::Wednesday),
    ("thu", Weekday::Thursday),
    ("fri", Weekday::Friday),
    ("sat", Weekday::Saturday),
    ("sun", Weekday::Sunday),
];

/// When something may start: `always`, or parts with commas between them. A part is a day
/// (`sat`), days (`sat-sun`), hours of every day (`18:00-08:00`, over midnight here), or hours of
/// days (`mon-fri 18:00-08:00`: those that begin on these days).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    text: String,
    parts: Vec<Part>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    /// Monday first.
    days: [bool; 7],
    from: Time,
    /// Not after `from`: of the next day.
    to: Time,
}

impl Window {
    /// Outside office hours.
    pub const DEFAULT: &str = "18:00-08:00, sat-sun";

    /// Whether it is open.
    pub(super) fn is_open(&self, now: WallTime) -> bool {
        local(now, &TimeZone::system()).is_none_or(|now| self.is_open_at(now))
    }

    /// When it opens next; now, when it is open.
    pub(super) fn opens(&self, now: WallTime) -> WallTime {
        let zone = TimeZone::system();
        let next = local(now, &zone).and_then(|at| self.opens_at(at));
        let stamp = next.and_then(|at| at.to_zoned(zone).ok()).map(|z| z.timestamp());
        stamp.and_then(wall).map_or(now, |opens| opens.max(now))
    }

    fn is_open_at(&self, now: DateTime) -> bool {
        self.parts.is_empty() || self.parts.iter().any(|part| part.holds(now))
    }

    fn opens_at(&self, now: DateTime) -> Option<DateTime> {
        if self.is_open_at(now) {
            return Some(now);
        }
        let days = (0..8).filter_map(|n| now.date().checked_add(n.days()).ok());
        let starts = days.flat_map(|day| self.parts.iter().filter_map(move |part| part.start(day)));
        starts.filter(|start| *start > now).min()
    }
}

impl Default for Window {
    fn default() -> Self {
        Self::DEFAULT.parse().unwrap_or(Self { text: "always".into(), parts: Vec::new() })
    }
}

impl Part {
    fn is_of(&self, date: Date) -> bool {
        self.days.get(usize::from(date.weekday().to_monday_zero_offset().unsigned_abs()))
            == Some(&true)
    }

    fn start(&self, date: Date) -> Option<DateTime> {
        self.is_of(date).then(|| date.to_datetime(self.from))
    }

    fn holds(&self, now: DateTime) -> bool {
        let (date, time) = (now.date(), now.time());
        let yesterday = date.yesterday();
        if self.from < self.to {
            return self.is_of(date) && (self.from..self.to).contains(&time);
        }
        let late = self.is_of(date) && time >= self.from;
        late || (time < self.to && yesterday.is_ok_and(|day| self.is_of(day)))
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Window {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = match text.trim() {
            "always" => Vec::new(),
            parts => parts.split(',').map(part).collect::<Result<_, _>>()?,
        };
        Ok(Self { text: text.trim().to_owned(), parts })
    }
}

fn part(text: &str) -> Result<Part, String> {
    let text = text.trim();
    let wrong = || {
        format!(
            "`{text}` is no part of a window: always, or such as 18:00-08:00, sat-sun, mon-fri 20:00-06:00"
        )
    };
    let (mut days, mut hours) = (None, None);
    for word in text.split_whitespace() {
        if word.contains(':') && hours.is_none() {
            let (from, to) = word.split_once('-').ok_or_else(wrong)?;
            hours = Some((time(from).ok_or_else(wrong)?, time(to).ok_or_else(wrong)?));
        } else if days.is_none() && hours.is_none() {
            days = Some(day_range(word).ok_or_else(wrong)?);
        } else {
            return Err(wrong());
        }
    }
    // A whole day ends where the next begins.
    let (from, to) = match (hours, days) {
        (Some((from, to)), _) if from != to => (from, to),
        (None, Some(_)) => (Time::midnight(), Time::midnight()),
        _ => return Err(wrong()),
    };
    Ok(Part { days: days.unwrap_or([true; 7]), from, to })
}

fn time(text: &str) -> Option<Time> {
    match text {
        "24:00" => Some(Time::midnight()),
        text => Time::strptime("%H:%M", text).ok(),
    }
}

fn day_range(text: &str) -> Option<[bool; 7]> {
    let day = |word: &str| DAYS.iter().position(|(name, _)| name.eq_ignore_ascii_case(word));
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (mut at, last) = (day(first)?, day(last)?);
    let mut days = [false; 7];
    loop {
        days[at] = true;
        if at == last {
            return Some(days);
        }
        at = (at + 1) % 7;
    }
}

fn local(time: WallTime, zone: &TimeZone) -> Option<DateTime> {
    let stamp = Timestamp::from_nanosecond(i128::from(time.nanos())).ok()?;
    Some(stamp.to_zoned(zone.clone()).datetime())
}

fn wall(stamp: Timestamp) -> Option<WallTime> {
    i64::try_from(stamp.as_nanosecond()).ok().map(WallTime::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime {
        text.parse().unwrap()
    }

    #[test]
    fn the_default_is_outside_office_hours() {
        let window = Window::default();
        assert_eq!(window.to_string(), Window::DEFAULT);
        // 2026-11-20 is a Friday.
        for (time, open, next) in [
            ("2026-11-20T07:59:59", true, "2026-11-20T07:59:59"),
            ("2026-11-20T08:00:00", false, "2026-11-20T18:00:00"),
            ("2026-11-20T17:59:59", false, "2026-11-20T18:00:00"),
            ("2026-11-20T18:00:00", true, "2026-11-20T18:00:00"),
            ("2026-11-21T12:00:00", true, "2026-11-21T12:00:00"),
            ("2026-11-22T23:30:00", true, "2026-11-22T23:30:00"),
            ("2026-11-23T07:00:00", true, "2026-11-23T07:00:00"),
            ("2026-11-23T09:00:00", false, "2026-11-23T18:00:00"),
        ] {
            assert_eq!(window.is_open_at(at(time)), open, "{time}");
            assert_eq!(window.opens_at(at(time)), Some(at(next)), "{time}");
        }
    }

    #[test]
    fn hours_over_midnight_belong_to_the_day_on_which_they_begin() {
        let window: Window = "fri 22:00-04:00, sun-mon 10:00-24:00".parse().unwrap();
        let open = |time| window.is_open_at(at(time));
        assert!(open("2026-11-20T23:00:00") && open("2026-11-21T03:59:00"));
        assert!(!open("2026-11-20T03:00:00") && !open("2026-11-21T04:00:00"));
        assert!(open("2026-11-22T23:59:00") && open("2026-11-23T10:00:00"));
        assert!(!open("2026-11-24T00:00:00") && !open("2026-11-24T12:00:00"));
        let next = window.opens_at(at("2026-11-24T00:00:00"));
        assert_eq!(next, Some(at("2026-11-27T22:00:00")));
    }

    #[test]
    fn always_is_always_and_nonsense_is_refused() {
        let window: Window = "always".parse().unwrap();
        assert!(window.is_open_at(at("2026-11-20T12:00:00")));
        for bad in [
            "",
            "18:00",
            "18:00-18:00",
            "25:00-01:00",
            "sat-funday",
            "18:00-08:00 sat",
            "never",
            "sat,",
        ] {
            assert!(bad.parse::<Window>().is_err(), "{bad}");
        }
    }
}
