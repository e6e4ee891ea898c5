//! What the intent map costs a write: the same capture with the map and without it, in turn, over
//! one file on a real disk. Records are fetched and released unread.
//!
//! Usage: `intent-cost DIR PAIRS`. Prints JSON: for each load a list of `[with, without]` mean
//! times of a write in microseconds, one per pair, and of the slowest write.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use farshore_blkfilter::backing::{Backing, Mode};
use farshore_blkfilter::core::{Attach, IntentStart, Limits, RegionMap, Start};
use farshore_blkfilter::device::{Completion, Device, Request, SlotUse, Tag};
use farshore_blkfilter::filter::{FetchWait, FilterConfig, FilterDevice, Host, IntentKeeper};
use farshore_blkfilter::sys::pool::PoolMemory;
use farshore_blkfilter::sys::ring::Engine;
use farshore_blkfilter::sys::wake::wait_readable;
use farshore_blkfilter::volume_state::{Begin, FileMedium, Geometry, StateFile};
use farshore_extent::{ChunkSize, Epoch, Extent, Lsn, VolumeId};

type Failure = Box<dyn std::error::Error>;

/// 64 regions.
const SIZE: u64 = 1 << 30;
const BLOCK: u64 = 4096;
const WRITES: u64 = 8192;

#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    random: bool,
    depth: usize,
    /// The regions are marked already.
    warm: bool,
}

const LOADS: [Load; 6] = [
    Load { name: "sequential 4k, depth 1, unmarked", random: false, depth: 1, warm: false },
    Load { name: "sequential 4k, depth 32, unmarked", random: false, depth: 32, warm: false },
    Load { name: "random 4k, depth 1, unmarked", random: true, depth: 1, warm: false },
    Load { name: "random 4k, depth 32, unmarked", random: true, depth: 32, warm: false },
    Load { name: "random 4k, depth 1, marked", random: true, depth: 1, warm: true },
    Load { name: "random 4k, depth 32, marked", random: true, depth: 32, warm: true },
];

/// Mean and longest time of a write in microseconds.
fn run(dir: &Path, image: &Path, load: Load, with_map: bool) -> Result<(f64, f64), Failure> {
    let backing = Backing::open(image, Mode::ReadWrite).map_err(|p| p.what)?;
    let host = Arc::new(Host::new(Epoch::new(1), Limits::default()));
    let (volume, chunk) = (VolumeId::random(), ChunkSize::DEFAULT);
    let (size, blocks) = (backing.size(), backing.blocks());
    let geometry = Geometry { volume, size, blocks, region: RegionMap::DEFAULT_REGION };
    let set = RegionMap::new(size, geometry.region);
    let mut state = StateFile::new(FileMedium::new(dir, "intent-cost"));
    let identity = backing.identity().ok();
    let epoch = Epoch::new(1);
    state.begin(&Begin { geometry, epoch, identity, set: &set, released: Lsn::ZERO })?;
    let pool = PoolMemory::shared_for_claims(256 << 20)?;
    let intent = with_map.then_some(IntentStart { set, cap: 1024 });
    let start = Start::Continues { last: Lsn::ZERO };
    let pool_bytes = pool.capacity();
    let key = host.attach(Attach { volume, size, blocks, chunk, pool_bytes, start, intent })?;
    let device = FilterDevice::new(FilterConfig {
        host: Arc::clone(&host),
        key,
        backing: Arc::new(backing),
        pool,
        chunk,
        engine: Engine::Auto,
    });
    let state = Arc::new(std::sync::Mutex::new(state));
    let keeper = if with_map { Some(IntentKeeper::start(&device, state)?) } else { None };
    let stop = Arc::new(AtomicBool::new(false));
    let reader = std::thread::spawn({
        let (host, stop) = (Arc::clone(&host), Arc::clone(&stop));
        move || consume(&host, volume, &stop)
    });
    if load.warm {
        let every_region = (0..SIZE / geometry.region).map(|region| region * geometry.region);
        write(&device, every_region.collect(), 8)?;
    }
    let mut seed = 88_172_645_463_325_252_u64;
    let offsets = (0..WRITES).map(|n| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        if load.random { seed % (SIZE / BLOCK) * BLOCK } else { n * BLOCK }
    });
    let took = write(&device, offsets.collect(), load.depth)?;
    stop.store(true, Ordering::Release);
    reader.join().map_err(|_| "the reader panicked")?;
    if let Some(keeper) = keeper {
        keeper.ask_to_stop();
        while !keeper.has_ended() {
            std::thread::yield_now();
        }
    }
    FileMedium::new(dir, "intent-cost").remove()?;
    Ok(took)
}

