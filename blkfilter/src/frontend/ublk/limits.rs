//! What a device says of itself to the block layer. Every limit is set, none is left to a default.

use farshore_extent::VolumeSize;

use super::error::UblkError;
use crate::device::{DeviceError, DeviceInfo, MAX_PAYLOAD};
use crate::sys::ublk::uapi::{DiscardParams, Params, attribute};

/// Sector of the ublk protocol, in bytes.
pub(super) const SECTOR: u64 = 512;

/// Longest range that is zeroed or discarded by one request, in bytes: what the seam takes.
pub(super) const MAX_ZERO: u64 = 64 << 20;

/// Longest read or write in bytes: one slot.
pub(super) const MAX_IO: usize = MAX_PAYLOAD;

/// The same where every tag needs a buffer of that size.
pub(super) const MAX_IO_BUFFERED: usize = 256 << 10;

/// Smallest useful discard in bytes: smaller ones free nothing on most file systems and disks.
const DISCARD_GRANULARITY: u32 = 4096;

/// Largest logical block the driver takes, in bytes: the smallest page there is.
const MAX_LOGICAL: u32 = 4096;

/// Tags of a queue unless told otherwise.
pub(super) const DEPTH: u16 = 64;

/// Most queues unless told otherwise.
pub(super) const QUEUES: u16 = 4;

/// The limits of a device with reads and writes of at most `max_io` bytes.
///
/// # Errors
/// [`DeviceError::Invalid`] when its logical blocks are larger than the driver takes.
pub(super) fn params(info: &DeviceInfo, max_io: usize) -> Result<Params, UblkError> {
    let (logical, physical) = (info.blocks.logical(), info.blocks.physical());
    if logical > MAX_LOGICAL {
        return Err(DeviceError::Invalid.into());
    }
    let shift = |size: u32| u8::try_from(size.trailing_zeros()).unwrap_or(u8::MAX);
    let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX);
    let mut attributes = 0;
    if info.read_only {
        attributes |= attribute::READ_ONLY;
    }
    if info.volatile_cache {
        attributes |= attribute::VOLATILE_CACHE | attribute::FUA;
    }
    let discard = (info.zeroes && !info.read_only).then(|| DiscardParams {
        granularity: physical.max(DISCARD_GRANULARITY),
        max_discard: sectors(MAX_ZERO),
        max_write_zeroes: sectors(MAX_ZERO),
    });
    Ok(Params {
        attributes,
        logical_shift: shift(logical),
        physical_shift: shift(physical),
        io_opt_shift: shift(physical),
        io_min_shift: shift(physical),
        max_sectors: sectors(max_io as u64),
        sectors: size_in_sectors(info.size),
        discard,
    })
}

/// A size as the driver counts.
pub(super) fn size_in_sectors(size: VolumeSize) -> u64 {
    size.get() / SECTOR
}

#[cfg(test)]
mod tests {
    use super::*;
    use farshore_extent::BlockSizes;

    fn disk() -> DeviceInfo {
        DeviceInfo {
            size: VolumeSize::new(1 << 30).unwrap(),
            blocks: BlockSizes::E512,
            read_only: false,
            zeroes: true,
            volatile_cache: true,
        }
    }

    #[test]
    fn a_disk_with_everything_says_so() {
        let params = params(&disk(), MAX_IO).unwrap();
        assert_eq!(params.attributes, attribute::VOLATILE_CACHE | attribute::FUA);
        assert_eq!((params.logical_shift, params.physical_shift), (9, 12));
        assert_eq!((params.io_min_shift, params.io_opt_shift), (12, 12));
        assert_eq!((params.max_sectors, params.sectors), (2048, 2 << 20));
        let discard = params.discard.unwrap();
        assert_eq!((discard.max_discard, discard.max_write_zeroes), (131_072, 131_072));
        assert_eq!(discard.granularity, 4096);
    }

    #[test]
    fn a_disk_is_never_said_to_do_what_it_cannot() {
        let info = DeviceInfo { zeroes: false, volatile_cache: false, ..disk() };
        let found = params(&info, MAX_IO_BUFFERED).unwrap();
        assert_eq!((found.attributes, found.discard, found.max_sectors), (0, None, 512));
        let info = DeviceInfo { read_only: true, ..disk() };
        let found = params(&info, MAX_IO).unwrap();
        assert!(found.attributes & attribute::READ_ONLY != 0 && found.discard.is_none());
        let blocks = BlockSizes::new(4096, 4096).unwrap();
        let found = params(&DeviceInfo { blocks, ..disk() }, MAX_IO).unwrap();
        assert_eq!((found.logical_shift, found.discard.unwrap().granularity), (12, 4096));
        let blocks = BlockSizes::new(65536, 65536).unwrap();
        assert!(params(&DeviceInfo { blocks, ..disk() }, MAX_IO).is_err());
    }
}
