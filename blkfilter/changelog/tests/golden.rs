//! Golden bytes: what version 1 looks like on disk and on the wire, for ever.
//!
//! `FARSHORE_BLESS=1 cargo test -p farshore-changelog --test golden` writes them anew; a change of
//! these files is a change of the format and needs a new version.
#![allow(clippy::unwrap_used)] // a test file: a panic is the report

use std::path::PathBuf;

use farshore_changelog::{
    BatchBuilder, BatchContext, EncodedBatch, EpochStart, HashPurpose, Marker, MarkerState,
    RawBatch, Record, RecordBody, SegmentFooter, SegmentHeader, SegmentId, SegmentIndexBuilder,
    SegmentTrailer,
};
use farshore_extent::{
    BlockSizes, CaptureOrder, Chain, Epoch, Extent, Generation, GroupId, Lsn, MarkerId, PointKind,
    Seq, VolumeId, VolumeSize, WallTime,
};

fn compare(name: &str, bytes: &[u8]) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(name);
    if std::env::var_os("FARSHORE_BLESS").is_some() {
        std::fs::write(&path, bytes).unwrap();
    }
    let golden = std::fs::read(&path).unwrap();
    assert!(golden == bytes, "{name} is written differently now");
}

fn extent(offset: u64, len: u64) -> Extent {
    Extent::new(offset, len).unwrap()
}

/// Every kind of record, raw and zero payload. Nothing is compressed: the golden bytes pin our
/// format, not the output of one version of a compressor.
fn batch() -> (EncodedBatch, Vec<RecordBody>) {
    let marker = |kind, state, name: &str| {
        RecordBody::Marker(Marker {
            id: MarkerId::from_bytes([0x11; 16]),
            kind,
            state,
            group: GroupId::from_bytes([0x22; 16]),
            name: name.into(),
        })
    };
    let digest = [0x33; 32];
    let bodies = vec![
        RecordBody::EpochStart(EpochStart {
            continues: true,
            size: VolumeSize::new(1 << 30).unwrap(),
            blocks: BlockSizes::E512,
        }),
        RecordBody::Zero { extent: extent(8192, 4096), copied: false },
        RecordBody::Zero { extent: extent(1 << 29, 64 << 20), copied: true },
        RecordBody::Unknown { extent: extent(512, 512) },
        RecordBody::Hash { extent: extent(0, 65536), purpose: HashPurpose::Resync, digest },
        RecordBody::Hash { extent: extent(0, 65536), purpose: HashPurpose::Verify, digest },
        marker(PointKind::Crash, MarkerState::Committed, ""),
        marker(PointKind::App, MarkerState::Pending, "before the upgrade"),
        marker(PointKind::Group, MarkerState::Pending, "größe"),
        RecordBody::MarkerCommit(MarkerId::from_bytes([0x11; 16])),
        RecordBody::MarkerAbort(MarkerId::from_bytes([0x44; 16])),
        RecordBody::OrderLost,
        RecordBody::OrderRestored,
        RecordBody::Resize(VolumeSize::new(1 << 31).unwrap()),
    ];
    let mut builder = BatchBuilder::new(None);
    let time = |n: i64| WallTime::from_nanos(1_700_000_000_000_000_000 + n);
    let mut seq = 100;
    for body in &bodies {
        seq += 1;
        let record = Record { seq: Seq::new(seq), time: time(1), body: body.clone() };
        builder.push(&record);
    }
    // Zeroes in the middle are cut out; the last piece lies across two frames.
    let mut data: Vec<u8> = (0..72 << 10).map(|n: u32| n.to_le_bytes()[0] | 1).collect();
    data[4096..8192].fill(0);
    for copied in [false, true] {
        seq += 1;
        let at = extent(1 << 20, data.len() as u64);
        builder.push_data(Seq::new(seq), time(2), at, &data, crc32c::crc32c(&data), copied);
    }
    let context = BatchContext {
        volume: VolumeId::from_bytes([0x55; 16]),
        generation: Generation::new(3),
        prev: Lsn::new(Epoch::new(6), Seq::new(90)),
        prev_chain: Chain::from_bytes([0x66; 32]),
        durable: Lsn::new(Epoch::new(6), Seq::new(80)),
    };
    (builder.finish(Epoch::new(7), &context).unwrap(), bodies)
}

fn header() -> SegmentHeader {
    SegmentHeader {
        volume: VolumeId::from_bytes([0x55; 16]),
        generation: Generation::new(3),
        epoch: Epoch::new(7),
        segment: SegmentId::new(0x1234),
        prev: Lsn::new(Epoch::new(6), Seq::new(90)),
        prev_chain: Chain::from_bytes([0x66; 32]),
        created: WallTime::from_nanos(1_700_000_000_000_000_000),
        capacity: 1 << 20,
        size: VolumeSize::new(1 << 30).unwrap(),
        blocks: BlockSizes::E512,
        order: CaptureOrder::CatchUp,
    }
}

#[test]
fn batches_keep_their_bytes() {
    let (encoded, bodies) = batch();
    compare("batch.bin", &encoded.bytes);
    let checked = RawBatch::parse(&encoded.bytes).unwrap().check().unwrap();
    assert_eq!(checked.header(), &encoded.header);
    let decoded: Vec<_> = checked.records().map(|r| r.body).collect();
    assert_eq!(decoded[..bodies.len()], bodies);
    // Two writes of three pieces each: data, zero, data.
    assert_eq!(decoded.len(), bodies.len() + 6);
}

#[test]
fn segments_keep_their_bytes() {
    let (encoded, _) = batch();
    let checked = RawBatch::parse(&encoded.bytes).unwrap().check().unwrap();
    compare("segment-header.bin", &header().encode());
    let mut builder = SegmentIndexBuilder::new(header());
    builder.push(&checked, 4096);
    let footer = builder.finish();
    compare("segment-footer.bin", &footer.pages);
    compare("segment-trailer.bin", &footer.trailer.encode());
    assert_eq!(SegmentHeader::parse(&header().encode()), Ok(header()));
    let trailer = SegmentTrailer::parse(&footer.trailer.encode(), &header()).unwrap();
    assert_eq!(trailer, footer.trailer);
    let parsed = SegmentFooter::parse(&trailer, &footer.pages).unwrap();
    assert_eq!(parsed.head.events.len(), 9);
    assert_eq!(parsed.run.len(), builder.run().entries().count());
    assert_eq!(parsed.frames, builder.frames());
}
