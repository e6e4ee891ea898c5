//! What people's tools ask of the daemons over their local unix sockets (owner-only). One request,
//! one `Result<reply, Problem>`, framed by `farshore_changelog::codec`.
//!
//! The types are also the source of `--json`: fields may be added, never renamed.

mod cut;

use std::path::PathBuf;

pub use cut::CutPoint;
use farshore_extent::{
    CaptureOrder, HostId, Lsn, PairState, PointId, PointKind, ViewId, VolumeId, VolumeName,
    VolumeSize, WallTime,
};
use serde::{Deserialize, Serialize};

use crate::failover::{
    Failover, FailoverInfo, FailoverPreview, JobId, JobInfo, PreviewFailover, Seen,
};

/// To the target daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetRequest {
    /// Every replica.
    Status,
    /// Points of a volume, newest first; at most `limit`, 0 is all that fit (see
    /// [`TargetRequest::PointsBefore`]).
    Points {
        /// Which.
        volume: VolumeName,
        /// At most so many.
        limit: u32,
    },
    /// Ask the source to cut a named point now, and wait until it is durable here.
    Tag {
        /// Which; all must be on one host.
        volumes: Vec<VolumeName>,
        /// The name.
        name: String,
        /// What the point will promise.
        kind: PointKind,
    },
    /// A new one-time token.
    NewToken {
        /// Name of the host it is meant for.
        host_name: String,
        /// How long it can be used, in seconds.
        valid_seconds: u32,
        /// `host:port` under which the source reaches this target.
        address: String,
    },
    /// Enrolled hosts.
    Hosts,
    /// Open a point as a writable view (test failover).
    OpenView(OpenView),
    /// Views that are open.
    Views,
    /// Close a view and drop its scratch.
    CloseView {
        /// Which view.
        view: ViewId,
        /// What was learnt, kept as evidence.
        note: String,
    },
    /// Set the interval of points of a volume.
    SetInterval {
        /// Which.
        volume: VolumeName,
        /// Milliseconds; 0 is none.
        interval_ms: u64,
    },
    /// The event log, newest first.
    Events {
        /// At most so many.
        limit: u32,
    },
    /// As `Points`, from the newest one before a place on: an answer holds only as many as fit
    /// one message (at least 4000), so a full list is asked for in pieces.
    PointsBefore {
        /// Which.
        volume: VolumeName,
        /// Place of the last point of the piece before.
        before: Lsn,
        /// At most so many, 0 is all that fit.
        limit: u32,
    },
    /// Every retention policy with a name.
    Policies,
    /// The retention policy of a volume, and what it keeps now.
    Policy {
        /// Which.
        volume: VolumeName,
    },
    /// Give a volume another retention policy, or only tell what that would do.
    SetPolicy(SetPolicy),
    /// Read and verify everything that the replica of a volume keeps, now.
    Scrub {
        /// Which.
        volume: VolumeName,
    },
    /// Make a view an image of its own, in the background.
    FlattenView(FlattenView),
    /// Stop doing so; asked for again, it goes on.
    StopFlatten {
        /// Which view.
        view: ViewId,
    },
    /// What a failover to a point would cost. Changes nothing.
    PreviewFailover(PreviewFailover),
    /// Fence the source and open a point for writing, or open another one while the commit is
    /// pending. Answered when the job is durable.
    Failover(Failover),
    /// Close what a failover has opened and take the source back. Answered when the job is durable.
    CancelFailover {
        /// Which.
        volume: VolumeName,
        /// What the person was shown.
        seen: Seen,
    },
    /// Jobs, newest first.
    Jobs {
        /// At most so many; 0 is all that are kept.
        limit: u32,
    },
    /// One job.
    Job {
        /// Which.
        job: JobId,
    },
}

/// Make a view an image of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlattenView {
    /// Which view.
    pub view: ViewId,
    /// A file or a block device of the target host; an absolute path.
    pub to: PathBuf,
    /// Replace whatever lies there.
    pub force: bool,
    /// At most so many bytes a second; 0: as the target's configuration says.
    pub bytes_per_second: u64,
}

/// What becomes of a view that is to be an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlattenState {
    /// It is being copied and verified.
    Running,
    /// Somebody has stopped that.
    Stopped,
    /// It cannot go on by itself; the problems of the view say why.
    Failed,
}

