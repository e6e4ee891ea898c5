//! An attached device from attach to detach, over restarts of the process that serves it.

use std::num::NonZero;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use farshore_extent::VolumeSize;
use tracing::{info, warn};

use super::client::{Client, look_for_partitions, node};
use super::error::{KernelNbdError, system};
use super::message::{Connect, Timeouts};
use super::place::{Health, Places};
use super::{Config, Existing, MAX_IDENTIFIER, SCAN_LIMIT, Support, Unavailable};
use crate::device::{Device, DeviceInfo};
use crate::frontend::claim::Claim;
use crate::frontend::nbd::export_flags;

/// Age at which the kernel looks after a request of a device with one connection; see the module.
const LOOK_AFTER: Duration = Duration::from_secs(5);

/// Age at which a device with several connections sends a request again on another one. What a
/// slow disk may take is less, or it would be flooded with repetitions.
const SEND_AGAIN: Duration = Duration::from_secs(30);

/// How long a dying predecessor may hold the connections.
const PREDECESSOR: Duration = Duration::from_secs(10);

/// How long the node of a new device may need to appear.
const NODE: Duration = Duration::from_secs(10);

/// How long a disconnected device may need to be free when nobody uses it.
const FREE: Duration = Duration::from_secs(5);

/// An attached device and the threads that serve it. Dropping it is [`Self::leave`].
#[derive(Debug)]
pub struct Server {
    client: Client,
    places: Arc<Places>,
    number: u32,
    identifier: String,
    recovered: bool,
}

/// Whether volumes can be attached by the kernel's client on this host.
///
/// # Errors
/// [`Unavailable`] says why not and what to do.
pub fn available() -> Result<Support, Unavailable> {
    let client = Client::new()?;
    Ok(Support { max_part: client.sysfs.max_part().unwrap_or(0) })
}

/// The attached device `number`; `None` when there is none that can be seen.
#[must_use]
pub fn existing(number: u32) -> Option<Existing> {
    look(number).ok().flatten()
}

/// The attached device `number`; `None` when it is free.
///
/// # Errors
/// The kernel does not tell.
pub fn look(number: u32) -> std::io::Result<Option<Existing>> {
    let sysfs = super::sysfs::Sysfs::default();
    Ok(sysfs.try_configured(number)?.then(|| Existing {
        number,
        identifier: sysfs.identifier(number),
        owner: sysfs.owner(number),
    }))
}

/// Disconnects the device `number` if it is `identifier`'s; its users get errors. Only when no
/// [`Server`] of this or another process serves it. Returns whether it was `identifier`'s.
///
/// # Errors
/// [`KernelNbdError::Busy`] when its users have not closed it within `limit`, and others.
pub fn remove_stale(
    number: u32,
    identifier: &str,
    limit: Duration,
) -> Result<bool, KernelNbdError> {
    disconnect_left(number, identifier, limit, || Ok(None))
}

/// The same, unless somebody uses it: then it stays.
///
/// # Errors
/// [`KernelNbdError::InUse`], and as [`remove_stale`].
pub fn remove_stale_unused(
    number: u32,
    identifier: &str,
    limit: Duration,
) -> Result<bool, KernelNbdError> {
    disconnect_left(number, identifier, limit, || claim(number))
}

fn disconnect_left(
    number: u32,
    identifier: &str,
    limit: Duration,
    claim: impl FnOnce() -> Result<Option<Claim>, KernelNbdError>,
) -> Result<bool, KernelNbdError> {
    let client = Client::new()?;
    if client.sysfs.identifier(number).as_deref() != Some(identifier) {
        return Ok(false);
    }
    let claim = claim()?;
    client.disconnect(number, limit)?;
    claim.into_iter().for_each(Claim::let_go);
    if client.wait_free(number, limit) { Ok(true) } else { Err(KernelNbdError::Busy(number)) }
}

/// From now on nobody can mount the device.
fn claim(number: u32) -> Result<Option<Claim>, KernelNbdError> {
    Claim::take(&node(number)).map_err(|_| KernelNbdError::InUse(number))
}

