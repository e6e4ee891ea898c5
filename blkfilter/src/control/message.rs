//! Messages of the control socket. Descriptors mirror the record kinds of the change log; payload
//! stays in the pool.

use std::fmt;
use std::path::{Path, PathBuf};

use farshore_extent::{
    BlockSizes, CaptureOrder, Epoch, Extent, GroupId, Lsn, MarkerId, PointKind, Problem, Seq,
    VolumeId, VolumeName, VolumeSize, WallTime,
};
use serde::{Deserialize, Serialize};

/// What can be asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Request {
    /// Every protected volume and its state.
    List,
    /// Start protecting a backing device. Runs the preflight first.
    Protect(ProtectRequest),
    /// The preflight of `Protect` alone: every failed prerequisite, nothing changed.
    Preflight(ProtectRequest),
    /// Stop protecting; the backing device keeps its content. Refused while a block device is in
    /// use, and while clients are connected to a socket unless `force`.
    Unprotect {
        /// Which volume.
        name: VolumeName,
        /// Disconnect the clients of a socket first.
        force: bool,
    },
    /// Take over the larger size that the backing device has got, while the volume is in use.
    Grow {
        /// Which volume.
        name: VolumeName,
        /// Only tell what would be done.
        dry_run: bool,
    },
    /// Cut a marker over the volumes, at one number of the host's counter.
    Marker(MarkerRequest),
    /// The outcome of a pending marker.
    ResolveMarker {
        /// Which.
        marker: MarkerId,
        /// Commit or abort.
        commit: bool,
    },
    /// Wait until everything captured so far is durable at the target.
    Drain {
        /// Which volume.
        volume: VolumeId,
        /// Give up after this many milliseconds with [`Reply::Drained`] `false`.
        timeout_ms: u32,
    },
    /// Agent: the pool of a volume. The reply carries its descriptor.
    OpenPool {
        /// Which volume.
        volume: VolumeId,
    },
    /// Agent: the records after `after`, in order. Waits until `want_bytes` of payload, a marker,
    /// or `wait_ms` after the first record; up to `idle_ms` when there is none at all.
    Fetch {
        /// Which volume.
        volume: VolumeId,
        /// Last place the agent has; places of an older epoch mean "from the start".
        after: Lsn,
        /// Enough payload to answer at once, in bytes.
        want_bytes: u32,
        /// Longest wait after the first record, in milliseconds.
        wait_ms: u32,
        /// Longest wait without any record, in milliseconds.
        idle_ms: u32,
    },
    /// Agent: everything up to here is durable in the agent's spool, on this host: the pool may
    /// reuse it. The target does not have it.
    Spooled {
        /// Which volume.
        volume: VolumeId,
        /// Last place in the spool.
        upto: Lsn,
    },
    /// Agent: everything up to here is durable at the target; the pool may reuse it.
    Release {
        /// Which volume.
        volume: VolumeId,
        /// Last durable place.
        upto: Lsn,
    },
    /// Agent: the target cannot follow the log (it lost acknowledged data, or its history is
    /// unknown): send everything again through the stream. Slow, never wrong.
    Recopy {
        /// Which volume.
        volume: VolumeId,
        /// Shown in status and log.
        reason: String,
    },
    /// Every volume on record, attached or not: what is not among them is not protected any more.
    Recorded,
    /// Compare everything with the replica and send what differs. Points stop until it is done.
    Resync {
        /// Which volume.
        volume: VolumeId,
        /// Shown in status and log.
        reason: String,
    },
    /// Start at once the copy that waits ([`VolumeStatus::copy_waits`]); nothing when none does.
    StartCopy {
        /// Which volume.
        volume: VolumeId,
    },
    /// Start a verify from the beginning, or end it. What differs is reported, not repaired.
    Verify {
        /// Which volume.
        volume: VolumeId,
        /// Start or end.
        start: bool,
        /// Limit in bytes a second; 0 is none.
        bytes_per_second: u64,
    },
    /// Agent: what the target said about [`DescriptorBody::Hash`] records.
    Compared {
        /// Which volume.
        volume: VolumeId,
        /// All of them up to here are answered.
        upto: Lsn,
        /// How.
        answer: CompareAnswer,
    },
    /// Limit of the copy loop in bytes a second; 0 is none.
    CopyRate {
        /// Which volume.
        volume: VolumeId,
        /// Bytes per second.
        bytes_per_second: u64,
    },
    /// The target has told the source that its volume was failed over, or has taken it back (or a
    /// person has). Durable when answered: a volume that is fenced takes no writes at its next
    /// attach. One that is attached now goes on: its guest must not fail because of replication.
    Fence {
        /// Which volume.
        volume: VolumeId,
        /// What the target has said; none: it has taken the source back.
        fence: Option<Problem>,
    },
}

