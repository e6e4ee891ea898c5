//! Room in a pool, given and taken back as in a ring: contiguous, whole pages, first in first out.
//!
//! Room is used until every record that refers to it is released; the ring's tail moves on when
//! the oldest room is unused. A payload never wraps: when the end is too near, the rest up to the
//! end is given away as padding.

use std::collections::VecDeque;

use super::event::PoolSlot;

#[derive(Debug)]
struct Room {
    start: u64,
    len: u64,
    /// Records, or the request in flight, that need it; padding has none.
    users: u32,
}

/// The allocator of one pool.
#[derive(Debug)]
pub(super) struct PoolRing {
    capacity: u64,
    align: u64,
    rooms: VecDeque<Room>,
    /// Ticket of the first of `rooms`.
    first: u64,
    head: u64,
    used: u64,
}

impl PoolRing {
    pub(super) fn new(capacity: u64, align: u64) -> Self {
        Self {
            capacity: capacity - capacity % align,
            align,
            rooms: VecDeque::new(),
            first: 0,
            head: 0,
            used: 0,
        }
    }

    /// Room for `len` bytes with one user, or `None` when there is not that much in one piece.
    pub(super) fn reserve(&mut self, len: u32) -> Option<PoolSlot> {
        let need = u64::from(len).max(1).next_multiple_of(self.align);
        let Some(oldest) = self.rooms.front() else {
            self.head = 0;
            return (need <= self.capacity).then(|| self.push(need, len));
        };
        let tail = oldest.start;
        if self.head > tail {
            let to_end = self.capacity - self.head;
            if need <= to_end {
                return Some(self.push(need, len));
            }
            if need > tail {
                return None;
            }
            if to_end > 0 {
                self.rooms.push_back(Room { start: self.head, len: to_end, users: 0 });
                self.used += to_end;
            }
            self.head = 0;
            return Some(self.push(need, len));
        }
        // The used part wraps (head == tail: all of it is used).
        (need <= tail - self.head).then(|| self.push(need, len))
    }

    fn push(&mut self, need: u64, len: u32) -> PoolSlot {
        let offset = self.head;
        let ticket = self.first + self.rooms.len() as u64;
        self.rooms.push_back(Room { start: offset, len: need, users: 1 });
        self.used += need;
        self.head += need;
        PoolSlot { ticket, offset, len }
    }

    fn room(&mut self, ticket: u64) -> Option<&mut Room> {
        let index = usize::try_from(ticket.checked_sub(self.first)?).ok()?;
        self.rooms.get_mut(index)
    }

    /// One more user of the room.
    pub(super) fn add_user(&mut self, ticket: u64) {
        if let Some(room) = self.room(ticket) {
            room.users += 1;
        }
    }

    /// One user less; the last one frees the room.
    pub(super) fn drop_user(&mut self, ticket: u64) {
        let Some(room) = self.room(ticket) else { return };
        room.users = room.users.saturating_sub(1);
        while let Some(room) = self.rooms.front().filter(|room| room.users == 0) {
            self.used -= room.len;
            self.rooms.pop_front();
            self.first += 1;
        }
    }

    /// Bytes that cannot be given out now, padding included.
    pub(super) const fn used(&self) -> u64 {
        self.used
    }

    pub(super) const fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The copy loop may fill the pool no further than half.
    pub(super) const fn at_least_half_full(&self) -> bool {
        self.used.saturating_mul(2) >= self.capacity
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn room_in_use_is_never_given_out_twice(
            steps in prop::collection::vec((any::<bool>(), 1u32..9000, any::<prop::sample::Index>()), 1..200),
        ) {
            let mut ring = PoolRing::new(16 * 512, 512);
            let mut live: Vec<PoolSlot> = Vec::new();
            for (reserve, len, which) in steps {
                if reserve {
                    let Some(slot) = ring.reserve(len) else {
                        prop_assert!(!live.is_empty() || len > 16 * 512, "an empty ring has room");
                        continue;
                    };
                    let end = slot.offset + u64::from(len);
                    prop_assert!(slot.offset % 512 == 0 && end <= 16 * 512);
                    for other in &live {
                        let apart = end <= other.offset || other.offset + u64::from(other.len) <= slot.offset;
                        prop_assert!(apart, "{slot:?} {other:?}");
                    }
                    live.push(slot);
                } else if !live.is_empty() {
                    let slot = live.swap_remove(which.index(live.len()));
                    ring.drop_user(slot.ticket);
                }
            }
            for slot in live {
                ring.drop_user(slot.ticket);
            }
            prop_assert_eq!(ring.used(), 0);
        }
    }

    #[test]
    fn below_half_a_quarter_always_fits() {
        for head in 0..16 {
            let mut ring = PoolRing::new(16 * 512, 512);
            let lead: Vec<_> = (0..head).filter_map(|_| ring.reserve(512)).collect();
            let body: Vec<_> = (0..7).filter_map(|_| ring.reserve(512)).collect();
            lead.iter().for_each(|slot| ring.drop_user(slot.ticket));
            if !ring.at_least_half_full() {
                assert!(ring.reserve(4 * 512).is_some(), "head at {head}, {} live", body.len());
            }
        }
    }
}
