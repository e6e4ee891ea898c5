//! Batches built from descriptors: what a target would read out of them.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // a test that cannot go on fails

use farshore_agent::batch::{Feed, FeedError, FeedOptions};
use farshore_agent::session::{FeedFailure, Resume};
use farshore_blkfilter::control::{Descriptor, DescriptorBody, PoolPlace};
use farshore_changelog::{EncodedBatch, RawBatch, RecordBody};
use farshore_extent::{
    Chain, Epoch, Extent, Generation, GroupId, Lsn, MarkerId, PointKind, Seq, VolumeId, WallTime,
};

const EPOCH: Epoch = Epoch::new(4);

fn at(seq: u64) -> Lsn {
    Lsn::new(EPOCH, Seq::new(seq))
}

fn feed(options: FeedOptions) -> Feed {
    let resume =
        Resume { after: at(10), chain: Chain::from_bytes([7; 32]), generation: Generation::new(2) };
    Feed::new(VolumeId::NIL, resume, options)
}

fn record(seq: u64, body: DescriptorBody) -> Descriptor {
    Descriptor { seq: Seq::new(seq), time: WallTime::from_nanos(5), body }
}

fn write(seq: u64, offset: u64, pool: &mut Vec<u8>, data: &[u8]) -> Descriptor {
    let place = PoolPlace { offset: pool.len() as u64, crc: crc32c::crc32c(data) };
    pool.extend_from_slice(data);
    let extent = Extent::new(offset, data.len() as u64).unwrap();
    record(seq, DescriptorBody::Write { extent, place })
}

fn marker(seq: u64) -> Descriptor {
    let (marker, group) = (MarkerId::NIL, GroupId::NIL);
    let (kind, name, pending) = (PointKind::Crash, String::new(), false);
    record(seq, DescriptorBody::Marker { marker, kind, group, name, pending })
}

fn noise(len: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()
    };
    (0..len.div_ceil(8)).flat_map(|_| next()).take(len).collect()
}

/// All batches of these records; each is checked as a target would.
fn build(feed: &mut Feed, records: &[Descriptor], pool: &[u8]) -> Vec<EncodedBatch> {
    let mut batches = Vec::new();
    for record in records {
        batches.extend(feed.add(EPOCH, record, pool, at(9)).unwrap());
    }
    batches.extend(feed.finish(at(9)));
    for batch in &batches {
        RawBatch::parse(&batch.bytes).unwrap().check().unwrap();
        assert_eq!(batch.header.durable, at(9));
        assert_eq!(batch.header.generation, Generation::new(2));
    }
    batches
}

#[test]
fn place_and_chain_run_from_batch_to_batch_and_a_marker_closes_one() {
    let mut pool = Vec::new();
    let records: Vec<Descriptor> = (11..200)
        .map(|n| if n % 50 == 0 { marker(n) } else { write(n, n << 16, &mut pool, &noise(65536)) })
        .collect();
    let mut feed = feed(FeedOptions::default());
    let batches = build(&mut feed, &records, &pool);
    assert_eq!(
        (batches[0].header.prev, batches[0].header.prev_chain),
        (at(10), Chain::from_bytes([7; 32]))
    );
    for pair in batches.windows(2) {
        assert_eq!(pair[1].header.prev, pair[0].header.last());
        assert_eq!(pair[1].header.prev_chain, pair[0].header.chain);
    }
    for number in [50, 100, 150] {
        assert!(batches.iter().any(|b| b.header.last() == at(number)), "{number} closes a batch");
    }
    assert!(batches.iter().all(|b| b.header.raw_len <= 1 << 20));
    assert_eq!(feed.place(), at(199));
    assert!(feed.is_empty());
}

