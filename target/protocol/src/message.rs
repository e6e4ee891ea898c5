//! Control messages of the replication connection.
//!
//! The agent dials. An agent without a certificate may only send [`FromAgent::Enroll`]; one with a
//! certificate begins with [`FromAgent::Hello`], opens its volumes, and sends batches; the target
//! answers each opened volume with where to go on, and acknowledges what is durable.

use farshore_extent::{
    BlockSizes, Chain, Extent, Generation, HostId, Lsn, PointKind, Problem, VolumeId, VolumeName,
    VolumeSize, WallTime,
};
use serde::{Deserialize, Serialize};

/// Most bytes in the name tag of a point.
pub const MAX_TAG_NAME: usize = farshore_changelog::limits::MAX_MARKER_NAME;

/// Agent to target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromAgent {
    /// First message of an enrolled agent.
    Hello {
        /// Versions spoken, newest first.
        versions: Vec<u16>,
        /// Identity; must be the one in the certificate.
        host: HostId,
        /// Name of the host, for people.
        host_name: String,
        /// Version of the program, for people.
        software: String,
    },
    /// First and only message of an agent that is not enrolled.
    Enroll {
        /// The secret of the one-time token.
        secret: String,
        /// Identity the host chose.
        host: HostId,
        /// Name of the host.
        host_name: String,
        /// Certificate signing request, DER.
        csr: Vec<u8>,
    },
    /// A new certificate before the old one ends.
    Renew {
        /// Certificate signing request, DER.
        csr: Vec<u8>,
    },
    /// Ask to replicate a volume; answered by [`FromTarget::Opened`] or [`FromTarget::Refused`].
    Open(OpenVolume),
    /// The volume is no longer protected on this host (clean; the replica stays).
    Close {
        /// Which.
        volume: VolumeId,
        /// Delete nothing, but show as unprotected.
        unprotected: bool,
    },
    /// What the source knows of a volume, about once a second.
    Report(VolumeReport),
    /// Outcome of [`FromTarget::Tag`].
    Tagged {
        /// The request.
        request: u64,
        /// Where the marker was placed, or why not.
        result: Result<Lsn, Problem>,
    },
    /// Answered by [`FromTarget::Pong`].
    Ping(u64),
    /// Something to be said of a point: why it is not application-consistent, or what went wrong
    /// after it. Sent before the `Tagged` of the same point, and lost with a connection.
    PointNote {
        /// Of which volumes.
        volumes: Vec<VolumeId>,
        /// Where the point is.
        lsn: Lsn,
        /// What there is to say.
        problem: Problem,
    },
}

/// What the source says when it opens a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenVolume {
    /// The volume.
    pub volume: VolumeId,
    /// Its name.
    pub name: VolumeName,
    /// Size in bytes.
    pub size: VolumeSize,
    /// Block sizes in bytes.
    pub blocks: BlockSizes,
    /// Generation this source was given; zero at the very first open.
    pub generation: Generation,
    /// Last place the target acknowledged to this source, with its chain; zero when unknown.
    pub acked: Lsn,
    /// Chain at `acked`.
    pub acked_chain: Chain,
    /// Milliseconds between points wished for when the replica is made (0 is none); none: the
    /// target's default. Ignored for a replica that exists.
    pub point_interval_ms: Option<u64>,
}

/// State of a volume on its source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeReport {
    /// The volume.
    pub volume: VolumeId,
    /// Last place captured.
    pub captured: Lsn,
    /// Bytes captured and not yet durable at the target.
    pub backlog_bytes: u64,
    /// Bytes the copy loop still has to send.
    pub copy_remaining: u64,
    /// Bytes there were when the catch-up began.
    pub copy_total: u64,
    /// Rate of the copy in bytes per second.
    pub copy_rate: u64,
    /// Why it catches up; empty when ordered.
    pub reason: String,
    /// Source clock at the report.
    pub now: WallTime,
}

/// Most extents in one [`FromTarget::Compared`].
pub const MAX_DIFFERING: usize = 4096;

/// Target to agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromTarget {
    /// Answer to `Hello`.
    Welcome {
        /// Version both will speak.
        version: u16,
        /// Target's clock, to show the difference.
        now: WallTime,
    },
    /// Answer to `Enroll` and `Renew`.
    Certificate {
        /// The host's certificate, DER.
        certificate: Vec<u8>,
        /// The CA's certificate, DER.
        ca: Vec<u8>,
    },
    /// The volume may be sent; go on after `durable`.
    Opened(Opened),
    /// The volume (or, with none, the connection) is refused. No retry unless `retry`.
    Refused {
        /// Which volume.
        volume: Option<VolumeId>,
        /// Why, for people and for the event log.
        problem: Problem,
        /// Whether trying again later can help.
        retry: bool,
    },
    /// Everything up to here is durable in the journal. Cumulative.
    Ack {
        /// Which volume.
        volume: VolumeId,
        /// Last durable place.
        durable: Lsn,
        /// Chain there.
        chain: Chain,
    },
    /// A batch did not fit (wrong chain, gap, damaged in transit): reopen the volume.
    Reopen {
        /// Which volume.
        volume: VolumeId,
        /// Why.
        reason: String,
    },
    /// Cut points at this interval.
    Policy {
        /// Which volume.
        volume: VolumeId,
        /// Milliseconds between points cut by the source; 0 is none.
        point_interval_ms: u64,
    },
    /// Cut a marker now over these volumes; answered by `Tagged`. With [`PointKind::App`] the
    /// source makes the applications quiet for it, which takes as long as their hooks; where that
    /// fails the point is crash-consistent, and a `PointNote` says why.
    Tag {
        /// Comes back.
        request: u64,
        /// The volumes.
        volumes: Vec<VolumeId>,
        /// What the point will promise.
        kind: PointKind,
        /// Name tag, at most 255 bytes.
        name: String,
    },
    /// What the replica holds, about once a second: for `status` on the source.
    Replica {
        /// Which volume.
        volume: VolumeId,
        /// Points kept.
        points: u64,
        /// Capture time of the newest point; zero when none.
        newest_point: WallTime,
        /// Capture time of the oldest point; zero when none.
        oldest_point: WallTime,
    },
    /// Answer to `Ping`.
    Pong(u64),
    /// Every `Hash` record up to here that came over this connection was compared with the
    /// replica's content at its number. Sent in order, and only after the records are durable.
    Compared {
        /// Which volume.
        volume: VolumeId,
        /// Last place that was looked at.
        upto: Lsn,
        /// Extents of the records since the last such message that differ; at most
        /// [`MAX_DIFFERING`].
        differing: Vec<Extent>,
    },
}

/// Where a source goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// The volume.
    pub volume: VolumeId,
    /// Generation to put into batches.
    pub generation: Generation,
    /// Last durable place of the replica; zero when it is empty.
    pub durable: Lsn,
    /// Chain there.
    pub chain: Chain,
    /// How the two histories relate.
    pub verdict: Verdict,
    /// Milliseconds between points; 0 is none.
    pub point_interval_ms: u64,
}

/// How the target's history relates to what the source believes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// The target has all that was acknowledged, perhaps more: go on after `durable`.
    Continue,
    /// The target lost data it had acknowledged, or knows another history: copy everything again.
    Recopy,
}
