//! The copy loop of one volume: a thread that reads dirty chunks while the guest goes on.
//!
//! It takes no more than half of the pool, obeys a rate, and records holes without reading them.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use farshore_extent::Extent;

use super::device::FilterDevice;
use super::inbox::Inbox;
use super::queue::device_error;
use crate::core::{Action, Backing, CopyEnd, Event, IoKey, Outcome, PoolSlot, QueueId, Token};
use crate::device::DeviceError;
use crate::sys::ring::{IoBuf, Op, Ring};
use crate::sys::wake::wait_readable;

/// Longest rest without a reason to go on; a safety net, `CopyWanted` comes before.
const REST: Duration = Duration::from_secs(5);

/// Rest after the backing device could not read a chunk.
const REST_AFTER_FAILURE: Duration = Duration::from_secs(1);

/// The copy loop of a volume. Dropping it asks it to stop.
#[derive(Debug)]
pub struct CopyLoop {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    inbox: Arc<Inbox>,
    stop: AtomicBool,
    /// Bytes a second; zero is no limit.
    rate: AtomicU64,
    /// The same for a verify.
    verify_rate: AtomicU64,
    speed: Mutex<Speed>,
}

/// Bytes a second over the last seconds.
#[derive(Debug)]
struct Speed {
    since: Instant,
    bytes: u64,
    last: u64,
}

impl Speed {
    const WINDOW: Duration = Duration::from_secs(2);

    fn add(&mut self, bytes: u64, now: Instant) {
        let passed = now.saturating_duration_since(self.since);
        if passed >= Self::WINDOW {
            self.last = per_second(self.bytes, passed);
            *self = Self { since: now, bytes: 0, last: self.last };
        }
        self.bytes += bytes;
    }

    fn get(&self, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.since);
        match passed {
            p if p >= Self::WINDOW * 2 => per_second(self.bytes, passed),
            _ if self.last == 0 => per_second(self.bytes, passed.max(Duration::from_millis(100))),
            _ => self.last,
        }
    }
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1);
    bytes.saturating_mul(1000) / millis
}

impl CopyLoop {
    /// Starts the thread for an attached volume.
    ///
    /// # Errors
    /// Out of descriptors or threads.
    pub fn start(device: &Arc<FilterDevice>, rate: u64) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            inbox: Arc::new(Inbox::new()?),
            stop: AtomicBool::new(false),
            rate: AtomicU64::new(rate),
            verify_rate: AtomicU64::new(0),
            speed: Mutex::new(Speed { since: Instant::now(), bytes: 0, last: 0 }),
        });
        let ring = device.backing.ring(4, device.engine, vec![])?;
        let queue = device.host.open_queue(&shared.inbox);
        device.host.set_copy_queue(device.key, Some(queue));
        let worker = Worker {
            device: Arc::clone(device),
            shared: Arc::clone(&shared),
            queue,
            ring,
            turns: 0,
            data: None,
            actions: Vec::new(),
        };
        let thread = Builder::new().name("copy".into()).spawn(move || worker.run());
        match thread {
            Ok(thread) => Ok(Self { shared, thread: Some(thread) }),
            Err(error) => {
                device.host.set_copy_queue(device.key, None);
                device.host.close_queue(queue);
                Err(error)
            }
        }
    }

    /// Limits it to so many bytes a second; zero is no limit.
    pub fn set_rate(&self, bytes_per_second: u64) {
        self.shared.rate.store(bytes_per_second, Ordering::Relaxed);
        self.shared.inbox.wake();
    }

    /// Limits reading for a verify to so many bytes a second; zero is no limit.
    pub fn set_verify_rate(&self, bytes_per_second: u64) {
        self.shared.verify_rate.store(bytes_per_second, Ordering::Relaxed);
        self.shared.inbox.wake();
    }

    /// Bytes a second over the last seconds.
    #[must_use]
    pub fn speed(&self) -> u64 {
        let speed = self.shared.speed.lock().unwrap_or_else(PoisonError::into_inner);
        speed.get(Instant::now())
    }

    /// Has the thread end after the chunk it is at.
    pub fn ask_to_stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.inbox.wake();
    }

    /// The same, and waits for the end.
    pub fn stop(&mut self) {
        self.ask_to_stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic there was reported when it happened
        }
    }
}

