//! The rules of one volume's spool: where it lies, how much it may take, when it is synced, what
//! people are told. [`crate::supply`] keeps the order; here are clock, disk space and problems.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farshore_blkfilter::control::{VolumeInfo, VolumeStatus};
use farshore_extent::{CaptureOrder, Problem, VolumeId, VolumeName};
use farshore_protocol::admin::{MergedPoints, SpoolInfo, SpoolLevel};

use crate::limits::{
    FETCH_IDLE, MERGE_SLICE, SPOOL_NEARLY_FULL, SPOOL_RETRY, SPOOL_SEGMENTS, SPOOL_SYNC,
    SPOOL_SYNC_BYTES, STREAMING_FOR,
};
use crate::problem;
use crate::spool::{FolderDisk, Merged, SEGMENT_BYTES, Spool, SpoolFaults, SpoolOwner, room_for};
use crate::supply::{Pressure, Supply};

/// What the spool of a volume is doing, for status.
pub type SpoolState = SpoolInfo;

/// How much all spools of this host may take together. Changed by a reload at any time.
#[derive(Debug)]
pub struct Budget {
    dir: PathBuf,
    bytes: AtomicU64,
    percent: AtomicU64,
    used: AtomicU64,
}

impl Budget {
    /// Spools below `dir`; 0 percent is none.
    #[must_use]
    pub fn new(dir: PathBuf, bytes: Option<u64>, percent: u8) -> Self {
        let budget = Self {
            dir,
            bytes: AtomicU64::default(),
            percent: AtomicU64::default(),
            used: AtomicU64::new(0),
        };
        budget.set(bytes, percent);
        budget
    }

    /// Other limits.
    pub fn set(&self, bytes: Option<u64>, percent: u8) {
        self.bytes.store(bytes.unwrap_or(u64::MAX), Ordering::Relaxed);
        self.percent.store(percent.into(), Ordering::Relaxed);
    }

    fn is_on(&self) -> bool {
        self.percent.load(Ordering::Relaxed) > 0
    }

    /// Bytes the spools may still take, and may take altogether.
    fn room(&self) -> io::Result<(u64, u64)> {
        let disk = nix::sys::statvfs::statvfs(&self.dir)?;
        let unit = disk.fragment_size();
        let total = disk.blocks().saturating_mul(unit);
        let free = disk.blocks_available().saturating_mul(unit);
        let share = total / 100 * self.percent.load(Ordering::Relaxed);
        let limit = share.min(self.bytes.load(Ordering::Relaxed));
        let left = limit.saturating_sub(self.used.load(Ordering::Relaxed));
        // Others live on this disk, too: the last fiftieth is theirs.
        Ok((left.min(free.saturating_sub(total / 50)), limit))
    }
}

/// See the module.
#[derive(Debug)]
pub struct Keeper {
    budget: Arc<Budget>,
    owner: SpoolOwner,
    name: VolumeName,
    problem: Option<Problem>,
    /// After a failure nothing is written until then.
    rests_until: Option<Instant>,
    full: bool,
    nearly_full: bool,
    /// Bytes the spool might still take when that was looked at.
    room: u64,
    merged: Option<MergedPoints>,
    unsynced_since: Option<Instant>,
    handed: Option<Instant>,
    counted: u64,
    sync_bytes: u64,
    told: Option<(Instant, SpoolState)>,
}

impl Keeper {
    /// The spool of a volume.
    #[must_use]
    pub fn new(budget: Arc<Budget>, info: &VolumeInfo) -> Self {
        let (volume, size, blocks) = (info.volume, info.size, info.blocks);
        Self {
            budget,
            owner: SpoolOwner { volume, size, blocks, segment_bytes: SEGMENT_BYTES },
            name: info.name.clone(),
            problem: None,
            rests_until: None,
            full: false,
            nearly_full: false,
            room: 0,
            merged: None,
            unsynced_since: None,
            handed: None,
            counted: 0,
            sync_bytes: SPOOL_SYNC_BYTES,
            told: None,
        }
    }

    fn dir(&self) -> PathBuf {
        self.budget.dir.join(self.owner.volume.to_string())
    }

    pub(crate) fn is_on(&self) -> bool {
        self.budget.is_on()
    }

    /// Opens the folder and what an earlier run left in it.
    pub(crate) fn open(&mut self, supply: &mut Supply<FolderDisk>) {
        if !self.is_on() {
            return;
        }
        let dir = self.dir();
        let opened = FolderDisk::new(&dir).and_then(|disk| {
            let (_, limit) = self.budget.room()?;
            self.owner.segment_bytes = segment_bytes(limit);
            Spool::open(disk, self.owner, SpoolFaults::default())
        });
        match opened {
            Ok(spool) => supply.attach(spool),
            Err(e) => self.rest(&e),
        }
    }

