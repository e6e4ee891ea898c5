//! `--start-at`: when a first copy starts, in steps of half an hour.

use farshore_extent::{Problem, WallTime};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan, Zoned};

use crate::units;

/// Steps in minutes, of the local clock.
const STEP: i8 = 30;

/// A start time typed by a person: `now`, `22:30` (the next one), or with its date.
/// `None`: at once.
///
/// # Errors
/// FS-1911, naming the nearest times that can be given.
pub fn parse(text: &str, now: WallTime, zone: &TimeZone) -> Result<Option<WallTime>, Problem> {
    let text = text.trim();
    if text == "now" {
        return Ok(None);
    }
    let refused = |why: String, next: String| {
        Problem::harmless(1911, format!("a copy cannot start at `{text}`"), why, next)
    };
    let usual = || "give now, 22:30, or \"2026-12-31 22:30\"".to_owned();
    let unknown = || refused("this is no time".into(), usual());
    if text.ends_with("ago") {
        return Err(unknown());
    }
    let given = units::parse_instant(text, now, zone).ok_or_else(unknown)?;
    let mut start = zoned(given, zone).ok_or_else(unknown)?;
    if given < now && !text.contains('-') {
        start = start.checked_add(1.day()).map_err(|_| unknown())?;
    }
    let (before, after) = nearest(&start).ok_or_else(unknown)?;
    if before != start {
        let show = |time: &Zoned| time.strftime("%Y-%m-%d %H:%M").to_string();
        let next = format!("give \"{}\" or \"{}\"", show(&before), show(&after));
        return Err(refused("times have steps of 30 minutes".into(), next));
    }
    let start = wall(&start).ok_or_else(unknown)?;
    if start < now {
        return Err(refused("it is past".into(), usual()));
    }
    Ok(Some(start))
}

/// The steps at or before, and after.
fn nearest(time: &Zoned) -> Option<(Zoned, Zoned)> {
    let minute = time.minute() - time.minute() % STEP;
    let before = time.with().minute(minute).second(0).subsec_nanosecond(0).build().ok()?;
    let after = before.checked_add(i64::from(STEP).minutes()).ok()?;
    Some((before, after))
}

fn zoned(time: WallTime, zone: &TimeZone) -> Option<Zoned> {
    let stamp = Timestamp::from_nanosecond(i128::from(time.nanos())).ok()?;
    Some(stamp.to_zoned(zone.clone()))
}

fn wall(time: &Zoned) -> Option<WallTime> {
    i64::try_from(time.timestamp().as_nanosecond()).ok().map(WallTime::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-21 10:14:00 in the zone of the tests.
    const NOW: WallTime = WallTime::from_nanos(1_795_252_440_000_000_000);

    fn parse_here(text: &str) -> Result<Option<String>, Problem> {
        let zone = TimeZone::fixed(jiff::tz::offset(1));
        let shown = |time| zoned(time, &zone).unwrap().strftime("%Y-%m-%d %H:%M:%S").to_string();
        Ok(parse(text, NOW, &zone)?.map(shown))
    }

    #[test]
    fn half_hours_are_taken_today_or_tomorrow() {
        for (text, start) in [
            ("22:30", "2026-11-21 22:30:00"),
            ("10:30", "2026-11-21 10:30:00"),
            ("10:00", "2026-11-22 10:00:00"),
            ("2026-12-31 23:00", "2026-12-31 23:00:00"),
            ("2026-11-21T21:30:00Z", "2026-11-21 22:30:00"),
        ] {
            assert_eq!(parse_here(text).unwrap().as_deref(), Some(start), "{text}");
        }
        assert_eq!(parse_here("now").unwrap(), None);
    }

    #[test]
    fn other_minutes_are_refused_with_the_two_nearest_times() {
        for (text, before, after) in [
            ("22:40", "2026-11-21 22:30", "2026-11-21 23:00"),
            ("23:59:30", "2026-11-21 23:30", "2026-11-22 00:00"),
            ("10:10", "2026-11-22 10:00", "2026-11-22 10:30"),
        ] {
            let problem = parse_here(text).unwrap_err();
            assert_eq!(problem.code.0, 1911);
            assert_eq!(problem.next, format!("give \"{before}\" or \"{after}\""), "{text}");
        }
    }

    #[test]
    fn what_is_past_or_no_time_is_refused() {
        for text in ["2026-11-20 10:00", "tomorrow", "1h ago", "", "25:00"] {
            assert_eq!(parse_here(text).unwrap_err().code.0, 1911, "{text}");
        }
    }
}
