//! Starting and stopping, in order.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use farshore_extent::{Problem, VolumeName};

use super::attached::Ground;
use super::config::Config;
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
use crate::sys::wake::{Event, wait_readable};

/// How long a start waits for claims that somebody holds. The kernel finishes the last I/O of a
/// killed daemon, and its claim ends with that.
const CLAIM_WAIT: Duration = Duration::from_secs(10);

/// Between two looks at a claim.
const CLAIM_LOOK: Duration = Duration::from_millis(20);

/// Between two attempts to attach a volume whose backing was not there.
const ATTACH_AGAIN: Duration = Duration::from_secs(2);

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
    /// FS-2030 to FS-2034: the state directory or the control socket cannot be used. A volume that
    /// cannot be attached is no such error; the log tells.
    pub fn start(config: Config) -> Result<Self, Problem> {
        // First of all: threads that exist already would stay outside.
        let secluded = config.harden && namespace::enter();
        if config.harden {
            harden();
        }
        durable_fs::create_directory(&config.run, 0o755)
            .map_err(|e| problem::socket(&config.run, &e))?;
        let state = StateDir::open(&config.state)?;
        let (records, problems) = state.volumes()?;
        for problem in problems {
            tracing::error!(%problem, why = problem.why, "a volume is not served");
        }
        let epoch = state.raise_epoch(&records)?;
        let host = Arc::new(Host::new(epoch, config.limits.clone()));
        let (config, state) = (Arc::new(config), Arc::new(state));
        let own = OwnDevices::default();
        records.iter().filter_map(|r| r.front.kernel_name()).for_each(|name| own.add(name));
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
        let service = Arc::new(Service::new(ground, records));
        service.sweep();
        let attaching = Attaching::start(&service).map_err(failed)?;
        let serve = Arc::clone(&service) as Arc<dyn Serve>;
        let control = Server::bind(&config.control_socket, config.access.clone(), serve)
            .map_err(|e| problem::socket(&config.control_socket, &e))?;
        tracing::info!(%epoch, socket = %config.control_socket.display(), "filterd runs");
        Ok(Self { control, attaching, service, host, _guard: guard })
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

/// Attaches what is on record: at once, and again until it is there; also what ends by itself later.
#[derive(Debug)]
struct Attaching {
    stop: Arc<Event>,
    thread: Option<JoinHandle<()>>,
}

impl Attaching {
    /// Returns when every volume is attached or is missing for another reason than a claim that
    /// may end soon.
    fn start(service: &Arc<Service>) -> io::Result<Self> {
        let stop = Arc::new(Event::new()?);
        let until = Instant::now() + CLAIM_WAIT;
        let mut absent = service.attach_missing();
        while absent.claimed > 0 && Instant::now() < until {
            wait_readable(&[(*stop).as_fd()], Some(CLAIM_LOOK))?;
            absent = service.attach_missing();
        }
        let (service, stopped) = (Arc::clone(service), Arc::clone(&stop));
        let again = move || {
            while wait_readable(&[(*stopped).as_fd()], Some(ATTACH_AGAIN))
                .is_ok_and(|stopped| stopped == [false])
            {
                if service.heal() {
                    service.attach_missing();
                }
            }
        };
        Ok(Self { stop, thread: Some(Builder::new().name("attach".into()).spawn(again)?) })
    }

    fn stop(&mut self) {
        self.stop.set();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic there was reported when it happened
        }
    }
}

impl Drop for Attaching {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Where a running daemon is, for the service manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It answers, and every volume that can be is attached.
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
