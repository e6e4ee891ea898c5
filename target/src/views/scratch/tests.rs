use farshore_extent::{Epoch, Lsn, Seq, ViewId, VolumeId, VolumeSize};
use proptest::prelude::*;

use super::*;
use crate::store::{FileDisk, SimDisk, SimFaults};

const SECTOR: u64 = 512;
const SIZE: u64 = 64 * SECTOR;
/// What the point holds everywhere.
const POINT: u8 = 0xEE;

fn ext(offset: u64, len: u64) -> Extent {
    Extent::new(offset, len).unwrap()
}

fn size(n: u64) -> usize {
    usize::try_from(n).unwrap()
}

fn identity() -> Identity {
    Identity {
        view: ViewId::from_bytes([1; 16]),
        volume: VolumeId::from_bytes([2; 16]),
        at: Lsn::new(Epoch::new(3), Seq::new(42)),
        size: VolumeSize::new(SIZE).unwrap(),
    }
}

fn upto(quota: u64) -> Limits {
    Limits { quota, reserve: None }
}

fn create(disk: &SimDisk) -> Scratch {
    Scratch::create(Arc::new(disk.clone()), identity(), upto(1 << 30)).unwrap()
}

fn open(disk: &SimDisk) -> Result<Scratch, OpenError> {
    Scratch::open(Arc::new(disk.clone()), identity(), upto(1 << 30))
}

/// What the view shows.
fn content(scratch: &Scratch) -> Vec<u8> {
    let mut seen = Vec::new();
    for (piece, place) in scratch.places(ext(0, SIZE)) {
        assert_eq!(piece.offset(), seen.len() as u64, "no gap, no overlap");
        let mut bytes = vec![0; size(piece.len())];
        match place {
            Place::Scratch => scratch.read(piece.offset(), &mut bytes).unwrap(),
            Place::Zero => {}
            Place::Point => bytes.fill(POINT),
        }
        seen.extend(bytes);
    }
    seen
}

proptest! {
    #[test]
    fn a_scratch_over_a_point_reads_like_a_disk_also_when_it_is_opened_again(
        ops in prop::collection::vec((0u8..6, 0u64..SIZE, 1u64..4000), 1..40),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let disk = || Arc::new(FileDisk::open(dir.path()).unwrap());
        let mut scratch = Scratch::create(disk(), identity(), upto(1 << 20)).unwrap();
        let mut model = vec![POINT; size(SIZE)];
        for (n, (op, offset, len)) in ops.into_iter().enumerate() {
            let extent = ext(offset, len.min(SIZE - offset));
            let range = size(offset)..size(extent.end());
            match op {
                0 => {
                    scratch.flush().unwrap();
                    drop(scratch);
                    scratch = Scratch::open(disk(), identity(), upto(1 << 20)).unwrap();
                }
                1 | 2 => { scratch.zero(extent).unwrap(); model[range].fill(0) }
                _ => {
                    let value = u8::try_from(n).unwrap();
                    scratch.write(extent, &vec![value; size(extent.len())]).unwrap();
                    model[range].fill(value);
                }
            }
            prop_assert_eq!(&content(&scratch), &model);
        }
    }
}

/// A guest with a disk in memory that knows what each sector may hold after a power cut.
struct Guest {
    random: u64,
    written: u8,
    /// The content as of the last flush, and every one since.
    may_be: Vec<Vec<u8>>,
}

impl Guest {
    fn new(seed: u64) -> Self {
        Self { random: seed, written: 0, may_be: vec![vec![POINT]; size(SIZE / SECTOR)] }
    }

    fn below(&mut self, end: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(0x5eed);
        (self.random >> 33) % end
    }

    fn sectors(extent: Extent) -> std::ops::Range<usize> {
        size(extent.offset() / SECTOR)..size(extent.end() / SECTOR)
    }

