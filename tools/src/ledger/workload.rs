//! Writers that keep a disk busy and enter every write into the ledger.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::block::{BLOCK, mix};
use super::history::{Ledger, Ticket};
use crate::disk::{Disk, Place};
use crate::flag::Flag;
use crate::nbd_client::Op;

/// How to write.
#[derive(Debug, Clone)]
pub struct Workload {
    /// The disk.
    pub place: Place,
    /// Threads; each opens the disk.
    pub writers: u32,
    /// Requests in flight of each; a block device takes one at a time.
    pub depth: usize,
    /// Most bytes a second of all writers together; 0 is no limit.
    pub bytes_per_second: u64,
    /// Seeds the choice of places; two runs with one seed choose alike.
    pub seed: u64,
}

/// What the writers did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkloadStats {
    /// Writes and zeroes acknowledged.
    pub writes: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Of those, zeroes.
    pub zeroes: u64,
    /// Flushes acknowledged.
    pub flushes: u64,
    /// Requests the device answered with an error.
    pub errors: u64,
    /// Time from request to answer of each write, in microseconds, sorted.
    pub micros: Vec<u32>,
}

impl WorkloadStats {
    /// The time below which `percent` of the writes were answered, in microseconds.
    #[must_use]
    pub fn percentile(&self, percent: usize) -> u32 {
        let last = self.micros.len().saturating_sub(1);
        self.micros.get(last * percent.min(100) / 100).copied().unwrap_or(0)
    }

    /// Adds another writer's figures.
    pub fn add(&mut self, other: Self) {
        self.writes += other.writes;
        self.bytes += other.bytes;
        self.zeroes += other.zeroes;
        self.flushes += other.flushes;
        self.errors += other.errors;
        self.micros.extend(other.micros);
        self.micros.sort_unstable();
    }
}

/// Writers at work.
#[derive(Debug)]
pub struct Running {
    stop: Flag,
    threads: Vec<JoinHandle<io::Result<WorkloadStats>>>,
    /// Bytes sent so far by all of them.
    pub bytes: Arc<AtomicU64>,
}

impl Running {
    /// Stops the writers, waits for every answer that is due, and adds up.
    ///
    /// # Errors
    /// The first writer's error: a lost connection, or an error the device gave.
    pub fn finish(mut self) -> io::Result<WorkloadStats> {
        self.stop.set();
        let mut sum = WorkloadStats::default();
        for thread in std::mem::take(&mut self.threads) {
            let result = thread.join();
            sum.add(result.map_err(|_| io::Error::other("a writer panicked"))??);
        }
        Ok(sum)
    }

    /// Whether a writer has ended by itself, which only an error does.
    #[must_use]
    pub fn broken(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }
}

impl Drop for Running {
    /// The writers end by themselves; not waited for, as their disk may have stopped answering.
    fn drop(&mut self) {
        self.stop.set();
    }
}

impl Workload {
    /// Opens the disk for all writers and lets them loose.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn start(&self, ledger: &Arc<Ledger>) -> io::Result<Running> {
        let stop = Flag::default();
        let bytes = Arc::new(AtomicU64::new(0));
        let mut threads = Vec::new();
        let started = Instant::now();
        for id in 0..self.writers {
            let mut writer = Writer {
                id,
                disk: self.place.open()?,
                ledger: Arc::clone(ledger),
                random: mix(self.seed ^ u64::from(id) << 32),
                waiting: HashMap::new(),
                stats: WorkloadStats::default(),
            };
            let (stop, sent) = (stop.clone(), Arc::clone(&bytes));
            let (depth, rate) = (self.depth.max(1), self.bytes_per_second);
            threads.push(std::thread::spawn(move || {
                let mut since_flush = 0u32;
                while !stop.is_set() {
                    let ahead = ahead_of_rate(rate, sent.load(Ordering::Relaxed), started);
                    if !ahead.is_zero() {
                        writer.pause(&stop, ahead)?;
                        continue;
                    }
                    let len = writer.send_one()?;
                    sent.fetch_add(len, Ordering::Relaxed);
                    while writer.disk.in_flight() >= depth {
                        writer.take_one()?;
                    }
                    since_flush += 1;
                    if since_flush >= 100 {
                        since_flush = 0;
                        writer.flush()?;
                    }
                }
                writer.drain()
            }));
        }
        Ok(Running { stop, threads, bytes })
    }
}

