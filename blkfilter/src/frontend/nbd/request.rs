//! Decides what a request means before anything is done about it. Pure.

use farshore_extent::Extent;

use super::limits::{MAX_REQUEST, MAX_REQUEST_UNTOLD};
use super::wire::{ErrorNumber, RawRequest, command, command_flag, export_flag};
use crate::device::{DeviceInfo, MAX_PAYLOAD, check_request};

/// What the negotiation settled for the transmission phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mode {
    /// READ and BLOCK_STATUS are answered by structured replies.
    pub structured: bool,
    /// `base:allocation` was selected.
    pub allocation: bool,
    /// The client was told no block sizes (EXPORT_NAME): reads may begin and end at any byte,
    /// and requests may be larger than what others are told.
    pub untold: bool,
    /// The client is the kernel. It fails a guest's request for good where another client would
    /// try again, and cannot be told when what it was told once is true no more.
    pub kernel: bool,
    /// The client was told that there is no cache: every write is durable before its answer.
    pub durable: bool,
}

impl Mode {
    fn largest(self) -> u32 {
        if self.untold { MAX_REQUEST_UNTOLD } else { MAX_REQUEST }
    }
}

/// What is to be done about a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Read the extent, of which the answer leaves out the first `skip` bytes and has `len`.
    Read {
        /// Where; whole blocks.
        extent: Extent,
        /// Bytes before the wanted ones.
        skip: u32,
        /// The wanted bytes.
        len: u32,
    },
    /// Write the payload that follows.
    Write {
        /// Where.
        extent: Extent,
        /// Durable before the answer.
        fua: bool,
    },
    /// Make the range read as zero.
    Zero {
        /// Where.
        extent: Extent,
        /// Durable before the answer.
        fua: bool,
        /// The space may be given back.
        may_unmap: bool,
    },
    /// Make all completed writes durable.
    Flush,
    /// Tell what is allocated.
    Status {
        /// Where.
        extent: Extent,
        /// One extent only, not longer than asked.
        one: bool,
    },
    /// Succeeds without doing anything: a length of zero.
    Nothing,
    /// The client says goodbye; no answer.
    Disconnect,
    /// Answer with this error, after the payload is drained.
    Refuse(ErrorNumber),
}

/// What the server advertises for a device. Only what is true of it.
#[must_use]
pub fn export_flags(info: &DeviceInfo, structured: bool) -> u16 {
    // A device's flush covers writes completed on every queue, so several connections are safe.
    let mut flags = export_flag::HAS_FLAGS | export_flag::CAN_MULTI_CONN;
    let mut add = |when: bool, flag: u16| flags |= if when { flag } else { 0 };
    add(info.read_only, export_flag::READ_ONLY);
    add(info.volatile_cache, export_flag::SEND_FLUSH | export_flag::SEND_FUA);
    let zeroes = info.zeroes && !info.read_only;
    add(zeroes, export_flag::SEND_TRIM | export_flag::SEND_WRITE_ZEROES);
    add(structured, export_flag::SEND_DF);
    flags
}

/// Decides about `raw` on a device that is `info`.
#[must_use]
pub fn plan(raw: &RawRequest, info: &DeviceInfo, mode: Mode) -> Plan {
    match decide(raw, info, mode) {
        Ok(plan) => plan,
        Err(error) => Plan::Refuse(error),
    }
}

