//! A view flattened: point and scratch become one raw image, onto which the view goes over without
//! its clients noticing. Nothing of the store is needed then.
//!
//! [`begin`] starts it in a thread of its own, [`stop`] ends it, and it goes on where it was after a
//! restart: what the image holds already is found by reading it. Nothing of the view is given up
//! before every byte of the image was read back and compared.

mod copy;
mod image;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use farshore_extent::{Problem, ViewId};
use farshore_protocol::admin::{FlattenInfo, FlattenState, FlattenView};
use nix::sys::stat::stat;

use super::device::ViewDevice;
use super::scratch::Limits;
use super::{View, drop_scratch, scratch_dir};
use crate::catalogue::{FlattenRow, ViewRow};
use crate::daemon::Daemon;
use crate::problem;
use copy::{Copy, CopyError};
pub(super) use copy::{Mirror, Source};
use image::Begin;
pub(super) use image::{Image, drop_unfinished};

/// A copy under way.
pub(super) struct Flatten {
    mirror: Arc<Mirror>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Flatten {
    /// Ends it and waits for its end. It has not failed: it can be gone on with.
    pub(super) fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        if self.thread.join().is_err() {
            tracing::error!("the copy of a view has panicked");
        }
    }
}

/// What there is to show of a view that is or was being flattened.
pub(super) fn info(view: &View) -> Option<FlattenInfo> {
    let row = view.row.flatten.as_ref()?;
    let total = view.row.size.get();
    let now = view.flatten.as_ref().map(|running| running.mirror.progress());
    let state = match &row.ended {
        None => FlattenState::Running,
        Some((0, _)) => FlattenState::Stopped,
        Some(_) => FlattenState::Failed,
    };
    Some(FlattenInfo {
        to: row.to.clone(),
        state,
        total_bytes: total,
        to_copy_bytes: now.map_or(total, |now| now.to_copy),
        to_verify_bytes: now.map_or(0, |now| now.to_verify),
    })
}

/// Why the copy has failed, if it has.
pub(super) fn failed(view: &View) -> Option<Problem> {
    let row = view.row.flatten.as_ref()?;
    let (code, why) = row.ended.as_ref().filter(|(code, _)| *code != 0)?;
    Some(problem::flatten_failed(*code, &view.shown(), &row.to, why))
}

/// Begins to flatten a view, or goes on with what was begun to the same image.
///
/// # Errors
/// FS-6602; FS-6610 while it is not served; FS-6620 when it is flattened already; FS-6621, FS-6703
/// and FS-6704 when the image cannot go there.
pub(crate) fn begin(daemon: &Arc<Daemon>, request: &FlattenView) -> Result<(), Problem> {
    if !request.to.is_absolute() {
        return Err(problem::flatten_not_absolute(&request.to));
    }
    let rate = match request.bytes_per_second {
        0 => daemon.config.flatten_rate.bytes_per_second(),
        rate => rate,
    };
    let (to, force) = (request.to.clone(), request.force);
    let row = FlattenRow { to, rate, force, ended: None };
    start(daemon, request.view, row, false)
}

/// Goes on with a copy that the end of an earlier daemon has interrupted.
pub(super) fn resume(daemon: &Arc<Daemon>, view: ViewId) {
    let row = daemon.views.lock().views.get(&view).and_then(|view| view.row.flatten.clone());
    let Some(row) = row.filter(|row| row.ended.is_none()) else { return };
    if let Err(problem) = start(daemon, view, row, true) {
        end(daemon, view, problem.code.0, format!("{}: {}", problem.what, problem.why));
    }
}

/// Ends a copy; [`begin`] goes on with it.
///
/// # Errors
/// FS-6602, or FS-6620 when there is none.
pub(crate) fn stop(daemon: &Daemon, view: ViewId) -> Result<(), Problem> {
    let running = {
        let mut open = daemon.views.lock();
        let found = open.views.get_mut(&view).ok_or_else(|| problem::no_view(&view))?;
        let shown = found.shown();
        found.flatten.take().ok_or_else(|| problem::flatten_not_running(&shown))?
    };
    running.end();
    end(daemon, view, 0, "it was stopped by hand".to_owned());
    Ok(())
}

