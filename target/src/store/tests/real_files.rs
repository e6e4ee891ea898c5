//! The store on real files, direct and buffered.

use std::sync::Arc;

use farshore_extent::Extent;

use super::source::{Source, tiny};
use crate::store::{Disk, Faults, FileDisk, FileKind, Store, StoreError, inspect, inspect_segment};

fn a_life(disk: &FileDisk) {
    let mut source = Source::new(77);
    let disk: Arc<dyn Disk> = Arc::new(disk.clone());
    let config = tiny(Faults::default());
    let mut store = Store::create(Arc::clone(&disk), &source.meta(), config).unwrap().0;
    let again = Store::create(Arc::clone(&disk), &source.meta(), config);
    assert!(matches!(again, Err(StoreError::InUse { .. })));
    let middle = |source: &Source| *source.images.keys().nth(source.images.len() / 2).unwrap();
    for round in 0..4 {
        for _ in 0..25 {
            source.batch();
            source.send(&mut store);
            source.acked = store.commit().unwrap().durable;
        }
        for at in source.images.range(store.position().floor..).map(|(l, _)| *l).step_by(9) {
            source.check_at(&store, at);
        }
        let upto = middle(&source);
        while !store.expire(upto).unwrap().done {}
        let position = store.position();
        drop(store);
        let report;
        (store, report) = Store::open(Arc::clone(&disk), config).unwrap();
        assert_eq!(store.position(), position);
        assert_eq!((report.damage.len(), report.torn_tail), (0, None), "round {round}");
        assert!(report.sealed > 0 && report.scanned_batches < 25);
        source.check_at(&store, position.floor);
        source.check_at(&store, position.durable);
    }
    // Anybody can read the base with any tool.
    while !store.expire(source.acked).unwrap().done {}
    let image = &source.images[&source.acked];
    let base = disk.open("base.img", FileKind::Plain).unwrap();
    for (n, tag) in image.sectors.iter().enumerate() {
        let mut got = vec![0; 512];
        base.read_at(&mut got, n as u64 * 512).unwrap();
        assert!(tag.is_none_or(|tag| got == super::source::sector(tag)));
    }
}

#[test]
fn a_store_on_real_files_keeps_every_place_over_restarts() {
    let dir = tempfile::tempdir().unwrap();
    a_life(&FileDisk::open(dir.path().join("direct")).unwrap());
    a_life(&FileDisk::open(dir.path().join("buffered")).unwrap().buffered());
}

#[test]
fn the_lock_says_who_holds_it_and_ends_with_its_holder() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FileDisk::open(dir.path()).unwrap();
    let held = disk.lock().unwrap();
    let refused = disk.lock().map(drop).unwrap_err().to_string();
    assert!(refused.contains(&format!("pid {}", std::process::id())), "{refused}");
    drop(held);
    disk.lock().map(drop).unwrap();
}

#[test]
fn holes_can_be_made_and_found() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FileDisk::open(dir.path()).unwrap();
    let file = disk.create("image", FileKind::Plain).unwrap();
    file.set_len(4 << 20).unwrap();
    file.write_at(&[7; 1 << 20], 1 << 20).unwrap();
    let all = Extent::new(0, 4 << 20).unwrap();
    let mut at = 0;
    let mut found = Vec::new();
    while let Some(rest) = Extent::between(at, all.end()) {
        let stretch = file.stretch(rest).unwrap();
        found.push((stretch.hole, stretch.end));
        at = stretch.end;
    }
    // A file system without holes says "all data", which is right as well.
    if found.len() > 1 {
        assert_eq!(found, [(true, 1 << 20), (false, 2 << 20), (true, 4 << 20)]);
        file.punch(Extent::new(1 << 20, 1 << 20).unwrap()).unwrap();
        assert!(file.stretch(all).unwrap().hole);
    }
    let mut bytes = vec![1; 16];
    file.read_at(&mut bytes, (1 << 20) + 8).unwrap();
    assert!(found.len() == 1 || bytes == [0; 16]);
    assert!(file.read_at(&mut bytes, (4 << 20) - 8).is_err());
}

#[test]
fn inspection_shows_every_batch_without_taking_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    let disk = FileDisk::open(dir.path()).unwrap();
    let mut source = Source::new(5);
    let config = tiny(Faults::default());
    let mut store = Store::create(Arc::new(disk.clone()), &source.meta(), config).unwrap().0;
    for _ in 0..60 {
        source.batch();
        source.send(&mut store);
        store.commit().unwrap();
    }
    let (sb, segments) = inspect(&disk).unwrap();
    assert_eq!(sb.volume, source.volume);
    assert!(segments.len() > 2);
    let sealed = segments.iter().filter(|s| s.trailer.is_some()).count();
    assert_eq!(sealed, segments.len() - 1);
    let batches: Vec<_> =
        segments.iter().flat_map(|s| inspect_segment(&disk, &s.name).unwrap()).collect();
    assert!(segments.iter().all(|s| s.problem.is_none()));
    let headers: Vec<_> = batches.iter().map(|b| b.header).collect();
    assert_eq!(headers, source.batches.iter().map(|b| b.header).collect::<Vec<_>>());
    assert!(batches.iter().all(|b| !b.records.is_empty() && b.problem.is_none()));
    let empty = FileDisk::open(dir.path().join("empty")).unwrap();
    assert!(matches!(inspect(&empty), Err(StoreError::NotAStore)));
}
