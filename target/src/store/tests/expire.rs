//! What expiry costs.

use std::sync::Arc;

use super::source::{Source, tiny};
use crate::store::{Faults, SimDisk, Store, StoreConfig};

#[test]
fn a_base_that_moves_in_small_steps_takes_every_byte_once() {
    let disk = SimDisk::new(1);
    let mut source = Source::new(1);
    // All of it in one segment.
    let config = StoreConfig { segment_bytes: 8 << 20, ..tiny(Faults::default()) };
    let created = Store::create(Arc::new(disk), &source.meta(), config);
    let mut store = created.unwrap().0;
    let (mut taken, mut merged) = (0, 0);
    for _ in 0..80 {
        let batch = source.batch().header;
        // A range of zeroes counts as one sector.
        taken += u64::from(batch.raw_len) + 512 * u64::from(batch.record_count);
        source.send(&mut store);
        source.acked = store.commit().unwrap().durable;
        loop {
            let progress = store.expire(source.acked).unwrap();
            merged += progress.written;
            if progress.done {
                break;
            }
        }
        assert_eq!(store.position().base, source.acked);
        source.check_at(&store, source.acked);
    }
    assert!(store.segments.is_empty(), "the base must move within a segment");
    assert!(merged <= 2 * taken, "{merged} bytes were merged of {taken}");
}
