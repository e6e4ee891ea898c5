//! What filterd keeps durably: the epoch, and a record for each protected volume.
//!
//! ```text
//! STATE/lock             held while a daemon runs
//! STATE/epoch.json       {"version":1,"epoch":N}, raised at each start before anything else
//! STATE/volumes/ID.json  a VolumeRecord: how the volume is served
//! STATE/volumes/ID.state, ID.ranges  what the next start has to send (`crate::volume_state`)
//! ```
//! Every change of a JSON file replaces it whole, durably. A record that is missing or damaged means copy
//! more, never less.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use farshore_extent::{BlockSizes, Epoch, Problem, VolumeId, VolumeName, VolumeSize};
use serde::{Deserialize, Serialize};

use super::problem;
use super::schedule::Wait;
use crate::durable_fs;
use crate::volume_state::{FileMedium, StateFile};

/// Made by the first start, and there ever after.
pub(super) const EPOCH_FILE: &str = "epoch.json";

/// Version of the epoch file.
const EPOCH_VERSION: u32 = 1;

/// How guests reach a volume. The number of a kernel device is kept, so that it has the same name
/// after every start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Front {
    Ublk { number: u32 },
    Nbd { number: u32 },
    Socket { path: PathBuf },
}

/// A protected volume on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VolumeRecord {
    pub(super) version: u32,
    pub(super) volume: VolumeId,
    pub(super) name: VolumeName,
    pub(super) backing: PathBuf,
    pub(super) front: Front,
    pub(super) pool_bytes: u64,
    pub(super) point_interval_ms: Option<u64>,
    /// Bytes a second; 0 is no limit.
    pub(super) copy_rate: u64,
    /// The target had an image of the disk: nothing is sent without being compared.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) seeded: bool,
    /// What the copy loop waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) wait: Option<Wait>,
    pub(super) size: VolumeSize,
    pub(super) blocks: BlockSizes,
    /// The epoch that wrote this.
    pub(super) epoch: Epoch,
    /// The target has refused this source for good: no writes until it has taken it back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) fenced: Option<Problem>,
}

impl VolumeRecord {
    /// 2: the way of attaching. 3: how the last run ended is in a file of its own.
    pub(super) const VERSION: u32 = 3;
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EpochFile {
    version: u32,
    epoch: Epoch,
}

/// The state directory, locked.
#[derive(Debug)]
pub(super) struct StateDir {
    path: PathBuf,
    run: PathBuf,
    _lock: File,
}

impl StateDir {
    /// `run`: where it is noted that the state cannot be written.
    pub(super) fn open(path: &Path, run: &Path) -> Result<Self, Problem> {
        let failed = |e: io::Error| problem::state(path, &e);
        durable_fs::create_directory(&path.join("volumes"), 0o700).map_err(failed)?;
        let lock = File::create(path.join("lock")).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), run: run.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(problem::state_in_use(path)),
            Err(TryLockError::Error(e)) => Err(failed(e)),
        }
    }

    /// Raises the epoch above every one used before, durably.
    pub(super) fn raise_epoch(&self, records: &[VolumeRecord]) -> Result<Epoch, Problem> {
        let path = self.path.join(EPOCH_FILE);
        let failed = |e: io::Error| problem::state(&path, &e);
        let stored = match fs::read(&path) {
            Ok(bytes) => match serde_json::from_slice::<EpochFile>(&bytes) {
                Ok(file) if file.version == EPOCH_VERSION => file.epoch,
                Ok(file) => {
                    return Err(failed(io::Error::other(format!("version {}", file.version))));
                }
                // The records of the volumes know the epochs that matter.
                Err(error) if !records.is_empty() => {
                    tracing::error!(%error, path = %path.display(), "the epoch file is damaged");
                    Epoch::ZERO
                }
                Err(error) => return Err(failed(error.into())),
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => Epoch::ZERO,
            Err(e) => return Err(failed(e)),
        };
        let epoch = records.iter().map(|r| r.epoch).fold(stored, Epoch::max).next();
        let bytes = serde_json::to_vec(&EpochFile { version: EPOCH_VERSION, epoch })
            .map_err(|e| failed(e.into()))?;
        durable_fs::write(&path, &bytes, 0o600).map_err(failed)?;
        Ok(epoch)
    }

    /// Every readable record, and what is wrong with the others.
    pub(super) fn volumes(&self) -> Result<(Vec<VolumeRecord>, Vec<Problem>), Problem> {
        let directory = self.path.join("volumes");
        let failed = |e: io::Error| problem::state(&directory, &e);
        let (mut records, mut problems) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match read_record(&path) {
                Ok(record) => records.push(record),
                Err(problem) => problems.push(problem),
            }
        }
        records.sort_by(|a: &VolumeRecord, b| a.name.cmp(&b.name));
        Ok((records, problems))
    }

    /// Volumes of all records, readable or not.
    pub(super) fn recorded(&self) -> Result<Vec<VolumeId>, Problem> {
        let directory = self.path.join("volumes");
        let failed = |e: io::Error| problem::state(&directory, &e);
        let entries: Vec<_> =
            fs::read_dir(&directory).and_then(Iterator::collect).map_err(failed)?;
        let volume = |entry: &fs::DirEntry| {
            entry.file_name().to_str()?.strip_suffix(".json")?.parse::<VolumeId>().ok()
        };
        Ok(entries.iter().filter_map(volume).collect())
    }

    fn file(&self, volume: VolumeId) -> PathBuf {
        self.path.join("volumes").join(format!("{volume}.json"))
    }

    /// Whether there is a record of the volume, readable or not.
    pub(super) fn has(&self, volume: VolumeId) -> bool {
        self.file(volume).exists()
    }

    pub(super) fn save(&self, record: &VolumeRecord) -> Result<(), Problem> {
        let path = self.file(record.volume);
        let failed = |e: io::Error| problem::state(&path, &e);
        let bytes = serde_json::to_vec_pretty(record).map_err(|e| failed(e.into()))?;
        durable_fs::write(&path, &bytes, 0o600).map_err(failed)
    }

    pub(super) fn remove(&self, volume: VolumeId) -> Result<(), Problem> {
        let path = self.file(volume);
        let removed = durable_fs::remove(&path);
        removed.and(self.medium(volume).remove()).map_err(|e| problem::state(&path, &e))
    }

    /// What the last run left of the volume, to be loaded.
    pub(super) fn volume_state(&self, volume: VolumeId) -> StateFile<FileMedium> {
        StateFile::new(self.medium(volume))
    }

    fn medium(&self, volume: VolumeId) -> FileMedium {
        FileMedium::new(&self.path.join("volumes"), &volume.to_string()).with_note(&self.run)
    }
}