/// A view that is to be an image, and is not yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlattenInfo {
    /// The image.
    pub to: PathBuf,
    /// What becomes of it.
    pub state: FlattenState,
    /// Bytes of the view.
    pub total_bytes: u64,
    /// Bytes of it that are still to be copied. Grows when they are written again.
    pub to_copy_bytes: u64,
    /// Bytes that are copied and were not read back yet.
    pub to_verify_bytes: u64,
}

/// Another retention policy for a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetPolicy {
    /// Which volume.
    pub volume: VolumeName,
    /// Name of a policy, tiers written out, one time, or `default`.
    pub policy: String,
    /// Milliseconds between points from now on, 0 is none; none: as the preset says, or as before.
    pub interval_ms: Option<u64>,
    /// Change nothing.
    pub preview: bool,
}

/// From the target daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // one variant for each request
pub enum TargetReply {
    Status(Vec<ReplicaStatus>),
    Points(Vec<PointInfo>),
    Tagged(Vec<PointInfo>),
    /// The token, to be typed on the source.
    Token(String),
    Hosts(Vec<HostInfo>),
    View(Box<ViewInfo>),
    Views(Vec<ViewInfo>),
    Events(Vec<EventInfo>),
    Done,
    Policies(Vec<PolicyInfo>),
    Policy(Box<PolicyReport>),
    FailoverPreview(Box<FailoverPreview>),
    Job(Box<JobInfo>),
    Jobs(Vec<JobInfo>),
}

/// A retention policy with a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyInfo {
    /// Its name.
    pub name: String,
    /// Its tiers.
    pub tiers: String,
    /// Built in, not from the target's configuration.
    pub built_in: bool,
    /// Volumes without a policy of their own have this one.
    pub default: bool,
    /// The preset also cuts points so often, in milliseconds.
    pub interval_ms: Option<u64>,
    /// Volumes that have it, by name.
    pub volumes: Vec<VolumeName>,
}

/// What a retention policy keeps of a volume, or would keep.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyReport {
    /// Of which volume.
    pub volume: VolumeName,
    /// The policy as it was given: a name, tiers or a time.
    pub policy: String,
    /// It comes from the target's configuration.
    pub default: bool,
    /// What keeps points: the tiers, and what no tier says.
    pub tiers: Vec<TierReport>,
    /// Milliseconds between points; 0 is none.
    pub interval_ms: u64,
    /// Points that stay.
    pub stay: u64,
    /// Points that go.
    pub go: u64,
    /// Capture time of the oldest point that stays.
    pub oldest_point: Option<WallTime>,
    /// Oldest place that can be opened now.
    pub floor: Lsn,
    /// The same when what goes has gone.
    pub floor_then: Lsn,
    /// Bytes of journal on disk.
    pub journal_bytes: u64,
    /// Bytes of it that can go when the floor is there; none when the store is not open.
    pub freed_bytes: Option<u64>,
    /// Bytes of journal once the policy reaches as far back as it may, if writing goes on as it did
    /// since the oldest point; none when that is too short a time to tell.
    pub full_bytes: Option<u64>,
}

/// A part of a retention policy, and what it keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierReport {
    /// As it is written: `1m:24h`, `app-all:7d`; or `named`, `newest`.
    pub tier: String,
    /// Points that stay because of it; one point may stay for several reasons.
    pub points: u64,
    /// Capture time of the oldest of them.
    pub oldest_point: Option<WallTime>,
}

/// A recovery point chosen by a person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PointChoice {
    /// The newest kept point.
    Latest,
    /// The newest application-consistent one.
    LatestApp,
    /// By its number.
    Id(PointId),
    /// The newest with this name.
    Name(String),
    /// The last place captured at or before this time: any moment of an ordered stretch.
    Time(WallTime),
    /// Exactly this place.
    At(Lsn),
}

/// Open a view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenView {
    /// Of which volume.
    pub volume: VolumeName,
    /// At which point.
    pub point: PointChoice,
    /// Most bytes of writes the view may take; 0 is the volume's size.
    pub scratch_bytes: u64,
    /// Serve it also on this TCP address with TLS; none: unix socket only.
    pub tls_listen: Option<String>,
    /// Make it also a block device of the target host.
    pub device: bool,
    /// Nothing can be written to it.
    pub read_only: bool,
}

