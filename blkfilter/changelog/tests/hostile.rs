//! Decoders survive any bytes: no panic, no absurd allocation, and nothing accepted that breaks
//! what later code relies on.
#![allow(clippy::unwrap_used)] // a test file: a panic is the report

use farshore_changelog::{
    BatchBuilder, BatchContext, CheckedBatch, EncodedBatch, Marker, MarkerState, RawBatch, Record,
    RecordBody, SegmentFooter, SegmentHeader, SegmentId, SegmentIndexBuilder, SegmentTrailer,
};
use farshore_extent::{
    BlockSizes, CaptureOrder, Chain, Epoch, Extent, Generation, GroupId, Lsn, MarkerId, PointKind,
    Seq, VolumeId, VolumeSize, WallTime,
};
use proptest::prelude::*;

fn context(prev: u64, prev_chain: Chain) -> BatchContext {
    BatchContext {
        volume: VolumeId::from_bytes([1; 16]),
        generation: Generation::new(1),
        prev: Lsn::new(Epoch::new(1), Seq::new(prev)),
        prev_chain,
        durable: Lsn::ZERO,
    }
}

/// One write: (sector, sectors, seed of the content).
type Write = (u64, u64, u8);

fn content(write: Write) -> Vec<u8> {
    let (_, sectors, seed) = write;
    let len = usize::try_from(sectors * 512).unwrap();
    let byte = |n: usize| seed.wrapping_mul(n.to_le_bytes()[0] ^ n.to_le_bytes()[1] | 1);
    // Seed 0 is all zero, small seeds compress well, and 4 KiB holes appear now and then.
    (0..len).map(|n| if seed & 8 != 0 && n / 4096 % 2 == 1 { 0 } else { byte(n) }).collect()
}

fn encode(writes: &[Write], names: &[String]) -> EncodedBatch {
    let mut builder = BatchBuilder::new(Some(1));
    let mut seq = 0;
    for write in writes {
        seq += 1;
        let extent = Extent::new(write.0 * 512, write.1 * 512).unwrap();
        let data = content(*write);
        let crc = crc32c::crc32c(&data);
        builder.push_data(Seq::new(seq), WallTime::default(), extent, &data, crc, false);
    }
    for name in names {
        seq += 1;
        let marker = Marker {
            id: MarkerId::NIL,
            kind: PointKind::App,
            state: MarkerState::Committed,
            group: GroupId::NIL,
            name: name.clone(),
        };
        let body = RecordBody::Marker(marker);
        builder.push(&Record { seq: Seq::new(seq), time: WallTime::default(), body });
    }
    builder.finish(Epoch::new(1), &context(0, Chain::EMPTY)).unwrap()
}

fn image(batch: &CheckedBatch<'_>, sectors: usize) -> Vec<u8> {
    let mut image = vec![0xee; sectors * 512];
    let mut payload = Vec::new();
    for record in batch.records() {
        let Some(extent) = record.body.extent() else { continue };
        let at = usize::try_from(extent.offset()).unwrap();
        let len = usize::try_from(extent.len()).unwrap();
        match record.body.payload() {
            Some(place) => {
                batch.read_payload(record.seq, place, len, &mut payload).unwrap();
                image[at..at + len].copy_from_slice(&payload);
            }
            None => image[at..at + len].fill(0),
        }
    }
    image
}

fn header() -> SegmentHeader {
    SegmentHeader {
        volume: VolumeId::from_bytes([1; 16]),
        generation: Generation::new(1),
        epoch: Epoch::new(1),
        segment: SegmentId::new(5),
        prev: Lsn::new(Epoch::new(1), Seq::ZERO),
        prev_chain: Chain::EMPTY,
        created: WallTime::default(),
        capacity: 16 << 20,
        size: VolumeSize::new(1 << 30).unwrap(),
        blocks: BlockSizes::E512,
        order: CaptureOrder::Ordered,
    }
}

