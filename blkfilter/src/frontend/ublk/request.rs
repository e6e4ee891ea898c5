//! What a descriptor asks for.

use farshore_extent::Extent;
use nix::errno::Errno;

use super::limits::{MAX_ZERO, SECTOR};
use crate::device::{DeviceError, DeviceInfo, MAX_PAYLOAD, check_request};
use crate::sys::ublk::uapi::{Descriptor, flag, op};

/// A request, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plan {
    Read { extent: Extent, len: u32 },
    Write { extent: Extent, len: u32, fua: bool },
    Zero { extent: Extent, fua: bool, may_unmap: bool },
    Flush,
    Refuse(Errno),
}

/// Checks a descriptor against what the device is.
pub(super) fn plan(descriptor: &Descriptor, info: &DeviceInfo) -> Plan {
    let [operation, ..] = descriptor.op_flags.to_le_bytes();
    let fua = descriptor.op_flags & flag::FUA != 0;
    let may_unmap = descriptor.op_flags & flag::NOUNMAP == 0;
    match operation {
        op::FLUSH => return Plan::Flush,
        op::READ | op::WRITE => {}
        op::DISCARD | op::WRITE_ZEROES if info.zeroes => {}
        _ => return Plan::Refuse(Errno::EOPNOTSUPP),
    }
    let bytes = u64::from(descriptor.sectors) * SECTOR;
    let offset = descriptor.start.checked_mul(SECTOR);
    let extent = offset.and_then(|offset| check_request(info, offset, bytes).ok());
    let Some(extent) = extent else { return Plan::Refuse(Errno::EINVAL) };
    let len = u32::try_from(bytes).ok().filter(|len| *len as usize <= MAX_PAYLOAD);
    match (operation, len) {
        (op::READ, Some(len)) => Plan::Read { extent, len },
        (op::WRITE, Some(len)) => Plan::Write { extent, len, fua },
        (op::DISCARD, _) if bytes <= MAX_ZERO => Plan::Zero { extent, fua, may_unmap: true },
        (op::WRITE_ZEROES, _) if bytes <= MAX_ZERO => Plan::Zero { extent, fua, may_unmap },
        // The limits of the device keep these away.
        _ => Plan::Refuse(Errno::EINVAL),
    }
}

/// What the guest's kernel is told about an error.
pub(super) fn errno(error: DeviceError) -> Errno {
    match error {
        DeviceError::Io => Errno::EIO,
        DeviceError::NoSpace => Errno::ENOSPC,
        DeviceError::Invalid => Errno::EINVAL,
        DeviceError::ReadOnly => Errno::EPERM,
        DeviceError::NoMemory => Errno::ENOMEM,
        DeviceError::Shutdown => Errno::ESHUTDOWN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use farshore_extent::{BlockSizes, VolumeSize};

    fn disk() -> DeviceInfo {
        DeviceInfo {
            size: VolumeSize::new(1 << 30).unwrap(),
            blocks: BlockSizes::new(4096, 4096).unwrap(),
            read_only: false,
            zeroes: true,
            volatile_cache: true,
        }
    }

    fn ask(op_flags: u32, start: u64, sectors: u32) -> Plan {
        plan(&Descriptor { op_flags, sectors, start }, &disk())
    }

    fn extent(offset: u64, len: u64) -> Extent {
        Extent::new(offset, len).unwrap()
    }

    #[test]
    fn every_operation_is_understood_with_its_flags() {
        assert_eq!(ask(0, 8, 8), Plan::Read { extent: extent(4096, 4096), len: 4096 });
        let write = |fua| Plan::Write { extent: extent(0, 1 << 20), len: 1 << 20, fua };
        assert_eq!(ask(1, 0, 2048), write(false));
        assert_eq!(ask(1 | flag::FUA, 0, 2048), write(true));
        assert_eq!(ask(2, 0, 0), Plan::Flush);
        let zero = |may_unmap, fua| Plan::Zero { extent: extent(0, 64 << 20), fua, may_unmap };
        assert_eq!(ask(3, 0, 131_072), zero(true, false));
        assert_eq!(ask(5, 0, 131_072), zero(true, false));
        assert_eq!(ask(5 | flag::NOUNMAP | flag::FUA, 0, 131_072), zero(false, true));
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        let invalid = Plan::Refuse(Errno::EINVAL);
        assert_eq!(ask(0, 1, 8), invalid, "not aligned to a block");
        assert_eq!(ask(0, (1 << 30) / 512, 8), invalid, "behind the end");
        assert_eq!(ask(0, u64::MAX, 8), invalid);
        assert_eq!(ask(0, 0, 0), invalid, "empty");
        assert_eq!(ask(1, 0, 2056), invalid, "longer than a slot");
        assert_eq!(ask(3, 0, 131_080), invalid);
        assert_eq!(ask(4, 0, 8), Plan::Refuse(Errno::EOPNOTSUPP));
        assert_eq!(ask(13, 0, 8), Plan::Refuse(Errno::EOPNOTSUPP));
        let cannot = DeviceInfo { zeroes: false, ..disk() };
        let descriptor = Descriptor { op_flags: 3, sectors: 8, start: 0 };
        assert_eq!(plan(&descriptor, &cannot), Plan::Refuse(Errno::EOPNOTSUPP));
    }
}
