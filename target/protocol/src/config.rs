//! What every configuration file shares: sizes and times with units, and errors that name the
//! line, the column and the key that was probably meant.
//!
//! Owns no settings and reads no files: callers hand in the text.

use core::fmt;
use core::str::FromStr;
use core::time::Duration;

use farshore_extent::Problem;
use serde::{Deserialize, Serialize};

/// The file is not TOML.
pub const CODE_SYNTAX: u16 = 1101;
/// A key nobody knows.
pub const CODE_UNKNOWN_KEY: u16 = 1102;
/// A value that its key cannot take, or a key that is missing.
pub const CODE_VALUE: u16 = 1103;

/// Units of sizes, largest first: name and bytes.
const SIZE_UNITS: &[(&str, u64)] = &[
    ("TiB", 1 << 40),
    ("TB", 1_000_000_000_000),
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("kB", 1_000),
    ("B", 1),
];

/// Units of times, largest first: name and milliseconds.
const TIME_UNITS: &[(&str, u64)] =
    &[("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1_000), ("ms", 1)];

/// A size, time or rate that cannot be understood. The text tells the form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {form}")]
pub struct UnitError {
    text: String,
    form: &'static str,
}

/// Splits `12.5MiB` into digits and unit, and multiplies without floating point.
fn parse_units(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_'))?;
    let (number, unit) = text.split_at(split);
    let unit = unit.trim_start();
    let factor = units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit))?.1;
    let number = number.replace('_', "");
    let (whole, fraction) = number.split_once('.').unwrap_or((&number, "0"));
    if fraction.is_empty() || fraction.len() > 9 {
        return None;
    }
    let scale = 10u64.pow(u32::try_from(fraction.len()).ok()?);
    let part = u128::from(fraction.parse::<u64>().ok()?) * u128::from(factor) / u128::from(scale);
    whole.parse::<u64>().ok()?.checked_mul(factor)?.checked_add(u64::try_from(part).ok()?)
}

/// The largest unit that says `value` without a fraction. Decimal sizes are read, never written.
fn write_units(f: &mut fmt::Formatter<'_>, value: u64, units: &[(&str, u64)]) -> fmt::Result {
    let decimal = |name: &str| matches!(name, "TB" | "GB" | "MB" | "kB");
    let fits = |&&(name, factor): &&(&str, u64)| {
        factor == 1 || (value > 0 && value.is_multiple_of(factor) && !decimal(name))
    };
    let (name, factor) = units.iter().find(fits).copied().unwrap_or(("", 1));
    write!(f, "{}{name}", value / factor)
}

macro_rules! unit_type {
    ($(#[$doc:meta])* $name:ident, $form:literal, |$text:ident| $parse:expr, |$value:ident, $f:ident| $write:expr, bare: $bare:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(u64);

        impl FromStr for $name {
            type Err = UnitError;
            fn from_str($text: &str) -> Result<Self, UnitError> {
                let parsed: Option<u64> = $parse;
                parsed.map(Self).ok_or_else(|| UnitError { text: $text.to_owned(), form: $form })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, $f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let $value = self.0;
                $write
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl serde::de::Visitor<'_> for Visitor {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($form)
                    }
                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(E::custom)
                    }
                    fn visit_i64<E: serde::de::Error>(self, n: i64) -> Result<$name, E> {
                        let bad = || UnitError { text: n.to_string(), form: $form };
                        let n = u64::try_from(n).map_err(|_| E::custom(bad()))?;
                        if $bare || n == 0 { Ok($name(n)) } else { Err(E::custom(bad())) }
                    }
                }
                from.deserialize_any(Visitor)
            }
        }
    };
}

unit_type! {
    /// A size in bytes, written `40MiB`, `4KiB`, `1.5GiB`, or as a bare number of bytes.
    ByteSize, "a size such as 512KiB, 40MiB or 1.5GiB",
    |text| parse_units(text, SIZE_UNITS).or_else(|| text.trim().parse().ok()),
    |value, f| write_units(f, value, SIZE_UNITS),
    bare: true
}

unit_type! {
    /// A span of time, written `250ms`, `30s`, `5min`, `24h`, `7d`. A bare number is refused
    /// (seconds or milliseconds?), except 0.
    Millis, "a time such as 250ms, 30s, 5min, 24h or 7d",
    |text| if text.trim() == "0" { Some(0) } else { parse_units(text, TIME_UNITS) },
    |value, f| write_units(f, value, TIME_UNITS),
    bare: false
}

