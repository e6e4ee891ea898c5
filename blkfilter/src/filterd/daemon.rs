//! Starting and stopping, in order.

use std::sync::Arc;

use farshore_extent::{Problem, VolumeName};

use super::attached::Ground;
use super::config::Config;
use super::problem;
use super::service::Service;
use super::shutdown::Shutdown;
use super::state::StateDir;
use crate::control::server::{Serve, Server};
use crate::durable_fs;
use crate::filter::Host;
use crate::sys::process;

/// A running daemon. Dropping it is like killing it: nothing is marked clean.
#[derive(Debug)]
pub struct Daemon {
    // Goes first: nobody asks for anything any more.
    control: Server,
    service: Arc<Service>,
    host: Arc<Host>,
}

impl Daemon {
    /// Raises the epoch, attaches the volumes on record and listens.
    ///
    /// # Errors
    /// FS-2030 to FS-2034: the state directory or the control socket cannot be used. A volume that
    /// cannot be attached is no such error; the log tells.
    pub fn start(config: Config) -> Result<Self, Problem> {
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
        let ground = Ground { config: Arc::clone(&config), state, host: Arc::clone(&host) };
        let service = Arc::new(Service::start(ground, records));
        let serve = Arc::clone(&service) as Arc<dyn Serve>;
        let control = Server::bind(&config.control_socket, config.access.clone(), serve)
            .map_err(|e| problem::socket(&config.control_socket, &e))?;
        tracing::info!(%epoch, socket = %config.control_socket.display(), "filterd runs");
        Ok(Self { control, service, host })
    }

    /// Stops in order: clients finish, the agent gets a moment to release everything, what is
    /// durable at the target is marked clean. Returns the volumes that will be copied again.
    #[must_use]
    pub fn stop(mut self) -> Vec<VolumeName> {
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

/// Runs the daemon until it is asked to stop.
///
/// # Errors
/// As [`Daemon::start`].
pub fn run(config: Config, shutdown: &Shutdown) -> Result<(), Problem> {
    let daemon = Daemon::start(config)?;
    if let Err(error) = shutdown.wait(None) {
        tracing::error!(%error, "cannot wait for a signal, stopping");
    }
    tracing::info!("asked to stop");
    let again = daemon.stop();
    tracing::info!(to_be_copied_again = again.len(), "stopped");
    Ok(())
}

fn harden() {
    if let Err(error) = process::lock_memory() {
        tracing::info!(%error, "memory is not locked; under memory pressure writes may be slow");
    }
    if let Err(error) = process::become_io_flusher() {
        tracing::info!(%error, "not an I/O flusher; file systems on protected volumes should not \
            be mounted on this host under memory pressure");
    }
}
