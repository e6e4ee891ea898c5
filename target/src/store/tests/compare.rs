//! Digests of the source and what is said about them.

use std::sync::Arc;

use farshore_changelog::{
    BatchBuilder, BatchContext, EpochStart, HashPurpose, RawBatch, Record, RecordBody,
};
use farshore_extent::{
    BlockSizes, Chain, Epoch, Extent, Generation, Lsn, SECTOR, Seq, VolumeId, VolumeSize, WallTime,
};

use super::source::{Rng, tiny};
use crate::store::limits::MAX_DIFFERING;
use crate::store::{Compared, Faults, SimDisk, Store, StoreMeta, ViewError};

const SIZE: u64 = 1 << 20;

enum Part {
    Data(Extent, Vec<u8>),
    Other(RecordBody),
}

/// A store, and the stream that it is sent.
struct Stream {
    disk: SimDisk,
    store: Store,
    last: Lsn,
    chain: Chain,
    sent: Vec<Vec<u8>>,
}

impl Stream {
    fn new() -> Self {
        let disk = SimDisk::new(5);
        let meta = StoreMeta {
            volume: VolumeId::from_bytes([7; 16]),
            size: VolumeSize::new(SIZE).unwrap(),
            blocks: BlockSizes::E512,
            generation: Generation::new(1),
            created: WallTime::default(),
        };
        let store = Store::create(Arc::new(disk.clone()), &meta, tiny(Faults::default()));
        let (last, chain, sent) = (Lsn::ZERO, Chain::EMPTY, Vec::new());
        Self { disk, store: store.unwrap().0, last, chain, sent }
    }

    fn append(&mut self, parts: impl IntoIterator<Item = Part>) {
        let mut builder = BatchBuilder::new(Some(1));
        let epoch = Epoch::new(1);
        let numbers = if self.last == Lsn::ZERO { 1 } else { self.last.seq.get() + 1 }..;
        for (n, part) in numbers.zip(parts) {
            let (seq, time) = (Seq::new(n), WallTime::default());
            match part {
                Part::Data(extent, bytes) => {
                    let crc = crc32c::crc32c(&bytes);
                    builder.push_data(seq, time, extent, &bytes, crc, false);
                }
                Part::Other(body) => builder.push(&Record { seq, time, body }),
            }
        }
        let context = BatchContext {
            volume: VolumeId::from_bytes([7; 16]),
            generation: Generation::new(1),
            prev: self.last,
            prev_chain: self.chain,
            durable: Lsn::ZERO,
        };
        let batch = builder.finish(epoch, &context).unwrap();
        self.store.append(RawBatch::parse(&batch.bytes).unwrap().check().unwrap()).unwrap();
        self.last = batch.header.last();
        self.chain = batch.header.chain;
        self.sent.push(batch.bytes);
    }

    fn send(&mut self, parts: impl IntoIterator<Item = Part>) {
        self.append(parts);
        self.store.commit().unwrap();
    }

    fn expire_all(&mut self) {
        while !self.store.expire(self.last).unwrap().done {}
    }

    /// Everything that can be said now.
    fn answer(&mut self) -> Compared {
        self.store.compare(u64::MAX).expect("an answer")
    }

    /// Says which of the digests of the newest batches differ; all others must be equal.
    fn differing(&mut self) -> Vec<Extent> {
        let answer = self.answer();
        assert_eq!(answer.upto, self.last);
        assert!(!self.store.has_questions());
        answer.differing
    }
}

fn at(offset: u64, len: u64) -> Extent {
    Extent::new(offset, len).unwrap()
}

/// Bytes that do not compress.
fn noise(seed: u64, len: u64) -> Vec<u8> {
    let mut rng = Rng(seed);
    (0..len / 8).flat_map(|_| rng.next().to_le_bytes()).collect()
}

fn write(offset: u64, bytes: Vec<u8>) -> Part {
    Part::Data(at(offset, bytes.len() as u64), bytes)
}

fn digest(purpose: HashPurpose, offset: u64, bytes: &[u8]) -> Part {
    let extent = at(offset, bytes.len() as u64);
    Part::Other(RecordBody::Hash { extent, purpose, digest: *blake3::hash(bytes).as_bytes() })
}

