//! Refusals, damage, full disks, pinned views, markers.

use std::sync::Arc;

use farshore_changelog::{
    BatchBuilder, BatchContext, EncodedBatch, MarkerState, RawBatch, Record, RecordBody,
};
use farshore_extent::{
    Chain, Epoch, Extent, Generation, Lsn, MarkerId, SECTOR, Seq, VolumeId, WallTime,
};

use super::source::{Image, Source, assert_same, history, marker, tiny};
use crate::store::{
    AppendError, Faults, Held, PointReader, ReadError, SimDisk, SimFaults, Store, StoreConfig,
    StoreError, StoreEvent, ViewError,
};

/// Views are read by the threads of an export; the store belongs to one thread but may move.
const _: () = {
    const fn is_shared<T: Send + Sync + 'static>() {}
    const fn is_send<T: Send>() {}
    is_shared::<crate::store::PointReader>();
    is_send::<Store>();
};

fn store_on(disk: &SimDisk, source: &Source) -> Store {
    let disk = Arc::new(disk.clone());
    Store::create(disk, &source.meta(), tiny(Faults::default())).unwrap().0
}

fn reopen(disk: &SimDisk) -> (Store, crate::store::RecoveryReport) {
    Store::open(Arc::new(disk.clone()), tiny(Faults::default())).unwrap()
}

fn append(store: &mut Store, bytes: &[u8]) -> Result<(), AppendError> {
    store.append(RawBatch::parse(bytes).unwrap().check().unwrap())
}

/// A store with `batches` durable batches, and its source.
fn filled(disk: &SimDisk, seed: u64, batches: usize) -> (Store, Source) {
    let mut source = Source::new(seed);
    let mut store = store_on(disk, &source);
    for _ in 0..batches {
        source.batch();
        source.send(&mut store);
        source.acked = store.commit().unwrap().durable;
    }
    (store, source)
}

/// A batch of hand-made records behind `prev`.
fn batch(
    prev: Lsn,
    prev_chain: Chain,
    generation: u64,
    bodies: impl IntoIterator<Item = RecordBody>,
) -> EncodedBatch {
    let mut builder = BatchBuilder::new(Some(1));
    for (n, body) in (1..).zip(bodies) {
        let seq = Seq::new(prev.seq.get() + n);
        builder.push(&Record { seq, time: WallTime::default(), body });
    }
    let context = BatchContext {
        volume: VolumeId::from_bytes([7; 16]),
        generation: Generation::new(generation),
        prev,
        prev_chain,
        durable: Lsn::ZERO,
    };
    builder.finish(Epoch::new(1.max(prev.epoch.get())), &context).unwrap()
}

fn zero() -> RecordBody {
    RecordBody::Zero { extent: Extent::new(0, SECTOR).unwrap(), copied: false }
}

#[test]
fn only_the_batch_that_follows_is_taken() {
    let disk = SimDisk::new(1);
    let (mut store, source) = filled(&disk, 1, 3);
    let at = store.position();
    let refused =
        |store: &mut Store, batch: &EncodedBatch| append(store, &batch.bytes).unwrap_err();
    let again = source.batches.last().unwrap();
    assert!(
        matches!(refused(&mut store, again), AppendError::Duplicate { last } if last == at.durable)
    );
    let next = |n| Lsn::new(at.durable.epoch, Seq::new(at.durable.seq.get() + n));
    let gap = batch(next(3), at.chain, 1, [zero()]);
    assert!(
        matches!(refused(&mut store, &gap), AppendError::Gap { expected, .. } if expected == at.durable)
    );
    let other = batch(at.durable, Chain::from_bytes([9; 32]), 1, [zero()]);
    assert!(matches!(refused(&mut store, &other), AppendError::Diverged { .. }));
    let ahead = batch(at.durable, at.chain, 2, [zero()]);
    assert!(matches!(refused(&mut store, &ahead), AppendError::Ahead { .. }));
    let outside = RecordBody::Zero { extent: Extent::new(1 << 40, SECTOR).unwrap(), copied: false };
    let outside = batch(at.durable, at.chain, 1, [outside]);
    assert!(matches!(refused(&mut store, &outside), AppendError::Outside { .. }));
    // Same place, other content: another history must not pass for a repetition.
    let before = &source.batches[source.batches.len() - 2].header;
    let twin = batch(
        before.last(),
        before.chain,
        1,
        (before.last().seq.get()..at.durable.seq.get()).map(|_| zero()),
    );
    if twin.header.last() == at.durable {
        assert!(matches!(refused(&mut store, &twin), AppendError::Diverged { .. }));
    }
    assert_eq!(store.position(), at);
}

