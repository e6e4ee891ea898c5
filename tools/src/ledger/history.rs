//! When each write was issued and acknowledged.

use std::sync::{Mutex, PoisonError};
use std::time;

use farshore_extent::WallTime;

use super::block::{BLOCK, BlockHeader};

/// Nanoseconds since the ledger was made: one monotonic clock for everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Instant(pub u64);

impl Instant {
    /// Later than everything.
    pub const NEVER: Self = Self(u64::MAX);
}

/// One write.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub first: u64,
    pub blocks: u32,
    pub writer: u32,
    pub zero: bool,
    pub issued: Instant,
    /// [`Instant::NEVER`] until acknowledged.
    pub acked: Instant,
    pub seen: u64,
}

impl Entry {
    pub fn range(&self) -> std::ops::Range<u64> {
        self.first..self.first + u64::from(self.blocks)
    }
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// Entry of number n at n - 1.
    pub entries: Vec<Entry>,
    /// Blocks of writes in flight, or of writes whose fate is unknown.
    busy: Vec<bool>,
    /// Every number up to this is acknowledged.
    seen: u64,
}

/// A write in flight.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a write that is never acknowledged keeps its blocks"]
pub struct Ticket {
    /// Which write; the first is 1.
    pub number: u64,
    /// Where on the volume, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub len: u32,
    /// Zeroes the range instead of writing it.
    pub zero: bool,
}

/// The ledger of one region of a volume. Shared by all its writers.
#[derive(Debug)]
pub struct Ledger {
    pub(super) run: u128,
    pub(super) base: u64,
    pub(super) blocks: u64,
    start: time::Instant,
    wall: WallTime,
    pub(super) state: Mutex<State>,
}

impl Ledger {
    /// A ledger of the region of `len` bytes at `base`, which must read as zero at first. Both are
    /// multiples of [`BLOCK`].
    #[must_use]
    pub fn new(base: u64, len: u64) -> Self {
        let run = u128::from_le_bytes(farshore_extent::ViewId::random().to_bytes());
        let blocks = len / BLOCK as u64;
        let busy = vec![false; usize::try_from(blocks).unwrap_or(usize::MAX)];
        Self {
            run,
            base,
            blocks,
            start: time::Instant::now(),
            wall: WallTime::now(),
            state: Mutex::new(State { busy, ..State::default() }),
        }
    }

    /// Blocks in the region.
    #[must_use]
    pub const fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Now on the ledger's clock.
    #[must_use]
    pub fn now(&self) -> Instant {
        Instant(u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX - 1))
    }

    /// Wall time on the ledger's clock; exact as long as nobody sets the machine's clock.
    #[must_use]
    pub fn at_wall(&self, time: WallTime) -> Instant {
        Instant(u64::try_from(time.since(self.wall).as_nanos()).unwrap_or(u64::MAX - 1))
    }

    /// An instant as wall time.
    #[must_use]
    pub fn wall_of(&self, at: Instant) -> WallTime {
        let nanos = i64::try_from(at.0).unwrap_or(i64::MAX);
        WallTime::from_nanos(self.wall.nanos().saturating_add(nanos))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a write of `blocks` blocks at block `first` of the region; none when the range is
    /// outside or another write is in flight there. Send it after this returns.
    pub fn begin(&self, writer: u32, first: u64, blocks: u32, zero: bool) -> Option<Ticket> {
        let end = first.checked_add(u64::from(blocks)).filter(|end| *end <= self.blocks)?;
        let range = usize::try_from(first).ok()?..usize::try_from(end).ok()?;
        let len = blocks.checked_mul(u32::try_from(BLOCK).ok()?)?;
        let mut state = self.lock();
        let busy = &mut state.busy[range];
        if busy.is_empty() || busy.contains(&true) {
            return None;
        }
        busy.fill(true);
        let seen = state.seen;
        let issued = self.now();
        let acked = Instant::NEVER;
        state.entries.push(Entry { first, blocks, writer, zero, issued, acked, seen });
        let number = u64::try_from(state.entries.len()).ok()?;
        Some(Ticket { number, offset: self.base + first * BLOCK as u64, len, zero })
    }

    /// The bytes to send for a write that is not a zero.
    #[must_use]
    pub fn payload(&self, ticket: &Ticket) -> Vec<u8> {
        let Some(entry) = self.entry(ticket.number) else { return Vec::new() };
        let mut bytes = Vec::with_capacity(usize::try_from(ticket.len).unwrap_or(0));
        let mut one = [0; BLOCK];
        for block in entry.range() {
            let header = BlockHeader {
                run: self.run,
                block,
                number: ticket.number,
                first: entry.first,
                blocks: entry.blocks,
                writer: entry.writer,
                seen: entry.seen,
            };
            header.encode(&mut one);
            bytes.extend_from_slice(&one);
        }
        bytes
    }

    fn entry(&self, number: u64) -> Option<Entry> {
        let at = usize::try_from(number.checked_sub(1)?).ok()?;
        self.lock().entries.get(at).copied()
    }

    /// The device has said that the write is done. A write that failed or whose connection was
    /// lost is simply not acknowledged: its blocks are never used again.
    pub fn acknowledge(&self, ticket: Ticket) {
        let now = self.now();
        let Ok(at) = usize::try_from(ticket.number - 1) else { return };
        let mut state = self.lock();
        let Some(entry) = state.entries.get_mut(at) else { return };
        entry.acked = now;
        let range = entry.range();
        let range = usize::try_from(range.start).unwrap_or(usize::MAX)
            ..usize::try_from(range.end).unwrap_or(usize::MAX);
        state.busy[range].fill(false);
        let mut seen = usize::try_from(state.seen).unwrap_or(usize::MAX);
        while state.entries.get(seen).is_some_and(|e| e.acked != Instant::NEVER) {
            seen += 1;
        }
        state.seen = u64::try_from(seen).unwrap_or(u64::MAX);
    }

    /// Writes issued so far.
    #[must_use]
    pub fn issued(&self) -> u64 {
        u64::try_from(self.lock().entries.len()).unwrap_or(u64::MAX)
    }

    /// Fills the whole region once through `write`, so that a first copy has something to copy.
    ///
    /// # Errors
    /// Of `write`.
    pub fn prime(
        &self,
        mut write: impl FnMut(u64, &[u8]) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let mut first = 0;
        while first < self.blocks {
            let blocks = u32::try_from((self.blocks - first).min(64)).unwrap_or(64);
            let Some(ticket) = self.begin(u32::MAX, first, blocks, false) else {
                return Err(std::io::Error::other("the region is in use"));
            };
            write(ticket.offset, &self.payload(&ticket))?;
            self.acknowledge(ticket);
            first += u64::from(blocks);
        }
        Ok(())
    }
}
