//! What the agent answers to a person who wanted a point.

use farshore_extent::{Lsn, PointKind, Problem, VolumeName, WallTime};
use serde::{Deserialize, Serialize};

/// A point that was cut on the source; it is on its way to the target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutPoint {
    /// Of which volumes.
    pub volumes: Vec<VolumeName>,
    /// Its place.
    pub lsn: Lsn,
    /// When, by the clock of the source.
    pub time: WallTime,
    /// What it promises.
    pub kind: PointKind,
    /// Name tag.
    pub name: String,
    /// Why it promises less than was wanted.
    pub note: Option<Problem>,
}
