//! How fast the journal takes batches, and what the disk writes for a byte of them while the oldest
//! are merged into the base. Prints JSON; `benches/ingest.py` holds it against fio.
//!
//! `cargo run --release -p farshore-target --example ingest -- DIR MIB BATCHES_A_COMMIT [KEPT_MIB]`
#![allow(clippy::unwrap_used, clippy::print_stdout)] // a measuring tool: a panic is its report

mod journal;

use std::collections::VecDeque;
use std::path::Path;
use std::time::Instant;

use farshore_changelog::{EncodedBatch, RawBatch};
use farshore_extent::Lsn;
use farshore_target::store::Store;
use journal::Source;

const SIZE: u64 = 1 << 30;
const WRITE: u64 = 16 << 10;
/// MiB that expire together: a few seconds of a busy volume.
const ROUND: u64 = 64;

/// Bytes that this process has had written to disks.
fn written() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap();
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.unwrap().trim().parse().unwrap()
}

/// What a worker does when it is idle, so it is no part of the speed.
fn background(store: &mut Store, floor: Option<Lsn>) {
    while store.prepare_reserve().unwrap() {}
    while store.merge_runs().unwrap() {}
    while floor.is_some_and(|floor| !store.expire(floor).unwrap().done) {}
}

/// Makes a group durable; seconds.
fn commit(store: &mut Store, group: &[EncodedBatch]) -> f64 {
    let checked = group.iter().map(|b| RawBatch::parse(&b.bytes).unwrap());
    let checked: Vec<_> = checked.map(|raw| raw.check_without_chain().unwrap()).collect();
    let start = Instant::now();
    checked.into_iter().for_each(|batch| store.append(batch).unwrap());
    store.commit().unwrap();
    start.elapsed().as_secs_f64()
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |n: usize| args.get(n).and_then(|text| text.parse::<u64>().ok());
    let (Some(dir), Some(mib), Some(each)) = (args.first(), number(1), number(2)) else {
        panic!("usage: ingest DIR MIB BATCHES_A_COMMIT [KEPT_MIB]")
    };
    let kept = number(3);
    let (mut store, meta) = journal::create(Path::new(dir), SIZE);
    let mut source = Source::new(meta, WRITE);
    let (mut seconds, mut bytes) = (0.0, 0);
    let mut places = VecDeque::new();
    let mut steady = None;
    for n in 0..mib / each {
        let group: Vec<_> = (0..each).map(|_| source.batch()).collect();
        places.push_back(source.last);
        let due = kept.is_some_and(|kept| places.len() as u64 * each >= kept + ROUND);
        let expired = if due {
            places.drain(..usize::try_from(ROUND / each).unwrap()).next_back()
        } else {
            None
        };
        background(&mut store, expired);
        if due && n * each >= mib / 2 {
            steady.get_or_insert_with(|| (written(), bytes));
        }
        seconds += commit(&mut store, &group);
        bytes += group.iter().map(|batch| batch.bytes.len() as u64).sum::<u64>();
    }
    let amplified =
        steady.map_or(0.0, |(disk, taken)| (written() - disk) as f64 / (bytes - taken) as f64);
    source.verify(&store);
    println!("{{\"bytes\": {bytes}, \"seconds\": {seconds}, \"amplification\": {amplified}}}");
}
