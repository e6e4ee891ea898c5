use std::os::unix::fs::FileExt;

use super::*;
use crate::sys::aligned::AlignedBuf;
use crate::sys::disk_dir as disk;
use crate::sys::ring::{IoBuf, Op};

const SIZE: u64 = 8 << 20;

fn image(dir: &Path) -> PathBuf {
    let path = dir.join("image");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    path
}

fn memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn perform(ring: &mut Ring, op: Op) {
    ring.push(op, 1);
    while ring.in_flight() > 0 {
        ring.wait(None).unwrap();
        ring.completions(|done| done.result.unwrap());
    }
}

fn write(offset: u64, len: usize, fill: u8) -> Op {
    let mut buf = AlignedBuf::zeroed(len);
    buf.fill(fill);
    Op::Write { offset, buf: IoBuf::Own(buf), durable: false }
}

fn extent(offset: u64, len: u64) -> Extent {
    Extent::new(offset, len).unwrap()
}

fn all_data(backing: &Backing) -> Vec<Extent> {
    let mut from = 0;
    std::iter::from_fn(|| {
        let data = backing.next_data(from).unwrap()?;
        from = data.end();
        Some(data)
    })
    .collect()
}

#[test]
fn a_file_on_a_disk_is_opened_for_direct_io_and_in_memory_buffered() {
    for (dir, direct) in [(disk(), true), (memory(), false)] {
        let backing = Backing::open(&image(dir.path()), Mode::ReadWrite).unwrap();
        assert_eq!(backing.direct(), direct, "{}", dir.path().display());
        assert_eq!(backing.size().get(), SIZE);
        assert_eq!(backing.kind(), BackendKind::File);
        assert!(backing.blocks().logical() <= 4096 && backing.blocks().physical() == 4096);
        assert!(backing.volatile_cache() && backing.zeroes() && !backing.read_only());
        let mut ring = backing.ring(8, Engine::Auto, Vec::new()).unwrap();
        let unit = usize::try_from(backing.blocks().logical()).unwrap();
        perform(&mut ring, write(unit as u64, unit, 9));
        backing.sync().unwrap();
        let bytes = std::fs::read(backing.path()).unwrap();
        let (before, written) = bytes[..2 * unit].split_at(unit);
        assert!(before.iter().all(|&b| b == 0) && written.iter().all(|&b| b == 9));
    }
}

#[test]
fn the_claim_is_exclusive_and_lives_as_long_as_any_ring() {
    let dir = disk();
    let path = image(dir.path());
    for first in [Mode::ReadWrite, Mode::ReadOnly] {
        let backing = Backing::open(&path, first).unwrap();
        for second in [Mode::ReadWrite, Mode::ReadOnly] {
            assert_eq!(Backing::open(&path, second).unwrap_err().code.0, 4016);
        }
        let ring = backing.ring(8, Engine::Auto, Vec::new()).unwrap();
        drop(backing);
        assert_eq!(Backing::open(&path, Mode::ReadWrite).unwrap_err().code.0, 4016);
        drop(ring);
        Backing::open(&path, Mode::ReadWrite).unwrap();
    }
}

#[test]
fn patience_outlasts_a_claim_that_ends() {
    let dir = disk();
    let path = image(dir.path());
    let held = Backing::open(&path, Mode::ReadWrite).unwrap();
    let patience = std::time::Duration::from_millis(60);
    let refused = Backing::open_patiently(&path, Mode::ReadWrite, patience);
    assert_eq!(refused.unwrap_err().code.0, 4016);
    let path = &path;
    std::thread::scope(|scope| {
        let patience = std::time::Duration::from_secs(20);
        let waiting = scope.spawn(move || Backing::open_patiently(path, Mode::ReadWrite, patience));
        drop(held);
        waiting.join().unwrap().unwrap();
    });
}

