//! The daemon: what its parts share, how it starts and how it ends.
//!
//! Owns the table of replicas and admits volumes to it. Everything that syncs or reads disks runs
//! on threads of its own or in blocking tasks, never on the runtime's.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use farshore_extent::{HostId, Lsn, Problem, VolumeId, VolumeName};
use farshore_protocol::message::{FromTarget, OpenVolume};
use farshore_protocol::paths::Paths;
use nix::fcntl::{Flock, FlockArg};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use crate::authority::Authority;
use crate::catalogue::{SharedCatalogue, SqliteCatalogue, VolumeRow};
use crate::clock::AgeClock;
use crate::config::{Config, DataDir};
use crate::replica::Replica;
use crate::session::Registry;
use crate::views::{self, Views};
use crate::worker::{self, Work, WorkerThread};
use crate::{admin, durable_fs, failover, init, listener, policy, problem, seed, upkeep};

/// How long sessions and clients of views get to end in good order.
const PATIENCE: Duration = Duration::from_secs(5);

/// What all parts share.
pub(crate) struct Daemon {
    pub(crate) config: Config,
    pub(crate) paths: Paths,
    pub(crate) data: DataDir,
    pub(crate) authority: Authority,
    pub(crate) catalogue: SharedCatalogue,
    pub(crate) sessions: Registry,
    pub(crate) views: Views,
    pub(crate) clock: Arc<AgeClock>,
    replicas: Mutex<Replicas>,
    /// Held while a failover is begun.
    pub(crate) failovers: Mutex<()>,
    stopping: watch::Sender<bool>,
    _lock: Flock<File>,
}

#[derive(Default)]
struct Replicas {
    by_id: BTreeMap<VolumeId, Arc<Replica>>,
    threads: Vec<WorkerThread>,
}

/// Runs the daemon until `shutdown` is done. Call it in a multi-threaded tokio runtime with I/O
/// and time. Returns after sessions, workers and views have ended.
///
/// # Errors
/// FS-6501 to FS-6506 when it cannot start.
pub async fn run(
    config: Config,
    paths: Paths,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Problem> {
    let names = init::certificate_names(&config);
    let starting = move || Daemon::start(config, paths);
    let daemon = tokio::task::spawn_blocking(starting).await.map_err(|_| problem::stopping())??;
    let started = async {
        let admin = admin::bind(&daemon)?;
        let listening = listener::bind(&daemon.config).await?;
        let acceptor = TlsAcceptor::from(daemon.authority.server_tls(&names)?);
        let address = listening.local_addr().map_err(|e| problem::listen("", &e))?;
        publish_address(&daemon.paths, &address.to_string())?;
        tracing::info!(%address, data = %daemon.data.path().display(), "target daemon is running");
        Ok((admin, listening, acceptor))
    };
    let outcome = match started.await {
        Ok((admin, listening, acceptor)) => {
            if let Err(problem) = failover::resume(&daemon) {
                tracing::error!(why = problem.why, "jobs do not go on: {problem}");
            }
            let admin = tokio::spawn(admin::serve(daemon.clone(), admin));
            let listening = tokio::spawn(listener::serve(daemon.clone(), listening, acceptor));
            let upkeep = tokio::spawn(upkeep::keep(daemon.clone()));
            shutdown.await;
            daemon.stopping.send_replace(true);
            let ended = async { (admin.await, listening.await, upkeep.await) };
            if tokio::time::timeout(PATIENCE, ended).await.is_err() {
                tracing::warn!("some sessions did not end in time");
            }
            Ok(())
        }
        Err(problem) => Err(problem),
    };
    daemon.stopping.send_replace(true);
    let ending = Arc::clone(&daemon);
    // A worker that panicked has said so already.
    let _ = tokio::task::spawn_blocking(move || {
        ending.views.end_all();
        ending.stop_workers();
    })
    .await;
    outcome
}

/// The address really listened on, for scripts that asked for any free port.
fn publish_address(paths: &Paths, address: &str) -> Result<(), Problem> {
    let file = paths.run.join("target.listen");
    durable_fs::create_private_dir(&paths.run)
        .and_then(|()| durable_fs::replace(&file, format!("{address}\n").as_bytes(), 0o644))
        .map_err(|e| problem::file("write", &file, &e))
}

/// Runs `work`, which may sync or wait for disks, outside of the runtime's threads.
pub(crate) async fn blocking<T: Send + 'static>(
    daemon: &Arc<Daemon>,
    work: impl FnOnce(&Daemon) -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let daemon = Arc::clone(daemon);
    let done = tokio::task::spawn_blocking(move || work(&daemon)).await;
    done.map_err(|_| problem::stopping())?
}

