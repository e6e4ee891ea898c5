//! The base and its checksums: rot, losses, images from elsewhere, the way back to a whole state.

use std::sync::Arc;

use farshore_changelog::{BatchBuilder, BatchContext, HashPurpose, RawBatch, Record, RecordBody};
use farshore_extent::{Extent, Lsn, SECTOR, Seq, WallTime};

use super::source::{Image, Source, assert_same, sector, tiny};
use crate::store::base::{ALL, IMAGE, SUMS};
use crate::store::{
    Content, Disk, Faults, FileKind, PointReader, ReadError, RecoveryReport, SEED, ScrubFinding,
    SimDisk, Store, StoreError,
};

fn open(disk: &SimDisk, faults: Faults) -> Result<(Store, RecoveryReport), StoreError> {
    Store::open(Arc::new(disk.clone()), tiny(faults))
}

fn reopen(disk: &SimDisk) -> Store {
    open(disk, Faults::default()).unwrap().0
}

/// A store whose base has come to its newest place, its source, and what it shows there.
fn merged(disk: &SimDisk, seed: u64, batches: usize) -> (Store, Source, Image) {
    let mut source = Source::new(seed);
    let config = tiny(Faults::default());
    let mut store = Store::create(Arc::new(disk.clone()), &source.meta(), config).unwrap().0;
    for _ in 0..batches {
        source.batch();
        source.send(&mut store);
        source.acked = store.commit().unwrap().durable;
    }
    while !store.expire(source.acked).unwrap().done {}
    store.seal().unwrap();
    let image = source.images[&source.acked].clone();
    (store, source, image)
}

/// Reads every sector: right, unknown as it must be, or named as damaged. Returns those.
fn damaged(view: &PointReader, image: &Image) -> Vec<u64> {
    let mut damaged = Vec::new();
    for (n, tag) in (0..).zip(&image.sectors) {
        let mut got = vec![0; 512];
        match (view.read_at(&mut got, n * SECTOR), tag) {
            (Ok(()), Some(tag)) => assert_eq!(got, sector(*tag), "sector {n} was served wrong"),
            (Err(ReadError::Unknown { .. }), None) => {}
            (Err(ReadError::Base { extent }), Some(_)) => {
                assert_eq!(extent, Extent::new(n * SECTOR, SECTOR).unwrap());
                damaged.push(n);
            }
            (read, tag) => panic!("sector {n}, {tag:?}: {read:?}"),
        }
    }
    damaged
}

fn finds_every_rotten_byte(faults: Faults) {
    let disk = SimDisk::new(21);
    let (store, source, image) = merged(&disk, 21, 60);
    drop(store);
    let mut turned = 0;
    for (file, sector_of) in [(IMAGE, 512), (SUMS, 4)] {
        let len = disk.contents(file).unwrap().len() as u64;
        for at in (0..len).step_by(if file == IMAGE { 61 } else { 3 }) {
            if !disk.rot(file, at, 1 << (at % 8)) {
                continue;
            }
            let (mut store, _) = open(&disk, faults).unwrap();
            let place = store.position().durable;
            let view = store.open_unordered_view(place).unwrap();
            let n = at / sector_of;
            let inside =
                image.sectors.get(usize::try_from(n).unwrap()).is_some_and(Option::is_some);
            let expected: Vec<u64> = inside.then_some(n).into_iter().collect();
            assert_eq!(damaged(&view, &image), expected, "{file} at {at}");
            let extent = Extent::new(n * SECTOR, SECTOR).unwrap();
            assert_eq!(store.take_rot(), if inside { vec![extent] } else { vec![] });
            assert_eq!(store.rotten().overlaps(extent), inside);
            drop((view, store));
            assert!(disk.rot(file, at, 1 << (at % 8)));
            turned += 1;
        }
    }
    assert!(turned > 100, "too few bytes to mean much: {turned}");
    source.check_at(&reopen(&disk), source.acked);
}

#[test]
fn any_byte_of_the_base_or_its_checksums_that_rots_is_named_and_never_served() {
    finds_every_rotten_byte(Faults::default());
}

#[test]
fn a_base_that_is_not_verified_is_found_by_these_tests() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let faults = Faults { base_not_verified: true, ..Faults::default() };
    let found = std::panic::catch_unwind(|| finds_every_rotten_byte(faults)).is_err();
    std::panic::set_hook(hook);
    assert!(found);
}