    /// Looks at the pool, the disk and where the folder lies, and decides whether to spool.
    pub(crate) fn decide(
        &mut self,
        supply: &mut Supply<FolderDisk>,
        volume: VolumeId,
        volumes: &[VolumeStatus],
    ) -> io::Result<()> {
        let Some(status) = volumes.iter().find(|v| v.info.volume == volume) else { return Ok(()) };
        if self.is_resting() {
            return Ok(());
        }
        // Nothing leaves the pool before the sync: often enough for a small one.
        self.sync_bytes = (status.pool_bytes / 8).clamp(1 << 20, SPOOL_SYNC_BYTES);
        let half = status.pool_used.saturating_mul(2) >= status.pool_bytes;
        if half && !supply.has_spool() {
            self.open(supply);
        }
        if half && !supply.is_spooling() {
            let below = |v: &&VolumeStatus| lies_on(&self.budget.dir, &v.info);
            if let Some(below) = volumes.iter().find(below) {
                let problem = problem::spool_on_protected(&self.budget.dir, &below.info.name);
                self.rests_until = Some(Instant::now() + SPOOL_RETRY);
                self.tell(problem);
                return Ok(());
            }
        }
        self.count(supply.spool_bytes());
        let (room, limit) = self.budget.room()?;
        self.room = room;
        // Ends when a quarter is free again: not for each segment anew.
        let part = if self.nearly_full { SPOOL_NEARLY_FULL - 1 } else { SPOOL_NEARLY_FULL };
        self.nearly_full = room < limit / part;
        // Begins again only when a quarter of a segment is free: not for each batch anew.
        let needed = if self.full { self.owner.segment_bytes / 4 } else { 0 };
        // What is merged is written beside the rest: that room is not for new changes.
        let room = room.saturating_sub(room_for(self.owner.segment_bytes).min(limit / 8));
        let full = half && room <= needed;
        if full && !self.full {
            let used = supply.spool_bytes();
            self.tell(problem::spool_full(self.name.as_str(), &self.budget.dir, used));
        }
        self.full = full || (self.full && half);
        let streaming = self.is_streaming();
        supply.decide(&Pressure {
            pool_used: status.pool_used,
            pool_bytes: status.pool_bytes,
            ordered: status.order == CaptureOrder::Ordered,
            copy_remaining: status.copy.remaining_bytes,
            streaming,
            room: if full { 0 } else { room },
        })
    }

    fn is_streaming(&self) -> bool {
        self.handed.is_some_and(|at| at.elapsed() < STREAMING_FOR)
    }

    fn is_resting(&self) -> bool {
        self.rests_until.is_some_and(|until| until > Instant::now())
    }

    /// Merges points for a moment, when the spool is nearly full and nothing is sent from it. Whether
    /// there is more to do.
    pub(crate) fn merge(&mut self, supply: &mut Supply<FolderDisk>) -> bool {
        if !self.nearly_full || self.is_streaming() || self.is_resting() {
            return false;
        }
        let begun = Instant::now();
        loop {
            match supply.merge(self.room) {
                Ok(true) if begun.elapsed() < MERGE_SLICE => {}
                Ok(more) => return more,
                Err(error) => {
                    self.rest(&error);
                    return false;
                }
            }
        }
    }

    fn count(&mut self, bytes: u64) {
        let used = &self.budget.used;
        used.fetch_add(bytes, Ordering::Relaxed);
        used.fetch_sub(self.counted, Ordering::Relaxed);
        self.counted = bytes;
    }

    pub(crate) fn handed_out(&mut self) {
        self.handed = Some(Instant::now());
    }

    /// How long a fetch may wait for records.
    pub(crate) fn patience(&self) -> Duration {
        match self.unsynced_since {
            Some(since) => SPOOL_SYNC.saturating_sub(since.elapsed()).max(Duration::from_millis(1)),
            None => FETCH_IDLE,
        }
    }

    pub(crate) fn sync_is_due(&mut self, supply: &Supply<FolderDisk>) -> bool {
        match supply.unsynced() {
            0 => {
                self.unsynced_since = None;
                false
            }
            bytes => {
                let since = *self.unsynced_since.get_or_insert_with(Instant::now);
                bytes >= self.sync_bytes || since.elapsed() >= SPOOL_SYNC
            }
        }
    }