/// Writes to the event log from asynchronous code.
pub(crate) async fn note(
    daemon: &Arc<Daemon>,
    code: u16,
    volume: Option<VolumeName>,
    text: String,
) {
    let noted = blocking(daemon, move |d| {
        d.catalogue.note(code, volume.as_ref(), text);
        Ok(())
    });
    // Only fails while the runtime ends.
    let _ = noted.await;
}

impl Daemon {
    fn start(config: Config, paths: Paths) -> Result<Arc<Self>, Problem> {
        let data = config.data_dir(&paths);
        let authority = Authority::load(&data.ca())?;
        let lock = take_lock(&data)?;
        let catalogue = SqliteCatalogue::open(&data.catalogue())?;
        let catalogue = SharedCatalogue::new(catalogue);
        let at_start = catalogue.lock().age()?;
        let daemon = Arc::new(Self {
            clock: Arc::new(AgeClock::starting_at(at_start)),
            views: Views::default(),
            config,
            paths,
            data,
            authority,
            sessions: Registry::default(),
            replicas: Mutex::default(),
            failovers: Mutex::default(),
            stopping: watch::Sender::new(false),
            catalogue,
            _lock: lock,
        });
        let rows = daemon.catalogue.lock().volumes()?;
        for row in rows {
            daemon.add_replica(&mut daemon.lock(), row)?;
        }
        // Before anything can expire.
        views::prepare(&daemon)?;
        policy::warn(&daemon);
        Ok(daemon)
    }

    fn lock(&self) -> MutexGuard<'_, Replicas> {
        self.replicas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the daemon stops.
    pub(crate) async fn stopped(&self) {
        let mut stopping = self.stopping.subscribe();
        // The sender lives in self, so this ends only with the value.
        let _ = stopping.wait_for(|stop| *stop).await;
    }

    /// Whether it is to end.
    pub(crate) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Every replica, in the order of identities.
    pub(crate) fn replicas(&self) -> Vec<Arc<Replica>> {
        self.lock().by_id.values().cloned().collect()
    }

    /// The replica of a name.
    pub(crate) fn replica(&self, name: &VolumeName) -> Result<Arc<Replica>, Problem> {
        let found = self.replicas().into_iter().find(|r| r.name() == *name);
        found.ok_or_else(|| problem::no_volume(name))
    }

    /// Lets a host send a volume: it must be new with a free name, or the host's own.
    pub(crate) fn admit_volume(
        &self,
        host: HostId,
        open: &OpenVolume,
    ) -> Result<Arc<Replica>, Problem> {
        // Held over the catalogue's sync: volumes are admitted one at a time, rarely.
        let mut replicas = self.lock();
        let facts: Vec<_> = replicas.by_id.values().map(|r| r.facts().row).collect();
        if facts.iter().any(|row| row.name == open.name && row.volume != open.volume) {
            return Err(problem::name_taken(&open.name));
        }
        let known = replicas.by_id.get(&open.volume).cloned();
        let mut row = match &known {
            Some(replica) => replica.facts().row,
            None => VolumeRow {
                volume: open.volume,
                name: open.name.clone(),
                host,
                size: open.size,
                blocks: open.blocks,
                point_interval_ms: self.interval_of(open),
                unprotected: false,
                policy: String::new(),
                points_upto: Lsn::ZERO,
            },
        };
        if row.host != host {
            return Err(problem::other_hosts_volume(&open.name));
        }
        let of_host = facts.iter().filter(|row| row.host == host).count();
        let limit = self.config.limits.volumes_per_host;
        if known.is_none() && of_host >= limit {
            return Err(problem::too_many_volumes(limit));
        }
        row.name = open.name.clone();
        row.size = open.size;
        row.blocks = open.blocks;
        row.unprotected = false;
        self.catalogue.lock().put_volume(&row)?;
        match known {
            Some(replica) => {
                replica.update(|facts| facts.row = row);
                Ok(replica)
            }
            None => {
                self.catalogue.note(0, Some(&row.name), "a new replica was made");
                self.take_seed(&row);
                self.add_replica(&mut replicas, row)
            }
        }
    }

