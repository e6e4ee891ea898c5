//! Replays the corpora of the fuzz targets in tests/fuzz: whatever broke a decoder once never
//! breaks it again. Each file is also tried cut short and with single bytes changed.
#![allow(clippy::unwrap_used)] // a test file: a panic is the report

use std::path::Path;

#[path = "fuzz/bodies.rs"]
mod bodies;

fn replay(corpus: &str, body: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(corpus);
    let mut files = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        files += 1;
        body(&bytes);
        for n in 0..64 {
            body(&bytes[..bytes.len() * n / 64]);
            let mut changed = bytes.clone();
            // Headers are at the front of blocks: look closest there.
            let at = if n % 2 == 0 { n * 4 } else { bytes.len() * n / 64 };
            if let Some(byte) = changed.get_mut(at) {
                *byte = byte.wrapping_add(if n % 3 == 0 { 1 } else { 0x7f });
            }
            body(&changed);
        }
    }
    assert!(files >= 3, "corpus {corpus} is missing");
}

#[test]
fn the_batch_decoder_survives_its_corpus() {
    replay("batch", bodies::batch);
}

#[test]
fn the_segment_decoder_survives_its_corpus() {
    replay("segment", bodies::segment);
}

#[test]
fn the_super_block_decoder_survives_its_corpus() {
    replay("super", bodies::super_block);
}