#[test]
fn a_raised_generation_fences_the_old_source_also_after_a_restart() {
    let disk = SimDisk::new(2);
    let (mut store, _) = filled(&disk, 2, 2);
    assert_eq!(store.raise_generation().unwrap(), Generation::new(2));
    let at = store.position();
    drop(store);
    disk.crash();
    disk.restart();
    let (mut store, _) = reopen(&disk);
    let old = batch(at.durable, at.chain, 1, [zero()]);
    assert!(matches!(append(&mut store, &old.bytes), Err(AppendError::Fenced { .. })));
    let new = batch(at.durable, at.chain, 2, [zero()]);
    append(&mut store, &new.bytes).unwrap();
    assert_eq!(store.commit().unwrap().durable, new.header.last());
}

#[test]
fn a_second_writer_is_refused() {
    let disk = SimDisk::new(3);
    let (store, _) = filled(&disk, 3, 1);
    let second = Store::open(Arc::new(disk.clone()), StoreConfig::default());
    assert!(matches!(second, Err(StoreError::InUse { .. })));
    drop(store);
    reopen(&disk);
}

#[test]
fn a_damaged_frame_is_reported_with_its_range_and_never_served() {
    let disk = SimDisk::new(4);
    let (store, source) = filled(&disk, 12, 60);
    let position = store.position();
    drop(store);
    damage_first_segment(&disk);
    let (store, report) = reopen(&disk);
    assert_eq!((report.damage.len(), store.position()), (0, position), "sealed: not scanned");
    let first_end = store.segments[0].last;
    // A place within a segment, too: its index is made of the tables of the batches alone.
    let within = *source.images.range(..first_end).next_back().unwrap().0;
    for at in [first_end, within] {
        let view = store.open_unordered_view(at).unwrap();
        let (served, damaged) = survey(&view, &source.images[&at]);
        assert!(served > 0 && damaged > 0, "{at}: served {served}, damaged {damaged}");
    }
}

/// How many sectors of a view are served, rightly, and how many are damaged, and named.
fn survey(view: &PointReader, image: &Image) -> (u64, u64) {
    let (mut served, mut damaged) = (0, 0);
    for (n, tag) in (0u64..).zip(&image.sectors) {
        let mut got = vec![0; 512];
        match view.read_at(&mut got, n * SECTOR) {
            Ok(()) => {
                assert_eq!(got, super::source::sector(tag.unwrap()));
                served += 1;
            }
            Err(ReadError::Damaged { extent, .. }) => {
                assert_eq!(extent.offset(), n * SECTOR);
                damaged += 1;
            }
            Err(ReadError::Unknown { .. }) => assert_eq!(*tag, None),
            Err(e) => panic!("{e}"),
        }
    }
    (served, damaged)
}

#[test]
fn a_damaged_header_of_any_segment_costs_nothing() {
    let disk = SimDisk::new(14);
    let (mut store, source) = filled(&disk, 14, 90);
    let some = *source.images.keys().nth(source.images.len() / 4).unwrap();
    while !store.expire(some).unwrap().done {}
    let position = store.position();
    assert!(position.base > Lsn::ZERO && store.segments.len() > 1);
    let names: Vec<_> = store.segments.iter().map(|s| format!("seg-{}", s.id())).collect();
    drop(store);
    for name in names {
        assert!(disk.rot(&name, 70, 1));
        let (store, report) = reopen(&disk);
        assert_eq!((report.damage.as_slice(), store.position()), (&[][..], position), "{name}");
        for place in source.images.range(position.floor..).map(|(place, _)| *place) {
            source.check_at(&store, place);
        }
        drop(store);
        assert!(disk.rot(&name, 70, 1));
    }
}

