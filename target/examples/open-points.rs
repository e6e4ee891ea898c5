//! Time to open a point and to read from it: few and many points, a small and a huge volume, each
//! beside the others in one run. Prints JSON; `benches/points.py` makes ratios of it.
//!
//! `cargo run --release -p farshore-target --example open-points -- DIR POINTS WRITES ROUNDS`
#![allow(clippy::unwrap_used, clippy::print_stdout)] // a measuring tool: a panic is its report

mod journal;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use farshore_extent::{Extent, Lsn};
use farshore_target::store::{Content, PointReader, Store};
use journal::{Random, Source};

const WRITE: u64 = 4 << 10;
const SMALL: u64 = 1 << 30;
const HUGE: u64 = 1 << 40;
/// Points opened, and reads made, in one round.
const OPENS: u64 = 200;
const READS: u64 = 2000;

/// A store, the places of its points, and what making its runs has cost.
struct Filled {
    store: Store,
    points: Vec<Lsn>,
    size: u64,
    merge_seconds: f64,
}

fn fill(dir: &Path, size: u64, points: u64, writes: u64) -> Filled {
    let (mut store, meta) = journal::create(dir, size);
    let mut source = Source::new(meta, WRITE);
    let mut places = Vec::new();
    let mut merge_seconds = 0.0;
    for _ in 0..points {
        journal::take(&mut store, &source.point(writes));
        places.push(source.last);
        let start = Instant::now();
        while store.merge_runs().unwrap() {}
        merge_seconds += start.elapsed().as_secs_f64();
    }
    Filled { store, points: places, size, merge_seconds }
}

/// Opens points and reads one block of each; milliseconds, ascending.
fn opens(filled: &Filled, random: &mut Random) -> Vec<f64> {
    let mut block = vec![0; 4096];
    let count = filled.points.len() as u64;
    let mut one = || {
        let place = filled.points[usize::try_from(random.next() % count).unwrap()];
        let at = random.next() % (filled.size / WRITE) * WRITE;
        let start = Instant::now();
        let view = filled.store.open_view(place).unwrap();
        view.read_at(&mut block, at).unwrap();
        start.elapsed().as_secs_f64() * 1e3
    };
    let mut times: Vec<f64> = (0..OPENS).map(|_| one()).collect();
    times.sort_by(f64::total_cmp);
    times
}

/// The point as a plain file, without its holes.
fn flatten(view: &PointReader, path: &Path) -> File {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
    let file = file.unwrap();
    file.set_len(view.size().get()).unwrap();
    let mut bytes = vec![0; 1 << 20];
    for at in (0..view.size().get()).step_by(bytes.len()) {
        let piece = Extent::new(at, bytes.len() as u64).unwrap();
        let held = view.contents(piece, 1000).unwrap();
        if held.iter().any(|(_, content)| *content != Content::Zero) {
            view.read_at(&mut bytes, at).unwrap();
            file.write_all_at(&bytes, at).unwrap();
        }
    }
    file
}

/// Microseconds of one read of a block, from the view and from the file, which must be alike.
fn reads(view: &PointReader, file: &File, random: &mut Random) -> [f64; 2] {
    let blocks = view.size().get() / WRITE;
    let places: Vec<u64> = (0..READS).map(|_| random.next() % blocks * WRITE).collect();
    let (mut one, mut other) = (vec![0; 4096], vec![0; 4096]);
    let start = Instant::now();
    places.iter().for_each(|at| view.read_at(&mut one, *at).unwrap());
    let through = start.elapsed().as_secs_f64() * 1e6 / READS as f64;
    let start = Instant::now();
    places.iter().for_each(|at| file.read_exact_at(&mut other, *at).unwrap());
    let plain = start.elapsed().as_secs_f64() * 1e6 / READS as f64;
    assert!(one == other, "the point differs from its own copy");
    [through, plain]
}

fn memory_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, points, writes, rounds] = &args[..] else {
        panic!("usage: open-points DIR POINTS WRITES ROUNDS")
    };
    let dir = Path::new(dir);
    let number = |text: &String| text.parse::<u64>().unwrap();
    let (points, writes, rounds) = (number(points), number(writes), number(rounds));
    let few = fill(&dir.join("few"), SMALL, 10, writes);
    let before = memory_kib();
    let many = fill(&dir.join("many"), SMALL, points, writes);
    let grown = memory_kib().saturating_sub(before);
    let huge = fill(&dir.join("huge"), HUGE, points, writes);
    let (runs, run_bytes) = many.store.run_size();
    let mut random = Random(99);
    let middle = many.store.open_view(many.points[many.points.len() / 2]).unwrap();
    let file = flatten(&middle, &dir.join("flat.img"));
    let mut result = Vec::new();
    for _ in 0..rounds {
        let times = [&few, &many, &huge].map(|filled| opens(filled, &mut random));
        let read = reads(&middle, &file, &mut random);
        let half = |times: &Vec<f64>| (times[times.len() / 2], times[times.len() * 99 / 100]);
        let [few, many, huge] = times.each_ref().map(half);
        result.push(format!(
            "{{\"few\": [{}, {}], \"many\": [{}, {}], \"huge\": [{}, {}], \"reads\": [{}, {}]}}",
            few.0, few.1, many.0, many.1, huge.0, huge.1, read[0], read[1],
        ));
    }
    println!(
        "{{\"points\": {points}, \"extents\": {}, \"layers\": {}, \"runs\": {runs}, \"run_bytes\": \
         {run_bytes}, \"merge_seconds\": {}, \"memory_kib\": {grown}, \"rounds\": [{}]}}",
        points * writes,
        middle.layers(),
        many.merge_seconds,
        result.join(", ")
    );
}