#[test]
fn a_lock_of_another_kind_is_respected() {
    let dir = disk();
    let path = image(dir.path());
    let other = File::open(&path).unwrap();
    // QEMU's way: shared locks on single bytes.
    let lock = libc::flock {
        l_type: i16::try_from(libc::F_RDLCK).unwrap(),
        l_whence: 0,
        l_start: 100,
        l_len: 1,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&other, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    assert_eq!(Backing::open(&path, Mode::ReadWrite).unwrap_err().code.0, 4016);
}

#[test]
fn holes_are_skipped_and_data_is_found() {
    for dir in [disk(), memory()] {
        let backing = Backing::open(&image(dir.path()), Mode::ReadWrite).unwrap();
        assert_eq!(all_data(&backing), []);
        let mut ring = backing.ring(8, Engine::Auto, Vec::new()).unwrap();
        perform(&mut ring, write(1 << 20, 65536, 1));
        perform(&mut ring, write(SIZE - 65536, 65536, 1));
        assert_eq!(all_data(&backing), [extent(1 << 20, 65536), extent(SIZE - 65536, 65536)]);
        let inside = backing.next_data((1 << 20) + 4096).unwrap();
        assert_eq!(inside, Some(extent((1 << 20) + 4096, 65536 - 4096)));
        assert_eq!(backing.next_data(SIZE).unwrap(), None);
        let hole = Op::Zero { extent: extent(1 << 20, 65536), may_unmap: true, durable: true };
        perform(&mut ring, hole);
        assert_eq!(all_data(&backing), [extent(SIZE - 65536, 65536)]);
    }
}

#[test]
fn a_change_behind_our_back_changes_the_identity() {
    let dir = disk();
    let path = image(dir.path());
    let look = || Backing::open(&path, Mode::ReadWrite).unwrap().identity().unwrap();
    let first = look();
    assert_eq!(first, look());
    File::options().write(true).open(&path).unwrap().write_all_at(b"x", 5000).unwrap();
    let written = look();
    assert_ne!(first, written);
    let copy = dir.path().join("copy");
    std::fs::copy(&path, &copy).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::hard_link(&copy, &path).unwrap();
    assert_ne!(written, look());
    let text = serde_json::to_string(&written).unwrap();
    assert_eq!(serde_json::from_str::<Identity>(&text).unwrap(), written);
}

#[test]
fn read_only_backings_refuse_writes() {
    let dir = disk();
    let backing = Backing::open(&image(dir.path()), Mode::ReadOnly).unwrap();
    assert!(backing.read_only() && !backing.zeroes());
    let mut ring = backing.ring(8, Engine::Auto, Vec::new()).unwrap();
    ring.push(write(0, 4096, 1), 1);
    while ring.in_flight() > 0 {
        ring.wait(None).unwrap();
        ring.completions(|done| assert!(done.result.is_err()));
    }
}

#[test]
fn what_is_no_disk_or_too_small_is_refused() {
    let dir = disk();
    let code = |path: &Path| Backing::open(path, Mode::ReadWrite).unwrap_err().code.0;
    assert_eq!(code(&dir.path().join("missing")), 4011);
    assert_eq!(code(dir.path()), 4013);
    assert_eq!(code(Path::new("/dev/zero")), 4013);
    std::fs::write(dir.path().join("small"), b"x").unwrap();
    assert_eq!(code(&dir.path().join("small")), 4019);
}

#[test]
fn a_file_that_grows_is_measured_and_its_new_part_is_told_from_a_hole() {
    for dir in [disk(), memory()] {
        let path = image(dir.path());
        let backing = Backing::open(&path, Mode::ReadWrite).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(SIZE + (4 << 20)).unwrap();
        assert_eq!(backing.size().get(), SIZE, "nobody has told it");
        let bytes = backing.measure().unwrap();
        assert_eq!(bytes, SIZE + (4 << 20));
        assert!(backing.is_hole(extent(SIZE, 4 << 20)));
        file.write_all_at(&[1; 4096], SIZE + (2 << 20)).unwrap();
        assert!(!backing.is_hole(extent(SIZE, 4 << 20)));
        assert!(backing.is_hole(extent(SIZE, 1 << 20)), "there it is one still");
        backing.set_size(backing.usable(bytes).unwrap());
        assert_eq!(all_data(&backing), [extent(SIZE + (2 << 20), 4096)]);
        assert_eq!(backing.usable(SIZE + 100).unwrap_err().code.0, 4020);
        assert_eq!(backing.usable((512 << 40) + 4096).unwrap_err().code.0, 4035);
    }
}
