//! What `filterd` can be told.

use std::path::PathBuf;
use std::time::Duration;

use farshore_extent::ChunkSize;

use super::window::Window;
use crate::control::server::Access;
use crate::core::{Limits, RegionMap};
use crate::sys::ring::Engine;

/// Settings of the daemon. [`Config::new`] has the defaults.
#[derive(Debug, Clone)]
pub struct Config {
    /// Durable state; made when it is missing. Must not lie on a protected volume.
    pub state: PathBuf,
    /// A file outside of the state that tells that there is one, so that it is missed when its
    /// file system is not mounted; none: it is not.
    pub marker: Option<PathBuf>,
    /// Sockets, with NBD servers in `nbd/` below, and `devices/` and `origins/` for udev.
    pub run: PathBuf,
    /// The control socket.
    pub control_socket: PathBuf,
    /// Who besides the daemon's user and root may use it.
    pub access: Access,
    /// Size in bytes of the pool of a volume that was protected without one.
    pub pool_bytes: u64,
    /// Unit of the copy loop.
    pub chunk: ChunkSize,
    /// Bytes of a region of the intent map: a power of two, not below the chunk.
    pub region: u64,
    /// Regions that may be set before old ones are cleared.
    pub max_regions: u64,
    /// Bounds of the capture core.
    pub limits: Limits,
    /// Copy rate of a volume that was not given one, in bytes a second; 0 is no limit.
    pub copy_rate: u64,
    /// When a copy may start of what the change log had no room for, if it is more than
    /// `resync_at_once` bytes.
    pub resync_window: Window,
    /// A copy of at most so many bytes never waits for the window.
    pub resync_at_once: u64,
    /// Queues of a block device, each with a thread; 0: as many as CPUs, at most 4.
    pub queues: u16,
    /// At a stop: how long NBD clients may take to finish what they have sent.
    pub client_grace: Duration,
    /// At a stop: how long to wait until the agent has released everything.
    pub release_grace: Duration,
    /// Keep all memory of the process in RAM and be an I/O flusher, as far as permitted.
    pub harden: bool,
    /// Which way backing I/O takes.
    pub engine: Engine,
}

impl Config {
    /// The defaults, for a state and a run directory.
    #[must_use]
    pub fn new(state: PathBuf, run: PathBuf) -> Self {
        let control_socket = run.join("filterd.sock");
        Self {
            state,
            marker: None,
            run,
            control_socket,
            access: Access::default(),
            pool_bytes: 256 << 20,
            chunk: ChunkSize::DEFAULT,
            region: RegionMap::DEFAULT_REGION,
            max_regions: 1024,
            limits: Limits::default(),
            copy_rate: 0,
            resync_window: Window::default(),
            resync_at_once: 64 << 30,
            queues: 0,
            client_grace: Duration::from_secs(5),
            release_grace: Duration::from_secs(5),
            harden: true,
            engine: Engine::Auto,
        }
    }
}
