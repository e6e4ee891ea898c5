//! The words between the session core and whoever drives it.

use std::sync::Arc;

use farshore_blkfilter::control::CompareAnswer;
use farshore_changelog::EncodedBatch;
use farshore_extent::{
    BlockSizes, Chain, Extent, Generation, Lsn, Problem, VolumeId, VolumeName, VolumeSize,
};
use farshore_protocol::message::{FromTarget, OpenVolume, Opened};
use serde::{Deserialize, Serialize};

use super::retry::{Jitter, RetryPreset};

/// What a volume is, as `filterd` says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeFacts {
    /// Identity.
    pub volume: VolumeId,
    /// Name.
    pub name: VolumeName,
    /// Size in bytes.
    pub size: VolumeSize,
    /// Block sizes in bytes.
    pub blocks: BlockSizes,
    /// Milliseconds between points wished for at protect; none: the target's default.
    pub point_interval_ms: Option<u64>,
}

/// What the agent must not forget of a volume when it restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VolumeMemory {
    /// Generation the target gave to this source; zero before the first open.
    pub generation: Generation,
    /// A place the target acknowledged. It may lag behind the newest one; it never leads.
    pub acked: Lsn,
    /// Chain at `acked`.
    pub acked_chain: Chain,
}

/// Where a feed begins and what its batches carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resume {
    /// Records after this place; `prev` of the first batch.
    pub after: Lsn,
    /// Chain at `after`.
    pub chain: Chain,
    /// Generation of all batches.
    pub generation: Generation,
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkFailure {
    /// For people.
    pub problem: Problem,
    /// False after an authentication error: trying again cannot help (literal rule 3).
    pub retry: bool,
}

/// Why a feed cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FeedFailure {
    /// A payload in the pool does not match its checksum, or descriptors are impossible: a serious
    /// defect. Nothing of it was shipped; everything is copied again.
    Damaged(Problem),
    /// The source is behind the target (its state was lost or replaced): no place of the log can
    /// be continued.
    Diverged(Problem),
}

/// What happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// Only time has passed.
    Tick,
    /// `filterd` protects this volume (again).
    VolumeAdded {
        /// What it is.
        facts: VolumeFacts,
        /// What an earlier run of the agent kept; default when nothing.
        memory: VolumeMemory,
        /// Last place that can have been handed out, as `filterd` says now. A target beyond it
        /// does not belong to this source.
        captured: Lsn,
        /// Last place durable at the target, as `filterd` was told: it gave up these records.
        released: Lsn,
    },
    /// Watermarks of `filterd`.
    VolumeSeen {
        /// Which.
        volume: VolumeId,
        /// Last place that can have been handed out.
        captured: Lsn,
        /// Last place durable at the target, as `filterd` was told: records up to here are gone.
        released: Lsn,
    },
    /// `filterd` no longer has the volume attached.
    VolumeGone {
        /// Which.
        volume: VolumeId,
        /// It is not on record either: nobody wants it protected.
        unprotected: bool,
    },
    /// The handshake succeeded.
    Connected,
    /// There is no connection, or there is none any more.
    Disconnected {
        /// Why.
        failure: LinkFailure,
        /// Spreads the next attempt.
        jitter: Jitter,
    },
    /// Answer to [`Action::SendOpen`].
    Opened(Opened),
    /// Everything up to here is durable.
    Ack {
        /// Which volume.
        volume: VolumeId,
        /// Last durable place.
        durable: Lsn,
        /// Chain there.
        chain: Chain,
    },
    /// Digests up to here were compared; these extents differ.
    Compared {
        /// Which volume.
        volume: VolumeId,
        /// All of them up to here.
        upto: Lsn,
        /// Which of them differ.
        differing: Vec<Extent>,
    },
    /// A batch did not fit.
    Reopen {
        /// Which volume.
        volume: VolumeId,
        /// Why.
        reason: String,
    },
    /// The target will not have the volume or the connection.
    Refused {
        /// Which volume; none is the connection.
        volume: Option<VolumeId>,
        /// Why.
        problem: Problem,
        /// Whether trying again later can help.
        retry: bool,
        /// Spreads the next attempt.
        jitter: Jitter,
    },
    /// Answer to one [`Action::Pull`].
    BatchReady {
        /// Which volume.
        volume: VolumeId,
        /// The feed it belongs to; batches of older feeds are dropped.
        feed: u64,
        /// The batch.
        batch: Arc<EncodedBatch>,
    },
    /// The feed cannot go on.
    FeedFailed {
        /// Which volume.
        volume: VolumeId,
        /// Which feed.
        feed: u64,
        /// Why.
        failure: FeedFailure,
    },
    /// The configuration was read again: forget refusals and try now.
    Reload {
        /// As in [`super::SessionConfig`].
        retry: RetryPreset,
        /// As in [`super::SessionConfig`].
        window_bytes: usize,
    },
    /// Orderly stop: take no more records; what is in the window may still be acknowledged.
    Stop,
}

