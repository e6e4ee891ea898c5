//! What is under way, for the next start of a freezer that was killed with everything else.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use farshore_extent::VolumeName;
use serde::{Deserialize, Serialize};

use crate::durable_fs;

/// A file of one sequence. It is there from before the first pre hook until after the last post hook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Whose post hooks are to run.
    pub(super) applications: Vec<VolumeName>,
    /// Volumes of the point.
    pub(super) volumes: Vec<VolumeName>,
    /// Name of the point.
    pub(super) point: String,
    /// What may be frozen.
    pub(super) mounts: Vec<PathBuf>,
}

impl Record {
    pub(super) fn write(&self, file: &Path) -> io::Result<()> {
        durable_fs::write(file, &serde_json::to_vec(self)?, 0o600)
    }

    /// None when nothing was left, or what was left tells nothing.
    pub(super) fn left(file: &Path) -> Option<Self> {
        let bytes = fs::read(file).ok()?;
        serde_json::from_slice(&bytes)
            .inspect_err(|error| tracing::error!(%error, "what was under way cannot be read"))
            .ok()
    }

    pub(super) fn remove(file: &Path) {
        if let Err(error) = durable_fs::remove(file) {
            tracing::error!(%error, file = %file.display(), "post hooks will run once more");
        }
    }
}
