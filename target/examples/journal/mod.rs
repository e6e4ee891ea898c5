//! A store and a source that fills it as fast as it can, for measuring.

#![allow(dead_code)] // each measurement uses its part

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use farshore_changelog::{
    BatchBuilder, BatchContext, EncodedBatch, Marker, MarkerState, RawBatch, Record, RecordBody,
};
use farshore_extent::{
    BlockSizes, Chain, Epoch, Extent, Generation, GroupId, Lsn, MarkerId, PointKind, Seq, VolumeId,
    VolumeSize, WallTime,
};
use farshore_target::store::{Disk, FileDisk, Store, StoreConfig, StoreMeta};

pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// A new store in `dir`.
pub fn create(dir: &Path, size: u64) -> (Store, StoreMeta) {
    std::fs::create_dir_all(dir).unwrap();
    let meta = StoreMeta {
        volume: VolumeId::random(),
        size: VolumeSize::new(size).unwrap(),
        blocks: BlockSizes::E512,
        generation: Generation::new(1),
        created: WallTime::default(),
    };
    let disk: Arc<dyn Disk> = Arc::new(FileDisk::open(dir).unwrap());
    (Store::create(disk, &meta, StoreConfig::default()).unwrap().0, meta)
}

/// Random writes of one size all over the volume, incompressible.
pub struct Source {
    meta: StoreMeta,
    write: u64,
    random: Random,
    builder: BatchBuilder,
    data: Vec<u8>,
    pub last: Lsn,
    chain: Chain,
    seq: u64,
    /// Checksum of the newest content of each range written.
    newest: BTreeMap<u64, u32>,
}

impl Source {
    pub fn new(meta: StoreMeta, write: u64) -> Self {
        let mut source = Self {
            meta,
            write,
            random: Random(0x1234_5678_9abc_def1),
            builder: BatchBuilder::new(None),
            data: vec![0; usize::try_from(write).unwrap()],
            last: Lsn::ZERO,
            chain: Chain::EMPTY,
            seq: 0,
            newest: BTreeMap::new(),
        };
        source.push(RecordBody::OrderRestored);
        source
    }

    fn push(&mut self, body: RecordBody) {
        self.seq += 1;
        self.builder.push(&Record { seq: Seq::new(self.seq), time: WallTime::default(), body });
    }

    fn write(&mut self) {
        self.seq += 1;
        let random = &mut self.random;
        self.data.chunks_mut(8).for_each(|c| c.copy_from_slice(&random.next().to_le_bytes()));
        let at = random.next() % (self.meta.size.get() / self.write) * self.write;
        let extent = Extent::new(at, self.write).unwrap();
        let crc = crc32c::crc32c(&self.data);
        self.newest.insert(at, crc);
        let seq = Seq::new(self.seq);
        self.builder.push_data(seq, WallTime::default(), extent, &self.data, crc, false);
    }

    /// As much as a batch takes.
    pub fn batch(&mut self) -> EncodedBatch {
        while !self.builder.is_full() {
            self.write();
        }
        self.finish()
    }

    /// So many writes.
    pub fn writes(&mut self, count: u64) -> EncodedBatch {
        (0..count).for_each(|_| self.write());
        self.finish()
    }

    /// So many writes and a point behind them.
    pub fn point(&mut self, writes: u64) -> EncodedBatch {
        (0..writes).for_each(|_| self.write());
        self.push(RecordBody::Marker(Marker {
            id: MarkerId::random(),
            kind: PointKind::Crash,
            state: MarkerState::Committed,
            group: GroupId::NIL,
            name: String::new(),
        }));
        self.finish()
    }

    /// The store's newest state is what was sent.
    pub fn verify(&self, store: &Store) {
        let view = store.open_view(self.last).unwrap();
        let mut bytes = vec![0; self.data.len()];
        for (at, crc) in &self.newest {
            view.read_at(&mut bytes, *at).unwrap();
            assert_eq!(crc32c::crc32c(&bytes), *crc, "the content at {at} is not what was sent");
        }
    }

    fn finish(&mut self) -> EncodedBatch {
        let context = BatchContext {
            volume: self.meta.volume,
            generation: self.meta.generation,
            prev: self.last,
            prev_chain: self.chain,
            durable: self.last,
        };
        let batch = self.builder.finish(Epoch::new(1), &context).unwrap();
        (self.last, self.chain) = (batch.header.last(), batch.header.chain);
        batch
    }
}

/// Seconds in append and in commit.
pub fn take(store: &mut Store, batch: &EncodedBatch) -> (f64, f64) {
    // A worker does this when it is idle, so it is not part of the figures.
    while store.prepare_reserve().unwrap() {}
    let checked = RawBatch::parse(&batch.bytes).unwrap().check_without_chain().unwrap();
    let start = Instant::now();
    store.append(checked).unwrap();
    let appended = start.elapsed().as_secs_f64();
    let start = Instant::now();
    store.commit().unwrap();
    (appended, start.elapsed().as_secs_f64())
}
