//! A protected volume as front ends see it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use farshore_extent::{ChunkSize, Extent};

use super::host::Host;
use super::queue::FilterQueue;
use crate::backing::Backing;
use crate::core::VolumeKey;
use crate::device::{Allocation, Device, DeviceError, DeviceInfo, Queue};
use crate::sys::pool::PoolMemory;
use crate::sys::ring::Engine;

/// What a [`FilterDevice`] is made of.
#[derive(Debug)]
pub struct FilterConfig {
    /// The core it is attached to.
    pub host: Arc<Host>,
    /// The attached volume.
    pub key: VolumeKey,
    /// The claimed backing device.
    pub backing: Arc<Backing>,
    /// The capture pool, made by [`PoolMemory::shared_for_claims`], of the size told to the core.
    pub pool: Arc<PoolMemory>,
    /// As told to the core.
    pub chunk: ChunkSize,
    /// Which way I/O takes.
    pub engine: Engine,
}

/// A protected volume. Its queues belong to front-end threads.
#[derive(Debug)]
pub struct FilterDevice {
    pub(super) host: Arc<Host>,
    pub(super) key: VolumeKey,
    pub(super) backing: Arc<Backing>,
    pub(super) pool: Arc<PoolMemory>,
    pub(super) chunk: ChunkSize,
    pub(super) engine: Engine,
    pub(super) catching_up: Arc<AtomicBool>,
    pub(super) reads: AtomicU64,
    pub(super) read_errors: AtomicU64,
    closing: AtomicBool,
    refusing: AtomicBool,
}

impl FilterDevice {
    /// A device for an attached volume.
    #[must_use]
    pub fn new(config: FilterConfig) -> Arc<Self> {
        let FilterConfig { host, key, backing, pool, chunk, engine } = config;
        let catching_up = host.catching_up(key);
        Arc::new(Self {
            host,
            key,
            backing,
            pool,
            chunk,
            engine,
            catching_up,
            reads: AtomicU64::new(0),
            read_errors: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            refusing: AtomicBool::new(false),
        })
    }

    /// Refuses new queues from now on.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// Refuses writes from now on, or takes them again. Those that were submitted before are done.
    pub fn refuse_writes(&self, refuse: bool) {
        self.refusing.store(refuse, Ordering::Release);
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn refuses_writes(&self) -> bool {
        self.refusing.load(Ordering::Acquire)
    }

    /// Guest reads so far.
    #[must_use]
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    /// Guest reads that failed so far.
    #[must_use]
    pub fn read_errors(&self) -> u64 {
        self.read_errors.load(Ordering::Relaxed)
    }

    /// The capture pool.
    #[must_use]
    pub fn pool(&self) -> &Arc<PoolMemory> {
        &self.pool
    }

    /// The backing device.
    #[must_use]
    pub fn backing(&self) -> &Arc<Backing> {
        &self.backing
    }
}

impl Device for FilterDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            size: self.backing.size(),
            blocks: self.backing.blocks(),
            read_only: self.backing.read_only() || self.refuses_writes(),
            zeroes: self.backing.zeroes(),
            volatile_cache: self.backing.volatile_cache(),
        }
    }

    fn open_queue(self: Arc<Self>) -> Result<Box<dyn Queue>, DeviceError> {
        if self.closing.load(Ordering::Acquire) {
            return Err(DeviceError::Shutdown);
        }
        let queue = FilterQueue::new(self).map_err(|error| {
            tracing::error!(%error, "no queue for a client of a protected volume");
            DeviceError::NoMemory
        })?;
        Ok(Box::new(queue))
    }

    fn allocation(&self, extent: Extent, max: usize) -> Vec<Allocation> {
        let mut pieces = Vec::new();
        let mut at = extent.offset();
        while at < extent.end() && pieces.len() < max {
            // A backing that does not tell is all data.
            let data = self.backing.next_data(at).unwrap_or(Extent::between(at, extent.end()));
            let (start, end) = data.map_or((extent.end(), extent.end()), |d| (d.offset(), d.end()));
            let (start, end) = (start.clamp(at, extent.end()), end.min(extent.end()));
            if start > at {
                pieces.push(Allocation { len: start - at, hole: true, zero: true });
            }
            if end > start && pieces.len() < max {
                pieces.push(Allocation { len: end - start, hole: false, zero: false });
            }
            at = end.max(start);
        }
        pieces
    }
}
