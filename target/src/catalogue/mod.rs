//! The catalogue: hosts, tokens, volumes, recovery points, views and events.
//!
//! Rows of points can be rebuilt from the journals; losing the catalogue loses no data. The trait
//! is the seam to another database; it knows nothing of sessions or stores.

mod failover;
mod sqlite;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farshore_extent::{
    BlockSizes, HostId, Lsn, MarkerId, PointId, PointKind, Problem, ViewId, VolumeId, VolumeName,
    VolumeSize, WallTime,
};

pub use failover::{Failovers, JobRow};
pub use sqlite::SqliteCatalogue;

/// Why the catalogue could not be used.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// The database said no.
    #[error("{0}")]
    Database(#[from] rusqlite::Error),
    /// Written by a newer release.
    #[error("the catalogue has version {0}, newer than this program understands")]
    Newer(i64),
    /// A row that no release writes.
    #[error("a row of the catalogue is damaged: {0}")]
    Damaged(String),
}

impl From<CatalogueError> for farshore_extent::Problem {
    fn from(error: CatalogueError) -> Self {
        crate::problem::catalogue(&error)
    }
}

/// Time a daemon has been running on this catalogue, in milliseconds, over all its runs: the
/// clock of retention. It follows the monotonic clock, so setting the wall clock expires nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Age(pub u64);

/// A scrub that has read everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scrub {
    /// When it ended.
    pub at: WallTime,
    /// How many damaged places it has found.
    pub found: u64,
}

/// An enrolled host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRow {
    /// Identity, as in its certificate.
    pub host: HostId,
    /// Name for people.
    pub name: String,
    /// When it enrolled last.
    pub enrolled: WallTime,
    /// Its certificate is no longer accepted.
    pub removed: bool,
}

/// A volume and what was decided about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeRow {
    /// Identity.
    pub volume: VolumeId,
    /// Unique name.
    pub name: VolumeName,
    /// The host that created it.
    pub host: HostId,
    /// Size at the last open.
    pub size: VolumeSize,
    /// Block sizes at the last open.
    pub blocks: BlockSizes,
    /// Milliseconds between points; 0 is none.
    pub point_interval_ms: u64,
    /// The source said that it no longer protects it.
    pub unprotected: bool,
    /// Its retention policy, by name or written out; empty: that of the target's configuration.
    pub policy: String,
    /// Markers up to here have been turned into rows (and may have expired since).
    pub points_upto: Lsn,
}

/// A point to be recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewPoint {
    /// Its place.
    pub lsn: Lsn,
    /// Capture time.
    pub time: WallTime,
    /// What it promises.
    pub kind: PointKind,
    /// Name tag, or empty.
    pub name: String,
    /// The marker it came from.
    pub marker: MarkerId,
}

/// A recorded point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PointRow {
    /// Number for people.
    pub point: PointId,
    /// Of which volume.
    pub volume: VolumeId,
    /// What was recorded.
    pub at: NewPoint,
    /// Kept whatever the policy says.
    pub pinned: bool,
    /// When it was recorded, by the clock of retention.
    pub recorded: Age,
}

/// Which point is looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// Any.
    Newest,
    /// One of this kind.
    OfKind(PointKind),
    /// The one with this number.
    Numbered(PointId),
    /// One with this name.
    Named(String),
    /// The one at this place.
    At(Lsn),
}

/// How many points a volume has, and its ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PointSummary {
    /// Points kept.
    pub count: u64,
    /// Capture time of the newest.
    pub newest: Option<WallTime>,
    /// Capture time of the oldest.
    pub oldest: Option<WallTime>,
}

/// An entry of the event log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRow {
    /// When.
    pub time: WallTime,
    /// Code of the problem, 0 for notices.
    pub code: u16,
    /// The volume's name, when it is about one.
    pub volume: Option<VolumeName>,
    /// What happened.
    pub text: String,
}

/// An opened view: what serves it again after a restart, and evidence after it is closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewRow {
    /// Identity.
    pub view: ViewId,
    /// Of which volume.
    pub volume: VolumeId,
    /// The place it shows.
    pub lsn: Lsn,
    /// When it was opened.
    pub opened: WallTime,
    /// How long that took, in microseconds.
    pub open_micros: u64,
    /// Capture time of the place.
    pub time: WallTime,
    /// The point, when it is one.
    pub point: Option<PointId>,
    /// Size of the volume there, in bytes.
    pub size: VolumeSize,
    /// Name of its export, and the beginning of its socket's name.
    pub export: VolumeName,
    /// Nothing can be written to it.
    pub read_only: bool,
    /// Most bytes that may be written to it.
    pub scratch_bytes: u64,
    /// Where it is served with TLS.
    pub tls_address: Option<String>,
    /// Its block device.
    pub device: Option<PathBuf>,
    /// Why it has none any more.
    pub device_lost: Option<String>,
    /// It consists of this image or device, and of nothing of the store.
    pub image: Option<PathBuf>,
    /// It is being made an image, or was and is not yet.
    pub flatten: Option<FlattenRow>,
}

/// A view that is to become an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlattenRow {
    /// The image, or the device.
    pub to: PathBuf,
    /// Bytes a second; 0 is no limit.
    pub rate: u64,
    /// Whatever lies there is replaced.
    pub force: bool,
    /// Why nobody is at it: the code of a problem, or 0 when it was stopped by hand, and the reason.
    pub ended: Option<(u16, String)>,
}

