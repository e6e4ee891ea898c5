//! What the freezer can be told.

use std::path::PathBuf;
use std::time::Duration;

use farshore_extent::{Problem, VolumeName};

use super::message::ApplicationInfo;
use super::problem;
use crate::control::server::Access;

/// Longest time limit of a hook.
const MAX_HOOK: Duration = Duration::from_secs(300);
/// Longest time for which anything stays frozen.
const MAX_QUIET: Duration = Duration::from_secs(60);
/// Shortest time between points of the schedule.
const MIN_EVERY: Duration = Duration::from_secs(10);
/// Longest time between points of the schedule.
const MAX_EVERY: Duration = Duration::from_secs(7 * 86_400);
/// Applications of a host.
const MAX_APPLICATIONS: usize = 64;
/// Mounts of an application.
const MAX_MOUNTS: usize = 64;

/// As whom a hook runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunAs {
    /// Name of the user.
    pub name: String,
    /// Number of the user.
    pub uid: u32,
    /// Number of its group.
    pub gid: u32,
    /// Its home.
    pub home: PathBuf,
}

/// What is made quiet for a point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Application {
    /// Name, in messages and for hooks.
    pub name: VolumeName,
    /// Volumes whose points it belongs to.
    pub volumes: Vec<VolumeName>,
    /// Time between points; zero: only by hand.
    pub every: Duration,
    /// Program and arguments before the freeze; empty: none.
    pub pre: Vec<String>,
    /// Program and arguments after the thaw; empty: none.
    pub post: Vec<String>,
    /// As whom both run; none: as the freezer.
    pub user: Option<RunAs>,
    /// Longest time that a hook may take.
    pub hook_limit: Duration,
    /// Mount points that are frozen.
    pub freeze: Vec<PathBuf>,
    /// Longest time from the last pre hook to the thaw.
    pub quiet_limit: Duration,
}

/// Settings of the freezer.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// In the order in which their pre hooks run.
    pub applications: Vec<Application>,
    /// Who may ask, besides root and the freezer's own user.
    pub access: Access,
}

impl Config {
    /// Checks what the file `name` says.
    ///
    /// # Errors
    /// FS-3409 for what cannot be used.
    pub fn check(&self, name: &str) -> Result<(), Problem> {
        let bad = |why: String| Err(problem::setting(name, why));
        if self.applications.len() > MAX_APPLICATIONS {
            return bad(format!("there are more than {MAX_APPLICATIONS} applications"));
        }
        for (index, app) in self.applications.iter().enumerate() {
            let who = &app.name;
            if self.applications[..index].iter().any(|other| other.name == *who) {
                return bad(format!("there are two applications {who}"));
            }
            if app.volumes.is_empty() {
                return bad(format!("{who} names no volumes"));
            }
            if app.pre.is_empty() && app.post.is_empty() && app.freeze.is_empty() {
                return bad(format!("{who} has neither hooks nor mounts to freeze"));
            }
            for hook in [&app.pre, &app.post] {
                if hook.first().is_some_and(|program| !program.starts_with('/')) {
                    return bad(format!("{who}: a hook is a program with its whole path"));
                }
            }
            if app.freeze.len() > MAX_MOUNTS || app.freeze.iter().any(|at| !at.is_absolute()) {
                return bad(format!("{who}: freeze takes up to {MAX_MOUNTS} mount points"));
            }
            if app.hook_limit.is_zero() || app.hook_limit > MAX_HOOK {
                return bad(format!("{who}: hook_limit is more than 0 and at most {MAX_HOOK:?}"));
            }
            if app.quiet_limit.is_zero() || app.quiet_limit > MAX_QUIET {
                return bad(format!("{who}: quiet_limit is more than 0 and at most {MAX_QUIET:?}"));
            }
            if !app.every.is_zero() && !(MIN_EVERY..=MAX_EVERY).contains(&app.every) {
                return bad(format!("{who}: every is 0, or 10s to 7d"));
            }
        }
        Ok(())
    }

    /// Applications that belong to any of the volumes, and the volumes without any.
    pub(super) fn covering(&self, volumes: &[VolumeName]) -> (Vec<&Application>, Vec<VolumeName>) {
        let has = |app: &&Application| app.volumes.iter().any(|v| volumes.contains(v));
        let found: Vec<_> = self.applications.iter().filter(has).collect();
        let covered = |v: &&VolumeName| found.iter().any(|app| app.volumes.contains(v));
        let bare = volumes.iter().filter(|v| !covered(v)).cloned().collect();
        (found, bare)
    }

    /// What the agent is told.
    pub(super) fn infos(&self) -> Vec<ApplicationInfo> {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let info = |app: &Application| ApplicationInfo {
            name: app.name.clone(),
            volumes: app.volumes.clone(),
            every_ms: millis(app.every),
            hook_limit_ms: millis(app.hook_limit),
            quiet_limit_ms: millis(app.quiet_limit),
        };
        self.applications.iter().map(info).collect()
    }
}
