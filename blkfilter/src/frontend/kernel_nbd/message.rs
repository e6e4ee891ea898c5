//! The kernel's generic netlink messages for NBD: bytes only.
//!
//! Numbers and layouts are those of linux/netlink.h, linux/genetlink.h and linux/nbd-netlink.h.
//! Everything is in the byte order of the machine; an attribute is padded to four bytes.

use std::io;
use std::time::Duration;

/// Length of `nlmsghdr`: length, type, flags, sequence, sender.
const HEADER: usize = 16;
/// Length of `genlmsghdr`: command, version, two bytes of nothing.
const GENERIC: usize = 4;

/// `NLMSG_ERROR`: an acknowledgement when its number is zero.
const ERROR: u16 = 2;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const REQUEST_ACK: u16 = 0x1 | 0x4;
/// `NLA_F_NESTED`: the attribute's value is attributes.
const NESTED: u16 = 0x8000;
/// `NLA_TYPE_MASK`: an attribute's type without its flags.
const TYPE_MASK: u16 = 0x3fff;

/// `GENL_ID_CTRL`: the family that knows the families.
const CONTROL: u16 = 16;
/// `CTRL_CMD_GETFAMILY`.
const GET_FAMILY: u8 = 3;
mod control {
    pub const FAMILY_ID: u16 = 1;
    pub const FAMILY_NAME: u16 = 2;
    pub const MAX_ATTRIBUTE: u16 = 5;
}

/// `NBD_GENL_FAMILY_NAME`.
const FAMILY: &str = "nbd";
/// `NBD_GENL_VERSION`.
const VERSION: u8 = 1;
const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;
mod attribute {
    pub const INDEX: u16 = 1;
    pub const SIZE_BYTES: u16 = 2;
    pub const BLOCK_SIZE_BYTES: u16 = 3;
    pub const TIMEOUT: u16 = 4;
    pub const SERVER_FLAGS: u16 = 5;
    pub const SOCKETS: u16 = 7;
    pub const DEAD_CONN_TIMEOUT: u16 = 8;
    pub const BACKEND_IDENTIFIER: u16 = 10;
}
/// `NBD_SOCK_ITEM` and, inside it, `NBD_SOCK_FD`.
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;

/// The highest attribute of a kernel that knows the backend identifier (Linux 5.14).
pub const KNOWS_IDENTIFIER: u32 = attribute::BACKEND_IDENTIFIER as u32;

/// The kernel's NBD family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Family {
    /// Type of its messages, given out when the module is loaded.
    pub id: u16,
    /// The highest attribute it knows.
    pub max_attribute: u32,
}

/// What a connected device is told about time, in whole seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// A request older than this is sent again on another connection; zero: never for age alone.
    pub request: Duration,
    /// How long requests wait for a connection when there is none.
    pub dead_connection: Duration,
}

/// What a new device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connect<'a> {
    /// Its number; `None`: any free one.
    pub number: Option<u32>,
    /// Bytes.
    pub size: u64,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Export flags as in the protocol.
    pub flags: u16,
    /// Who it belongs to.
    pub identifier: &'a str,
    /// See there.
    pub timeouts: Timeouts,
}

/// A message under construction.
struct Message(Vec<u8>);

impl Message {
    fn new(family: u16, command: u8, version: u8) -> Self {
        let mut bytes = vec![0; 4]; // the length, at the end
        bytes.extend_from_slice(&family.to_ne_bytes());
        bytes.extend_from_slice(&REQUEST_ACK.to_ne_bytes());
        bytes.extend_from_slice(&1u32.to_ne_bytes()); // one message a socket
        bytes.extend_from_slice(&0u32.to_ne_bytes());
        bytes.extend_from_slice(&[command, version, 0, 0]);
        Self(bytes)
    }

    fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        put(&mut self.0, kind, value);
        self
    }

    fn u32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    fn u64(self, kind: u16, value: u64) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    fn dead_connection(self, timeout: Duration) -> Self {
        self.u64(attribute::DEAD_CONN_TIMEOUT, timeout.as_secs())
    }

    fn sockets(self, fds: &[u32]) -> Self {
        let mut items = Vec::new();
        for fd in fds {
            let mut item = Vec::new();
            put(&mut item, SOCK_FD, &fd.to_ne_bytes());
            put(&mut items, SOCK_ITEM | NESTED, &item);
        }
        self.bytes(attribute::SOCKETS | NESTED, &items)
    }

    fn finish(mut self) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).unwrap_or(u32::MAX); // a few hundred bytes
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0
    }
}

