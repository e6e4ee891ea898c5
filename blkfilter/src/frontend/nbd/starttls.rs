//! The part of the option phase before TLS, for a process layer that owns the network socket and
//! the TLS library. It answers the greeting itself with this state machine, sets up TLS when told
//! to, and hands the plaintext stream to
//! [`serve_after_starttls`](super::serve_after_starttls). Pure; no export is named before TLS.

use super::limits::{MAX_OPTION, MAX_OPTIONS};
use super::negotiation::refuse;
use super::wire::{ClientFlags, OPTION_LEN, decode_option, greeting, option, option_reply, reply};

/// What to do after [`BeforeTls::feed`]. Whatever was appended to the output is sent first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Receive more bytes and feed them.
    More,
    /// Send the output, then begin TLS as its server; afterwards call
    /// [`serve_after_starttls`](super::serve_after_starttls) with these flags.
    BeginTls(ClientFlags),
    /// Send the output and close.
    Close,
}

/// A connection on which TLS is required and has not begun.
#[derive(Debug, Default)]
pub struct BeforeTls {
    /// Received and not yet used: never more than one option.
    pending: Vec<u8>,
    flags: Option<ClientFlags>,
    options: u32,
}

impl BeforeTls {
    /// A new connection. Send [`Self::greeting`] first.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What the server says first.
    #[must_use]
    pub fn greeting() -> [u8; 18] {
        greeting()
    }

    /// Takes received bytes and appends replies to `out`. Bytes behind STARTTLS are refused
    /// ([`Step::Close`]): plaintext must never be taken for something said inside TLS.
    pub fn feed(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Step {
        self.pending.extend_from_slice(bytes);
        loop {
            let Some(flags) = self.flags else {
                let Some(four) = self.pending.first_chunk::<4>() else { return Step::More };
                let Some(flags) = ClientFlags::decode(*four) else { return Step::Close };
                self.flags = Some(flags);
                self.pending.drain(..4);
                continue;
            };
            let Some(header) = self.pending.first_chunk::<OPTION_LEN>() else { return Step::More };
            let Some((option, len)) = decode_option(header) else { return Step::Close };
            if len > MAX_OPTION || self.options >= MAX_OPTIONS {
                return Step::Close;
            }
            let whole = OPTION_LEN + len as usize;
            if self.pending.len() < whole {
                return Step::More;
            }
            self.pending.drain(..whole);
            self.options += 1;
            match option {
                option::STARTTLS if len == 0 => {
                    if !self.pending.is_empty() {
                        return Step::Close;
                    }
                    option_reply(out, option, reply::ACK, &[]);
                    return Step::BeginTls(flags);
                }
                option::STARTTLS => refuse(out, option, reply::ERR_INVALID, "STARTTLS has no data"),
                option::ABORT => {
                    option_reply(out, option, reply::ACK, &[]);
                    return Step::Close;
                }
                option::EXPORT_NAME => return Step::Close, // it knows no refusal
                _ => refuse(out, option, reply::ERR_TLS_REQD, "TLS is required"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::OPTION_MAGIC;
    use super::*;

    fn ask(option: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    #[test]
    fn nothing_but_starttls_leads_on_and_it_does_byte_by_byte() {
        let mut before = BeforeTls::new();
        let mut out = Vec::new();
        let mut said = vec![0, 0, 0, 3];
        said.extend(ask(option::LIST, &[]));
        said.extend(ask(option::STARTTLS, &[]));
        for byte in &said[..said.len() - 1] {
            assert_eq!(before.feed(&[*byte], &mut out), Step::More);
        }
        assert_eq!(out[12..16], reply::ERR_TLS_REQD.to_be_bytes());
        let last = before.feed(&said[said.len() - 1..], &mut out);
        assert_eq!(last, Step::BeginTls(ClientFlags { no_zeroes: true }));
    }

    #[test]
    fn plaintext_behind_starttls_is_refused() {
        let mut said = vec![0, 0, 0, 1];
        said.extend(ask(option::STARTTLS, &[]));
        said.push(0);
        assert_eq!(BeforeTls::new().feed(&said, &mut Vec::new()), Step::Close);
    }

    #[test]
    fn exports_cannot_be_reached_without_tls() {
        for option in [option::GO, option::INFO, option::SET_META_CONTEXT, 77] {
            let mut out = Vec::new();
            let mut said = vec![0, 0, 0, 3];
            said.extend(ask(option, b"whatever"));
            assert_eq!(BeforeTls::new().feed(&said, &mut out), Step::More);
            assert_eq!(out[12..16], reply::ERR_TLS_REQD.to_be_bytes());
        }
        let mut said = vec![0, 0, 0, 3];
        said.extend(ask(option::EXPORT_NAME, b"x"));
        assert_eq!(BeforeTls::new().feed(&said, &mut Vec::new()), Step::Close);
    }
}