fn read_record(path: &Path) -> Result<VolumeRecord, Problem> {
    let bytes = fs::read(path).map_err(|e| problem::damaged(path, e))?;
    let mut record: VolumeRecord =
        serde_json::from_slice(&bytes).map_err(|e| problem::damaged(path, e))?;
    match record.version {
        // What it says of the last run is not looked at: without its own file all is sent again.
        2 | VolumeRecord::VERSION => record.version = VolumeRecord::VERSION,
        unknown => return Err(problem::damaged(path, format!("version {unknown} is unknown"))),
    }
    let named = path.file_stem().and_then(|s| s.to_str()).map(str::to_owned);
    if named != Some(record.volume.to_string()) {
        return Err(problem::damaged(path, "it belongs to another volume"));
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> VolumeRecord {
        VolumeRecord {
            version: VolumeRecord::VERSION,
            volume: VolumeId::random(),
            name: VolumeName::new("pgdata").unwrap(),
            backing: "/dev/vdb".into(),
            front: Front::Ublk { number: 3 },
            pool_bytes: 8 << 20,
            point_interval_ms: None,
            copy_rate: 0,
            seeded: false,
            wait: None,
            size: VolumeSize::new(1 << 20).unwrap(),
            blocks: BlockSizes::E512,
            epoch: Epoch::new(4),
            fenced: None,
        }
    }

    #[test]
    fn the_epoch_rises_at_each_start_and_never_falls_behind_a_volume() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path(), dir.path()).unwrap();
        assert_eq!(state.raise_epoch(&[]).unwrap(), Epoch::new(1));
        assert_eq!(state.raise_epoch(&[]).unwrap(), Epoch::new(2));
        let known = record();
        fs::write(dir.path().join("epoch.json"), b"{damaged").unwrap();
        assert!(state.raise_epoch(&[]).is_err(), "nobody knows the epoch");
        assert_eq!(state.raise_epoch(&[known]).unwrap(), Epoch::new(5));
        assert_eq!(StateDir::open(dir.path(), dir.path()).unwrap_err().code.0, 2031);
    }

    #[test]
    fn a_damaged_record_does_not_hide_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path(), dir.path()).unwrap();
        let good = record();
        state.save(&good).unwrap();
        let volumes = dir.path().join("volumes");
        fs::write(volumes.join(format!("{}.json", VolumeId::random())), b"{").unwrap();
        let stolen = volumes.join(format!("{}.json", VolumeId::random()));
        fs::copy(volumes.join(format!("{}.json", good.volume)), stolen).unwrap();
        let (records, problems) = state.volumes().unwrap();
        assert_eq!(records, std::slice::from_ref(&good));
        assert_eq!(problems.len(), 2);
        state.remove(good.volume).unwrap();
        assert!(state.volumes().unwrap().0.is_empty());
    }
}
