//! Received bytes that are not yet used: requests, and the begin of payload.

use super::limits::STAGING;
use super::wire::REQUEST_LEN;

/// The staging buffer.
#[derive(Debug)]
pub struct Inbox {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    /// An empty one.
    pub fn new() -> Self {
        Self { bytes: vec![0; STAGING].into_boxed_slice(), start: 0, end: 0 }
    }

    /// Takes a request's header when it is there completely.
    pub fn take_header(&mut self) -> Option<[u8; REQUEST_LEN]> {
        let header = *self.bytes[self.start..self.end].first_chunk::<REQUEST_LEN>()?;
        self.start += REQUEST_LEN;
        Some(header)
    }

    /// Copies what is there into `out`, as far as it fits; returns how many bytes.
    pub fn copy_into(&mut self, out: &mut [u8]) -> usize {
        let len = out.len().min(self.end - self.start);
        out[..len].copy_from_slice(&self.bytes[self.start..self.start + len]);
        self.start += len;
        len
    }

    /// Drops up to `len` bytes; returns how many.
    pub fn skip(&mut self, len: u64) -> u64 {
        let there = self.end - self.start;
        let now = usize::try_from(len).unwrap_or(usize::MAX).min(there);
        self.start += now;
        now as u64
    }

    /// Room for the next receive, at most `limit` bytes, never empty: everything but a part of a
    /// header has been used when more is received.
    pub fn room(&mut self, limit: usize) -> &mut [u8] {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let stop = (self.end + limit).min(self.bytes.len());
        &mut self.bytes[self.end..stop]
    }

    /// So many bytes were received into [`Self::room`].
    pub fn received(&mut self, len: usize) {
        self.end += len;
    }
}
