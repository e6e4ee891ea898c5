//! The bytes of the NBD protocol: numbers, headers, replies. Pure; knows no socket and no device.
//!
//! Source of every number: `doc/proto.md` of the NetworkBlockDevice project.

use crate::device::DeviceError;

/// First eight bytes of the greeting, "NBDMAGIC".
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Begins the greeting's second half and every option, "IHAVEOPT".
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Begins every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins every simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Begins every chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flag of both sides: fixed newstyle.
pub const FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag of both sides: no 124 zeroes after EXPORT_NAME.
pub const NO_ZEROES: u16 = 1 << 1;

/// Options of the negotiation.
pub mod option {
    #![allow(missing_docs)] // the protocol's own names
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Kinds of reply to an option.
pub mod reply {
    #![allow(missing_docs)] // the protocol's own names
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    const ERROR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR | 1;
    pub const ERR_POLICY: u32 = ERROR | 2;
    pub const ERR_INVALID: u32 = ERROR | 3;
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
}

/// Kinds of information in a reply to INFO and GO.
pub mod info {
    #![allow(missing_docs)] // the protocol's own names
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export.
pub mod export_flag {
    #![allow(missing_docs)] // the protocol's own names
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Commands of the transmission phase.
pub mod command {
    #![allow(missing_docs)] // the protocol's own names
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a request.
pub mod command_flag {
    #![allow(missing_docs)] // the protocol's own names
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
}

/// Kinds and flags of structured reply chunks.
pub mod chunk {
    #![allow(missing_docs)] // the protocol's own names
    pub const DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = (1 << 15) | 1;
}

/// An error number as it travels in replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorNumber(pub u32);

impl ErrorNumber {
    /// Not permitted: the export is read-only.
    pub const PERM: Self = Self(1);
    /// Input/output error.
    pub const IO: Self = Self(5);
    /// No buffer.
    pub const NOMEM: Self = Self(12);
    /// The request is malformed, unaligned or out of range.
    pub const INVAL: Self = Self(22);
    /// A write beyond the end.
    pub const NOSPC: Self = Self(28);
    /// Too large to be answered unfragmented.
    pub const OVERFLOW: Self = Self(75);
    /// The server is going away.
    pub const SHUTDOWN: Self = Self(108);
}

impl From<DeviceError> for ErrorNumber {
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::Io => Self::IO,
            DeviceError::NoSpace => Self::NOSPC,
            DeviceError::Invalid => Self::INVAL,
            DeviceError::ReadOnly => Self::PERM,
            DeviceError::NoMemory => Self::NOMEM,
            DeviceError::Shutdown => Self::SHUTDOWN,
        }
    }
}

/// Reads big-endian numbers and counted strings from the front of a slice.
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next `len` bytes; `None` when there are fewer.
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (now, later) = self.0.split_at_checked(len)?;
        self.0 = later;
        Some(now)
    }

    /// The next two bytes as a number.
    pub fn u16(&mut self) -> Option<u16> {
        self.bytes(2)?.try_into().ok().map(u16::from_be_bytes)
    }

    /// The next four bytes as a number.
    pub fn u32(&mut self) -> Option<u32> {
        self.bytes(4)?.try_into().ok().map(u32::from_be_bytes)
    }

    /// The next eight bytes as a number.
    pub fn u64(&mut self) -> Option<u64> {
        self.bytes(8)?.try_into().ok().map(u64::from_be_bytes)
    }

    /// A string after its length in four bytes.
    pub fn counted(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()?;
        self.bytes(len as usize)
    }
}

/// Length of a request's header in bytes.
pub const REQUEST_LEN: usize = 28;

/// A request as it was sent; nothing in it is believed yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawRequest {
    /// Flags of the command.
    pub flags: u16,
    /// The command.
    pub command: u16,
    /// The client's mark, echoed verbatim.
    pub cookie: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// How many bytes; the length of the payload for WRITE.
    pub len: u32,
}