impl OpenView {
    /// A writable view with room for as much as the volume, on a unix socket only.
    #[must_use]
    pub const fn new(volume: VolumeName, point: PointChoice) -> Self {
        Self { volume, point, scratch_bytes: 0, tls_listen: None, device: false, read_only: false }
    }
}

/// An open view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewInfo {
    /// Identity.
    pub view: ViewId,
    /// Of which volume.
    pub volume: VolumeName,
    /// Its size in bytes.
    pub size: VolumeSize,
    /// The place it shows.
    pub lsn: Lsn,
    /// Capture time of that place.
    pub time: WallTime,
    /// The point, when it is one.
    pub point: Option<PointId>,
    /// Unix socket of its NBD export.
    pub nbd_socket: PathBuf,
    /// Name of the NBD export.
    pub export: String,
    /// Address of the TLS export.
    pub tls_address: Option<String>,
    /// When it was opened.
    pub opened: WallTime,
    /// How long opening took, in microseconds.
    pub open_micros: u64,
    /// Bytes written to it.
    pub scratch_used: u64,
    /// Limit of that.
    pub scratch_bytes: u64,
    /// Its block device on the target host.
    pub device: Option<PathBuf>,
    /// Why it has no block device any more; the view can still be reached by its export.
    pub device_lost: Option<String>,
    /// Nothing can be written to it.
    pub read_only: bool,
    /// It consists of this image or device only; nothing of the replica is needed for it.
    pub image: Option<PathBuf>,
    /// It is to become one.
    pub flatten: Option<FlattenInfo>,
    /// What is wrong with it, each with its code; empty when all is well.
    pub problems: Vec<farshore_extent::Problem>,
}

/// A recovery point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointInfo {
    /// Number for people.
    pub point: PointId,
    /// Of which volume.
    pub volume: VolumeName,
    /// Its place.
    pub lsn: Lsn,
    /// Capture time on the source's clock.
    pub time: WallTime,
    /// What it promises.
    pub kind: PointKind,
    /// Name tag, or empty.
    pub name: String,
    /// Kept whatever the policy says.
    pub pinned: bool,
    /// What there is to say of it: why it is not application-consistent, or what went wrong after
    /// it.
    pub note: Option<farshore_extent::Problem>,
}

/// State of a replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// Identity.
    pub volume: VolumeId,
    /// Name.
    pub name: VolumeName,
    /// Host it comes from.
    pub host_name: String,
    /// Size in bytes.
    pub size: VolumeSize,
    /// State of the pair.
    pub state: PairState,
    /// Ordered or catching up, as far as the journal goes.
    pub order: CaptureOrder,
    /// Whether the source is connected.
    pub connected: bool,
    /// Now minus the capture time of the newest durable point, in milliseconds; none without a
    /// point. Grows while disconnected.
    pub rpo_ms: Option<u64>,
    /// Wanted, in milliseconds.
    pub rpo_target_ms: u64,
    /// Bytes captured on the source and not durable here, as last reported.
    pub lag_bytes: u64,
    /// Copy still to do, in bytes.
    pub copy_remaining: u64,
    /// Copy altogether, in bytes.
    pub copy_total: u64,
    /// Copy rate in bytes per second.
    pub copy_rate: u64,
    /// Last durable place.
    pub journaled: Lsn,
    /// Oldest place that can be opened.
    pub floor: Lsn,
    /// Points kept.
    pub points: u64,
    /// Capture time of the newest point.
    pub newest_point: Option<WallTime>,
    /// Capture time of the oldest point.
    pub oldest_point: Option<WallTime>,
    /// Views open.
    pub views: u32,
    /// Bytes of journal on disk.
    pub journal_bytes: u64,
    /// Bytes of it that have expired and stay because views need them.
    pub held_bytes: u64,
    /// Digests of the source that were compared since it opened the volume.
    pub digests: u64,
    /// How many of them differed.
    pub differing: u64,
    /// When everything that is kept was last read and verified; none: never yet.
    pub last_scrub: Option<WallTime>,
    /// Damaged places that this has found.
    pub scrub_found: u64,
    /// Bytes verified by the scrub under way.
    pub scrub_bytes: Option<u64>,
    /// Bytes of the base image that have no checksums yet: rot there is not noticed.
    pub unverified_bytes: u64,
    /// When a test failover of it was last opened, used and cleaned up.
    pub last_drill: Option<WallTime>,
    /// What is wrong with it and with its views, each with its code; empty when all is well.
    pub problems: Vec<farshore_extent::Problem>,
    /// The failover, when there is one.
    pub failover: Option<FailoverInfo>,
}