impl Server {
    /// Attaches `device`; or, when an earlier process left its device behind, brings that new
    /// connections, and its users notice nothing but the wait.
    ///
    /// # Errors
    /// [`KernelNbdError`]. A device left behind stays as it is.
    pub fn start(device: Arc<dyn Device>, config: Config) -> Result<Self, KernelNbdError> {
        let client = Client::new()?;
        let identifier = &config.identifier;
        if identifier.is_empty()
            || identifier.len() > MAX_IDENTIFIER
            || identifier.contains(char::is_control)
        {
            let error = std::io::ErrorKind::InvalidInput.into();
            return Err(system("use such an identifier", Duration::ZERO)(error));
        }
        let is_ours =
            |number: &u32| client.sysfs.identifier(*number).as_deref() == Some(identifier);
        let left = config.number.filter(is_ours).or_else(|| client.sysfs.find(identifier));
        match left {
            Some(number) => Self::adopt(client, number, device, &config),
            None => Self::attach(client, device, &config),
        }
    }

    fn attach(
        client: Client,
        device: Arc<dyn Device>,
        config: &Config,
    ) -> Result<Self, KernelNbdError> {
        let info = device.info();
        let count = config.connections();
        let pairs: Result<Vec<_>, _> = (0..count).map(|_| UnixStream::pair()).collect();
        let (ours, theirs): (Vec<_>, Vec<_>) =
            pairs.map_err(system("make sockets", NODE))?.into_iter().unzip();
        let (timeouts, look_after) = config.times(count);
        let connect = Connect {
            number: config.number,
            size: info.size.get(),
            block_size: info.blocks.logical(),
            flags: export_flags(&info, false),
            identifier: &config.identifier,
            timeouts,
        };
        let number = client.connect(&connect, &theirs)?;
        drop(theirs);
        let places = Places::new(client.clone(), number, &config.identifier, device, false);
        let identifier = config.identifier.clone();
        let server = Self { client, places, number, identifier, recovered: false };
        let started = ours
            .into_iter()
            .enumerate()
            .try_for_each(|(index, stream)| server.places.start(index, Some(stream.into())));
        server.set_timer(look_after);
        let ready = started
            .map_err(system("start a thread", NODE))
            .and_then(|()| server.client.wait_node(number, NODE));
        if let Err(error) = ready {
            if let Err(also) = server.remove(FREE) {
                warn!(%also, "a device that could not be used was not removed");
            }
            return Err(error);
        }
        if !look_for_partitions(number, SCAN_LIMIT) {
            warn!("/dev/nbd{number} was not searched for partitions; it is slow to answer");
        }
        info!("attached {} with {count} connection(s)", node(number).display());
        Ok(server)
    }

    fn adopt(
        client: Client,
        number: u32,
        device: Arc<dyn Device>,
        config: &Config,
    ) -> Result<Self, KernelNbdError> {
        let info = device.info();
        if let Some(what) = client.sysfs.contradiction(number, &info) {
            return Err(KernelNbdError::Changed { number, what });
        }
        let count = client.sysfs.connections(number);
        let (_, look_after) = config.times(count);
        let waits = config.dead_connection_timeout;
        match client.set_dead_connection(number, &config.identifier, waits) {
            Err(KernelNbdError::Gone(number)) => return Err(KernelNbdError::Busy(number)),
            other => other?,
        }
        let durable = info.volatile_cache && !client.sysfs.has_cache(number);
        let places = Places::new(client.clone(), number, &config.identifier, device, durable);
        let identifier = config.identifier.clone();
        let server = Self { client, places, number, identifier, recovered: true };
        for index in 0..usize::from(count) {
            server.places.start(index, None).map_err(system("start a thread", NODE))?;
        }
        if !server.places.wait_alive(PREDECESSOR) {
            let gone = server.places.health().gone;
            let error = if gone { KernelNbdError::Busy } else { KernelNbdError::Served };
            return Err(error(number));
        }
        info!("brought {} {count} new connection(s)", node(number).display());
        server.set_timer(look_after);
        server.follow_size(&info);
        Ok(server)
    }