/// How long the writers have to wait to keep to their rate.
fn ahead_of_rate(rate: u64, sent: u64, started: Instant) -> Duration {
    let micros = u128::from(sent) * 1_000_000;
    let Some(due) = micros.checked_div(u128::from(rate)) else { return Duration::ZERO };
    let due = Duration::from_micros(u64::try_from(due).unwrap_or(u64::MAX));
    due.saturating_sub(started.elapsed())
}

struct Writer {
    id: u32,
    disk: Disk,
    ledger: Arc<Ledger>,
    random: u64,
    /// Writes by cookie; none for a flush.
    waiting: HashMap<u64, (Option<Ticket>, Instant)>,
    stats: WorkloadStats,
}

impl Writer {
    fn below(&mut self, n: u64) -> u64 {
        self.random = mix(self.random);
        self.random % n.max(1)
    }

    /// Most writes are of one block, some of up to 64; a few are zeroes; a fifth of the region
    /// takes half of all writes, so that blocks are overwritten often.
    fn choose(&mut self) -> (u64, u32, bool) {
        let blocks = match self.below(20) {
            0 => 16 + self.below(49),
            1..4 => 2 + self.below(7),
            _ => 1,
        };
        let blocks = blocks.min(self.ledger.blocks());
        let room = self.ledger.blocks() - blocks + 1;
        let first =
            if self.below(2) == 0 { self.below(room) } else { self.below(room.div_ceil(5)) };
        (first, u32::try_from(blocks).unwrap_or(1), self.below(33) == 0)
    }

    /// Sends one write; how many bytes.
    fn send_one(&mut self) -> io::Result<u64> {
        let ticket = loop {
            let (first, blocks, zero) = self.choose();
            if let Some(ticket) = self.ledger.begin(self.id, first, blocks, zero) {
                break ticket;
            }
            // In flight elsewhere: another place. With everything in flight, wait for an answer.
            if self.disk.in_flight() > 0 {
                self.take_one()?;
            }
        };
        let (offset, len) = (ticket.offset, ticket.len);
        let fua = self.below(100) == 0;
        let begun = Instant::now();
        let cookie = if ticket.zero {
            self.disk.submit(Op::Zero { offset, len, fua })?
        } else {
            let data = self.ledger.payload(&ticket);
            self.disk.submit(Op::Write { offset, data: &data, fua })?
        };
        self.waiting.insert(cookie, (Some(ticket), begun));
        Ok(u64::from(len))
    }

    /// Lets time pass, and takes the answers that come meanwhile at once: one that lies unread is
    /// neither acknowledged nor timed.
    fn pause(&mut self, stop: &Flag, time: Duration) -> io::Result<()> {
        if self.disk.in_flight() == 0 {
            // The caller looks at the flag next.
            let _set = stop.wait(time);
        } else if self.disk.answer_within(time.min(LONGEST_PAUSE))? {
            self.take_one()?;
        }
        Ok(())
    }

    fn take_one(&mut self) -> io::Result<()> {
        let done = self.disk.complete()?;
        let Some((ticket, begun)) = self.waiting.remove(&done.cookie) else { return Ok(()) };
        if done.error != 0 {
            self.stats.errors += 1;
            let error = i32::try_from(done.error).unwrap_or(5);
            return Err(io::Error::from_raw_os_error(error));
        }
        let Some(ticket) = ticket else {
            self.stats.flushes += 1;
            return Ok(());
        };
        self.stats.writes += 1;
        self.stats.bytes += u64::from(ticket.len);
        self.stats.zeroes += u64::from(ticket.zero);
        self.stats.micros.push(u32::try_from(begun.elapsed().as_micros()).unwrap_or(u32::MAX));
        self.ledger.acknowledge(ticket);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let cookie = self.disk.submit(Op::Flush)?;
        self.waiting.insert(cookie, (None, Instant::now()));
        Ok(())
    }

    fn drain(mut self) -> io::Result<WorkloadStats> {
        while self.disk.in_flight() > 0 {
            self.take_one()?;
        }
        self.disk.flush()?;
        Ok(self.stats)
    }
}

/// A writer looks so often whether it is to stop.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

const _: () = assert!(BLOCK == 4096, "sizes above are chosen in blocks of 4 KiB");
