//! Names of volumes and hosts: 1 to 63 characters of letters, digits and hyphens, none at either
//! end (literal rule 6 of the mission).

use core::fmt;
use core::str::FromStr;

/// Why a name was refused. The text tells the rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the name `{name}` is not allowed: use 1 to 63 letters, digits and hyphens, with no hyphen at either end"
)]
pub struct NameError {
    /// What was given.
    pub name: String,
}

/// The name of a protected volume or of a host.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeName(String);

impl VolumeName {
    /// Longest allowed name in bytes.
    pub const MAX_LEN: usize = 63;

    /// Checks the rule and keeps the name.
    ///
    /// # Errors
    /// [`NameError`] when the rule is broken.
    pub fn new(name: &str) -> Result<Self, NameError> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        let ok = (1..=Self::MAX_LEN).contains(&name.len())
            && name.bytes().all(allowed)
            && !name.starts_with('-')
            && !name.ends_with('-');
        if ok { Ok(Self(name.to_owned())) } else { Err(NameError { name: name.to_owned() }) }
    }

    /// Whether it ends as the names of partitions do (`-part7`): `/dev/farshore/NAME-part7` would be
    /// two things at once. New volumes may not; a name that is in use stays good.
    #[must_use]
    pub fn looks_like_a_partition(&self) -> bool {
        let end = self.0.rsplit_once("-part").map_or("", |(_, end)| end);
        !end.is_empty() && end.bytes().all(|b| b.is_ascii_digit())
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for VolumeName {
    type Err = NameError;
    fn from_str(name: &str) -> Result<Self, NameError> {
        Self::new(name)
    }
}

impl TryFrom<String> for VolumeName {
    type Error = NameError;
    fn try_from(name: String) -> Result<Self, NameError> {
        Self::new(&name)
    }
}

impl From<VolumeName> for String {
    fn from(name: VolumeName) -> String {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_literal_rule_holds_at_its_edges() {
        for good in ["a", "7", "pg-data", "A-1", &"x".repeat(63)] {
            assert!(VolumeName::new(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "a_b", "a.b", "ä", "a b", &"x".repeat(64), "a/b"] {
            assert!(VolumeName::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_name_that_ends_like_a_partition_is_told_from_others() {
        let ends = |name| VolumeName::new(name).unwrap().looks_like_a_partition();
        assert!(ends("pg-part1") && ends("a-part-part22"));
        for other in ["part1", "pg-part", "pg-part1a", "pg-parts1", "pg-part1-old", "pgpart1"] {
            assert!(!ends(other), "{other}");
        }
    }
}