#[test]
fn a_block_that_the_file_system_lost_is_no_zero_and_a_short_image_is_damaged() {
    let disk = SimDisk::new(22);
    let (store, _, image) = merged(&disk, 22, 60);
    drop(store);
    let data = (0..).zip(&image.sectors).find(|(_, tag)| tag.is_some_and(|tag| tag > 0));
    let lost = data.unwrap().0;
    let extent = Extent::new(lost * SECTOR, SECTOR).unwrap();
    let file = disk.open(IMAGE, FileKind::Plain).unwrap();
    file.punch(extent).unwrap();
    let store = reopen(&disk);
    let view = store.open_unordered_view(store.position().durable).unwrap();
    assert_eq!(view.contents(extent, 8).unwrap(), [(extent, Content::Data)]);
    assert_eq!(damaged(&view, &image), [lost]);
    drop((view, store));
    file.set_len(lost * SECTOR).unwrap();
    let store = reopen(&disk);
    let view = store.open_unordered_view(store.position().durable).unwrap();
    let gone = damaged(&view, &image);
    let holds = |n: u64| image.sectors[usize::try_from(n).unwrap()].is_some_and(|tag| tag > 0);
    let expected: Vec<u64> = (lost..image.sectors.len() as u64).filter(|n| holds(*n)).collect();
    assert_eq!(gone, expected);
}

#[test]
fn holes_of_the_base_stay_holes_and_zeroes_stay_zero() {
    let disk = SimDisk::new(23);
    let (store, _, image) = merged(&disk, 23, 4);
    let view = store.open_unordered_view(store.position().durable).unwrap();
    let (mut holes, mut data) = (0, 0);
    for (n, tag) in (0..).zip(&image.sectors) {
        let extent = Extent::new(n * SECTOR, SECTOR).unwrap();
        match (view.contents(extent, 1).unwrap()[0].1, tag) {
            (Content::Data, Some(_)) => data += 1,
            (Content::Zero, Some(0)) => holes += 1,
            (Content::Unknown, None) => {}
            (found, tag) => panic!("sector {n} is {found:?} and holds {tag:?}"),
        }
    }
    assert!(holes > 0 && data > 0, "{holes} holes, {data} with data");
    let whole = view.contents(view.size().extent(), usize::MAX).unwrap();
    let zeroes = whole.iter().filter(|(_, found)| *found == Content::Zero);
    assert_eq!(zeroes.map(|(extent, _)| extent.len()).sum::<u64>(), holes * SECTOR);
}

/// A source whose volume had content before, as an image on a disk.
fn seeded(disk: &SimDisk, seed: u64) -> Source {
    let source = Source::new(seed).over_old_content();
    let file = disk.create(SEED, FileKind::Plain).unwrap();
    file.write_at(&source.images[&Lsn::ZERO].bytes(), 0).unwrap();
    file.sync().unwrap();
    disk.sync_dir().unwrap();
    source
}

/// Makes the checksums of a seed, with merges in between, until the power goes at an operation.
/// Returns the number of operations.
fn sums_of_a_seed(crash_at: Option<u64>, faults: Faults) -> u64 {
    let disk = SimDisk::new(24);
    let mut source = seeded(&disk, 24);
    let meta = source.meta();
    let mut store = Store::create(Arc::new(disk.clone()), &meta, tiny(faults)).unwrap().0;
    for _ in 0..20 {
        source.batch();
        source.send(&mut store);
        source.acked = store.commit().unwrap().durable;
    }
    let before = disk.ops();
    disk.crash_at(crash_at.map(|at| before + at));
    let places: Vec<Lsn> = source.images.keys().copied().collect();
    let mut work = || -> Result<(), StoreError> {
        for upto in places.iter().step_by(9) {
            store.make_sums(3 * SECTOR)?;
            while !store.expire(*upto)?.done {}
        }
        while store.make_sums(5 * SECTOR)? {}
        Ok(())
    };
    let died = work().is_err();
    assert_eq!(died, crash_at.is_some_and(|at| before + at <= disk.ops()));
    let ops = disk.ops() - before;
    drop(store);
    disk.crash();
    disk.restart();
    let mut store = open(&disk, faults).unwrap().0;
    let check = |store: &Store| {
        let (floor, durable) = (store.position().floor, store.position().durable);
        for at in places.iter().filter(|at| **at >= floor).step_by(5) {
            source.check_at(store, *at);
        }
        source.check_at(store, durable);
    };
    check(&store);
    while !store.expire(source.acked).unwrap().done {}
    while store.make_sums(SECTOR).unwrap() {}
    assert_eq!(store.summed(), ALL);
    check(&store);
    ops
}