fn resync(offset: u64, bytes: &[u8]) -> Part {
    digest(HashPurpose::Resync, offset, bytes)
}

fn verify(offset: u64, bytes: &[u8]) -> Part {
    digest(HashPurpose::Verify, offset, bytes)
}

fn resize(size: u64) -> Part {
    Part::Other(RecordBody::Resize(VolumeSize::new(size).unwrap()))
}

fn zero(offset: u64, len: u64) -> Part {
    Part::Other(RecordBody::Zero { extent: at(offset, len), copied: false })
}

#[test]
fn each_digest_is_compared_at_its_number_whatever_comes_after_it() {
    let mut s = Stream::new();
    let (old, new) = (noise(1, 8192), noise(2, 4096));
    let mixed = [&new[..], &old[4096..]].concat();
    let (size, blocks) = (VolumeSize::new(SIZE).unwrap(), BlockSizes::E512);
    s.append([
        Part::Other(RecordBody::EpochStart(EpochStart { continues: false, size, blocks })),
        write(0, old.clone()),
        resync(0, &old),
        write(0, new.clone()),
        verify(0, &mixed),
        resync(4096, &old[4096..]),
        resync(0, &old),
        verify(0, &mixed[..512]),
    ]);
    // Of the same commit, and of a later one.
    s.send([write(0, noise(3, 16384))]);
    s.send([write(0, noise(4, 16384))]);
    assert!(matches!(s.store.open_view(s.last), Err(ViewError::NotOrdered { .. })));
    let answer = s.answer();
    assert_eq!(answer.differing, [at(0, 8192)]);
    assert_eq!((answer.digests, answer.defects.len()), (5, 0));
    assert!(answer.upto < s.last, "the last commit had no digest");
}

#[test]
fn what_was_never_written_and_what_lay_beyond_a_smaller_size_is_zero() {
    let mut s = Stream::new();
    let (data, nothing) = (noise(1, 65536), vec![0; 65536]);
    s.send([resync(0, &nothing), zero(0, 512), verify(0, &nothing), resync(512, &data)]);
    assert_eq!(s.differing(), [at(512, 65536)]);
    s.send([
        write(SIZE - 65536, data.clone()),
        resync(SIZE - 65536, &data),
        resize(SIZE / 2),
        resync(0, &nothing),
        resize(2 * SIZE),
        resync(SIZE - 65536, &nothing),
        resync(2 * SIZE - 65536, &nothing),
        resync(SIZE - 65536, &data),
    ]);
    assert_eq!(s.differing(), [at(SIZE - 65536, 65536)]);
}

#[test]
fn content_of_the_base_and_of_sealed_segments_is_compared_too() {
    let mut s = Stream::new();
    let data = noise(1, 32768);
    s.send([write(0, data.clone()), zero(32768, 32768)]);
    s.expire_all();
    assert_eq!(s.store.position().base, s.last);
    for n in 0..8 {
        s.send([write(65536 + n * 32768, noise(10 + n, 32768))]);
    }
    let all = [noise(10, 32768), noise(11, 32768)].concat();
    s.send([verify(0, &data), verify(65536, &all), verify(16384, &data[..512])]);
    assert_eq!(s.differing(), [at(16384, 512)]);
}

#[test]
fn a_digest_that_waits_holds_back_expiry_and_is_still_compared_at_its_number() {
    let mut s = Stream::new();
    let data = noise(1, 4096);
    s.send([write(0, data.clone())]);
    s.send([resync(0, &data), write(0, noise(2, 4096))]);
    let asked = Lsn::new(Epoch::new(1), Seq::new(2));
    for n in 3..12 {
        s.send([write(0, noise(n, 32768))]);
        s.expire_all();
        assert!(s.store.position().base <= asked);
    }
    assert_eq!(s.answer().differing, []);
    s.expire_all();
    assert_eq!(s.store.position().base, s.last);
}

#[test]
fn unknown_content_differs_and_is_no_defect() {
    let mut s = Stream::new();
    let nothing = vec![0; 4096];
    let unknown = Part::Other(RecordBody::Unknown { extent: at(1024, 512) });
    s.send([unknown, verify(0, &nothing), verify(4096, &nothing)]);
    let answer = s.answer();
    assert_eq!((answer.differing, answer.defects), (vec![at(0, 4096)], vec![]));
    assert!(s.store.wrong().is_empty());
}

