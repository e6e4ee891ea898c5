//! The life of one device: made or taken over, served, and left or removed.

use std::fs::{File, OpenOptions};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use farshore_extent::VolumeSize;
use nix::errno::Errno;

use super::driver::{self, ANY, Order};
use super::error::UblkError;
use super::existing::{Way, way};
use super::features::{Features, Unavailable, features};
use super::limits::{DEPTH, MAX_IO, MAX_IO_BUFFERED, QUEUES, SECTOR, params, size_in_sectors};
use super::worker::{Failures, Workers};
use crate::device::Device;
use crate::frontend::claim::Claim;
use crate::sys::isolate;
use crate::sys::ublk::uapi::{Control, DevInfo, MAX_DEPTH, Params, attribute, feature, state};

/// Between two looks at a device that another server is still letting go of.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// How long the threads of a server that is dropped have to finish.
const DROP_GRACE: Duration = Duration::from_secs(5);

/// How long a start waits for a sysfs file of the queue.
const QUICK: Duration = Duration::from_secs(2);

/// What the block layer is told about requests that take longer, in milliseconds. With a live
/// server nothing happens then. Before Linux 6.15 it is also how soon the driver notices the death
/// of a server that had every tag of a queue in its hands; the default would be 30 s.
const IO_TIMEOUT_MS: &str = "1000";

/// How a device is made and kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Number of the device, for a stable `/dev/ublkbN`; none: any free one.
    pub number: Option<u32>,
    /// Kept by the driver with the device: how we know our own. Never zero.
    pub owner: u64,
    /// Queues, each with a thread; zero: as many as CPUs, at most 4.
    pub queues: u16,
    /// Requests a queue has open at a time; zero: 64.
    pub depth: u16,
    /// How long the driver may take for one command.
    pub limit: Duration,
    /// How long a dying server may still hold the device before [`Server::start`] gives up. A
    /// killed server with every tag busy holds it until the driver notices: up to 30 s before
    /// Linux 6.15.
    pub patience: Duration,
    /// Look for partitions. Linux before 7.0 always does.
    pub partitions: bool,
    /// Let the driver copy payloads through buffers of ours even where it need not.
    pub copy: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            number: None,
            owner: 0,
            queues: 0,
            depth: 0,
            limit: Duration::from_secs(10),
            patience: Duration::from_secs(60),
            partitions: true,
            copy: false,
        }
    }
}

/// A served device. Dropping it leaves the device to the next server, as [`Self::leave`] does.
#[derive(Debug)]
pub struct Server {
    number: u32,
    recovered: bool,
    features: Features,
    limit: Duration,
    failures: Failures,
    /// None: left or removed.
    workers: Mutex<Option<Workers>>,
}

