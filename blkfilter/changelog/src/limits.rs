//! Limits of the format. A decoder checks a length against these before it believes it.

/// Raw bytes in one frame: every frame but the last of a batch holds exactly this many.
/// A random 4 KiB read of a point decodes one frame, or two when the write lay across.
pub const FRAME_RAW: usize = 64 << 10;

/// A batch is closed when this much raw payload has gathered (design 02: 1 MiB).
pub const BATCH_RAW_TARGET: usize = 1 << 20;

/// Largest payload of one record. Front ends cut larger requests.
pub const MAX_RECORD_PAYLOAD: usize = 1 << 20;

/// Most raw payload in a batch: the target may be overshot by one record.
pub const MAX_BATCH_RAW: usize = BATCH_RAW_TARGET + MAX_RECORD_PAYLOAD;

/// Most records in a batch. 4096 x 48 B = 192 KiB of table.
pub const MAX_RECORDS: usize = 4096;

/// Most bytes of auxiliary data (marker names, digests) in a batch.
pub const MAX_AUX: usize = 64 << 10;

/// Most bytes in a marker's name tag.
pub const MAX_MARKER_NAME: usize = 255;

/// Largest zero, unknown or hash extent of one record: 64 MiB (design 03).
pub const MAX_DATALESS_LEN: u64 = 64 << 20;

/// Most frames: ceil(MAX_BATCH_RAW / FRAME_RAW).
pub const MAX_FRAMES: usize = MAX_BATCH_RAW.div_ceil(FRAME_RAW);

/// Largest encoded batch: header + records + aux + frame table + payload (a frame is never
/// stored larger than raw) = about 2.3 MiB. A receiver never needs a larger buffer.
pub const MAX_BATCH_BYTES: usize = crate::layout::HEADER_LEN
    + MAX_RECORDS * crate::layout::RECORD_LEN
    + MAX_AUX
    + MAX_FRAMES * crate::layout::FRAME_ENTRY_LEN
    + MAX_BATCH_RAW;

/// Everything in a segment that is made durable on its own begins at a multiple of this many
/// bytes: a durable sector is never written again.
pub const SEGMENT_ALIGN: usize = 4096;

/// Largest segment file in bytes: places of frames are kept in 32 bits.
pub const MAX_SEGMENT_BYTES: u64 = 1 << 30;

/// Largest volume that an index can address: 2^40 sectors of 512 B = 512 TiB.
pub const MAX_INDEXED_BYTES: u64 = 512 << 40;

/// Largest control message of any protocol of ours, in bytes of bincode.
pub const MAX_CONTROL_MESSAGE: usize = 1 << 20;

const _: () = assert!(MAX_BATCH_RAW >= MAX_RECORD_PAYLOAD);
const _: () = assert!(MAX_BATCH_BYTES < 4 << 20);
