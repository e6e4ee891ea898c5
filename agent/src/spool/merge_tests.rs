//! Random streams are merged and replayed into a model of the target: every place that it would
//! offer holds what it held before, whenever the agent was killed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use farshore_changelog::{
    BatchBuilder, BatchContext, CheckedBatch, HashPurpose, Marker, MarkerState, Record, RecordBody,
    order_after,
};
use farshore_extent::{CaptureOrder, Epoch, Extent, GroupId, MarkerId, PointKind, Seq};

use super::*;
use crate::batch::FeedOptions;
use crate::session::{Resume, VolumeMemory};
use crate::supply::Supply;

const SECTORS: usize = 64;

/// Content of each sector: 0 is zero, `u32::MAX` is unknown.
type Image = Vec<u32>;

#[derive(Default)]
struct Medium {
    files: BTreeMap<SegmentId, Vec<u8>>,
    sent: Option<SegmentId>,
    /// Calls that change something, and how many of them are let through.
    calls: u64,
    limit: Option<u64>,
}

/// Of memory; what was called before it stopped stays, as after a kill.
#[derive(Clone, Default)]
struct MemoryDisk(Arc<Mutex<Medium>>);

impl MemoryDisk {
    fn change<T>(&self, change: impl FnOnce(&mut Medium) -> io::Result<T>) -> io::Result<T> {
        let mut medium = self.0.lock().unwrap();
        if medium.limit.is_some_and(|limit| medium.calls >= limit) {
            return Err(io::Error::other("killed"));
        }
        medium.calls += 1;
        change(&mut medium)
    }

    fn killed_after(&self, calls: Option<u64>) {
        let mut medium = self.0.lock().unwrap();
        (medium.calls, medium.limit) = (0, calls);
    }

    fn copy(&self) -> Self {
        let medium = self.0.lock().unwrap();
        let (files, sent) = (medium.files.clone(), medium.sent);
        Self(Arc::new(Mutex::new(Medium { files, sent, ..Medium::default() })))
    }
}

impl SpoolDisk for MemoryDisk {
    fn list(&self) -> io::Result<Vec<SegmentId>> {
        Ok(self.0.lock().unwrap().files.keys().copied().collect())
    }

    fn create(&mut self, id: SegmentId) -> io::Result<()> {
        self.change(|m| {
            assert!(m.files.insert(id, Vec::new()).is_none());
            Ok(())
        })
    }

    fn write_at(&mut self, id: SegmentId, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.change(|m| {
            let file = m.files.get_mut(&id).ok_or(io::ErrorKind::NotFound)?;
            let at = usize::try_from(at).unwrap();
            file.resize(file.len().max(at + bytes.len()), 0);
            file[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        })
    }

    fn read_at(&mut self, id: SegmentId, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        let medium = self.0.lock().unwrap();
        let file = medium.files.get(&id).ok_or(io::ErrorKind::NotFound)?;
        let rest = file.get(usize::try_from(at).unwrap()..).unwrap_or_default();
        let read = rest.len().min(buf.len());
        buf[..read].copy_from_slice(&rest[..read]);
        Ok(read)
    }

    fn sync(&mut self, _: SegmentId) -> io::Result<()> {
        self.change(|_| Ok(()))
    }

    fn delete(&mut self, id: SegmentId) -> io::Result<()> {
        self.change(|m| {
            m.files.remove(&id).ok_or(io::ErrorKind::NotFound)?;
            Ok(())
        })
    }

    fn replace(&mut self, by: SegmentId, id: SegmentId) -> io::Result<()> {
        self.change(|m| {
            let file = m.files.remove(&by).ok_or(io::ErrorKind::NotFound)?;
            m.files.insert(id, file);
            Ok(())
        })
    }

    fn note_sent(&mut self, id: SegmentId) -> io::Result<()> {
        self.change(|m| {
            m.sent = m.sent.max(Some(id));
            Ok(())
        })
    }

    fn sent(&self) -> io::Result<Option<SegmentId>> {
        Ok(self.0.lock().unwrap().sent)
    }

    fn len(&mut self, id: SegmentId) -> io::Result<u64> {
        let medium = self.0.lock().unwrap();
        Ok(medium.files.get(&id).ok_or(io::ErrorKind::NotFound)?.len() as u64)
    }
}

struct Rng(u64);

impl Rng {
    const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) % n
    }
}

fn owner() -> SpoolOwner {
    SpoolOwner {
        volume: VolumeId::from_bytes([7; 16]),
        size: VolumeSize::new(SECTORS as u64 * 512).unwrap(),
        blocks: BlockSizes::E512,
        segment_bytes: 6 * ALIGN,
    }
}

