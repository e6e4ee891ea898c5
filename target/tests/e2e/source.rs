//! A protected volume made by hand: what it sends, and what it must look like at each place.

use std::collections::BTreeMap;

use farshore_changelog::{
    BatchBuilder, BatchContext, EncodedBatch, EpochStart, HashPurpose, Marker, MarkerState, Record,
    RecordBody,
};
use farshore_extent::{
    BlockSizes, Chain, Epoch, Extent, Generation, GroupId, Lsn, MarkerId, PointKind, Seq, VolumeId,
    VolumeName, VolumeSize, WallTime,
};
use farshore_protocol::message::{FromAgent, FromTarget, OpenVolume, Opened, Verdict};

use crate::connection::Connection;

pub const SIZE: usize = 1 << 20;

#[derive(Clone)]
pub struct Source {
    pub volume: VolumeId,
    pub name: VolumeName,
    pub generation: Generation,
    pub at: Lsn,
    pub chain: Chain,
    pub epoch: Epoch,
    pub seq: u64,
    /// Nanoseconds; one millisecond a record.
    pub clock: i64,
    pub records: Vec<(Record, Vec<u8>)>,
    pub content: Vec<u8>,
    /// Content at every place that a record made.
    pub history: BTreeMap<Lsn, (WallTime, Vec<u8>)>,
}

impl Source {
    pub fn new(name: &str) -> Self {
        Self {
            volume: VolumeId::random(),
            name: VolumeName::new(name).unwrap(),
            generation: Generation::ZERO,
            at: Lsn::ZERO,
            chain: Chain::EMPTY,
            epoch: Epoch::new(1),
            seq: 0,
            clock: WallTime::now().nanos() - 3_600_000_000_000,
            records: Vec::new(),
            content: vec![0; SIZE],
            history: BTreeMap::new(),
        }
    }

    fn push(&mut self, body: RecordBody, data: Vec<u8>) -> Lsn {
        self.seq += 1;
        self.clock += 1_000_000;
        let time = WallTime::from_nanos(self.clock);
        let lsn = Lsn::new(self.epoch, Seq::new(self.seq));
        self.records.push((Record { seq: lsn.seq, time, body }, data));
        self.history.insert(lsn, (time, self.content.clone()));
        lsn
    }

    /// The first records of a run of filterd: order is lost, everything copied, order restored.
    pub fn begin(&mut self) {
        let size = VolumeSize::new(SIZE as u64).unwrap();
        let start = EpochStart { continues: false, size, blocks: BlockSizes::E512 };
        self.push(RecordBody::EpochStart(start), Vec::new());
        let zero = Extent::new(0, SIZE as u64).unwrap();
        self.push(RecordBody::Zero { extent: zero, copied: true }, Vec::new());
        self.push(RecordBody::OrderRestored, Vec::new());
    }

    pub fn restore_order(&mut self) {
        self.push(RecordBody::OrderRestored, Vec::new());
    }

    pub fn lose_order(&mut self) {
        self.push(RecordBody::OrderLost, Vec::new());
    }

    pub fn write(&mut self, offset: usize, len: usize, value: u8) -> Lsn {
        // Not the same byte everywhere: misplaced pieces must show.
        self.write_bytes(offset, (0..len).map(|i| value ^ (i % 251) as u8).collect())
    }

    /// Bytes that do not compress.
    pub fn write_noise(&mut self, offset: usize, len: usize, value: u8) -> Lsn {
        let mut data = vec![0; len];
        blake3::Hasher::new().update(&[value]).finalize_xof().fill(&mut data);
        self.write_bytes(offset, data)
    }

    fn write_bytes(&mut self, offset: usize, data: Vec<u8>) -> Lsn {
        let len = data.len();
        self.content[offset..offset + len].copy_from_slice(&data);
        let extent = Extent::new(offset as u64, len as u64).unwrap();
        // The builder makes place and checksum itself.
        let payload = farshore_changelog::PayloadRef { raw_off: 0, crc: 0 };
        self.push(RecordBody::Write { extent, payload }, data)
    }

    pub fn marker(&mut self, name: &str, kind: PointKind) -> Lsn {
        let marker = Marker {
            id: MarkerId::random(),
            kind,
            state: MarkerState::Committed,
            group: GroupId::NIL,
            name: name.into(),
        };
        self.push(RecordBody::Marker(marker), Vec::new())
    }

    /// A digest of the content as it is now.
    pub fn hash(&mut self, offset: usize, len: usize, purpose: HashPurpose) -> Lsn {
        let digest = *blake3::hash(&self.content[offset..offset + len]).as_bytes();
        let extent = Extent::new(offset as u64, len as u64).unwrap();
        self.push(RecordBody::Hash { extent, purpose, digest }, Vec::new())
    }

    /// A digest of other content.
    pub fn wrong_hash(&mut self, offset: usize, len: usize, purpose: HashPurpose) -> Lsn {
        let extent = Extent::new(offset as u64, len as u64).unwrap();
        self.push(RecordBody::Hash { extent, purpose, digest: [7; 32] }, Vec::new())
    }

    /// Everything since the last batch as one batch.
    pub fn batch(&mut self) -> EncodedBatch {
        let mut builder = BatchBuilder::new(Some(1));
        for (record, data) in self.records.drain(..) {
            match record.body {
                RecordBody::Write { extent, .. } => {
                    let crc = crc32c::crc32c(&data);
                    builder.push_data(record.seq, record.time, extent, &data, crc, false);
                }
                _ => builder.push(&record),
            }
        }
        let context = BatchContext {
            volume: self.volume,
            generation: self.generation,
            prev: self.at,
            prev_chain: self.chain,
            durable: Lsn::ZERO,
        };
        let batch = builder.finish(self.epoch, &context).unwrap();
        self.at = batch.header.last();
        self.chain = batch.header.chain;
        batch
    }

    pub fn open_message(&self) -> FromAgent {
        FromAgent::Open(OpenVolume {
            volume: self.volume,
            name: self.name.clone(),
            size: VolumeSize::new(SIZE as u64).unwrap(),
            blocks: BlockSizes::E512,
            generation: self.generation,
            acked: self.at,
            acked_chain: self.chain,
            point_interval_ms: None,
        })
    }

    /// Opens the volume, believing that everything batched so far is at the target.
    pub async fn open(&mut self, connection: &mut Connection) -> Opened {
        connection.send(&self.open_message()).await;
        match connection.next().await {
            Some(FromTarget::Opened(opened)) => {
                assert_eq!(opened.volume, self.volume);
                if opened.verdict == Verdict::Continue {
                    self.generation = opened.generation;
                }
                opened
            }
            other => panic!("{other:?}"),
        }
    }

    /// Sends everything new and waits until it is durable.
    pub async fn ship(&mut self, connection: &mut Connection) {
        let batch = self.batch();
        connection.batch(&batch.bytes).await;
        let chain = connection.acked(self.volume, self.at).await;
        assert_eq!(chain, self.chain);
    }
}