/// An enrolled host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Identity in its certificate.
    pub host: HostId,
    /// Name.
    pub name: String,
    /// When it enrolled.
    pub enrolled: WallTime,
    /// Whether it is connected.
    pub connected: bool,
}

/// An entry of the event log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventInfo {
    /// When.
    pub time: WallTime,
    /// Its code, 0 for plain notices.
    pub code: u16,
    /// The volume, when it is about one.
    pub volume: Option<VolumeName>,
    /// What happened.
    pub text: String,
}

/// To the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentRequest {
    /// Connection and volumes.
    Status,
    /// What happened on this host, newest first.
    Events {
        /// At most so many; 0 is all that are kept.
        limit: u32,
    },
    /// Cut a named point now. Answered when its marker is placed and its hooks are done, whether or
    /// not the target is there.
    Tag {
        /// Volumes of this host.
        volumes: Vec<VolumeName>,
        /// The name.
        name: String,
        /// Make the applications quiet for it.
        app: bool,
    },
}

/// From the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // one variant for each request
pub enum AgentReply {
    Status(AgentStatus),
    Events(Vec<EventInfo>),
    Tagged(CutPoint),
}

/// State of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// `host:port` of the target.
    pub target: String,
    /// Whether the session is up.
    pub connected: bool,
    /// Why it is not, or empty.
    pub problem: Option<farshore_extent::Problem>,
    /// Next attempt in so many milliseconds.
    pub retry_in_ms: Option<u64>,
    /// Every volume it ships.
    pub volumes: Vec<AgentVolume>,
}

/// What the agent knows of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentVolume {
    /// Identity.
    pub volume: VolumeId,
    /// Name.
    pub name: VolumeName,
    /// Why it is not being shipped, or else what there is to say of its spool.
    pub problem: Option<farshore_extent::Problem>,
    /// Sent at least once.
    pub sent: Lsn,
    /// Durable at the target.
    pub journaled: Lsn,
    /// Capture time of the newest place durable at the target.
    pub journaled_time: WallTime,
    /// Points the target keeps.
    pub points: u64,
    /// Capture time of the newest point; none without.
    pub newest_point: Option<WallTime>,
    /// Capture time of the oldest point.
    pub oldest_point: Option<WallTime>,
    /// Payload bytes shipped since the agent started, before compression.
    pub raw_bytes: u64,
    /// Bytes on the wire for them.
    pub wire_bytes: u64,
    /// Its spool.
    pub spool: SpoolInfo,
}

impl AgentVolume {
    /// Whether something keeps it from being shipped as it should be. That points of an outage were
    /// merged (FS-5215) does not.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        let spool_works = !matches!(self.spool.level, SpoolLevel::Full | SpoolLevel::Failed);
        let notice = self.spool.merged.is_some() && spool_works;
        self.problem.is_some() && !(notice && self.problem == self.spool.problem)
    }
}

/// Where the changes of a volume go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SpoolLevel {
    /// From the pool to the target.
    #[default]
    Direct,
    /// To the spool on this host's disk.
    Spooling,
    /// From the pool to the target, and the spool waits for the last acknowledgements.
    Draining,
    /// The spool has reached its limit: changes wait in the pool.
    Full,
    /// The spool's disk failed: changes wait in the pool.
    Failed,
}

/// The spool of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SpoolInfo {
    /// Where changes go now.
    pub level: SpoolLevel,
    /// Bytes in the spool.
    pub bytes: u64,
    /// Capture time of the oldest change in it.
    pub since: Option<WallTime>,
    /// Why it takes nothing or has merged points, if so.
    pub problem: Option<farshore_extent::Problem>,
    /// Points of the outage that were merged because it was nearly full.
    pub merged: Option<MergedPoints>,
}

/// Points that are not offered any more, so that newer changes have room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergedPoints {
    /// How many.
    pub points: u64,
    /// Capture time of the oldest change concerned.
    pub from: WallTime,
    /// Time of the newest point that other points were merged into.
    pub to: WallTime,
}
