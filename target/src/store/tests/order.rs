//! Where an ordered stretch ends, and what a time in between resolves to.

use std::sync::Arc;

use farshore_changelog::{BatchBuilder, BatchContext, EpochStart, RawBatch, Record, RecordBody};
use farshore_extent::{BlockSizes, Epoch, Extent, Lsn, SECTOR, Seq, VolumeId, WallTime};

use super::source::{Source, tiny};
use crate::store::{Faults, SimDisk, Store, ViewError};

fn write() -> RecordBody {
    RecordBody::Zero { extent: Extent::new(0, SECTOR).unwrap(), copied: false }
}

/// Sends a batch of records with these numbers; the number is the time too.
fn send(store: &mut Store, epoch: u64, records: impl IntoIterator<Item = (u64, RecordBody)>) {
    let mut builder = BatchBuilder::new(None);
    for (seq, body) in records {
        let time = WallTime::from_nanos(i64::try_from(1000 * epoch + seq).unwrap());
        builder.push(&Record { seq: Seq::new(seq), time, body });
    }
    let position = store.position();
    let context = BatchContext {
        volume: VolumeId::from_bytes([7; 16]),
        generation: position.generation,
        prev: position.received,
        prev_chain: position.chain,
        durable: position.durable,
    };
    let batch = builder.finish(Epoch::new(epoch), &context).unwrap();
    store.append(RawBatch::parse(&batch.bytes).unwrap().check().unwrap()).unwrap();
    store.commit().unwrap();
}

/// Numbers of a volume have gaps: those of other volumes. Before a loss of order the numbers of
/// writes that were dropped are among them.
fn history(store: &mut Store) {
    send(store, 1, [(2, RecordBody::OrderRestored), (5, write())]);
    // Lost within a batch, restored, lost with the first record of a batch.
    send(store, 1, [(10, write()), (30, RecordBody::OrderLost), (35, write())]);
    send(store, 1, [(40, RecordBody::OrderRestored), (45, write())]);
    send(store, 1, [(60, RecordBody::OrderLost)]);
    send(store, 1, [(70, RecordBody::OrderRestored), (75, write())]);
    // A crash: nobody knows what the rest of the first epoch was.
    let size = store.position().size;
    let start = EpochStart { continues: false, size, blocks: BlockSizes::E512 };
    send(store, 2, [(1, RecordBody::EpochStart(start)), (4, RecordBody::OrderRestored)]);
}

const ORDERED: [(u64, std::ops::RangeInclusive<u64>); 4] =
    [(1, 2..=10), (1, 40..=45), (1, 70..=75), (2, 4..=20)];

fn check(store: &Store) {
    for epoch in 1..=2 {
        for seq in 0..100 {
            let at = Lsn::new(Epoch::new(epoch), Seq::new(seq));
            if at < store.position().floor || (epoch == 2 && seq > 20) {
                continue;
            }
            let ordered = ORDERED.iter().any(|(e, seqs)| *e == epoch && seqs.contains(&seq));
            assert_eq!(store.is_ordered_at(at), ordered, "order at {at}");
            let view = store.open_view(at);
            assert_eq!(view.is_ok(), ordered, "view of {at}");
            assert!(ordered || matches!(view, Err(ViewError::NotOrdered { .. })));
            // A moment is answered by the state of then or not at all.
            let time = WallTime::from_nanos(i64::try_from(1000 * epoch + seq).unwrap());
            let found = store.resolve_time(time).unwrap();
            let opened = found.is_some_and(|lsn| store.open_view(lsn).is_ok());
            assert_eq!(opened, ordered, "the time of {at} gave {found:?}");
        }
    }
}

#[test]
fn numbers_and_times_of_dropped_writes_are_no_states_of_the_volume() {
    let disk = SimDisk::new(31);
    let open = || Store::open(Arc::new(disk.clone()), tiny(Faults::default())).unwrap().0;
    let meta = Source::new(31).meta();
    let config = tiny(Faults::default());
    let mut store = Store::create(Arc::new(disk.clone()), &meta, config).unwrap().0;
    history(&mut store);
    for seq in 5..=20 {
        send(&mut store, 2, [(seq, write())]);
    }
    check(&store);
    drop(store);
    // The segments are sealed now, or read batch by batch.
    let store = open();
    check(&store);
    drop(store);
    for base in [5, 10, 20, 32, 50] {
        let mut store = open();
        let base = Lsn::new(Epoch::new(1), Seq::new(base));
        while !store.expire(base).unwrap().done {}
        check(&store);
        drop(store);
        check(&open());
    }
}
