//! A store read from its folder alone: every point, whatever is damaged, and not a byte changed.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use farshore_extent::{Extent, Lsn, SECTOR};

use super::source::{Image, Rng, Source, assert_same, sector, tiny};
use crate::store::{
    CheckReport, FileDisk, ImageSink, OfflineStore, ReadOnlyDisk, Store, check, copy_out, inspect,
    inspect_segment,
};

/// An image in memory; what nobody gave stays `0xee`.
struct Memory(Vec<u8>);

impl Memory {
    fn part(&mut self, extent: Extent) -> &mut [u8] {
        let at = usize::try_from(extent.offset()).unwrap();
        &mut self.0[at..at + usize::try_from(extent.len()).unwrap()]
    }
}

impl ImageSink for Memory {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        let extent = Extent::new(offset, bytes.len() as u64).unwrap();
        self.part(extent).copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&mut self, extent: Extent) -> std::io::Result<()> {
        self.part(extent).fill(0);
        Ok(())
    }
}

fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(dir).unwrap().map(Result::unwrap);
    let read = |f: std::fs::DirEntry| std::fs::read(f.path()).unwrap();
    files.map(|f| (f.file_name().into_string().unwrap(), read(f))).collect()
}

/// A store with sealed segments, a base that has moved and an open segment; closed.
fn life(dir: &Path, seed: u64) -> Source {
    let mut source = Source::new(seed);
    let disk = Arc::new(FileDisk::open(dir).unwrap());
    let mut store = Store::create(disk, &source.meta(), tiny(Default::default())).unwrap().0;
    for round in 0..120 {
        source.batch();
        source.send(&mut store);
        source.acked = store.commit().unwrap().durable;
        if round == 50 {
            let upto = *source.images.keys().nth(source.images.len() / 3).unwrap();
            while !store.expire(upto).unwrap().done {}
        }
    }
    source
}

/// Copies the place out: what is not told to be unreadable is right.
fn assert_copied(store: &OfflineStore, at: Lsn, image: &Image) {
    let Ok(reader) = store.open_view(at) else { return };
    let mut out = Memory(vec![0xee; usize::try_from(reader.size().get()).unwrap()]);
    let mut told = 0;
    let copied = copy_out(&reader, &mut out, |at| {
        assert!(at >= told);
        told = at;
        true
    });
    let copied = copied.unwrap();
    assert_eq!(copied.digest, blake3::hash(&out.0));
    assert_eq!((copied.bytes, told), (reader.size().get(), reader.size().get()));
    for (n, tag) in image.sectors.iter().enumerate() {
        let extent = Extent::new(n as u64 * SECTOR, SECTOR).unwrap();
        let got = out.part(extent);
        match tag {
            _ if copied.unreadable.overlaps(extent) => assert_eq!(got, [0; 512]),
            Some(tag) => assert_eq!(got, sector(*tag), "sector {n} at {at}"),
            None => panic!("sector {n} at {at} is unknown and was given out"),
        }
    }
}

#[test]
fn every_moment_is_copied_out_of_the_folder_and_not_a_byte_of_it_is_changed() {
    let dir = tempfile::tempdir().unwrap();
    let source = life(dir.path(), 31);
    let before = contents(dir.path());
    let store = OfflineStore::open(dir.path()).unwrap();
    let at = store.position();
    assert_eq!((at.durable, store.report().damage.len()), (source.acked, 0));
    let kept: Vec<Lsn> = source.points.iter().copied().filter(|p| *p > at.base).collect();
    assert!(kept.len() > 10 && at.base > Lsn::ZERO && store.report().sealed > 1);
    assert_eq!(store.points().iter().map(|p| p.lsn).collect::<Vec<_>>(), kept);
    for (lsn, image) in source.images.range(at.floor..) {
        assert_eq!(store.open_view(*lsn).is_ok(), image.ordered, "{lsn}");
        assert_copied(&store, *lsn, image);
    }
    let mut told = (0, 0);
    let report = check(dir.path(), &mut |done, all| told = (done, all)).unwrap();
    assert_eq!((&report.findings[..], report.more), (&[][..], 0));
    assert!(report.frames > 20 && report.batches > 50, "{report:?}");
    assert!(told.0 > 0 && told.0 <= told.1, "{told:?}");
    assert_eq!(report.points, kept.len() as u64);
    assert_eq!(contents(dir.path()), before);
}

