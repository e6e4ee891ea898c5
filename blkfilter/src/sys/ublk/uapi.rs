//! What travels between this process and the ublk driver, byte for byte.
//!
//! Source of every number and layout: `include/uapi/linux/ublk_cmd.h` of Linux 6.12 and 7.2, whose
//! structures have no implicit padding. They are put together and taken apart field by field, so
//! that no memory is reinterpreted. Numbers are in the byte order of the machine.

/// Feature bits: what a driver can do (`GET_FEATURES`), and how a device was made (its flags).
pub mod feature {
    /// The device outlives its server: I/O waits for the next one.
    pub const USER_RECOVERY: u64 = 1 << 3;
    /// And requests that were with the dead server are handed to the next one.
    pub const USER_RECOVERY_REISSUE: u64 = 1 << 4;
    /// Commands are encoded like ioctls.
    pub const CMD_IOCTL_ENCODE: u64 = 1 << 6;
    /// Payload is fetched and delivered by reading and writing the character device.
    pub const USER_COPY: u64 = 1 << 7;
    /// The size can be changed while the device is in use.
    pub const UPDATE_SIZE: u64 = 1 << 10;
    /// `TRY_STOP_DEV` stops a device only when nobody has it open.
    pub const SAFE_STOP_DEV: u64 = 1 << 17;
    /// Partitions can be left alone when the device starts.
    pub const NO_AUTO_PART_SCAN: u64 = 1 << 18;

    /// Name of every bit, from bit 0 on.
    pub const NAMES: [&str; 20] = [
        "SUPPORT_ZERO_COPY",
        "URING_CMD_COMP_IN_TASK",
        "NEED_GET_DATA",
        "USER_RECOVERY",
        "USER_RECOVERY_REISSUE",
        "UNPRIVILEGED_DEV",
        "CMD_IOCTL_ENCODE",
        "USER_COPY",
        "ZONED",
        "USER_RECOVERY_FAIL_IO",
        "UPDATE_SIZE",
        "AUTO_BUF_REG",
        "QUIESCE",
        "PER_IO_DAEMON",
        "BUF_REG_OFF_DAEMON",
        "BATCH_IO",
        "INTEGRITY",
        "SAFE_STOP_DEV",
        "NO_AUTO_PART_SCAN",
        "SHMEM_ZC",
    ];
}

/// Encodes a command as an ioctl number of type `u`.
const fn ioc(direction: u32, number: u32, size: u32) -> u32 {
    (direction << 30) | (size << 16) | ((b'u' as u32) << 8) | number
}

const READ: u32 = 2;
const READ_WRITE: u32 = 3;

/// Bytes of a control command.
pub const CONTROL_LEN: usize = 32;
/// Bytes of an I/O command.
pub const IO_LEN: usize = 16;

/// Control commands, for `/dev/ublk-control`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Control {
    /// CPUs mapped to queue `data` into the buffer.
    GetQueueAffinity = ioc(READ, 0x01, 32),
    /// [`DevInfo`] into the buffer.
    GetDevInfo = ioc(READ, 0x02, 32),
    /// A new device from [`DevInfo`]; what was granted comes back in the buffer.
    AddDev = ioc(READ_WRITE, 0x04, 32),
    /// Deletes a device. Waits until nobody refers to it.
    DelDev = ioc(READ_WRITE, 0x05, 32),
    /// Shows the block device, served by process `data`. Waits until every tag was fetched.
    StartDev = ioc(READ_WRITE, 0x06, 32),
    /// Takes the block device away.
    StopDev = ioc(READ_WRITE, 0x07, 32),
    /// [`Params`] from the buffer; before the start only.
    SetParams = ioc(READ_WRITE, 0x08, 32),
    /// [`Params`] into the buffer.
    GetParams = ioc(READ, 0x09, 32),
    /// Makes a device whose server has died ready for the fetches of the next one.
    StartUserRecovery = ioc(READ_WRITE, 0x10, 32),
    /// Lets I/O go on, served by process `data`. Waits until every tag was fetched.
    EndUserRecovery = ioc(READ_WRITE, 0x11, 32),
    /// Eight bytes of [`feature`] bits into the buffer.
    GetFeatures = ioc(READ, 0x13, 32),
    /// The size becomes `data` sectors of 512 bytes.
    UpdateSize = ioc(READ_WRITE, 0x15, 32),
    /// [`Self::StopDev`], refused with `EBUSY` while the block device is open.
    TryStopDev = ioc(READ_WRITE, 0x17, 32),
}

