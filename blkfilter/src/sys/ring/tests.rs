use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use farshore_extent::Extent;

use super::super::aligned::AlignedBuf;
use super::super::disk_dir;
use super::*;

fn own(len: usize, fill: u8) -> IoBuf {
    let mut buf = AlignedBuf::zeroed(len);
    buf.fill(fill);
    IoBuf::Own(buf)
}

fn finish(ring: &mut Ring) -> Vec<Done> {
    let mut all = Vec::new();
    while ring.in_flight() > 0 {
        ring.wait(None).unwrap();
        ring.completions(|done| all.push(done));
    }
    all
}

fn file_in(dir: &Path, direct: bool) -> Arc<File> {
    let path = dir.join("backing");
    std::fs::write(&path, vec![0u8; 1 << 20]).unwrap();
    let flags = if direct { libc::O_DIRECT } else { 0 };
    Arc::new(File::options().read(true).write(true).custom_flags(flags).open(path).unwrap())
}

/// Writes, reads back, zeroes and syncs; the same must hold in every mode.
fn exercise(ring: &mut Ring, memory: &Arc<PoolMemory>) {
    for n in 0..32u8 {
        let mut slice = memory.reserve(8192).unwrap();
        slice.bytes_mut().fill(n + 1);
        let op =
            Op::Write { offset: u64::from(n) * 8192, buf: IoBuf::Pool(slice), durable: n % 8 == 0 };
        ring.push(op, u64::from(n));
    }
    let mut tags: Vec<_> = finish(ring)
        .into_iter()
        .map(|done| {
            done.result.unwrap();
            assert_eq!(done.buf.unwrap().len(), 8192);
            done.user_data
        })
        .collect();
    tags.sort_unstable();
    assert_eq!(tags, (0..32).collect::<Vec<_>>());
    assert_eq!(memory.used(), 0);

    ring.push(Op::Sync, 100);
    let extent = Extent::new(8192, 8192).unwrap();
    ring.push(Op::Zero { extent, may_unmap: true, durable: true }, 101);
    let extent = Extent::new(3 * 8192, 4096).unwrap();
    ring.push(Op::Zero { extent, may_unmap: false, durable: false }, 102);
    for done in finish(ring) {
        done.result.unwrap();
    }

    ring.push(Op::Read { offset: 0, buf: own(32 * 8192, 0xee) }, 7);
    let slice = memory.reserve(4096).unwrap();
    ring.push(Op::Read { offset: 4 * 8192, buf: IoBuf::Pool(slice) }, 8);
    let mut done = finish(ring);
    done.sort_by_key(|d| d.user_data);
    assert!(done[1].buf.as_ref().unwrap().bytes().iter().all(|&b| b == 5));
    let bytes = done[0].buf.as_ref().unwrap().bytes();
    done[0].result.unwrap();
    for (n, block) in bytes.chunks(4096).enumerate() {
        let zeroed = n == 2 || n == 3 || n == 6;
        let expected = if zeroed { 0 } else { u8::try_from(n / 2 + 1).unwrap() };
        assert!(block.iter().all(|&b| b == expected), "block {n}");
    }
}

#[test]
fn a_ring_can_move_to_its_thread() {
    fn movable<T: Send>() {}
    movable::<Ring>();
    let dir = disk_dir();
    let mut ring = Ring::new(file_in(dir.path(), true), RingConfig::default()).unwrap();
    ring.push(Op::Write { offset: 0, buf: own(4096, 1), durable: true }, 1);
    ring.submit().unwrap();
    let work = move || finish(&mut ring).into_iter().map(|done| done.result).collect::<Vec<_>>();
    assert_eq!(std::thread::spawn(work).join().unwrap(), [Ok(())]);
}

#[test]
fn direct_io_by_io_uring_with_registered_buffers() {
    let dir = disk_dir();
    let memory = PoolMemory::shared(1 << 20).unwrap();
    let config = RingConfig { depth: 8, fixed: vec![Arc::clone(&memory)], ..Default::default() };
    let mut ring = Ring::new(file_in(dir.path(), true), config).unwrap();
    assert!(ring.is_async(), "this test needs io_uring");
    assert_eq!(ring.registered(), 1);
    exercise(&mut ring, &memory);
}

