//! The life of segment files: prewritten, begun, sealed, recycled.

use std::sync::Arc;

use farshore_changelog::{FooterHead, SegmentHeader, SegmentIndexBuilder};
use farshore_extent::Lsn;

use super::disk::{ALIGN, AlignedBuf, Disk, DiskFile, FileKind};
use super::error::StoreError;
use super::limits::MAX_SPARES;
use super::segment::{Index, Segment, file_name};
use super::{OpenSegment, Store};

const SPARE: &str = "spare-";

/// Zeroes are written in pieces of this many bytes.
const ZERO_PIECE: usize = 1 << 20;

/// Whether a file is a prewritten segment.
pub(crate) fn is_spare(name: &str) -> bool {
    name.starts_with(SPARE)
}

/// Fills `[from, to)` with zeroes; not durable.
pub(crate) fn write_zeroes(file: &dyn DiskFile, from: u64, to: u64) -> std::io::Result<()> {
    let longest = to.saturating_sub(from).min(ZERO_PIECE as u64);
    let zeroes = vec![0; usize::try_from(longest).unwrap_or(0)];
    let mut at = from;
    while at < to {
        let len = (to - at).min(longest);
        file.write_at(&zeroes[..usize::try_from(len).unwrap_or(0)], at)?;
        at += len;
    }
    Ok(())
}

impl Store {
    /// Prepares files ahead of need: the reserve, and one for the next segment, so that a commit
    /// does not wait for 64 MiB of zeroes. Call when there is time; does one file at a time and
    /// says whether there is more to do.
    ///
    /// # Errors
    /// [`StoreError`]; a full disk is none: there is then less in reserve.
    pub fn prepare_reserve(&mut self) -> Result<bool, StoreError> {
        self.check_alive()?;
        if self.spares.len() > self.config.reserve_segments {
            return Ok(false);
        }
        match self.prewrite(self.config.segment_bytes) {
            Ok(name) => self.spares.push(name),
            Err(StoreError::DiskFull { .. }) => return Ok(false),
            Err(e) => return Err(self.poison(e)),
        }
        Ok(self.spares.len() <= self.config.reserve_segments)
    }

    /// Begins the next segment behind what is durable, large enough for the first waiting batch.
    pub(super) fn begin_segment(&mut self) -> Result<(), StoreError> {
        let Some(first) = self.pending.first() else { return Ok(()) };
        let id = self.next_segment;
        let mut header = SegmentHeader {
            volume: self.sb.volume,
            generation: self.sb.generation,
            epoch: first.header.epoch,
            segment: id,
            prev: self.durable,
            prev_chain: self.chain,
            created: first.header.first_time,
            capacity: self.config.segment_bytes,
            size: self.position().size,
            blocks: self.sb.blocks,
            order: self.book.current(),
        };
        let batch = first.header.total_len().next_multiple_of(ALIGN);
        let footer = SegmentIndexBuilder::new(header).footer_bound([&first.header].into_iter());
        header.capacity = header.capacity.max((ALIGN + batch + footer) as u64);
        let file = self.place_segment(&header)?;
        self.next_segment = id.next();
        self.open = Some(OpenSegment { file, builder: SegmentIndexBuilder::new(header) });
        Ok(())
    }

    /// Header durable under another name first, so that a file with a segment's name always has
    /// its header.
    fn place_segment(&mut self, header: &SegmentHeader) -> Result<Arc<dyn DiskFile>, StoreError> {
        let name = self.take_spare(header.capacity)?;
        let to = file_name(header.segment);
        let named = |e| StoreError::io(format!("beginning {to}"), e);
        let began = self.disk.open(&name, FileKind::Journal).and_then(|file| {
            let mut block = AlignedBuf::with_capacity(ALIGN);
            block.push_padded(&header.encode());
            file.write_durable(block.as_slice(), 0)?;
            self.disk.rename(&name, &to)?;
            Ok(file)
        });
        let file = began.map_err(named).map_err(|e| self.poison(e))?;
        self.sync_dir()?;
        Ok(file)
    }

