//! Requests in flight by a small key. A key used twice is noticed: each use has its round.

use super::event::IoKey;

#[derive(Debug)]
struct Place<T> {
    round: u32,
    value: Option<T>,
}

/// Values by [`IoKey`]; a free place is used again, so there is no allocation in steady state.
#[derive(Debug)]
pub(super) struct Slab<T> {
    places: Vec<Place<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(super) const fn new() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }

    pub(super) fn insert(&mut self, value: T) -> IoKey {
        if let Some(index) = self.free.pop() {
            let place = &mut self.places[index as usize];
            place.value = Some(value);
            return IoKey { index, round: place.round };
        }
        let index = u32::try_from(self.places.len()).unwrap_or(u32::MAX);
        self.places.push(Place { round: 0, value: Some(value) });
        IoKey { index, round: 0 }
    }

    pub(super) fn get(&self, key: IoKey) -> Option<&T> {
        let place = self.places.get(key.index as usize).filter(|p| p.round == key.round)?;
        place.value.as_ref()
    }

    pub(super) fn get_mut(&mut self, key: IoKey) -> Option<&mut T> {
        let place = self.places.get_mut(key.index as usize).filter(|p| p.round == key.round)?;
        place.value.as_mut()
    }

    pub(super) fn remove(&mut self, key: IoKey) -> Option<T> {
        let place = self.places.get_mut(key.index as usize).filter(|p| p.round == key.round)?;
        let value = place.value.take()?;
        place.round = place.round.wrapping_add(1);
        self.free.push(key.index);
        Some(value)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.places.iter().filter_map(|p| p.value.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_good_for_one_use() {
        let mut slab = Slab::new();
        let a = slab.insert('a');
        assert_eq!(slab.get(a), Some(&'a'));
        assert_eq!(slab.remove(a), Some('a'));
        let b = slab.insert('b');
        assert_eq!(slab.remove(a), None, "the old key does not reach the new value");
        assert_eq!(slab.iter().count(), 1);
        assert_eq!(slab.remove(b), Some('b'));
    }
}
