//! Who may touch which range of a volume: writes and zeroes alone, copy reads together.
//!
//! First come first served: a request waits for every earlier one that overlaps and conflicts,
//! also for those that still wait themselves. So nobody starves, and as everybody waits only for
//! earlier ones, there is no deadlock.

use farshore_extent::Extent;

use super::event::IoKey;

/// Place of a held or wanted range.
pub(super) type LockKey = u32;

/// How a range is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sharing {
    /// Writes, zeroes.
    Exclusive,
    /// Copy reads.
    Shared,
}

#[derive(Debug)]
struct Claim {
    owner: IoKey,
    /// Earlier claims that have to go first.
    waits_for: u32,
    /// Later claims that wait for this one. Keeps its memory when the place is used again.
    waiting: Vec<LockKey>,
}

/// The claims of one volume. A scan over all of them is cheaper than a tree up to some hundred in
/// flight, and more than that the front ends do not allow.
#[derive(Debug, Default)]
pub(super) struct RangeLock {
    /// Start, end and sharing by place; an empty range marks a free place.
    spans: Vec<(u64, u64, bool)>,
    claims: Vec<Claim>,
    free: Vec<LockKey>,
}

impl RangeLock {
    /// Claims `extent`; the flag tells whether it is held already.
    pub(super) fn claim(&mut self, owner: IoKey, extent: Extent, how: Sharing) -> (LockKey, bool) {
        let (start, end) = (extent.offset(), extent.end());
        let shared = how == Sharing::Shared;
        let place = self.free.pop().unwrap_or_else(|| {
            self.spans.push((0, 0, false));
            self.claims.push(Claim { owner, waits_for: 0, waiting: Vec::new() });
            u32::try_from(self.spans.len() - 1).unwrap_or(u32::MAX)
        });
        let mut waits_for = 0;
        for (other, &(s, e, other_shared)) in self.spans.iter().enumerate() {
            if s < end && start < e && !(shared && other_shared) {
                self.claims[other].waiting.push(place);
                waits_for += 1;
            }
        }
        let index = place as usize;
        self.spans[index] = (start, end, shared);
        self.claims[index].owner = owner;
        self.claims[index].waits_for = waits_for;
        (place, waits_for == 0)
    }

    /// Gives a held range back; `granted` gets the owners that hold theirs now, in the order in
    /// which they came.
    pub(super) fn unlock(&mut self, key: LockKey, granted: &mut Vec<IoKey>) {
        let index = key as usize;
        self.spans[index] = (0, 0, false);
        let mut waiting = std::mem::take(&mut self.claims[index].waiting);
        for place in waiting.drain(..) {
            let claim = &mut self.claims[place as usize];
            claim.waits_for -= 1;
            if claim.waits_for == 0 {
                granted.push(claim.owner);
            }
        }
        self.claims[index].waiting = waiting;
        self.free.push(key);
    }

    /// Held and wanted ranges.
    pub(super) fn claims(&self) -> usize {
        self.spans.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn io(index: u32) -> IoKey {
        IoKey { index, round: 0 }
    }

    fn ext(offset: u64, len: u64) -> Extent {
        Extent::new(offset, len).unwrap()
    }

    #[test]
    fn a_later_request_never_overtakes_an_earlier_one_on_the_same_range() {
        let mut lock = RangeLock::default();
        let mut granted = Vec::new();
        let (a, held) = lock.claim(io(1), ext(0, 8), Sharing::Exclusive);
        assert!(held);
        let (b, held) = lock.claim(io(2), ext(4, 8), Sharing::Exclusive);
        assert!(!held);
        // Free of a, but behind b.
        let (c, held) = lock.claim(io(3), ext(10, 4), Sharing::Exclusive);
        assert!(!held);
        let (_, held) = lock.claim(io(4), ext(100, 4), Sharing::Exclusive);
        assert!(held, "another range is another matter");
        lock.unlock(a, &mut granted);
        assert_eq!(granted, [io(2)]);
        granted.clear();
        lock.unlock(b, &mut granted);
        assert_eq!(granted, [io(3)]);
        granted.clear();
        lock.unlock(c, &mut granted);
        assert!(granted.is_empty());
        assert_eq!(lock.claims(), 1);
    }

    #[test]
    fn copy_reads_share_and_writes_wait_for_all_of_them() {
        let mut lock = RangeLock::default();
        let mut granted = Vec::new();
        let (a, held_a) = lock.claim(io(1), ext(0, 8), Sharing::Shared);
        let (b, held_b) = lock.claim(io(2), ext(0, 8), Sharing::Shared);
        assert!(held_a && held_b);
        let (w, held) = lock.claim(io(3), ext(2, 2), Sharing::Exclusive);
        assert!(!held);
        let (_, held) = lock.claim(io(4), ext(0, 4), Sharing::Shared);
        assert!(!held, "a later reader does not starve the writer");
        lock.unlock(b, &mut granted);
        assert!(granted.is_empty());
        lock.unlock(a, &mut granted);
        assert_eq!(granted, [io(3)]);
        granted.clear();
        lock.unlock(w, &mut granted);
        assert_eq!(granted, [io(4)]);
    }
}