impl RawRequest {
    /// Decodes a header; `None` when it does not begin with the magic: the stream is lost.
    #[must_use]
    pub fn decode(header: &[u8; REQUEST_LEN]) -> Option<Self> {
        let mut from = Reader(header);
        if from.u32()? != REQUEST_MAGIC {
            return None;
        }
        Some(Self {
            flags: from.u16()?,
            command: from.u16()?,
            cookie: from.u64()?,
            offset: from.u64()?,
            len: from.u32()?,
        })
    }

    /// Encodes the header, as clients and tests need it.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        let mut header = [0; REQUEST_LEN];
        header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[4..6].copy_from_slice(&self.flags.to_be_bytes());
        header[6..8].copy_from_slice(&self.command.to_be_bytes());
        header[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        header[16..24].copy_from_slice(&self.offset.to_be_bytes());
        header[24..].copy_from_slice(&self.len.to_be_bytes());
        header
    }

    /// Bytes that follow the header, whether or not the request is refused.
    #[must_use]
    pub const fn payload_len(&self) -> u32 {
        if self.command == command::WRITE { self.len } else { 0 }
    }
}

/// The greeting of a fixed newstyle server.
#[must_use]
pub fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&GREETING_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[16..].copy_from_slice(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    bytes
}

/// What a client says after the greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientFlags {
    /// It wants no zeroes after the answer to EXPORT_NAME.
    pub no_zeroes: bool,
}

impl ClientFlags {
    /// Decodes the four bytes; `None` for flags nobody defined: the server must hang up.
    #[must_use]
    pub fn decode(bytes: [u8; 4]) -> Option<Self> {
        let flags = u32::from_be_bytes(bytes);
        let known = u32::from(FIXED_NEWSTYLE | NO_ZEROES);
        (flags & !known == 0).then_some(Self { no_zeroes: flags & u32::from(NO_ZEROES) != 0 })
    }
}

/// Length of an option's header in bytes.
pub const OPTION_LEN: usize = 16;

/// Decodes an option's header into the option and the length of its data; `None` when it does
/// not begin with the magic.
#[must_use]
pub fn decode_option(header: &[u8; OPTION_LEN]) -> Option<(u32, u32)> {
    let mut from = Reader(header);
    if from.u64()? != OPTION_MAGIC {
        return None;
    }
    Some((from.u32()?, from.u32()?))
}

/// Appends a reply of `kind` to `option`, with `parts` as its data.
pub fn option_reply(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    parts.iter().for_each(|part| out.extend_from_slice(part));
}

/// A simple reply; the payload of a read follows it.
#[must_use]
pub fn simple_reply(cookie: u64, error: Option<ErrorNumber>) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.map_or(0, |e| e.0).to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// The header of a structured reply's chunk with `len` bytes of content.
#[must_use]
pub fn chunk_header(cookie: u64, flags: u16, kind: u16, len: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// The header of a chunk that carries `len` bytes read at `offset`.
#[must_use]
pub fn data_chunk(cookie: u64, last: bool, offset: u64, len: u32) -> [u8; 28] {
    let flags = if last { chunk::DONE } else { 0 };
    let mut bytes = [0; 28];
    let header = chunk_header(cookie, flags, chunk::OFFSET_DATA, len.saturating_add(8));
    bytes[..20].copy_from_slice(&header);
    bytes[20..].copy_from_slice(&offset.to_be_bytes());
    bytes
}

/// The chunk that ends a structured reply with an error and no text.
#[must_use]
pub fn error_chunk(cookie: u64, error: ErrorNumber) -> [u8; 26] {
    let mut bytes = [0; 26];
    bytes[..20].copy_from_slice(&chunk_header(cookie, chunk::DONE, chunk::ERROR, 6));
    bytes[20..24].copy_from_slice(&error.0.to_be_bytes());
    bytes
}