#[test]
fn a_batch_whose_tables_are_damaged_opens_no_place_behind_it_within_its_segment() {
    let disk = SimDisk::new(4);
    let (store, source) = filled(&disk, 12, 60);
    let first = &store.segments[0];
    let end = first.last;
    let within = *source.images.range(..end).next_back().unwrap().0;
    let batch = first.batches().unwrap()[0];
    // In the record table, behind the header.
    assert!(disk.rot("seg-0000000000000001", batch.place + 300, 1));
    match store.open_unordered_view(within) {
        Err(ViewError::Store(StoreError::Batch { .. })) => {}
        other => panic!("a damaged batch was taken: {:?}", other.map(|v| v.at())),
    }
    // The run in the footer does not need them.
    source.check_at(&store, end);
}

/// Turns one bit in the last frame of every batch of the first segment.
fn damage_first_segment(disk: &SimDisk) {
    let name = "seg-0000000000000001";
    let whole = disk.contents(name).unwrap();
    for (n, block) in whole.chunks(4096).enumerate().filter(|(_, b)| b.starts_with(b"FARSHBAT")) {
        let header = farshore_changelog::BatchHeader::parse(block).unwrap();
        if header.stored_len > 0 {
            assert!(disk.rot(name, (n * 4096 + header.total_len() - 1) as u64, 1));
        }
    }
}

#[test]
fn expiry_over_a_damaged_frame_makes_the_range_unknown_instead_of_wrong() {
    let disk = SimDisk::new(5);
    let (store, source) = filled(&disk, 12, 60);
    drop(store);
    damage_first_segment(&disk);
    let (mut store, _) = reopen(&disk);
    let first_end = store.segments[0].last;
    let mut damaged = Vec::new();
    loop {
        let progress = store.expire(first_end).unwrap();
        damaged.extend(progress.damaged);
        if progress.done {
            break;
        }
    }
    assert!(!damaged.is_empty());
    assert_eq!(store.position().base, first_end);
    drop(store);
    let (store, _) = reopen(&disk);
    let view = store.open_unordered_view(first_end).unwrap();
    let image = &source.images[&first_end];
    let mut unknown = 0;
    for (n, tag) in image.sectors.iter().enumerate() {
        let mut got = vec![0; 512];
        match view.read_at(&mut got, n as u64 * SECTOR) {
            Ok(()) => assert_eq!(got, super::source::sector(tag.unwrap())),
            Err(ReadError::Unknown { .. }) => unknown += 1,
            Err(e) => panic!("{e}"),
        }
    }
    assert!(unknown > 0);
}

#[test]
fn rot_of_acknowledged_data_in_the_open_segment_is_damage_and_not_a_torn_tail() {
    let disk = SimDisk::new(6);
    let (store, source) = filled(&disk, 6, 5);
    drop(store);
    let name = "seg-0000000000000001";
    let whole = disk.contents(name).unwrap();
    let places: Vec<_> = whole
        .chunks(4096)
        .enumerate()
        .filter(|(_, b)| b.starts_with(b"FARSHBAT"))
        .map(|(n, _)| n * 4096)
        .collect();
    disk.rot(name, places[2] as u64 + 300, 4);
    let (mut store, report) = reopen(&disk);
    assert_eq!(report.torn_tail, None);
    assert_eq!(report.damage.len(), 1, "{report:?}");
    let good = source.batches[1].header.last();
    assert_eq!(report.damage[0].after, good);
    assert!(report.damage[0].upto > good);
    assert_eq!(store.position().durable, good);
    source.check_at(&store, good);
    // The source goes on from there; nothing of the damaged place is ever seen again.
    let at = store.position();
    let later = Lsn::new(Epoch::new(9), Seq::ZERO);
    let mut next = batch(at.durable, at.chain, 1, [zero()]);
    if at.durable < later {
        let mut builder = BatchBuilder::new(None);
        builder.push(&Record { seq: Seq::new(1), time: WallTime::default(), body: zero() });
        let context = BatchContext {
            volume: source.volume,
            generation: Generation::new(1),
            prev: at.durable,
            prev_chain: at.chain,
            durable: at.durable,
        };
        next = builder.finish(Epoch::new(9), &context).unwrap();
    }
    append(&mut store, &next.bytes).unwrap();
    store.commit().unwrap();
    drop(store);
    let (store, report) = reopen(&disk);
    assert_eq!(report.damage, [], "damage is reported once");
    assert_eq!(store.position().durable, next.header.last());
    source.check_at(&store, good);
}