#[test]
fn direct_io_without_registered_buffers() {
    let dir = disk_dir();
    let memory = PoolMemory::private(1 << 20).unwrap();
    let mut ring = Ring::new(file_in(dir.path(), true), RingConfig::default()).unwrap();
    assert_eq!(ring.registered(), 0);
    exercise(&mut ring, &memory);
}

#[test]
fn blocking_calls_do_the_same() {
    let dir = disk_dir();
    let memory = PoolMemory::shared(1 << 20).unwrap();
    for direct in [false, true] {
        let config = RingConfig { engine: Engine::Blocking, ..Default::default() };
        let mut ring = Ring::new(file_in(dir.path(), direct), config).unwrap();
        assert!(!ring.is_async());
        exercise(&mut ring, &memory);
    }
}

#[test]
fn buffered_files_are_read_and_written_at_once() {
    for dir in [tempfile::tempdir_in("/dev/shm").unwrap(), disk_dir()] {
        let memory = PoolMemory::shared(1 << 20).unwrap();
        let config =
            RingConfig { buffered: true, fixed: vec![Arc::clone(&memory)], ..Default::default() };
        let mut ring = Ring::new(file_in(dir.path(), false), config).unwrap();
        exercise(&mut ring, &memory);
        ring.push(Op::Read { offset: 0, buf: own(512, 0) }, 1);
        let mut seen = 0;
        ring.completions(|done| seen = done.user_data);
        assert_eq!((seen, ring.in_flight()), (1, 0));
    }
}

#[test]
fn reading_beyond_the_end_is_an_error_and_returns_the_buffer() {
    let dir = disk_dir();
    for engine in [Engine::Auto, Engine::Blocking] {
        let config = RingConfig { engine, ..Default::default() };
        let mut ring = Ring::new(file_in(dir.path(), true), config).unwrap();
        ring.push(Op::Read { offset: (1 << 20) - 4096, buf: own(8192, 0) }, 3);
        let done = finish(&mut ring).pop().unwrap();
        assert_eq!(done.result, Err(Errno::EIO));
        assert_eq!(done.buf.unwrap().len(), 8192);
    }
}

#[test]
fn errors_of_the_kernel_are_reported_with_their_number() {
    let dir = disk_dir();
    drop(file_in(dir.path(), false));
    let read_only = Arc::new(File::open(dir.path().join("backing")).unwrap());
    for engine in [Engine::Auto, Engine::Blocking] {
        let config = RingConfig { engine, ..Default::default() };
        let mut ring = Ring::new(Arc::clone(&read_only), config).unwrap();
        ring.push(Op::Write { offset: 0, buf: own(4096, 1), durable: false }, 3);
        assert_eq!(finish(&mut ring).pop().unwrap().result, Err(Errno::EBADF));
    }
}

#[test]
fn dropping_a_ring_waits_for_its_operations() {
    let dir = disk_dir();
    let file = file_in(dir.path(), true);
    let mut ring = Ring::new(Arc::clone(&file), RingConfig::default()).unwrap();
    for n in 0..128 {
        ring.push(Op::Write { offset: n * 4096, buf: own(4096, 9), durable: true }, n);
    }
    ring.submit().unwrap();
    drop(ring);
    let reader = File::open(dir.path().join("backing")).unwrap();
    let mut bytes = vec![0; 128 * 4096];
    reader.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|&b| b == 9));
}

#[test]
fn memory_over_the_limit_is_used_unregistered() {
    let dir = disk_dir();
    let small = PoolMemory::private(1 << 20).unwrap();
    // Larger than any registered buffer may be.
    let huge = PoolMemory::private(2 << 30).unwrap();
    let config = RingConfig { fixed: vec![Arc::clone(&huge), small], ..Default::default() };
    let mut ring = Ring::new(file_in(dir.path(), true), config).unwrap();
    assert_eq!(ring.registered(), 1);
    exercise(&mut ring, &huge);
}
