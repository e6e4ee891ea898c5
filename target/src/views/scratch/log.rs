//! The file `map` of a scratch: which ranges of the view are in its file `data` and which were
//! zeroed. A log of records, each durable before the next begins. FORMAT.md in this folder gives
//! the bytes.
//!
//! A record speaks only of data that is durable already, so whatever records a power cut leaves,
//! they are true. The last one may be torn and is cut; a bad one before a good one is damage.

use std::io;
use std::sync::Arc;

use farshore_extent::{Extent, Lsn, ViewId, VolumeId, VolumeSize};

use crate::store::{Disk, DiskFile, FileKind};

pub(super) const NAME: &str = "map";
/// Bytes of a log without records.
pub(super) const EMPTY: u64 = BLOCK as u64;
const NEW: &str = "map.new";
const MAGIC: [u8; 8] = *b"FARSHVMP";
const VERSION: u16 = 1;
/// Header and records begin at multiples of this many bytes.
const BLOCK: usize = 512;
const CRC_AT: usize = BLOCK - 4;
const RECORD_MAGIC: [u8; 4] = *b"VREC";
/// Bytes of a record before its entries.
const RECORD_HEAD: usize = 40;
const ENTRY: usize = 16;
/// Of an entry's length: the range was zeroed.
const ZERO: u64 = 1 << 63;
/// A log is written anew only when it is longer than this, in bytes.
const COMPACT_FROM: u64 = if cfg!(test) { 2048 } else { 1 << 20 };

/// Whose scratch it is. One of another view, or over another place, is never taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::views) struct Identity {
    pub(in crate::views) view: ViewId,
    pub(in crate::views) volume: VolumeId,
    pub(in crate::views) at: Lsn,
    pub(in crate::views) size: VolumeSize,
}

impl Identity {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(BLOCK);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 6]);
        out.extend_from_slice(&self.view.to_bytes());
        out.extend_from_slice(&self.volume.to_bytes());
        for field in [self.at.epoch.get(), self.at.seq.get(), self.size.get()] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.resize(CRC_AT, 0);
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }
}

/// A range and whether it was zeroed.
pub(super) type Entry = (Extent, bool);

/// Why a scratch cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(in crate::views) enum OpenError {
    /// The file system said no.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The content is not what this daemon wrote.
    #[error("{0}")]
    Damaged(String),
}

/// The log, to be appended to.
pub(super) struct Log {
    identity: Identity,
    disk: Arc<dyn Disk>,
    file: Arc<dyn DiskFile>,
    /// Where the next record goes.
    end: u64,
    /// Its number.
    seq: u64,
}

impl Log {
    /// An empty one, durable when the directory is synced.
    pub(super) fn create(disk: Arc<dyn Disk>, identity: Identity) -> io::Result<Self> {
        let file = disk.create(NAME, FileKind::Plain)?;
        file.write_at(&identity.encode(), 0)?;
        file.sync()?;
        Ok(Self { identity, disk, file, end: BLOCK as u64, seq: 1 })
    }

    /// The log in `disk`, and its entries, oldest first. A torn end is cut, durably.
    pub(super) fn open(
        disk: Arc<dyn Disk>,
        identity: Identity,
    ) -> Result<(Self, Vec<Entry>), OpenError> {
        match disk.delete(NEW) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        let file = disk.open(NAME, FileKind::Plain)?;
        let mut bytes = vec![0; usize::try_from(file.len()?).unwrap_or(usize::MAX)];
        file.read_at(&mut bytes, 0)?;
        check_header(&bytes, identity)?;
        let (mut end, mut seq, mut entries) = (BLOCK, 1, Vec::new());
        while let Some(record) = Record::parse(&bytes[end..], identity.view) {
            if record.seq != seq {
                break;
            }
            record.entries(&mut entries)?;
            end += record.len;
            seq += 1;
        }
        let later =
            |rest: &[u8]| Record::parse(rest, identity.view).is_some_and(|record| record.seq > seq);
        let mut behind = (end..bytes.len()).step_by(BLOCK);
        if let Some(good) = behind.find(|at| later(&bytes[*at..])) {
            return Err(OpenError::Damaged(format!(
                "{NAME}: record {seq} at {end} is damaged, a later one at {good} is not"
            )));
        }
        let end = end as u64;
        if end < bytes.len() as u64 {
            // What is left of a torn record must not follow the next one.
            file.set_len(end)?;
            file.sync()?;
        }
        Ok((Self { identity, disk, file, end, seq }, entries))
    }

