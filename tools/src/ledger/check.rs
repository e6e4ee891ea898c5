//! Is this image a consistent cut? The proof the demo and the system tests rest on.

use std::io;
use std::sync::PoisonError;

use super::block::{BLOCK, BlockContent, BlockHeader};
use super::history::{Entry, Instant, Ledger};

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

/// What is known about the instant that an image shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Everything acknowledged before this must be there.
    pub not_before: Instant,
    /// Nothing issued after this may be there.
    pub not_after: Instant,
}

impl Bounds {
    /// Nothing is known: any consistent cut will do.
    pub const ANY: Self = Self { not_before: Instant(0), not_after: Instant::NEVER };
}

/// A proven cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutReport {
    /// Blocks looked at.
    pub blocks: u64,
    /// Writes the image holds or held before they were overwritten.
    pub writes: u64,
    /// Number of the newest of them.
    pub newest: u64,
    /// Writes in flight at the cut: issued before the newest one, yet not in.
    pub left_out: u64,
}

/// Why an image is no cut.
#[derive(Debug, thiserror::Error)]
pub enum Violation {
    /// It cannot be read.
    #[error("the image cannot be read at byte {offset}: {source}")]
    Unreadable {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// A block is neither zero nor whole.
    #[error("block {block} is damaged")]
    Damaged {
        /// Which, counted from the start of the region.
        block: u64,
    },
    /// A block holds something that was never written there.
    #[error("block {block} holds what was never written there: write {number} of block {claimed}")]
    Foreign {
        /// Where it is.
        block: u64,
        /// What it says it is.
        number: u64,
        /// Where it says it belongs.
        claimed: u64,
    },
    /// A write is missing although the cut contains something that came after it.
    #[error("write {number} is missing from block {block}, which holds write {holds}: {why}")]
    Lost {
        /// The missing write.
        number: u64,
        /// Where it should be.
        block: u64,
        /// What is there; 0 is nothing.
        holds: u64,
        /// Why it must be there.
        why: &'static str,
    },
    /// Something was written after the point.
    #[error("write {number} in block {block} was issued after the point")]
    Future {
        /// Which.
        number: u64,
        /// Where.
        block: u64,
    },
}

const ACKED_BEFORE_POINT: &str = "it was acknowledged before the point was asked for";
const ACKED_BEFORE_ANOTHER: &str = "it was acknowledged before another write in the image began";
const TORN: &str = "another part of the same write is in the image";

/// The cut being worked out: which write each block shows.
struct Cut<'a> {
    entries: &'a [Entry],
    /// Number of the write whose content, or zeroes, the block shows; 0 is the first state.
    shown: Vec<u64>,
    /// Blocks that read as zero: any write of zeroes may be the one shown.
    zero: Vec<bool>,
    /// Everything acknowledged before this must be in.
    horizon: Instant,
}