#[test]
fn zeroes_travel_as_records_and_everything_else_byte_for_byte() {
    let mut pool = Vec::new();
    let mut mixed = noise(16384);
    mixed[4096..12288].fill(0);
    let (zero, text) = (vec![0; 65536], b"farshore".repeat(1024));
    let records = [
        write(11, 0, &mut pool, &mixed),
        write(12, 1 << 20, &mut pool, &zero),
        write(13, 2 << 20, &mut pool, &text),
    ];
    let batches = build(&mut feed(FeedOptions::default()), &records, &pool);
    assert_eq!(batches.len(), 1);
    let checked = RawBatch::parse(&batches[0].bytes).unwrap().check().unwrap();
    let mut image = vec![0xaa; 3 << 20];
    let mut zeroes = 0;
    for record in checked.records() {
        let extent = record.body.extent().unwrap();
        let range = extent.offset() as usize..extent.end() as usize;
        match record.body {
            RecordBody::Zero { copied: false, .. } => {
                zeroes += extent.len();
                image[range].fill(0);
            }
            RecordBody::Write { payload, .. } => {
                let mut bytes = Vec::new();
                let len = extent.len() as usize;
                checked.read_payload(record.seq, payload, len, &mut bytes).unwrap();
                image[range].copy_from_slice(&bytes);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(zeroes, 8192 + 65536);
    assert_eq!(image[..16384], mixed);
    assert_eq!(image[1 << 20..(1 << 20) + 65536], zero);
    assert_eq!(image[2 << 20..(2 << 20) + text.len()], text);
    assert!(batches[0].bytes.len() < 8192 + 2048, "only noise takes room");
}

#[test]
fn a_number_is_never_divided_however_full_the_batch_is() {
    let mut pool = Vec::new();
    let records: Vec<Descriptor> = (11..14)
        .flat_map(|n| (0..5).map(move |part| (n, part)))
        .map(|(n, part)| write(n, (n * 8 + part) << 20, &mut pool, &noise(262_144)))
        .collect();
    let batches = build(&mut feed(FeedOptions::default()), &records, &pool);
    let counts: Vec<u32> = batches.iter().map(|b| b.header.record_count).collect();
    assert_eq!(counts, [5, 5, 5]);
}

#[test]
fn what_does_not_match_its_checksum_or_lies_outside_the_pool_is_never_built() {
    let mut pool = Vec::new();
    let good = write(11, 0, &mut pool, &noise(4096));
    let bad = write(12, 0, &mut pool, &noise(4096));
    pool[6000] ^= 1;
    let mut feed = feed(FeedOptions::default());
    feed.add(EPOCH, &good, &pool[..], Lsn::ZERO).unwrap();
    let error = feed.add(EPOCH, &bad, &pool[..], Lsn::ZERO).unwrap_err();
    assert_eq!(error, FeedError::Payload { seq: Seq::new(12) });
    assert!(matches!(error.failure("disk"), FeedFailure::Damaged(p) if p.code.0 == 3014));
    let batch = feed.finish(Lsn::ZERO).unwrap();
    assert_eq!((batch.header.last(), batch.header.record_count), (at(11), 1));

    let outside = feed.add(EPOCH, &bad, &pool[..100], Lsn::ZERO).unwrap_err();
    assert!(matches!(outside, FeedError::OutsidePool { .. }));
    let extent = Extent::new(0, 2 << 20).unwrap();
    let place = PoolPlace { offset: 0, crc: 0 };
    let long = record(13, DescriptorBody::Write { extent, place });
    let error = feed.add(EPOCH, &long, &pool[..], Lsn::ZERO).unwrap_err();
    assert!(matches!(error, FeedError::Impossible { .. }));
}

#[test]
fn a_new_epoch_begins_a_new_batch_and_an_older_one_is_divergence() {
    let mut pool = Vec::new();
    let (a, b) = (write(11, 0, &mut pool, &noise(512)), write(1, 0, &mut pool, &noise(512)));
    let mut feed = feed(FeedOptions::default());
    feed.add(EPOCH, &a, &pool[..], Lsn::ZERO).unwrap();
    let old = feed.add(Epoch::new(5), &b, &pool[..], Lsn::ZERO).unwrap().unwrap();
    assert_eq!(old.header.last(), at(11));
    let new = feed.finish(Lsn::ZERO).unwrap();
    assert_eq!((new.header.prev, new.header.epoch), (at(11), Epoch::new(5)));
    let error = feed.add(EPOCH, &a, &pool[..], Lsn::ZERO).unwrap_err();
    assert!(matches!(error.failure("disk"), FeedFailure::Diverged(p) if p.code.0 == 3011));
}

/// Figures: `cargo test --release -p farshore-agent --test batch -- --ignored --nocapture`.
#[test]
#[ignore = "soak: a measurement, not a test"]
fn speed_of_building_batches() {
    let file = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    let file: Vec<u8> = file.into_iter().cycle().take(32 << 20).collect();
    let cases = [("random", noise(32 << 20)), ("file", file), ("zero", vec![0; 32 << 20])];
    for (name, data) in &cases {
        for level in [None, Some(1), Some(3)] {
            for size in [4096, 65536] {
                let mut pool = Vec::new();
                let records: Vec<Descriptor> = data
                    .chunks(size)
                    .zip(11..)
                    .map(|(d, n)| write(n, n << 16, &mut pool, d))
                    .collect();
                let options = FeedOptions { zstd_level: level, ..FeedOptions::default() };
                let cpu = || {
                    let usage = nix::sys::resource::UsageWho::RUSAGE_THREAD;
                    let usage = nix::sys::resource::getrusage(usage).unwrap();
                    let time = usage.user_time() + usage.system_time();
                    time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6
                };
                let (mut stored, start) = (0, cpu());
                let mut feed = feed(options);
                for record in &records {
                    let batch = feed.add(EPOCH, record, &pool[..], Lsn::ZERO).unwrap();
                    stored += batch.map_or(0, |b| b.bytes.len());
                }
                stored += feed.finish(Lsn::ZERO).map_or(0, |b| b.bytes.len());
                let spent = cpu() - start;
                println!(
                    "{name:7} zstd {level:?} writes of {size:6}: {:7.0} MB per CPU-second, {:.3} of raw",
                    data.len() as f64 / 1e6 / spent,
                    stored as f64 / data.len() as f64
                );
            }
        }
    }
}
