//! A source with a model: makes batches and remembers the image of the volume at every number.

use std::collections::BTreeMap;

use farshore_changelog::{
    BatchBuilder, BatchContext, EncodedBatch, EpochStart, HashPurpose, Marker, MarkerState,
    RawBatch, Record, RecordBody,
};
use farshore_extent::{
    BlockSizes, CaptureOrder, Chain, Epoch, Extent, Generation, GroupId, Lsn, MarkerId, PointKind,
    SECTOR, Seq, VolumeId, VolumeSize, WallTime,
};

use crate::store::{
    AppendError, Compared, Faults, PointReader, ReadError, Store, StoreConfig, StoreEvent,
    StoreMeta,
};

pub(super) const SECTORS: u64 = 96;

pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// The volume at one place: a tag for each sector; `None` is unknown, 0 reads as zero.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Image {
    pub(super) sectors: Vec<Option<u64>>,
    pub(super) ordered: bool,
    pub(super) time: WallTime,
}

impl Image {
    /// What is unknown reads as zeroes.
    pub(super) fn bytes(&self) -> Vec<u8> {
        self.sectors.iter().flat_map(|tag| sector(tag.unwrap_or(0))).collect()
    }
}

/// What must be said about a digest.
#[derive(Clone, Copy)]
pub(super) struct Expected {
    extent: Extent,
    differs: bool,
    /// Verification must report it.
    defect: bool,
}

pub(super) struct Source {
    pub(super) volume: VolumeId,
    pub(super) generation: Generation,
    pub(super) epoch: Epoch,
    pub(super) rng: Rng,
    seq: u64,
    tag: u64,
    image: Image,
    pub(super) last: Lsn,
    pub(super) chain: Chain,
    pub(super) acked: Lsn,
    pub(super) images: BTreeMap<Lsn, Image>,
    pub(super) batches: Vec<EncodedBatch>,
    pub(super) points: Vec<Lsn>,
    /// Sends digests too; they wait until somebody compares them.
    asks: bool,
    pub(super) digests: BTreeMap<Lsn, Expected>,
}

impl Source {
    pub(super) fn new(seed: u64) -> Self {
        let image = Image {
            sectors: vec![Some(0); usize::try_from(SECTORS).unwrap()],
            ordered: false,
            time: WallTime::default(),
        };
        Self {
            volume: VolumeId::from_bytes([7; 16]),
            generation: Generation::new(1),
            epoch: Epoch::new(1),
            rng: Rng(seed),
            seq: 0,
            tag: 0,
            images: BTreeMap::from([(Lsn::ZERO, image.clone())]),
            image,
            last: Lsn::ZERO,
            chain: Chain::EMPTY,
            acked: Lsn::ZERO,
            batches: Vec::new(),
            points: Vec::new(),
            asks: false,
            digests: BTreeMap::new(),
        }
    }

    /// One that sends digests too.
    pub(super) fn asking(seed: u64) -> Self {
        Self { asks: true, ..Self::new(seed) }
    }

    /// The volume has content already.
    pub(super) fn over_old_content(mut self) -> Self {
        self.tag = 1000;
        for (n, tag) in (0..).zip(&mut self.image.sectors) {
            *tag = Some(if n % 3 == 2 { 0 } else { (1 + n % 5) << 16 | n });
        }
        self.images.insert(Lsn::ZERO, self.image.clone());
        self
    }

    pub(super) fn meta(&self) -> StoreMeta {
        StoreMeta {
            volume: self.volume,
            size: VolumeSize::new(SECTORS * SECTOR).unwrap(),
            blocks: BlockSizes::E512,
            generation: self.generation,
            created: WallTime::default(),
        }
    }

    /// Forgets what comes after `at`, as a source that fell back there.
    pub(super) fn rewind(&mut self, at: Lsn) {
        self.batches.retain(|b| b.header.last() <= at);
        self.images.retain(|lsn, _| *lsn <= at);
        self.points.retain(|lsn| *lsn <= at);
        self.digests.retain(|lsn, _| *lsn <= at);
        self.image = self.images.last_key_value().unwrap().1.clone();
        self.last = at;
        self.chain = self.batches.last().map_or(Chain::EMPTY, |b| b.header.chain);
    }

    pub(super) fn batch(&mut self) -> &EncodedBatch {
        let mut builder = BatchBuilder::new(Some(1));
        let records = 1 + self.rng.below(6);
        if self.seq == 0 || self.rng.below(40) == 0 {
            self.begin_epoch(&mut builder);
        }
        for _ in 0..records {
            self.record(&mut builder);
        }
        let context = BatchContext {
            volume: self.volume,
            generation: self.generation,
            prev: self.last,
            prev_chain: self.chain,
            durable: self.acked,
        };
        let batch = builder.finish(self.epoch, &context).unwrap();
        self.last = batch.header.last();
        self.chain = batch.header.chain;
        self.batches.push(batch);
        self.batches.last().unwrap()
    }