fn number(at: usize) -> u64 {
    u64::try_from(at).map_or(u64::MAX, |n| n + 1)
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

impl Ledger {
    /// Proves that the image is a consistent cut of this ledger's writes within `bounds`.
    /// `read` fills its buffer from a byte offset of the volume.
    ///
    /// # Errors
    /// The first [`Violation`].
    pub fn check(
        &self,
        mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
        bounds: Bounds,
    ) -> Result<CutReport, Violation> {
        let content = self.scan(&mut read)?;
        // Nothing issued after the scan can be in the image; copying keeps the writers going.
        let entries = {
            let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.entries.clone()
        };
        let mut cut = Cut {
            entries: &entries,
            shown: vec![0; content.len()],
            zero: content.iter().map(|c| *c == BlockContent::Zero).collect(),
            horizon: bounds.not_before,
        };
        for (block, content) in (0u64..).zip(&content) {
            if let BlockContent::Written(header) = content {
                cut.shown[index(block)] = self.written(&entries, block, header)?;
            }
        }
        cut.close(bounds)?;
        cut.require_nothing_later(bounds.not_after)?;
        Ok(cut.report())
    }

    fn scan(
        &self,
        read: &mut impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> Result<Vec<BlockContent>, Violation> {
        let mut content = Vec::with_capacity(index(self.blocks));
        let end = self.base + self.blocks * BLOCK as u64;
        let mut chunk = vec![0; CHUNK];
        let mut offset = self.base;
        while offset < end {
            let len = index(end - offset).min(CHUNK);
            let bytes = &mut chunk[..len];
            read(offset, bytes).map_err(|source| Violation::Unreadable { offset, source })?;
            for one in bytes.chunks_exact(BLOCK) {
                let mut block = [0; BLOCK];
                block.copy_from_slice(one);
                match BlockHeader::decode(&block) {
                    BlockContent::Damaged => {
                        let block = u64::try_from(content.len()).unwrap_or(u64::MAX);
                        return Err(Violation::Damaged { block });
                    }
                    whole => content.push(whole),
                }
            }
            offset += u64::try_from(len).unwrap_or(u64::MAX);
        }
        Ok(content)
    }

    /// The number of a block's write, when the history knows exactly this write of this block.
    fn written(
        &self,
        entries: &[Entry],
        block: u64,
        header: &BlockHeader,
    ) -> Result<u64, Violation> {
        let entry = header.number.checked_sub(1).and_then(|at| entries.get(index(at)));
        let same = entry.is_some_and(|e| {
            header.run == self.run
                && header.block == block
                && e.range().contains(&block)
                && !e.zero
                && e.seen == header.seen
                && e.writer == header.writer
        });
        if same {
            Ok(header.number)
        } else {
            Err(Violation::Foreign { block, number: header.number, claimed: header.block })
        }
    }
}

impl Cut<'_> {
    /// Closes the cut under "acknowledged before" and "whole writes", choosing for zero blocks the
    /// earliest write of zeroes that is allowed: the least such cut, so a violation is a real one.
    fn close(&mut self, bounds: Bounds) -> Result<(), Violation> {
        loop {
            let shown = self.shown.iter().filter_map(|n| n.checked_sub(1));
            let newest = shown.map(|at| self.entries[index(at)].issued).max();
            self.horizon = self.horizon.max(newest.unwrap_or_default());
            let mut changed = false;
            for at in 0..self.entries.len() {
                let entry = self.entries[at];
                let blocks = index(entry.first)..index(entry.range().end);
                let partly = || self.shown[blocks].iter().any(|shown| *shown >= number(at));
                let why = if entry.acked < bounds.not_before {
                    ACKED_BEFORE_POINT
                } else if entry.acked < self.horizon {
                    ACKED_BEFORE_ANOTHER
                } else if partly() {
                    TORN
                } else {
                    continue;
                };
                changed |= self.require(at, why)?;
            }
            if !changed {
                return Ok(());
            }
        }
    }

    /// Every block of the entry must show it or something later; whether a zero block moved.
    fn require(&mut self, at: usize, why: &'static str) -> Result<bool, Violation> {
        let mut changed = false;
        let wanted = number(at);
        for block in self.entries[at].range() {
            let holds = self.shown[index(block)];
            if holds >= wanted {
                continue;
            }
            let zeroes = self.zero[index(block)].then(|| self.first_zero(block, at)).flatten();
            let lost = Violation::Lost { number: wanted, block, holds, why };
            self.shown[index(block)] = zeroes.ok_or(lost)?;
            changed = true;
        }
        Ok(changed)
    }

    /// The first write of zeroes to `block` at or after the entry.
    fn first_zero(&self, block: u64, from: usize) -> Option<u64> {
        let later = self.entries.iter().enumerate().skip(from);
        later.filter(|(_, e)| e.zero && e.range().contains(&block)).map(|(at, _)| number(at)).next()
    }

    fn require_nothing_later(&self, limit: Instant) -> Result<(), Violation> {
        for (block, shown) in (0u64..).zip(&self.shown) {
            let entry = shown.checked_sub(1).map(|at| self.entries[index(at)]);
            if entry.is_some_and(|e| e.issued > limit) {
                return Err(Violation::Future { number: *shown, block });
            }
        }
        Ok(())
    }

    fn report(&self) -> CutReport {
        let newest = self.shown.iter().copied().max().unwrap_or(0);
        let inside = |entry: &Entry, n: u64| entry.range().any(|b| self.shown[index(b)] >= n);
        let below = self.entries.iter().take(index(newest)).enumerate();
        let writes = below.filter(|(at, e)| inside(e, number(*at))).count();
        let writes = u64::try_from(writes).unwrap_or(u64::MAX);
        let blocks = u64::try_from(self.shown.len()).unwrap_or(u64::MAX);
        CutReport { blocks, writes, newest, left_out: newest - writes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Ticket;

    /// A disk in memory whose state after every write is kept.
    struct Disk {
        ledger: Ledger,
        now: Vec<u8>,
    }

    impl Disk {
        fn new(blocks: u64) -> Self {
            let len = blocks * BLOCK as u64;
            Self { ledger: Ledger::new(0, len), now: vec![0; index(len)] }
        }

        fn apply(&mut self, ticket: &Ticket) {
            let range = index(ticket.offset)..index(ticket.offset) + index(u64::from(ticket.len));
            if ticket.zero {
                self.now[range].fill(0);
            } else {
                self.now[range].copy_from_slice(&self.ledger.payload(ticket));
            }
        }

        fn write(&mut self, first: u64, blocks: u32, zero: bool) {
            let ticket = self.ledger.begin(1, first, blocks, zero).unwrap();
            self.apply(&ticket);
            self.ledger.acknowledge(ticket);
        }

        fn check(&self, image: &[u8], bounds: Bounds) -> Result<CutReport, Violation> {
            let read = |offset: u64, to: &mut [u8]| {
                let at = index(offset);
                to.copy_from_slice(&image[at..at + to.len()]);
                Ok(())
            };
            self.ledger.check(read, bounds)
        }
    }

    fn patch(image: &mut [u8], from: &[u8], block: usize) {
        let range = block * BLOCK..(block + 1) * BLOCK;
        image[range.clone()].copy_from_slice(&from[range]);
    }

    #[test]
    fn every_state_the_disk_had_is_a_cut_and_bounds_tell_them_apart() {
        let mut disk = Disk::new(16);
        let mut states = vec![(disk.ledger.now(), disk.now.clone())];
        for i in 0..40u32 {
            let first = u64::from(i) * 7 % 13;
            disk.write(first, 1 + i % 3, i % 9 == 4);
            states.push((disk.ledger.now(), disk.now.clone()));
        }
        for (at, state) in &states {
            let exactly = Bounds { not_before: *at, not_after: *at };
            disk.check(state, exactly).unwrap();
            disk.check(state, Bounds::ANY).unwrap();
        }
        let (early, late) = (&states[10], &states[30]);
        let after = Bounds { not_before: late.0, not_after: Instant::NEVER };
        assert!(matches!(disk.check(&early.1, after), Err(Violation::Lost { .. })));
        let before = Bounds { not_before: Instant(0), not_after: early.0 };
        assert!(matches!(disk.check(&late.1, before), Err(Violation::Future { .. })));
    }

    #[test]
    fn a_missing_write_below_a_present_one_is_found() {
        let mut disk = Disk::new(8);
        disk.write(1, 1, false);
        let before = disk.now.clone();
        disk.write(2, 1, false);
        disk.write(3, 1, false);
        let mut image = disk.now.clone();
        patch(&mut image, &before, 2);
        let found = disk.check(&image, Bounds::ANY);
        assert!(matches!(found, Err(Violation::Lost { number: 2, block: 2, .. })), "{found:?}");
    }

    #[test]
    fn writes_in_flight_together_may_be_in_or_not_but_never_in_half() {
        let mut disk = Disk::new(8);
        let (a, b) = (
            disk.ledger.begin(1, 0, 1, false).unwrap(),
            disk.ledger.begin(2, 2, 2, false).unwrap(),
        );
        assert!(disk.ledger.begin(3, 3, 1, false).is_none(), "its block is in flight");
        disk.apply(&b);
        let report = disk.check(&disk.now, Bounds::ANY).unwrap();
        assert_eq!((report.writes, report.newest, report.left_out), (1, 2, 1));
        let mut torn = disk.now.clone();
        torn[3 * BLOCK..4 * BLOCK].fill(0);
        let found = disk.check(&torn, Bounds::ANY);
        assert!(matches!(found, Err(Violation::Lost { number: 2, block: 3, .. })), "{found:?}");
        disk.apply(&a);
        disk.ledger.acknowledge(a);
        disk.ledger.acknowledge(b);
        assert_eq!(disk.check(&disk.now, Bounds::ANY).unwrap().left_out, 0);
    }

    #[test]
    fn damaged_misplaced_and_stale_blocks_are_found() {
        let mut disk = Disk::new(8);
        disk.write(0, 4, false);
        let old = disk.now.clone();
        disk.write(1, 1, false);
        disk.write(2, 1, true);
        let good = disk.now.clone();
        disk.check(&good, Bounds::ANY).unwrap();

        let mut damaged = good.clone();
        damaged[3 * BLOCK + 2000] ^= 1;
        assert!(matches!(disk.check(&damaged, Bounds::ANY), Err(Violation::Damaged { block: 3 })));

        let mut moved = good.clone();
        moved.copy_within(0..BLOCK, 5 * BLOCK);
        assert!(matches!(disk.check(&moved, Bounds::ANY), Err(Violation::Foreign { .. })));

        let mut stale = good.clone();
        patch(&mut stale, &old, 1);
        let now = Bounds { not_before: disk.ledger.now(), not_after: Instant::NEVER };
        assert!(matches!(disk.check(&stale, now), Err(Violation::Lost { number: 2, .. })));

        let mut unzeroed = good;
        patch(&mut unzeroed, &old, 2);
        assert!(matches!(disk.check(&unzeroed, now), Err(Violation::Lost { number: 3, .. })));
    }
}