fn decide(raw: &RawRequest, info: &DeviceInfo, mode: Mode) -> Result<Plan, ErrorNumber> {
    check_flags(raw, info, mode)?;
    let fua = mode.durable || raw.flags & command_flag::FUA != 0;
    match raw.command {
        command::READ => {
            if raw.len > mode.largest() {
                return Err(ErrorNumber::INVAL);
            }
            let whole = raw.flags & command_flag::DF != 0;
            if whole && raw.len as usize > MAX_PAYLOAD {
                return Err(ErrorNumber::OVERFLOW);
            }
            read(raw, info, mode)
        }
        command::WRITE => {
            writable(info)?;
            if raw.len > mode.largest() {
                return Err(ErrorNumber::INVAL);
            }
            let extent = range(raw, info, ErrorNumber::NOSPC)?;
            Ok(extent.map_or(Plan::Nothing, |extent| Plan::Write { extent, fua }))
        }
        command::WRITE_ZEROES => {
            zeroes(info)?;
            let may_unmap = raw.flags & command_flag::NO_HOLE == 0;
            let extent = range(raw, info, ErrorNumber::NOSPC)?;
            Ok(extent.map_or(Plan::Nothing, |extent| Plan::Zero { extent, fua, may_unmap }))
        }
        command::TRIM => {
            zeroes(info)?;
            let extent = range(raw, info, ErrorNumber::INVAL)?;
            Ok(extent.map_or(Plan::Nothing, |extent| Plan::Zero { extent, fua, may_unmap: true }))
        }
        command::FLUSH if info.volatile_cache || mode.kernel => Ok(Plan::Flush),
        command::BLOCK_STATUS if mode.allocation => {
            let one = raw.flags & command_flag::REQ_ONE != 0;
            let extent = range(raw, info, ErrorNumber::INVAL)?.ok_or(ErrorNumber::INVAL)?;
            Ok(Plan::Status { extent, one })
        }
        command::DISC => Ok(Plan::Disconnect),
        _ => Err(ErrorNumber::INVAL), // a number from the wire: unknown or not negotiated
    }
}

/// Refuses flags that mean nothing for the command or were not advertised. FUA alone is allowed
/// on every command once it was.
fn check_flags(raw: &RawRequest, info: &DeviceInfo, mode: Mode) -> Result<(), ErrorNumber> {
    let fua = if info.volatile_cache || mode.kernel { command_flag::FUA } else { 0 };
    let own = match raw.command {
        command::READ if mode.structured => command_flag::DF,
        command::WRITE_ZEROES => command_flag::NO_HOLE,
        command::BLOCK_STATUS => command_flag::REQ_ONE,
        command::DISC => return Ok(()), // cannot be answered
        _ => 0,
    };
    if raw.flags & !(fua | own) == 0 { Ok(()) } else { Err(ErrorNumber::INVAL) }
}

/// A read; widened to whole blocks for a client that was told no block sizes.
fn read(raw: &RawRequest, info: &DeviceInfo, mode: Mode) -> Result<Plan, ErrorNumber> {
    let unit = u64::from(info.blocks.logical());
    let mut wide = *raw;
    if mode.untold && raw.len > 0 {
        let end = raw.offset.checked_add(u64::from(raw.len)).ok_or(ErrorNumber::INVAL)?;
        let stop = end.checked_next_multiple_of(unit).ok_or(ErrorNumber::INVAL)?;
        wide.offset = raw.offset - raw.offset % unit;
        wide.len = u32::try_from(stop - wide.offset).map_err(|_| ErrorNumber::INVAL)?;
    }
    let skip = u32::try_from(raw.offset - wide.offset).map_err(|_| ErrorNumber::INVAL)?;
    let extent = range(&wide, info, ErrorNumber::INVAL)?;
    Ok(extent.map_or(Plan::Nothing, |extent| Plan::Read { extent, skip, len: raw.len }))
}

fn writable(info: &DeviceInfo) -> Result<(), ErrorNumber> {
    if info.read_only { Err(ErrorNumber::PERM) } else { Ok(()) }
}

fn zeroes(info: &DeviceInfo) -> Result<(), ErrorNumber> {
    writable(info)?;
    if info.zeroes { Ok(()) } else { Err(ErrorNumber::INVAL) }
}

