//! Looking into a store without opening it: for `farshore journal inspect`. Never writes, takes no
//! lock; what it shows of a store in use may be a moment old.

use std::sync::Arc;

use farshore_changelog::{BatchHeader, RawBatch, Record, SegmentHeader, SegmentTrailer};

use super::disk::{ALIGN, Disk, DiskFile, FileKind};
use super::error::StoreError;
use super::segment::{file_name, id_in_name};
use super::superblock::{self, Super};

/// A segment file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InspectedSegment {
    /// Name of the file.
    pub name: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// The first block, if it is good.
    pub header: Option<SegmentHeader>,
    /// The last block, if the segment is sealed.
    pub trailer: Option<SegmentTrailer>,
    /// What is wrong with it; an open segment without a trailer is not wrong.
    pub problem: Option<String>,
}

/// A batch of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InspectedBatch {
    /// Where it begins in the file.
    pub place: u64,
    /// Its header.
    pub header: BatchHeader,
    /// Its records, in order; none when the batch is damaged.
    pub records: Vec<Record>,
    /// What is wrong with it.
    pub problem: Option<String>,
}

/// The super block and every segment, oldest first.
///
/// # Errors
/// [`StoreError`] when there is no store or the disk fails.
pub fn inspect(disk: &dyn Disk) -> Result<(Super, Vec<InspectedSegment>), StoreError> {
    let file = disk.open(superblock::NAME, FileKind::Plain).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => StoreError::NotAStore,
        _ => StoreError::io("opening super", e),
    })?;
    let (sb, _) = Super::load(file.as_ref())?;
    let names = disk.list().map_err(|e| StoreError::io("listing the store", e))?;
    let ids = names.iter().filter_map(|n| id_in_name(n)).filter(|id| *id >= sb.first_segment);
    let segments = ids.map(|id| segment(disk, file_name(id))).collect::<Result<Vec<_>, _>>()?;
    Ok((sb, segments))
}

fn segment(disk: &dyn Disk, name: String) -> Result<InspectedSegment, StoreError> {
    let failed = |e| StoreError::io(format!("reading {name}"), e);
    let file = disk.open(&name, FileKind::Plain).map_err(failed)?;
    let bytes = file.len().map_err(failed)?;
    let mut block = vec![0; ALIGN];
    let mut found =
        InspectedSegment { name: name.clone(), bytes, header: None, trailer: None, problem: None };
    if bytes < ALIGN as u64 {
        found.problem = Some("shorter than a header".into());
        return Ok(found);
    }
    file.read_at(&mut block, 0).map_err(failed)?;
    match SegmentHeader::parse(&block) {
        Err(e) => found.problem = Some(e.to_string()),
        Ok(header) => {
            found.header = Some(header);
            if header.capacity <= bytes {
                file.read_at(&mut block, header.trailer_place()).map_err(failed)?;
                found.trailer = SegmentTrailer::parse(&block, &header).ok();
            } else {
                found.problem = Some("the file is shorter than its header says".into());
            }
        }
    }
    Ok(found)
}

/// The batches of one segment file (by name), in the order in which they lie there, until the
/// first place that is none.
///
/// # Errors
/// [`StoreError`] when the file cannot be opened.
pub fn inspect_segment(
    disk: &dyn Disk,
    name: &str,
) -> Result<impl Iterator<Item = InspectedBatch> + use<>, StoreError> {
    let failed = |e| StoreError::io(format!("opening {name}"), e);
    let file = disk.open(name, FileKind::Plain).map_err(failed)?;
    let end = segment(disk, name.to_owned())?
        .trailer
        .map_or(file.len().map_err(failed)?, |trailer| trailer.footer_place());
    let mut at = ALIGN as u64;
    Ok(std::iter::from_fn(move || {
        let batch = next_batch(&file, at, end)?;
        at = (at + batch.header.total_len() as u64).next_multiple_of(ALIGN as u64);
        Some(batch)
    }))
}

fn next_batch(file: &Arc<dyn DiskFile>, place: u64, end: u64) -> Option<InspectedBatch> {
    let mut bytes = vec![0; ALIGN];
    if place + ALIGN as u64 > end {
        return None;
    }
    file.read_at(&mut bytes, place).ok()?;
    let header = BatchHeader::parse(&bytes).ok()?;
    bytes.resize(header.total_len(), 0);
    let read = file.read_at(&mut bytes, place).map_err(|e| e.to_string());
    let checked = read.and_then(|()| {
        let batch = RawBatch::parse(&bytes).and_then(RawBatch::check);
        batch.map(|b| b.records().collect()).map_err(|e| e.to_string())
    });
    let (records, problem) = match checked {
        Ok(records) => (records, None),
        Err(why) => (Vec::new(), Some(why)),
    };
    Some(InspectedBatch { place, header, records, problem })
}