    /// Tells the kernel of a size that changed while nobody served the device.
    fn follow_size(&self, info: &DeviceInfo) {
        if self.client.sysfs.size(self.number) == Some(info.size.get()) {
            return;
        }
        if let Err(error) = self.resize(info.size) {
            warn!(%error, "/dev/nbd{} keeps its old size", self.number);
        }
    }

    fn set_timer(&self, look_after: Duration) {
        if let Err(error) = self.client.set_request_timer(self.number, look_after) {
            warn!(
                %error,
                "the request timer of /dev/nbd{} stays at 30 s: after a crash its users wait longer",
                self.number
            );
        }
    }

    /// The N of `/dev/nbdN`.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The device's node.
    #[must_use]
    pub fn block_device(&self) -> PathBuf {
        node(self.number)
    }

    /// Whether the device was there already and its users have noticed nothing.
    #[must_use]
    pub fn recovered(&self) -> bool {
        self.recovered
    }

    /// How the connections are.
    #[must_use]
    pub fn health(&self) -> Health {
        self.places.health()
    }

    /// Tells the kernel the new size, which the device serves already. Waits for the requests in
    /// flight.
    ///
    /// # Errors
    /// [`KernelNbdError`].
    pub fn resize(&self, size: VolumeSize) -> Result<(), KernelNbdError> {
        self.client.set_size(self.number, &self.identifier, size.get())
    }

    /// Ends the connections and keeps the kernel's device: its users wait for the next
    /// [`Self::start`]. Requests that have arrived are answered before; returns whether all were
    /// within `grace`.
    #[must_use]
    pub fn leave(self, grace: Duration) -> bool {
        self.places.end(grace)
    }

    /// Disconnects the device: whoever uses it gets errors from now on. Returns when the device is
    /// free, after about `grace` at most.
    ///
    /// # Errors
    /// [`KernelNbdError::Busy`] when someone has it open still, [`KernelNbdError::Hangs`].
    pub fn remove(self, grace: Duration) -> Result<(), KernelNbdError> {
        self.end(grace, None)
    }

    /// The same, unless somebody has mounted the device or claimed it otherwise.
    ///
    /// # Errors
    /// After [`KernelNbdError::InUse`] the device is served as before. Else as [`Self::remove`].
    pub fn remove_unused(&self, grace: Duration) -> Result<(), KernelNbdError> {
        self.end(grace, claim(self.number)?)
    }

    fn end(&self, grace: Duration, claim: Option<Claim>) -> Result<(), KernelNbdError> {
        self.places.keep_no_longer();
        let gone = self.places.health().gone;
        let asked =
            if gone { Ok(()) } else { self.client.disconnect(self.number, grace.max(FREE)) };
        // After a goodbye in time nothing is left to answer. Otherwise this is what lets the
        // kernel go on.
        self.places.end(if asked.is_ok() { grace } else { Duration::ZERO });
        claim.into_iter().for_each(Claim::let_go);
        if self.client.wait_free(self.number, FREE) {
            return Ok(());
        }
        asked.and(Err(KernelNbdError::Busy(self.number)))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.places.end(FREE);
    }
}

impl Config {
    /// How many connections a new device gets.
    fn connections(&self) -> u16 {
        // More queues than processors the kernel does not make.
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        self.connections.max(1).min(u16::try_from(processors).unwrap_or(u16::MAX))
    }

    /// What the kernel is told, and its request timer, for a device with so many connections.
    fn times(&self, connections: u16) -> (Timeouts, Duration) {
        let dead_connection = self.dead_connection_timeout;
        if connections == 1 {
            let timer = self.request_timeout.unwrap_or(LOOK_AFTER);
            return (Timeouts { request: Duration::ZERO, dead_connection }, timer);
        }
        let age = self.request_timeout.unwrap_or(SEND_AGAIN);
        (Timeouts { request: age.max(Duration::from_secs(1)), dead_connection }, age)
    }
}