fn open(disk: &MemoryDisk) -> Spool<MemoryDisk> {
    Spool::open(disk.clone(), owner(), SpoolFaults::default()).unwrap()
}

fn origin() -> Border {
    let after = Lsn::new(Epoch::new(1), Seq::new(3));
    Border { after, chain: Chain::from_bytes([5; 32]), generation: Generation::new(1) }
}

fn sector(content: u32) -> [u8; 512] {
    let mut bytes = [0; 512];
    bytes.as_chunks_mut::<4>().0.iter_mut().for_each(|word| *word = content.to_le_bytes());
    bytes
}

fn marker(rng: &mut Rng, name: &str) -> RecordBody {
    let id = MarkerId::from_bytes([u8::try_from(rng.below(256)).unwrap(); 16]);
    let (kind, state, group) = (PointKind::Crash, MarkerState::Committed, GroupId::NIL);
    RecordBody::Marker(Marker { id, kind, state, group, name: name.to_owned() })
}

/// What happened: the content after each number.
struct Truth {
    images: BTreeMap<Seq, Image>,
    end: Seq,
}

impl Truth {
    fn at(&self, seq: Seq) -> &Image {
        self.images.range(..=seq).next_back().unwrap().1
    }
}

/// Makes a history, one record after the other.
struct Maker {
    rng: Rng,
    seq: Seq,
    image: Image,
    ordered: bool,
    /// How often points are named, in percent of those that could be.
    names: u64,
    /// The same of records that say more than content.
    odd: u64,
    truth: Truth,
}

impl Maker {
    fn new(mut rng: Rng) -> Self {
        let (names, odd) = (rng.below(2) * 40, rng.below(2) * 40);
        let (seq, image) = (origin().after.seq, vec![0; SECTORS]);
        let images = BTreeMap::from([(seq, image.clone())]);
        let truth = Truth { images, end: seq };
        Self { rng, seq, image, ordered: true, names, odd, truth }
    }

    fn record(&mut self, builder: &mut BatchBuilder) {
        let rng = &mut self.rng;
        self.seq = Seq::new(self.seq.get() + 1 + rng.below(3));
        let (seq, time) = (self.seq, WallTime::from_nanos(i64::try_from(self.seq.get()).unwrap()));
        let from = rng.below(SECTORS as u64 - 1);
        let len = 1 + rng.below((SECTORS as u64 - from).min(24));
        let extent = Extent::new(from * 512, len * 512).unwrap();
        let range = usize::try_from(from).unwrap()..usize::try_from(from + len).unwrap();
        let body = match rng.below(100) {
            0..15 if self.ordered => marker(rng, ""),
            15..17 if self.ordered && rng.below(100) < self.names => marker(rng, "asked for"),
            17..19 if rng.below(100) < self.odd => {
                RecordBody::Hash { extent, purpose: HashPurpose::Verify, digest: [0; 32] }
            }
            19..21 if rng.below(100) < self.odd => {
                self.ordered = !self.ordered;
                if self.ordered { RecordBody::OrderRestored } else { RecordBody::OrderLost }
            }
            21..23 if rng.below(100) < self.odd => {
                self.image[range].fill(u32::MAX);
                RecordBody::Unknown { extent }
            }
            23..35 => {
                self.image[range].fill(0);
                RecordBody::Zero { extent, copied: false }
            }
            _ => return self.write(builder, (extent, time), range),
        };
        builder.push(&Record { seq, time, body });
        self.truth.images.insert(seq, self.image.clone());
    }

    fn write(
        &mut self,
        builder: &mut BatchBuilder,
        (extent, time): (Extent, WallTime),
        range: std::ops::Range<usize>,
    ) {
        let zeroes = self.rng.below(4) == 0;
        let mut bytes = Vec::new();
        for at in range {
            let content = u32::try_from(self.seq.get() * 64).unwrap() + 1;
            self.image[at] = if zeroes && at % 16 < 8 { 0 } else { content };
            bytes.extend_from_slice(&sector(self.image[at]));
        }
        builder.push_data(self.seq, time, extent, &bytes, crc32c::crc32c(&bytes), false);
        self.truth.images.insert(self.seq, self.image.clone());
    }
}

fn context(border: Border) -> BatchContext {
    BatchContext {
        volume: owner().volume,
        generation: border.generation,
        prev: border.after,
        prev_chain: border.chain,
        durable: Lsn::ZERO,
    }
}