    fn push(&mut self, builder: &mut BatchBuilder, body: RecordBody) {
        self.seq += 1;
        let (seq, time) =
            (Seq::new(self.seq), WallTime::from_nanos(i64::try_from(self.tag).unwrap()));
        builder.push(&Record { seq, time, body });
        self.note(time);
    }

    fn note(&mut self, time: WallTime) {
        self.image.time = time;
        self.images.insert(Lsn::new(self.epoch, Seq::new(self.seq)), self.image.clone());
    }

    fn begin_epoch(&mut self, builder: &mut BatchBuilder) {
        // Numbers go on across epochs so that images have one key each.
        self.epoch = self.epoch.next();
        let continues = self.image.ordered && self.rng.below(2) == 0;
        self.image.ordered = continues;
        let start = EpochStart {
            continues,
            size: VolumeSize::new(self.image.sectors.len() as u64 * SECTOR).unwrap(),
            blocks: BlockSizes::E512,
        };
        self.push(builder, RecordBody::EpochStart(start));
    }

    fn extent(&mut self, longest: u64) -> Extent {
        let size = self.image.sectors.len() as u64;
        let at = self.rng.below(size);
        let len = 1 + self.rng.below(longest.min(size - at));
        Extent::new(at * SECTOR, len * SECTOR).unwrap()
    }

    fn set(&mut self, extent: Extent, value: impl Fn(u64) -> Option<u64>) {
        for sector in extent.offset() / SECTOR..extent.end() / SECTOR {
            self.image.sectors[usize::try_from(sector).unwrap()] = value(sector);
        }
    }

    fn record(&mut self, builder: &mut BatchBuilder) {
        self.tag += 1;
        match self.rng.below(if self.asks { 23 } else { 20 }) {
            0..=9 => {
                let extent = self.extent(20);
                let tag = self.tag;
                let value = move |sector| Some(tag << 16 | sector);
                let data = render(extent, value);
                self.seq += 1;
                let time = WallTime::from_nanos(i64::try_from(tag).unwrap());
                let crc = crc32c::crc32c(&data);
                let copied = self.rng.below(4) == 0;
                builder.push_data(Seq::new(self.seq), time, extent, &data, crc, copied);
                self.set(extent, value);
                self.note(time);
            }
            10..=11 => {
                let extent = self.extent(60);
                self.set(extent, |_| Some(0));
                self.push(builder, RecordBody::Zero { extent, copied: false });
            }
            12 => {
                let extent = self.extent(4);
                self.set(extent, |_| None);
                self.push(builder, RecordBody::Unknown { extent });
            }
            13 => {
                let size = SECTORS / 2 + self.rng.below(SECTORS);
                self.image.sectors.resize(usize::try_from(size).unwrap(), Some(0));
                let size = VolumeSize::new(size * SECTOR).unwrap();
                self.push(builder, RecordBody::Resize(size));
            }
            14 => {
                self.image.ordered = false;
                self.push(builder, RecordBody::OrderLost);
            }
            15..=16 => {
                self.image.ordered = true;
                self.push(builder, RecordBody::OrderRestored);
            }
            17..=19 => {
                let marker = marker(self.tag, MarkerState::Committed);
                self.push(builder, RecordBody::Marker(marker));
                if self.image.ordered {
                    self.points.push(Lsn::new(self.epoch, Seq::new(self.seq)));
                }
            }
            _ => self.digest(builder),
        }
    }

    /// A digest of the content, or now and then of another.
    fn digest(&mut self, builder: &mut BatchBuilder) {
        let extent = self.extent(40);
        let sectors = extent.offset() / SECTOR..extent.end() / SECTOR;
        let tags: Vec<_> =
            sectors.map(|s| self.image.sectors[usize::try_from(s).unwrap()]).collect();
        let known = tags.iter().all(Option::is_some);
        let mut content: Vec<u8> = tags.iter().flat_map(|t| sector(t.unwrap_or(0))).collect();
        let other = self.rng.below(3) == 0;
        content[0] ^= u8::from(other);
        let verify = self.rng.below(2) == 0;
        let purpose = if verify { HashPurpose::Verify } else { HashPurpose::Resync };
        let digest = *blake3::hash(&content).as_bytes();
        self.push(builder, RecordBody::Hash { extent, purpose, digest });
        let expected =
            Expected { extent, differs: other || !known, defect: verify && other && known };
        self.digests.insert(self.at(), expected);
    }

    fn at(&self) -> Lsn {
        Lsn::new(self.epoch, Seq::new(self.seq))
    }