impl Event {
    /// The event of a message of the target, or the message when the core has nothing to do with
    /// it.
    ///
    /// # Errors
    /// The message itself: a matter of the driver (points, status, keep-alive).
    #[allow(clippy::result_large_err)] // the message itself, once for each that arrives
    pub fn from_target(message: FromTarget, jitter: Jitter) -> Result<Self, FromTarget> {
        match message {
            FromTarget::Opened(opened) => Ok(Self::Opened(opened)),
            FromTarget::Refused { volume, problem, retry } => {
                Ok(Self::Refused { volume, problem, retry, jitter })
            }
            FromTarget::Ack { volume, durable, chain } => Ok(Self::Ack { volume, durable, chain }),
            FromTarget::Reopen { volume, reason } => Ok(Self::Reopen { volume, reason }),
            FromTarget::Compared { volume, upto, differing } => {
                Ok(Self::Compared { volume, upto, differing })
            }
            other @ (FromTarget::Welcome { .. }
            | FromTarget::Certificate { .. }
            | FromTarget::Policy { .. }
            | FromTarget::Tag { .. }
            | FromTarget::Replica { .. }
            | FromTarget::Pong(_)) => Err(other),
        }
    }
}

/// What is to be done, in this order.
#[derive(Debug, Clone)]
pub enum Action {
    /// Dial and shake hands; answer with [`Event::Connected`] or [`Event::Disconnected`].
    Connect,
    /// Drop the connection; no [`Event::Disconnected`] is expected for it.
    Disconnect {
        /// For the log.
        reason: String,
    },
    /// Send an `Open`.
    SendOpen(OpenVolume),
    /// Send a `Close`.
    SendClose {
        /// Which volume.
        volume: VolumeId,
        /// It is not protected any more.
        unprotected: bool,
    },
    /// Send these bytes. The order between batches of one volume matters.
    SendBatch {
        /// Which volume.
        volume: VolumeId,
        /// The batch.
        batch: Arc<EncodedBatch>,
    },
    /// Build batches from here on; an older feed of the volume ends. When `recopy` is given,
    /// `filterd` must have accepted `Recopy` (with this reason) before anything is fetched.
    StartFeed {
        /// Which volume.
        volume: VolumeId,
        /// Number of the feed, to be given back with each batch.
        feed: u64,
        /// Where it begins.
        resume: Resume,
        /// Why everything must be copied again first.
        recopy: Option<String>,
    },
    /// End the feed of the volume.
    StopFeed {
        /// Which volume.
        volume: VolumeId,
    },
    /// One more batch, as soon as there are records.
    Pull {
        /// Which volume.
        volume: VolumeId,
        /// Which feed.
        feed: u64,
        /// Durable watermark for the header of the batch.
        durable: Lsn,
    },
    /// Records up to here are durable at the target; `filterd` and the spool may forget them.
    Release {
        /// Which volume.
        volume: VolumeId,
        /// Last durable place.
        upto: Lsn,
    },
    /// Tell `filterd` what the target said about its digests: again until it has heard it, and in
    /// this order.
    Compared {
        /// Which volume.
        volume: VolumeId,
        /// All digests up to here.
        upto: Lsn,
        /// What was said.
        answer: CompareAnswer,
    },
    /// Make this durable before the next action is executed.
    Remember {
        /// Which volume.
        volume: VolumeId,
        /// What.
        memory: VolumeMemory,
    },
}

/// Mistakes built in on purpose, to prove that the simulator finds each. None in the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(clippy::struct_excessive_bools)] // independent switches, not a state
pub struct Faults {
    /// Releases records in `filterd` when they are sent instead of when they are acknowledged.
    pub release_before_ack: bool,
    /// After a reconnect the whole window is sent again, wherever the target is.
    pub resend_without_reopen_position: bool,
    /// A feed built again goes on from an empty chain instead of the target's.
    pub chain_not_continued: bool,
    /// A full batch is closed even between two records with one number
    /// (see [`crate::batch::FeedOptions`]).
    pub divide_number: bool,
    /// `filterd` is not told that answers about its digests went with a connection.
    pub lost_answers_not_said: bool,
}
