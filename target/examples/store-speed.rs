//! Speed of the replica store on a directory: commit throughput against bare durable writes of the
//! same size, and the time to open a view over many segments.
//!
//! `cargo run --release -p farshore-target --example store-speed -- DIR [MIB]`
#![allow(clippy::unwrap_used, clippy::print_stdout)] // a measuring tool: a panic is its report

mod journal;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use farshore_extent::{Epoch, Lsn, Seq};
use farshore_target::store::{AlignedBuf, Disk, FileDisk, FileKind, Store, StoreConfig};
use journal::{Random, Source};

const SIZE: u64 = 8 << 30;
const WRITE: u64 = 16 << 10;

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
    let (mut store, meta) = journal::create(&dir, SIZE);
    let mut source = Source::new(meta, WRITE);
    let (mut in_append, mut in_commit) = (0.0, 0.0);
    for _ in 0..mib {
        let (append, commit) = journal::take(&mut store, &source.batch());
        in_append += append;
        in_commit += commit;
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
    let prev = source.last;
    let middle = Lsn::new(Epoch::new(1), Seq::new(prev.seq.get() / 2));
    let mut random = Random(7);
    for (what, at) in [("newest", prev), ("middle", middle)] {
        let start = Instant::now();
        let view = store.open_view(at).unwrap();
        let opened = start.elapsed();
        let mut buf = vec![0; 4096];
        let start = Instant::now();
        for _ in 0..2000 {
            view.read_at(&mut buf, random.next() % (SIZE / 4096) * 4096).unwrap();
        }
        println!(
            "view at {what} over {} layers: open {:.1} ms, 4 KiB random read {:.0} us",
            view.layers(),
            opened.as_secs_f64() * 1e3,
            start.elapsed().as_secs_f64() * 1e6 / 2000.0
        );
    }
}
