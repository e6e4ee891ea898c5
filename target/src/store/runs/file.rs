//! The file of one run: header, pages of entries by address, fences and bitmap.
//!
//! Made once, never changed. FORMAT.md gives the bytes; every block has its own checksum.

use std::sync::{Arc, Mutex, Weak};

use farshore_changelog::{
    ENTRIES_PER_PAGE, IndexEntry, MAX_ENTRY_SECTORS, PAGE_PAYLOAD, SegmentError, SegmentId,
    SourcePlace, encode_page, parse_page,
};
use farshore_extent::{Chain, Lsn, VolumeId};

use crate::store::disk::{ALIGN, DiskFile};
use crate::store::error::StoreError;
use crate::store::segment::{Pages, guard};
use crate::store::superblock::Cursor;

const MAGIC: [u8; 8] = *b"FARSHRUN";
const VERSION: u16 = 1;
const CRC_AT: usize = ALIGN - 4;
/// Pages of a run have these kinds, with the level in the low bits.
const KIND_ENTRIES: u8 = 0x10;
const KIND_HEAD: u8 = 0x20;
/// Bits that say which parts of the volume a run touches: one page of them.
const BITMAP: usize = PAGE_PAYLOAD;
/// Pages are written together, in bytes.
const WRITE: usize = 256 << 10;
/// Written and not synced at most, in bytes, so that the last sync is short.
const SYNC: usize = 4 << 20;

/// Which segments a run is the index of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RunHeader {
    pub(crate) volume: VolumeId,
    /// 1 and up.
    pub(crate) level: u8,
    /// It covers every segment with a number in `[first, end)`.
    pub(crate) first: SegmentId,
    pub(crate) end: SegmentId,
    /// The newest of them, its last place, and the chain there.
    pub(crate) newest: SegmentId,
    pub(crate) last: Lsn,
    pub(crate) chain: Chain,
    pub(crate) entries: u64,
    /// Sectors that a bit of the bitmap stands for.
    pub(crate) granule: u64,
}

impl RunHeader {
    /// Name of its file.
    pub(crate) fn file_name(&self) -> String {
        format!("{PREFIX}{:02x}-{}", self.level, self.first)
    }

    fn pages(&self) -> usize {
        usize::try_from(self.entries.div_ceil(ENTRIES_PER_PAGE as u64)).unwrap_or(usize::MAX)
    }

    fn head_len(&self) -> usize {
        BITMAP + self.pages() * 8
    }

    /// Bytes of its file.
    pub(crate) fn file_len(&self) -> u64 {
        ((1 + self.pages() + self.head_len().div_ceil(PAGE_PAYLOAD)) * ALIGN) as u64
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(ALIGN);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[self.level, 0, 0, 0, 0, 0]);
        out.extend_from_slice(&self.volume.to_bytes());
        let last = [self.last.epoch.get(), self.last.seq.get()];
        let ids = [self.first.get(), self.end.get(), self.newest.get()];
        for field in ids.into_iter().chain(last).chain([self.entries, self.granule]) {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(&self.chain.to_bytes());
        out.resize(CRC_AT, 0);
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    fn parse(bytes: &[u8; ALIGN]) -> Option<Self> {
        let mut at = Cursor::new(bytes);
        if at.take() != MAGIC || at.u16() != VERSION {
            return None;
        }
        let crc = u32::from_le_bytes(*bytes.last_chunk()?);
        let [level, ..] = at.take::<6>();
        let volume = VolumeId::from_bytes(at.take());
        let mut id = || SegmentId::new(at.u64());
        let (first, end, newest) = (id(), id(), id());
        let last = at.lsn();
        let (entries, granule) = (at.u64(), at.u64());
        let chain = Chain::from_bytes(at.take());
        let possible = crc == crc32c::crc32c(&bytes[..CRC_AT])
            && (1..KIND_ENTRIES).contains(&level)
            && (first..end).contains(&newest)
            && end.get() - first.get() <= MAX_SEGMENTS
            && entries < 1 << 40
            && granule > 0;
        let header = Self { volume, level, first, end, newest, last, chain, entries, granule };
        possible.then_some(header)
    }
}

/// Files of runs begin so.
pub(crate) const PREFIX: &str = "run-";

/// Most segments of a run: an entry counts them in 16 bits.
pub(crate) const MAX_SEGMENTS: u64 = 1 << 16;

/// An entry and the segment whose frames it speaks of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RunEntry {
    pub(crate) segment: SegmentId,
    pub(crate) entry: IndexEntry,
}