    /// Writes, zeroes and flushes until something fails or `steps` are done.
    fn work(&mut self, scratch: &Scratch, steps: u64) -> Result<(), ScratchError> {
        for _ in 0..steps {
            let from = self.below(SIZE / SECTOR);
            let len = 1 + self.below(8).min(SIZE / SECTOR - from - 1);
            let extent = ext(from * SECTOR, len * SECTOR);
            match self.below(6) {
                0 | 1 => {
                    scratch.flush()?;
                    self.may_be.iter_mut().for_each(|all| drop(all.drain(..all.len() - 1)));
                }
                2 => {
                    self.may_be[Self::sectors(extent)].iter_mut().for_each(|all| all.push(0));
                    scratch.zero(extent)?;
                }
                _ => {
                    self.written = self.written % 200 + 1;
                    let value = self.written;
                    self.may_be[Self::sectors(extent)].iter_mut().for_each(|all| all.push(value));
                    scratch.write(extent, &vec![value; size(extent.len())])?;
                }
            }
        }
        Ok(())
    }

    /// Whatever is there now is what a flush would keep.
    fn check(&mut self, scratch: &Scratch, what: &str) {
        let now = content(scratch);
        for (n, (sector, all)) in now.chunks(size(SECTOR)).zip(&mut self.may_be).enumerate() {
            let value = sector[0];
            assert!(sector.iter().all(|b| *b == value), "{what}: sector {n} is torn");
            assert!(all.contains(&value), "{what}: sector {n} holds {value}, not one of {all:?}");
            *all = vec![value];
        }
    }
}

#[test]
fn after_a_power_cut_at_any_operation_what_was_flushed_is_there_and_nothing_foreign() {
    let mut cuts = 0;
    for seed in 0..24 {
        for op in 1.. {
            let disk = SimDisk::new(seed * 1000 + op);
            let scratch = create(&disk);
            let mut guest = Guest::new(seed);
            disk.crash_at(Some(disk.ops() + op));
            let worked = guest.work(&scratch, 40);
            if worked.is_ok() {
                break;
            }
            cuts += 1;
            disk.restart();
            let what = format!("seed {seed}, cut at operation {op}");
            let scratch = open(&disk).unwrap_or_else(|e| panic!("{what}: {e}"));
            guest.check(&scratch, &what);
            // It goes on, and the power goes again.
            guest.work(&scratch, 20).unwrap();
            disk.crash();
            disk.restart();
            guest.check(&open(&disk).unwrap(), &format!("{what}, second cut"));
        }
    }
    assert!(cuts > 500, "{cuts} cuts");
}

#[test]
fn a_log_that_has_grown_is_written_anew_and_says_the_same() {
    let disk = SimDisk::new(1);
    let scratch = create(&disk);
    let mut longest = 0;
    // Every sector changes its place in the map with each round.
    for round in 0..40u64 {
        for n in 0..SIZE / SECTOR {
            let extent = ext(n * SECTOR, SECTOR);
            match (n + round).is_multiple_of(2) {
                true => scratch.zero(extent).unwrap(),
                false => scratch.write(extent, &[7; 512]).unwrap(),
            }
        }
        scratch.flush().unwrap();
        longest = longest.max(disk.contents("map").unwrap().len());
    }
    assert!(longest < 8192, "{longest} bytes of log for 1536 bytes of record");
    let before = content(&scratch);
    drop(scratch);
    assert_eq!(content(&open(&disk).unwrap()), before);
}

#[test]
fn a_failed_sync_ends_all_writes_until_the_scratch_is_opened_again() {
    let disk = SimDisk::new(5);
    let scratch = create(&disk);
    let mut guest = Guest::new(5);
    guest.work(&scratch, 30).unwrap();
    disk.set_faults(SimFaults { sync_fails: 1000, ..SimFaults::default() });
    assert!(matches!(scratch.flush(), Err(ScratchError::Io(_))));
    disk.set_faults(SimFaults::default());
    assert!(scratch.failed().is_some());
    assert!(matches!(scratch.flush(), Err(ScratchError::Io(_))), "a second sync proves nothing");
    assert!(scratch.write(ext(0, 512), &[1; 512]).is_err());
    assert!(scratch.zero(ext(0, 512)).is_err());
    disk.crash();
    disk.restart();
    guest.check(&open(&disk).unwrap(), "opened again");
}

