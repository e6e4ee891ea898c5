//! On a real folder: what comes back after a restart.

use farshore_changelog::{BatchBuilder, BatchContext, Record, RecordBody};
use farshore_extent::{Epoch, Extent, Seq};

use super::*;
use crate::batch::FeedOptions;
use crate::session::Resume;
use crate::supply::{Pressure, Supply};

fn owner() -> SpoolOwner {
    SpoolOwner {
        volume: VolumeId::from_bytes([7; 16]),
        size: VolumeSize::new(1 << 20).unwrap(),
        blocks: BlockSizes::E512,
        segment_bytes: 5 * ALIGN,
    }
}

fn batch(after: Border) -> EncodedBatch {
    let mut builder = BatchBuilder::new(None);
    let seq = Seq::new(after.after.seq.get() + 1);
    let bytes = vec![u8::try_from(seq.get() % 251).unwrap(); 4096];
    let extent = Extent::new(0, 4096).unwrap();
    builder.push_data(seq, WallTime::default(), extent, &bytes, crc32c::crc32c(&bytes), false);
    let body = RecordBody::Zero { extent, copied: false };
    builder.push(&Record { seq: seq.next(), time: WallTime::default(), body });
    let context = BatchContext {
        volume: owner().volume,
        generation: after.generation,
        prev: after.after,
        prev_chain: after.chain,
        durable: Lsn::ZERO,
    };
    builder.finish(Epoch::new(1), &context).unwrap()
}

fn origin() -> Border {
    Border { after: Lsn::ZERO, chain: Chain::EMPTY, generation: Generation::new(1) }
}

fn open(dir: &std::path::Path) -> Spool<FolderDisk> {
    let disk = FolderDisk::new(dir).unwrap();
    Spool::open(disk, owner(), SpoolFaults::default()).unwrap()
}

fn fill(spool: &mut Spool<FolderDisk>, n: usize) -> Vec<EncodedBatch> {
    let mut all = Vec::new();
    for _ in 0..n {
        let next = batch(spool.end().unwrap_or_else(origin));
        spool.append(&next, false).unwrap();
        all.push(next);
    }
    all
}

fn read_all(spool: &mut Spool<FolderDisk>) -> Vec<Vec<u8>> {
    let Some(mut cursor) = spool.first() else { return Vec::new() };
    std::iter::from_fn(|| spool.read(&mut cursor).unwrap().map(|b| b.bytes.clone())).collect()
}

#[test]
fn everything_comes_back_in_order_and_byte_for_byte_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = open(dir.path());
    let mut written = fill(&mut spool, 9);
    spool.sync().unwrap();
    drop(spool);
    let mut again = open(dir.path());
    written.extend(fill(&mut again, 4));
    assert!(again.durable_end().map(|e| e.after) < again.end().map(|e| e.after));
    again.sync().unwrap();
    let expected: Vec<_> = written.iter().map(|b| b.bytes.clone()).collect();
    assert_eq!(read_all(&mut again), expected);
    let border = Border::behind(&written[6].header);
    let mut cursor = again.find(border).unwrap().unwrap();
    assert_eq!(again.read(&mut cursor).unwrap().unwrap().header, written[7].header);
    let foreign = Border { chain: Chain::from_bytes([9; 32]), ..border };
    assert!(again.find(foreign).unwrap().is_none(), "another history is not found");
}

#[test]
fn a_torn_end_is_left_and_the_next_batch_goes_on_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = open(dir.path());
    let written = fill(&mut spool, 2);
    spool.sync().unwrap();
    let torn = fill(&mut spool, 1);
    drop(spool);
    let files = std::fs::read_dir(dir.path()).unwrap();
    let mut names: Vec<_> = files.map(|f| f.unwrap().path()).collect();
    names.sort();
    let newest = names.last().unwrap();
    let mut bytes = std::fs::read(newest).unwrap();
    let at = bytes.len() - 100;
    bytes[at] ^= 1;
    std::fs::write(newest, &bytes).unwrap();
    let mut again = open(dir.path());
    assert_eq!(again.end(), Some(Border::behind(&written[1].header)));
    let other = fill(&mut again, 1);
    again.sync().unwrap();
    drop(again);
    let mut third = open(dir.path());
    let read = read_all(&mut third);
    assert_eq!(read.last(), Some(&other[0].bytes), "{} torn", torn.len());
    assert_eq!(read.len(), 3);
}

#[test]
fn what_the_target_has_is_removed_and_an_empty_spool_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = open(dir.path());
    let written = fill(&mut spool, 9);
    spool.sync().unwrap();
    let before = spool.bytes();
    spool.trim(written[5].header.last());
    assert!(spool.bytes() < before);
    let cursor = spool.find(Border::behind(&written[5].header)).unwrap();
    assert!(cursor.is_some(), "what was not acknowledged is still there");
    spool.trim(written[8].header.last());
    assert_eq!((spool.bytes(), spool.end()), (0, None));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// Keeps every segment: a folder that became read-only, or a file that nobody may remove.
struct Stubborn(FolderDisk);

impl SpoolDisk for Stubborn {
    fn list(&self) -> io::Result<Vec<SegmentId>> {
        self.0.list()
    }

    fn create(&mut self, id: SegmentId) -> io::Result<()> {
        self.0.create(id)
    }

    fn write_at(&mut self, id: SegmentId, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_at(id, at, bytes)
    }

    fn read_at(&mut self, id: SegmentId, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read_at(id, at, buf)
    }

    fn sync(&mut self, id: SegmentId) -> io::Result<()> {
        self.0.sync(id)
    }

    fn delete(&mut self, _: SegmentId) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn replace(&mut self, by: SegmentId, id: SegmentId) -> io::Result<()> {
        self.0.replace(by, id)
    }

    fn note_sent(&mut self, id: SegmentId) -> io::Result<()> {
        self.0.note_sent(id)
    }

    fn sent(&self) -> io::Result<Option<SegmentId>> {
        self.0.sent()
    }

    fn len(&mut self, id: SegmentId) -> io::Result<u64> {
        self.0.len(id)
    }
}

#[test]
fn nothing_is_spooled_behind_an_old_segment_that_cannot_be_removed() {
    let dir = tempfile::tempdir().unwrap();
    let mut old = open(dir.path());
    fill(&mut old, 1);
    old.sync().unwrap();
    drop(old);
    let disk = Stubborn(FolderDisk::new(dir.path()).unwrap());
    let spool = Spool::open(disk, owner(), SpoolFaults::default()).unwrap();
    let kept = spool.end().unwrap();

    let mut supply = Supply::new(owner().volume, FeedOptions::default(), None, spool.faults);
    let Border { after, chain, generation } =
        Border { after: Lsn::new(Epoch::new(1), Seq::new(40)), ..origin() };
    assert!(!supply.start(Resume { after, chain, generation }, false).unwrap());
    supply.attach(spool);
    let away = Pressure {
        pool_used: 1,
        pool_bytes: 1,
        ordered: true,
        copy_remaining: 0,
        streaming: false,
        room: 1 << 20,
    };
    supply.decide(&away).unwrap();
    let refused = supply.push(batch(Border { after, chain, generation }));
    assert!(refused.is_err() && !supply.is_spooling());
    assert_eq!(supply.kept(), Some(kept.after), "nothing more is told to be safe");
    assert!(supply.take().unwrap().is_some(), "the batch is in memory still");
}