fn start(
    daemon: &Arc<Daemon>,
    view: ViewId,
    row: FlattenRow,
    resumed: bool,
) -> Result<(), Problem> {
    let mut open = daemon.views.lock();
    let of_views = open.views.values().filter_map(|view| view.row.device.clone());
    let devices: Vec<PathBuf> = of_views.collect();
    let found = open.views.get_mut(&view).ok_or_else(|| problem::no_view(&view))?;
    let shown = found.shown();
    let running = found.flatten.as_ref().is_some_and(|running| !running.thread.is_finished());
    if running || found.row.image.is_some() {
        return Err(problem::already_flat(&shown, running));
    }
    if devices.contains(&std::fs::canonicalize(&row.to).unwrap_or_default()) {
        return Err(problem::flatten_onto_view(&row.to));
    }
    let Some(serving) = &found.serving else {
        return Err(problem::flatten_not_served(&shown));
    };
    let begun = found.row.flatten.as_ref().is_some_and(|before| before.to == row.to);
    let how = match (row.force, begun || resumed) {
        (true, _) => Begin::Force,
        (false, true) => Begin::Resume,
        (false, false) => Begin::Empty,
    };
    let identity = (view, found.row.size.get());
    let image = Image::begin(&row.to, daemon.data.path(), identity, how)?;
    if let Some(before) = found.row.flatten.as_ref().filter(|before| before.to != row.to) {
        drop_unfinished(&before.to, view);
    }
    let changed = ViewRow { flatten: Some(row.clone()), ..found.row.clone() };
    daemon.catalogue.lock().put_view(&changed)?;
    let mirror = Arc::new(Mirror::new(changed.size.extent()));
    let stop = Arc::new(AtomicBool::new(false));
    let job = Job {
        daemon: Arc::clone(daemon),
        view,
        device: Arc::clone(&serving.device),
        mirror: Arc::clone(&mirror),
        image: Arc::new(image),
        stop: Arc::clone(&stop),
        rate: row.rate,
    };
    // Before the first byte is read: no write may be missed.
    serving.device.set_mirror(Some(Arc::clone(&mirror)));
    let thread = std::thread::Builder::new().name("flatten".to_owned()).spawn(move || job.run());
    let thread = thread.map_err(|e| problem::flatten_cannot_write(&row.to, &e))?;
    found.row = changed;
    found.flatten = Some(Flatten { mirror, stop, thread });
    drop(open);
    let begun = if resumed { "goes on to be" } else { "is being" };
    daemon.catalogue.note(0, None, format!("{shown} {begun} flattened into {}", row.to.display()));
    Ok(())
}

/// It has ended before it was whole.
fn end(daemon: &Daemon, view: ViewId, code: u16, why: String) {
    let mut open = daemon.views.lock();
    let Some(found) = open.views.get_mut(&view) else { return };
    // Nobody is at it any more, whoever says so first.
    found.flatten = None;
    let Some(row) = found.row.flatten.as_mut().filter(|row| row.ended.is_none()) else { return };
    row.ended = Some((code, why.clone()));
    let (row, shown, volume) = (found.row.clone(), found.shown(), found.replica.name());
    drop(open);
    if let Err(error) = daemon.catalogue.lock().put_view(&row) {
        // The next daemon goes on with it.
        tracing::warn!(%error, "that a view is not flattened any more is not recorded");
    }
    daemon.catalogue.note(code, Some(&volume), format!("{shown} is not flattened: {why}"));
}

/// What a thread of [`start`] does.
struct Job {
    daemon: Arc<Daemon>,
    view: ViewId,
    device: Arc<ViewDevice>,
    mirror: Arc<Mirror>,
    image: Arc<Image>,
    stop: Arc<AtomicBool>,
    rate: u64,
}

impl Job {
    fn run(self) {
        let stop = || self.stop.load(Ordering::Relaxed);
        let limits = self.limits();
        // Where the free space cannot be told the write will tell.
        let room = |bytes| limits.leave_room(bytes).unwrap_or(true);
        let copy = Copy {
            source: self.device.as_ref(),
            mirror: &self.mirror,
            image: &self.image,
            rate: self.rate,
            stop: &stop,
            room: &room,
        };
        let ended = copy.run(|| self.switch());
        self.device.set_mirror(None);
        let to = self.image.path().display();
        let (code, why) = match ended {
            Ok(()) => return self.let_go(),
            Err(CopyError::Stopped) => return,
            Err(CopyError::View { at, why }) => (6624, format!("it cannot be read at {at}: {why}")),
            Err(CopyError::Image(error)) => (6622, format!("{to}: {error}")),
            Err(CopyError::NoRoom) => {
                (6622, format!("{to}: the rest of the target's disk is for its journals"))
            }
            Err(CopyError::Differs(extent)) => {
                (6623, format!("{to} does not give back what was written to it at {extent}"))
            }
        };
        end(&self.daemon, self.view, code, why);
    }

    /// An image on the disk of the journals leaves them what views leave them.
    fn limits(&self) -> Limits {
        let data = self.daemon.data.views();
        let own = stat(&data).ok().map(|stat| stat.st_dev);
        let here = own.is_some() && self.image.file_system() == own;
        let reserve = self.daemon.config.limits.view_reserve.bytes();
        Limits { quota: u64::MAX, reserve: here.then_some((data, reserve)) }
    }

    /// The image is whole, and no write can begin.
    fn switch(&self) -> Result<(), CopyError> {
        let mut open = self.daemon.views.lock();
        // Closed, or left to the next daemon.
        let found = open.views.get_mut(&self.view).ok_or(CopyError::Stopped)?;
        self.image.finish()?;
        let row = ViewRow {
            flatten: None,
            image: Some(self.image.path().to_owned()),
            ..found.row.clone()
        };
        // From here on the next daemon would serve it from the image.
        let recorded = self.daemon.catalogue.lock().put_view(&row);
        recorded.map_err(|e| CopyError::Image(std::io::Error::other(e.to_string())))?;
        found.row = row;
        drop(open);
        self.device.become_image(Arc::clone(&self.image));
        Ok(())
    }

    /// Nothing of the store is needed any more.
    fn let_go(&self) {
        drop_scratch(&scratch_dir(&self.daemon, self.view));
        let mut open = self.daemon.views.lock();
        let Some(found) = open.views.get_mut(&self.view) else { return };
        found.flatten = None;
        found.replica.release(self.view);
        let (shown, volume) = (found.shown(), found.replica.name());
        drop(open);
        let text = format!("{shown} is flattened and verified: {}", self.image.path().display());
        self.daemon.catalogue.note(0, Some(&volume), text);
    }
}
