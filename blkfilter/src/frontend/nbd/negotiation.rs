//! The option phase as a state machine without I/O: an option and its data in, replies out.

use std::sync::Arc;

use super::export::{Exports, Offer};
use super::limits::MAX_STRING;
use super::request::{Mode, export_flags};
use super::wire::{Reader, info, option, option_reply, reply};
use crate::device::DeviceInfo;

/// The one meta context we know.
const ALLOCATION: &[u8] = b"base:allocation";
/// Its number on the wire.
pub const ALLOCATION_ID: u32 = 1;

/// Whether the stream is encrypted, and so what STARTTLS means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    /// A unix socket: TLS is neither needed nor offered.
    NotOffered,
    /// Already inside TLS.
    Active,
}

/// What follows an option.
#[derive(Debug)]
pub enum Next {
    /// The next option.
    More,
    /// The client left; send the replies and close.
    Goodbye,
    /// Drop the connection: the protocol knows no other answer.
    Drop(&'static str),
    /// Transmission begins after the replies are sent.
    Enter(Arc<Offer>),
}

/// The state of one negotiation.
#[derive(Debug)]
pub struct Negotiation<'a> {
    exports: &'a Exports,
    tls: Tls,
    no_zeroes: bool,
    structured: bool,
    /// It entered by EXPORT_NAME, which tells no block sizes.
    untold: bool,
    /// Export for which `base:allocation` was selected.
    selected: Option<String>,
}

impl<'a> Negotiation<'a> {
    /// Begins after the client's flags.
    pub fn new(exports: &'a Exports, tls: Tls, no_zeroes: bool) -> Self {
        Self { exports, tls, no_zeroes, structured: false, untold: false, selected: None }
    }

    /// What was settled, for transmission on `offer`.
    pub fn mode(&self, offer: &Offer) -> Mode {
        let same = |name: &String| *name == offer.export.name;
        let allocation = self.selected.as_ref().is_some_and(same);
        Mode { structured: self.structured, allocation, untold: self.untold, ..Mode::default() }
    }

    /// Handles one option; appends its replies to `out`.
    pub fn option(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Next {
        match option {
            option::EXPORT_NAME => return self.export_name(data, out),
            option::INFO | option::GO => return self.info(option, data, out),
            option::ABORT => {
                option_reply(out, option, reply::ACK, &[]);
                return Next::Goodbye;
            }
            option::LIST if data.is_empty() => self.list(out),
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                option_reply(out, option, reply::ACK, &[]);
            }
            option::STARTTLS if data.is_empty() && self.tls == Tls::NotOffered => {
                refuse(out, option, reply::ERR_UNSUP, "this socket needs no TLS");
            }
            option::STARTTLS => refuse(out, option, reply::ERR_INVALID, "TLS is active already"),
            option::LIST | option::STRUCTURED_REPLY => {
                refuse(out, option, reply::ERR_INVALID, "the option has no data");
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(option, data, out);
            }
            _ => refuse(out, option, reply::ERR_UNSUP, "unknown option"), // any number may come
        }
        Next::More
    }

    fn export_name(&mut self, data: &[u8], out: &mut Vec<u8>) -> Next {
        let found = std::str::from_utf8(data).ok().and_then(|name| self.exports.find(name));
        let Some(offer) = found else { return Next::Drop("unknown export by EXPORT_NAME") };
        let device = offer.export.device.info();
        out.extend_from_slice(&device.size.get().to_be_bytes());
        out.extend_from_slice(&export_flags(&device, self.structured).to_be_bytes());
        if !self.no_zeroes {
            out.resize(out.len() + 124, 0);
        }
        self.untold = true;
        Next::Enter(offer)
    }

    fn list(&self, out: &mut Vec<u8>) {
        for offer in self.exports.all() {
            let name = offer.export.name.as_bytes();
            let parts = [&counted(name)[..], name, offer.export.description.as_bytes()];
            option_reply(out, option::LIST, reply::SERVER, &parts);
        }
        option_reply(out, option::LIST, reply::ACK, &[]);
    }