#[test]
fn damaged_content_differs_and_verification_names_it() {
    let mut s = Stream::new();
    let data = noise(1, 4096);
    s.send([write(0, data.clone()), write(8192, noise(2, 4096))]);
    let name = "seg-0000000000000001";
    let file = s.disk.contents(name).unwrap();
    let place = file.windows(64).position(|w| *w == data[..64]).unwrap();
    assert!(s.disk.rot(name, place as u64, 1));
    s.send([resync(0, &data), verify(0, &data[..512])]);
    let answer = s.answer();
    assert_eq!(answer.differing, [at(0, 4096), at(0, 512)]);
    assert_eq!(answer.defects.len(), 1);
    assert!(answer.defects[0].unreadable.is_some());
    // Copied again: whole.
    s.send([write(0, data.clone()), verify(0, &data)]);
    assert_eq!(s.differing(), []);
}

#[test]
fn what_verification_finds_stays_known_until_it_is_written_or_equal() {
    let mut s = Stream::new();
    let (data, nothing) = (noise(1, 4096), vec![0; 4096]);
    s.send([resync(0, &data)]);
    assert_eq!(s.differing(), [at(0, 4096)]);
    assert!(s.store.wrong().is_empty(), "a resync expects differences");
    let bad = || [verify(0, &data), verify(8192, &data)];
    s.send(bad());
    let answer = s.answer();
    assert_eq!(answer.defects.iter().map(|d| d.extent).collect::<Vec<_>>(), answer.differing);
    assert_eq!(s.store.wrong().bytes(), 8192);
    s.store.forget_questions();
    assert_eq!(s.store.wrong().bytes(), 8192, "whoever asked");
    s.send([write(0, data[..512].to_vec())]);
    assert_eq!(s.store.wrong().bytes(), 8192 - 512);
    s.send([zero(0, 4096), resync(8192, &nothing)]);
    assert_eq!(s.differing(), []);
    assert!(s.store.wrong().is_empty());
    s.send(bad());
    s.answer();
    s.send([resize(4096)]);
    assert_eq!(s.store.wrong().bytes(), 4096);
}

#[test]
fn digests_of_a_session_that_is_over_and_of_repeated_batches_are_not_answered() {
    let mut s = Stream::new();
    s.send([resync(0, &[1; 512])]);
    s.store.forget_questions();
    assert_eq!(s.store.compare(u64::MAX), None);
    let again = s.sent[0].clone();
    let again = RawBatch::parse(&again).unwrap().check().unwrap();
    assert!(s.store.append(again).is_err());
    s.append([resync(0, &[1; 512])]);
    assert_eq!(s.store.compare(u64::MAX), None, "not durable yet");
    s.store.commit().unwrap();
    let Stream { disk, store, .. } = s;
    drop(store);
    let store = Store::open(Arc::new(disk), tiny(Faults::default()));
    assert_eq!(store.unwrap().0.compare(u64::MAX), None, "a new run knows of none");
}

#[test]
fn many_digests_are_answered_in_bounded_messages_and_bounded_steps() {
    let mut s = Stream::new();
    for _ in 0..4 {
        s.append((0..2000).map(|n| resync(n % 2 * SECTOR, &[1; 512])));
    }
    s.store.commit().unwrap();
    let (mut digests, mut upto, mut messages) = (0, Lsn::ZERO, 0);
    while s.store.has_questions() {
        let answer = s.answer();
        assert!(answer.differing.len() <= MAX_DIFFERING);
        assert!(answer.upto > upto);
        (digests, upto, messages) = (digests + answer.digests, answer.upto, messages + 1);
    }
    assert_eq!((digests, upto), (8000, s.last));
    assert!(messages > 1);
    // A step ends inside of a large extent.
    let nothing = vec![0; usize::try_from(SIZE).unwrap()];
    s.send([resync(0, &nothing)]);
    let steps = (0..).take_while(|_| s.store.compare(4096).is_none()).count();
    assert!((2..=5).contains(&steps), "{steps}");
    assert!(!s.store.has_questions());
}
