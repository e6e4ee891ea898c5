//! Writes made to a view: a sparse file and a durable map of what it holds.
//!
//! A flush makes all writes before it durable, data first and then the map, so that after a power
//! cut the map never speaks of bytes that are not there: flushed writes are kept, others may be
//! lost, and nothing foreign is ever shown. Never touches base or journal.

mod log;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use farshore_extent::{Extent, ExtentSet};
use nix::sys::statvfs::statvfs;

use crate::store::{Disk, DiskFile, FileKind};
use log::{Entry, Log};
pub(super) use log::{Identity, OpenError};

const DATA: &str = "data";

/// Most disjoint ranges of one scratch: 1 Mi x about 64 B in the map = 64 MiB.
const MAX_RANGES: usize = 1 << 20;

/// Space of zeroed ranges is given back in pieces of at least so many bytes: a hole costs
/// milliseconds.
const PUNCH: u64 = 1 << 20;

/// Where the bytes of a range of a view are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In the scratch file, at the same offset.
    Scratch,
    /// Zeroed by the view's user.
    Zero,
    /// Untouched: at the recovery point.
    Point,
}

/// Why a write was not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum ScratchError {
    /// All that it may take is in it. Only this view fails.
    #[error("the scratch of the view is full")]
    Full,
    /// The rest of the target's disk is for the journals. Only views fail.
    #[error("the disk of the target is nearly full")]
    DiskFull,
    /// The file system failed.
    #[error("{0}")]
    Io(io::Error),
}

impl From<io::Error> for ScratchError {
    fn from(error: io::Error) -> Self {
        if is_full(&error) { Self::DiskFull } else { Self::Io(error) }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[derive(Debug, Default)]
struct Map {
    written: ExtentSet,
    zeroed: ExtentSet,
    /// Bytes in `written`.
    used: u64,
    /// Ranges of both that the log does not know yet.
    pending: ExtentSet,
}

/// Whether nothing was ever written to the scratch in `dir`, as far as one can tell.
pub(super) fn is_empty(dir: &Path) -> bool {
    let there = |name| std::fs::metadata(dir.join(name)).ok();
    let map = there(log::NAME).is_none_or(|map| map.len() <= log::EMPTY);
    map && there(DATA).is_none_or(|data| data.blocks() == 0)
}

/// How much a scratch may take.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    /// Most bytes that may be written.
    pub(super) quota: u64,
    /// A folder of the file system whose free space is to stay above so many bytes, or above a tenth
    /// of it all if that is less.
    pub(super) reserve: Option<(PathBuf, u64)>,
}

impl Limits {
    /// Whether `bytes` more leave the reserve alone.
    pub(super) fn leave_room(&self, bytes: u64) -> io::Result<bool> {
        let Some((dir, reserve)) = &self.reserve else { return Ok(true) };
        let now = statvfs(dir)?;
        let free = now.blocks_available().saturating_mul(now.fragment_size());
        let all = now.blocks().saturating_mul(now.fragment_size());
        Ok(free >= bytes.saturating_add((*reserve).min(all / 10)))
    }
}

/// See the module.
pub(super) struct Scratch {
    data: Arc<dyn DiskFile>,
    limits: Limits,
    map: RwLock<Map>,
    log: Mutex<Log>,
    /// The first failed sync: nothing that was written since the last good one is known to be
    /// there, so nothing more is taken.
    failed: OnceLock<String>,
}

impl Scratch {
    /// An empty scratch in `disk`, durable when this returns.
    pub(super) fn create(
        disk: Arc<dyn Disk>,
        identity: Identity,
        limits: Limits,
    ) -> io::Result<Self> {
        let data = disk.create(DATA, FileKind::Plain)?;
        data.set_len(identity.size.get())?;
        data.sync()?;
        let log = Log::create(Arc::clone(&disk), identity)?;
        disk.sync_dir()?;
        Ok(Self::new(data, log, Map::default(), limits))
    }

    /// The scratch that an earlier daemon left in `disk`: as of its last flush, or later.
    pub(super) fn open(
        disk: Arc<dyn Disk>,
        identity: Identity,
        limits: Limits,
    ) -> Result<Self, OpenError> {
        let data = disk.open(DATA, FileKind::Plain)?;
        if data.len()? < identity.size.get() {
            return Err(OpenError::Damaged(format!("{DATA}: it is shorter than the volume")));
        }
        let (log, entries) = Log::open(disk, identity)?;
        let mut map = Map::default();
        for (extent, zero) in entries {
            if !identity.size.extent().contains(extent) {
                return Err(OpenError::Damaged(format!("map: {extent} is outside of the volume")));
            }
            map.set(extent, zero);
        }
        map.used = map.written.bytes();
        Ok(Self::new(data, log, map, limits))
    }

    fn new(data: Arc<dyn DiskFile>, log: Log, map: Map, limits: Limits) -> Self {
        let (map, log) = (RwLock::new(map), Mutex::new(log));
        Self { data, limits, map, log, failed: OnceLock::new() }
    }

    fn read_map(&self) -> RwLockReadGuard<'_, Map> {
        self.map.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_map(&self) -> RwLockWriteGuard<'_, Map> {
        self.map.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes written so far.
    pub(super) fn used(&self) -> u64 {
        self.read_map().used
    }

