//! Index runs over many segments, so that a point opens a few of them and not thousands of
//! segments.
//!
//! A run of level `l` is the index of all segments whose numbers begin with the same digits, in a
//! system of base `fanout`, but for the last `l`. Whatever place is opened, less than `fanout`
//! runs of each level cover the way there. Runs are made in the background, from the runs of the
//! level below, when all segments of their range are sealed. They hold nothing that the segments
//! do not: one that is missing or damaged costs speed, and is made again.

mod file;
mod merge;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use farshore_changelog::SegmentId;
use farshore_extent::{SECTOR, VolumeId};

use super::Store;
use super::disk::{Disk, FileKind};
use super::error::StoreError;
use super::segment::Segment;
use file::{MAX_SEGMENTS, PREFIX, RunHeader, RunWriter};
use merge::{Input, Merge};

pub(crate) use file::{OpenRun, PREFIX as RUN_PREFIX, Run, RunEntry};

/// The run that is being made has this name.
const NEW: &str = "run.new";

/// Number of the newest segment in it, and level.
type Key = (SegmentId, u8);

/// The runs of a store.
#[derive(Default)]
pub(crate) struct Runs {
    all: BTreeMap<Key, Arc<Run>>,
    job: Option<Merge>,
    /// Cannot be made: something they are made of is damaged.
    failed: BTreeSet<Key>,
    /// Nothing can be made until a segment is sealed.
    complete: bool,
}

/// What answers for a part of the journal.
pub(crate) enum Layer {
    Segment(Arc<Segment>),
    Run(OpenRun),
}

impl Runs {
    /// Takes the runs that belong to these segments; removes all other files of runs.
    pub(crate) fn open(
        disk: &dyn Disk,
        names: &[String],
        volume: VolumeId,
        segments: &[Arc<Segment>],
    ) -> Result<Self, StoreError> {
        let mut runs = Self::default();
        for name in names.iter().filter(|name| name.starts_with(PREFIX) || name.as_str() == NEW) {
            let failed = |e| StoreError::io(format!("opening {name}"), e);
            let file = disk.open(name, FileKind::Plain).map_err(failed)?;
            let run = Run::open(file, volume)?;
            match run.filter(|run| run.header.file_name() == *name && fits(&run.header, segments)) {
                Some(run) => runs.put(run),
                None => disk.delete(name).map_err(failed)?,
            }
        }
        Ok(runs)
    }

    fn put(&mut self, run: Run) {
        self.all.insert((run.header.newest, run.header.level), Arc::new(run));
    }

    /// Runs, newest first, that answer for these segments (ascending, all of them sealed), and the
    /// segments themselves where no run does. A run may reach further back than the first segment.
    pub(crate) fn inputs(&self, segments: &[Arc<Segment>], from: SegmentId) -> Vec<Input> {
        let mut inputs = Vec::new();
        let mut left = segments;
        while let Some((newest, older)) = left.split_last() {
            let ending = self.all.range((newest.id(), 0)..=(newest.id(), u8::MAX));
            let run = ending.rev().map(|(_, run)| run).find(|run| run.header.first >= from);
            left = match run {
                Some(run) => {
                    inputs.push(Input::Run(Arc::clone(run)));
                    &left[..left.partition_point(|s| s.id() < run.header.first)]
                }
                None => {
                    inputs.push(Input::Segment(Arc::clone(newest)));
                    older
                }
            };
        }
        inputs
    }

    /// As [`Self::inputs`], ready to be asked. A run that cannot be read is not taken.
    pub(crate) fn layers(&self, segments: &[Arc<Segment>]) -> Vec<Layer> {
        let mut layers = Vec::new();
        for input in self.inputs(segments, SegmentId::default()) {
            match input {
                Input::Segment(segment) => layers.push(Layer::Segment(segment)),
                Input::Run(run) => match run.opened() {
                    Ok(run) => layers.push(Layer::Run(run)),
                    Err(_) => {
                        let (first, newest) = (run.header.first, run.header.newest);
                        let own = segments.iter().filter(|s| (first..=newest).contains(&s.id()));
                        layers.extend(own.rev().cloned().map(Layer::Segment));
                    }
                },
            }
        }
        layers
    }

    /// The next run to make, without its file: of the lowest level first.
    fn next(
        &self,
        segments: &[Arc<Segment>],
        sealed_below: SegmentId,
        fanout: u64,
    ) -> Option<(RunHeader, Vec<Input>)> {
        let oldest = segments.first()?.id().get();
        for level in 1u8.. {
            let span = fanout.checked_pow(level.into()).filter(|span| *span <= MAX_SEGMENTS)?;
            let mut first = oldest / span * span;
            if first + span > sealed_below.get() {
                return None;
            }
            while first + span <= sealed_below.get() {
                let id = SegmentId::new(first);
                let end = SegmentId::new(first + span);
                let from = segments.partition_point(|s| s.id() < id);
                let own = &segments[from..segments.partition_point(|s| s.id() < end)];
                first += span;
                let Some(newest) = own.last() else { continue };
                let key = (newest.id(), level);
                if self.all.contains_key(&key) || self.failed.contains(&key) {
                    continue;
                }
                let inputs = self.inputs(own, id);
                if inputs.len() < 2 {
                    continue;
                }
                let header = RunHeader {
                    volume: newest.header.volume,
                    level,
                    first: id,
                    end,
                    newest: newest.id(),
                    last: newest.last,
                    chain: newest.chain(),
                    entries: 0,
                    granule: 1,
                };
                return Some((header, inputs));
            }
        }
        None
    }

