//! What each fuzz target does with its bytes; shared with the test that replays the corpora.
//! Each also mends the checksums, because a hostile peer can do so and a fuzzer cannot.

use farshore_changelog::{
    CheckedBatch, RawBatch, SegmentFooter, SegmentHeader, SegmentId, SegmentIndexBuilder,
    SegmentTrailer,
};
use farshore_extent::{
    BlockSizes, CaptureOrder, Chain, Epoch, Generation, Lsn, VolumeId, VolumeSize, WallTime,
};
use farshore_target::store::Super;

const BLOCK: usize = 4096;
const BATCH_HEADER: usize = 256;

fn mend(block: &mut [u8]) {
    if let Some(at) = block.len().checked_sub(4) {
        let crc = crc32c::crc32c(&block[..at]);
        block[at..].copy_from_slice(&crc.to_le_bytes());
    }
}

/// A batch from the wire.
pub fn batch(data: &[u8]) {
    if let Ok(checked) = RawBatch::parse(data).and_then(RawBatch::check) {
        use_batch(&checked);
    }
    let mut mended = data.to_vec();
    if mended.len() >= BATCH_HEADER {
        mend(&mut mended[..BATCH_HEADER]);
        if let Ok(checked) = RawBatch::parse(&mended).and_then(RawBatch::check_without_chain) {
            use_batch(&checked);
        }
    }
}

fn use_batch(batch: &CheckedBatch<'_>) {
    let mut payload = Vec::new();
    for record in batch.records() {
        if let (Some(extent), Some(place)) = (record.body.extent(), record.body.payload()) {
            let len = usize::try_from(extent.len()).unwrap_or(0);
            let _ = batch.read_payload(record.seq, place, len, &mut payload);
        }
    }
    let mut builder = SegmentIndexBuilder::new(segment_header());
    builder.push(batch, BLOCK as u64);
    let _ = builder.finish();
}

fn segment_header() -> SegmentHeader {
    SegmentHeader {
        volume: VolumeId::from_bytes([0x55; 16]),
        generation: Generation::new(3),
        epoch: Epoch::new(7),
        segment: SegmentId::new(0x1234),
        prev: Lsn::ZERO,
        prev_chain: Chain::EMPTY,
        created: WallTime::default(),
        capacity: 1 << 20,
        size: VolumeSize::new(1 << 30)
            .unwrap_or_else(|_| unreachable!("a whole number of sectors")),
        blocks: BlockSizes::E512,
        order: CaptureOrder::CatchUp,
    }
}

/// A segment from the disk: header block, trailer block, then the pages of the footer.
pub fn segment(data: &[u8]) {
    let mut mended = data.to_vec();
    mended.chunks_mut(BLOCK).for_each(mend);
    for bytes in [data, &mended] {
        let Some((head, rest)) = bytes.split_at_checked(BLOCK) else { continue };
        let Some((tail, pages)) = rest.split_at_checked(BLOCK) else { continue };
        let Ok(header) = SegmentHeader::parse(head) else { continue };
        let Ok(trailer) = SegmentTrailer::parse(tail, &header) else { continue };
        let _ = SegmentFooter::parse(&trailer, pages);
    }
}

/// A super block from the disk.
pub fn super_block(data: &[u8]) {
    let _ = Super::parse(data);
    let mut mended = data.to_vec();
    mend(&mut mended);
    let _ = Super::parse(&mended);
}
