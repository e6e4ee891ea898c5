//! Arbitrary bytes for the decoder of "segment": `cargo fuzz run segment` in tests/; the corpus is replayed by tests/fuzz_corpus.rs.
#![no_main]

#[path = "../bodies.rs"]
#[allow(dead_code)] // each target uses one
mod bodies;

libfuzzer_sys::fuzz_target!(|data: &[u8]| bodies::segment(data));
