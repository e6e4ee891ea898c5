//! What a start finds, whatever happened to the file.

use std::fs;

use farshore_extent::{BlockSizes, Epoch, Extent, Lsn, Seq, VolumeId, VolumeSize};
use proptest::prelude::*;

use super::*;
use crate::backing::{BlockIdentity, FileIdentity, Identity};
use crate::core::{
    BLOCK_REGIONS, IntentBlock, IntentCommit, IntentEnd, IntentLoss, RegionMap, Start,
};

const REGION: u64 = 1 << 20;

fn volume() -> VolumeId {
    VolumeId::from_bytes(*b"a volume's bytes")
}

fn geometry(regions: u64) -> Geometry {
    let size = VolumeSize::new(regions * REGION).unwrap();
    Geometry { volume: volume(), size, blocks: BlockSizes::E512, region: REGION }
}

fn identity(mtime_ns: i64) -> Identity {
    Identity::File(FileIdentity { dev: 1, ino: 2, size: 3, mtime_ns, ctime_ns: 5 })
}

fn block(boot: &str, written_sectors: u64, lasting: Option<&str>) -> Identity {
    let (boot_id, disk_sequence) = (boot.to_owned(), Some(9));
    Identity::Block(BlockIdentity {
        boot_id,
        rdev: 7,
        disk_sequence,
        written_sectors,
        size: 3,
        lasting: lasting.map(str::to_owned),
    })
}

fn lsn(seq: u64) -> Lsn {
    Lsn::new(Epoch::new(4), Seq::new(seq))
}

fn map(geometry: &Geometry, set: &[u64]) -> RegionMap {
    let mut map = RegionMap::new(geometry.size, geometry.region);
    for region in set {
        map.set(*region);
    }
    map
}

fn begun(dir: &std::path::Path, geometry: Geometry, set: &RegionMap) -> StateFile<FileMedium> {
    let mut file = StateFile::new(FileMedium::new(dir, "v"));
    file.load(volume());
    let (epoch, identity) = (Epoch::new(4), Some(identity(4)));
    file.begin(&Begin { geometry, epoch, identity, set, released: lsn(3) }).unwrap();
    file
}

fn found(dir: &std::path::Path) -> Found {
    StateFile::new(FileMedium::new(dir, "v")).load(volume())
}

fn start(found: &Found, regions: u64, now: &Identity) -> Start {
    plan(found, &geometry(regions), Some(now)).start
}

fn regions_of(start: &Start) -> Option<Vec<u64>> {
    match start {
        Start::CopyPart { ranges, .. } => {
            Some(ranges.iter().map(|r| r.offset() / REGION).collect())
        }
        Start::Copy { .. } | Start::Compare { .. } | Start::Continues { .. } => None,
    }
}

#[test]
fn after_a_crash_the_regions_that_are_set_are_sent_to_who_has_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(found(dir.path()), Found::Nothing);
    let geometry = geometry(640);
    let mut file = begun(dir.path(), geometry, &map(&geometry, &[]));
    let blocks = vec![IntentBlock { index: 0, words: map(&geometry, &[0, 63, 639]).block(0) }];
    let commit = IntentCommit { blocks, released: lsn(8), size: geometry.size };
    assert_eq!(file.commit(&commit), IntentEnd::Durable);
    let Start::CopyPart { ranges, released, compare: true, reason } =
        start(&found(dir.path()), 640, &identity(99))
    else {
        panic!("only a part is sent")
    };
    assert_eq!(ranges.iter().map(|r| r.offset() / REGION).collect::<Vec<_>>(), [0, 63, 639]);
    assert_eq!(released, lsn(8));
    assert_eq!(reason, "filterd had not stopped in order: comparing 3 of 640 regions");
    let other = Identity::File(FileIdentity { dev: 1, ino: 77, size: 3, mtime_ns: 4, ctime_ns: 5 });
    for (regions, now) in [(640, &other), (639, &identity(4))] {
        assert!(matches!(start(&found(dir.path()), regions, now), Start::Compare { .. }));
    }
}