    /// Checks an answer about the digests after `after`.
    pub(super) fn check_answer(&self, after: Lsn, answer: &Compared) {
        let excluded = std::ops::Bound::Excluded(after);
        let asked: Vec<_> =
            self.digests.range((excluded, std::ops::Bound::Included(answer.upto))).collect();
        let places = |which: fn(&Expected) -> bool| {
            asked
                .iter()
                .filter(|(_, e)| which(e))
                .map(|(at, e)| (**at, e.extent))
                .collect::<Vec<_>>()
        };
        assert_eq!(answer.digests, asked.len() as u64, "digests after {after} to {}", answer.upto);
        let differ: Vec<Extent> = places(|e| e.differs).into_iter().map(|(_, e)| e).collect();
        assert_eq!(answer.differing, differ, "digests after {after} to {}", answer.upto);
        let defects: Vec<_> = answer.defects.iter().map(|d| (d.at, d.extent)).collect();
        assert_eq!(defects, places(|e| e.defect));
    }

    /// Sends everything after the store's position and checks that it is taken.
    pub(super) fn send(&self, store: &mut Store) {
        for batch in &self.batches {
            let checked = RawBatch::parse(&batch.bytes).unwrap().check().unwrap();
            match store.append(checked) {
                Ok(()) => assert_eq!(store.position().received, batch.header.last()),
                Err(AppendError::Duplicate { .. } | AppendError::EpochBack { .. }) => {}
                Err(AppendError::Poisoned { .. }) => return,
                Err(e) => panic!("a batch that follows was refused: {e}"),
            }
        }
    }

    /// Compares the store with the model at one place; a place that cannot be opened must have a
    /// reason.
    pub(super) fn check_at(&self, store: &Store, at: Lsn) {
        let image = self.images.range(..=at).next_back().unwrap().1;
        assert_eq!(store.is_ordered_at(at), image.ordered, "order at {at}");
        let view = store.open_unordered_view(at).unwrap();
        assert_same(&view, image);
        if image.ordered {
            assert_eq!(store.open_view(at).unwrap().at(), at);
        }
    }
}

/// All that the journal says about points and order.
pub(super) fn history(store: &Store) -> Vec<StoreEvent> {
    let mut events = Vec::new();
    store.history(|event| events.push(event)).unwrap();
    events
}

pub(super) fn marker(n: u64, state: MarkerState) -> Marker {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&n.to_le_bytes());
    Marker {
        id: MarkerId::from_bytes(id),
        kind: PointKind::Crash,
        state,
        group: GroupId::NIL,
        name: format!("point {n}"),
    }
}

fn render(extent: Extent, value: impl Fn(u64) -> Option<u64>) -> Vec<u8> {
    (extent.offset() / SECTOR..extent.end() / SECTOR)
        .flat_map(|s| sector(value(s).unwrap()))
        .collect()
}

/// Sectors that compress badly when the tag is odd, well when it is even; never zero.
pub(super) fn sector(tag: u64) -> Vec<u8> {
    if tag == 0 {
        return vec![0; 512];
    }
    let mut rng = Rng(tag);
    (0..64)
        .flat_map(|_| if tag & (1 << 16) == 0 { tag } else { rng.next() }.to_le_bytes())
        .collect()
}

pub(super) fn assert_same(view: &PointReader, image: &Image) {
    assert_eq!(view.size().get(), image.sectors.len() as u64 * SECTOR, "size at {}", view.at());
    let mut got = vec![0; 512];
    for (n, expected) in image.sectors.iter().enumerate() {
        let read = view.read_at(&mut got, n as u64 * SECTOR);
        match expected {
            Some(tag) => {
                read.unwrap_or_else(|e| panic!("sector {n} at {}: {e}", view.at()));
                assert_eq!(got, sector(*tag), "sector {n} at {}", view.at());
            }
            None => assert!(
                matches!(read, Err(ReadError::Unknown { .. })),
                "sector {n} at {} was served although it is unknown: {read:?}",
                view.at()
            ),
        }
    }
    if image.sectors.iter().all(Option::is_some) {
        // One large read over all borders, at an odd place.
        let len = image.sectors.len() * 512 - 7;
        let mut whole = vec![0; len];
        view.read_at(&mut whole, 5).unwrap();
        let expected: Vec<u8> = image.sectors.iter().flat_map(|t| sector(t.unwrap())).collect();
        assert!(whole == expected[5..5 + len], "a large unaligned read at {}", view.at());
    }
}

pub(super) fn tiny(faults: Faults) -> StoreConfig {
    StoreConfig {
        segment_bytes: 64 << 10,
        reserve_segments: 1,
        apply_segments: 2,
        apply_step_bytes: 8 << 10,
        run_fanout: 2,
        merge_step: 3,
        faults,
    }
}

pub(super) const fn is_ordered(order: CaptureOrder) -> bool {
    matches!(order, CaptureOrder::Ordered)
}
