//! The change log: ONE format for spool, wire and journal.
//!
//! A batch is made once, by the source, and its bytes are what travels, what the spool keeps and
//! what the journal keeps; every hop verifies them, none re-encodes them. FORMAT.md gives the
//! layout byte by byte and the golden files in `golden/` pin it.
//!
//! Untrusted bytes have another type than checked ones: [`RawBatch`] (lengths are possible) →
//! [`CheckedBatch`] (checksums and chain agree, every record is well formed) → [`Record`].
//! This crate does no I/O.
#![forbid(unsafe_code)]

pub mod codec;
pub mod limits;

mod batch;
mod build;
mod frame;
mod layout;
mod record;
mod run;
mod segment;
mod segment_footer;
mod segment_index;

pub use batch::{BatchError, BatchFront, BatchHeader, CheckedBatch, RawBatch};
pub use build::{BatchBuilder, BatchContext, EncodedBatch};
pub use frame::{Codec, FrameEntry};
pub use record::{
    EpochStart, HashPurpose, Marker, MarkerState, PayloadRef, Record, RecordBody, RecordError,
};
pub use run::{IndexEntry, IndexPlace, MAX_ENTRY_SECTORS, RunMap, SourcePlace};
pub use segment::{SegmentError, SegmentHeader, SegmentId, SegmentTrailer, order_after};
pub use segment_footer::{
    BatchPlace, ENTRIES_PER_PAGE, FooterHead, FramePlace, PAGE_PAYLOAD, SegmentEvent,
    SegmentFooter, encode_page, parse_frame_page, parse_page, parse_run_page,
};
pub use segment_index::{EncodedFooter, SegmentIndexBuilder};
