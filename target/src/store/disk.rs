//! The seam between the store and its medium: synchronous calls on named files of one directory.
//!
//! Two implementers: [`super::FileDisk`] (real files) and [`super::SimDisk`] (memory, with faults).
//! Everything the store knows about durability is in these words: *written* = the call returned,
//! *durable* = it would survive a power cut.

use std::io;
use std::sync::Arc;

use farshore_extent::Extent;

/// How a file will be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// Segments: written in aligned pieces, each durable when the call returns.
    Journal,
    /// Base image and super: written in any place, durable after [`DiskFile::sync`].
    Plain,
}

/// One directory.
pub trait Disk: Send + Sync + 'static {
    /// Takes the store's lock and holds it while the value lives.
    ///
    /// # Errors
    /// `WouldBlock` when another process holds it (the message says which); others as they come.
    fn lock(&self) -> io::Result<Box<dyn Send>>;

    /// Creates an empty file. Its name is durable after [`Self::sync_dir`].
    ///
    /// # Errors
    /// `AlreadyExists`; `StorageFull`; others as they come.
    fn create(&self, name: &str, kind: FileKind) -> io::Result<Arc<dyn DiskFile>>;

    /// Opens an existing file.
    ///
    /// # Errors
    /// `NotFound`; others as they come.
    fn open(&self, name: &str, kind: FileKind) -> io::Result<Arc<dyn DiskFile>>;

    /// Removes a name; files that are open stay readable. Durable after [`Self::sync_dir`].
    ///
    /// # Errors
    /// `NotFound`; others as they come.
    fn delete(&self, name: &str) -> io::Result<()>;

    /// Gives a file another name, replacing what had it. Durable after [`Self::sync_dir`].
    ///
    /// # Errors
    /// `NotFound`; others as they come.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// All names, sorted.
    ///
    /// # Errors
    /// As they come.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Makes creations, removals and renames durable.
    ///
    /// # Errors
    /// As they come; afterwards nothing is known about any name changed since the last one.
    fn sync_dir(&self) -> io::Result<()>;
}

/// What a file holds at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// No space is allocated there; it reads as zero.
    pub hole: bool,
    /// First byte behind the stretch; never beyond what was asked for.
    pub end: u64,
}

/// An open file.
pub trait DiskFile: Send + Sync + 'static {
    /// Length in bytes.
    ///
    /// # Errors
    /// As they come.
    fn len(&self) -> io::Result<u64>;

    /// Whether it has no bytes.
    ///
    /// # Errors
    /// As they come.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Sets the length; new bytes are a hole. Durable after [`Self::sync`].
    ///
    /// # Errors
    /// As they come.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Fills all of `buf`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the file is shorter; others as they come.
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<()>;

    /// Writes all of `buf`; durable after [`Self::sync`].
    ///
    /// # Errors
    /// `StorageFull` and others: the range may hold old, new or mixed bytes.
    fn write_at(&self, buf: &[u8], at: u64) -> io::Result<()>;

    /// Writes all of `buf`, and it is durable when this returns. For [`FileKind::Journal`] place,
    /// length and (for speed) address of `buf` are multiples of 4096.
    ///
    /// # Errors
    /// As for [`Self::write_at`]; nothing may be assumed about the range, ever (design 04 rule 4).
    fn write_durable(&self, buf: &[u8], at: u64) -> io::Result<()>;

    /// Everything written before is durable when this returns.
    ///
    /// # Errors
    /// As they come; what was written since the last success may be lost, and a second call on
    /// the same file proves nothing (design 04 rule 4).
    fn sync(&self) -> io::Result<()>;

    /// Gives the space of a range back; it reads as zero. Durable after [`Self::sync`].
    ///
    /// # Errors
    /// `Unsupported` where holes cannot be made; others as they come.
    fn punch(&self, extent: Extent) -> io::Result<()>;

    /// The hole or data that begins at the start of `extent`; "all data" is always right.
    ///
    /// # Errors
    /// As they come.
    fn stretch(&self, extent: Extent) -> io::Result<Stretch> {
        Ok(Stretch { hole: false, end: extent.end() })
    }
}

/// Bytes whose address is a multiple of 4096, as direct I/O wants them. Reusable.
#[derive(Debug)]
pub struct AlignedBuf {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

/// Alignment of journal writes in bytes.
pub const ALIGN: usize = farshore_changelog::limits::SEGMENT_ALIGN;

impl AlignedBuf {
    /// An empty buffer that can take `capacity` bytes without moving.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        let bytes = vec![0; capacity.next_multiple_of(ALIGN) + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN).min(ALIGN);
        Self { bytes, start, len: 0 }
    }

    /// Bytes held; a multiple of 4096 after [`Self::push_padded`].
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    /// Forgets the bytes, keeps the memory.
    pub const fn clear(&mut self) {
        self.len = 0;
    }

    /// Forgets the first `n` bytes.
    pub fn drop_front(&mut self, n: usize) {
        let n = n.min(self.len);
        self.bytes.copy_within(self.start + n..self.start + self.len, self.start);
        self.len -= n;
    }

    /// Appends `data` and zeroes up to the next multiple of 4096; returns where it begins.
    pub fn push_padded(&mut self, data: &[u8]) -> usize {
        let at = self.len;
        let padded = data.len().next_multiple_of(ALIGN);
        let needed = self.len + padded;
        if self.start + needed > self.bytes.len() {
            let mut larger = Self::with_capacity(needed.max(2 * self.len));
            larger.bytes[larger.start..larger.start + self.len].copy_from_slice(self.as_slice());
            larger.len = self.len;
            *self = larger;
        }
        let place = self.start + at;
        self.bytes[place..place + data.len()].copy_from_slice(data);
        self.bytes[place + data.len()..place + padded].fill(0);
        self.len = needed;
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_aligned_buffer_stays_aligned_while_it_grows_and_shrinks() {
        let mut buf = AlignedBuf::with_capacity(0);
        for n in 1..20usize {
            let byte = u8::try_from(n).unwrap();
            let at = buf.push_padded(&vec![byte; n * 1000]);
            assert_eq!(buf.as_slice().as_ptr().align_offset(ALIGN), 0);
            assert_eq!(buf.as_slice()[at], byte);
            assert!(buf.len().is_multiple_of(ALIGN));
        }
        buf.drop_front(ALIGN);
        assert_eq!(buf.as_slice()[0], 2);
    }
}