    /// A prewritten file of exactly `capacity` bytes. The reserve is never touched: it is for
    /// expiry on a full disk.
    fn take_spare(&mut self, capacity: u64) -> Result<String, StoreError> {
        let fits = |disk: &dyn Disk, name: &str| {
            let len = disk.open(name, FileKind::Journal).and_then(|f| f.len());
            len.is_ok_and(|len| len == capacity)
        };
        if self.spares.len() > self.config.reserve_segments
            && let Some(n) = self.spares.iter().position(|name| fits(self.disk.as_ref(), name))
        {
            return Ok(self.spares.remove(n));
        }
        self.prewrite(capacity).map_err(|e| match e {
            full @ StoreError::DiskFull { .. } => full,
            other => self.poison(other),
        })
    }

    /// Writes a new file full of zeroes: syncs of prewritten files cost a third.
    fn prewrite(&mut self, capacity: u64) -> Result<String, StoreError> {
        self.spare_count += 1;
        let name = format!("{SPARE}{:016x}", self.spare_count);
        let made = self.disk.create(&name, FileKind::Journal).and_then(|file| {
            write_zeroes(file.as_ref(), 0, capacity)?;
            file.sync()
        });
        match made {
            Ok(()) => Ok(name),
            Err(e) => {
                // Nothing depends on the file yet.
                let _ = self.disk.delete(&name);
                Err(StoreError::io("a new journal segment", e))
            }
        }
    }

    /// Gives the reserve back to a full disk so that expiry can go on (design 04 rule 8).
    pub(super) fn give_up_reserve(&mut self) -> bool {
        let Some(name) = self.spares.pop() else { return false };
        self.disk.delete(&name).is_ok()
    }

    /// Writes footer and trailer of the open segment; it is never written again.
    pub(super) fn seal(&mut self) -> Result<(), StoreError> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let footer = open.builder.finish();
        let header = *open.header();
        let failed = |e| StoreError::io(format!("sealing {}", file_name(header.segment)), e);
        let write = |bytes: &[u8], at| {
            let mut buf = AlignedBuf::with_capacity(bytes.len());
            buf.push_padded(bytes);
            open.file.write_durable(buf.as_slice(), at)
        };
        // The trailer promises the pages, so the pages must be durable first.
        let written = write(&footer.pages, footer.trailer.footer_place())
            .and_then(|()| write(&footer.trailer.encode(), header.trailer_place()));
        if let Err(e) = written {
            return Err(self.poison(failed(e)));
        }
        let head = FooterHead::parse(&footer.trailer, &footer.pages)
            .map_err(|source| StoreError::Segment { segment: header.segment, source });
        let head = head.map_err(|e| self.poison(e))?;
        self.segments.push(Arc::new(Segment::sealed(
            header,
            footer.trailer,
            head.fences,
            open.file,
        )));
        self.wake_merge();
        Ok(())
    }

    /// Removes the file of a segment that nothing needs, or keeps it as a spare. The directory is
    /// not synced.
    pub(super) fn discard(&mut self, segment: &Segment) -> Result<(), StoreError> {
        let name = file_name(segment.id());
        // A segment that was given up may hold batches nobody has read: not to be used again.
        let sealed = matches!(segment.index, Index::Footer { .. });
        let usual = segment.header.capacity == self.config.segment_bytes;
        let done = if sealed && usual && self.spares.len() < MAX_SPARES {
            self.spare_count += 1;
            let spare = format!("{SPARE}{:016x}", self.spare_count);
            self.disk.rename(&name, &spare).map(|()| self.spares.push(spare))
        } else {
            self.disk.delete(&name)
        };
        let failed = |e| StoreError::io(format!("removing {name}"), e);
        done.map_err(failed).map_err(|e| self.poison(e))
    }

    /// All segments, oldest first, the open one as it is now.
    pub(super) fn all_segments(&self) -> Vec<Arc<Segment>> {
        let open = self
            .open
            .as_ref()
            .map(|open| Arc::new(Segment::in_memory(&open.builder, Arc::clone(&open.file))));
        self.segments.iter().cloned().chain(open).collect()
    }

    /// Segments that hold places in `(after, upto]`, oldest first.
    pub(super) fn segments_between(&self, after: Lsn, upto: Lsn) -> Vec<Arc<Segment>> {
        let from = self.segments.partition_point(|s| s.last <= after);
        let sealed = self.segments[from..].iter().take_while(|s| s.header.prev < upto);
        let mut segments: Vec<_> = sealed.cloned().collect();
        if let Some(open) = &self.open
            && open.builder.last() > after
            && open.header().prev < upto
        {
            segments.push(Arc::new(Segment::in_memory(&open.builder, Arc::clone(&open.file))));
        }
        segments
    }
}