impl Server {
    /// Makes the device, or takes it over when `number` is ours and its server is gone.
    ///
    /// # Errors
    /// [`UblkError`]. A device that was to be made is gone then; one that was to be taken over
    /// stays as it was, and its I/O waits for the next try.
    pub fn start(device: Arc<dyn Device>, config: Config) -> Result<Self, UblkError> {
        let features = features()?;
        let deadline = Instant::now() + config.patience;
        let start = Start { device, config, features, deadline };
        loop {
            let number = start.config.number;
            let found = match number {
                None => None,
                Some(number) => driver::info(number, start.config.limit)?,
            };
            match way(found.as_ref(), start.config.owner) {
                Way::Add => {
                    if let Some(server) = start.make()? {
                        return Ok(server);
                    }
                }
                Way::Replace => {
                    driver::order(Control::DelDev, number.unwrap_or(ANY), 0, start.config.limit)?;
                    continue;
                }
                Way::Recover | Way::Wait => {
                    let found = found.unwrap_or_default();
                    return start.take_over(&found);
                }
                Way::Refuse => {
                    return Err(UblkError::NotOurs { number: number.unwrap_or(ANY) });
                }
            }
            // The number of a device just deleted is freed when the last program closes it.
            start.pause(UblkError::Served { number: number.unwrap_or(ANY) })?;
        }
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Its node.
    #[must_use]
    pub fn block_device(&self) -> PathBuf {
        node(self.number)
    }

    /// Whether it was taken over from a server before.
    #[must_use]
    pub fn recovered(&self) -> bool {
        self.recovered
    }

    /// Whether [`Self::resize`] is possible on this kernel.
    #[must_use]
    pub fn can_resize(&self) -> bool {
        self.features.update_size()
    }

    /// Changes the size while the device is in use. What it serves must have that size already.
    ///
    /// # Errors
    /// [`UblkError::CannotResize`] where the driver cannot; [`UblkError::Unfit`] when the device
    /// is not in service.
    pub fn resize(&self, size: VolumeSize) -> Result<(), UblkError> {
        if !self.features.update_size() {
            return Err(UblkError::CannotResize);
        }
        let found = driver::info(self.number, self.limit)?;
        // Some kernels follow a null pointer when there is no disk.
        if found.is_none_or(|info| info.state == state::DEAD) {
            let why = "it is not in service".into();
            return Err(UblkError::Unfit { number: self.number, why });
        }
        driver::order(Control::UpdateSize, self.number, size_in_sectors(size), self.limit)
    }

    /// Why a queue thread has ended by itself, not asked by [`Self::leave`] or [`Self::remove`];
    /// none while all are well. The requests of its queue wait for the next server.
    #[must_use]
    pub fn failed(&self) -> Option<String> {
        self.wait_failed(Duration::ZERO)
    }

    /// The same, after waiting for it for at most `limit`.
    #[must_use]
    pub fn wait_failed(&self, limit: Duration) -> Option<String> {
        self.failures.wait(limit)
    }

    /// Ends the queue threads and keeps the device: its I/O waits for the next server. True: all
    /// have ended within `grace` and nothing is in flight.
    #[must_use]
    pub fn leave(&self, grace: Duration) -> bool {
        let Some(workers) = self.lock().take() else { return true };
        workers.tell_to_leave();
        workers.join(grace).is_ok()
    }

    /// Takes the device away. Whoever still has it open gets I/O errors from then on; where the
    /// driver can refuse that, it does ([`UblkError::InUse`]).
    ///
    /// # Errors
    /// After [`UblkError::InUse`] the device is served as before. After any other the device may be
    /// gone or not; call again, or [`remove_stale`] later.
    pub fn remove(&self, grace: Duration) -> Result<(), UblkError> {
        self.end(grace, None)
    }

    /// The same, unless somebody has mounted the device or claimed it otherwise, whatever the
    /// driver can.
    ///
    /// # Errors
    /// As [`Self::remove`].
    pub fn remove_unused(&self, grace: Duration) -> Result<(), UblkError> {
        // A driver that refuses by itself would count us among the users.
        let claim = if self.features.safe_stop() { None } else { claim(self.number)? };
        self.end(grace, claim)
    }

    fn end(&self, grace: Duration, claim: Option<Claim>) -> Result<(), UblkError> {
        let mut held = self.lock();
        if let Some(workers) = held.as_ref() {
            workers.expect_removal(true);
            let command =
                if self.features.safe_stop() { Control::TryStopDev } else { Control::StopDev };
            match driver::order(command, self.number, 0, grace) {
                // Another program deleted it, or is about to.
                Ok(()) | Err(UblkError::Refused { errno: Errno::ENODEV, .. }) => {}
                Err(error) => {
                    workers.expect_removal(false);
                    return Err(match error {
                        UblkError::Refused { errno: Errno::EBUSY, .. } => {
                            UblkError::InUse { number: self.number }
                        }
                        error => error,
                    });
                }
            }
        }
        if let Some(workers) = held.take() {
            // The driver has ended every tag. Its deletion waits for the threads' files.
            if let Err(workers) = workers.join(grace) {
                *held = Some(workers);
                let why = format!("a request did not end within {grace:?}");
                return Err(UblkError::Queue { number: self.number, why });
            }
        }
        // The driver's number is free only when nobody has the device open.
        claim.into_iter().for_each(Claim::let_go);
        delete(self.number, grace)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Workers>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.leave(DROP_GRACE) {
            tracing::error!(number = self.number, "ublk: requests are still in flight");
        }
    }
}

/// Deletes a device. One that is gone already counts.
fn delete(number: u32, limit: Duration) -> Result<(), UblkError> {
    match driver::order(Control::DelDev, number, 0, limit) {
        Err(UblkError::Refused { errno: Errno::ENODEV, .. }) => Ok(()),
        // Gone, but its number is not free while somebody has it open.
        Err(UblkError::Late { .. }) => Err(UblkError::InUse { number }),
        other => other,
    }
}

/// Removes device `number` when it is ours and nobody serves it: I/O that waits fails. False:
/// there is no such device.
///
/// # Errors
/// [`UblkError::NotOurs`], [`UblkError::Served`], or of the driver.
pub fn remove_stale(number: u32, owner: u64, limit: Duration) -> Result<bool, UblkError> {
    stop_left(number, owner, limit, || Ok(None))
}

/// The same, unless somebody uses it: then it stays.
///
/// # Errors
/// [`UblkError::InUse`], and as [`remove_stale`].
pub fn remove_stale_unused(number: u32, owner: u64, limit: Duration) -> Result<bool, UblkError> {
    stop_left(number, owner, limit, || claim(number))
}

/// From now on nobody can mount the device.
fn claim(number: u32) -> Result<Option<Claim>, UblkError> {
    Claim::take(&node(number)).map_err(|_| UblkError::InUse { number })
}

fn node(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{number}"))
}

fn stop_left(
    number: u32,
    owner: u64,
    limit: Duration,
    claim: impl Fn() -> Result<Option<Claim>, UblkError>,
) -> Result<bool, UblkError> {
    let deadline = Instant::now() + limit;
    loop {
        let found = driver::info(number, limit)?;
        match way(found.as_ref(), owner) {
            Way::Add => return Ok(false),
            Way::Refuse => return Err(UblkError::NotOurs { number }),
            Way::Replace => return delete(number, limit).map(|()| true),
            Way::Recover => {
                let claim = claim()?;
                driver::order(Control::StopDev, number, 0, limit)?;
                claim.into_iter().for_each(Claim::let_go);
                return delete(number, limit).map(|()| true);
            }
            Way::Wait if Instant::now() >= deadline => return Err(UblkError::Served { number }),
            Way::Wait => pause(),
        }
    }
}

/// The pause is the point: the driver has no event for what is waited for.
#[allow(clippy::disallowed_methods)]
fn pause() {
    thread::sleep(LOOK_AGAIN);
}

/// A start on its way.
struct Start {
    device: Arc<dyn Device>,
    config: Config,
    features: Features,
    deadline: Instant,
}

impl Start {
    /// Waits a moment; `late` when there has been enough of that.
    fn pause(&self, late: UblkError) -> Result<(), UblkError> {
        if Instant::now() >= self.deadline {
            return Err(late);
        }
        pause();
        Ok(())
    }

