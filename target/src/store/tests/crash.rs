//! Power goes at every single operation of the disk; nothing acknowledged is lost, every place
//! shows exactly what it must.

use std::sync::Arc;

use farshore_extent::Lsn;

use super::source::{is_ordered, tiny, Source};
use crate::store::{Faults, SimDisk, Store, StoreError, StoreEvent};

/// One life of a store on a simulated disk, under a source with a model.
struct World {
    disk: SimDisk,
    source: Source,
    faults: Faults,
    /// Everything up to here was acknowledged.
    acked: Lsn,
    /// Nothing below may be opened any more.
    expired: Lsn,
}

impl World {
    fn new(seed: u64, faults: Faults) -> Self {
        Self {
            disk: SimDisk::new(seed ^ 0xd15c),
            source: Source::new(seed),
            faults,
            acked: Lsn::ZERO,
            expired: Lsn::ZERO,
        }
    }

    fn open(&self) -> Result<Store, StoreError> {
        let disk = Arc::new(self.disk.clone());
        match Store::open(disk.clone(), tiny(self.faults)) {
            Err(StoreError::NotAStore | StoreError::Super { .. }) if self.acked == Lsn::ZERO => {
                let meta = self.source.meta();
                Store::create(disk, &meta, tiny(self.faults)).map(|s| s.0)
            }
            other => other.map(|(store, report)| {
                assert_eq!(report.damage, [], "a power cut was taken for damage");
                store
            }),
        }
    }

    /// Appends, commits, expires for `steps` steps, or until the power goes.
    fn work(&mut self, store: &mut Store, steps: u64) -> Result<(), StoreError> {
        for _ in 0..steps {
            for _ in 0..=self.source.rng.below(3) {
                self.source.batch();
            }
            self.source.send(store);
            let committed = store.commit()?;
            assert_eq!(committed.durable, self.source.last);
            assert_eq!(committed.chain, self.source.chain);
            self.acked = committed.durable;
            self.source.acked = committed.durable;
            if self.source.rng.below(8) == 0 {
                store.prepare_reserve()?;
            }
            if self.source.rng.below(4) == 0 {
                let images: Vec<_> =
                    self.source.images.range(..=self.acked).map(|(lsn, _)| *lsn).collect();
                let some = self.source.rng.below(images.len() as u64);
                let upto = images[usize::try_from(some).unwrap()];
                self.expired = self.expired.max(upto);
                while !store.expire(upto)?.done {
                    assert!(store.position().floor <= self.expired.max(store.position().base));
                }
            }
        }
        Ok(())
    }

    /// What must hold after every start.
    fn check(&mut self, store: &Store) {
        let position = store.position();
        assert!(
            position.durable >= self.acked,
            "acknowledged {} but only {} is there",
            self.acked,
            position.durable
        );
        let batch = self.source.batches.iter().find(|b| b.header.last() == position.durable);
        assert!(position.durable == Lsn::ZERO || batch.is_some(), "a place inside a batch");
        if let Some(batch) = batch {
            assert_eq!(batch.header.chain, position.chain);
        }
        let image = self.source.images.range(..=position.durable).next_back().unwrap().1;
        assert_eq!(is_ordered(position.order), image.ordered);
        let places: Vec<_> =
            self.source.images.range(position.floor..=position.durable).map(|(l, _)| *l).collect();
        for _ in 0..4 {
            if places.is_empty() {
                break;
            }
            let some = self.source.rng.below(places.len() as u64);
            self.source.check_at(store, places[usize::try_from(some).unwrap()]);
        }
        for at in [position.floor, position.durable] {
            self.source.check_at(store, at);
        }
        self.check_points(store);
    }

    fn check_points(&self, store: &Store) {
        let position = store.position();
        let points: Vec<Lsn> = store
            .history()
            .into_iter()
            .filter_map(|e| if let StoreEvent::Point(p) = e { Some(p.lsn) } else { None })
            .collect();
        let range = position.floor.max(Lsn::ZERO)..=position.durable;
        let expected: Vec<Lsn> =
            self.source.points.iter().copied().filter(|p| range.contains(p)).collect();
        // The marker at the base itself is not in the journal any more.
        let expected: Vec<Lsn> = expected.into_iter().filter(|p| *p > position.base).collect();
        let points: Vec<Lsn> = points.into_iter().filter(|p| *p > position.base).collect();
        assert_eq!(points, expected);
    }

    /// Power is back: the store opens (perhaps after more power cuts), is right, and goes on.
    fn recover(&mut self, mut cuts: u64) -> Store {
        loop {
            self.disk.restart();
            if cuts > 0 {
                let at = self.disk.ops() + 1 + self.source.rng.below(6);
                self.disk.crash_at(Some(at));
                cuts -= 1;
            }
            match self.open() {
                Ok(store) => {
                    if self.disk.is_down() {
                        continue;
                    }
                    self.disk.crash_at(None);
                    return store;
                }
                Err(e) => assert!(self.disk.is_down(), "cannot be opened: {e}"),
            }
        }
    }
}

fn life(seed: u64, faults: Faults, crash_at: Option<u64>) -> u64 {
    let mut world = World::new(seed, faults);
    world.disk.crash_at(crash_at);
    let died = match world.open() {
        Ok(mut store) => world.work(&mut store, 14).is_err(),
        Err(_) => true,
    };
    let ops = world.disk.ops();
    assert_eq!(died, crash_at.is_some_and(|at| at <= ops), "seed {seed}: an error without a cause");
    if died {
        // An append may be durable although it was never acknowledged.
        let mut store = world.recover(seed % 3);
        world.check(&store);
        let at = store.position().durable;
        world.source.rewind(at);
        world.work(&mut store, 4).unwrap();
        world.check(&store);
        drop(store);
        let store = world.open().unwrap();
        world.check(&store);
    }
    ops
}

#[test]
fn a_power_cut_at_any_operation_loses_nothing_acknowledged_and_shows_no_wrong_byte() {
    for seed in 0..6 {
        let ops = life(seed, Faults::default(), None);
        assert!(ops > 60, "the life is too short to mean much: {ops}");
        for at in 1..=ops {
            life(seed, Faults::default(), Some(at));
        }
    }
}