/// What the daemon remembers besides the journals. Every change is durable when the method
/// returns.
///
/// All methods return [`CatalogueError`] when the database fails or a row is damaged.
#[allow(missing_docs, clippy::missing_errors_doc)] // one line above says it for all
pub trait Catalogue: Failovers + Send {
    fn put_host(&mut self, host: &HostRow) -> Result<(), CatalogueError>;
    fn host(&self, host: HostId) -> Result<Option<HostRow>, CatalogueError>;
    fn hosts(&self) -> Result<Vec<HostRow>, CatalogueError>;

    /// Remembers the hash of a token's secret.
    fn put_token(
        &mut self,
        hash: [u8; 32],
        host_name: &str,
        expires: WallTime,
    ) -> Result<(), CatalogueError>;
    /// Uses up a token: the host name it was made for, or none when it is unknown or too old.
    fn take_token(
        &mut self,
        hash: [u8; 32],
        now: WallTime,
    ) -> Result<Option<String>, CatalogueError>;

    /// Host and `points_upto` of a known volume stay as they are; a name in use by another volume
    /// is an error of the database.
    fn put_volume(&mut self, volume: &VolumeRow) -> Result<(), CatalogueError>;
    fn volumes(&self) -> Result<Vec<VolumeRow>, CatalogueError>;

    /// Records points and how far the markers of the volume have been looked at, in one step.
    /// A place that has a row already gets no second one.
    fn add_points(
        &mut self,
        volume: VolumeId,
        points: &[NewPoint],
        upto: Lsn,
        now: Age,
    ) -> Result<(), CatalogueError>;
    /// Newest first, those before `before`; `limit` 0 is all.
    fn points(
        &self,
        volume: VolumeId,
        before: Option<Lsn>,
        limit: u32,
    ) -> Result<Vec<PointRow>, CatalogueError>;
    /// The newest point that is wanted.
    fn find_point(
        &self,
        volume: VolumeId,
        wanted: &Wanted,
    ) -> Result<Option<PointRow>, CatalogueError>;
    fn point_summary(&self, volume: VolumeId) -> Result<PointSummary, CatalogueError>;
    fn drop_points(&mut self, points: &[PointId]) -> Result<(), CatalogueError>;
    /// Forgets points beyond the end of a journal that was damaged, and that markers there were
    /// looked at. Returns how many.
    fn forget_points_after(
        &mut self,
        volume: VolumeId,
        durable: Lsn,
    ) -> Result<usize, CatalogueError>;

    /// Something to be said of the point at a place, which may come later. The oldest go.
    fn add_point_note(
        &mut self,
        volume: VolumeId,
        lsn: Lsn,
        problem: &Problem,
    ) -> Result<(), CatalogueError>;
    /// What was said first.
    fn point_note(&self, volume: VolumeId, lsn: Lsn) -> Result<Option<Problem>, CatalogueError>;

    /// Also when it is known already.
    fn put_view(&mut self, view: &ViewRow) -> Result<(), CatalogueError>;
    /// Those that are open, in the order in which they were opened.
    fn open_views(&self) -> Result<Vec<ViewRow>, CatalogueError>;
    /// Whether a view was ever opened, and whether it was closed; none: it is not known.
    fn is_closed(&self, view: ViewId) -> Result<Option<bool>, CatalogueError>;
    /// `note` is what was learnt.
    fn close_view(&mut self, view: ViewId, at: WallTime, note: &str) -> Result<(), CatalogueError>;

    /// When a view of the volume was last closed.
    fn last_drill(&self, volume: VolumeId) -> Result<Option<WallTime>, CatalogueError>;

    /// The last scrub of the volume that has read everything.
    fn last_scrub(&self, volume: VolumeId) -> Result<Option<Scrub>, CatalogueError>;
    fn set_last_scrub(&mut self, volume: VolumeId, scrub: Scrub) -> Result<(), CatalogueError>;

    fn add_event(&mut self, event: &EventRow) -> Result<(), CatalogueError>;
    /// Newest first; `limit` 0 is all that are kept.
    fn events(&self, limit: u32) -> Result<Vec<EventRow>, CatalogueError>;

    fn age(&self) -> Result<Age, CatalogueError>;
    fn set_age(&mut self, age: Age) -> Result<(), CatalogueError>;
}

/// The catalogue as the daemon's threads share it. Calls take milliseconds (they sync): never
/// from a task of the async runtime, always from a thread of their own or a blocking task.
#[derive(Clone)]
pub struct SharedCatalogue(Arc<Mutex<dyn Catalogue>>);

impl SharedCatalogue {
    /// Shares `catalogue`.
    pub fn new(catalogue: impl Catalogue + 'static) -> Self {
        Self(Arc::new(Mutex::new(catalogue)))
    }

    /// The catalogue, for one short piece of work.
    pub fn lock(&self) -> MutexGuard<'_, dyn Catalogue + 'static> {
        // Every method is one database transaction: a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes to the event log; a failure is logged and changes nothing else.
    pub fn note(&self, code: u16, volume: Option<&VolumeName>, text: impl Into<String>) {
        let event =
            EventRow { time: WallTime::now(), code, volume: volume.cloned(), text: text.into() };
        tracing::info!(code, volume = volume.map(VolumeName::as_str), "{}", event.text);
        if let Err(error) = self.lock().add_event(&event) {
            tracing::warn!(%error, "the event log cannot be written");
        }
    }
}
