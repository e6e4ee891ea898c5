//! A bounded map that forgets what was used longest ago.

use std::collections::BTreeMap;

pub(crate) struct Cache<K, V> {
    values: BTreeMap<K, (u64, V)>,
    by_age: BTreeMap<u64, K>,
    tick: u64,
    capacity: usize,
}

impl<K: Ord + Clone, V: Clone> Cache<K, V> {
    pub(crate) const fn new(capacity: usize) -> Self {
        Self { values: BTreeMap::new(), by_age: BTreeMap::new(), tick: 0, capacity }
    }

    pub(crate) fn get(&mut self, key: &K) -> Option<V> {
        let (used, value) = self.values.get_mut(key)?;
        self.tick += 1;
        self.by_age.remove(used);
        *used = self.tick;
        self.by_age.insert(self.tick, key.clone());
        Some(value.clone())
    }

    pub(crate) fn put(&mut self, key: K, value: V) {
        self.tick += 1;
        if let Some((used, _)) = self.values.insert(key.clone(), (self.tick, value)) {
            self.by_age.remove(&used);
        }
        self.by_age.insert(self.tick, key);
        if self.values.len() > self.capacity
            && let Some((_, oldest)) = self.by_age.pop_first()
        {
            self.values.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_keeps_what_is_used_and_never_grows() {
        let mut cache = Cache::new(3);
        for n in 0..100 {
            cache.put(n, n * 2);
            assert_eq!(cache.get(&0), Some(0));
        }
        assert_eq!(cache.values.len(), 3);
        assert_eq!(cache.by_age.len(), 3);
        assert_eq!(cache.get(&99), Some(198));
        assert_eq!(cache.get(&50), None);
    }
}
