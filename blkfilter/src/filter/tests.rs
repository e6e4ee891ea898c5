//! Real queues on real files, against a reader that applies what was captured.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use farshore_extent::{ChunkSize, Epoch, Extent, Lsn, VolumeId};

use super::{CopyLoop, FetchWait, FilterConfig, FilterDevice, Host};
use crate::backing::{Backing, Mode};
use crate::control::DescriptorBody;
use crate::core::{Attach, Faults, Limits, Start};
use crate::device::{Completion, Device, DeviceError, Request, SlotUse, Tag};
use crate::sys::pool::PoolMemory;
use crate::sys::pool_reader::ReadOnlyPool;
use crate::sys::ring::Engine;
use crate::sys::wake::wait_readable;

const SIZE: u64 = 4 << 20;

struct World {
    _dir: tempfile::TempDir,
    host: Arc<Host>,
    device: Arc<FilterDevice>,
    volume: VolumeId,
    path: std::path::PathBuf,
}

impl World {
    fn new(place: &Path, engine: Engine, pool: u64, start: Start) -> Self {
        Self::with(place, engine, pool, start, Faults::default())
    }

    fn with(place: &Path, engine: Engine, pool: u64, start: Start, faults: Faults) -> Self {
        let dir = tempfile::tempdir_in(place).unwrap();
        let path = dir.path().join("disk.img");
        fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        let backing = Backing::open(&path, Mode::ReadWrite).unwrap();
        let host = Arc::new(Host::new(Epoch::new(3), Limits { faults, ..Limits::default() }));
        let volume = VolumeId::random();
        let chunk = ChunkSize::new(64 << 10).unwrap();
        let (size, blocks) = (backing.size(), backing.blocks());
        let attach = Attach { volume, size, blocks, chunk, pool_bytes: pool, start, intent: None };
        let key = host.attach(attach).unwrap();
        let device = FilterDevice::new(FilterConfig {
            host: Arc::clone(&host),
            key,
            backing: Arc::new(backing),
            pool: PoolMemory::shared_for_claims(pool).unwrap(),
            chunk,
            engine,
        });
        Self { _dir: dir, host, device, volume, path }
    }

    /// Fetches, applies and releases until nothing is left and the volume is ordered.
    fn replicate(&self, image: &mut [u8], after: &mut Lsn, done: impl Fn() -> bool) {
        let fd: OwnedFd = self.device.pool().read_only_fd().unwrap();
        let pool = ReadOnlyPool::map(&fd, self.device.pool().capacity()).unwrap();
        let ms = Duration::from_millis;
        let wait = FetchWait { want_bytes: 1 << 20, wait: ms(2), idle: ms(20) };
        loop {
            let finished = done();
            let fetched = self.host.fetch(self.volume, *after, &wait).unwrap();
            for record in &fetched.records {
                let lsn = Lsn::new(fetched.epoch, record.seq);
                assert!(lsn > *after);
                *after = lsn;
                let at = |e: Extent| {
                    usize::try_from(e.offset()).unwrap()..usize::try_from(e.end()).unwrap()
                };
                match &record.body {
                    DescriptorBody::Write { extent, place }
                    | DescriptorBody::Copy { extent, place } => {
                        let bytes = pool.bytes(place.offset, extent.len()).unwrap();
                        assert_eq!(crc32c::crc32c(bytes), place.crc);
                        image[at(*extent)].copy_from_slice(bytes);
                    }
                    DescriptorBody::Zero { extent, .. } => image[at(*extent)].fill(0),
                    _ => {}
                }
            }
            self.host.release(self.volume, *after).unwrap();
            let status = self.host.status(self.volume).unwrap();
            if finished && fetched.records.is_empty() && status.dirty_bytes == 0 {
                return;
            }
        }
    }
}

/// Keeps `depth` requests in flight on one queue, most of them on the same few blocks.
fn storm(device: &Arc<FilterDevice>, writer: u64, count: u64, depth: usize) -> u64 {
    let mut queue = Arc::clone(device).open_queue().unwrap();
    let mut state = writer.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut done: Vec<Completion> = vec![];
    let (mut sent, mut ended) = (0, 0);
    while ended < count {
        while sent < count && queue.in_flight() < depth {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let len = [4096, 8192, 65536, 131_072][usize::try_from(state >> 20 & 3).unwrap()];
            // Three of four lie within the first 256 KiB.
            let range = if state & 3 == 0 { SIZE - len } else { 256 << 10 };
            let offset = (state >> 8) % range / 4096 * 4096;
            let extent = Extent::new(offset, len).unwrap();
            let request = if state >> 40 & 31 == 0 {
                Request::Zero { extent, fua: false, may_unmap: true }
            } else if state >> 40 & 31 == 1 {
                Request::Flush
            } else {
                let len = u32::try_from(len).unwrap();
                let slot = queue.reserve(len, SlotUse::Write).unwrap();
                queue.bytes(&slot).fill(u8::try_from(state >> 48 & 255).unwrap());
                Request::Write { extent, slot, fua: state & 64 == 0 }
            };
            queue.submit(Tag(sent), request);
            sent += 1;
        }
        queue.reap(&mut done);
        if done.is_empty() && queue.in_flight() > 0 {
            wait_readable(&[queue.wake_fd()], Some(Duration::from_secs(20))).unwrap();
        }
        for one in done.drain(..) {
            assert_eq!(one.result, Ok(()));
            ended += 1;
        }
    }
    ended
}