impl RunEntry {
    /// What is left of it from sector `at` on.
    pub(crate) fn starting_at(self, at: u64) -> Self {
        let IndexEntry { sector, place, .. } = self.entry;
        let place = place.advanced(at - sector);
        Self { entry: IndexEntry { sector: at, sectors: self.entry.end() - at, place }, ..self }
    }

    /// What is left of it up to sector `end`.
    pub(crate) fn upto(self, end: u64) -> Self {
        Self { entry: IndexEntry { sectors: end - self.entry.sector, ..self.entry }, ..self }
    }

    fn is_continued_by(&self, next: &Self) -> bool {
        let IndexEntry { sectors, place, .. } = self.entry;
        self.segment == next.segment
            && self.entry.end() == next.entry.sector
            && sectors + next.entry.sectors <= MAX_ENTRY_SECTORS
            && place.continues(sectors, next.entry.place)
    }

    /// As an entry of a segment's run, with the segment in the two reserved bytes.
    fn to_bytes(self, first: SegmentId) -> [u8; 16] {
        let mut out = self.entry.to_bytes();
        let number = self.segment.get().saturating_sub(first.get());
        out[14..].copy_from_slice(&u16::try_from(number).unwrap_or(u16::MAX).to_le_bytes());
        out
    }

    fn from_bytes(bytes: &[u8; 16], header: &RunHeader) -> Option<Self> {
        let mut plain = *bytes;
        let number = u16::from_le_bytes([bytes[14], bytes[15]]);
        plain[14..].fill(0);
        let segment = SegmentId::new(header.first.get() + u64::from(number));
        (segment <= header.newest)
            .then_some(Self { segment, entry: IndexEntry::from_bytes(&plain)? })
    }
}

/// Writes a run, entry by entry.
pub(crate) struct RunWriter {
    file: Arc<dyn DiskFile>,
    header: RunHeader,
    /// Waits for a neighbour that it can be joined with.
    held: Option<RunEntry>,
    page: Vec<u8>,
    fences: Vec<u8>,
    touched: Vec<u8>,
    /// Pages that wait to be written at `at`.
    pages: Vec<u8>,
    at: u64,
    unsynced: usize,
}

impl RunWriter {
    /// `header` without the number of entries; `sectors` of the volume bound their addresses.
    pub(crate) fn new(file: Arc<dyn DiskFile>, mut header: RunHeader, sectors: u64) -> Self {
        header.entries = 0;
        header.granule = sectors.div_ceil(BITMAP as u64 * 8).max(1);
        Self {
            file,
            header,
            held: None,
            page: Vec::with_capacity(PAGE_PAYLOAD),
            fences: Vec::new(),
            touched: vec![0; BITMAP],
            pages: Vec::with_capacity(WRITE + ALIGN),
            at: ALIGN as u64,
            unsynced: 0,
        }
    }

    pub(crate) const fn header(&self) -> &RunHeader {
        &self.header
    }

    /// The next entry by address.
    pub(crate) fn push(&mut self, next: RunEntry) -> Result<(), StoreError> {
        match &mut self.held {
            Some(held) if held.is_continued_by(&next) => {
                held.entry.sectors += next.entry.sectors;
                Ok(())
            }
            held => match held.replace(next) {
                Some(done) => self.put(done),
                None => Ok(()),
            },
        }
    }

    fn put(&mut self, run_entry: RunEntry) -> Result<(), StoreError> {
        let IndexEntry { sector, .. } = run_entry.entry;
        if self.page.is_empty() {
            self.fences.extend_from_slice(&sector.to_le_bytes());
        }
        self.page.extend_from_slice(&run_entry.to_bytes(self.header.first));
        let last = bit(run_entry.entry.end() - 1, self.header.granule);
        for n in bit(sector, self.header.granule)..=last {
            self.touched[n / 8] |= 1 << (n % 8);
        }
        self.header.entries += 1;
        if self.page.len() == ENTRIES_PER_PAGE * 16 { self.end_page() } else { Ok(()) }
    }