    /// How a call of the spool ended. A failure ends spooling for a while; nothing is lost, the
    /// records are still in the pool.
    pub(crate) fn outcome(&mut self, result: io::Result<()>) {
        if let Err(e) = result {
            self.unsynced_since = None;
            self.rest(&e);
        }
    }

    fn rest(&mut self, error: &io::Error) {
        self.rests_until = Some(Instant::now() + SPOOL_RETRY);
        self.tell(problem::spool_failed(self.name.as_str(), &self.dir(), error));
    }

    fn tell(&mut self, problem: Problem) {
        if self.problem.as_ref().map(|p| p.code) != Some(problem.code) {
            let (why, next) = (&problem.why, &problem.next);
            tracing::warn!(volume = %self.name, %problem, why, next, "the spool takes nothing");
        }
        self.problem = Some(problem);
    }

    /// The state, when it is worth telling: at once when the level changes, else once a second.
    pub(crate) fn news(&mut self, supply: &Supply<FolderDisk>) -> Option<SpoolState> {
        self.count(supply.spool_bytes());
        let resting = self.is_resting();
        if !resting && !self.full {
            self.problem = None;
        }
        let level = match (supply.is_spooling(), supply.spool_bytes()) {
            _ if resting => SpoolLevel::Failed,
            _ if self.full => SpoolLevel::Full,
            (true, _) => SpoolLevel::Spooling,
            (false, 0) => SpoolLevel::Direct,
            (false, _) => SpoolLevel::Draining,
        };
        let merged = supply.merged();
        let merged = merged.map(|Merged { points, from, to }| MergedPoints { points, from, to });
        let merging = merged.map(|m| problem::points_merged(self.name.as_str(), &m));
        if let (Some(problem), None) = (&merging, self.merged) {
            let (why, next) = (&problem.why, &problem.next);
            tracing::warn!(volume = %self.name, %problem, why, next, "the spool is nearly full");
        }
        if let (Some(MergedPoints { points, .. }), None) = (self.merged, merged) {
            tracing::info!(volume = %self.name, points, "what was merged has been sent");
        }
        self.merged = merged;
        let state = SpoolState {
            level,
            bytes: supply.spool_bytes(),
            since: supply.spool_since(),
            problem: self.problem.clone().or(merging),
            merged,
        };
        let stale = |(at, told): &(Instant, SpoolState)| {
            *told != state && (told.level != level || at.elapsed() >= Duration::from_secs(1))
        };
        if !self.told.as_ref().is_none_or(stale) {
            return None;
        }
        if self.told.as_ref().map(|(_, t)| t.level) != Some(level) {
            tracing::info!(volume = %self.name, ?level, bytes = state.bytes, "spool");
        }
        self.told = Some((Instant::now(), state.clone()));
        Some(state)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.count(0);
    }
}

/// Segments of a small spool are small, so that one can be written beside the others.
fn segment_bytes(limit: u64) -> u64 {
    const SMALLEST: u64 = 1 << 20;
    (limit / SPOOL_SEGMENTS).clamp(SMALLEST, SEGMENT_BYTES)
}

/// Whether the folder lies on this protected volume: a write to it would make another one.
fn lies_on(dir: &Path, info: &VolumeInfo) -> bool {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let Ok(folder) = std::fs::metadata(dir) else { return false };
    let devices = [info.attachment.device(), Some(info.backing.as_path())];
    devices.into_iter().flatten().any(|device| {
        let device = std::fs::metadata(device).ok().filter(|d| d.file_type().is_block_device());
        device.is_some_and(|d| is_below(folder.dev(), d.rdev(), 8))
    })
}

/// Whether block device `upper` is `lower`, a partition of it, or built on it (LVM, RAID,
/// encryption).
fn is_below(upper: u64, lower: u64, depth: u32) -> bool {
    if upper == lower {
        return true;
    }
    let (major, minor) = (nix::sys::stat::major(upper), nix::sys::stat::minor(upper));
    let Ok(here) = std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")) else {
        return false;
    };
    let number = |at: &Path| {
        let text = std::fs::read_to_string(at.join("dev")).ok()?;
        let (major, minor) = text.trim().split_once(':')?;
        Some(nix::sys::stat::makedev(major.parse().ok()?, minor.parse().ok()?))
    };
    let slaves = std::fs::read_dir(here.join("slaves")).into_iter().flatten().flatten();
    let mut under: Vec<PathBuf> = slaves.map(|entry| entry.path()).collect();
    if here.join("partition").exists() {
        under.extend(here.parent().map(Path::to_owned));
    }
    depth > 0 && under.iter().filter_map(|at| number(at)).any(|d| is_below(d, lower, depth - 1))
}