/// Uses everything a decoded batch offers.
fn exercise(batch: &CheckedBatch<'_>) {
    let mut payload = Vec::new();
    for record in batch.records() {
        if let (Some(extent), Some(place)) = (record.body.extent(), record.body.payload()) {
            let len = usize::try_from(extent.len()).unwrap();
            let _ = batch.read_payload(record.seq, place, len, &mut payload);
        }
    }
    let mut builder = SegmentIndexBuilder::new(header());
    builder.push(batch, 4096);
    let _ = builder.finish();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_written_is_what_is_read(
        writes in prop::collection::vec((0u64..400, 1u64..200, any::<u8>()), 1..12),
        names in prop::collection::vec("[a-zü ]{0,40}", 0..3),
    ) {
        let encoded = encode(&writes, &names);
        let batch = RawBatch::parse(&encoded.bytes).unwrap().check().unwrap();
        prop_assert_eq!(batch.bytes().len(), encoded.header.total_len());
        let mut expected = vec![0xee; 600 * 512];
        for write in &writes {
            let at = usize::try_from(write.0 * 512).unwrap();
            let data = content(*write);
            expected[at..at + data.len()].copy_from_slice(&data);
        }
        prop_assert!(image(&batch, 600) == expected);
    }

    #[test]
    fn the_index_finds_the_newest_bytes_of_every_sector(
        writes in prop::collection::vec((0u64..400, 1u64..200, any::<u8>()), 1..12),
    ) {
        let encoded = encode(&writes, &[]);
        let batch = RawBatch::parse(&encoded.bytes).unwrap().check().unwrap();
        let mut builder = SegmentIndexBuilder::new(header());
        builder.push(&batch, 4096);
        let footer = builder.finish();
        let trailer = SegmentTrailer::parse(&footer.trailer.encode(), &header()).unwrap();
        let parsed = SegmentFooter::parse(&trailer, &footer.pages).unwrap();
        prop_assert!(footer.pages.len() + 4096 <= SegmentIndexBuilder::new(header())
            .footer_bound([batch.header()].into_iter()));
        let mut got = vec![0xee; 600 * 512];
        for entry in &parsed.run {
            let from = usize::try_from(entry.sector * 512).unwrap();
            let to = usize::try_from(entry.end() * 512).unwrap();
            match entry.place {
                farshore_changelog::IndexPlace::Frame { frame, sector } => {
                    let place = parsed.frames[frame as usize];
                    let start = place.place as usize - 4096;
                    let stored = &encoded.bytes[start..start + place.entry.stored_len as usize];
                    let mut raw = Vec::new();
                    place.entry.decode(stored, &mut raw).unwrap();
                    let skip = usize::from(sector) * 512;
                    got[from..to].copy_from_slice(&raw[skip..skip + to - from]);
                }
                farshore_changelog::IndexPlace::Zero => got[from..to].fill(0),
                farshore_changelog::IndexPlace::Unknown => prop_assert!(false, "nothing is unknown"),
            }
        }
        prop_assert!(got == image(&batch, 600));
    }

    #[test]
    fn a_turned_bit_anywhere_is_noticed(
        writes in prop::collection::vec((0u64..400, 1u64..40, any::<u8>()), 1..6),
        place: prop::sample::Index,
        bit in 0u8..8,
    ) {
        let mut bytes = encode(&writes, &["tag".into()]).bytes;
        let at = place.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(RawBatch::parse(&bytes).and_then(RawBatch::check).is_err());
    }

    #[test]
    fn a_batch_decoder_survives_damage_behind_good_checksums(
        writes in prop::collection::vec((0u64..400, 1u64..40, any::<u8>()), 1..6),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
    ) {
        // A hostile source can make any checksum fit: damage first, then mend the header.
        let mut bytes = encode(&writes, &["tag".into()]).bytes;
        for (place, byte) in damage {
            let at = 8 + place.index(bytes.len() - 8);
            bytes[at] = byte;
        }
        let crc = crc32c::crc32c(&bytes[..252]);
        bytes[252..256].copy_from_slice(&crc.to_le_bytes());
        if let Ok(batch) = RawBatch::parse(&bytes).and_then(RawBatch::check_without_chain) {
            exercise(&batch);
        }
    }

    #[test]
    fn a_batch_decoder_survives_any_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let _ = RawBatch::parse(&bytes);
        if bytes.len() >= 256 {
            bytes[..8].copy_from_slice(b"FARSHBAT");
            bytes[8..12].copy_from_slice(&[1, 0, 0, 1]);
            let crc = crc32c::crc32c(&bytes[..252]);
            bytes[252..256].copy_from_slice(&crc.to_le_bytes());
            if let Ok(batch) = RawBatch::parse(&bytes).and_then(RawBatch::check_without_chain) {
                exercise(&batch);
            }
        }
    }

    #[test]
    fn a_footer_decoder_survives_damage_behind_good_checksums(
        writes in prop::collection::vec((0u64..400, 1u64..40, any::<u8>()), 1..6),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        trailer_damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let encoded = encode(&writes, &["tag".into()]);
        let batch = RawBatch::parse(&encoded.bytes).unwrap().check().unwrap();
        let mut builder = SegmentIndexBuilder::new(header());
        builder.push(&batch, 4096);
        let footer = builder.finish();
        let mut pages = footer.pages.clone();
        for (place, byte) in damage {
            let at = place.index(pages.len());
            pages[at] = byte;
        }
        for page in pages.chunks_mut(4096) {
            let crc = crc32c::crc32c(&page[..4092]);
            page[4092..].copy_from_slice(&crc.to_le_bytes());
        }
        let mut block = footer.trailer.encode();
        for (place, byte) in trailer_damage {
            // The used part of the block, without what ties it to the header.
            block[44 + place.index(116)] = byte;
        }
        let crc = crc32c::crc32c(&block[..4092]);
        block[4092..].copy_from_slice(&crc.to_le_bytes());
        if let Ok(trailer) = SegmentTrailer::parse(&block, &header())
            && let Ok(footer) = SegmentFooter::parse(&trailer, &pages)
        {
            prop_assert!(footer.run.windows(2).all(|w| w[0].end() <= w[1].sector));
        }
    }

    #[test]
    fn block_decoders_survive_any_bytes(mut bytes in prop::collection::vec(any::<u8>(), 4096..=4096)) {
        let _ = SegmentHeader::parse(&bytes);
        bytes[..10].copy_from_slice(b"FARSHSEG\x01\x00");
        bytes[10..16].copy_from_slice(&[0, 16, 0, 0, 0, 0]);
        let crc = crc32c::crc32c(&bytes[..4092]);
        bytes[4092..].copy_from_slice(&crc.to_le_bytes());
        let _ = SegmentHeader::parse(&bytes);
    }
}

#[test]
fn a_stale_trailer_of_a_recycled_file_does_not_seal_the_new_segment() {
    let old = header();
    let block = SegmentIndexBuilder::new(old).finish().trailer.encode();
    assert!(SegmentTrailer::parse(&block, &old).is_ok());
    for new in [
        SegmentHeader { segment: SegmentId::new(6), ..old },
        SegmentHeader { generation: Generation::new(2), ..old },
        SegmentHeader { prev: Lsn::new(Epoch::new(2), Seq::new(9)), ..old },
    ] {
        assert!(SegmentTrailer::parse(&block, &new).is_err());
    }
}
