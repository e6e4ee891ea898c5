//! Sizes, time spans and instants as people write and read them.

use core::fmt;
use core::str::FromStr;
use std::time::Duration;

use farshore_extent::WallTime;
use jiff::civil;
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};

/// Bytes with a binary unit: `2.1 MiB`, `0 B`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut scale: u64 = 1;
    while unit + 1 < UNITS.len() && n / scale >= 1024 {
        scale *= 1024;
        unit += 1;
    }
    let (whole, rest) = (n / scale, n % scale);
    if unit == 0 || rest == 0 || whole >= 10 {
        return format!("{whole} {}", UNITS[unit]);
    }
    let tenth = u128::from(rest) * 10 / u128::from(scale);
    format!("{whole}.{tenth} {}", UNITS[unit])
}

/// `256MiB`, `1 GiB`, `4096`; units are binary, `K` and `KB` mean KiB.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size such as 256MiB");
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let n: u64 = digits.parse().map_err(|_| wrong())?;
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    n.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` is too large"))
}

/// A time span in the two largest units that matter: `0.3s`, `3.1s`, `4m12s`, `23h58m`, `2d`.
pub fn span(d: Duration) -> String {
    let s = d.as_secs();
    match s {
        0..10 => {
            let tenths = d.as_millis() / 100;
            format!("{}.{}s", tenths / 10, tenths % 10)
        }
        10..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86_400 => format!("{}h{:02}m", s / 3600, s / 60 % 60),
        _ => format!("{}d", s / 86_400),
    }
}

/// A short time span, to the millisecond below a second: `14 ms`, `3.1s`.
pub fn moment(d: Duration) -> String {
    if d.as_secs() == 0 { format!("{} ms", d.as_millis()) } else { span(d) }
}

/// A wanted time span without needless parts: `30s`, `5m`, `1h30m`, `250ms`.
pub fn wanted(d: Duration) -> String {
    let s = d.as_secs();
    if d.subsec_millis() != 0 {
        return if s == 0 {
            format!("{}ms", d.as_millis())
        } else {
            format!("{:.1}s", d.as_secs_f64())
        };
    }
    match (s / 3600, s / 60 % 60, s % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, 0) => format!("{m}m"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, 0, _) => format!("{h}h"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

/// A time span typed by a person; `off` is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval(pub Duration);

impl Interval {
    /// In milliseconds.
    pub fn millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }
}

impl FromStr for Interval {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a time span such as 30s, 5m, 1h30m or off");
        if matches!(text, "off" | "none" | "0") {
            return Ok(Self(Duration::ZERO));
        }
        let mut rest = text;
        let mut total = Duration::ZERO;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
            let n: u32 = rest[..digits].parse().map_err(|_| wrong())?;
            rest = &rest[digits..];
            let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
            let one = match &rest[..unit] {
                "ms" => Duration::from_millis(1),
                "s" | "sec" => Duration::from_secs(1),
                "m" | "min" => Duration::from_secs(60),
                "h" => Duration::from_secs(3600),
                "d" => Duration::from_secs(86_400),
                _ => return Err(wrong()),
            };
            total = one.checked_mul(n).and_then(|d| total.checked_add(d)).ok_or_else(wrong)?;
            rest = &rest[unit..];
        }
        if text.is_empty() { Err(wrong()) } else { Ok(Self(total)) }
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_zero() { f.pad("off") } else { f.pad(&wanted(self.0)) }
    }
}

fn zoned(time: WallTime, zone: &TimeZone) -> Option<Zoned> {
    let stamp = Timestamp::from_nanosecond(i128::from(time.nanos())).ok()?;
    Some(stamp.to_zoned(zone.clone()))
}

/// An instant in the local zone, to the millisecond.
pub fn instant(time: WallTime) -> String {
    zoned(time, &TimeZone::system())
        .map_or_else(|| "?".to_owned(), |z| z.strftime("%Y-%m-%d %H:%M:%S%.3f").to_string())
}

/// An instant in the local zone, to the minute.
pub fn instant_minute(time: WallTime) -> String {
    zoned(time, &TimeZone::system())
        .map_or_else(|| "?".to_owned(), |z| z.strftime("%Y-%m-%d %H:%M").to_string())
}

/// An instant as programs want it: RFC 3339 in UTC with nanoseconds.
pub fn rfc3339(time: WallTime) -> String {
    zoned(time, &TimeZone::UTC)
        .map_or_else(|| "?".to_owned(), |z| z.strftime("%Y-%m-%dT%H:%M:%S%.9fZ").to_string())
}

/// How long ago, seen from `now`.
pub fn ago(now: WallTime, time: WallTime) -> String {
    format!("{} ago", span(now.since(time)))
}

fn wall(stamp: Timestamp) -> Option<WallTime> {
    i64::try_from(stamp.as_nanosecond()).ok().map(WallTime::from_nanos)
}

/// An instant typed by a person: RFC 3339, `2026-11-21 10:14[:03.5]` or `10:14` in `zone`,
/// `5m ago`.
pub fn parse_instant(text: &str, now: WallTime, zone: &TimeZone) -> Option<WallTime> {
    let text = text.trim();
    if let Some(span) = text.strip_suffix("ago") {
        let Interval(back) = span.trim().parse().ok()?;
        let nanos = i64::try_from(back.as_nanos()).ok()?;
        return Some(WallTime::from_nanos(now.nanos().checked_sub(nanos)?));
    }
    if let Ok(stamp) = text.parse::<Timestamp>() {
        return wall(stamp);
    }
    if let Ok(zoned) = text.parse::<Zoned>() {
        return wall(zoned.timestamp());
    }
    let has_date = text.contains('-');
    let local = if has_date {
        text.parse::<civil::DateTime>().ok()?
    } else {
        zoned(now, zone)?.date().to_datetime(text.parse::<civil::Time>().ok()?)
    };
    wall(local.to_zoned(zone.clone()).ok()?.timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_like_sizes() {
        for (n, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (1024, "1 KiB"),
            (2_202_010, "2.1 MiB"),
            (256 << 20, "256 MiB"),
            (11 << 30, "11 GiB"),
            (3_650_722_202, "3.4 GiB"),
            (u64::MAX, "15 EiB"),
        ] {
            assert_eq!(bytes(n), text);
        }
        assert_eq!(parse_bytes("256MiB"), Ok(256 << 20));
        assert_eq!(parse_bytes("1 GiB"), Ok(1 << 30));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        for bad in ["", "MiB", "1XB", "99999999999999TiB", "-1"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn spans_read_like_spans() {
        let s = Duration::from_secs;
        for (d, text) in [
            (Duration::from_millis(3120), "3.1s"),
            (s(38), "38s"),
            (s(252), "4m12s"),
            (s(86_280), "23h58m"),
            (s(200_000), "2d"),
        ] {
            assert_eq!(span(d), text);
        }
        assert_eq!(moment(Duration::from_millis(14)), "14 ms");
        for (text, d) in [("30s", s(30)), ("5m", s(300)), ("1h30m", s(5400)), ("off", s(0))] {
            assert_eq!(text.parse::<Interval>(), Ok(Interval(d)), "{text}");
            assert_eq!(Interval(d).to_string(), text);
        }
        for bad in ["", "30", "s", "5x", "1h-2m", "99999999999d"] {
            assert!(bad.parse::<Interval>().is_err(), "{bad}");
        }
    }

    #[test]
    fn instants_are_read_in_the_local_zone_and_in_rfc_3339() {
        let zone = TimeZone::get("Europe/Berlin").unwrap_or(TimeZone::fixed(jiff::tz::offset(1)));
        let at = |text| parse_instant(text, WallTime::from_nanos(1_795_257_000_000_000_000), &zone);
        let expected = WallTime::from_nanos(1_795_252_440_000_000_000);
        for text in [
            "2026-11-21 10:14",
            "2026-11-21T10:14:00",
            "2026-11-21T09:14:00Z",
            "2026-11-21T10:14:00+01:00",
            "10:14",
            "1h16m ago",
        ] {
            assert_eq!(at(text), Some(expected), "{text}");
        }
        for bad in ["", "yesterday", "2026-13-01 10:00", "25:00", "ago"] {
            assert_eq!(at(bad), None, "{bad}");
        }
        assert_eq!(rfc3339(expected), "2026-11-21T09:14:00.000000000Z");
    }
}
