//! The agent as a service: one lock, one status socket, one loop.

use std::fs::OpenOptions;
use std::future::Future;
use std::os::unix::fs::OpenOptionsExt;

use farshore_extent::Problem;
use farshore_protocol::admin::AgentStatus;
use farshore_protocol::paths::Paths;
use nix::fcntl::{Flock, FlockArg};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

use crate::config::Config;
use crate::driver::Driver;
use crate::event_log::EventLog;
use crate::identity::Identity;
use crate::limits::{CHANNEL, DRAIN_LOOK, DRAIN_TIMEOUT, STOP_TIMEOUT};
use crate::status::{self, Board};
use crate::{durable_fs, problem};

/// Runs the agent until `shutdown` is ready: ships every volume that `filterd` protects. A lost
/// target, `filterd` or network is waited for. Needs tokio's multi-thread runtime, no privileges.
///
/// At the end what filterd holds is still shipped, and acknowledged, for a few seconds; nothing is
/// lost in any case.
///
/// # Errors
/// Only at the start: FS-5201 and FS-5204 (not enrolled, identity unusable), FS-5205 (files),
/// FS-5206 (a second agent).
pub async fn run(
    config: Config,
    paths: Paths,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Problem> {
    let identity = Identity::load(&paths)?;
    identity.tls()?;
    let _lock = lock(&paths)?;
    let listener = status::listen(&paths)?;
    let target = config.target.clone().unwrap_or_else(|| identity.target.clone());
    let board = Board::new(AgentStatus {
        target,
        connected: false,
        problem: None,
        retry_in_ms: None,
        volumes: Vec::new(),
    });
    let file = paths.state.join("agent/events.json");
    let events = EventLog::open(file.clone());
    let events = events.map_err(|e| problem::file("start the thread for", &file, &e))?;
    let (sender, mut inputs) = mpsc::channel(CHANNEL);
    let shown = (board.clone(), events.clone());
    let serve = tokio::spawn(status::serve(listener, shown, sender.clone()));
    let socket = paths.agent_socket();
    let mut driver = Driver::new((config, paths, identity), sender, (board, events))?;
    tracing::info!(target = driver.address(), "the agent is running");
    tokio::pin!(shutdown);
    let mut hangup = signal(SignalKind::hangup()).ok();
    driver.tick().await;
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(input) = inputs.recv() => driver.take(input).await,
            () = hung_up(&mut hangup) => driver.reload().await,
            () = sleep(driver.pause()) => {}
        }
        // Cheap, and a loaded channel must not keep the clock from being looked at.
        driver.tick().await;
    }
    // At a shutdown the last unmount has just written, and nothing comes after it: with that at the
    // target the volume is clean.
    let (limit, mut calm) = (Instant::now() + DRAIN_TIMEOUT, driver.calm());
    while !driver.drain(&mut calm).await && Instant::now() < limit {
        tokio::select! {
            Some(input) = inputs.recv() => driver.take(input).await,
            () = sleep(DRAIN_LOOK) => {}
        }
    }
    driver.stop().await;
    let limit = Instant::now() + STOP_TIMEOUT;
    while !driver.is_drained() {
        tokio::select! {
            Some(input) = inputs.recv() => driver.take(input).await,
            () = sleep_until(limit) => break,
        }
    }
    driver.disconnect();
    serve.abort();
    // Threads end when the driver is dropped and a send of theirs fails.
    inputs.close();
    drop(driver);
    // Best effort: a left-over socket is removed at the next start.
    let _ = std::fs::remove_file(socket);
    tracing::info!("the agent has stopped");
    Ok(())
}

/// Waits for SIGHUP; forever when the system gives no notice of it.
async fn hung_up(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// One agent for a state directory.
fn lock(paths: &Paths) -> Result<Flock<std::fs::File>, Problem> {
    let dir = paths.state.join("agent");
    let file = dir.join("lock");
    let open = || {
        durable_fs::create_private_dir(&dir)?;
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&file)
    };
    let opened = open().map_err(|e| problem::file("open", &file, &e))?;
    Flock::lock(opened, FlockArg::LockExclusiveNonblock)
        .map_err(|_| problem::already_running(&file))
}