/// Writes a random history of `batches` batches to a new spool.
fn history(seed: u64, batches: u64) -> (MemoryDisk, Truth) {
    let disk = MemoryDisk::default();
    let mut spool = open(&disk);
    let mut border = origin();
    let mut maker = Maker::new(Rng::new(seed));
    for _ in 0..batches {
        let mut builder = BatchBuilder::new(Some(1));
        for _ in 0..1 + maker.rng.below(6) {
            maker.record(&mut builder);
        }
        let batch = builder.finish(border.after.epoch, &context(border)).unwrap();
        spool.append(&batch, false).unwrap();
        border = Border::behind(&batch.header);
    }
    spool.sync().unwrap();
    maker.truth.end = maker.seq;
    (disk, maker.truth)
}

/// Merges until nothing is left to do, or the agent is killed.
fn merge(spool: &mut Spool<MemoryDisk>) -> io::Result<()> {
    let first = spool.first().unwrap().segment();
    while spool.merge(|id| id > first, 1 << 30, Some(1))? {}
    Ok(())
}

fn apply(batch: &CheckedBatch<'_>, record: &Record, image: &mut Image) {
    let Some(extent) = record.body.extent() else { return };
    let at = |bytes: u64| usize::try_from(bytes / 512).unwrap();
    let range = at(extent.offset())..at(extent.end());
    match &record.body {
        RecordBody::Write { payload, .. } => {
            let mut bytes = Vec::new();
            let len = usize::try_from(extent.len()).unwrap();
            batch.read_payload(record.seq, *payload, len, &mut bytes).unwrap();
            for (index, bytes) in range.zip(bytes.chunks(512)) {
                image[index] = u32::from_le_bytes(bytes[..4].try_into().unwrap());
                assert_eq!(bytes, sector(image[index]));
            }
        }
        RecordBody::Zero { .. } => image[range].fill(0),
        RecordBody::Unknown { .. } => image[range].fill(u32::MAX),
        _ => {}
    }
}

/// What the target makes of these batches: the points it offers. Every place that it would open is
/// compared with the truth.
fn replay(batches: &[Arc<EncodedBatch>], truth: &Truth) -> Vec<(Seq, String)> {
    let mut points = Vec::new();
    let mut image = vec![0; SECTORS];
    let (mut newest, mut order) = (origin().after, CaptureOrder::Ordered);
    for batch in batches {
        assert_eq!(batch.header.prev, newest, "a gap between batches");
        let batch = RawBatch::parse(&batch.bytes).unwrap().check().unwrap();
        for record in batch.records() {
            let before = order;
            order = order_after(order, &record.body);
            if before == CaptureOrder::Ordered && record.seq > newest.seq {
                // Every place up to the one before this record can be opened.
                for seq in newest.seq.get()..record.seq.get() {
                    let lost = order == CaptureOrder::CatchUp && seq > newest.seq.get();
                    assert!(lost || image == *truth.at(Seq::new(seq)), "place {seq} is wrong");
                }
            }
            apply(&batch, &record, &mut image);
            newest.seq = record.seq;
            if let (RecordBody::Marker(marker), CaptureOrder::Ordered) = (&record.body, order) {
                assert_eq!(image, *truth.at(record.seq), "the point {} is wrong", record.seq);
                points.push((record.seq, marker.name.clone()));
            }
        }
    }
    assert_eq!(newest.seq, truth.end);
    assert_eq!(image, *truth.at(truth.end), "the newest state is wrong");
    points
}

fn read_all(spool: &mut Spool<MemoryDisk>) -> Vec<Arc<EncodedBatch>> {
    let mut cursor = spool.first().unwrap();
    std::iter::from_fn(|| spool.read(&mut cursor).unwrap()).collect()
}

fn check(spool: &mut Spool<MemoryDisk>, truth: &Truth, before: &[(Seq, String)]) -> usize {
    let points = replay(&read_all(spool), truth);
    assert!(points.iter().all(|p| before.contains(p)), "a point that was none");
    let named = |p: &&(Seq, String)| !p.1.is_empty();
    assert!(before.iter().filter(named).eq(points.iter().filter(named)), "a named point is gone");
    assert_eq!(points.last(), before.last(), "the newest point is gone");
    points.len()
}

#[test]
fn every_place_that_stays_is_right_and_the_spool_gets_smaller() {
    let (mut merged, mut smaller, mut named) = (0, 0, 0);
    for seed in 1..200 {
        let (disk, truth) = history(seed, 8 + seed % 60);
        let mut spool = open(&disk);
        let before = replay(&read_all(&mut spool), &truth);
        let bytes = spool.bytes();
        merge(&mut spool).unwrap();
        let after = check(&mut spool, &truth, &before);
        let counted = spool.merged().map_or(0, |m| m.points);
        assert!(counted >= (before.len() - after) as u64);
        assert_eq!(spool.bytes(), spool.segments.iter().map(|s| s.end).sum::<u64>());
        merged += usize::from(after < before.len());
        named += before.iter().filter(|p| !p.1.is_empty()).count();
        smaller += usize::from(spool.bytes() < bytes * 3 / 4);
        let mut again = open(&disk);
        assert_eq!(check(&mut again, &truth, &before), after);
        assert_eq!(again.bytes(), spool.bytes());
    }
    let seen = format!("{merged} merged, {smaller} smaller, {named} named points");
    assert!(merged > 100 && smaller > 50 && named > 20, "{seen}");
}