unit_type! {
    /// A rate in bytes per second, written `40MiB/s`; 0 is "no limit" where a limit is meant.
    ByteRate, "a rate such as 40MiB/s",
    |text| match text.trim().strip_suffix("/s") {
        Some(size) => parse_units(size, SIZE_UNITS),
        None if text.trim() == "0" => Some(0),
        None => None,
    },
    |value, f| { write_units(f, value, SIZE_UNITS)?; f.write_str("/s") },
    bare: false
}

impl ByteSize {
    /// So many bytes.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// So many mebibytes.
    #[must_use]
    pub const fn from_mib(mib: u32) -> Self {
        Self((mib as u64) << 20)
    }

    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl Millis {
    /// So many milliseconds.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis)
    }

    /// So many seconds.
    #[must_use]
    pub const fn from_secs(secs: u32) -> Self {
        Self(secs as u64 * 1_000)
    }

    /// In milliseconds.
    #[must_use]
    pub const fn millis(self) -> u64 {
        self.0
    }

    /// As the standard library's type.
    #[must_use]
    pub const fn duration(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

impl ByteRate {
    /// So many bytes per second.
    #[must_use]
    pub const fn from_bytes_per_second(bytes: u64) -> Self {
        Self(bytes)
    }

    /// In bytes per second.
    #[must_use]
    pub const fn bytes_per_second(self) -> u64 {
        self.0
    }
}

/// The candidate that was probably meant by `unknown`: at most a third of its letters differ.
#[must_use]
pub fn suggest<'a>(
    unknown: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let most = (unknown.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (edits(&unknown.to_lowercase(), &candidate.to_lowercase()), candidate))
        .filter(|(distance, _)| *distance <= most)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Edit distance with swaps of neighbours (optimal string alignment).
fn edits(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let swap = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (rows[i - 1][j] + 1).min(row[j - 1] + 1).min(rows[i - 1][j - 1] + swap);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

/// Reads a configuration of type `T` (which must refuse unknown fields) from the text of the file
/// `path`; the path is only named in errors.
///
/// # Errors
/// [`CODE_SYNTAX`], [`CODE_UNKNOWN_KEY`] or [`CODE_VALUE`], each with line and column.
pub fn parse_toml<T: serde::de::DeserializeOwned>(text: &str, path: &str) -> Result<T, Problem> {
    if let Err(syntax) = text.parse::<toml::Table>() {
        let place = place_of(text, path, syntax.span());
        return Err(Problem::harmless(
            CODE_SYNTAX,
            format!("{place}: not valid TOML"),
            one_line(syntax.message()),
            "mend that line; values with letters need quotes, for example interval = \"30s\"",
        ));
    }
    toml::from_str::<T>(text).map_err(|error| explain(&error, text, path))
}

fn explain(error: &toml::de::Error, text: &str, path: &str) -> Problem {
    let place = place_of(text, path, error.span());
    let message = one_line(error.message());
    let Some((unknown, known)) = unknown_field(&message) else {
        return Problem::harmless(
            CODE_VALUE,
            format!("{place}: the configuration cannot be used"),
            message,
            "correct the value and start again",
        );
    };
    let next = match suggest(unknown, known.iter().copied()) {
        Some(meant) => format!("did you mean `{meant}`?"),
        None => format!("known keys here: {}", known.join(", ")),
    };
    Problem::harmless(
        CODE_UNKNOWN_KEY,
        format!("{place}: unknown key `{unknown}`"),
        "an unknown key is never ignored, because a mistyped setting would silently not apply",
        next,
    )
}

/// Takes serde's sentence apart: the unknown field and the known ones.
fn unknown_field(message: &str) -> Option<(&str, Vec<&str>)> {
    let rest = message.strip_prefix("unknown field `")?;
    let (unknown, rest) = rest.split_once('`')?;
    Some((unknown, rest.split('`').skip(1).step_by(2).collect()))
}

fn place_of(text: &str, path: &str, span: Option<core::ops::Range<usize>>) -> String {
    let Some(before) = span.and_then(|span| text.get(..span.start)) else {
        return path.to_owned();
    };
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().map_or(0, |l| l.chars().count()) + 1;
    format!("{path}, line {line}, column {column}")
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        listen: String,
        #[serde(default)]
        pool: ByteSize,
        #[serde(default)]
        limits: Limits,
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields, default)]
    struct Limits {
        handshake_timeout: Millis,
        rate: ByteRate,
    }

    fn refused(text: &str) -> Problem {
        parse_toml::<Sample>(text, "x.toml").unwrap_err()
    }

    #[test]
    fn sizes_times_and_rates_are_read_with_their_units() {
        for (text, bytes) in
            [("4MiB", 4 << 20), ("1.5 KiB", 1536), ("10MB", 10_000_000), ("7", 7), ("0B", 0)]
        {
            assert_eq!(text.parse::<ByteSize>().unwrap().bytes(), bytes, "{text}");
        }
        for (text, ms) in
            [("250ms", 250), ("30s", 30_000), ("5min", 300_000), ("24h", 86_400_000), ("0", 0)]
        {
            assert_eq!(text.parse::<Millis>().unwrap().millis(), ms, "{text}");
        }
        assert_eq!("40MiB/s".parse::<ByteRate>().unwrap().bytes_per_second(), 40 << 20);
    }

    #[test]
    fn ambiguous_or_impossible_values_are_refused_and_the_form_is_told() {
        for bad in ["4M", "MiB", "-4MiB", "4.MiB", "99999999999TiB", "", "1e3B"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
        for bad in ["30", "s", "5 minutes", "-1s"] {
            assert!(bad.parse::<Millis>().is_err(), "{bad}");
        }
        assert!("40MiB".parse::<ByteRate>().is_err());
        let told = "30".parse::<Millis>().unwrap_err().to_string();
        assert_eq!(told, "`30` is not a time such as 250ms, 30s, 5min, 24h or 7d");
    }

    #[test]
    fn what_is_written_reads_back_as_the_same_value() {
        for bytes in [0, 1, 1023, 1024, 10_000_000, 40 << 20, 3 << 40, u64::MAX] {
            let size = ByteSize::from_bytes(bytes);
            assert_eq!(size.to_string().parse::<ByteSize>().unwrap(), size);
            let rate = ByteRate::from_bytes_per_second(bytes);
            assert_eq!(rate.to_string().parse::<ByteRate>().unwrap(), rate);
            let time = Millis::from_millis(bytes);
            assert_eq!(time.to_string().parse::<Millis>().unwrap(), time);
        }
        assert_eq!(ByteSize::from_mib(40).to_string(), "40MiB");
        assert_eq!(Millis::from_secs(90).to_string(), "90s");
        assert_eq!(Millis::from_secs(300).to_string(), "5min");
    }

    #[test]
    fn a_mistyped_key_is_refused_with_its_place_and_the_one_that_was_meant() {
        let problem = refused("listen = \":9443\"\n\n[limits]\n  handshake_timout = \"5s\"\n");
        assert_eq!(problem.code.0, CODE_UNKNOWN_KEY);
        assert_eq!(problem.what, "x.toml, line 4, column 3: unknown key `handshake_timout`");
        assert_eq!(problem.next, "did you mean `handshake_timeout`?");
        let far = refused("listen = \":1\"\nquux = 1\n");
        assert_eq!(far.next, "known keys here: listen, pool, limits");
    }

    #[test]
    fn wrong_values_and_syntax_name_their_place() {
        let value = refused("listen = \":1\"\npool = \"4M\"\n");
        assert_eq!(value.code.0, CODE_VALUE);
        assert!(value.what.starts_with("x.toml, line 2, column 8:"), "{}", value.what);
        assert!(value.why.contains("a size such as"), "{}", value.why);
        let syntax = refused("listen = \":1\"\npool = 30s\n");
        assert_eq!(syntax.code.0, CODE_SYNTAX);
        assert!(syntax.what.starts_with("x.toml, line 2,"), "{}", syntax.what);
        let missing = refused("pool = 4\n");
        assert!(missing.why.contains("listen"), "{}", missing.why);
    }

    #[test]
    fn suggestions_are_close_or_none() {
        let known = ["status", "point", "protect", "unprotect"];
        assert_eq!(suggest("stauts", known), Some("status"));
        assert_eq!(suggest("protct", known), Some("protect"));
        assert_eq!(suggest("x", known), None);
        assert_eq!(suggest("kitchen", known), None);
    }
}