/// The answers, one for each kind of request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Reply {
    /// To `List`.
    Volumes(Vec<VolumeStatus>),
    /// To `Protect`.
    Protected(VolumeInfo),
    /// To `Preflight`.
    Preflight(Readiness),
    /// To `Grow`.
    Grown(Grown),
    /// To `Recorded`.
    Recorded(Vec<VolumeId>),
    /// To `Marker`.
    Marker(MarkerPlaced),
    /// To `Drain`: whether it was reached in time.
    Drained(bool),
    /// To `OpenPool`; comes with the descriptor of a sealed memfd of `len` bytes.
    Pool {
        /// Bytes to map.
        len: u64,
    },
    /// To `Fetch`.
    Fetched(Fetched),
    /// Done.
    Done,
}

/// A volume that has grown, or would.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grown {
    /// Its identity.
    pub volume: VolumeId,
    /// Its name.
    pub name: VolumeName,
    /// Bytes before.
    pub from: VolumeSize,
    /// Bytes now.
    pub to: VolumeSize,
}

/// Kind of backing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendKind {
    /// A block device.
    Block,
    /// A raw image file.
    File,
}

/// A way in which guests reach a protected volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttachKind {
    /// A block device of the kernel's ublk driver.
    Ublk,
    /// A block device of the kernel's NBD client.
    Nbd,
    /// A unix socket that speaks NBD.
    Socket,
}

impl fmt::Display for AttachKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ublk => "ublk",
            Self::Nbd => "kernel NBD",
            Self::Socket => "NBD socket",
        })
    }
}

/// The way that was chosen, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachChoice {
    /// The way.
    pub kind: AttachKind,
    /// For a person: "the kernel has it", or what is missing for a better way.
    pub why: String,
}

/// Where guests reach a protected volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attachment {
    /// A block device of the kernel's ublk driver.
    Ublk {
        /// As in `/dev/ublkbN`; kept for the life of the volume.
        number: u32,
        /// The device node.
        device: PathBuf,
    },
    /// A block device of the kernel's NBD client.
    Nbd {
        /// As in `/dev/nbdN`; kept for the life of the volume.
        number: u32,
        /// The device node.
        device: PathBuf,
    },
    /// A unix socket that speaks NBD.
    Socket {
        /// Where it listens.
        path: PathBuf,
    },
}

impl Attachment {
    /// Which way.
    #[must_use]
    pub const fn kind(&self) -> AttachKind {
        match self {
            Self::Ublk { .. } => AttachKind::Ublk,
            Self::Nbd { .. } => AttachKind::Nbd,
            Self::Socket { .. } => AttachKind::Socket,
        }
    }

    /// The block device; none for a socket.
    #[must_use]
    pub fn device(&self) -> Option<&Path> {
        match self {
            Self::Ublk { device, .. } | Self::Nbd { device, .. } => Some(device),
            Self::Socket { .. } => None,
        }
    }

    /// The socket; none for a block device.
    #[must_use]
    pub fn socket(&self) -> Option<&Path> {
        match self {
            Self::Socket { path } => Some(path),
            Self::Ublk { .. } | Self::Nbd { .. } => None,
        }
    }
}

/// What stands in the way of protecting, and how the volume would be attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    /// The failed prerequisites; empty means ready.
    pub problems: Vec<Problem>,
    /// How guests would reach it; none when the way asked for is not possible here.
    pub attach: Option<AttachChoice>,
    /// What does not stand in the way and should be known.
    pub hints: Vec<Hint>,
}

/// Something to know about a device that can be protected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hint {
    /// What there is, and what may come of it.
    pub what: String,
    /// A command, or a comment in shell syntax.
    pub next: String,
}

