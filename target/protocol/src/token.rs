//! One-time tokens: what a person carries from the target to a source so that both know each
//! other. `fs1.` and base64url of a small JSON object: address, fingerprint of the CA, secret.
//!
//! The fingerprint pins the CA, so the first connection is already authenticated; the secret can
//! be used once. Owns no storage: the target keeps only a hash of the secret.

use core::fmt;
use core::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

/// The name that every target's certificate carries besides its addresses. A source verifies this
/// name whatever address it dialled: the CA is the target's own and signs no other server, so the
/// pinned CA is the identity, and a changed address breaks nothing. The target sends its CA
/// certificate as the last of its chain, to be compared with [`Token::ca`].
pub const SERVER_NAME: &str = "farshore-target";

const PREFIX: &str = "fs1.";
/// Longest text that is looked at, in bytes: an address of 255 needs about 500.
const MAX_TEXT: usize = 2048;
/// Random bytes of a secret.
const SECRET_LEN: usize = 32;

/// SHA-256 of the DER of the target's CA certificate: what `openssl x509 -fingerprint -sha256`
/// shows.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CaFingerprint([u8; 32]);

impl CaFingerprint {
    /// Of a certificate in DER.
    #[must_use]
    pub fn of(certificate: &[u8]) -> Self {
        Self(sha256(certificate))
    }

    /// Its 32 bytes.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 32] {
        self.0
    }
}

impl fmt::Display for CaFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02X}", if i == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

impl fmt::Debug for CaFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The secret of a token. Never shown by `Debug`; compare hashes only.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenSecret(String);

impl TokenSecret {
    /// A fresh one from the system's random source.
    ///
    /// # Errors
    /// [`TokenError::Random`] when the system has no randomness.
    pub fn generate() -> Result<Self, TokenError> {
        let mut bytes = [0u8; SECRET_LEN];
        aws_lc_rs::rand::fill(&mut bytes).map_err(|_| TokenError::Random)?;
        Ok(Self(URL_SAFE_NO_PAD.encode(bytes)))
    }

    /// What [`crate::message::FromAgent::Enroll`] carries.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for TokenSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenSecret(..)")
    }
}

/// SHA-256 of a secret as it travels: the only form in which a target keeps it.
#[must_use]
pub fn hash_secret(secret: &str) -> [u8; 32] {
    sha256(secret.as_bytes())
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    let mut out = [0; 32];
    out.copy_from_slice(digest.as_ref());
    out
}

/// Why a text is not a token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Another kind of text.
    #[error("a token begins with `fs1.`; copy the whole line that `farshore token create` printed")]
    Prefix,
    /// Cut off or changed.
    #[error("the token is damaged, perhaps cut off while copying")]
    Damaged,
    /// The system's random source failed.
    #[error("the system's random source failed")]
    Random,
}

/// A one-time token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// `host:port` under which the source reaches the target.
    pub address: String,
    /// The only CA the source may believe.
    pub ca: CaFingerprint,
    /// Proof that the holder was given the token.
    pub secret: TokenSecret,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    a: String,
    f: String,
    s: String,
}

impl fmt::Display for Token {
    /// The text for people to carry. This is the secret: never log it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wire = Wire {
            a: self.address.clone(),
            f: URL_SAFE_NO_PAD.encode(self.ca.0),
            s: self.secret.0.clone(),
        };
        let json = serde_json::to_vec(&wire).map_err(|_| fmt::Error)?;
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(json))
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        let body = text.strip_prefix(PREFIX).ok_or(TokenError::Prefix)?;
        if body.len() > MAX_TEXT {
            return Err(TokenError::Damaged);
        }
        let json = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenError::Damaged)?;
        let wire: Wire = serde_json::from_slice(&json).map_err(|_| TokenError::Damaged)?;
        let ca = URL_SAFE_NO_PAD.decode(&wire.f).map_err(|_| TokenError::Damaged)?;
        let secret = URL_SAFE_NO_PAD.decode(&wire.s).map_err(|_| TokenError::Damaged)?;
        if secret.len() != SECRET_LEN || wire.a.is_empty() {
            return Err(TokenError::Damaged);
        }
        let ca = ca.try_into().map_err(|_| TokenError::Damaged)?;
        Ok(Self { address: wire.a, ca: CaFingerprint(ca), secret: TokenSecret(wire.s) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        Token {
            address: "backup:9443".into(),
            ca: CaFingerprint::of(b"a certificate"),
            secret: TokenSecret::generate().unwrap(),
        }
    }

    #[test]
    fn a_token_survives_being_typed_and_begins_as_documented() {
        let token = token();
        let text = token.to_string();
        assert!(text.starts_with("fs1.eyJhIjoi"), "{text}");
        assert_eq!(format!(" {text}\n").parse::<Token>().unwrap(), token);
    }

    #[test]
    fn cut_or_foreign_text_is_refused() {
        let text = token().to_string();
        assert_eq!("abc".parse::<Token>(), Err(TokenError::Prefix));
        for end in [4, 5, 20, text.len() / 2, text.len() - 1] {
            assert_eq!(text[..end].parse::<Token>(), Err(TokenError::Damaged), "{end}");
        }
        let long = format!("fs1.{}", "A".repeat(MAX_TEXT + 1));
        assert_eq!(long.parse::<Token>(), Err(TokenError::Damaged));
    }

    #[test]
    fn secrets_differ_and_are_not_shown() {
        let (a, b) = (token(), token());
        assert_ne!(a.secret, b.secret);
        assert!(!format!("{a:?}").contains(a.secret.as_str()));
        assert_ne!(hash_secret(a.secret.as_str()), hash_secret(b.secret.as_str()));
    }
}