#[test]
fn checksums_of_an_image_from_elsewhere_are_made_in_steps_and_outlive_a_power_cut_anywhere() {
    let ops = sums_of_a_seed(None, Faults::default());
    assert!(ops > 60, "too short to mean much: {ops}");
    for at in 1..=ops {
        sums_of_a_seed(Some(at), Faults::default());
    }
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let faults = Faults { sums_not_synced: true, ..Faults::default() };
    let found =
        (1..=ops).any(|at| std::panic::catch_unwind(|| sums_of_a_seed(Some(at), faults)).is_err());
    std::panic::set_hook(hook);
    assert!(found, "checksums that are relied on before they are durable");
}

#[test]
fn rot_of_an_image_from_elsewhere_is_found_once_its_checksums_are_made() {
    let disk = SimDisk::new(25);
    let source = seeded(&disk, 25);
    let config = tiny(Faults::default());
    let mut store = Store::create(Arc::new(disk.clone()), &source.meta(), config).unwrap().0;
    assert_eq!(store.summed(), 0);
    while store.make_sums(SECTOR).unwrap() {}
    let image = &source.images[&Lsn::ZERO];
    assert!(disk.rot(IMAGE, 5 * SECTOR + 17, 2));
    let view = store.open_unordered_view(Lsn::ZERO).unwrap();
    assert_eq!(damaged(&view, image), [5]);
}

#[test]
fn checksums_that_were_lost_are_made_anew_and_that_is_said() {
    let disk = SimDisk::new(26);
    let (store, source, image) = merged(&disk, 26, 60);
    drop(store);
    disk.delete(SUMS).unwrap();
    disk.sync_dir().unwrap();
    let (store, report) = open(&disk, Faults::default()).unwrap();
    assert!(report.lost_checksums);
    assert_eq!(store.summed(), 0);
    drop(store);
    disk.crash();
    disk.restart();
    let (mut store, report) = open(&disk, Faults::default()).unwrap();
    assert!(!report.lost_checksums, "said once");
    while store.make_sums(SECTOR).unwrap() {}
    assert_same(&store.open_unordered_view(source.acked).unwrap(), &image);
    assert_eq!(store.summed(), ALL);
}

/// Sends hand-made records behind what the source has sent.
fn send(store: &mut Store, source: &mut Source, bodies: &[RecordBody], data: &[(Extent, Vec<u8>)]) {
    let mut builder = BatchBuilder::new(Some(1));
    let mut seq = source.last.seq.get();
    let time = WallTime::default();
    for (extent, bytes) in data {
        seq += 1;
        let crc = crc32c::crc32c(bytes);
        builder.push_data(Seq::new(seq), time, *extent, bytes, crc, true);
    }
    for body in bodies {
        seq += 1;
        builder.push(&Record { seq: Seq::new(seq), time, body: body.clone() });
    }
    let context = BatchContext {
        volume: source.volume,
        generation: source.generation,
        prev: source.last,
        prev_chain: source.chain,
        durable: source.acked,
    };
    let batch = builder.finish(source.epoch, &context).unwrap();
    (source.last, source.chain) = (batch.header.last(), batch.header.chain);
    store.append(RawBatch::parse(&batch.bytes).unwrap().check().unwrap()).unwrap();
    store.commit().unwrap();
}