#[test]
fn a_stop_in_order_goes_on_or_sends_what_was_left_only_when_nobody_wrote_since() {
    let dir = tempfile::tempdir().unwrap();
    let geometry = geometry(40);
    let none = map(&geometry, &[]);
    let mut file = begun(dir.path(), geometry, &none);
    file.stop(identity(6), lsn(9), &[], &none).unwrap();
    assert_eq!(start(&found(dir.path()), 40, &identity(6)), Start::Continues { last: lsn(9) });
    assert!(matches!(start(&found(dir.path()), 40, &identity(7)), Start::Compare { .. }));
    assert!(matches!(plan(&found(dir.path()), &geometry, None).start, Start::Compare { .. }));

    let mut file = begun(dir.path(), geometry, &none);
    let left = [Extent::new(4096, 512).unwrap(), Extent::new(5 * REGION, REGION).unwrap()];
    file.stop(identity(6), lsn(9), &left, &map(&geometry, &[0, 5, 6])).unwrap();
    let stopped = plan(&found(dir.path()), &geometry, Some(&identity(6)));
    assert!(matches!(&stopped.start, Start::CopyPart { ranges, .. } if *ranges == left));
    assert_eq!(stopped.set.iter().collect::<Vec<_>>(), [0, 5]);
    // Without the ranges their regions are sent.
    fs::write(dir.path().join("v.ranges"), b"FSRANGE1").unwrap();
    let start = start(&found(dir.path()), 40, &identity(6));
    assert_eq!(regions_of(&start), Some(vec![0, 5, 6]));
}

#[test]
fn a_block_device_in_another_boot_counts_only_when_it_is_the_same_and_nobody_has_written_to_it() {
    let (one, two) = (Some("wwid naa.5000 1"), Some("wwid naa.5001 1"));
    for (before, later, may) in [
        (one, block("this", 5000, one), true),
        (one, block("this", 10, one), false),
        (one, block("next", 0, one), true),
        (one, block("next", 8, one), false),
        (one, block("next", 0, two), false),
        (None, block("next", 0, None), false),
        (None, block("this", 5000, None), true),
        (one, identity(1), false),
    ] {
        let before = block("this", 4000, before);
        assert_eq!(before.may_be_followed_by(&later), may, "{later:?}");
    }
}

#[derive(Debug)]
struct Flaky(FileMedium, u8);
impl Medium for Flaky {
    fn read(&self) -> std::io::Result<Vec<u8>> {
        self.0.read()
    }
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        // 1: no block can be written. 2: nor the first superblock. 3: nothing at all.
        let refused = match self.1 {
            0 => false,
            1 => offset >= 8192,
            2 => offset != 4096,
            _ => true,
        };
        if refused {
            Err(std::io::ErrorKind::StorageFull.into())
        } else {
            self.0.write_at(bytes, offset)
        }
    }
    fn sync(&mut self) -> std::io::Result<()> {
        self.0.sync()
    }
    fn read_ranges(&self) -> std::io::Result<Vec<u8>> {
        self.0.read_ranges()
    }
    fn write_ranges(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.write_ranges(bytes)
    }
    fn doubt(&mut self) -> std::io::Result<()> {
        self.0.doubt()
    }
    fn trust(&mut self) {
        self.0.trust();
    }
}

#[test]
fn what_cannot_be_recorded_is_recorded_as_everything_and_recovers() {
    let (dir, run) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let geometry = geometry(40);
    let medium = || FileMedium::new(dir.path(), "v").with_note(run.path());
    let mut file = StateFile::new(Flaky(medium(), 0));
    let none = map(&geometry, &[]);
    let begin = Begin {
        geometry,
        epoch: Epoch::new(4),
        identity: Some(identity(1)),
        set: &none,
        released: lsn(1),
    };
    file.begin(&begin).unwrap();
    let blocks = vec![IntentBlock { index: 0, words: map(&geometry, &[7]).block(0) }];
    let commit = IntentCommit { blocks, released: lsn(8), size: geometry.size };
    for how in [1, 2] {
        file.medium_mut().1 = how;
        assert_eq!(file.commit(&commit), IntentEnd::Lost(IntentLoss::AllMayDiffer));
        assert!(matches!(start(&found(dir.path()), 40, &identity(1)), Start::Compare { .. }));
        file.medium_mut().1 = 0;
        assert!(file.works_again());
        assert_eq!(file.commit(&commit), IntentEnd::Durable);
        let after = start(&found(dir.path()), 40, &identity(1));
        assert_eq!(regions_of(&after), Some(vec![7]));
    }
    // Nothing can be written: until the next boot a note elsewhere says that.
    file.medium_mut().1 = 3;
    assert_eq!(file.commit(&commit), IntentEnd::Lost(IntentLoss::UntilBoot));
    assert!(!file.works_again());
    let after_a_kill = || start(&StateFile::new(medium()).load(volume()), 40, &identity(1));
    assert!(matches!(after_a_kill(), Start::Compare { .. }));
    file.medium_mut().1 = 0;
    assert!(file.works_again());
    assert_eq!(file.commit(&commit), IntentEnd::Durable);
    assert_eq!(regions_of(&after_a_kill()), Some(vec![7]));
    // And nobody takes the note.
    file.medium_mut().1 = 3;
    drop(run);
    assert_eq!(file.commit(&commit), IntentEnd::Lost(IntentLoss::Nothing));
    assert!(!file.works_again());
}

