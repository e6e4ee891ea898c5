//! From descriptors and pool bytes to batches.
//!
//! [`Feed`] carries place and chain from batch to batch, verifies the checksum of every payload
//! before it uses it, and never divides a number between two batches. It does no I/O: the intake
//! thread and the simulator hand it records.

use farshore_blkfilter::control::{Descriptor, DescriptorBody, PoolPlace};
use farshore_changelog::limits::{
    BATCH_RAW_TARGET, MAX_DATALESS_LEN, MAX_MARKER_NAME, MAX_RECORD_PAYLOAD,
};
use farshore_changelog::{
    BatchBuilder, BatchContext, EncodedBatch, EpochStart, HashPurpose, Marker, MarkerState, Record,
    RecordBody,
};
use farshore_extent::{Chain, Epoch, Extent, Lsn, Problem, SECTOR, Seq, VolumeId};

use crate::session::{FeedFailure, Resume};

/// Where payloads lie: the mapped pool, or memory of the simulator.
pub trait PayloadSource {
    /// The bytes of a payload; `None` when the range is not inside the pool.
    fn payload(&self, offset: u64, len: u64) -> Option<&[u8]>;
}

impl PayloadSource for [u8] {
    fn payload(&self, offset: u64, len: u64) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(len).ok()?)?;
        self.get(start..end)
    }
}

/// How batches are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeedOptions {
    /// Level of zstd, 1 to 3; none stores everything as it is.
    pub zstd_level: Option<i32>,
    /// Raw payload after which a batch is closed, in bytes; at most 1 MiB. Less in the simulator.
    pub batch_bytes: usize,
    /// Planted fault: closes full batches even inside a number. Never in the product.
    pub divide_number: bool,
}

impl Default for FeedOptions {
    fn default() -> Self {
        Self { zstd_level: Some(1), batch_bytes: BATCH_RAW_TARGET, divide_number: false }
    }
}

/// Why a record cannot be shipped: each is a defect of the source or damaged memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FeedError {
    /// The bytes in the pool are not the bytes that were captured.
    #[error("the payload of record {seq} in the pool does not match the checksum made at capture")]
    Payload {
        /// Its number.
        seq: Seq,
    },
    /// A descriptor points outside the pool.
    #[error("record {seq} lies outside the pool ({place:?})")]
    OutsidePool {
        /// Its number.
        seq: Seq,
        /// Where it is said to lie.
        place: PoolPlace,
    },
    /// A length or alignment that no record may have.
    #[error("record {seq} is impossible: {why}")]
    Impossible {
        /// Its number.
        seq: Seq,
        /// Which rule.
        why: &'static str,
    },
    /// Records came in the wrong order.
    #[error("record {got} came after {last}")]
    Order {
        /// The place of the record.
        got: Lsn,
        /// The place before it.
        last: Lsn,
    },
    /// `filterd` runs in an older epoch than the target has seen: its state was lost or replaced.
    #[error("filterd is at epoch {epoch}, the target already holds {durable}")]
    Behind {
        /// Epoch of `filterd`.
        epoch: Epoch,
        /// Place the feed began at.
        durable: Lsn,
    },
    /// Batches that only the spool had cannot be read back.
    #[error("the spool cannot be read back: {why}")]
    Spool {
        /// What failed.
        why: String,
    },
    /// `filterd` does not hand out records from this place.
    #[error("filterd refuses to hand out the changes: {problem}")]
    Refused {
        /// Its answer.
        problem: Problem,
    },
}

impl FeedError {
    /// What the session core does about it.
    #[must_use]
    pub fn failure(&self, name: &str) -> FeedFailure {
        match self {
            Self::Payload { .. }
            | Self::OutsidePool { .. }
            | Self::Impossible { .. }
            | Self::Order { .. } => FeedFailure::Damaged(
                Problem::harmless(
                    3014,
                    format!("captured changes of volume {name} are damaged in memory"),
                    self.to_string(),
                    "check the memory of this machine and report the defect; the volume is being \
                     copied again by itself",
                )
                .with_risk("none for the disk; no new recovery point until the copy has ended"),
            ),
            Self::Spool { why } => FeedFailure::Damaged(crate::problem::spool_damaged(name, why)),
            Self::Refused { problem } => FeedFailure::Damaged(problem.clone()),
            Self::Behind { .. } => FeedFailure::Diverged(Problem::harmless(
                3011,
                format!("volume {name} cannot be replicated: the target is ahead of this source"),
                self.to_string(),
                "restore the state directory of filterd, or unprotect the volume and protect it \
                 under a new name",
            )),
        }
    }
}

/// Builds the batches of one volume, one after the other.
pub struct Feed {
    volume: VolumeId,
    resume: Resume,
    options: FeedOptions,
    builder: BatchBuilder,
    /// Epoch and number of the newest record in the builder.
    open: Option<Lsn>,
    /// Raw bytes in the builder, zero pieces included.
    raw: usize,
    /// A marker was added: the batch is closed before the next number.
    marked: bool,
}

impl Feed {
    /// A feed that goes on after `resume`.
    #[must_use]
    pub fn new(volume: VolumeId, resume: Resume, options: FeedOptions) -> Self {
        Self {
            volume,
            resume,
            options,
            builder: BatchBuilder::new(options.zstd_level),
            open: None,
            raw: 0,
            marked: false,
        }
    }

    /// Last place taken, in a finished batch or not: what to fetch after.
    #[must_use]
    pub fn place(&self) -> Lsn {
        self.open.unwrap_or(self.resume.after)
    }