fn consume(host: &Host, volume: VolumeId, stop: &AtomicBool) {
    let ms = Duration::from_millis;
    let wait = FetchWait { want_bytes: 1 << 20, wait: ms(20), idle: ms(50) };
    let mut at = Lsn::ZERO;
    while !stop.load(Ordering::Acquire) {
        let Ok(fetched) = host.fetch(volume, at, &wait) else { return };
        if let Some(last) = fetched.records.last() {
            at = Lsn::new(fetched.epoch, last.seq);
            if host.release(volume, at).is_err() {
                return;
            }
        }
    }
}

fn write(
    device: &Arc<FilterDevice>,
    offsets: Vec<u64>,
    depth: usize,
) -> Result<(f64, f64), Failure> {
    let mut queue = Arc::clone(device).open_queue()?;
    let mut done: Vec<Completion> = Vec::new();
    let mut begun = vec![Instant::now(); offsets.len()];
    let (mut sent, mut ended) = (0, 0);
    let (mut sum, mut longest) = (Duration::ZERO, Duration::ZERO);
    while ended < offsets.len() {
        while sent < offsets.len() && queue.in_flight() < depth {
            let slot = queue.reserve(u32::try_from(BLOCK)?, SlotUse::Write)?;
            queue.bytes(&slot).fill(0xA5);
            let extent = Extent::new(offsets[sent], BLOCK)?;
            begun[sent] = Instant::now();
            queue.submit(Tag(sent as u64), Request::Write { extent, slot, fua: false });
            sent += 1;
        }
        queue.reap(&mut done);
        if done.is_empty() && queue.in_flight() > 0 {
            wait_readable(&[queue.wake_fd()], None)?;
        }
        for one in done.drain(..) {
            one.result?;
            let took = begun[usize::try_from(one.tag.0)?].elapsed();
            (sum, longest) = (sum + took, longest.max(took));
            ended += 1;
        }
    }
    let micros = |d: Duration| d.as_secs_f64() * 1e6;
    Ok((micros(sum) / offsets.len() as f64, micros(longest)))
}

fn measure(dir: &Path, pairs: usize) -> Result<(), Failure> {
    let image = dir.join("intent-cost.img");
    let file = File::create(&image)?;
    let piece = vec![0x5A; 4 << 20];
    for at in (0..SIZE).step_by(piece.len()) {
        file.write_all_at(&piece, at)?;
    }
    file.sync_all()?;
    drop(file);
    let mut rows = Vec::new();
    for load in LOADS {
        let (mut means, mut longest) = (Vec::new(), Vec::new());
        for pair in 0..pairs {
            // A-B-B-A.
            let first = pair % 2 == 0;
            let a = run(dir, &image, load, first)?;
            let b = run(dir, &image, load, !first)?;
            let (with, without) = if first { (a, b) } else { (b, a) };
            means.push(format!("[{:.1}, {:.1}]", with.0, without.0));
            longest.push(format!("[{:.0}, {:.0}]", with.1, without.1));
        }
        let (means, longest) = (means.join(", "), longest.join(", "));
        rows.push(format!(
            "  \"{}\": {{\"mean\": [{means}], \"longest\": [{longest}]}}",
            load.name
        ));
    }
    std::fs::remove_file(&image)?;
    println!("{{\n{}\n}}", rows.join(",\n"));
    Ok(())
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    let [_, dir, pairs] = words.as_slice() else {
        eprintln!("usage: intent-cost DIR PAIRS");
        return ExitCode::FAILURE;
    };
    match measure(dir.as_ref(), pairs.parse().unwrap_or(5)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("intent-cost: {error}");
            ExitCode::FAILURE
        }
    }
}
