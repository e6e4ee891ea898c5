//! What is offered to clients: a registry of exports, shared by any number of servers, that also
//! knows the connections in transmission on each of them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::limits::{MAX_EXPORTS, MAX_STRING};
use super::socket::Socket;
use crate::device::Device;

/// One device under a name.
#[derive(Clone)]
pub struct Export {
    /// The name clients ask for; not empty, at most 4096 bytes.
    pub name: String,
    /// For people, shown by `nbdinfo --list`; may be empty, at most 4096 bytes.
    pub description: String,
    /// What is served.
    pub device: Arc<dyn Device>,
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Why an export was not added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    /// Another export has the name.
    #[error("an export named `{0}` exists already")]
    Exists(String),
    /// The name is empty, or name or description are longer than 4096 bytes.
    #[error("an export's name must have 1 to 4096 bytes and its description at most 4096")]
    BadText,
    /// The registry is full.
    #[error("there are {MAX_EXPORTS} exports already")]
    Full,
}

/// One line of [`Exports::list`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportSummary {
    /// The export's name.
    pub name: String,
    /// Its description.
    pub description: String,
    /// Connections in transmission.
    pub clients: u32,
}

/// A registry of exports. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Exports(Arc<Registry>);

#[derive(Debug, Default)]
struct Registry {
    offered: Mutex<BTreeMap<String, Arc<Offer>>>,
}

/// An export in the registry with its connections.
#[derive(Debug)]
pub(super) struct Offer {
    pub(super) export: Export,
    connections: Mutex<Connections>,
    fewer: Condvar,
}

#[derive(Debug, Default)]
struct Connections {
    open: Vec<Arc<Socket>>,
    /// Set once when the export is removed: nobody enters any more.
    closed: bool,
}

impl Exports {
    /// An empty registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Offers an export from now on.
    ///
    /// # Errors
    /// [`ExportError`].
    pub fn add(&self, export: Export) -> Result<(), ExportError> {
        let fits = |text: &str| text.len() <= MAX_STRING;
        if export.name.is_empty() || !fits(&export.name) || !fits(&export.description) {
            return Err(ExportError::BadText);
        }
        let mut offered = lock(&self.0.offered);
        if offered.contains_key(&export.name) {
            return Err(ExportError::Exists(export.name));
        }
        if offered.len() >= MAX_EXPORTS {
            return Err(ExportError::Full);
        }
        let name = export.name.clone();
        offered.insert(name, Arc::new(Offer::new(export)));
        Ok(())
    }

    /// Stops offering an export. Its connections finish the requests that have arrived and end;
    /// those that have not after `grace` are cut. Returns whether there was such an export.
    pub fn remove(&self, name: &str, grace: Duration) -> bool {
        let Some(offer) = lock(&self.0.offered).remove(name) else { return false };
        offer.close(grace);
        true
    }

    /// What is offered, by name.
    #[must_use]
    pub fn list(&self) -> Vec<ExportSummary> {
        let summary = |offer: &Arc<Offer>| ExportSummary {
            name: offer.export.name.clone(),
            description: offer.export.description.clone(),
            clients: offer.clients(),
        };
        lock(&self.0.offered).values().map(summary).collect()
    }

    /// Connections in transmission on the export; `None` when there is no such export.
    #[must_use]
    pub fn clients(&self, name: &str) -> Option<u32> {
        lock(&self.0.offered).get(name).map(|offer| offer.clients())
    }

    /// The export a client means by `name`: the empty name selects the only one.
    pub(super) fn find(&self, name: &str) -> Option<Arc<Offer>> {
        let offered = lock(&self.0.offered);
        if name.is_empty() && offered.len() == 1 {
            return offered.values().next().cloned();
        }
        offered.get(name).cloned()
    }

    /// Everything that is offered, by name.
    pub(super) fn all(&self) -> Vec<Arc<Offer>> {
        lock(&self.0.offered).values().cloned().collect()
    }
}

impl Offer {
    fn new(export: Export) -> Self {
        Self { export, connections: Mutex::default(), fewer: Condvar::new() }
    }

    fn clients(&self) -> u32 {
        u32::try_from(lock(&self.connections).open.len()).unwrap_or(u32::MAX)
    }

    /// Counts a connection until the guard is dropped; `None` when the export was removed.
    pub(super) fn enter(self: &Arc<Self>, socket: &Arc<Socket>) -> Option<Visit> {
        let mut connections = lock(&self.connections);
        if connections.closed {
            return None;
        }
        connections.open.push(socket.clone());
        Some(Visit { offer: self.clone(), socket: socket.clone() })
    }

    fn close(&self, grace: Duration) {
        let until = Instant::now() + grace;
        let mut connections = lock(&self.connections);
        connections.closed = true;
        connections.open.iter().for_each(|socket| socket.end_input());
        while !connections.open.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                connections.open.iter().for_each(|socket| socket.cut());
                return;
            }
            let waited = self.fewer.wait_timeout(connections, left);
            connections = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A connection in transmission on an export.
#[derive(Debug)]
pub(super) struct Visit {
    offer: Arc<Offer>,
    socket: Arc<Socket>,
}

impl Drop for Visit {
    fn drop(&mut self) {
        lock(&self.offer.connections).open.retain(|one| !Arc::ptr_eq(one, &self.socket));
        self.offer.fewer.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner) // plain data: valid after any panic
}
