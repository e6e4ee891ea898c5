//! A store opened for reading from its folder alone: no daemon, no catalogue, no network, and not a
//! byte of it changed (ADR 0017).
//!
//! Refused while a daemon has it: the daemon writes new content into old files (`base.img`,
//! recycled segments), and a base image has no second copy to tell by.

use std::io;
use std::path::Path;
use std::sync::Arc;

use farshore_extent::{ExtentSet, Lsn, VolumeId, WallTime};

use super::base::Base;
use super::error::{StoreError, ViewError};
use super::order::{CommittedPoint, OrderedStretch, StoreEvent};
use super::read_only::ReadOnlyDisk;
use super::recover::RecoveryReport;
use super::runs::Run;
use super::segment::{Pages, Segment};
use super::view::PointReader;
use super::{Position, Store, StoreConfig};

/// A store that nobody can change while this lives.
#[derive(Debug)]
pub struct OfflineStore {
    store: Store,
    report: RecoveryReport,
    points: Vec<CommittedPoint>,
}

impl OfflineStore {
    /// Opens the store in `dir` as far as its undamaged part reaches: [`Self::report`] says what
    /// is missing.
    ///
    /// # Errors
    /// As for [`Store::open`]; [`StoreError::InUse`] while a daemon has it.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let disk = ReadOnlyDisk::open(dir).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => StoreError::NotAStore,
            _ => StoreError::io("opening the store", e),
        })?;
        let (store, report) = Store::open(Arc::new(disk), StoreConfig::default())?;
        let mut points = Vec::new();
        store.history(|event| match event {
            StoreEvent::Point(point) if store.is_ordered_at(point.lsn) => points.push(point),
            _ => {}
        })?;
        Ok(Self { store, report, points })
    }

    /// What opening found.
    #[must_use]
    pub const fn report(&self) -> &RecoveryReport {
        &self.report
    }

    /// How far it has come.
    #[must_use]
    pub fn position(&self) -> Position {
        self.store.position()
    }

    /// The volume it is of.
    #[must_use]
    pub const fn volume(&self) -> VolumeId {
        self.store.volume()
    }

    /// Points that can be opened, oldest first, as the journal itself tells. A catalogue may list
    /// fewer: those that a policy gave up but that are not merged yet are here, too.
    #[must_use]
    pub fn points(&self) -> &[CommittedPoint] {
        &self.points
    }

    /// As [`Store::ordered_stretches`].
    #[must_use]
    pub fn ordered_stretches(&self) -> Vec<OrderedStretch> {
        self.store.ordered_stretches()
    }

    /// Whether the state at `lsn` is one the volume really had.
    #[must_use]
    pub fn is_ordered_at(&self, lsn: Lsn) -> bool {
        self.store.is_ordered_at(lsn)
    }

    /// As [`Store::resolve_time`].
    ///
    /// # Errors
    /// [`StoreError`] when the journal cannot be read.
    pub fn resolve_time(&self, time: WallTime) -> Result<Option<Lsn>, StoreError> {
        self.store.resolve_time(time)
    }

    /// Capture time of the newest record at or before `lsn`.
    ///
    /// # Errors
    /// [`StoreError`] when the journal cannot be read.
    pub fn time_at(&self, lsn: Lsn) -> Result<WallTime, StoreError> {
        self.store.time_at(lsn)
    }

    /// As [`Store::open_view`].
    ///
    /// # Errors
    /// [`ViewError`] when there is no such state.
    pub fn open_view(&self, at: Lsn) -> Result<PointReader, ViewError> {
        self.store.open_view(at)
    }
    /// Bytes of the base without checksums: an image from elsewhere gets them in the background.
    #[must_use]
    pub const fn unverified_bytes(&self) -> u64 {
        let (size, summed) = self.base_size();
        size.saturating_sub(summed)
    }

    /// Every segment of the history, oldest first.
    pub(super) fn segments(&self) -> Vec<Arc<Segment>> {
        self.store.all_segments()
    }

    /// Every index run over several segments.
    pub(super) fn runs(&self) -> impl Iterator<Item = &Arc<Run>> {
        self.store.runs.all()
    }

    /// The base.
    pub(super) const fn base(&self) -> &Arc<Base> {
        &self.store.base
    }

    /// Bytes that the base holds, and up to which of them it has checksums.
    pub(super) const fn base_size(&self) -> (u64, u64) {
        (self.store.sb.size.get(), self.store.sb.summed)
    }

    /// What a merge that was cut off may have changed in the base: the journal answers for it.
    ///
    /// # Errors
    /// [`StoreError`] when the journal cannot be read.
    pub(super) fn half_merged(&self) -> Result<ExtentSet, StoreError> {
        let mut touched = ExtentSet::new();
        let sb = &self.store.sb;
        if sb.floor > sb.base {
            for segment in self.store.segments_between(sb.base, sb.floor) {
                let mut entries = Vec::new();
                segment.lookup(0, u64::MAX, &Pages::new(1), &mut entries)?;
                entries.iter().filter_map(|e| e.extent()).for_each(|e| touched.insert(e));
            }
        }
        Ok(touched)
    }

    /// Ranges of the base whose content is not known.
    pub(super) const fn unknown(&self) -> &ExtentSet {
        &self.store.sb.unknown
    }
}
