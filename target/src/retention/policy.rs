//! Retention policies: their tiers, how they are written, and the built-in ones. Knows no points.

use core::fmt;
use core::str::FromStr;
use std::collections::BTreeMap;

use farshore_protocol::config::suggest;

/// Policy of a new target.
pub const STANDARD: &str = "standard";
/// Word for "as the target's configuration says".
pub const DEFAULT: &str = "default";

const STANDARD_TEXT: &str = "all:1h,1m:24h,1h:7d,1d:30d,app-all:7d,app-1d:30d";
/// Names and slots of the presets: points cut so often, so many in the first hour.
const PRESETS: [(&str, &str, u64); 3] =
    [("every-30s", "30s", 30_000), ("every-5m", "5m", 300_000), ("every-15m", "15m", 900_000)];
/// Longest retention of a preset, in hours; also what its bare name means.
const PRESET_HOURS: u64 = 24;

/// Most tiers of a policy.
const MAX_TIERS: usize = 16;
/// Longest time that can be written: a hundred years.
const MAX_MS: u64 = 36_500 * DAY;
/// Shortest slot.
const MIN_SLOT: u64 = 100;
const DAY: u64 = 86_400_000;
const HOUR: u64 = 3_600_000;

/// Units of times, largest first: name and milliseconds. `min` is read, never written.
const UNITS: [(&str, u64); 6] =
    [("d", DAY), ("h", HOUR), ("m", 60_000), ("min", 60_000), ("s", 1_000), ("ms", 1)];

/// How densely points are kept, and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tier {
    /// Of each slot of so many milliseconds the first point stays; none: every point.
    pub slot: Option<u64>,
    /// For so many milliseconds.
    pub keep: u64,
}

impl Tier {
    /// Most points that it keeps; none without slots.
    #[must_use]
    pub fn most(&self) -> Option<u64> {
        self.slot.map(|slot| self.keep.div_ceil(slot.max(1)))
    }
}

/// What stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// For points of every kind, the densest first; at least one.
    pub tiers: Vec<Tier>,
    /// Besides, for application-consistent points.
    pub app: Vec<Tier>,
    /// The preset also says how often points are cut, in milliseconds.
    pub interval: Option<u64>,
}

impl Policy {
    /// Its tiers, and whether they are for application-consistent points only.
    pub fn all_tiers(&self) -> impl Iterator<Item = (&Tier, bool)> {
        self.tiers.iter().map(|tier| (tier, false)).chain(self.app.iter().map(|tier| (tier, true)))
    }

    /// How long it looks back at most, in milliseconds.
    #[must_use]
    pub fn longest(&self) -> u64 {
        self.all_tiers().map(|(tier, _)| tier.keep).max().unwrap_or(0)
    }

    /// The shortest time in which something of it can change, in milliseconds.
    #[must_use]
    pub fn shortest(&self) -> u64 {
        self.all_tiers().map(|(tier, _)| tier.slot.unwrap_or(tier.keep)).min().unwrap_or(0)
    }
}

/// A time as people write it: `30s`, `5m`, `24h`, `7d`.
fn parse_time(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a time such as 30s, 5m, 24h or 7d");
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(split);
    let factor = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?.1;
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let time = number.checked_mul(factor).filter(|ms| *ms <= MAX_MS);
    let time = time.ok_or_else(|| format!("`{text}` is longer than a hundred years"))?;
    if time == 0 { Err(format!("`{text}` is no time at all")) } else { Ok(time) }
}

/// The largest unit that says it without a fraction; a day is 24 hours here.
fn write_time(f: &mut fmt::Formatter<'_>, ms: u64, day: &str) -> fmt::Result {
    if ms == DAY {
        return f.write_str(day);
    }
    let (name, factor) =
        UNITS.iter().find(|(_, factor)| ms.is_multiple_of(*factor)).copied().unwrap_or(("ms", 1));
    write!(f, "{}{name}", ms / factor)
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.slot {
            None => f.write_str("all")?,
            Some(slot) => write_time(f, slot, "1d")?,
        }
        f.write_str(":")?;
        write_time(f, self.keep, "24h")
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (tier, app)) in self.all_tiers().enumerate() {
            let comma = if n > 0 { "," } else { "" };
            write!(f, "{comma}{}{tier}", if app { "app-" } else { "" })?;
        }
        Ok(())
    }
}

