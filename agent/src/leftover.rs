//! Spools of volumes that are not protected any more: nobody can send what is in them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use farshore_extent::VolumeId;

use crate::intake::Ending;

/// See the module.
#[derive(Debug)]
pub(crate) struct Leftovers {
    dir: PathBuf,
    /// Volumes that were on record in this run.
    seen: BTreeSet<VolumeId>,
    /// Threads that may still write to their folder.
    ending: BTreeMap<VolumeId, Ending>,
    /// Dealt with, whatever came of it.
    done: BTreeSet<VolumeId>,
    /// Kept, and said so.
    told: BTreeSet<VolumeId>,
}

impl Leftovers {
    /// Of the spools below `dir`.
    pub(crate) fn below(dir: PathBuf) -> Self {
        let none = BTreeSet::new;
        Self { dir, seen: none(), ending: BTreeMap::new(), done: none(), told: none() }
    }

    /// Nothing of this volume is removed before the thread has ended.
    pub(crate) fn wait_for(&mut self, volume: VolumeId, thread: Ending) {
        self.ending.insert(volume, thread);
    }

    /// Removes the spools of volumes that are not on record at `filterd`, each once, beside the
    /// caller.
    pub(crate) fn sweep(&mut self, recorded: &BTreeSet<VolumeId>) {
        for volume in self.due(recorded, folders(&self.dir)) {
            let dir = self.dir.join(volume.to_string());
            // Gigabytes may take a while.
            tokio::task::spawn_blocking(move || match remove(&dir) {
                Ok(bytes) => {
                    tracing::info!(%volume, bytes, "the spool was removed: the volume is not protected");
                }
                Err(error) => {
                    tracing::warn!(%volume, dir = %dir.display(), %error, "a spool nobody needs stays");
                }
            });
        }
    }

    /// Which of these folders are to be removed.
    fn due(&mut self, recorded: &BTreeSet<VolumeId>, folders: Vec<VolumeId>) -> Vec<VolumeId> {
        self.seen.extend(recorded);
        self.ending.retain(|_, thread| !thread.is_over());
        let mut due = Vec::new();
        for volume in folders {
            if recorded.contains(&volume) || self.ending.contains_key(&volume) {
                continue;
            }
            // An empty record may be that of a state directory that is not mounted yet.
            if recorded.is_empty() && !self.seen.contains(&volume) {
                if self.told.insert(volume) {
                    let dir = self.dir.join(volume.to_string());
                    tracing::warn!(
                        %volume,
                        dir = %dir.display(),
                        "a spool without a volume is kept, as filterd has no volume on record at \
                         all; delete it by hand if that is right"
                    );
                }
            } else if self.done.insert(volume) {
                due.push(volume);
            }
        }
        due
    }
}

/// Volumes that have a folder here.
fn folders(dir: &Path) -> Vec<VolumeId> {
    // Without the directory there is no spool either.
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Removes the segments and the folder. Returns the bytes they took. What else lies there is not
/// touched, and the folder stays then.
fn remove(dir: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let ours = |name: &str| name.starts_with("seg-") || name.starts_with("sent-");
        if entry.file_name().to_str().is_some_and(ours) {
            bytes += entry.metadata()?.len();
            std::fs::remove_file(entry.path())?;
        }
    }
    std::fs::remove_dir(dir)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> VolumeId {
        VolumeId::from_bytes([n; 16])
    }

    fn left() -> Leftovers {
        Leftovers::below("/nowhere".into())
    }

    #[test]
    fn a_spool_goes_when_its_volume_is_not_on_record_and_once_only() {
        let mut left = left();
        let recorded = BTreeSet::from([id(1)]);
        assert_eq!(left.due(&recorded, vec![id(1), id(2)]), [id(2)]);
        assert_eq!(left.due(&recorded, vec![id(1), id(2)]), []);
    }

    #[test]
    fn an_empty_record_proves_nothing_about_volumes_never_seen() {
        let mut left = left();
        let none = BTreeSet::new();
        assert_eq!(left.due(&none, vec![id(1), id(2)]), []);
        assert_eq!(left.due(&BTreeSet::from([id(1)]), vec![id(1)]), []);
        assert_eq!(left.due(&none, vec![id(1)]), [id(1)], "it was the last one");
    }

    #[test]
    fn only_segments_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let spool = dir.path().join(id(3).to_string());
        std::fs::create_dir(&spool).unwrap();
        std::fs::write(spool.join("seg-0000000000000001"), [0; 4096]).unwrap();
        std::fs::write(spool.join("sent-0000000000000001"), "").unwrap();
        std::fs::write(spool.join("notes"), "of a person").unwrap();
        assert_eq!(folders(dir.path()), [id(3)]);
        assert!(remove(&spool).is_err());
        assert!(spool.join("notes").exists() && !spool.join("seg-0000000000000001").exists());
        std::fs::remove_file(spool.join("notes")).unwrap();
        assert_eq!(remove(&spool).unwrap(), 0);
        assert!(!spool.exists() && folders(dir.path()).is_empty());
    }
}