impl Control {
    const ALL: [Self; 13] = [
        Self::GetQueueAffinity,
        Self::GetDevInfo,
        Self::AddDev,
        Self::DelDev,
        Self::StartDev,
        Self::StopDev,
        Self::SetParams,
        Self::GetParams,
        Self::StartUserRecovery,
        Self::EndUserRecovery,
        Self::GetFeatures,
        Self::UpdateSize,
        Self::TryStopDev,
    ];

    /// The command of this number.
    #[must_use]
    pub fn of(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|command| *command as u32 == number)
    }
}

/// I/O command: the tag is ready for its first request.
pub const IO_FETCH: u32 = ioc(READ_WRITE, 0x20, 16);
/// I/O command: the tag's request ended so; it is ready for the next.
pub const IO_COMMIT_AND_FETCH: u32 = ioc(READ_WRITE, 0x21, 16);

/// Device states.
pub mod state {
    /// Not started, or stopped: there is no block device.
    pub const DEAD: u16 = 0;
    /// Served, or its server's death has not been dealt with yet.
    pub const LIVE: u16 = 1;
    /// Without server; I/O waits.
    pub const QUIESCED: u16 = 2;
    /// Without server; I/O fails.
    pub const FAIL_IO: u16 = 3;
}

/// Operations of requests.
pub mod op {
    /// Payload comes from us.
    pub const READ: u8 = 0;
    /// Payload is for us.
    pub const WRITE: u8 = 1;
    /// Completed writes become durable.
    pub const FLUSH: u8 = 2;
    /// The range is of no use to anybody any more.
    pub const DISCARD: u8 = 3;
    /// The range reads as zero.
    pub const WRITE_ZEROES: u8 = 5;
}

/// Flags of requests, as bits of [`Descriptor::op_flags`].
pub mod flag {
    /// Durable at completion.
    pub const FUA: u32 = 1 << 13;
    /// Space must not be given back.
    pub const NOUNMAP: u32 = 1 << 15;
}

/// Most tags of a queue.
pub const MAX_DEPTH: u16 = 1 << 12;

/// Bytes of the mapping of one queue's descriptors, with pages of `page` bytes. Queues are mapped
/// as far apart as one of [`MAX_DEPTH`] would need.
#[must_use]
pub const fn descriptors_len(depth: u16, page: u64) -> u64 {
    (depth as u64 * Descriptor::LEN as u64).next_multiple_of(page)
}

/// Where the payloads of requests begin in the character device.
const BUF_OFFSET: u64 = 0x8000_0000;
/// Bits of a position inside a payload.
const BUF_BITS: u32 = 25;
/// Bits of a tag.
const TAG_BITS: u32 = 16;

/// Position in the character device of the payload of `tag` of queue `queue`.
#[must_use]
pub const fn payload_position(queue: u16, tag: u16) -> u64 {
    BUF_OFFSET + ((queue as u64) << (BUF_BITS + TAG_BITS)) + ((tag as u64) << BUF_BITS)
}

/// One request, as the driver puts it into the mapped page of its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Descriptor {
    /// [`op`] in the low eight bits, and [`flag`]s.
    pub op_flags: u32,
    /// Length in sectors of 512 bytes.
    pub sectors: u32,
    /// First sector.
    pub start: u64,
}

impl Descriptor {
    /// Bytes of one descriptor; the last eight (a buffer address) are of no use here.
    pub const LEN: usize = 24;

    /// Of its first 16 bytes, as two words.
    #[must_use]
    pub fn from_words(first: u64, second: u64) -> Self {
        let half = |bytes: &[u8]| u32::from_ne_bytes(array(bytes));
        let bytes = first.to_ne_bytes();
        Self { op_flags: half(&bytes[..4]), sectors: half(&bytes[4..]), start: second }
    }
}