    /// Why it takes no more writes, if a sync has failed.
    pub(super) fn failed(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    fn check_alive(&self) -> Result<(), ScratchError> {
        match self.failed() {
            None => Ok(()),
            Some(first) => Err(ScratchError::Io(io::Error::other(first.to_owned()))),
        }
    }

    fn fail(&self, error: io::Error) -> ScratchError {
        let first = self.failed.get_or_init(|| error.to_string());
        ScratchError::Io(io::Error::other(first.clone()))
    }

    /// Cuts `extent` into pieces by where their bytes are, ascending, without gaps.
    pub(super) fn places(&self, extent: Extent) -> Vec<(Extent, Place)> {
        let known = self.read_map().inside(extent);
        let mut pieces = Vec::with_capacity(known.len() * 2 + 1);
        let mut at = extent.offset();
        for (piece, zero) in known {
            pieces.extend(Extent::between(at, piece.offset()).map(|gap| (gap, Place::Point)));
            pieces.push((piece, if zero { Place::Zero } else { Place::Scratch }));
            at = piece.end();
        }
        pieces.extend(Extent::between(at, extent.end()).map(|gap| (gap, Place::Point)));
        pieces
    }

    /// Reads bytes that [`Self::places`] said are here.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.data.read_at(out, offset)
    }

    /// Takes a write. When it fails nothing of it is visible where nothing was written before.
    pub(super) fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), ScratchError> {
        self.check_alive()?;
        // Exclusive over the write: the map must never point at bytes that are not there, and a
        // zero request for the same range must not slip in between.
        let mut map = self.write_map();
        let new: Vec<Extent> = gaps(&map.written, extent).collect();
        let more = new.iter().map(|gap| gap.len()).sum::<u64>();
        let used = map.used + more;
        if used > self.limits.quota || map.is_full() {
            return Err(ScratchError::Full);
        }
        if more > 0 && !self.limits.leave_room(more)? {
            return Err(ScratchError::DiskFull);
        }
        self.data.write_at(bytes, extent.offset())?;
        map.set(extent, false);
        map.used = used;
        new.into_iter().for_each(|gap| map.pending.insert(gap));
        Ok(())
    }

    /// Makes the range read as zero. Costs no space in the file.
    pub(super) fn zero(&self, extent: Extent) -> Result<(), ScratchError> {
        self.check_alive()?;
        let mut map = self.write_map();
        if map.is_full() {
            return Err(ScratchError::Full);
        }
        let there: Vec<Extent> = map.written.inside(extent).collect();
        let new: Vec<Extent> = gaps(&map.zeroed, extent).collect();
        map.set(extent, true);
        map.used -= there.iter().map(|piece| piece.len()).sum::<u64>();
        new.into_iter().for_each(|gap| map.pending.insert(gap));
        // Until the next flush a power cut may leave zeroes there or what was written before:
        // both are right for a range that was being zeroed.
        for piece in there.into_iter().filter(|piece| piece.len() >= PUNCH) {
            if let Err(error) = self.data.punch(piece) {
                tracing::debug!(%error, "the space of zeroes cannot be given back");
            }
        }
        Ok(())
    }

    /// Makes every write and zero that has ended durable.
    ///
    /// # Errors
    /// [`ScratchError::DiskFull`]: nothing was lost, and it can be tried again. After any other the
    /// scratch takes nothing more until it is opened again.
    pub(super) fn flush(&self) -> Result<(), ScratchError> {
        // One at a time: a record is durable before the next begins.
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_alive()?;
        let (new, all) = {
            let mut map = self.write_map();
            let ranges = map.written.extents() + map.zeroed.extents();
            let all = log.is_long_for(ranges).then(|| map.entries());
            (map.take_pending(), all)
        };
        // Before the log: it must not speak of data that a power cut can take away.
        self.data.sync().map_err(|e| self.fail(e))?;
        if new.is_empty() {
            return Ok(());
        }
        let mut recorded = match all {
            Some(all) => log.rewrite(&all),
            None => log.append(&new),
        };
        if recorded.as_ref().is_err_and(is_full) {
            // A rewrite needs the space of the whole log for a moment, a record little.
            recorded = log.append(&new);
        }
        recorded.map_err(|error| match ScratchError::from(error) {
            full @ (ScratchError::Full | ScratchError::DiskFull) => {
                let mut map = self.write_map();
                new.iter().for_each(|(extent, _)| map.pending.insert(*extent));
                full
            }
            ScratchError::Io(error) => self.fail(error),
        })
    }
}

/// The parts of `extent` that are not in `set`.
fn gaps(set: &ExtentSet, extent: Extent) -> impl Iterator<Item = Extent> {
    let mut at = extent.offset();
    let ends = set.inside(extent).map(|e| (e.offset(), e.end())).chain([(extent.end(), u64::MAX)]);
    ends.filter_map(move |(from, to)| {
        let gap = Extent::between(at, from);
        at = to;
        gap
    })
}

impl Map {
    fn is_full(&self) -> bool {
        self.written.extents() + self.zeroed.extents() >= MAX_RANGES
    }

    fn set(&mut self, extent: Extent, zero: bool) {
        let (to, from) = match zero {
            true => (&mut self.zeroed, &mut self.written),
            false => (&mut self.written, &mut self.zeroed),
        };
        from.remove(extent);
        to.insert(extent);
    }

    /// What of `extent` was written or zeroed, ascending.
    fn inside(&self, extent: Extent) -> Vec<Entry> {
        let mut known: Vec<Entry> = self.written.inside(extent).map(|e| (e, false)).collect();
        known.extend(self.zeroed.inside(extent).map(|e| (e, true)));
        known.sort_unstable_by_key(|(e, _)| e.offset());
        known
    }

    fn entries(&self) -> Vec<Entry> {
        let written = self.written.iter().map(|e| (e, false));
        written.chain(self.zeroed.iter().map(|e| (e, true))).collect()
    }

    fn take_pending(&mut self) -> Vec<Entry> {
        let pending = std::mem::take(&mut self.pending);
        pending.iter().flat_map(|extent| self.inside(extent)).collect()
    }
}