    /// Appends a record, durably.
    ///
    /// # Errors
    /// A full disk: nothing was appended, and it can be tried again. After any other nothing is
    /// known about the file.
    pub(super) fn append(&mut self, entries: &[Entry]) -> io::Result<()> {
        let record = encode(self.identity.view, self.seq, entries);
        self.file.write_at(&record, self.end)?;
        self.file.sync()?;
        self.end += record.len() as u64;
        self.seq += 1;
        Ok(())
    }

    /// Whether a log of only `entries` would be much shorter.
    pub(super) const fn is_long_for(&self, entries: usize) -> bool {
        self.end > COMPACT_FROM && self.end / 4 > (entries * ENTRY) as u64
    }

    /// Replaces the log by one of only `entries`, durably.
    ///
    /// # Errors
    /// As for [`Self::append`].
    pub(super) fn rewrite(&mut self, entries: &[Entry]) -> io::Result<()> {
        let record = encode(self.identity.view, 1, entries);
        let made = self.write_new(&record);
        let file = match made {
            Ok(file) => file,
            Err(error) => {
                // Nothing depends on it yet.
                let _ = self.disk.delete(NEW);
                return Err(error);
            }
        };
        self.disk.rename(NEW, NAME)?;
        // Failed or full alike: nobody knows which of the two has the name now.
        self.disk.sync_dir().map_err(|e| io::Error::other(e.to_string()))?;
        (self.file, self.end, self.seq) = (file, (BLOCK + record.len()) as u64, 2);
        Ok(())
    }

    fn write_new(&self, record: &[u8]) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.disk.create(NEW, FileKind::Plain)?;
        file.write_at(&self.identity.encode(), 0)?;
        file.write_at(record, BLOCK as u64)?;
        file.sync()?;
        Ok(file)
    }
}

fn check_header(bytes: &[u8], identity: Identity) -> Result<(), OpenError> {
    let damaged = |why: &str| Err(OpenError::Damaged(format!("{NAME}: {why}")));
    let Some(header) = bytes.get(..BLOCK) else { return damaged("it has no header") };
    let (content, crc) = header.split_at(CRC_AT);
    if content[..8] != MAGIC || crc != crc32c::crc32c(content).to_le_bytes() {
        return damaged("its header does not match its checksum");
    }
    if content[8..10] != VERSION.to_le_bytes() {
        return damaged("it was written by a newer version");
    }
    if header != identity.encode() {
        return damaged("it is of another view, or over another place");
    }
    Ok(())
}

fn encode(view: ViewId, seq: u64, entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::with_capacity((RECORD_HEAD + entries.len() * ENTRY).next_multiple_of(BLOCK));
    out.extend_from_slice(&RECORD_MAGIC);
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&seq.to_le_bytes());
    out.extend_from_slice(&(entries.len() as u64).to_le_bytes());
    out.extend_from_slice(&view.to_bytes());
    for (extent, zero) in entries {
        let len = extent.len() | if *zero { ZERO } else { 0 };
        out.extend_from_slice(&extent.offset().to_le_bytes());
        out.extend_from_slice(&len.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(BLOCK), 0);
    let crc = crc32c::crc32c(&out);
    out[4..8].copy_from_slice(&crc.to_le_bytes());
    out
}

/// A record whose checksum is right.
struct Record<'a> {
    seq: u64,
    /// Bytes that it takes.
    len: usize,
    entries: &'a [u8],
}

impl<'a> Record<'a> {
    fn parse(bytes: &'a [u8], view: ViewId) -> Option<Self> {
        let number = |at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        if bytes.get(..4)? != RECORD_MAGIC || bytes.get(24..40)? != view.to_bytes() {
            return None;
        }
        let (seq, count) = (number(8)?, usize::try_from(number(16)?).ok()?);
        let end = RECORD_HEAD.checked_add(count.checked_mul(ENTRY)?)?;
        let len = end.checked_next_multiple_of(BLOCK)?;
        let whole = bytes.get(..len)?;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&whole[..4]), &[0; 4]);
        let crc = crc32c::crc32c_append(crc, &whole[8..]);
        (whole[4..8] == crc.to_le_bytes()).then(|| Self {
            seq,
            len,
            entries: &whole[RECORD_HEAD..end],
        })
    }

    fn entries(&self, out: &mut Vec<Entry>) -> Result<(), OpenError> {
        let (entries, _) = self.entries.as_chunks::<ENTRY>();
        for entry in entries {
            let (offset, len) = entry.split_at(8);
            let number =
                |half: &[u8]| half.iter().rev().fold(0u64, |n, b| (n << 8) | u64::from(*b));
            let (offset, len) = (number(offset), number(len));
            let extent = Extent::new(offset, len & !ZERO).map_err(|_| {
                OpenError::Damaged(format!("{NAME}: record {} has an impossible range", self.seq))
            })?;
            out.push((extent, len & ZERO != 0));
        }
        Ok(())
    }
}
