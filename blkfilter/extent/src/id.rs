//! Identities: 128-bit random numbers, written as UUIDs. Two kinds never compare.

use core::fmt;
use core::str::FromStr;

/// The text is not a UUID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a UUID such as 0f8c2a4e-3b57-4d3a-9d0e-6a1f5b7c9d21")]
pub struct IdError {
    /// What was given.
    pub text: String,
}

macro_rules! identity {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name([u8; 16]);

        impl serde::Serialize for $name {
            /// Text for people (JSON, TOML), 16 bytes for programs.
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                if to.is_human_readable() { to.collect_str(self) } else { self.0.serialize(to) }
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                if from.is_human_readable() {
                    let text = <std::borrow::Cow<'_, str>>::deserialize(from)?;
                    text.parse().map_err(serde::de::Error::custom)
                } else {
                    <[u8; 16]>::deserialize(from).map(Self)
                }
            }
        }

        impl $name {
            /// All bits zero: "none" in formats with a fixed place for the identity.
            pub const NIL: Self = Self([0; 16]);

            /// A fresh random identity.
            #[must_use]
            pub fn random() -> Self {
                Self(uuid::Uuid::new_v4().into_bytes())
            }

            /// From its 16 bytes, in the order in which formats store them.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The 16 bytes, in the order in which formats store them.
            #[must_use]
            pub const fn to_bytes(self) -> [u8; 16] {
                self.0
            }

            /// Whether this is [`Self::NIL`].
            #[must_use]
            pub fn is_nil(self) -> bool {
                self.0 == [0; 16]
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&uuid::Uuid::from_bytes(self.0), f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                uuid::Uuid::parse_str(text)
                    .map(|u| Self(u.into_bytes()))
                    .map_err(|_| IdError { text: text.to_owned() })
            }
        }
    };
}

identity! {
    /// A protected volume; the same on source and target for its whole life.
    VolumeId
}
identity! {
    /// A host that runs `filterd` and an agent.
    HostId
}
identity! {
    /// A consistency group.
    GroupId
}
identity! {
    /// A marker in a change log. All members of a group point carry the same one.
    MarkerId
}
identity! {
    /// An opened recovery point.
    ViewId
}

/// A recovery point in the catalogue of one target: short, so that people can type it (`p-312`).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct PointId(u64);

impl PointId {
    /// The `n`-th point that this target made.
    #[must_use]
    pub const fn new(n: u64) -> Self {
        Self(n)
    }

    /// The running number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for PointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p-{}", self.0)
    }
}

impl FromStr for PointId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        text.strip_prefix("p-")
            .and_then(|n| n.parse().ok())
            .map(Self)
            .ok_or_else(|| IdError { text: text.to_owned() })
    }
}

impl TryFrom<String> for PointId {
    type Error = IdError;
    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<PointId> for String {
    fn from(id: PointId) -> String {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_survive_text() {
        let id = VolumeId::random();
        assert_eq!(id.to_string().parse::<VolumeId>().unwrap(), id);
        assert!("nonsense".parse::<VolumeId>().is_err());
        assert!(VolumeId::NIL.is_nil() && !id.is_nil());
        assert_eq!("p-312".parse::<PointId>().unwrap(), PointId::new(312));
        assert!("312".parse::<PointId>().is_err());
    }
}
