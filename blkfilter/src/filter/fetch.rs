//! Waiting for records, and for their release.
//!
//! The write path wakes nobody as a rule: a reader looks once by its own clock, and asks to be told
//! of the first record only when it found nothing; while writes flow it is told when enough payload
//! has gathered or something urgent was recorded.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use farshore_extent::{Lsn, VolumeId};

use super::host::{Host, Line, Shared};
use crate::control::Fetched;
use crate::core::{Refused, VolumeKey};

/// Most records in one answer: 2048 of at most 340 bytes are 700 KB, below the 1 MiB of a message.
const MAX_RECORDS: usize = 2048;

/// Records copied in one hold of the lock; about 10 us.
const SLICE: usize = 256;

/// Most payload in one answer, in bytes, beyond the first record.
const MAX_PAYLOAD: u64 = 8 << 20;

/// How long to wait for records; see `Request::Fetch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FetchWait {
    /// Enough payload to answer at once, in bytes.
    pub want_bytes: u64,
    /// Longest wait after the first record.
    pub wait: Duration,
    /// Longest wait without any record.
    pub idle: Duration,
}

/// Somebody who waits.
#[derive(Debug)]
pub(super) struct Watcher {
    id: u64,
    kind: Kind,
    told: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// For the first record.
    First,
    /// For this many more bytes of payload, or something urgent.
    Bytes(u64),
    /// For a release.
    Release,
}

impl Line {
    /// Notes a record; true when somebody has to be woken.
    pub(super) fn recorded(&mut self, payload: u64, urgent: bool) -> bool {
        let mut wake = false;
        for watcher in self.watchers.iter_mut().filter(|w| !w.told) {
            watcher.told = match &mut watcher.kind {
                Kind::First => true,
                Kind::Bytes(left) => {
                    *left = left.saturating_sub(payload);
                    urgent || *left == 0
                }
                Kind::Release => false,
            };
            wake |= watcher.told;
        }
        wake
    }

    fn released(&mut self) -> bool {
        let waiting = self.watchers.iter_mut().filter(|w| w.kind == Kind::Release);
        waiting.fold(false, |_, watcher| {
            watcher.told = true;
            true
        })
    }
}

impl Host {
    /// The records of a volume after a place, waited for as `wait` says.
    ///
    /// # Errors
    /// As `CaptureCore::fetch`.
    pub fn fetch(
        &self,
        volume: VolumeId,
        after: Lsn,
        wait: &FetchWait,
    ) -> Result<Fetched, Refused> {
        self.wait_for_records(volume, after, wait)?;
        let max_bytes = wait.want_bytes.saturating_mul(4).clamp(1 << 20, MAX_PAYLOAD);
        let mut fetched = Fetched { epoch: self.epoch(), records: Vec::new(), more: true };
        let (mut after, mut bytes) = (after, 0);
        while fetched.more && fetched.records.len() < MAX_RECORDS && bytes < max_bytes {
            let from = fetched.records.len();
            let shared = self.lock();
            let key = shared.core.key_of(volume).ok_or(Refused::NoSuchVolume)?;
            fetched.more =
                shared.core.fetch(key, after, SLICE, max_bytes - bytes, &mut fetched.records)?;
            drop(shared);
            let new = fetched.records.get(from..).unwrap_or_default();
            bytes += new.iter().map(|r| r.body.payload_len()).sum::<u64>();
            if let Some(last) = new.last() {
                after = Lsn::new(fetched.epoch, last.seq);
            }
        }
        Ok(fetched)
    }

    fn wait_for_records(
        &self,
        volume: VolumeId,
        after: Lsn,
        wait: &FetchWait,
    ) -> Result<(), Refused> {
        let deadline = Instant::now() + wait.idle;
        let mut first: Option<Instant> = None;
        let mut looked = false;
        let mut shared = self.lock();
        loop {
            let key = shared.core.key_of(volume).ok_or(Refused::NoSuchVolume)?;
            let waiting = shared.core.waiting(key, after)?;
            let enough = waiting.urgent
                || waiting.payload >= wait.want_bytes.max(1)
                || waiting.records >= MAX_RECORDS;
            if enough || shared.stopping {
                return Ok(());
            }
            let now = Instant::now();
            let left = Kind::Bytes(wait.want_bytes.saturating_sub(waiting.payload));
            let (until, kind) = if waiting.records > 0 {
                (*first.get_or_insert(now) + wait.wait, left)
            } else if looked {
                first = None;
                (deadline, Kind::First)
            } else {
                // Records may come any time from now on; the first look is by the clock.
                looked = true;
                first = Some(now);
                (deadline.min(now + wait.wait), left)
            };
            if now >= until && (waiting.records > 0 || now >= deadline) {
                return Ok(());
            }
            shared = wait_until(shared, key, until, kind);
        }
    }

    /// Waits until everything captured so far is durable at the target. False when the time passed before, or
    /// when the daemon stops.
    ///
    /// # Errors
    /// [`Refused::NoSuchVolume`].
    pub fn drain(&self, volume: VolumeId, limit: Duration) -> Result<bool, Refused> {
        let deadline = Instant::now() + limit;
        let mut shared = self.lock();
        let mut goal = None;
        loop {
            let key = shared.core.key_of(volume).ok_or(Refused::NoSuchVolume)?;
            let status = shared.core.status(key).ok_or(Refused::NoSuchVolume)?;
            let goal = *goal.get_or_insert(status.captured);
            if status.durable >= goal {
                return Ok(true);
            }
            if shared.stopping || Instant::now() >= deadline {
                return Ok(false);
            }
            shared = wait_until(shared, key, deadline, Kind::Release);
        }
    }

    pub(super) fn tell_released(&self, volume: VolumeId) {
        let mut shared = self.lock();
        let Some(key) = shared.core.key_of(volume) else { return };
        if let Some(line) = shared.lines.get_mut(&key)
            && line.released()
        {
            let news = Arc::clone(&line.news);
            drop(shared);
            news.notify_all();
        }
    }
}

/// Waits until told, or until the time; the caller looks again either way.
fn wait_until(
    mut shared: MutexGuard<'_, Shared>,
    key: VolumeKey,
    until: Instant,
    kind: Kind,
) -> MutexGuard<'_, Shared> {
    shared.last_watcher += 1;
    let id = shared.last_watcher;
    let Some(line) = shared.lines.get_mut(&key) else { return shared };
    line.watchers.push(Watcher { id, kind, told: false });
    let news = Arc::clone(&line.news);
    let left = until.saturating_duration_since(Instant::now());
    shared = news.wait_timeout(shared, left).unwrap_or_else(PoisonError::into_inner).0;
    if let Some(line) = shared.lines.get_mut(&key) {
        line.watchers.retain(|watcher| watcher.id != id);
    }
    shared
}