    /// A new replica begins with the seed that waits for it. Without one, or when it cannot be
    /// used, it begins empty.
    fn take_seed(&self, row: &VolumeRow) {
        let host = self.catalogue.lock().host(row.host);
        let Ok(Some(host)) = host else { return };
        let dir = self.data.volumes().join(row.volume.to_string());
        match seed::take(&self.data, (&host.name, &row.name), row.size, &dir) {
            Ok(None) => {}
            Ok(Some(bytes)) => {
                let text = format!("the replica begins with a seed of {bytes} bytes");
                self.catalogue.note(0, Some(&row.name), text);
            }
            Err(problem) => {
                self.catalogue.note(problem.code.0, Some(&row.name), problem.what.clone());
            }
        }
    }

    fn interval_of(&self, open: &OpenVolume) -> u64 {
        open.point_interval_ms.unwrap_or(self.config.point_interval.millis())
    }

    fn add_replica(
        &self,
        replicas: &mut Replicas,
        row: VolumeRow,
    ) -> Result<Arc<Replica>, Problem> {
        let dir = self.data.volumes().join(row.volume.to_string());
        let (queue, work) = tokio::sync::mpsc::channel(self.config.limits.queue_batches);
        let pair = self.catalogue.lock().failover(row.volume)?;
        let replica = Replica::new(row, queue);
        // Before any source can come.
        replica.update(|facts| facts.pair = pair);
        let thread = worker::spawn(
            dir,
            Arc::clone(&replica),
            work,
            self.catalogue.clone(),
            Arc::clone(&self.clock),
        )?;
        replicas.threads.push(thread);
        replicas.by_id.insert(replica.volume, Arc::clone(&replica));
        Ok(replica)
    }

    /// The source says that it no longer protects the volume.
    pub(crate) fn mark_unprotected(&self, replica: &Replica) -> Result<(), Problem> {
        self.change_row(replica, |row| row.unprotected = true)?;
        self.catalogue.note(0, Some(&replica.name()), "no longer protected on its source");
        Ok(())
    }

    /// Sets the interval of points, here and on the source.
    pub(crate) fn set_interval(&self, replica: &Replica, interval_ms: u64) -> Result<(), Problem> {
        self.change_row(replica, |row| row.point_interval_ms = interval_ms)?;
        let text = format!("points are cut every {interval_ms} ms from now on");
        self.catalogue.note(0, Some(&replica.name()), text);
        if let Some(session) = self.sessions.get(replica.facts().row.host) {
            session.outbox.send(FromTarget::Policy {
                volume: replica.volume,
                point_interval_ms: interval_ms,
            });
        }
        Ok(())
    }

    pub(crate) fn change_row(
        &self,
        replica: &Replica,
        change: impl FnOnce(&mut VolumeRow),
    ) -> Result<(), Problem> {
        // One change at a time, and none while volumes are admitted.
        let _one = self.lock();
        let mut row = replica.facts().row;
        change(&mut row);
        self.catalogue.lock().put_volume(&row)?;
        replica.update(|facts| facts.row = row);
        Ok(())
    }

    fn stop_workers(&self) {
        let replicas = self.replicas();
        for replica in replicas {
            replica.send_blocking(Work::Stop);
        }
        let threads = std::mem::take(&mut self.lock().threads);
        for thread in threads {
            thread.join();
        }
        if let Err(error) = self.catalogue.lock().set_age(self.clock.now()) {
            tracing::warn!(%error, "the clock of retention was not saved");
        }
    }
}

/// One daemon a data directory. The lock goes with the process.
fn take_lock(data: &DataDir) -> Result<Flock<File>, Problem> {
    let path = data.lock();
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|e| problem::file("open", &path, &e))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| problem::already_running(data.path()))
}
