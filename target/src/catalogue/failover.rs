//! Failovers and jobs, as the catalogue keeps them.

use farshore_extent::{Problem, VolumeId, VolumeName, WallTime};
use farshore_protocol::failover::{JobId, JobKind, JobState};

use super::CatalogueError;
use crate::failover::pair::Pair;

/// A job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobRow {
    /// Its number; zero before it is recorded.
    pub job: JobId,
    /// What it does.
    pub kind: JobKind,
    /// To which volume.
    pub volume: VolumeId,
    /// The volume's name then.
    pub name: VolumeName,
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
}

/// The part of the catalogue that failovers go on from. As [`super::Catalogue`]: every change is
/// durable when the method returns.
#[allow(missing_docs, clippy::missing_errors_doc)] // one line above says it for all
pub trait Failovers {
    /// The failover of a volume and the job that does it, in one step. A job without a number is
    /// new and gets one, which is returned.
    fn put_failover(
        &mut self,
        volume: VolumeId,
        pair: &Pair,
        job: &JobRow,
    ) -> Result<JobId, CatalogueError>;
    fn failover(&self, volume: VolumeId) -> Result<Option<Pair>, CatalogueError>;
    /// Newest first; `limit` 0 is all that are kept.
    fn jobs(&self, limit: u32) -> Result<Vec<JobRow>, CatalogueError>;
    fn job(&self, job: JobId) -> Result<Option<JobRow>, CatalogueError>;
}