/// The fixed part of a control command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ControlCommand {
    /// Number of the device.
    pub device: u32,
    /// Bytes of the buffer.
    pub len: u16,
    /// Address of the buffer.
    pub address: u64,
    /// Meaning by command.
    pub data: u64,
}

impl ControlCommand {
    /// As the driver reads it. No command here is for a single queue.
    #[must_use]
    pub fn encode(&self) -> [u8; CONTROL_LEN] {
        let mut out = [0; CONTROL_LEN];
        out[0..4].copy_from_slice(&self.device.to_ne_bytes());
        out[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
        out[6..8].copy_from_slice(&self.len.to_ne_bytes());
        out[8..16].copy_from_slice(&self.address.to_ne_bytes());
        out[16..24].copy_from_slice(&self.data.to_ne_bytes());
        out
    }
}

/// An I/O command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IoCommand {
    /// Index of the queue.
    pub queue: u16,
    /// Tag.
    pub tag: u16,
    /// Of the request that ends: bytes moved, zero, or a negative errno.
    pub result: i32,
    /// Buffer of the tag's next request; zero with [`feature::USER_COPY`].
    pub address: u64,
}

impl IoCommand {
    /// As the driver reads it.
    #[must_use]
    pub fn encode(&self) -> [u8; IO_LEN] {
        let mut out = [0; IO_LEN];
        out[0..2].copy_from_slice(&self.queue.to_ne_bytes());
        out[2..4].copy_from_slice(&self.tag.to_ne_bytes());
        out[4..8].copy_from_slice(&self.result.to_ne_bytes());
        out[8..16].copy_from_slice(&self.address.to_ne_bytes());
        out
    }
}

/// What a device is to the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DevInfo {
    /// Queues.
    pub queues: u16,
    /// Tags of each queue.
    pub depth: u16,
    /// One of [`state`].
    pub state: u16,
    /// Longest payload in bytes.
    pub max_io_bytes: u32,
    /// Number of the device; all ones in a request for any.
    pub device: u32,
    /// Process that served it last. Tells nothing: some kernels keep it after a death.
    pub server_pid: i32,
    /// [`feature`] bits. The driver sets some that nobody asked for.
    pub flags: u64,
    /// A word of ours that the driver keeps.
    pub owner: u64,
}

impl DevInfo {
    /// Bytes.
    pub const LEN: usize = 64;

    /// As the driver reads it.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[0..2].copy_from_slice(&self.queues.to_ne_bytes());
        out[2..4].copy_from_slice(&self.depth.to_ne_bytes());
        out[4..6].copy_from_slice(&self.state.to_ne_bytes());
        out[8..12].copy_from_slice(&self.max_io_bytes.to_ne_bytes());
        out[12..16].copy_from_slice(&self.device.to_ne_bytes());
        out[16..20].copy_from_slice(&self.server_pid.to_ne_bytes());
        out[24..32].copy_from_slice(&self.flags.to_ne_bytes());
        out[32..40].copy_from_slice(&self.owner.to_ne_bytes());
        out
    }

    /// As the driver wrote it; what is missing at the end reads as zero.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Self {
        Self {
            queues: u16::from_ne_bytes(field(bytes, 0)),
            depth: u16::from_ne_bytes(field(bytes, 2)),
            state: u16::from_ne_bytes(field(bytes, 4)),
            max_io_bytes: u32::from_ne_bytes(field(bytes, 8)),
            device: u32::from_ne_bytes(field(bytes, 12)),
            server_pid: i32::from_ne_bytes(field(bytes, 16)),
            flags: u64::from_ne_bytes(field(bytes, 24)),
            owner: u64::from_ne_bytes(field(bytes, 32)),
        }
    }
}

/// Attributes of a device, in [`Params::attributes`].
pub mod attribute {
    /// Writes are refused by the block layer.
    pub const READ_ONLY: u32 = 1 << 0;
    /// Completed writes may be lost until flushed: flushes are sent.
    pub const VOLATILE_CACHE: u32 = 1 << 2;
    /// Single writes can be durable at completion.
    pub const FUA: u32 = 1 << 3;
}