impl Drop for CopyLoop {
    fn drop(&mut self) {
        self.ask_to_stop();
    }
}

struct Worker {
    device: Arc<FilterDevice>,
    shared: Arc<Shared>,
    queue: QueueId,
    ring: Ring,
    turns: u64,
    /// The range that was last found to hold data.
    data: Option<Extent>,
    actions: Vec<Action>,
}

impl Worker {
    fn run(mut self) {
        let mut hints = true;
        while !self.stopped() {
            let hole = if hints { self.hole() } else { None };
            hints = true;
            let before = Instant::now();
            match self.turn(hole) {
                CopyEnd::Copied { bytes } => {
                    self.count(bytes, before);
                    if hole.is_none() {
                        self.pace(bytes, before, |s| &s.rate);
                    }
                }
                CopyEnd::Compared { bytes, verify: false } => {
                    self.count(bytes, before);
                    self.pace(bytes, before, |s| &s.rate);
                }
                CopyEnd::Compared { bytes, verify: true } => {
                    self.pace(bytes, before, |s| &s.verify_rate);
                }
                CopyEnd::NotHole => hints = false,
                CopyEnd::Clean | CopyEnd::PoolBusy => self.rest(REST),
                CopyEnd::Failed => self.rest(REST_AFTER_FAILURE),
            }
        }
        self.device.host.set_copy_queue(self.device.key, None);
        self.device.host.close_queue(self.queue);
    }

    fn stopped(&self) -> bool {
        self.shared.stop.load(Ordering::Acquire)
    }

    /// Waits for a reason to go on.
    fn rest(&mut self, limit: Duration) {
        if self.actions.is_empty() {
            self.wait(&[], Some(limit));
        }
        self.shared.inbox.take_all(&mut self.actions);
        self.actions.clear(); // nothing but CopyWanted between two turns
    }

    fn count(&self, bytes: u64, now: Instant) {
        self.shared.speed.lock().unwrap_or_else(PoisonError::into_inner).add(bytes, now);
    }

    /// Waits as long as the rate demands after so many bytes.
    fn pace(&mut self, bytes: u64, since: Instant, rate: fn(&Shared) -> &AtomicU64) {
        loop {
            let rate = rate(&self.shared).load(Ordering::Relaxed);
            if rate == 0 || self.stopped() {
                return;
            }
            let millis = bytes.saturating_mul(1000) / rate;
            let until = since + Duration::from_millis(millis);
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            self.wait(&[], Some(left));
            self.shared.inbox.take_all(&mut self.actions);
            self.actions.clear();
        }
    }

