//! The answer to BLOCK_STATUS: what is allocated, merged and bounded.

use farshore_extent::Extent;

use super::limits::MAX_EXTENTS;
use super::negotiation::ALLOCATION_ID;
use super::wire::{chunk, chunk_header};
use crate::device::{Allocation, Device};

const HOLE: u32 = 1;
const ZERO: u32 = 2;

/// The whole reply for `extent`; one extent only, not longer than asked, when `one`.
pub fn status_reply(device: &dyn Device, cookie: u64, extent: Extent, one: bool) -> Vec<u8> {
    let known = merge(&device.allocation(extent, MAX_EXTENTS), extent.len());
    let told = if one { &known[..known.len().min(1)] } else { &known[..] };
    let len = u32::try_from(4 + 8 * told.len()).unwrap_or(u32::MAX); // at most MAX_EXTENTS
    let mut reply = Vec::with_capacity(20 + len as usize);
    reply.extend_from_slice(&chunk_header(cookie, chunk::DONE, chunk::BLOCK_STATUS, len));
    reply.extend_from_slice(&ALLOCATION_ID.to_be_bytes());
    for (len, flags) in told {
        reply.extend_from_slice(&len.to_be_bytes());
        reply.extend_from_slice(&flags.to_be_bytes());
    }
    reply
}

/// Lengths and flags of consecutive extents, neighbours of the same kind made one, cut to
/// `len`. Never empty: a device that says nothing is taken to hold data.
fn merge(pieces: &[Allocation], len: u64) -> Vec<(u32, u32)> {
    let mut told: Vec<(u32, u32)> = Vec::with_capacity(pieces.len().min(MAX_EXTENTS));
    let mut left = u32::try_from(len).unwrap_or(u32::MAX); // a request's length has 32 bits
    for piece in pieces.iter().take(MAX_EXTENTS) {
        let len = u32::try_from(piece.len).unwrap_or(u32::MAX).min(left);
        if len == 0 {
            continue;
        }
        left -= len;
        let flags = if piece.hole { HOLE } else { 0 } | if piece.zero { ZERO } else { 0 };
        match told.last_mut() {
            Some((last, same)) if *same == flags => *last += len,
            _ => told.push((len, flags)),
        }
    }
    if told.is_empty() {
        told.push((left, 0));
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_merged_cut_to_the_request_and_never_missing() {
        let piece = |len: u64, hole: bool| Allocation { len, hole, zero: hole };
        let pieces = [piece(512, true), piece(512, true), piece(0, false), piece(1 << 40, false)];
        assert_eq!(merge(&pieces, 4096), [(1024, HOLE | ZERO), (3072, 0)]);
        assert_eq!(merge(&[], 4096), [(4096, 0)]);
    }
}
