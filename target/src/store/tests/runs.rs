//! Places are reached through runs over many segments: quickly, rightly, and whatever becomes of
//! the runs.

use std::sync::Arc;

use farshore_extent::Lsn;

use super::source::{Source, tiny};
use crate::store::{Disk, Faults, FileKind, SimDisk, Store, StoreConfig, StoreError};

/// A segment holds a few batches.
fn config(faults: Faults) -> StoreConfig {
    StoreConfig { segment_bytes: 28 << 10, ..tiny(faults) }
}

fn open(disk: &SimDisk) -> Store {
    Store::open(Arc::new(disk.clone()), config(Faults::default())).unwrap().0
}

/// A store with so many batches, one commit each.
fn filled(disk: &SimDisk, seed: u64, batches: usize) -> (Store, Source) {
    let mut source = Source::new(seed);
    let created = Store::create(Arc::new(disk.clone()), &source.meta(), config(Faults::default()));
    let mut store = created.unwrap().0;
    add(&mut store, &mut source, batches).unwrap();
    (store, source)
}

fn add(store: &mut Store, source: &mut Source, batches: usize) -> Result<(), StoreError> {
    for _ in 0..batches {
        source.batch();
        source.send(store);
        source.acked = store.commit()?.durable;
    }
    Ok(())
}

fn merge_all(store: &mut Store) {
    while store.merge_runs().unwrap() {}
}

fn check_all(store: &Store, source: &Source) {
    let at = store.position();
    for place in source.images.range(at.floor..=at.durable).map(|(place, _)| *place) {
        source.check_at(store, place);
    }
}

fn names_of_runs(disk: &SimDisk) -> Vec<String> {
    let names = disk.list().unwrap();
    names.into_iter().filter(|name| name.starts_with("run")).collect()
}

#[test]
fn every_place_is_right_through_runs_of_every_level_before_and_after_expiry_and_a_restart() {
    let disk = SimDisk::new(1);
    let (mut store, mut source) = filled(&disk, 1, 110);
    check_all(&store, &source);
    let plain = store.open_unordered_view(source.acked).unwrap().layers();
    merge_all(&mut store);
    assert!(store.segments.len() > 16, "too few segments: {}", store.segments.len());
    let view = store.open_unordered_view(source.acked).unwrap();
    // Five levels of two, the open segment, and the ends that are not merged yet.
    assert!(view.layers() <= 8 && view.layers() * 3 <= plain, "{} of {plain}", view.layers());
    assert!(view.runs() > 0);
    drop(view);
    check_all(&store, &source);
    for step in [3, 2] {
        let places: Vec<Lsn> = source.images.range(..=source.acked).map(|(l, _)| *l).collect();
        let upto = places[places.len() / step];
        while !store.expire(upto).unwrap().done {
            source.check_at(&store, source.acked);
        }
        assert!(store.position().base > Lsn::ZERO);
        check_all(&store, &source);
        let before = store.run_size();
        drop(store);
        store = open(&disk);
        assert_eq!(store.run_size(), before, "a restart takes the runs that are there");
        check_all(&store, &source);
        add(&mut store, &mut source, 20).unwrap();
        merge_all(&mut store);
        check_all(&store, &source);
    }
    while !store.expire(source.acked).unwrap().done {}
    assert!(names_of_runs(&disk).len() <= 1, "what nobody needs is kept");
}

#[test]
fn a_view_outlives_the_runs_it_reads() {
    let disk = SimDisk::new(2);
    let (mut store, source) = filled(&disk, 2, 60);
    merge_all(&mut store);
    let held = source.acked;
    let view = store.open_unordered_view(held).unwrap();
    assert!(view.runs() > 0);
    while !store.expire(held).unwrap().done {}
    assert_eq!(store.run_size().0, 0);
    super::source::assert_same(&view, &source.images[&held]);
}

#[test]
fn a_damaged_run_is_not_believed_and_not_needed() {
    let disk = SimDisk::new(3);
    let (mut store, source) = filled(&disk, 3, 60);
    merge_all(&mut store);
    let names = names_of_runs(&disk);
    assert!(names.len() > 8);
    for (n, name) in (0u64..).zip(&names) {
        let len = disk.open(name, FileKind::Plain).and_then(|file| file.len()).unwrap();
        // In the header, the entries, and the bitmap behind them.
        for at in [40, 4096 + n % 16, len - 4096 + n % 64] {
            assert!(disk.rot(name, at, 4));
            check_all(&store, &source);
            let again = {
                drop(store);
                open(&disk)
            };
            store = again;
            check_all(&store, &source);
            merge_all(&mut store);
            check_all(&store, &source);
            if disk.list().unwrap().contains(name) {
                disk.rot(name, at, 4);
            }
            drop(store);
            store = open(&disk);
            merge_all(&mut store);
        }
    }
    assert_eq!(names_of_runs(&disk), names);
}

#[test]
fn a_run_under_another_name_or_of_a_lost_history_is_removed() {
    let disk = SimDisk::new(4);
    let (mut store, source) = filled(&disk, 4, 60);
    merge_all(&mut store);
    let newest = store.segments.last().unwrap().id();
    drop(store);
    disk.rename("run-01-0000000000000002", "run-01-0000000000000100").unwrap();
    // Without the newest sealed segment, the runs that speak of it are of another history.
    disk.rename(&format!("seg-{newest}"), "elsewhere").unwrap();
    let store = open(&disk);
    let names = names_of_runs(&disk);
    assert!(!names.contains(&"run-01-0000000000000100".to_owned()), "{names:?}");
    assert!(store.position().durable < source.acked);
    check_all(&store, &source);
}

#[test]
fn a_full_disk_costs_only_runs() {
    let disk = SimDisk::new(5);
    let (mut store, source) = filled(&disk, 5, 60);
    disk.set_capacity(Some(disk.used() + 9000));
    merge_all(&mut store);
    assert!(names_of_runs(&disk).iter().all(|name| name != "run.new"));
    assert_eq!(store.poisoned(), None);
    check_all(&store, &source);
    disk.set_capacity(None);
    store.wake_merge();
    merge_all(&mut store);
    check_all(&store, &source);
    assert!(store.run_size().0 > 10);
}

/// Some life with power cuts while runs are made; every operation of the disk in turn.
#[test]
fn a_power_cut_while_runs_are_made_harms_nothing() {
    let life = |cut: Option<u64>| {
        let disk = SimDisk::new(6);
        let (mut store, mut source) = filled(&disk, 6, 24);
        let start = disk.ops();
        disk.crash_at(cut.map(|n| start + n));
        let mut work = || -> Result<(), StoreError> {
            for n in 0..6 {
                while store.merge_runs()? {}
                add(&mut store, &mut source, 4)?;
                if n % 2 == 1 {
                    let places: Vec<Lsn> =
                        source.images.range(..=source.acked).map(|(l, _)| *l).collect();
                    while !store.expire(places[places.len() / 4])?.done {
                        store.merge_runs()?;
                    }
                }
            }
            Ok(())
        };
        let died = work().is_err();
        let ops = disk.ops() - start;
        assert_eq!(died, cut.is_some_and(|n| n <= ops));
        drop(store);
        disk.crash();
        disk.restart();
        let mut store = open(&disk);
        let at = store.position();
        assert!(at.durable >= source.acked);
        source.rewind(at.durable);
        check_all(&store, &source);
        merge_all(&mut store);
        check_all(&store, &source);
        ops
    };
    let ops = life(None);
    assert!(ops > 60, "{ops}");
    (1..=ops).for_each(|n| {
        life(Some(n));
    });
}