    /// Place, chain and generation after the last finished batch.
    #[must_use]
    pub const fn border(&self) -> Resume {
        self.resume
    }

    /// The next batch follows a history with this chain.
    pub const fn set_chain(&mut self, chain: Chain) {
        self.resume.chain = chain;
    }

    /// Whether records wait for [`Self::finish`].
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.open.is_none()
    }

    /// Takes one record. Returns the batch before it when that had to be closed first. Records at
    /// or below [`Self::place`] from before are skipped: the target has them.
    ///
    /// # Errors
    /// [`FeedError`]; the record was not taken, and the feed must not be used any more.
    pub fn add(
        &mut self,
        epoch: Epoch,
        record: &Descriptor,
        pool: &(impl PayloadSource + ?Sized),
        durable: Lsn,
    ) -> Result<Option<EncodedBatch>, FeedError> {
        let place = Lsn::new(epoch, record.seq);
        let last = self.place();
        if epoch < last.epoch {
            return Err(FeedError::Behind { epoch, durable: last });
        }
        if place <= self.resume.after {
            return Ok(None);
        }
        if place < last {
            return Err(FeedError::Order { got: place, last });
        }
        let full = self.marked || self.raw >= self.options.batch_bytes || self.builder.is_full();
        let same_number = self.open == Some(place) && !self.options.divide_number;
        let new_epoch = self.open.is_some_and(|open| open.epoch != epoch);
        let before = if new_epoch || (full && !same_number) { self.finish(durable) } else { None };
        self.push(record, pool)?;
        self.open = Some(place);
        Ok(before)
    }

    /// Closes the batch; `None` when no record waits.
    pub fn finish(&mut self, durable: Lsn) -> Option<EncodedBatch> {
        let last = self.open.take()?;
        let context = BatchContext {
            volume: self.volume,
            generation: self.resume.generation,
            prev: self.resume.after,
            prev_chain: self.resume.chain,
            durable,
        };
        self.raw = 0;
        self.marked = false;
        let batch = self.builder.finish(last.epoch, &context)?;
        self.resume.after = batch.header.last();
        self.resume.chain = batch.header.chain;
        Some(batch)
    }

    fn push(
        &mut self,
        record: &Descriptor,
        pool: &(impl PayloadSource + ?Sized),
    ) -> Result<(), FeedError> {
        let Descriptor { seq, time, .. } = *record;
        let body = match &record.body {
            DescriptorBody::Write { extent, place } => {
                return self.push_data(record, *extent, *place, false, pool);
            }
            DescriptorBody::Copy { extent, place } => {
                return self.push_data(record, *extent, *place, true, pool);
            }
            DescriptorBody::Zero { extent, copied } => {
                check_extent(seq, *extent, MAX_DATALESS_LEN)?;
                RecordBody::Zero { extent: *extent, copied: *copied }
            }
            DescriptorBody::Unknown { extent } => {
                check_extent(seq, *extent, MAX_DATALESS_LEN)?;
                RecordBody::Unknown { extent: *extent }
            }
            DescriptorBody::Hash { extent, verify, digest } => {
                check_extent(seq, *extent, MAX_DATALESS_LEN)?;
                let purpose = if *verify { HashPurpose::Verify } else { HashPurpose::Resync };
                RecordBody::Hash { extent: *extent, purpose, digest: *digest }
            }
            DescriptorBody::Marker { marker, kind, group, name, pending } => {
                if name.len() > MAX_MARKER_NAME {
                    return Err(FeedError::Impossible { seq, why: "the name tag is too long" });
                }
                self.marked = true;
                let state = if *pending { MarkerState::Pending } else { MarkerState::Committed };
                let (id, kind, group, name) = (*marker, *kind, *group, name.clone());
                RecordBody::Marker(Marker { id, kind, state, group, name })
            }
            DescriptorBody::MarkerCommit(id) => RecordBody::MarkerCommit(*id),
            DescriptorBody::MarkerAbort(id) => RecordBody::MarkerAbort(*id),
            DescriptorBody::OrderLost => RecordBody::OrderLost,
            DescriptorBody::OrderRestored => RecordBody::OrderRestored,
            DescriptorBody::Resize(size) => RecordBody::Resize(*size),
            DescriptorBody::EpochStart { continues, size, blocks } => {
                let (continues, size, blocks) = (*continues, *size, *blocks);
                RecordBody::EpochStart(EpochStart { continues, size, blocks })
            }
        };
        self.builder.push(&Record { seq, time, body });
        Ok(())
    }

    fn push_data(
        &mut self,
        record: &Descriptor,
        extent: Extent,
        place: PoolPlace,
        copied: bool,
        pool: &(impl PayloadSource + ?Sized),
    ) -> Result<(), FeedError> {
        let seq = record.seq;
        check_extent(seq, extent, MAX_RECORD_PAYLOAD as u64)?;
        let bytes = pool
            .payload(place.offset, extent.len())
            .ok_or(FeedError::OutsidePool { seq, place })?;
        if crc32c::crc32c(bytes) != place.crc {
            return Err(FeedError::Payload { seq });
        }
        self.raw += bytes.len();
        self.builder.push_data(seq, record.time, extent, bytes, place.crc, copied);
        Ok(())
    }
}

fn check_extent(seq: Seq, extent: Extent, max: u64) -> Result<(), FeedError> {
    if extent.len() > max {
        return Err(FeedError::Impossible { seq, why: "it is longer than a record may be" });
    }
    if !extent.is_aligned_to(SECTOR) {
        return Err(FeedError::Impossible { seq, why: "it is not aligned to sectors" });
    }
    Ok(())
}
