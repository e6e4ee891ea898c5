//! Failover and jobs, as the command line asks for them. Fields may be added at the end, never
//! renamed: the types are also the source of `--json`.

use core::fmt;
use core::str::FromStr;

use farshore_extent::{Generation, Lsn, PointId, Problem, ViewId, VolumeName, WallTime};
use serde::{Deserialize, Serialize};

use crate::admin::{PointChoice, ViewInfo};

/// The code of the refusal that says: the volume of this source was failed over. A source that is
/// told so must not be attached for writing again until a target has taken it back.
pub const FENCED: u16 = 6513;

/// A job of one target: short, so that people can type it (`j-88`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobId(u64);

impl JobId {
    /// The `n`-th job of this target.
    #[must_use]
    pub const fn new(n: u64) -> Self {
        Self(n)
    }

    /// The running number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "j-{}", self.0)
    }
}

impl FromStr for JobId {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_prefix("j-").and_then(|n| n.parse().ok());
        number.map(Self).ok_or_else(|| format!("`{text}` is not a job such as j-88"))
    }
}

impl TryFrom<String> for JobId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<JobId> for String {
    fn from(id: JobId) -> Self {
        id.to_string()
    }
}

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    /// Unplanned failover: fence the source, then open a point for writing.
    Failover,
    /// Another point, while the commit is pending.
    ChangePoint,
    /// Back to the source.
    CancelFailover,
}

impl JobKind {
    /// The word shown in tables; equal to its form in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Failover => "failover",
            Self::ChangePoint => "change-point",
            Self::CancelFailover => "cancel-failover",
        }
    }
}

/// Whether a job has ended, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// Under way; after a restart of the target it goes on where it was.
    Running,
    /// It has done all of its steps.
    Done,
    /// It could not; the problem says what is left.
    Failed,
}

impl JobState {
    /// The word shown in tables; equal to its form in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }
}

/// A job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobInfo {
    /// Its number.
    pub job: JobId,
    /// What it does.
    pub kind: JobKind,
    /// To which volume.
    pub volume: VolumeName,
    /// Whether it has ended.
    pub state: JobState,
    /// The step under way, or the last one.
    pub step: String,
    /// When it began.
    pub begun: WallTime,
    /// When it ended.
    pub ended: Option<WallTime>,
    /// What came of it, in words.
    pub result: String,
    /// Why it failed.
    pub problem: Option<Problem>,
    /// What it has opened, while that is open.
    pub view: Option<Box<ViewInfo>>,
}

/// What stands between a volume and a recovery point of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverPreview {
    /// Which volume.
    pub volume: VolumeName,
    /// Where the pair is now: see [`FailoverPhase`].
    pub phase: FailoverPhase,
    /// The generation now; it rises with each failover, change of point and cancel. What is asked
    /// for afterwards names it.
    pub generation: Generation,
    /// The place that would be opened.
    pub lsn: Lsn,
    /// Its capture time.
    pub time: WallTime,
    /// The point, when it is one.
    pub point: Option<PointId>,
    /// Last place on the replica.
    pub journaled: Lsn,
    /// Capture time of that.
    pub journaled_time: WallTime,
    /// Whether the last place on the replica can be opened too.
    pub ordered: bool,
    /// Writes on the replica behind the place: left out when one goes on from it.
    pub lost_writes: u64,
    /// Bytes of them.
    pub lost_bytes: u64,
    /// Whether the source is connected now: it may well be alive.
    pub connected: bool,
    /// When the source was last heard, on the target's clock; none: not since the daemon's start.
    pub last_contact: Option<WallTime>,
    /// Bytes that it then had and the target had not.
    pub unsent_bytes: u64,
    /// The writable view of a failover that is pending.
    pub view: Option<Box<ViewInfo>>,
}

/// Where a volume and its replica are, between the source and a failed-over replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailoverPhase {
    /// The source is the one that is written.
    Source,
    /// The source is being fenced; nothing is open yet.
    Fencing,
    /// The source is fenced, and the point is being opened for writing.
    Opening,
    /// The point is open for writing: commit pending.
    Pending,
    /// What is open is being closed, to open another point.
    Changing,
    /// What is open is being closed, to take the source back.
    Cancelling,
}

impl FailoverPhase {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Source,
        Self::Fencing,
        Self::Opening,
        Self::Pending,
        Self::Changing,
        Self::Cancelling,
    ];

    /// The word shown in tables; equal to its form in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Fencing => "fencing",
            Self::Opening => "opening",
            Self::Pending => "pending",
            Self::Changing => "changing",
            Self::Cancelling => "cancelling",
        }
    }
}

impl FromStr for FailoverPhase {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|phase| phase.as_str() == text);
        found.ok_or_else(|| format!("`{text}` is no phase of a failover"))
    }
}

/// What a person was shown before deciding. When it is not so any more, nothing is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The generation, out of the preview.
    pub generation: Generation,
    /// The view that was open.
    pub view: Option<ViewId>,
}

impl FailoverPreview {
    /// This, as what a person decides on.
    #[must_use]
    pub fn seen(&self) -> Seen {
        Seen { generation: self.generation, view: self.view.as_ref().map(|view| view.view) }
    }
}

/// Open a point for writing in place of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failover {
    /// Which volume.
    pub volume: VolumeName,
    /// The place, out of the preview.
    pub lsn: Lsn,
    /// What the person was shown.
    pub seen: Seen,
    /// Make it also a block device of the target host.
    pub device: bool,
    /// Serve it also on this TCP address with TLS.
    pub tls_listen: Option<String>,
}

/// A failover in the status of a replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverInfo {
    /// Where it is.
    pub phase: FailoverPhase,
    /// Generation of the replica.
    pub generation: Generation,
    /// The place that was opened for writing.
    pub lsn: Lsn,
    /// Its capture time.
    pub time: WallTime,
    /// Its view.
    pub view: Option<ViewId>,
    /// Since when the source is fenced.
    pub fenced_since: WallTime,
}

/// Which point a preview is wanted for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreviewFailover {
    /// Of which volume.
    pub volume: VolumeName,
    /// At which point.
    pub point: PointChoice,
}