#[test]
fn rot_of_one_copy_of_super_is_repaired() {
    let disk = SimDisk::new(7);
    let (mut store, _) = filled(&disk, 7, 2);
    store.raise_generation().unwrap();
    drop(store);
    for copy in 0..4u64 {
        disk.rot("super", copy * 4096 + 100, 1);
        let (store, report) = reopen(&disk);
        assert_eq!(report.bad_super_copies, 1);
        assert_eq!(store.position().generation, Generation::new(2));
    }
    disk.rot("super", 100, 1);
    disk.rot("super", 4096 + 100, 1);
    let lost = Store::open(Arc::new(disk.clone()), tiny(Faults::default()));
    assert!(matches!(lost, Err(StoreError::Super { .. })), "an older state must not be believed");
}

#[test]
fn a_full_disk_stops_acks_and_expiry_frees_it() {
    let disk = SimDisk::new(8);
    let mut source = Source::new(8);
    let mut store = store_on(&disk, &source);
    while store.prepare_reserve().unwrap() {}
    disk.set_capacity(Some(6 * 64 * 1024));
    let full = loop {
        source.batch();
        source.send(&mut store);
        match store.commit() {
            Ok(committed) => source.acked = committed.durable,
            Err(e) => break e,
        }
    };
    assert!(matches!(full, StoreError::DiskFull { .. }), "{full}");
    assert_eq!(store.poisoned(), None);
    assert_eq!(store.position().durable, source.acked);
    assert!(matches!(store.commit(), Err(StoreError::DiskFull { .. })));
    source.check_at(&store, source.acked);
    while !store.expire(source.acked).unwrap().done {}
    let committed = store.commit().unwrap();
    assert_eq!(committed.durable, source.last);
    drop(store);
    let (store, _) = reopen(&disk);
    source.check_at(&store, source.last);
}

#[test]
fn an_open_view_holds_the_base_and_sees_no_later_write() {
    let disk = SimDisk::new(9);
    let (mut store, mut source) = filled(&disk, 9, 40);
    let held = *source.images.iter().filter(|(_, i)| i.ordered).map(|(l, _)| l).nth(10).unwrap();
    let view = store.open_view(held).unwrap();
    for _ in 0..40 {
        source.batch();
        source.send(&mut store);
        source.acked = store.commit().unwrap().durable;
        let progress = loop {
            let progress = store.expire(source.acked).unwrap();
            if progress.done {
                break progress;
            }
        };
        assert_eq!(progress.held, Some(Held::ByView(held)));
        assert!(progress.base <= held);
    }
    assert_same(&view, &source.images[&held]);
    drop(view);
    while !store.expire(source.acked).unwrap().done {}
    assert_eq!(store.position().base, source.acked);
    assert!(matches!(store.open_view(held), Err(ViewError::Expired { .. })));
    source.check_at(&store, source.acked);
}

#[test]
fn a_view_at_the_floor_stays_exact_while_newer_bytes_are_merged_below_it() {
    let disk = SimDisk::new(10);
    let (mut store, source) = filled(&disk, 10, 60);
    let last = source.acked;
    let view = store.open_unordered_view(last).unwrap();
    loop {
        let done = store.expire(last).unwrap().done;
        assert_same(&view, &source.images[&last]);
        if done {
            break;
        }
    }
    // The base has come to the view's own place, and its segments are still there for it.
    assert_eq!(store.position().base, last);
    assert_same(&view, &source.images[&last]);
    assert!(store.segments.len() + store.doomed.len() > 1);
    drop(view);
    store.expire(last).unwrap();
    assert_eq!(store.doomed.len(), 0);
}

#[test]
fn a_view_of_the_last_place_of_a_segment_keeps_its_file_from_being_used_again() {
    for batches in 1..24 {
        let disk = SimDisk::new(11);
        let (mut store, mut source) = filled(&disk, 11, 40 + batches);
        let last = source.acked;
        // Opened while the segment is still being written.
        let view = store.open_unordered_view(last).unwrap();
        for _ in 0..60 {
            source.batch();
            source.send(&mut store);
            source.acked = store.commit().unwrap().durable;
            while !store.expire(source.acked).unwrap().done {}
            store.prepare_reserve().unwrap();
        }
        assert_eq!(store.position().base, last, "held by the view");
        assert_same(&view, &source.images[&last]);
    }
}

