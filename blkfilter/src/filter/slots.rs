//! Private buffers of one queue: places in the capture pool, and arenas for everything else.

use std::io;
use std::sync::Arc;

use crate::core::PoolSlot;
use crate::device::Slot;
use crate::sys::pool::PoolMemory;
use crate::sys::ring::IoBuf;

/// Arena for small buffers: small enough to stay in the cache, registered with the ring.
const SMALL_ARENA: u64 = 2 << 20;

/// Longest buffer of the small arena, in bytes.
const SMALL: u32 = 128 << 10;

/// Arena for large buffers, mapped when the first is needed: what one front-end connection keeps
/// busy (16 MiB) and one more of its largest requests (32 MiB).
const LARGE_ARENA: u64 = 48 << 20;

/// A reserved buffer.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) buf: IoBuf,
    /// Its place in the capture pool; none: a spare.
    pub(super) place: Option<PoolSlot>,
}

#[derive(Debug)]
enum Place {
    Vacant,
    /// Its buffer is in an operation.
    Lent,
    Held(Held),
}

/// All buffers of a queue by slot key.
#[derive(Debug)]
pub(super) struct Slots {
    places: Vec<Place>,
    vacant: Vec<u64>,
    small: Arc<PoolMemory>,
    large: Option<Arc<PoolMemory>>,
}

impl Slots {
    pub(super) fn new() -> io::Result<Self> {
        let small = PoolMemory::private(SMALL_ARENA)?;
        Ok(Self { places: Vec::new(), vacant: Vec::new(), small, large: None })
    }

    /// The arena worth registering with the ring.
    pub(super) fn small_arena(&self) -> Arc<PoolMemory> {
        Arc::clone(&self.small)
    }

    /// A buffer outside of the capture pool.
    pub(super) fn arena(&mut self, len: u32) -> Option<IoBuf> {
        if len <= SMALL
            && let Some(slice) = self.small.reserve(len)
        {
            return Some(IoBuf::Pool(slice));
        }
        if self.large.is_none() {
            self.large = PoolMemory::private(LARGE_ARENA).ok();
        }
        self.large.as_ref()?.reserve(len).map(IoBuf::Pool)
    }

    pub(super) fn insert(&mut self, held: Held) -> Slot {
        let len = u32::try_from(held.buf.len()).unwrap_or(u32::MAX);
        let key = self.vacant.pop().unwrap_or_else(|| {
            self.places.push(Place::Vacant);
            self.places.len() as u64 - 1
        });
        *self.place(key) = Place::Held(held);
        Slot { key, len }
    }

    fn place(&mut self, key: u64) -> &mut Place {
        // Slots come from `insert` only and belong to this queue: the front end's rule.
        let index = usize::try_from(key).unwrap_or(usize::MAX);
        &mut self.places[index]
    }

    pub(super) fn bytes(&mut self, slot: &Slot) -> &mut [u8] {
        match self.place(slot.key) {
            Place::Held(held) => held.buf.bytes_mut(),
            Place::Vacant | Place::Lent => &mut [],
        }
    }

    /// Takes the buffer out for good.
    pub(super) fn remove(&mut self, slot: &Slot) -> Option<Held> {
        match std::mem::replace(self.place(slot.key), Place::Vacant) {
            Place::Held(held) => {
                self.vacant.push(slot.key);
                Some(held)
            }
            Place::Vacant | Place::Lent => None,
        }
    }

    /// Takes the buffer out for an operation that gives it back.
    pub(super) fn lend(&mut self, slot: &Slot) -> Option<Held> {
        match std::mem::replace(self.place(slot.key), Place::Lent) {
            Place::Held(held) => Some(held),
            Place::Vacant | Place::Lent => None,
        }
    }

    pub(super) fn give_back(&mut self, key: u64, held: Held) {
        *self.place(key) = Place::Held(held);
    }

    /// Everything that is still held: the queue is going away.
    pub(super) fn clear(&mut self) -> impl Iterator<Item = Held> {
        self.places.drain(..).filter_map(|place| match place {
            Place::Held(held) => Some(held),
            Place::Vacant | Place::Lent => None,
        })
    }
}