#[test]
fn a_resync_asks_for_what_rotted_and_the_newest_state_is_whole_when_it_was_sent() {
    let disk = SimDisk::new(27);
    let (mut store, mut source, image) = merged(&disk, 27, 60);
    let data = |n: &u64| image.sectors[usize::try_from(*n).unwrap()].is_some_and(|tag| tag > 0);
    let n = (0..image.sectors.len() as u64).find(data).unwrap();
    assert!(disk.rot(IMAGE, n * SECTOR, 128));
    let extent = Extent::new(n * SECTOR, SECTOR).unwrap();
    let good = sector(image.sectors[usize::try_from(n).unwrap()].unwrap());
    let digest = *blake3::hash(&good).as_bytes();
    // As a resync asks, about what the source has; as the answer goes back to it.
    let hash = RecordBody::Hash { extent, purpose: HashPurpose::Resync, digest };
    send(&mut store, &mut source, std::slice::from_ref(&hash), &[]);
    assert_eq!(store.compare(u64::MAX).unwrap().differing, [extent]);
    assert_eq!(store.take_rot(), [extent]);
    assert_eq!(store.rotten().bytes(), SECTOR);
    let old = store.open_unordered_view(source.last).unwrap();
    send(&mut store, &mut source, &[hash], &[(extent, good.clone())]);
    assert_eq!(store.compare(u64::MAX).unwrap().differing, []);
    assert!(store.rotten().is_empty());
    let mut got = vec![0; 512];
    assert!(matches!(old.read_at(&mut got, n * SECTOR), Err(ReadError::Base { .. })), "not before");
    assert_eq!((store.take_rot(), store.rotten().bytes()), (vec![], 0), "known already");
    drop(old);
    // And the base too, when that has come there.
    while !store.expire(source.last).unwrap().done {}
    drop(store);
    let store = reopen(&disk);
    assert_same(&store.open_unordered_view(source.last).unwrap(), &image);
}

/// A whole pass: what it found in the journal, and in the base.
fn scrub(store: &mut Store) -> (Vec<ScrubFinding>, Vec<Extent>) {
    let mut findings = Vec::new();
    loop {
        let scrubbed = store.scrub(3 * SECTOR).unwrap();
        findings.extend(scrubbed.findings);
        assert!(!scrubbed.waits);
        if scrubbed.done {
            return (findings, store.take_rot());
        }
    }
}

#[test]
fn a_scrub_finds_every_rotten_byte_of_sealed_segments_and_base_and_no_other() {
    let disk = SimDisk::new(28);
    let (mut store, mut source, _) = merged(&disk, 28, 60);
    for _ in 0..120 {
        source.batch();
        source.send(&mut store);
        source.acked = store.commit().unwrap().durable;
    }
    assert!(store.segments.len() > 3);
    assert_eq!(scrub(&mut store), (vec![], vec![]));
    assert_eq!(store.scrubbing(), None);
    let segment = &store.segments[store.segments.len() - 2];
    let file = format!("seg-{}", segment.id());
    let batches = segment.batches().unwrap();
    drop(store);
    let inside =
        |at: u64| batches.iter().find(|b| (b.place..b.place + u64::from(b.len)).contains(&at));
    let mut found = 0;
    for at in (4096..disk.contents(&file).unwrap().len() as u64).step_by(389) {
        let Some(batch) = inside(at) else { continue };
        assert!(disk.rot(&file, at, 16));
        let mut store = reopen(&disk);
        let (findings, rot) = scrub(&mut store);
        assert_eq!((findings.len(), rot), (1, vec![]), "{file} at {at}");
        assert!(findings[0].what.starts_with(&file), "{findings:?}");
        assert_eq!(findings[0].from, Lsn::new(batch.epoch, batch.first_seq));
        let view = store.open_unordered_view(source.acked).unwrap();
        for n in findings[0].extents.iter().flat_map(|e| e.offset() / SECTOR..e.end() / SECTOR) {
            let sector = Extent::new(n * SECTOR, SECTOR).unwrap();
            let lost = match view.read_at(&mut [0; 512], sector.offset()) {
                Ok(()) | Err(ReadError::Unknown { .. } | ReadError::Outside { .. }) => false,
                Err(_) => true,
            };
            assert_eq!(store.rotten().overlaps(sector), lost, "{sector}");
        }
        assert!(disk.rot(&file, at, 16));
        found += 1;
    }
    assert!(found > 40, "too few to mean much: {found}");
    let mut store = reopen(&disk);
    let data = disk.contents(IMAGE).unwrap();
    let at = data.iter().position(|b| *b != 0).unwrap() as u64;
    let extent = Extent::new(at / SECTOR * SECTOR, SECTOR).unwrap();
    let known = !store.sb.unknown.overlaps(extent);
    assert!(disk.rot(IMAGE, at, 1));
    assert_eq!(scrub(&mut store), (vec![], known.then_some(extent).into_iter().collect()));
}
