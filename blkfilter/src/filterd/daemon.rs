//! Starting and stopping, in order.

use std::io;
use std::sync::Arc;
use std::thread::Builder;
use std::time::{Duration, Instant};

use farshore_extent::{Problem, VolumeName};

use super::attached::Ground;
use super::attaching::Attaching;
use super::config::Config;
use super::marker;
use super::names::Names;
use super::namespace::{self, Guard, OwnDevices};
use super::problem;
use super::service::Service;
use super::shutdown::Shutdown;
use super::state::StateDir;
use crate::control::server::{Serve, Server};
use crate::durable_fs;
use crate::filter::Host;
use crate::preflight::HostRoots;
use crate::sys::process;

/// How long a start goes on without listening, for volumes that are attached soon: whoever asks
/// finds them all.
const UNHEARD: Duration = Duration::from_secs(2);

/// How long the service manager waits for volumes on record. What takes longer comes later.
const FIRST_PASS: Duration = Duration::from_secs(60);

/// Between two looks whether the end is wanted before all volumes are attached.
const LOOK: Duration = Duration::from_millis(100);

/// A running daemon. Dropping it is like killing it: nothing is marked clean.
pub struct Daemon {
    // Goes first: nobody asks for anything any more.
    control: Server,
    attaching: Attaching,
    service: Arc<Service>,
    host: Arc<Host>,
    _guard: Option<Guard>,
}

impl Daemon {
    /// Raises the epoch, attaches the volumes on record and listens.
    ///
    /// # Errors
    /// FS-2030 to FS-2034 and FS-2039: the state directory or the control socket cannot be used. A volume that
    /// cannot be attached is no such error; the log tells.
    pub fn start(config: Config) -> Result<Self, Problem> {
        // First of all: threads that exist already would stay outside.
        let secluded = config.harden && namespace::enter();
        if config.harden {
            harden();
        }
        durable_fs::create_directory(&config.run, 0o755)
            .map_err(|e| problem::socket(&config.run, &e))?;
        if let Some(marker) = &config.marker {
            marker::check(marker, &config.state)?;
        }
        let state = StateDir::open(&config.state, &config.run)?;
        let (records, problems) = state.volumes()?;
        for problem in problems {
            tracing::error!(%problem, why = problem.why, "a volume is not served");
        }
        let epoch = state.raise_epoch(&records)?;
        let host = Arc::new(Host::new(epoch, config.limits.clone()));
        let (config, state) = (Arc::new(config), Arc::new(state));
        let own = OwnDevices::default();
        for name in records.iter().filter_map(|r| r.front.kernel_name()) {
            own.add(name);
        }
        let failed = |e: io::Error| problem::resources("a thread", e);
        let guard = secluded.then(|| Guard::start(own.clone())).transpose().map_err(failed)?;
        let ground = Ground {
            names: Names::new(&config.run),
            config: Arc::clone(&config),
            state,
            host: Arc::clone(&host),
            own,
            roots: HostRoots::default(),
            lingering: Arc::default(),
        };
        if config.limits.throttle_ms > 0 {
            let host = Arc::clone(&host);
            Builder::new()
                .name("throttle".into())
                .spawn(move || host.keep_time())
                .map_err(failed)?;
        }
        let service = Arc::new(Service::new(ground, records).map_err(failed)?);
        service.keep_marker();
        let attaching = Attaching::start(&service).map_err(failed)?;
        let sweeper = Arc::clone(&service);
        Builder::new().name("sweep".into()).spawn(move || sweeper.sweep()).map_err(failed)?;
        service.wait_settled(UNHEARD);
        let serve = Arc::clone(&service) as Arc<dyn Serve>;
        let control = Server::bind(&config.control_socket, config.access.clone(), serve)
            .map_err(|e| problem::socket(&config.control_socket, &e))?;
        tracing::info!(%epoch, socket = %config.control_socket.display(), "filterd runs");
        Ok(Self { control, attaching, service, host, _guard: guard })
    }

    /// Whether every volume on record was tried once; waits for that for at most `limit`.
    #[must_use]
    pub fn wait_settled(&self, limit: Duration) -> bool {
        self.service.wait_settled(limit)
    }

    /// Stops in order: clients finish, the agent gets a moment to release everything, what is
    /// durable at the target is marked clean. Returns the volumes that will be copied again.
    #[must_use]
    pub fn stop(mut self) -> Vec<VolumeName> {
        self.attaching.stop();
        self.service.quiesce();
        self.host.stop_waits();
        self.control.stop();
        self.service.finish()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.host.stop_waits();
    }
}

/// Where a running daemon is, for the service manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It answers, and every volume that can be soon is attached.
    Ready,
    /// It was asked to stop.
    Stopping,
}

/// Runs the daemon until it is asked to stop.
///
/// # Errors
/// As [`Daemon::start`].
pub fn run(config: Config, shutdown: &Shutdown, tell: impl Fn(Phase)) -> Result<(), Problem> {
    let daemon = Daemon::start(config)?;
    let until = Instant::now() + FIRST_PASS;
    let asked = || shutdown.wait(Some(Duration::ZERO)).unwrap_or(true);
    while !daemon.wait_settled(LOOK) && Instant::now() < until && !asked() {}
    tell(Phase::Ready);
    if let Err(error) = shutdown.wait(None) {
        tracing::error!(%error, "cannot wait for a signal, stopping");
    }
    tracing::info!("asked to stop");
    tell(Phase::Stopping);
    let again = daemon.stop();
    tracing::info!(to_be_copied_again = again.len(), "stopped");
    Ok(())
}

fn harden() {
    // Who kills it stops every disk that it serves.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::debug!(%error, "the OOM killer may choose this process");
    }
    if let Err(error) = process::lock_memory() {
        tracing::info!(%error, "memory is not locked; under memory pressure writes may be slow");
    }
    if let Err(error) = process::become_io_flusher() {
        tracing::info!(%error, "not an I/O flusher; file systems on protected volumes should not \
            be mounted on this host under memory pressure");
    }
}