#[test]
fn a_base_that_lost_its_checksums_is_read_and_said_to_be_unverified() {
    let dir = tempfile::tempdir().unwrap();
    life(dir.path(), 33);
    assert_eq!(OfflineStore::open(dir.path()).unwrap().unverified_bytes(), 0);
    std::fs::remove_file(dir.path().join("base.crc")).unwrap();
    let store = OfflineStore::open(dir.path()).unwrap();
    let size = std::fs::metadata(dir.path().join("base.img")).unwrap().len();
    assert_eq!((store.unverified_bytes(), size > 0), (size, true));
    let report = check(dir.path(), &mut |_, _| {}).unwrap();
    assert_eq!(report.findings.len(), 1);
    assert_eq!((&report.findings[0].file[..], report.findings[0].points), ("base.crc", 0));
    assert!(!dir.path().join("base.crc").exists(), "the daemon makes it, nobody else");
}

/// A byte that is covered by a checksum: file and place.
fn covered(dir: &Path, rng: &mut Rng) -> (String, u64) {
    let disk = ReadOnlyDisk::open(dir).unwrap();
    let (sb, segments) = inspect(&disk).unwrap();
    let pick = usize::try_from(rng.below(segments.len() as u64)).unwrap();
    let segment = &segments[pick];
    let name = segment.name.clone();
    let within = |at: u64, len: u64, rng: &mut Rng| at + rng.below(len);
    let trailer = segment.trailer.as_ref();
    match (rng.below(10), trailer) {
        (0, _) => ("super".to_owned(), rng.below(4 * 4096)),
        (1, _) => {
            let known = |at: &u64| !sb.unknown.overlaps(Extent::new(*at, 1).unwrap());
            let at = std::iter::repeat_with(|| rng.below(sb.size.get())).find(known).unwrap();
            match at % 2 {
                0 => ("base.img".to_owned(), at),
                _ => ("base.crc".to_owned(), at / SECTOR * 4 + at % 4),
            }
        }
        (5, _) => (name, rng.below(4096)),
        (2, Some(_)) => (name, within(segment.header.unwrap().trailer_place(), 4096, rng)),
        (3 | 4, Some(t)) => (name, within(t.footer_place(), t.footer_len() as u64, rng)),
        _ => {
            let batches: Vec<_> = inspect_segment(&disk, &name).unwrap().collect();
            let batch = &batches[usize::try_from(rng.below(batches.len() as u64)).unwrap()];
            (name, within(batch.place, batch.header.total_len() as u64, rng))
        }
    }
}

fn is_named(report: &CheckReport, at: Lsn) -> bool {
    report.findings.iter().any(|finding| {
        finding.first_point.is_some_and(|first| first <= at)
            && finding.last_point.is_some_and(|last| at <= last)
    })
}

#[test]
fn a_flipped_byte_is_found_named_with_its_points_and_never_served() {
    let whole = tempfile::tempdir().unwrap();
    let source = life(whole.path(), 32);
    let files = contents(whole.path());
    let mut rng = Rng(9);
    let (mut spoilt, mut torn) = (0, 0);
    for round in 0..100 {
        let (name, place) = covered(whole.path(), &mut rng);
        let dir = tempfile::tempdir().unwrap();
        for (file, bytes) in &files {
            let mut bytes = bytes.clone();
            if *file == name {
                let place = usize::try_from(place).unwrap();
                bytes.resize(bytes.len().max(place + 1), 0);
                bytes[place] ^= 1 << rng.below(8);
            }
            std::fs::write(dir.path().join(file), bytes).unwrap();
        }
        let before = contents(dir.path());
        let what = format!("round {round}: {name} at {place}");
        let report = check(dir.path(), &mut |_, _| {}).unwrap_or_else(|e| panic!("{what}: {e}"));
        let store = OfflineStore::open(dir.path()).unwrap();
        let end = store.position().durable;
        // The last batch alone: nothing says that it was ever durable.
        let is_torn = end < source.acked && store.report().damage.is_empty();
        torn += usize::from(is_torn);
        assert_eq!(is_torn, report.findings.is_empty(), "{what}: {report:?}");
        spoilt += usize::from(report.findings.iter().any(|f| f.points > 0));
        // Nothing goes on from an oldest segment that does not say where it begins.
        let known = source.images.range(store.position().floor..);
        for (lsn, image) in known.take_while(|(lsn, _)| **lsn <= end) {
            assert_copied(&store, *lsn, image);
        }
        for point in source.points.iter().filter(|p| **p > store.position().base && !is_torn) {
            if *point > end {
                assert!(report.findings.iter().any(|f| f.file == "journal"), "{what}: {point}");
            } else if !is_named(&report, *point) {
                let view = store.open_view(*point);
                let view = view.unwrap_or_else(|e| panic!("{what}: {point} is not named: {e}"));
                assert_same(&view, &source.images[point]);
            }
        }
        assert_eq!(contents(dir.path()), before, "{what}");
    }
    assert!(spoilt > 30, "{spoilt} flips spoilt points");
    assert!(torn < 20, "{torn} torn tails");
}
