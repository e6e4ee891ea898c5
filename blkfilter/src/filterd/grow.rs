//! A volume takes over the larger size that its backing has got.
//!
//! The order of the steps, each complete before the next:
//!
//! 1. The core: the stream has its Resize record, and the new part is sent unless it reads as
//!    zeroes. No guest can write there yet. The intent map marks all of the new part.
//! 2. The marks and then the new size in the state file, durably; then the volume's record.
//! 3. The device: clients of a socket that connect from now on see the new size, and a request
//!    behind the old end is taken.
//! 4. The kernel, for a block device.
//!
//! A process that dies before 1 leaves a smaller volume on a larger backing; one that dies after 1
//! or 2 one whose users have the old size; one that dies after 3 or 4 may have written to the new
//! part. In each case the next start takes the size of the backing as it finds it, tells that size
//! with its `EpochStart`, and shows it to the kernel. When the state file has another size,
//! everything is sent again; otherwise what it marks, the new part included. So nothing is lost
//! between any two steps.

use std::fs;
use std::time::Duration;

use farshore_extent::{Extent, Problem, SECTOR, VolumeSize};

use super::attached::{Attached, lock};
use super::problem;
use crate::control::Grown;
use crate::core::{NewPart, Refused};

/// How long the state directory may take for the marks of the new part.
const MARKING: Duration = Duration::from_secs(10);

impl Attached {
    /// Looks how large the backing is now and lets the volume have that. `dry_run`: only tells what
    /// would be done. When it fails half-way, the same again does the rest; so does a restart.
    pub(super) fn grow(&self, dry_run: bool) -> Result<Grown, Problem> {
        let name = &self.info.name;
        let serving = lock(&self.serving);
        let serving = serving.as_ref().ok_or_else(problem::stopping)?;
        let backing = self.filtering.device().backing();
        let (had, bytes) = (backing.size(), backing.measure()?);
        if bytes < had.get() {
            return Err(problem::shrunk(name, had, bytes));
        }
        let to = backing.usable(bytes)?;
        let from = self.shown().map_or(had, |shown| shown.min(had));
        let grown = Grown { volume: self.id(), name: name.clone(), from, to };
        if from == to {
            return Ok(grown);
        }
        serving.may_resize().map_err(|why| problem::cannot_grow(name, why))?;
        if dry_run {
            return Ok(grown);
        }
        let hole = Extent::between(had.get(), to.get()).is_none_or(|new| backing.is_hole(new));
        let part = if hole { NewPart::Zero } else { NewPart::Unknown };
        self.take_over(to, part)?;
        backing.set_size(to);
        serving.resize(to).map_err(|why| problem::old_size_shown(name, why))?;
        tracing::info!(volume = %name, from = from.get(), to = to.get(), ?part, "grown");
        Ok(grown)
    }

    /// Steps 1 and 2. The core is told under the lock of the record: a stop that goes on without us
    /// must not write what is left before a Resize that it does not know of.
    fn take_over(&self, size: VolumeSize, part: NewPart) -> Result<(), Problem> {
        let record = lock(&self.record);
        if !self.filtering.is_kept() {
            return Err(problem::stopping());
        }
        self.filtering.grow(size, part).map_err(|e| match e {
            Refused::Shrinks { from, to } => problem::shrunk(&record.name, from, to.get()),
            other => problem::refused(&other),
        })?;
        drop(record);
        if !self.filtering.is_marked(size, MARKING) {
            return Err(problem::not_marked(&self.info.name, &self.ground.config.state));
        }
        let mut record = lock(&self.record);
        record.size = size;
        self.ground.state.save(&record)
    }

    /// What the kernel tells the users of the block device. It can be less than the volume has:
    /// when an earlier growth failed half-way, or the backing grew while nobody served.
    fn shown(&self) -> Option<VolumeSize> {
        let kernel = lock(&self.record).front.kernel_name()?;
        let file = self.ground.roots.sys.join("class/block").join(kernel).join("size");
        let sectors: u64 = fs::read_to_string(file).ok()?.trim().parse().ok()?;
        VolumeSize::new(sectors.checked_mul(SECTOR)?).ok()
    }
}
