//! Arbitrary bytes for the decoder of "batch": `cargo fuzz run batch` in tests/; the corpus is replayed by tests/fuzz_corpus.rs.
#![no_main]

#[path = "../bodies.rs"]
#[allow(dead_code)] // each target uses one
mod bodies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::batch(data));