#[test]
fn a_disk_without_room_for_the_log_fails_the_flush_and_a_later_one_keeps_all() {
    let disk = SimDisk::new(6);
    let scratch = create(&disk);
    scratch.write(ext(0, 4096), &[1; 4096]).unwrap();
    disk.set_capacity(Some(disk.used()));
    assert!(matches!(scratch.flush(), Err(ScratchError::DiskFull)));
    disk.set_capacity(None);
    scratch.flush().unwrap();
    disk.crash();
    disk.restart();
    assert_eq!(content(&open(&disk).unwrap())[..4096], [1; 4096]);
}

#[test]
fn damage_of_the_map_is_told_from_a_torn_end_and_never_believed() {
    let disk = SimDisk::new(7);
    let scratch = create(&disk);
    for n in 0..3 {
        scratch.write(ext(n * 4096, 512), &[1; 512]).unwrap();
        scratch.flush().unwrap();
    }
    drop(scratch);
    // Of the header, and of three records.
    let why = |at: u64| {
        assert!(disk.rot("map", at, 4));
        let opened = open(&disk);
        assert!(disk.rot("map", at, 4));
        opened.map(|scratch| scratch.used()).map_err(|e| e.to_string())
    };
    assert!(why(20).unwrap_err().contains("header"));
    assert!(why(512 + 20).unwrap_err().contains("record 1 at 512 is damaged"));
    assert!(why(1024 + 45).unwrap_err().contains("record 2 at 1024 is damaged"));
    assert_eq!(open(&disk).unwrap().used(), 1536);
    let other = Identity { at: Lsn::ZERO, ..identity() };
    let taken = Scratch::open(Arc::new(disk.clone()), other, upto(1 << 30));
    assert!(taken.is_err_and(|e| e.to_string().contains("another place")));
    // The last record cannot be told from a torn one: its flush did not end.
    assert!(disk.rot("map", 1536 + 45, 4));
    assert_eq!(open(&disk).unwrap().used(), 1024);
    assert_eq!(disk.contents("map").unwrap().len(), 1536, "the rest is cut");
}

#[test]
fn the_quota_counts_each_byte_once_and_zeroing_gives_back() {
    let disk = SimDisk::new(8);
    let scratch = Scratch::create(Arc::new(disk.clone()), identity(), upto(8192)).unwrap();
    scratch.write(ext(0, 8192), &[1; 8192]).unwrap();
    scratch.write(ext(4096, 4096), &[2; 4096]).unwrap();
    assert!(matches!(scratch.write(ext(8192, 512), &[3; 512]), Err(ScratchError::Full)));
    assert_eq!(scratch.places(ext(8192, 512)), [(ext(8192, 512), Place::Point)]);
    scratch.zero(ext(0, 4096)).unwrap();
    assert_eq!(scratch.used(), 4096);
    scratch.write(ext(8192, 512), &[3; 512]).unwrap();
    assert_eq!(scratch.used(), 4608);
    scratch.flush().unwrap();
    let again = Scratch::open(Arc::new(disk), identity(), upto(8192)).unwrap();
    assert_eq!(again.used(), 4608);
}

#[test]
fn new_writes_leave_the_reserve_of_the_disk_alone_and_old_ones_can_be_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let disk = || Arc::new(FileDisk::open(dir.path()).unwrap());
    let scratch = Scratch::create(disk(), identity(), upto(1 << 20)).unwrap();
    scratch.write(ext(0, 4096), &[1; 4096]).unwrap();
    scratch.flush().unwrap();
    let now = statvfs(dir.path()).unwrap();
    let tenth = now.blocks() * now.fragment_size() / 10;
    let free = now.blocks_available() * now.fragment_size();
    // As if the disk had just this much left; other files come and go meanwhile.
    let limits = |reserve| Limits { quota: 1 << 20, reserve: Some((dir.path().into(), reserve)) };
    assert!(limits(0).leave_room(free / 2).unwrap());
    assert!(!limits(u64::MAX).leave_room(free - tenth / 2).unwrap());
    assert!(!limits(tenth / 2).leave_room(free).unwrap());
    assert!(limits(u64::MAX).leave_room((free / 2).saturating_sub(tenth)).unwrap());
}