/// Start protecting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProtectRequest {
    /// Its name.
    pub name: VolumeName,
    /// Block device or raw image file.
    pub backing: PathBuf,
    /// How guests are to reach it; none: the best way this host has, [`AttachKind::Socket`] when
    /// `nbd_socket` is given.
    pub attach: Option<AttachKind>,
    /// For [`AttachKind::Socket`]: where to listen; none: `<run directory>/nbd/<name>.sock`.
    pub nbd_socket: Option<PathBuf>,
    /// Pool size in bytes; none: the daemon's default.
    pub pool_bytes: Option<u64>,
    /// Milliseconds between points wished for when the replica is made (0 is none); none: the
    /// target's default. Kept with the volume; the target's own setting wins later.
    pub point_interval_ms: Option<u64>,
    /// The target has an image of the disk: the first copy compares and sends what differs.
    pub seeded: bool,
    /// When the first copy starts; none: at once.
    pub copy_at: Option<WallTime>,
}

/// What a protected volume is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Identity, made at the first protect.
    pub volume: VolumeId,
    /// Its name.
    pub name: VolumeName,
    /// Block device or raw image file.
    pub backing: PathBuf,
    /// Which of the two.
    pub backend: BackendKind,
    /// Size in bytes.
    pub size: VolumeSize,
    /// Block sizes in bytes.
    pub blocks: BlockSizes,
    /// Where guests reach it: this way and no other, so that there is one writer.
    pub attachment: Attachment,
    /// Stable name of a block device (`/dev/farshore/NAME`); none for a socket, and when something
    /// that is not ours has the name.
    pub link: Option<PathBuf>,
    /// Epoch of this run.
    pub epoch: Epoch,
    /// As in [`ProtectRequest::point_interval_ms`]; the agent passes it on when it opens the volume.
    pub point_interval_ms: Option<u64>,
}

/// How far the copy loop is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CopyProgress {
    /// Bytes still to be sent (upper bound: whole chunks).
    pub remaining_bytes: u64,
    /// Bytes there were when this catch-up began.
    pub total_bytes: u64,
    /// Rate of the last seconds, bytes per second.
    pub bytes_per_second: u64,
}

/// What a copy waits for that could run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyWait {
    /// The start time that its volume was protected with.
    StartTime,
    /// The window for what the change log had no room for.
    Window,
}

/// A copy that does not run yet. Guests write on, and what they change stays marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyWaits {
    /// What it waits for.
    pub wait: CopyWait,
    /// When it starts by itself.
    pub starts: WallTime,
}

/// What a verify has found: the last one, or the one under way.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VerifyProgress {
    /// Under way; it pauses while the volume catches up.
    pub running: bool,
    /// Bytes that the target has compared.
    pub checked_bytes: u64,
    /// Size of the volume.
    pub total_bytes: u64,
    /// Bytes of chunks that differ although they must not.
    pub differing_bytes: u64,
    /// The first of these.
    pub differing: Vec<Extent>,
}

/// What a crash of `filterd` now would cost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntentInfo {
    /// Regions of the volume that would be sent again.
    pub marked: u64,
    /// More than this are cleared, as soon as they may be.
    pub cap: u64,
    /// Bytes of a region.
    pub region_bytes: u64,
    /// False when the state directory cannot be written (FS-2052): then `marked` says nothing.
    pub kept: bool,
}

/// Live state of a protected volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// What it is.
    pub info: VolumeInfo,
    /// Ordered or catching up.
    pub order: CaptureOrder,
    /// Why it is catching up; empty when ordered.
    pub reason: String,
    /// Copy loop.
    pub copy: CopyProgress,
    /// Why it does not run yet.
    pub copy_waits: Option<CopyWaits>,
    /// Verify.
    pub verify: VerifyProgress,
    /// Last place with a record.
    pub captured: Lsn,
    /// Last place the pool no longer holds: in the agent's spool, or durable at the target.
    pub released: Lsn,
    /// Last place durable at the target; at most `released`.
    pub durable: Lsn,
    /// Capture time of the oldest record in the pool; zero when there is none.
    pub oldest_unreleased: WallTime,
    /// Payload in the pool, in bytes.
    pub pool_used: u64,
    /// Size of the pool in bytes.
    pub pool_bytes: u64,
    /// Clients connected to the front end.
    pub clients: u32,
    /// Guest writes and zeroes since the daemon started.
    pub writes: u64,
    /// Bytes of them.
    pub written_bytes: u64,
    /// Guest reads since the daemon started.
    pub reads: u64,
    /// Failed backing requests since the daemon started.
    pub backing_errors: u64,
    /// The intent map.
    pub intent: Option<IntentInfo>,
    /// The throttle; none when it is off.
    pub throttle: Option<ThrottleInfo>,
    /// What the target has said when it refused this source for good; none: it has not.
    pub fenced: Option<Problem>,
    /// It takes no writes, because it was fenced when it was attached.
    pub read_only: bool,
}