    /// Every run.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Run>> {
        self.all.values()
    }

    /// Number of runs, and bytes of their files.
    pub(crate) fn size(&self) -> (usize, u64) {
        (self.all.len(), self.all.values().map(|run| run.header.file_len()).sum())
    }
}

/// Whether a run is the index of these segments, as far as they are still there.
fn fits(header: &RunHeader, segments: &[Arc<Segment>]) -> bool {
    let newest = segments.iter().rev().find(|s| s.id() < header.end);
    newest
        .is_some_and(|s| (s.id(), s.last, s.chain()) == (header.newest, header.last, header.chain))
}

impl Store {
    /// One bounded step towards runs that cover the whole journal; whether there is more to do.
    ///
    /// # Errors
    /// [`StoreError`]; a full disk is none: opening a point then takes longer.
    pub fn merge_runs(&mut self) -> Result<bool, StoreError> {
        self.check_alive()?;
        if self.runs.complete {
            return Ok(false);
        }
        let Some(mut job) = self.runs.job.take() else {
            let begun = self.begin_merge();
            return self.or_give_up(begun);
        };
        let header = *job.writer().header();
        let stepped = job.step(self.config.merge_step).and_then(|done| {
            if done {
                self.finish_merge(job)
            } else {
                self.runs.job = Some(job);
                Ok(true)
            }
        });
        if let Err(StoreError::Segment { .. } | StoreError::Run { .. }) = stepped {
            // Whoever needs what cannot be read is told; the runs beside it can still be made.
            self.runs.failed.insert((header.newest, header.level));
            return Ok(true);
        }
        self.or_give_up(stepped)
    }

    fn or_give_up(&mut self, done: Result<bool, StoreError>) -> Result<bool, StoreError> {
        match done {
            Err(StoreError::DiskFull { .. }) => {
                self.runs.complete = true;
                self.remove_run(NEW).map_err(|e| self.poison(e))?;
                Ok(false)
            }
            other => other.map_err(|e| self.poison(e)),
        }
    }

    fn finish_merge(&mut self, job: Merge) -> Result<bool, StoreError> {
        let run = job.finish()?;
        let name = run.header.file_name();
        // Not synced: the name that a power cut takes is that of a run to be made again.
        self.disk.rename(NEW, &name).map_err(|e| StoreError::io(format!("naming {name}"), e))?;
        self.runs.put(run);
        // Expiry may have passed it meanwhile.
        self.forget_runs()?;
        Ok(true)
    }

    fn begin_merge(&mut self) -> Result<bool, StoreError> {
        let open = self.open.as_ref().map(|open| open.header().segment);
        let sealed_below = open.unwrap_or(self.next_segment);
        let next = self.runs.next(&self.segments, sealed_below, self.config.run_fanout.max(2));
        let Some((header, mut inputs)) = next else {
            self.runs.complete = true;
            return Ok(false);
        };
        if self.config.faults.run_oldest_wins {
            inputs.reverse();
        }
        self.remove_run(NEW)?;
        let file = self.disk.create(NEW, FileKind::Plain);
        let file = file.map_err(|e| StoreError::io(format!("creating {NEW}"), e))?;
        let sizes = self.segments.iter().flat_map(|s| [s.header.size, s.size]);
        let sectors = sizes.map(|size| size.get() / SECTOR).max().unwrap_or(1);
        match Merge::new(inputs, RunWriter::new(file, header, sectors)) {
            Ok(job) => self.runs.job = Some(job),
            Err(StoreError::Segment { .. } | StoreError::Run { .. }) => {
                self.runs.failed.insert((header.newest, header.level));
            }
            Err(e) => return Err(e),
        }
        Ok(true)
    }

    /// The journal has changed: there may be something to merge.
    pub(super) const fn wake_merge(&mut self) {
        self.runs.complete = false;
    }

    fn remove_run(&self, name: &str) -> Result<(), StoreError> {
        match self.disk.delete(name) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(StoreError::io(format!("removing {name}"), e))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Removes the runs whose segments are all gone. Views that read them keep them open.
    pub(super) fn forget_runs(&mut self) -> Result<(), StoreError> {
        let oldest = self.segments.first().map_or(self.next_segment, |s| s.id());
        let kept = self.runs.all.split_off(&(oldest, 0));
        let gone = std::mem::replace(&mut self.runs.all, kept);
        gone.values().try_for_each(|run| self.remove_run(&run.header.file_name()))
    }

    /// Index runs over several segments: how many, and bytes of their files.
    #[must_use]
    pub fn run_size(&self) -> (usize, u64) {
        self.runs.size()
    }
}