#[test]
fn a_failed_write_latches_the_first_error() {
    let disk = SimDisk::new(11);
    let (mut store, mut source) = filled(&disk, 11, 2);
    let durable = store.position().durable;
    source.batch();
    source.send(&mut store);
    disk.set_faults(SimFaults { sync_fails: 1000, ..SimFaults::default() });
    assert!(matches!(store.commit(), Err(StoreError::Io { .. })));
    disk.set_faults(SimFaults::default());
    assert!(matches!(store.commit(), Err(StoreError::Poisoned { .. })));
    assert!(matches!(store.expire(durable), Err(StoreError::Poisoned { .. })));
    assert_eq!(store.position().durable, durable);
    drop(store);
    let (mut store, _) = reopen(&disk);
    source.send(&mut store);
    assert_eq!(store.commit().unwrap().durable, source.last);
}

#[test]
fn a_marker_is_a_point_only_when_committed_and_in_order() {
    let disk = SimDisk::new(12);
    let mut store = store_on(&disk, &Source::new(0));
    let mark = |n, state| RecordBody::Marker(marker(n, state));
    let id = |n| marker(n, MarkerState::Pending).id;
    let first = batch(
        Lsn::ZERO,
        Chain::EMPTY,
        1,
        [
            mark(1, MarkerState::Committed), // 1: catching up
            RecordBody::OrderRestored,       // 2
            mark(2, MarkerState::Committed), // 3: a point
            mark(3, MarkerState::Pending),   // 4: a point once 3 commits
            mark(4, MarkerState::Pending),   // 5: aborted
            mark(5, MarkerState::Pending),   // 6: never heard of again
        ],
    );
    append(&mut store, &first.bytes).unwrap();
    let told = store.commit().unwrap().events;
    assert_eq!(points(&told), [(3, id(2))]);
    drop(store);
    let (mut store, _) = reopen(&disk);
    let second = batch(
        first.header.last(),
        first.header.chain,
        1,
        [
            RecordBody::OrderLost,           // 7
            RecordBody::MarkerCommit(id(3)), // 8: its place lies in order
            RecordBody::MarkerAbort(id(4)),
        ],
    );
    append(&mut store, &second.bytes).unwrap();
    let told = store.commit().unwrap().events;
    assert_eq!(points(&told), [(4, id(3))]);
    assert_eq!(points(&history(&store)), [(3, id(2)), (4, id(3))]);
    let place = |n| Lsn::new(Epoch::new(1), Seq::new(n));
    // A catalogue that knew everything up to 7 lacks the second.
    let known = history(&store).into_iter().filter_map(|event| match event {
        StoreEvent::Point(point) => Some(point.known),
        _ => None,
    });
    assert_eq!(known.collect::<Vec<_>>(), [place(3), place(8)]);
    assert!(!store.is_ordered_at(place(1)) && store.is_ordered_at(place(2)));
    assert!(store.is_ordered_at(place(6)) && !store.is_ordered_at(place(7)));
    assert!(matches!(store.open_view(place(8)), Err(ViewError::NotOrdered { .. })));
    let stretches = store.ordered_stretches();
    assert_eq!(
        (stretches.len(), stretches[0].from, stretches[0].until),
        (1, place(2), Some(place(7)))
    );
}

fn points(events: &[StoreEvent]) -> Vec<(u64, MarkerId)> {
    let point = |e: &StoreEvent| match e {
        StoreEvent::Point(p) => Some((p.lsn.seq.get(), p.marker)),
        _ => None,
    };
    events.iter().filter_map(point).collect()
}

#[test]
fn a_time_resolves_to_the_last_place_captured_by_then() {
    let disk = SimDisk::new(13);
    let (mut store, source) = filled(&disk, 13, 60);
    let check = |store: &Store| {
        for nanos in 0..source.images.len() {
            let time = WallTime::from_nanos(i64::try_from(nanos).unwrap());
            let expected =
                source.images.iter().filter(|(_, i)| i.time <= time).map(|(l, _)| *l).next_back();
            let expected = expected.filter(|lsn| *lsn >= store.position().floor);
            assert_eq!(store.resolve_time(time).unwrap(), expected, "at {nanos}");
        }
        for (lsn, image) in source.images.range(store.position().floor..) {
            assert_eq!(store.time_at(*lsn).unwrap(), image.time);
        }
    };
    check(&store);
    let middle = *source.images.keys().nth(90).unwrap();
    while !store.expire(middle).unwrap().done {}
    check(&store);
}