    fn server(&self, number: u32, recovered: bool, workers: Workers) -> Server {
        notice_a_crash_soon(number);
        Server {
            number,
            recovered,
            features: self.features,
            limit: self.config.limit,
            failures: workers.failures(),
            workers: Mutex::new(Some(workers)),
        }
    }

    /// Makes a new device. None: the number is not free.
    fn make(&self) -> Result<Option<Server>, UblkError> {
        let config = &self.config;
        let copy = config.copy || !self.features.user_copy();
        let max_io = if copy { MAX_IO_BUFFERED } else { MAX_IO };
        let params = params(&self.device.info(), max_io)?;
        let wanted = self.wanted(copy, max_io);
        let made = match driver::add(&wanted, config.limit) {
            Ok(made) => made,
            Err(UblkError::Refused { errno: Errno::EEXIST, .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let number = made.device;
        let started = Features::of(made.flags)
            .map_err(UblkError::from)
            .and_then(|_| driver::set_params(number, &params, config.limit))
            .and_then(|()| self.workers(&made))
            .and_then(|workers| self.go(workers, number, Control::StartDev));
        match started {
            Ok(workers) => Ok(Some(self.server(number, false, workers))),
            Err(error) => {
                match delete(number, config.limit) {
                    // Whoever waits for the end of the start removes it then.
                    Ok(()) | Err(UblkError::Behind { .. }) => {}
                    Err(left) => {
                        tracing::error!(number, error = %left, "ublk: a device is left behind");
                    }
                }
                Err(error)
            }
        }
    }

    fn wanted(&self, copy: bool, max_io: usize) -> DevInfo {
        let config = &self.config;
        let cpus = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let default = u16::try_from(cpus).unwrap_or(QUEUES).min(QUEUES);
        let mut flags =
            feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE | feature::CMD_IOCTL_ENCODE;
        if !copy {
            flags |= feature::USER_COPY;
        }
        if !config.partitions && self.features.no_partition_scan() {
            flags |= feature::NO_AUTO_PART_SCAN;
        }
        DevInfo {
            queues: if config.queues == 0 { default } else { config.queues },
            depth: if config.depth == 0 { DEPTH } else { config.depth.min(MAX_DEPTH) },
            max_io_bytes: u32::try_from(max_io).unwrap_or(u32::MAX),
            device: config.number.unwrap_or(ANY),
            server_pid: -1,
            flags,
            owner: config.owner,
            ..DevInfo::default()
        }
    }

    fn workers(&self, info: &DevInfo) -> Result<Workers, UblkError> {
        let limit = self.config.limit;
        let cpus = |queue| driver::affinity(info.device, queue, limit).unwrap_or_default();
        Workers::prepare(&self.device, info, cpus, limit)
    }

    /// Lets the threads fetch, and the device begin.
    fn go(&self, workers: Workers, number: u32, begin: Control) -> Result<Workers, UblkError> {
        let limit = self.config.limit;
        let file = open(number, self.deadline)?;
        workers.fetch(&Arc::new(file), limit)?;
        // Not on a queue's thread: the search for partitions reads before this ends.
        let order = Order::begin(begin, number, u64::from(std::process::id()))?;
        let deadline = Instant::now() + limit;
        loop {
            if let Some(done) = order.wait(LOOK_AGAIN) {
                return done.map(|()| workers);
            }
            let failure = workers.failures().wait(Duration::ZERO);
            if failure.is_some() || Instant::now() >= deadline {
                let late = order.give_up(limit);
                let made = (begin == Control::StartDev).then_some(number);
                abandon(order, workers, made, limit);
                return Err(failure.map_or(late, |why| UblkError::Queue { number, why }));
            }
        }
    }

    /// Takes over a device of ours whose server is dead or dying.
    fn take_over(&self, found: &DevInfo) -> Result<Server, UblkError> {
        let (number, limit) = (found.device, self.config.limit);
        let params = driver::params(number, limit)?;
        self.check(found, &params)?;
        // Everything is ready before the device is touched: a crash between the beginning and the
        // end of a recovery is what Linux before 6.15 handles worst.
        let workers = self.workers(found)?;
        self.begin_recovery(number)?;
        let workers = self.go(workers, number, Control::EndUserRecovery)?;
        let server = self.server(number, true, workers);
        let size = self.device.info().size;
        if size_in_sectors(size) > params.sectors
            && let Err(error) = server.resize(size)
        {
            tracing::warn!(number, %error, "ublk: the device keeps its old size");
        }
        Ok(server)
    }

    fn begin_recovery(&self, number: u32) -> Result<(), UblkError> {
        let limit = self.config.limit;
        loop {
            match driver::order(Control::StartUserRecovery, number, 0, limit) {
                // It has its character device open, or its death has not been dealt with.
                Err(UblkError::Refused { errno: Errno::EBUSY, .. }) => {}
                Err(UblkError::Refused { errno: Errno::EINVAL, .. }) => {
                    // No queue was ever fetched: a recovery was begun and its server died at once.
                    // It still counts as begun.
                    let state = driver::info(number, limit)?.map(|info| info.state);
                    if state == Some(state::QUIESCED) {
                        return Ok(());
                    }
                }
                other => return other,
            }
            self.pause(UblkError::Served { number })?;
        }
    }

    /// Whether an existing device may show what we serve.
    fn check(&self, found: &DevInfo, params: &Params) -> Result<(), UblkError> {
        let info = self.device.info();
        let why = if Features::of(found.flags).is_err() {
            "it was made without recovery"
        } else if params.sectors > size_in_sectors(info.size) {
            "it is larger than the volume"
        } else if u64::from(info.blocks.logical()) != 1 << params.logical_shift {
            "its blocks have another size than those of the volume"
        } else if info.volatile_cache && params.attributes & attribute::VOLATILE_CACHE == 0 {
            "it sends no flushes, but the volume's disk has a volatile cache"
        } else if u64::from(params.max_sectors) * SECTOR > MAX_IO as u64 {
            "its requests are too long"
        } else {
            return Ok(());
        };
        Err(UblkError::Unfit { number: found.device, why: why.into() })
    }
}

/// Sets the time limit of requests. Since Linux 6.11 every write to a queue's file waits for all
/// requests in flight, and a backing device that hangs never ends them.
fn notice_a_crash_soon(number: u32) {
    let path = format!("/sys/block/ublkb{number}/queue/io_timeout");
    let file = path.clone();
    if let Err(error) = isolate::run(&[], QUICK, move || std::fs::write(file, IO_TIMEOUT_MS)) {
        tracing::debug!(path, %error, "ublk: a crash may be noticed late");
    }
}

/// Opens the character device.
fn open(number: u32, deadline: Instant) -> Result<File, UblkError> {
    let path = format!("/dev/ublkc{number}");
    loop {
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => return Ok(file),
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EBUSY) if Instant::now() < deadline => pause(),
                Some(Errno::EBUSY) => return Err(UblkError::Served { number }),
                Some(Errno::EPERM | Errno::EACCES) => return Err(Unavailable::NotPermitted.into()),
                _ => return Err(UblkError::NoNode { path, why: error.to_string() }),
            },
        }
    }
}

/// A command that begins service and does not end: the backing device does not answer the search
/// for partitions. The threads go on until it does; without them it would never end. A device that
/// was `made` by it is removed then.
fn abandon(order: Order, workers: Workers, made: Option<u32>, limit: Duration) {
    let wait = move || {
        while order.wait(Duration::from_secs(60)).is_none() {}
        let Some(number) = made else { return };
        workers.expect_removal(true);
        let stopped = driver::order(Control::StopDev, number, 0, limit);
        drop(workers.join(limit));
        if let Err(error) = stopped.and_then(|()| delete(number, limit)) {
            tracing::error!(number, %error, "ublk: a device whose start was given up stays");
        }
    };
    if let Err(error) = thread::Builder::new().name("ublk-abandoned".into()).spawn(wait) {
        tracing::error!(%error, "ublk: no thread to wait for the driver");
    }
}