    fn end_page(&mut self) -> Result<(), StoreError> {
        if self.page.is_empty() {
            return Ok(());
        }
        let index = self.header.pages() - 1;
        let kind = KIND_ENTRIES | self.header.level;
        self.pages.extend_from_slice(&encode_page(kind, self.header.first, index, &self.page));
        self.page.clear();
        if self.pages.len() >= WRITE { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> Result<(), StoreError> {
        let failed = |e| StoreError::io(format!("writing {}", self.header.file_name()), e);
        self.file.write_at(&self.pages, self.at).map_err(failed)?;
        self.at += self.pages.len() as u64;
        self.unsynced += self.pages.len();
        self.pages.clear();
        if self.unsynced >= SYNC {
            self.file.sync().map_err(failed)?;
            self.unsynced = 0;
        }
        Ok(())
    }

    /// Writes what is left. It is durable when this returns.
    pub(crate) fn finish(mut self) -> Result<Run, StoreError> {
        if let Some(held) = self.held.take() {
            self.put(held)?;
        }
        self.end_page()?;
        let mut head = std::mem::take(&mut self.touched);
        head.append(&mut self.fences);
        for (index, payload) in head.chunks(PAGE_PAYLOAD).enumerate() {
            let kind = KIND_HEAD | self.header.level;
            self.pages.extend_from_slice(&encode_page(kind, self.header.first, index, payload));
        }
        self.write()?;
        let end = self.file.write_at(&self.header.encode(), 0).and_then(|()| self.file.sync());
        let what = || format!("finishing {}", self.header.file_name());
        end.map_err(|e| StoreError::io(what(), e))?;
        Ok(Run::new(self.header, self.file))
    }
}

fn bit(sector: u64, granule: u64) -> usize {
    // Only a bound that was too small would lead beyond the last bit.
    usize::try_from(sector / granule).unwrap_or(usize::MAX).min(BITMAP * 8 - 1)
}

/// A run that can be read.
pub(crate) struct Run {
    pub(crate) header: RunHeader,
    file: Arc<dyn DiskFile>,
    /// Shared by all that read it now.
    head: Mutex<Weak<Head>>,
}

/// What finding an address needs.
struct Head {
    touched: Vec<u8>,
    /// First sector of each page.
    fences: Vec<u64>,
}

impl Run {
    const fn new(header: RunHeader, file: Arc<dyn DiskFile>) -> Self {
        Self { header, file, head: Mutex::new(Weak::new()) }
    }

    /// None: the file is no run of this volume, or not whole.
    pub(crate) fn open(
        file: Arc<dyn DiskFile>,
        volume: VolumeId,
    ) -> Result<Option<Self>, StoreError> {
        let mut block = [0; ALIGN];
        match file.read_at(&mut block, 0) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(e) => return Err(StoreError::io("reading a run", e)),
        }
        let header = RunHeader::parse(&block).filter(|header| header.volume == volume);
        Ok(header.map(|header| Self::new(header, file)))
    }

    pub(crate) fn pages(&self) -> usize {
        self.header.pages()
    }

    /// Page `n` of the entries.
    pub(crate) fn page(&self, n: usize) -> Result<Vec<RunEntry>, StoreError> {
        let kind = KIND_ENTRIES | self.header.level;
        let payload = self.read_page(kind, n, ((1 + n) * ALIGN) as u64)?;
        let (entries, _) = payload.as_chunks::<16>();
        let parsed: Option<Vec<_>> =
            entries.iter().map(|bytes| RunEntry::from_bytes(bytes, &self.header)).collect();
        let sorted =
            |run: &Vec<RunEntry>| run.windows(2).all(|w| w[0].entry.end() <= w[1].entry.sector);
        parsed.filter(sorted).ok_or_else(|| self.damaged(SegmentError::Field("run entry")))
    }

    fn read_page(&self, kind: u8, index: usize, place: u64) -> Result<Vec<u8>, StoreError> {
        let mut bytes = vec![0; ALIGN];
        self.file.read_at(&mut bytes, place).map_err(|e| {
            StoreError::io(format!("reading {} at {place}", self.header.file_name()), e)
        })?;
        let used = parse_page(kind, self.header.first, index, &bytes);
        let used = used.map_err(|source| self.damaged(source))?.len();
        bytes.truncate(used);
        Ok(bytes)
    }

    fn damaged(&self, source: SegmentError) -> StoreError {
        StoreError::Run { name: self.header.file_name(), source }
    }

    /// Reads what finding an address in it needs.
    pub(crate) fn opened(self: &Arc<Self>) -> Result<OpenRun, StoreError> {
        let mut shared = guard(&self.head);
        let head = match shared.upgrade() {
            Some(head) => head,
            None => Arc::new(self.read_head()?),
        };
        *shared = Arc::downgrade(&head);
        Ok(OpenRun { run: Arc::clone(self), head })
    }

    fn read_head(&self) -> Result<Head, StoreError> {
        let kind = KIND_HEAD | self.header.level;
        let mut head = Vec::with_capacity(self.header.head_len());
        for n in 0..self.header.head_len().div_ceil(PAGE_PAYLOAD) {
            let place = ((1 + self.pages() + n) * ALIGN) as u64;
            head.extend_from_slice(&self.read_page(kind, n, place)?);
        }
        if head.len() != self.header.head_len() {
            return Err(self.damaged(SegmentError::Field("head length")));
        }
        let (touched, fences) = head.split_at(BITMAP);
        let fences = fences.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        Ok(Head { touched: touched.to_vec(), fences })
    }
}

/// A run with its fences and bitmap in memory.
pub(crate) struct OpenRun {
    pub(crate) run: Arc<Run>,
    head: Arc<Head>,
}

impl OpenRun {
    /// Appends the entries that overlap `[from, to)` sectors to `out`, by address, not clipped.
    pub(crate) fn lookup(
        &self,
        from: u64,
        to: u64,
        pages: &Pages,
        out: &mut Vec<RunEntry>,
    ) -> Result<(), StoreError> {
        let granule = self.run.header.granule;
        let (first, last) = (bit(from, granule), bit(to.saturating_sub(1), granule));
        let Head { touched, fences } = self.head.as_ref();
        if !(first..=last).any(|n| touched[n / 8] & 1 << (n % 8) != 0) {
            return Ok(());
        }
        // The page before the first fence beyond `from` may reach into the range.
        let start = fences.partition_point(|fence| *fence <= from).saturating_sub(1);
        for (n, _) in (start..).zip(&fences[start..]).take_while(|(_, fence)| **fence < to) {
            let page = pages.merged(&self.run, n)?;
            let begin = page.partition_point(|e| e.entry.end() <= from);
            out.extend(page[begin..].iter().take_while(|e| e.entry.sector < to));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use farshore_extent::{Epoch, Seq};

    use super::*;

    #[test]
    fn a_header_has_the_places_that_format_md_gives() {
        let header = RunHeader {
            volume: VolumeId::from_bytes([0x22; 16]),
            level: 3,
            first: SegmentId::new(0x40),
            end: SegmentId::new(0x80),
            newest: SegmentId::new(0x7e),
            last: Lsn::new(Epoch::new(0x55), Seq::new(0x66)),
            chain: Chain::from_bytes([0x77; 32]),
            entries: 0x88,
            granule: 0x99,
        };
        let bytes: [u8; ALIGN] = header.encode().try_into().unwrap();
        assert_eq!(RunHeader::parse(&bytes), Some(header));
        let (_, text) = include_str!("../FORMAT.md").split_once("### `run`").unwrap();
        let place = |field: &str| -> usize {
            let row = text.lines().find(|l| l.contains(&format!("| `{field}` |"))).unwrap();
            row.split('|').nth(1).unwrap().trim().parse().unwrap()
        };
        let number = |field| u64::from_le_bytes(bytes[place(field)..][..8].try_into().unwrap());
        assert_eq!(bytes[place("magic")..][..8], MAGIC);
        assert_eq!((bytes[place("run_format")], bytes[place("level")]), (1, 3));
        assert_eq!(bytes[place("run_volume")..][..16], [0x22; 16]);
        assert_eq!((number("first"), number("end"), number("newest")), (0x40, 0x80, 0x7e));
        assert_eq!((number("last"), number("entries"), number("granule")), (0x55, 0x88, 0x99));
        assert_eq!(bytes[place("chain")..][..32], [0x77; 32]);
        assert_eq!(place("crc"), CRC_AT);
        for at in 0..ALIGN {
            let mut damaged = bytes;
            damaged[at] ^= 1;
            assert_eq!(RunHeader::parse(&damaged), None, "byte {at}");
        }
    }
}
