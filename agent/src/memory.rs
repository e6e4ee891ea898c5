//! What the agent keeps of each volume over a restart: generation and an acknowledged place.
//!
//! One small file, replaced as a whole. Losing it costs nothing but certainty: the volume is then
//! opened as if for the first time, and the target decides.

use std::collections::BTreeMap;
use std::path::PathBuf;

use farshore_extent::{Problem, VolumeId};
use farshore_protocol::paths::Paths;

use crate::session::VolumeMemory;
use crate::{durable_fs, problem};

/// The file and its content.
#[derive(Debug)]
pub struct MemoryFile {
    file: PathBuf,
    volumes: BTreeMap<VolumeId, VolumeMemory>,
}

impl MemoryFile {
    /// Reads it; a missing file is an empty one.
    ///
    /// # Errors
    /// FS-5205 when it is there and cannot be understood.
    pub fn load(paths: &Paths) -> Result<Self, Problem> {
        let file = paths.state.join("agent").join("volumes.json");
        let volumes = match std::fs::read(&file) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|e| problem::file("read", &file, &e))?
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(e) => return Err(problem::file("read", &file, &e)),
        };
        Ok(Self { file, volumes })
    }

    /// What is kept of a volume; nothing when it was never opened.
    #[must_use]
    pub fn get(&self, volume: VolumeId) -> VolumeMemory {
        self.volumes.get(&volume).copied().unwrap_or_default()
    }

    /// Changes one entry and makes the file durable. Blocks.
    ///
    /// # Errors
    /// FS-5205; the entry is changed in memory only.
    pub fn set(&mut self, volume: VolumeId, memory: VolumeMemory) -> Result<(), Problem> {
        self.volumes.insert(volume, memory);
        let write = || {
            if let Some(dir) = self.file.parent() {
                durable_fs::create_private_dir(dir)?;
            }
            durable_fs::replace(&self.file, &serde_json::to_vec_pretty(&self.volumes)?, 0o600)
        };
        write().map_err(|e| problem::file("write", &self.file, &e))
    }
}

#[cfg(test)]
mod tests {
    use farshore_extent::{Chain, Epoch, Generation, Lsn, Seq};

    use super::*;

    #[test]
    fn what_was_kept_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::under(dir.path());
        let volume = VolumeId::random();
        let memory = VolumeMemory {
            generation: Generation::new(3),
            acked: Lsn::new(Epoch::new(2), Seq::new(77)),
            acked_chain: Chain::from_bytes([9; 32]),
        };
        MemoryFile::load(&paths).unwrap().set(volume, memory).unwrap();
        let again = MemoryFile::load(&paths).unwrap();
        assert_eq!(again.get(volume), memory);
        assert_eq!(again.get(VolumeId::random()), VolumeMemory::default());
    }
}
