//! What the agent asks of the freezer: one request, one `Result<Reply, Problem>`, framed as on
//! `filterd`'s control socket. Quiet belongs to the connection that asked for it.

use std::path::PathBuf;

use farshore_extent::{Problem, VolumeName};
use serde::{Deserialize, Serialize};

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// What can be made quiet on this host.
    Applications,
    /// Run the pre hooks and freeze. When that fails everything is undone, and the post hooks of
    /// what had begun have run, before [`Request::Finish`] is answered.
    Quiet(Quiet),
    /// The marker was cut: thaw. A problem when it was not quiet until now.
    Thaw,
    /// Answered when the post hooks have run.
    Finish,
}

/// For which point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quiet {
    /// Volumes of the point.
    pub volumes: Vec<VolumeName>,
    /// Name of the point; may be empty. Hooks get it.
    pub point: String,
    /// Files and folders that must stay writable: nothing is frozen that they lie on.
    pub needed: Vec<PathBuf>,
}

/// An application as the agent has to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplicationInfo {
    /// Its name.
    pub name: VolumeName,
    /// Volumes whose points it belongs to.
    pub volumes: Vec<VolumeName>,
    /// Milliseconds between points of the schedule; 0: only by hand.
    pub every_ms: u64,
    /// Longest time of a hook in milliseconds.
    pub hook_limit_ms: u64,
    /// Longest time of quiet in milliseconds.
    pub quiet_limit_ms: u64,
}

/// Answers, one for each request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// In the order of the file.
    Applications(Vec<ApplicationInfo>),
    /// It is quiet for at most so long from now, in milliseconds.
    Quiet {
        /// The limit.
        limit_ms: u64,
    },
    /// It was quiet until now, and is not any more.
    Thawed,
    /// Post hooks have run; each that failed has a problem.
    Finished(Vec<Problem>),
}