    fn wait(&self, more: &[BorrowedFd<'_>], limit: Option<Duration>) {
        let mut fds = vec![self.shared.inbox.fd()];
        fds.extend_from_slice(more);
        if let Err(error) = wait_readable(&fds, limit) {
            tracing::error!(%error, "the copy loop cannot wait");
        }
    }

    /// The hole that the next chunk seems to lie in.
    fn hole(&mut self) -> Option<Extent> {
        let chunk = self.device.host.lock().core.peek_copy(self.device.key)?;
        if self.data.is_some_and(|data| data.overlaps(chunk)) {
            return None;
        }
        let size = self.device.backing.size().get();
        let hole = match self.device.backing.next_data(chunk.offset()).ok()? {
            None => Extent::between(chunk.offset(), size),
            Some(data) => {
                self.data = Some(data);
                Extent::between(chunk.offset(), data.offset())
            }
        };
        hole.filter(|hole| hole.contains(chunk))
    }

    /// One chunk, or one hole.
    fn turn(&mut self, hole: Option<Extent>) -> CopyEnd {
        self.turns += 1;
        let (queue, token, volume) = (self.queue, Token(self.turns), self.device.key);
        self.step(Event::Copy { queue, token, volume, hole });
        loop {
            let mut actions = std::mem::take(&mut self.actions);
            let mut end = None;
            for action in actions.drain(..) {
                match action {
                    Action::Backing { io, what, .. } => self.perform(io, what),
                    Action::CopyDone { token: t, end: e, .. } if t == token => end = Some(e),
                    Action::CopyDone { .. }
                    | Action::CopyWanted { .. }
                    | Action::Answer { .. }
                    | Action::Recorded { .. }
                    | Action::IntentWanted { .. }
                    | Action::FlushWanted { .. }
                    | Action::HoldBroken { .. } => {}
                }
            }
            if self.actions.is_empty() {
                self.actions = actions;
            }
            if let Some(end) = end {
                return end;
            }
            if self.actions.is_empty() {
                self.wait(&[], None);
                self.shared.inbox.take_all(&mut self.actions);
            }
        }
    }

    fn step(&mut self, event: Event) {
        let host = Arc::clone(&self.device.host);
        host.run(Some(self.queue), &mut self.actions, |core, now, out| {
            core.step(now, event, out);
        });
    }

    fn perform(&mut self, io: IoKey, what: Backing) {
        let outcome = match what {
            Backing::Read { extent, slot } => self.read(extent, slot),
            Backing::Digest { extent, slot } => self.digest(extent, slot),
            Backing::CheckHole { extent } => match self.device.backing.next_data(extent.offset()) {
                Ok(data) if data.is_none_or(|d| !d.overlaps(extent)) => Outcome::Zeroes,
                Ok(_) => Outcome::NotHole,
                Err(_) => Outcome::Failed(DeviceError::Io),
            },
            Backing::Write { .. } | Backing::Zero { .. } | Backing::Flush => {
                debug_assert!(false, "not a request of the copy loop");
                Outcome::Failed(DeviceError::Invalid)
            }
        };
        self.step(Event::BackingDone { io, outcome });
    }

    fn read(&mut self, extent: Extent, slot: PoolSlot) -> Outcome {
        match self.bytes(extent, slot) {
            Ok(buf) if is_zero(buf.bytes()) => Outcome::Zeroes,
            Ok(buf) => Outcome::Data { crc: crc32c::crc32c(buf.bytes()) },
            Err(error) => Outcome::Failed(error),
        }
    }

    fn digest(&mut self, extent: Extent, slot: PoolSlot) -> Outcome {
        match self.bytes(extent, slot) {
            Ok(buf) => Outcome::Digest {
                digest: *blake3::hash(buf.bytes()).as_bytes(),
                zero: is_zero(buf.bytes()),
            },
            Err(error) => Outcome::Failed(error),
        }
    }

    /// Reads into the pool.
    fn bytes(&mut self, extent: Extent, slot: PoolSlot) -> Result<IoBuf, DeviceError> {
        let Some(slice) = self.device.pool.claim(slot.offset(), slot.len()) else {
            tracing::error!(offset = slot.offset(), "a place in the pool was given out twice");
            return Err(DeviceError::NoMemory);
        };
        self.ring.push(Op::Read { offset: extent.offset(), buf: IoBuf::Pool(slice) }, 0);
        let mut done = None;
        loop {
            self.ring.completions(|one| done = Some(one));
            if done.is_some() {
                break;
            }
            if let Err(error) = self.ring.wait(None) {
                tracing::warn!(%error, "the copy loop cannot read for the moment");
            }
        }
        match done.map(|done| (done.result, done.buf)) {
            Some((Ok(()), Some(buf))) => Ok(buf),
            Some((Err(errno), _)) => {
                tracing::warn!(%extent, %errno, "the backing device could not read a chunk");
                Err(device_error(errno))
            }
            Some((Ok(()), None)) | None => Err(DeviceError::Io),
        }
    }
}

/// Whether all bytes are zero; compares page by page, as fast as memory is.
fn is_zero(bytes: &[u8]) -> bool {
    static ZEROES: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROES.len()).all(|page| page == &ZEROES[..page.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speed_is_the_average_of_the_last_seconds() {
        let start = Instant::now();
        let mut speed = Speed { since: start, bytes: 0, last: 0 };
        speed.add(1000, start);
        speed.add(1000, start + Duration::from_secs(1));
        assert_eq!(speed.get(start + Duration::from_secs(2)), 1000);
        speed.add(500, start + Duration::from_secs(2));
        assert_eq!(speed.get(start + Duration::from_secs(3)), 1000);
        assert_eq!(speed.get(start + Duration::from_secs(12)), 50, "it fades when idle");
    }

    #[test]
    fn zero_is_told_from_almost_zero() {
        let mut bytes = vec![0; 10_000];
        assert!(is_zero(&bytes));
        bytes[9_999] = 1;
        assert!(!is_zero(&bytes));
    }
}
