//! Where every role keeps its files: system places, or one directory of the user's (`--root DIR`).

use std::path::{Path, PathBuf};

/// Longest path of a unix socket in Linux, in bytes, without the final zero.
pub const MAX_SOCKET_PATH: usize = 107;

/// The three roots of all files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// Configuration: `agent.toml`, `target.toml`, `filterd.toml`, `conf.d`.
    pub etc: PathBuf,
    /// Durable state: `filterd/`, `agent/`, `target/`.
    pub state: PathBuf,
    /// Sockets; gone after a reboot.
    pub run: PathBuf,
}

impl Paths {
    /// `/etc/farshore`, `/var/lib/farshore`, `/run/farshore`.
    #[must_use]
    pub fn system() -> Self {
        Self {
            etc: "/etc/farshore".into(),
            state: "/var/lib/farshore".into(),
            run: "/run/farshore".into(),
        }
    }

    /// `DIR/etc`, `DIR/lib`, `DIR/run`: everything as an ordinary user.
    #[must_use]
    pub fn under(root: &Path) -> Self {
        Self { etc: root.join("etc"), state: root.join("lib"), run: root.join("run") }
    }

    /// Control socket of `filterd`.
    #[must_use]
    pub fn filterd_socket(&self) -> PathBuf {
        self.run.join("filterd.sock")
    }

    /// Status socket of the agent.
    #[must_use]
    pub fn agent_socket(&self) -> PathBuf {
        self.run.join("agent.sock")
    }

    /// Socket of the freezer.
    #[must_use]
    pub fn freezer_socket(&self) -> PathBuf {
        self.run.join("freezer.sock")
    }

    /// Admin socket of the target daemon.
    #[must_use]
    pub fn target_socket(&self) -> PathBuf {
        self.run.join("target.sock")
    }
}
