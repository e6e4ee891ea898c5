//! Speed of the replica store on a directory: commit throughput against bare durable writes of the
//! same size, and the time to open a view over many segments.
//!
//! `cargo run --release -p farshore-target --example store-speed -- DIR [MIB]`
#![allow(clippy::unwrap_used, clippy::print_stdout)] // a measuring tool: a panic is its report

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use farshore_changelog::{BatchBuilder, BatchContext, RawBatch, Record, RecordBody};
use farshore_extent::{
    BlockSizes, Chain, Epoch, Extent, Generation, Lsn, Seq, VolumeId, VolumeSize, WallTime,
};
use farshore_target::store::{AlignedBuf, Disk, FileDisk, FileKind, Store, StoreConfig, StoreMeta};

const SIZE: u64 = 8 << 30;
const WRITE: u64 = 16 << 10;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn rate(bytes: u64, since: Instant) -> f64 {
    bytes as f64 / since.elapsed().as_secs_f64() / 1e6
}

/// Bare durable writes of 1 MiB into a prewritten file.
fn bare(disk: &FileDisk, mib: u64) -> f64 {
    let file = disk.create("bare", FileKind::Journal).unwrap();
    let mut piece = AlignedBuf::with_capacity(1 << 20);
    piece.push_padded(&vec![7; 1 << 20]);
    for n in 0..64 {
        file.write_at(piece.as_slice(), n << 20).unwrap();
    }
    file.sync().unwrap();
    let start = Instant::now();
    for n in 0..mib {
        file.write_durable(piece.as_slice(), (n % 64) << 20).unwrap();
    }
    let speed = rate(mib << 20, start);
    disk.delete("bare").unwrap();
    speed
}

// long because it is one measurement told from top to bottom
fn main() {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().expect("usage: store-speed DIR [MIB]"));
    let mib: u64 = args.next().and_then(|n| n.parse().ok()).unwrap_or(1024);
    let disk = FileDisk::open(&dir).unwrap();
    println!("bare 1 MiB durable writes: {:.0} MB/s", bare(&disk, 256));
    let meta = StoreMeta {
        volume: VolumeId::random(),
        size: VolumeSize::new(SIZE).unwrap(),
        blocks: BlockSizes::E512,
        generation: Generation::new(1),
        created: WallTime::default(),
    };
    let arc: Arc<dyn Disk> = Arc::new(disk.clone());
    let (mut store, _) = Store::create(arc, &meta, StoreConfig::default()).unwrap();
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut data = vec![0; usize::try_from(WRITE).unwrap()];
    let mut builder = BatchBuilder::new(None);
    let (mut prev, mut chain, mut seq) = (Lsn::ZERO, Chain::EMPTY, 0);
    let (mut in_append, mut in_commit) = (0.0, 0.0);
    for n in 0..mib {
        // A worker does this when it is idle, so it is not part of the figures.
        while store.prepare_reserve().unwrap() {}
        if n == 0 {
            seq += 1;
            let body = RecordBody::OrderRestored;
            builder.push(&Record { seq: Seq::new(seq), time: WallTime::default(), body });
        }
        while !builder.is_full() {
            seq += 1;
            data.chunks_mut(8).for_each(|c| c.copy_from_slice(&random.next().to_le_bytes()));
            let at = random.next() % (SIZE / WRITE) * WRITE;
            let extent = Extent::new(at, WRITE).unwrap();
            let crc = crc32c::crc32c(&data);
            builder.push_data(Seq::new(seq), WallTime::default(), extent, &data, crc, false);
        }
        let context = BatchContext {
            volume: meta.volume,
            generation: meta.generation,
            prev,
            prev_chain: chain,
            durable: prev,
        };
        let batch = builder.finish(Epoch::new(1), &context).unwrap();
        let checked = RawBatch::parse(&batch.bytes).unwrap().check_without_chain().unwrap();
        let start = Instant::now();
        store.append(checked).unwrap();
        in_append += start.elapsed().as_secs_f64();
        let start = Instant::now();
        store.commit().unwrap();
        in_commit += start.elapsed().as_secs_f64();
        (prev, chain) = (batch.header.last(), batch.header.chain);
    }
    let bytes = (mib << 20) as f64;
    println!(
        "append + commit of 1 MiB batches of 16 KiB writes: {:.0} MB/s (append {:.2} ms, commit {:.2} ms each)",
        bytes / (in_append + in_commit) / 1e6,
        in_append * 1e3 / mib as f64,
        in_commit * 1e3 / mib as f64,
    );
    drop(store);
    let start = Instant::now();
    let (store, report) = Store::open(Arc::new(disk), StoreConfig::default()).unwrap();
    println!(
        "open: {:.1} ms, {} sealed segments, {} batches scanned",
        start.elapsed().as_secs_f64() * 1e3,
        report.sealed,
        report.scanned_batches
    );
    for (what, at) in [("newest", prev), ("middle", Lsn::new(Epoch::new(1), Seq::new(seq / 2)))] {
        let start = Instant::now();
        let view = store.open_view(at).unwrap();
        let opened = start.elapsed();
        let mut buf = vec![0; 4096];
        let start = Instant::now();
        for _ in 0..2000 {
            view.read_at(&mut buf, random.next() % (SIZE / 4096) * 4096).unwrap();
        }
        println!(
            "view at {what} over {} segments: open {:.1} ms, 4 KiB random read {:.0} us",
            view.layers(),
            opened.as_secs_f64() * 1e3,
            start.elapsed().as_secs_f64() * 1e6 / 2000.0
        );
    }
}