fn parse_tier(text: &str) -> Result<Tier, String> {
    let (density, keep) = text.split_once(':').ok_or_else(|| {
        format!("`{text}` is not a tier such as all:1h (every point) or 1m:24h (one a minute)")
    })?;
    let keep = parse_time(keep)?;
    let slot = if density == "all" { None } else { Some(parse_time(density)?) };
    match slot {
        Some(slot) if slot < MIN_SLOT => Err(format!("{text}: a slot has at least {MIN_SLOT} ms")),
        Some(slot) if slot > keep => {
            Err(format!("{text}: one point a slot, and the slot is longer than it is kept"))
        }
        _ => Ok(Tier { slot, keep }),
    }
}

/// Each tier after the first must keep something that the one before it does not.
fn check_order(tiers: &[Tier]) -> Result<(), String> {
    for pair in tiers.windows(2) {
        let [dense, sparse] = pair else { continue };
        if sparse.slot <= dense.slot || sparse.keep <= dense.keep {
            return Err(format!(
                "{sparse} after {dense}: each tier must keep fewer points than the one before it, and for longer"
            ));
        }
    }
    Ok(())
}

impl FromStr for Policy {
    type Err = String;

    /// `all:1h,1m:24h,app-all:7d`, or a time alone: every point for so long.
    fn from_str(text: &str) -> Result<Self, String> {
        let (mut tiers, mut app) = (Vec::new(), Vec::new());
        for part in text.split(',').map(str::trim) {
            match part.strip_prefix("app-") {
                Some(part) => app.push(parse_tier(part)?),
                None if text.contains(':') => tiers.push(parse_tier(part)?),
                None => tiers.push(Tier { slot: None, keep: parse_time(part)? }),
            }
        }
        if tiers.is_empty() {
            return Err("a tier for points of every kind is missing, such as all:1h".into());
        }
        if tiers.len() + app.len() > MAX_TIERS {
            return Err(format!("at most {MAX_TIERS} tiers"));
        }
        check_order(&tiers)?;
        check_order(&app)?;
        Ok(Self { tiers, app, interval: None })
    }
}

/// `every-30s`, or with its retention in hours `every-30s-4h`. The first hour has one point a slot,
/// then one an hour; with 0 hours (or 1) only the first hour is kept.
fn preset(name: &str) -> Option<Result<Policy, String>> {
    let (found, slot, interval) = PRESETS.iter().find(|(preset, ..)| {
        name.strip_prefix(preset).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    })?;
    let hours = match name[found.len()..].strip_prefix('-') {
        None => Some(PRESET_HOURS),
        Some(text) => text.strip_suffix('h').and_then(|n| n.parse().ok()),
    };
    let Some(hours) = hours.filter(|hours| *hours <= PRESET_HOURS) else {
        return Some(Err(format!(
            "`{name}`: the retention of a preset is 0 to {PRESET_HOURS} hours, as in {found}-4h"
        )));
    };
    let text = match hours {
        0 | 1 => format!("{slot}:1h,app-all:1h"),
        more => format!("{slot}:1h,1h:{more}h,app-all:{more}h"),
    };
    Some(text.parse::<Policy>().map(|policy| Policy { interval: Some(*interval), ..policy }))
}

/// The built-in policies by name.
#[must_use]
pub fn built_in() -> Vec<(String, Policy)> {
    let names = [STANDARD].into_iter().chain(PRESETS.iter().map(|(name, ..)| *name));
    let own = BTreeMap::new();
    names.filter_map(|name| Some((name.to_owned(), resolve(name, &own).ok()?))).collect()
}

/// Whether a policy of the configuration may have this name.
///
/// # Errors
/// A sentence with the rule.
pub fn check_name(name: &str) -> Result<(), String> {
    let letters = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if !letters || !name.starts_with(|c: char| c.is_ascii_alphabetic()) || name.len() > 63 {
        return Err(format!(
            "`{name}` cannot name a policy: 1 to 63 letters, digits and hyphens, a letter first"
        ));
    }
    if name == DEFAULT || name == STANDARD || preset(name).is_some() {
        return Err(format!("`{name}` is the name of a built-in policy"));
    }
    Ok(())
}