/// The range of a request; `None` when it is empty; `beyond` when it ends after the device.
fn range(
    raw: &RawRequest,
    info: &DeviceInfo,
    beyond: ErrorNumber,
) -> Result<Option<Extent>, ErrorNumber> {
    let end = raw.offset.checked_add(u64::from(raw.len));
    if end.is_none_or(|end| end > info.size.get()) {
        return Err(beyond);
    }
    if raw.len == 0 {
        return Ok(None);
    }
    check_request(info, raw.offset, u64::from(raw.len)).map(Some).map_err(ErrorNumber::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use farshore_extent::{BlockSizes, VolumeSize};

    fn disk() -> DeviceInfo {
        DeviceInfo {
            size: VolumeSize::new(64 << 20).unwrap(),
            blocks: BlockSizes::E512,
            read_only: false,
            zeroes: true,
            volatile_cache: true,
        }
    }

    fn ask(command: u16, flags: u16, offset: u64, len: u32) -> RawRequest {
        RawRequest { flags, command, cookie: 1, offset, len }
    }

    const ALL: Mode =
        Mode { structured: true, allocation: true, untold: false, kernel: false, durable: false };

    #[test]
    fn errors_are_the_ones_the_protocol_names() {
        let disk = disk();
        let end = disk.size.get();
        let refused = |raw: RawRequest| match plan(&raw, &disk, ALL) {
            Plan::Refuse(error) => error,
            other => panic!("{raw:?} gave {other:?}"),
        };
        let big = MAX_REQUEST + 512;
        assert_eq!(refused(ask(command::READ, 0, end, 512)), ErrorNumber::INVAL);
        assert_eq!(refused(ask(command::WRITE, 0, end, 512)), ErrorNumber::NOSPC);
        assert_eq!(refused(ask(command::WRITE_ZEROES, 0, end, 512)), ErrorNumber::NOSPC);
        assert_eq!(refused(ask(command::TRIM, 0, end, 512)), ErrorNumber::INVAL);
        assert_eq!(refused(ask(command::WRITE, 0, u64::MAX, 512)), ErrorNumber::NOSPC);
        assert_eq!(refused(ask(command::WRITE, 0, 1, 512)), ErrorNumber::INVAL);
        assert_eq!(refused(ask(command::WRITE, 0, 0, 513)), ErrorNumber::INVAL);
        assert_eq!(refused(ask(command::WRITE, 0, 0, big)), ErrorNumber::INVAL);
        assert_eq!(refused(ask(command::READ, 0, 0, big)), ErrorNumber::INVAL);
        let whole = command_flag::DF;
        assert_eq!(refused(ask(command::READ, whole, 0, MAX_REQUEST)), ErrorNumber::OVERFLOW);
        assert_eq!(refused(ask(command::BLOCK_STATUS, 0, 0, 0)), ErrorNumber::INVAL);
        assert_eq!(refused(ask(99, 0, 0, 0)), ErrorNumber::INVAL);
        assert_eq!(refused(ask(command::WRITE, 1 << 4, 0, 512)), ErrorNumber::INVAL);
    }

    #[test]
    fn clients_that_were_told_no_sizes_read_any_bytes_but_write_whole_blocks() {
        let untold = Mode { untold: true, ..ALL };
        let got = plan(&ask(command::READ, 0, 513, 1023), &disk(), untold);
        let extent = Extent::new(512, 1024).unwrap();
        assert_eq!(got, Plan::Read { extent, skip: 1, len: 1023 });
        let end = disk().size.get();
        for (offset, len) in [(end - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 1)] {
            let got = plan(&ask(command::READ, 0, offset, len), &disk(), untold);
            assert_eq!(got, Plan::Refuse(ErrorNumber::INVAL));
        }
        let got = plan(&ask(command::WRITE, 0, 513, 512), &disk(), untold);
        assert_eq!(got, Plan::Refuse(ErrorNumber::INVAL));
    }

    #[test]
    fn nothing_is_possible_that_was_not_advertised() {
        let bare = DeviceInfo { read_only: true, zeroes: false, volatile_cache: false, ..disk() };
        let none = Mode::default();
        for (command, flags, error) in [
            (command::WRITE, 0, ErrorNumber::PERM),
            (command::WRITE, command_flag::FUA, ErrorNumber::INVAL),
            (command::TRIM, 0, ErrorNumber::PERM),
            (command::FLUSH, 0, ErrorNumber::INVAL),
            (command::BLOCK_STATUS, 0, ErrorNumber::INVAL),
            (command::READ, command_flag::DF, ErrorNumber::INVAL),
        ] {
            let got = plan(&ask(command, flags, 0, 512), &bare, none);
            assert_eq!(got, Plan::Refuse(error), "command {command} flags {flags}");
        }
        let flags = export_flags(&bare, false);
        let all = export_flag::HAS_FLAGS | export_flag::READ_ONLY | export_flag::CAN_MULTI_CONN;
        assert_eq!(flags, all);
    }

    #[test]
    fn empty_requests_succeed_and_do_nothing() {
        for command in [command::READ, command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(plan(&ask(command, 0, 512, 0), &disk(), ALL), Plan::Nothing);
        }
    }
}