fn race(place: &Path, engine: Engine, pool: u64, start: Start) {
    let world = World::new(place, engine, pool, start);
    assert!(is_equal(&world), "the replica is not the disk");
    let status = world.host.status(world.volume).unwrap();
    assert_eq!((status.pool_used, status.in_flight), (0, 0));
    assert_eq!(world.device.pool().used(), 0);
    world.host.detach(world.device.key).unwrap();
}

/// Three writers race while a reader and the copy loop work; then replica and disk are compared.
fn is_equal(world: &World) -> bool {
    let mut copy = CopyLoop::start(&world.device, 0).unwrap();
    let mut image = vec![0; usize::try_from(SIZE).unwrap()];
    let mut after = Lsn::ZERO;
    std::thread::scope(|scope| {
        let device = &world.device;
        let writers: Vec<_> =
            (1..=3).map(|w| scope.spawn(move || storm(device, w, 400, 16))).collect();
        let all = || writers.iter().all(std::thread::ScopedJoinHandle::is_finished);
        world.replicate(&mut image, &mut after, all);
        assert!(writers.into_iter().all(|w| w.join().unwrap() == 400));
    });
    world.replicate(&mut image, &mut after, || true);
    copy.stop();
    image == fs::read(&world.path).unwrap()
}

fn continues() -> Start {
    Start::Continues { last: Lsn::ZERO }
}

fn copy() -> Start {
    Start::Copy { reason: "first copy".into() }
}

#[test]
fn racing_writers_on_the_same_blocks_leave_replica_and_disk_equal() {
    race(&std::env::temp_dir(), Engine::Auto, 64 << 20, continues());
}

#[test]
fn racing_writers_during_the_first_copy_leave_replica_and_disk_equal() {
    race(&std::env::temp_dir(), Engine::Auto, 64 << 20, copy());
}

#[test]
fn racing_writers_on_a_pool_that_is_always_full_leave_replica_and_disk_equal() {
    race(&std::env::temp_dir(), Engine::Auto, 4 << 20, continues());
}

#[test]
fn without_io_uring_everything_holds_all_the_same() {
    race(&std::env::temp_dir(), Engine::Blocking, 4 << 20, copy());
}

#[test]
fn without_direct_io_everything_holds_all_the_same() {
    race(Path::new("/dev/shm"), Engine::Auto, 4 << 20, copy());
}

#[test]
fn a_queue_that_is_dropped_finishes_and_records_what_was_submitted() {
    let world = World::new(&std::env::temp_dir(), Engine::Auto, 4 << 20, continues());
    let mut queue = Arc::clone(&world.device).open_queue().unwrap();
    for i in 0..8 {
        let slot = queue.reserve(4096, SlotUse::Write).unwrap();
        queue.bytes(&slot).fill(7);
        let extent = Extent::new(i % 2 * 4096, 4096).unwrap();
        queue.submit(Tag(i), Request::Write { extent, slot, fua: false });
    }
    let unused = queue.reserve(4096, SlotUse::Write).unwrap();
    assert_eq!(queue.bytes(&unused).len(), 4096);
    drop(queue);
    let status = world.host.status(world.volume).unwrap();
    assert_eq!((status.writes, status.in_flight, status.records), (8, 0, 9));
    world.device.close();
    assert!(matches!(Arc::clone(&world.device).open_queue().err(), Some(DeviceError::Shutdown)));
}

#[test]
fn allocation_covers_the_range_and_tells_holes_from_data() {
    let world = World::new(&std::env::temp_dir(), Engine::Auto, 4 << 20, continues());
    let mut queue = Arc::clone(&world.device).open_queue().unwrap();
    let slot = queue.reserve(65536, SlotUse::Write).unwrap();
    queue.bytes(&slot).fill(7);
    let extent = Extent::new(1 << 20, 65536).unwrap();
    queue.submit(Tag(0), Request::Write { extent, slot, fua: true });
    drop(queue);
    let pieces = world.device.allocation(Extent::new(0, SIZE).unwrap(), 16);
    let told: Vec<(u64, bool)> = pieces.iter().map(|p| (p.len, p.hole)).collect();
    assert_eq!(told, [(1 << 20, true), (65536, false), (SIZE - (1 << 20) - 65536, true)]);
    assert_eq!(world.device.allocation(Extent::new(0, SIZE).unwrap(), 1).len(), 1);
}

#[test]
fn the_race_is_real_without_the_range_lock_replica_and_disk_differ() {
    let faults = Faults { no_range_lock: true, ..Faults::default() };
    let differs = |_| {
        let place = std::env::temp_dir();
        !is_equal(&World::with(&place, Engine::Auto, 64 << 20, continues(), faults))
    };
    assert!((0..50).any(differs), "the other tests of this file prove nothing");
}