/// What the throttle does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThrottleInfo {
    /// Longest time in milliseconds for which an answer is held back.
    pub longest_ms: u64,
    /// For how many milliseconds answers to writes are held back now; 0 while the pool has room.
    pub delay_ms: u64,
    /// Writes whose answers were held back, since the daemon started.
    pub writes: u64,
}

/// Cut a marker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkerRequest {
    /// Identity; the same in all streams of a group.
    pub marker: MarkerId,
    /// Volumes; empty means all of the host.
    pub volumes: Vec<VolumeId>,
    /// What the point will promise.
    pub kind: PointKind,
    /// The group or nil.
    pub group: GroupId,
    /// Name tag, at most 255 bytes.
    pub name: String,
    /// Wait for `ResolveMarker` (groups); otherwise it is a point at once.
    pub pending: bool,
}

/// Where a marker was placed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkerPlaced {
    /// One number for all volumes of the host.
    pub lsn: Lsn,
    /// Capture time.
    pub time: WallTime,
    /// Volumes that carry it.
    pub volumes: Vec<VolumeId>,
    /// Volumes that do not, because they are catching up.
    pub not_ordered: Vec<VolumeId>,
}

/// Records handed to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetched {
    /// Epoch of all records below.
    pub epoch: Epoch,
    /// The records after the asked place, without a gap.
    pub records: Vec<Descriptor>,
    /// More are waiting.
    pub more: bool,
}

/// Where a payload lies in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolPlace {
    /// Byte offset in the pool.
    pub offset: u64,
    /// crc32c of the payload, made from the buffer that fed the backing write.
    pub crc: u32,
}

/// One record, payload by reference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// Its number.
    pub seq: Seq,
    /// Capture time.
    pub time: WallTime,
    /// What happened.
    pub body: DescriptorBody,
}

/// What the target said about the digests since its last answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CompareAnswer {
    /// These extents of [`DescriptorBody::Hash`] records differ at their number; the others are
    /// equal.
    Differing(Vec<Extent>),
    /// The answers were lost with a connection: what was asked has to be asked again.
    Lost,
}

/// What happened; see `farshore_changelog::RecordBody` for the meaning of each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // field names are those of the records
pub enum DescriptorBody {
    Write { extent: Extent, place: PoolPlace },
    Copy { extent: Extent, place: PoolPlace },
    Zero { extent: Extent, copied: bool },
    Unknown { extent: Extent },
    Hash { extent: Extent, verify: bool, digest: [u8; 32] },
    Marker { marker: MarkerId, kind: PointKind, group: GroupId, name: String, pending: bool },
    MarkerCommit(MarkerId),
    MarkerAbort(MarkerId),
    OrderLost,
    OrderRestored,
    Resize(VolumeSize),
    EpochStart { continues: bool, size: VolumeSize, blocks: BlockSizes },
}

impl DescriptorBody {
    /// Payload bytes in the pool.
    #[must_use]
    pub const fn payload_len(&self) -> u64 {
        match self {
            Self::Write { extent, .. } | Self::Copy { extent, .. } => extent.len(),
            Self::Zero { .. }
            | Self::Unknown { .. }
            | Self::Hash { .. }
            | Self::Marker { .. }
            | Self::MarkerCommit(_)
            | Self::MarkerAbort(_)
            | Self::OrderLost
            | Self::OrderRestored
            | Self::Resize(_)
            | Self::EpochStart { .. } => 0,
        }
    }
}
