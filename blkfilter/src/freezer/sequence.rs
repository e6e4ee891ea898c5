//! One time of quiet: pre hooks, freeze, …, thaw, post hooks.
//!
//! From the freeze to the thaw nothing is written and nothing logged: who takes the log may be waiting
//! for what is frozen.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use farshore_extent::Problem;

use super::config::{Application, Config};
use super::hook::{self, Occasion, Stage};
use super::message::Quiet;
use super::mounts::{self, Freezable};
use super::problem;
use super::record::Record;
use super::watchdog::Watchdog;
use crate::sys::freeze;

/// Attempts to thaw before the watchdog alone goes on with it.
const ATTEMPTS: u32 = 3;

/// What has begun and must be ended: [`Self::thaw`], then [`Self::post`].
#[derive(Debug)]
pub(super) struct Sequence {
    record: PathBuf,
    occasion: Occasion,
    /// Whose pre hook has begun.
    begun: Vec<Application>,
    frozen: Vec<Freezable>,
    watchdog: Option<Watchdog>,
    /// When it stops being quiet.
    pub(super) until: Instant,
    limit: Duration,
}

impl Sequence {
    /// Makes everything quiet that `config` has for the volumes. Whatever comes of it, the sequence is
    /// to be ended.
    ///
    /// # Errors
    /// FS-34xx, the first thing that stood in the way.
    pub(super) fn begin(
        config: &Config,
        quiet: &Quiet,
        record: &Path,
        needed: &[PathBuf],
    ) -> (Self, Result<Duration, Problem>) {
        let Quiet { volumes, point, needed: theirs } = quiet;
        let (apps, bare) = config.covering(volumes);
        let limit = apps.iter().map(|app| app.quiet_limit).min().unwrap_or_default();
        let mut this = Self {
            record: record.to_owned(),
            occasion: Occasion { volumes: volumes.clone(), point: point.clone() },
            begun: Vec::new(),
            frozen: Vec::new(),
            watchdog: None,
            until: Instant::now(),
            limit,
        };
        if !bare.is_empty() {
            let names: Vec<&str> = bare.iter().map(farshore_extent::VolumeName::as_str).collect();
            return (this, Err(problem::none_covers(&names.join(", "))));
        }
        let needed: Vec<PathBuf> = needed.iter().chain(theirs).cloned().collect();
        let outcome = this.make_quiet(&apps, &needed);
        (this, outcome)
    }

    fn make_quiet(
        &mut self,
        apps: &[&Application],
        needed: &[PathBuf],
    ) -> Result<Duration, Problem> {
        let mounts: Vec<PathBuf> = apps.iter().flat_map(|app| &app.freeze).cloned().collect();
        // Before any hook: a mount that is not there is no reason to stop an application.
        let mounts = mounts::open(&mounts, needed)?;
        let record = Record {
            applications: apps.iter().map(|app| app.name.clone()).collect(),
            volumes: self.occasion.volumes.clone(),
            point: self.occasion.point.clone(),
            mounts: mounts.iter().map(|mount| mount.at.clone()).collect(),
        };
        record.write(&self.record).map_err(|e| problem::own_file(&self.record, &e))?;
        for &app in apps {
            self.begun.push(app.clone());
            hook::run(app, Stage::Pre, &self.occasion)?;
        }
        if mounts.is_empty() {
            self.until = Instant::now() + self.limit;
            return Ok(self.limit);
        }
        let watchdog = Watchdog::start(&mounts, self.limit)?;
        // After the watchdog's own clock has begun, so that this one ends later, if at all.
        self.until = Instant::now() + self.limit;
        let watchdog = self.watchdog.insert(watchdog);
        for mount in mounts {
            let left = self.until.saturating_duration_since(Instant::now());
            mounts::freeze(&mount, watchdog.guard(), left)?;
            self.frozen.push(mount);
        }
        Ok(self.until.saturating_duration_since(Instant::now()))
    }

    /// Thaws.
    ///
    /// # Errors
    /// FS-3407 when it was not quiet until now, FS-3412 for what stays frozen.
    pub(super) fn thaw(&mut self) -> Result<(), Problem> {
        let mut outcome = Ok(());
        for mount in self.frozen.drain(..).rev() {
            let mut thawed = freeze::thaw(&mount.directory);
            for _ in 1..ATTEMPTS {
                if thawed.is_err() {
                    thawed = freeze::thaw(&mount.directory);
                }
            }
            match thawed {
                Ok(true) => {}
                Ok(false) => {
                    let at = mount.at.display();
                    let why = format!("{at} had been thawed by the watchdog or by hand");
                    outcome = outcome.and(Err(problem::too_late(why)));
                }
                Err(error) => outcome = Err(problem::still_frozen(&mount.at, &error)),
            }
        }
        self.watchdog = None;
        if outcome.is_ok() && Instant::now() > self.until {
            outcome = Err(problem::too_late(format!("the limit is {:?}", self.limit)));
        }
        outcome
    }

    /// Runs the post hook of everything whose pre hook has begun, the last one first.
    pub(super) fn post(mut self) -> Vec<Problem> {
        let run = |app: Application| hook::run(&app, Stage::Post, &self.occasion).err();
        let problems = std::mem::take(&mut self.begun).into_iter().rev().filter_map(run).collect();
        Record::remove(&self.record);
        problems
    }
}

/// Ends what a freezer left that was killed together with its watchdog.
///
/// # Errors
/// What the configuration says; thawed it is in any case, and the rest waits for the next start.
pub(super) fn recover(
    record: &Path,
    config: impl FnOnce() -> Result<Config, Problem>,
) -> Result<(), Problem> {
    let Some(left) = Record::left(record) else { return Ok(()) };
    for at in &left.mounts {
        let thawed = std::fs::File::open(at).map(|directory| mounts::thaw_at_last(&directory));
        tracing::warn!(mount = %at.display(), ?thawed, "left by a freezer that was killed");
    }
    let config = config()?;
    let has_left = |app: &&Application| left.applications.contains(&app.name);
    let occasion = Occasion { volumes: left.volumes.clone(), point: left.point.clone() };
    let apps: Vec<_> = config.applications.iter().filter(has_left).collect();
    for app in apps.into_iter().rev() {
        tracing::warn!(application = %app.name, "its post hook runs now: a freezer was killed");
        if let Err(problem) = hook::run(app, Stage::Post, &occasion) {
            tracing::error!(%problem, why = problem.why, next = problem.next, "a post hook");
        }
    }
    Record::remove(record);
    Ok(())
}