#[test]
fn a_kill_at_any_call_leaves_a_true_history() {
    for seed in 1..5 {
        let (disk, truth) = history(seed, 24);
        let before = replay(&read_all(&mut open(&disk)), &truth);
        let whole = disk.copy();
        merge(&mut open(&whole)).unwrap();
        let calls = whole.0.lock().unwrap().calls;
        for killed in 0..calls {
            let disk = disk.copy();
            let mut spool = open(&disk);
            disk.killed_after(Some(killed));
            assert!(merge(&mut spool).is_err() || killed + 1 >= calls);
            disk.killed_after(None);
            check(&mut open(&disk), &truth, &before);
            // It goes on without a restart as well, and the rest is merged.
            merge(&mut spool).unwrap();
            check(&mut spool, &truth, &before);
        }
    }
}

fn supply(disk: &MemoryDisk) -> Supply<MemoryDisk> {
    let spool = open(disk);
    let faults = SpoolFaults::default();
    Supply::new(owner().volume, FeedOptions::default(), Some(spool), faults)
}

fn memory(at: Border) -> VolumeMemory {
    VolumeMemory { generation: at.generation, acked: at.after, acked_chain: at.chain }
}

const fn resume(at: Border) -> Resume {
    Resume { after: at.after, chain: at.chain, generation: at.generation }
}

#[test]
fn a_merged_spool_is_sent_as_one_chain_and_found_again_after_a_restart() {
    let mut shortened = 0;
    for seed in 1..60 {
        let mut rng = Rng::new(seed);
        let (disk, truth) = history(seed, 40);
        let mut first = supply(&disk);
        first.begin(memory(origin()));
        while first.merge(1 << 30).unwrap() {}
        shortened += usize::from(first.merged().is_some());
        assert!(first.start(resume(origin()), false).unwrap());
        let mut sent = Vec::new();
        let mut chain = origin().chain;
        while let Some(batch) = first.take().unwrap() {
            assert_eq!(batch.header.prev_chain, chain, "the chain is broken");
            chain = batch.header.chain;
            sent.push(batch);
        }
        replay(&sent, &truth);
        drop(first);
        // The target has more than this host remembers; what was sent stays byte for byte.
        let acked = usize::try_from(rng.below(sent.len() as u64 - 1)).unwrap();
        let there =
            acked + usize::try_from(rng.below((sent.len() - acked - 1) as u64 + 1)).unwrap();
        let mut second = supply(&disk);
        second.begin(memory(Border::before(&sent[acked].header)));
        assert!(!second.merge(1 << 30).unwrap(), "what may have been sent is merged");
        let at = Border::before(&sent[there].header);
        assert!(second.start(resume(at), false).unwrap(), "the target's place is not found");
        for batch in &sent[there..] {
            assert_eq!(second.take().unwrap().unwrap().bytes, batch.bytes);
        }
        assert!(second.take().unwrap().is_none());
        let foreign = Border { chain: Chain::from_bytes([1; 32]), ..at };
        assert!(!second.start(resume(foreign), false).unwrap(), "another history is found");
    }
    assert!(shortened > 20, "{shortened} were merged");
}

#[test]
fn what_is_not_written_again_is_left_alone() {
    let disk = MemoryDisk::default();
    let mut spool = open(&disk);
    let mut border = origin();
    for index in 0..40u64 {
        let mut builder = BatchBuilder::new(None);
        let seq = Seq::new(border.after.seq.get() + 1);
        let bytes = sector(u32::try_from(index).unwrap() + 1);
        let extent = Extent::new(index * 512, 512).unwrap();
        let time = WallTime::default();
        builder.push_data(seq, time, extent, &bytes, crc32c::crc32c(&bytes), false);
        let body = marker(&mut Rng(9), "");
        builder.push(&Record { seq: seq.next(), time, body });
        let batch = builder.finish(border.after.epoch, &context(border)).unwrap();
        spool.append(&batch, false).unwrap();
        border = Border::behind(&batch.header);
    }
    spool.sync().unwrap();
    let before = read_all(&mut spool);
    disk.killed_after(Some(0));
    merge(&mut spool).unwrap();
    assert_eq!(spool.merged(), None);
    let after = read_all(&mut spool);
    assert!(before.iter().map(|b| &b.bytes).eq(after.iter().map(|b| &b.bytes)));
}
