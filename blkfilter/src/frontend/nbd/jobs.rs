//! Requests in flight: a slab, so that nothing is allocated for a request on the hot path.

use std::ops::Range;

use super::wire::ErrorNumber;
use crate::device::{MAX_PAYLOAD, Slot, Tag};

/// What a job answers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Payload that was read.
    Read,
    /// Success or failure only.
    Plain,
}

/// One request of the client, perhaps cut into several pieces at the seam.
#[derive(Debug)]
pub struct Job {
    pub cookie: u64,
    pub kind: Kind,
    /// First byte, for the offsets of reply chunks.
    pub offset: u64,
    /// Payload in bytes, for the limit of what may be in flight; 0 without payload.
    pub payload: u32,
    /// Bytes of the first piece read that were not asked for.
    pub skip: u32,
    /// A part of the answer is out and said success: a failure can only cut the connection.
    pub committed: bool,
    /// Pieces in flight, plus one while more are to be submitted.
    pub left: u32,
    /// The first error decides.
    pub failed: Option<ErrorNumber>,
    /// Pieces read, by their number, when the answer must be sent as a whole.
    pub held: Vec<(u32, Slot)>,
}

impl Job {
    /// Records a failure; the first one stays.
    pub fn fail(&mut self, error: ErrorNumber) {
        self.failed.get_or_insert(error);
    }

    /// Offset on the device of the first wanted byte of piece `number`.
    pub fn wanted_offset(&self, number: u32) -> u64 {
        let skip = if number == 0 { self.skip } else { 0 };
        self.offset + u64::from(number) * MAX_PAYLOAD as u64 + u64::from(skip)
    }

    /// The wanted bytes of piece `number`, which was read into a slot of `len` bytes.
    pub fn wanted(&self, number: u32, len: u32) -> Range<usize> {
        let before = number as usize * MAX_PAYLOAD;
        let stop = (self.skip as usize + self.payload as usize).saturating_sub(before);
        let start = if number == 0 { self.skip as usize } else { 0 };
        start..stop.min(len as usize)
    }
}

/// The slab.
#[derive(Debug, Default)]
pub struct Jobs {
    slots: Vec<Job>,
    free: Vec<u32>,
    /// Payload of all open jobs in bytes.
    pub payload: u64,
}

impl Jobs {
    /// Opens a job; its `left` is 1 until [`Self::settle`] is called for the submitter.
    pub fn open(&mut self, cookie: u64, kind: Kind, offset: u64, payload: u32) -> u32 {
        self.payload += u64::from(payload);
        if let Some(index) = self.free.pop() {
            let job = &mut self.slots[index as usize];
            job.cookie = cookie;
            job.kind = kind;
            job.offset = offset;
            job.payload = payload;
            job.left = 1;
            job.skip = 0;
            job.committed = false;
            job.failed = None;
            return index;
        }
        let held = Vec::new();
        let (skip, committed, failed) = (0, false, None);
        let job = Job { cookie, kind, offset, payload, skip, committed, left: 1, failed, held };
        self.slots.push(job);
        u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX) // bounded by MAX_REQUESTS
    }

    /// The open job `index`.
    pub fn get(&mut self, index: u32) -> &mut Job {
        &mut self.slots[index as usize]
    }

    /// One piece, or the submitter, is done. Returns whether nothing is left.
    pub fn settle(&mut self, index: u32) -> bool {
        let job = self.get(index);
        job.left = job.left.saturating_sub(1);
        job.left == 0
    }

    /// Forgets a job that was answered.
    pub fn close(&mut self, index: u32) {
        self.payload -= u64::from(self.get(index).payload);
        self.free.push(index);
    }

    /// Open jobs.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

/// The tag of a piece: the job above, the piece's number below.
pub fn tag(job: u32, piece: u32) -> Tag {
    Tag(u64::from(job) << 32 | u64::from(piece))
}

/// The job and the piece of a tag.
pub fn untag(tag: Tag) -> (u32, u32) {
    let part = |n: u64| u32::try_from(n & u64::from(u32::MAX)).unwrap_or(u32::MAX);
    (part(tag.0 >> 32), part(tag.0))
}