/// Limits of a device: the basic and the discard group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Params {
    /// [`attribute`] bits.
    pub attributes: u32,
    /// Logical block size, as a power of two.
    pub logical_shift: u8,
    /// Physical block size.
    pub physical_shift: u8,
    /// Best size of I/O.
    pub io_opt_shift: u8,
    /// Smallest size of I/O that costs nothing extra.
    pub io_min_shift: u8,
    /// Longest read or write in sectors of 512 bytes.
    pub max_sectors: u32,
    /// Size of the device in sectors.
    pub sectors: u64,
    /// Limits of discard and write-zeroes; none: neither is possible.
    pub discard: Option<DiscardParams>,
}

/// Limits of discard and write-zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiscardParams {
    /// Smallest useful discard in bytes.
    pub granularity: u32,
    /// Longest discard in sectors.
    pub max_discard: u32,
    /// Longest write-zeroes in sectors.
    pub max_write_zeroes: u32,
}

const LEN_OF_PARAMS: u16 = 60;
const PARAMS_BASIC: u32 = 1 << 0;
const PARAMS_DISCARD: u32 = 1 << 1;

impl Params {
    /// Bytes up to the end of the discard group; later groups are never sent.
    pub const LEN: usize = LEN_OF_PARAMS as usize;

    /// As the driver reads it. Written: an eight byte head, 32 bytes basic, 20 bytes discard.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        let types = PARAMS_BASIC | if self.discard.is_some() { PARAMS_DISCARD } else { 0 };
        out[0..4].copy_from_slice(&u32::from(LEN_OF_PARAMS).to_ne_bytes());
        out[4..8].copy_from_slice(&types.to_ne_bytes());
        out[8..12].copy_from_slice(&self.attributes.to_ne_bytes());
        out[12] = self.logical_shift;
        out[13] = self.physical_shift;
        out[14] = self.io_opt_shift;
        out[15] = self.io_min_shift;
        out[16..20].copy_from_slice(&self.max_sectors.to_ne_bytes());
        // 20..24: no boundaries that requests must not cross.
        out[24..32].copy_from_slice(&self.sectors.to_ne_bytes());
        // 32..40: no boundary mask. 40..44: discards are aligned to the start of the device.
        if let Some(discard) = &self.discard {
            out[44..48].copy_from_slice(&discard.granularity.to_ne_bytes());
            out[48..52].copy_from_slice(&discard.max_discard.to_ne_bytes());
            out[52..56].copy_from_slice(&discard.max_write_zeroes.to_ne_bytes());
            out[56..58].copy_from_slice(&1u16.to_ne_bytes()); // the only number there may be
        }
        out
    }

    /// As the driver wrote it.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Self {
        let types = u32::from_ne_bytes(field(bytes, 4));
        let [logical_shift, physical_shift, io_opt_shift, io_min_shift] = field(bytes, 12);
        Self {
            attributes: u32::from_ne_bytes(field(bytes, 8)),
            logical_shift,
            physical_shift,
            io_opt_shift,
            io_min_shift,
            max_sectors: u32::from_ne_bytes(field(bytes, 16)),
            sectors: u64::from_ne_bytes(field(bytes, 24)),
            discard: (types & PARAMS_DISCARD != 0).then(|| DiscardParams {
                granularity: u32::from_ne_bytes(field(bytes, 44)),
                max_discard: u32::from_ne_bytes(field(bytes, 48)),
                max_write_zeroes: u32::from_ne_bytes(field(bytes, 52)),
            }),
        }
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    array(bytes.get(at..at + N).unwrap_or(&[0; N]))
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_numbers_of_the_kernel_header() {
        // _IOC of type 'u' (0x75) with sizes 32 and 16, worked out by hand from the header.
        assert_eq!(Control::GetQueueAffinity as u32, 0x8020_7501);
        assert_eq!(Control::GetDevInfo as u32, 0x8020_7502);
        assert_eq!(Control::AddDev as u32, 0xc020_7504);
        assert_eq!(Control::DelDev as u32, 0xc020_7505);
        assert_eq!(Control::StartDev as u32, 0xc020_7506);
        assert_eq!(Control::StopDev as u32, 0xc020_7507);
        assert_eq!(Control::SetParams as u32, 0xc020_7508);
        assert_eq!(Control::GetParams as u32, 0x8020_7509);
        assert_eq!(Control::StartUserRecovery as u32, 0xc020_7510);
        assert_eq!(Control::EndUserRecovery as u32, 0xc020_7511);
        assert_eq!(Control::GetFeatures as u32, 0x8020_7513);
        assert_eq!(Control::UpdateSize as u32, 0xc020_7515);
        assert_eq!(Control::TryStopDev as u32, 0xc020_7517);
        assert_eq!((IO_FETCH, IO_COMMIT_AND_FETCH), (0xc010_7520, 0xc010_7521));
        assert_eq!(descriptors_len(MAX_DEPTH, 4096), 98_304);
        assert_eq!(descriptors_len(64, 4096), 4096);
        assert_eq!(feature::NAMES[17], "SAFE_STOP_DEV");
        assert_eq!(feature::SAFE_STOP_DEV, 0x20000);
    }

    #[test]
    fn payloads_of_all_tags_lie_apart_from_each_other() {
        assert_eq!(payload_position(0, 0), 0x8000_0000);
        assert_eq!(payload_position(0, 1), 0x8200_0000);
        assert_eq!(payload_position(1, 0), 0x200_8000_0000);
        assert_eq!(payload_position(3, 4095), 0x8000_0000 + (3 << 41) + (4095 << 25));
        assert!(i64::try_from(payload_position(4095, 4095)).is_ok());
    }

    #[test]
    fn commands_are_laid_out_as_the_driver_reads_them() {
        let command = ControlCommand { device: 7, len: 64, address: 0x1122_3344_5566, data: 9 };
        let bytes = command.encode();
        assert_eq!(bytes[0], 7);
        assert_eq!(bytes[4..8], [0xff, 0xff, 64, 0]);
        assert_eq!(bytes[8..16], 0x1122_3344_5566u64.to_ne_bytes());
        assert_eq!(bytes[16..], [9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let bytes = IoCommand { queue: 1, tag: 2, result: -5, address: 6 }.encode();
        assert_eq!(bytes, [1, 0, 2, 0, 0xfb, 0xff, 0xff, 0xff, 6, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn device_info_and_params_survive_the_way_there_and_back() {
        let info = DevInfo {
            queues: 2,
            depth: 64,
            state: state::QUIESCED,
            max_io_bytes: 1 << 20,
            device: 3,
            server_pid: -1,
            flags: 0x1fe,
            owner: 0xdead_beef_0102_0304,
        };
        assert_eq!(DevInfo::decode(&info.encode()), info);
        assert_eq!(info.encode()[24..32], 0x1feu64.to_ne_bytes());
        let discard =
            DiscardParams { granularity: 4096, max_discard: 131_072, max_write_zeroes: 8 };
        let mut params = Params {
            attributes: attribute::VOLATILE_CACHE | attribute::FUA,
            logical_shift: 9,
            physical_shift: 12,
            io_opt_shift: 16,
            io_min_shift: 12,
            max_sectors: 2048,
            sectors: 1 << 40,
            discard: Some(discard),
        };
        assert_eq!(Params::decode(&params.encode()), params);
        assert_eq!(params.encode()[0..8], [60, 0, 0, 0, 3, 0, 0, 0]);
        params.discard = None;
        assert_eq!(Params::decode(&params.encode()), params);
        assert_eq!(params.encode()[4], 1);
    }

    #[test]
    fn descriptors_are_read_from_two_words() {
        let mut bytes = [0u8; 16];
        bytes[0..4].copy_from_slice(&(0x2001u32).to_ne_bytes());
        bytes[4..8].copy_from_slice(&8u32.to_ne_bytes());
        bytes[8..16].copy_from_slice(&77u64.to_ne_bytes());
        let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
        let found = Descriptor::from_words(word(0), word(8));
        assert_eq!(found, Descriptor { op_flags: 1 | flag::FUA, sectors: 8, start: 77 });
    }
}
