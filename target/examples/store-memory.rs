//! What a store costs in memory: fills one, or opens one and prints what the process holds then.
//! `benches/memory.py` makes ratios of it; two processes, because freed memory is not given back.
//!
//! `cargo run --release -p farshore-target --example store-memory -- fill DIR SIZE POINTS WRITES`
//! `cargo run --release -p farshore-target --example store-memory -- open DIR OPENS`
#![allow(clippy::unwrap_used, clippy::print_stdout)] // a measuring tool: a panic is its report

mod journal;

use std::path::Path;
use std::sync::Arc;

use farshore_extent::Lsn;
use farshore_target::store::{Disk, FileDisk, Store, StoreConfig, StoreEvent};
use journal::{Random, Source};

const WRITE: u64 = 4 << 10;
/// Most writes in a batch; 1 MiB is the limit.
const BATCH: u64 = 200;

fn fill(dir: &Path, size: u64, points: u64, writes: u64) {
    let (mut store, meta) = journal::create(dir, size);
    let mut source = Source::new(meta, WRITE);
    for _ in 0..points {
        for _ in 0..writes / BATCH {
            journal::take(&mut store, &source.writes(BATCH));
        }
        journal::take(&mut store, &source.point(writes % BATCH));
        while store.merge_runs().unwrap() {}
    }
}

fn memory_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// KiB of the process before the store is opened, and with it when a view of one of its points after
/// another was opened, read and closed.
fn open(dir: &Path, opens: u64) -> [u64; 2] {
    let before = memory_kib();
    let disk: Arc<dyn Disk> = Arc::new(FileDisk::open(dir).unwrap());
    let (store, _) = Store::open(disk, StoreConfig::default()).unwrap();
    // Places, not points: a list of all of them would be part of the figure.
    let (mut count, mut last) = (0, Lsn::ZERO);
    let mut random = Random(99);
    let mut some = Vec::new();
    let told = store.history(|event| {
        if let StoreEvent::Point(point) = event {
            (count, last) = (count + 1, point.lsn);
            if some.len() < usize::try_from(opens).unwrap() && random.next().is_multiple_of(7) {
                some.push(point.lsn);
            }
        }
    });
    told.unwrap();
    assert!(count > 0, "a store without points");
    some.push(last);
    let mut block = vec![0; 4096];
    // As often when there are few.
    for place in some.iter().cycle().take(usize::try_from(opens).unwrap()) {
        let view = store.open_view(*place).unwrap();
        let at = random.next() % (view.size().get() / WRITE) * WRITE;
        view.read_at(&mut block, at).unwrap();
    }
    [before, memory_kib()]
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |text: &String| text.parse::<u64>().unwrap();
    match &args[..] {
        [what, dir, size, points, writes] if what == "fill" => {
            fill(Path::new(dir), number(size), number(points), number(writes));
        }
        [what, dir, opens] if what == "open" => {
            println!("{:?}", open(Path::new(dir), number(opens)));
        }
        _ => panic!("usage: store-memory fill DIR SIZE POINTS WRITES | open DIR OPENS"),
    }
}