    fn info(&self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Next {
        let Some((name, wanted)) = parse_info(data) else {
            refuse(out, option, reply::ERR_INVALID, "malformed request for information");
            return Next::More;
        };
        let Some(offer) = self.lookup(option, name, out) else { return Next::More };
        let device = offer.export.device.info();
        let kind = |kind: u16| kind.to_be_bytes();
        option_reply(
            out,
            option,
            reply::INFO,
            &[
                &kind(info::EXPORT),
                &device.size.get().to_be_bytes(),
                &export_flags(&device, self.structured).to_be_bytes(),
            ],
        );
        let asks = |kind: u16| wanted.chunks_exact(2).any(|two| two == kind.to_be_bytes());
        if asks(info::NAME) {
            let name = offer.export.name.as_bytes();
            option_reply(out, option, reply::INFO, &[&kind(info::NAME), name]);
        }
        if asks(info::DESCRIPTION) && !offer.export.description.is_empty() {
            let text = offer.export.description.as_bytes();
            option_reply(out, option, reply::INFO, &[&kind(info::DESCRIPTION), text]);
        }
        // Always told: a client that ignores it is refused unaligned requests.
        let [least, best, most] = block_sizes(&device).map(u32::to_be_bytes);
        option_reply(out, option, reply::INFO, &[&kind(info::BLOCK_SIZE), &least, &best, &most]);
        option_reply(out, option, reply::ACK, &[]);
        if option == option::GO { Next::Enter(offer) } else { Next::More }
    }

    fn meta_context(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) {
        let set = option == option::SET_META_CONTEXT;
        if set {
            self.selected = None; // a new selection, even a refused one, ends the old
        }
        if !self.structured {
            return refuse(out, option, reply::ERR_INVALID, "structured replies come first");
        }
        let Some((name, queries)) = parse_queries(data) else {
            return refuse(out, option, reply::ERR_INVALID, "malformed meta context query");
        };
        let Some(offer) = self.lookup(option, name, out) else { return };
        let exact = queries.contains(&ALLOCATION);
        let listed = queries.is_empty() || queries.contains(&&b"base:"[..]);
        if exact || (!set && listed) {
            let id = if set { ALLOCATION_ID } else { 0 };
            option_reply(out, option, reply::META_CONTEXT, &[&id.to_be_bytes(), ALLOCATION]);
            if set {
                self.selected = Some(offer.export.name.clone());
            }
        }
        option_reply(out, option, reply::ACK, &[]);
    }

    /// The export named by a client; otherwise the refusal is in `out`.
    fn lookup(&self, option: u32, name: &[u8], out: &mut Vec<u8>) -> Option<Arc<Offer>> {
        if name.len() > MAX_STRING {
            refuse(out, option, reply::ERR_TOO_BIG, "the name is longer than 4096 bytes");
            return None;
        }
        let Ok(name) = std::str::from_utf8(name) else {
            refuse(out, option, reply::ERR_INVALID, "the name is not UTF-8");
            return None;
        };
        let found = self.exports.find(name);
        if found.is_none() {
            refuse(out, option, reply::ERR_UNKNOWN, "there is no such export");
        }
        found
    }
}

/// Least, preferred and largest request in bytes.
fn block_sizes(device: &DeviceInfo) -> [u32; 3] {
    let least = device.blocks.logical();
    [least, device.blocks.physical().max(4096), super::limits::MAX_REQUEST]
}

fn counted(bytes: &[u8]) -> [u8; 4] {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes()
}

/// Appends an error reply with a text for people.
pub fn refuse(out: &mut Vec<u8>, option: u32, error: u32, text: &str) {
    option_reply(out, option, error, &[text.as_bytes()]);
}

/// Data of INFO and GO: the name and the wanted kinds, two bytes each.
fn parse_info(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut from = Reader(data);
    let name = from.counted()?;
    let wanted = usize::from(from.u16()?) * 2;
    (from.0.len() == wanted).then_some((name, from.0))
}

/// Data of the meta context options: the export and the queries.
fn parse_queries(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut from = Reader(data);
    let name = from.counted()?;
    let count = from.u32()?;
    let mut queries = Vec::new(); // grows with the data, not with the claimed count
    for _ in 0..count {
        queries.push(from.counted()?);
    }
    from.0.is_empty().then_some((name, queries))
}