#[test]
fn a_volume_that_has_grown_is_believed_only_when_its_new_part_is_marked_durably() {
    let dir = tempfile::tempdir().unwrap();
    let (small, large) = (geometry(40), geometry(BLOCK_REGIONS + 5));
    let mut file = begun(dir.path(), small, &map(&small, &[]));
    let started = |regions| start(&found(dir.path()), regions, &identity(4));
    assert!(
        matches!(started(BLOCK_REGIONS + 5), Start::Compare { .. }),
        "the disk tells no such size"
    );
    let added: Vec<u64> = (39..BLOCK_REGIONS + 5).collect();
    let set = map(&large, &added);
    let blocks = (0..2).map(|index| IntentBlock { index, words: set.block(index) }).collect();
    let commit = IntentCommit { blocks, released: lsn(8), size: large.size };
    assert_eq!(file.commit(&commit), IntentEnd::Durable);
    assert_eq!(regions_of(&started(BLOCK_REGIONS + 5)), Some(added));
    assert!(matches!(started(40), Start::Compare { .. }));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    /// Each byte flipped, each truncation: never fewer regions than were set, and never "clean".
    #[test]
    fn damage_means_more_is_sent_never_less(
        set in prop::collection::btree_set(0u64..2 * BLOCK_REGIONS, 0..20),
        at in any::<prop::sample::Index>(),
        flip in 1u8..=255,
        cut in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let geometry = geometry(2 * BLOCK_REGIONS);
        let set: Vec<u64> = set.into_iter().collect();
        begun(dir.path(), geometry, &map(&geometry, &set));
        let path = dir.path().join("v.state");
        let mut bytes = fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        if cut { bytes.truncate(at) } else { bytes[at] ^= flip }
        fs::write(&path, &bytes).unwrap();
        match start(&found(dir.path()), 2 * BLOCK_REGIONS, &identity(4)) {
            Start::Copy { .. } | Start::Compare { .. } => {}
            Start::Continues { .. } => prop_assert!(false, "taken for clean"),
            part @ Start::CopyPart { .. } => {
                let sent = regions_of(&part).unwrap();
                prop_assert!(set.iter().all(|region| sent.contains(region)));
            }
        }
    }
}

#[test]
fn the_state_of_another_volume_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let geometry = geometry(40);
    begun(dir.path(), geometry, &map(&geometry, &[]));
    let other = StateFile::new(FileMedium::new(dir.path(), "v")).load(VolumeId::random());
    assert!(matches!(other, Found::Damaged(_)));
}

/// The bytes are a format: this file was written by the version that introduced it.
#[test]
fn the_golden_file_reads_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let geometry = geometry(640);
    begun(dir.path(), geometry, &map(&geometry, &[0, 63, 639]));
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/volume.state");
    let written = fs::read(dir.path().join("v.state")).unwrap();
    if std::env::var_os("FARSHORE_BLESS").is_some() {
        fs::write(&golden, &written).unwrap();
    }
    assert_eq!(fs::read(&golden).unwrap(), written, "FARSHORE_BLESS=1 writes it anew");
    let Found::Stored(stored) = found(dir.path()) else { panic!("it can be read") };
    assert_eq!((stored.geometry, stored.epoch), (geometry, Epoch::new(4)));
    let set = map(&geometry, &[0, 63, 639]);
    assert_eq!(stored.left, Left::Regions { set, released: lsn(3), damaged: 0 });
}