/// The policy that `text` names or writes out; `own` are those of the configuration.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub fn resolve(text: &str, own: &BTreeMap<String, String>) -> Result<Policy, String> {
    if let Some(text) = own.get(text) {
        return text.parse();
    }
    if text == STANDARD {
        return STANDARD_TEXT.parse();
    }
    if let Some(preset) = preset(text) {
        return preset;
    }
    if text.contains(':') || text.starts_with(|c: char| c.is_ascii_digit()) {
        return text.parse();
    }
    let known: Vec<&str> = [STANDARD]
        .into_iter()
        .chain(PRESETS.iter().map(|(name, ..)| *name))
        .chain(own.keys().map(String::as_str))
        .collect();
    let hint = match suggest(text, known.iter().copied()) {
        Some(meant) => format!("did you mean `{meant}`?"),
        None => format!("known are {}", known.join(", ")),
    };
    Err(format!("there is no policy `{text}`; {hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(text: &str) -> Result<Policy, String> {
        let own = BTreeMap::from([("long".to_owned(), "all:2h,1d:1d".to_owned())]);
        resolve(text, &own)
    }

    #[test]
    fn a_policy_reads_back_as_it_is_written() {
        for text in ["all:1h", STANDARD_TEXT, "30s:1h,1h:24h,app-all:24h", "250ms:1s,2d:365d"] {
            assert_eq!(known(text).unwrap().to_string(), text);
        }
        for (text, same) in [
            ("24h", "all:24h"),
            ("1d", "all:24h"),
            ("90min", "all:90m"),
            (" all:1h , 1min:1d ", "all:1h,1m:24h"),
            ("long", "all:2h,1d:24h"),
            ("standard", STANDARD_TEXT),
        ] {
            assert_eq!(known(text).unwrap().to_string(), same, "{text}");
        }
    }

    #[test]
    fn presets_keep_what_their_rule_says() {
        for (text, same, interval) in [
            ("every-30s", "30s:1h,1h:24h,app-all:24h", 30_000),
            ("every-5m-24h", "5m:1h,1h:24h,app-all:24h", 300_000),
            ("every-15m-4h", "15m:1h,1h:4h,app-all:4h", 900_000),
            ("every-30s-0h", "30s:1h,app-all:1h", 30_000),
            ("every-30s-1h", "30s:1h,app-all:1h", 30_000),
        ] {
            let policy = known(text).unwrap();
            assert_eq!((policy.to_string().as_str(), policy.interval), (same, Some(interval)));
        }
        let most = |text: &str| known(text).unwrap().tiers[0].most();
        assert_eq!(
            [most("every-30s"), most("every-5m"), most("every-15m"), most("24h")],
            [Some(120), Some(12), Some(4), None]
        );
        assert_eq!(built_in().len(), 4, "every built-in text can be read");
    }

    #[test]
    fn mistakes_in_a_policy_are_told_in_its_own_words() {
        for (text, says) in [
            ("", "there is no policy"),
            ("all", "there is no policy `all`"),
            ("all:", "`` is not a time"),
            ("all:1h,1m", "`1m` is not a tier"),
            ("1x:1h", "`1x` is not a time"),
            ("1m:0h", "no time at all"),
            ("10ms:1h", "at least 100 ms"),
            ("1d:1h", "longer than it is kept"),
            ("all:1d,1m:1h", "1m:1h after all:24h"),
            ("1h:7d,1m:24h", "1m:24h after 1h:7d"),
            ("all:1h,all:2h", "all:2h after all:1h"),
            ("app-all:1h", "points of every kind is missing"),
            ("99999999d", "longer than a hundred years"),
            ("standart", "did you mean `standard`?"),
            ("every-30s-25h", "0 to 24 hours"),
            ("every-30s-x", "0 to 24 hours"),
            ("nothing-like-it", "known are standard, every-30s"),
        ] {
            let told = known(text).unwrap_err();
            assert!(told.contains(says), "{text}: {told}");
        }
        for (name, good) in [
            ("long-1", true),
            ("1h", false),
            ("a b", false),
            ("every-5m-3h", false),
            ("default", false),
        ] {
            assert_eq!(check_name(name).is_ok(), good, "{name}");
        }
    }
}