/// Appends one attribute.
fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let len = u16::try_from(4 + value.len()).unwrap_or(u16::MAX); // values are short
    out.extend_from_slice(&len.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// Asks for the family.
pub fn get_family() -> Vec<u8> {
    let name = format!("{FAMILY}\0");
    Message::new(CONTROL, GET_FAMILY, 1).bytes(control::FAMILY_NAME, name.as_bytes()).finish()
}

/// Makes a device of the sockets `fds`.
pub fn connect(family: Family, device: &Connect<'_>, fds: &[u32]) -> Vec<u8> {
    let mut message = Message::new(family.id, CONNECT, VERSION);
    if let Some(number) = device.number {
        message = message.u32(attribute::INDEX, number);
    }
    message
        .u64(attribute::SIZE_BYTES, device.size)
        .u64(attribute::BLOCK_SIZE_BYTES, device.block_size.into())
        .u64(attribute::SERVER_FLAGS, device.flags.into())
        .u64(attribute::TIMEOUT, device.timeouts.request.as_secs())
        .dead_connection(device.timeouts.dead_connection)
        .bytes(attribute::BACKEND_IDENTIFIER, device.identifier.as_bytes())
        .sockets(fds)
        .finish()
}

fn reconfigure(family: Family, number: u32, identifier: &str) -> Message {
    // The kernel refuses the message when the identifier is not the device's.
    Message::new(family.id, RECONFIGURE, VERSION)
        .u32(attribute::INDEX, number)
        .bytes(attribute::BACKEND_IDENTIFIER, identifier.as_bytes())
}

/// Gives a device a socket in place of a dead one.
pub fn replace_socket(family: Family, number: u32, identifier: &str, fd: u32) -> Vec<u8> {
    reconfigure(family, number, identifier).sockets(&[fd]).finish()
}

/// Changes how long the requests of a device wait for a connection.
pub fn set_dead_connection(
    family: Family,
    number: u32,
    identifier: &str,
    timeout: Duration,
) -> Vec<u8> {
    reconfigure(family, number, identifier).dead_connection(timeout).finish()
}

/// Changes a device's size.
pub fn set_size(family: Family, number: u32, identifier: &str, size: u64) -> Vec<u8> {
    reconfigure(family, number, identifier).u64(attribute::SIZE_BYTES, size).finish()
}

/// Ends a device.
pub fn disconnect(family: Family, number: u32) -> Vec<u8> {
    Message::new(family.id, DISCONNECT, VERSION).u32(attribute::INDEX, number).finish()
}

/// One message of the kernel.
struct Answer<'a> {
    kind: u16,
    payload: &'a [u8],
}

/// The messages of a datagram; a malformed rest is left out.
fn answers(mut bytes: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    std::iter::from_fn(move || {
        let len = u32_at(bytes, 0)? as usize;
        let payload = bytes.get(HEADER..len)?;
        let kind = u16_at(bytes, 4)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Answer { kind, payload })
    })
}

/// Whether the kernel says nothing more after this datagram.
pub fn is_last(datagram: &[u8]) -> bool {
    let mut any = false;
    answers(datagram).inspect(|_| any = true).any(|answer| answer.kind == ERROR) || !any
}

/// The verdict on what was asked.
///
/// # Errors
/// What the kernel answered, or `InvalidData` when it did not say how it ended.
pub fn verdict(datagrams: &[Vec<u8>]) -> io::Result<()> {
    for answer in datagrams.iter().flat_map(|datagram| answers(datagram)) {
        if answer.kind == ERROR {
            let number = u32_at(answer.payload, 0).ok_or(io::ErrorKind::InvalidData)?;
            return match i32::from_ne_bytes(number.to_ne_bytes()) {
                0 => Ok(()),
                number => Err(io::Error::from_raw_os_error(number.wrapping_neg())),
            };
        }
    }
    Err(io::ErrorKind::InvalidData.into())
}

/// The value of an attribute in a generic answer.
fn attribute(datagrams: &[Vec<u8>], kind: u16) -> Option<&[u8]> {
    let generic = datagrams.iter().flat_map(|datagram| answers(datagram));
    let mut generic = generic.filter(|answer| answer.kind != ERROR);
    let mut rest = generic.find_map(|answer| answer.payload.get(GENERIC..))?;
    loop {
        let len = usize::from(u16_at(rest, 0)?);
        let found = u16_at(rest, 2)? & TYPE_MASK;
        let value = rest.get(4..len)?;
        if found == kind {
            return Some(value);
        }
        rest = rest.get(len.next_multiple_of(4)..)?;
    }
}

/// The family, from the answer to [`get_family`].
pub fn family(datagrams: &[Vec<u8>]) -> Option<Family> {
    let id = u16_at(attribute(datagrams, control::FAMILY_ID)?, 0)?;
    let max_attribute = u32_at(attribute(datagrams, control::MAX_ATTRIBUTE)?, 0)?;
    Some(Family { id, max_attribute })
}

/// The number of the new device, from the answer to [`connect`].
pub fn index(datagrams: &[Vec<u8>]) -> Option<u32> {
    u32_at(attribute(datagrams, attribute::INDEX)?, 0)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}
