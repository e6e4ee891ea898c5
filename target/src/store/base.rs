//! The base image and its checksums: what rots in it is found, named, and never served.
//!
//! `base.crc` has four bytes for each sector of `base.img`: its crc32c XOR that of zeroes, so that
//! a hole means zeroes and both files are sparse. The unit is the sector because no record divides
//! one: a merge rewrites it whole or leaves it alone. So neither a merge nor its repetition after a
//! crash reads the base, and a reader never meets a sector that is being written.

use std::io;
use std::sync::{Arc, Mutex};

use farshore_extent::{Extent, ExtentSet, SECTOR};

use super::disk::{ALIGN, DiskFile, Stretch};
use super::error::{ReadError, StoreError};
use super::faults::Faults;
use super::limits::MAX_WRONG;
use super::segment::guard;
use super::segment_files::write_zeroes;

pub(crate) const IMAGE: &str = "base.img";
pub(crate) const SUMS: &str = "base.crc";

/// Checksums of everything, however the volume grows: what it grows by is zeroes.
pub(crate) const ALL: u64 = u64::MAX;

/// Bytes of a checksum.
const SUM: u64 = 4;

/// crc32c of a sector of zeroes.
const OF_ZEROES: u32 = 0x30fc_edc0;

/// Smaller zero ranges are written, larger ones punched: a punch costs 2-6 ms.
const PUNCH_FROM: u64 = 1 << 20;

/// Checksums looked at together where the image has a hole and they are not one: 2 MiB of image.
const SUMS_AT_ONCE: u64 = 4096 * SUM;

/// Both files. Shared by the store, which alone writes, and its views.
pub(crate) struct Base {
    image: Arc<dyn DiskFile>,
    sums: Arc<dyn DiskFile>,
    rot: Mutex<Rot>,
    faults: Faults,
}

/// What failed its checksum.
#[derive(Default)]
struct Rot {
    /// Since the store was opened, and not written since.
    known: ExtentSet,
    /// Not told yet.
    fresh: Vec<Extent>,
}

impl Base {
    pub(crate) fn new(
        image: Arc<dyn DiskFile>,
        sums: Arc<dyn DiskFile>,
        faults: Faults,
    ) -> Arc<Self> {
        Arc::new(Self { image, sums, rot: Mutex::default(), faults })
    }

    /// Fills `out` with the bytes from `at` on; below `summed` they are verified.
    ///
    /// # Errors
    /// [`ReadError::Base`]; the medium's.
    pub(super) fn read(&self, out: &mut [u8], at: u64, summed: u64) -> Result<(), ReadError> {
        let end = at + out.len() as u64;
        let (first, last) = (at - at % SECTOR, end.next_multiple_of(SECTOR));
        if (first, last) == (at, end) {
            return self.read_sectors(out, at, summed);
        }
        let mut whole = vec![0; index(last - first)];
        self.read_sectors(&mut whole, first, summed)?;
        let skip = index(at - first);
        out.copy_from_slice(&whole[skip..skip + out.len()]);
        Ok(())
    }

    fn read_sectors(&self, out: &mut [u8], at: u64, summed: u64) -> Result<(), ReadError> {
        let failed = |e| StoreError::io(format!("reading {IMAGE} at {at}"), e);
        read_padded(self.image.as_ref(), out, at).map_err(failed)?;
        let verified = summed.saturating_sub(at).min(out.len() as u64) / SECTOR;
        if verified == 0 || self.faults.base_not_verified {
            return Ok(());
        }
        let mut sums = vec![0; index(verified * SUM)];
        let failed = |e| StoreError::io(format!("reading {SUMS} for {IMAGE} at {at}"), e);
        read_padded(self.sums.as_ref(), &mut sums, sum_place(at)).map_err(failed)?;
        let mut bad = ExtentSet::new();
        let (sectors, sums) = (out.chunks_exact(index(SECTOR)), sums.chunks_exact(index(SUM)));
        for (n, (sector, stored)) in (0..).zip(sectors.zip(sums)) {
            if sum(sector) != stored {
                let place = at + n * SECTOR;
                Extent::between(place, place + SECTOR).into_iter().for_each(|e| bad.insert(e));
            }
        }
        let Some(extent) = bad.iter().next() else { return Ok(()) };
        self.note(&bad);
        Err(ReadError::Base { extent })
    }

    fn note(&self, bad: &ExtentSet) {
        let Rot { known, fresh } = &mut *guard(&self.rot);
        for extent in bad.iter() {
            if !known.contains(extent) {
                known.insert(extent);
                fresh.push(extent);
            }
        }
        join_if_many(known);
        if fresh.len() > MAX_WRONG {
            *fresh = known.iter().collect();
        }
    }

    /// What was found to be rotten since the last call.
    pub(super) fn take_rot(&self) -> Vec<Extent> {
        std::mem::take(&mut guard(&self.rot).fresh)
    }

    /// Hole or data at the start of `extent`. Where zeroes would be wrong it is data, whatever the
    /// file system says.
    pub(super) fn stretch(&self, extent: Extent, summed: u64) -> io::Result<Stretch> {
        let found = self.image.stretch(extent)?;
        let checked = Extent::between(extent.offset(), found.end.min(summed));
        let Some(checked) = checked.filter(|_| found.hole) else { return Ok(found) };
        let first = extent.offset() / SECTOR;
        let range = Extent::between(first * SUM, checked.end().div_ceil(SECTOR) * SUM);
        let Some(range) = range else { return Ok(found) };
        let sums = self.sums.stretch(range)?;
        let upto = |sectors: u64| ((first + sectors.max(1)) * SECTOR).min(checked.end());
        if sums.hole {
            return Ok(Stretch { hole: true, end: upto((sums.end - range.offset()) / SUM) });
        }
        let mut bytes = vec![0; index(range.len().min(SUMS_AT_ONCE))];
        read_padded(self.sums.as_ref(), &mut bytes, range.offset())?;
        let mut zeroes = bytes.chunks_exact(index(SUM)).map(|sum| sum.iter().all(|b| *b == 0));
        let hole = zeroes.next().unwrap_or(true);
        let same = 1 + zeroes.take_while(|zero| *zero == hole).count() as u64;
        Ok(Stretch { hole, end: upto(same) })
    }

    /// Writes whole sectors and their checksums; durable after [`Self::sync`].
    pub(super) fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.image.write_at(bytes, at)?;
        self.sums.write_at(&sums(bytes), sum_place(at))?;
        self.is_new(Extent::between(at, at + bytes.len() as u64));
        Ok(())
    }

    /// Makes whole sectors zero, and holes where that is worth it. `distrust_holes`: those that
    /// are there may be so in the page cache only.
    pub(super) fn zero(&self, extent: Extent, distrust_holes: bool) -> io::Result<()> {
        zero(self.image.as_ref(), extent, distrust_holes)?;
        let sums = Extent::between(sum_place(extent.offset()), sum_place(extent.end()));
        sums.map_or(Ok(()), |sums| zero(self.sums.as_ref(), sums, distrust_holes))?;
        self.is_new(Some(extent));
        Ok(())
    }

    fn is_new(&self, extent: Option<Extent>) {
        let known = &mut guard(&self.rot).known;
        extent.into_iter().for_each(|extent| known.remove(extent));
    }

    /// Checksums behind the end go: what the volume may grow by is zeroes.
    pub(super) fn cut_sums(&self, size: u64, distrust_holes: bool) -> io::Result<()> {
        let (end, len) = (sum_place(size), self.sums.len()?);
        if let Some(behind) = Extent::between(end, len)
            && !self.faults.sums_left_behind_the_end
        {
            // Written as well as cut off: a cut may leave the rest of a page.
            zero(self.sums.as_ref(), behind, distrust_holes)?;
            self.sums.set_len(end.next_multiple_of(ALIGN as u64).min(len))?;
        }
        Ok(())
    }

    /// Everything written is durable, and the image has `size` bytes.
    pub(super) fn sync(&self, size: u64) -> io::Result<()> {
        self.image.set_len(size)?;
        match self.image.sync() {
            Err(_) if self.faults.sync_retried => self.image.sync()?,
            other => other?,
        }
        self.sync_sums()
    }

    pub(super) fn sync_sums(&self) -> io::Result<()> {
        if self.faults.sums_not_synced { Ok(()) } else { self.sums.sync() }
    }

    /// Makes the checksums of a range that has none; nobody writes to it meanwhile. What cannot be
    /// read gets those of zeroes: it is not served later either.
    pub(super) fn make_sums(&self, extent: Extent) -> io::Result<()> {
        let Some(place) = Extent::between(sum_place(extent.offset()), sum_place(extent.end()))
        else {
            return Ok(());
        };
        if self.image.stretch(extent)? == (Stretch { hole: true, end: extent.end() }) {
            return zero(self.sums.as_ref(), place, false);
        }
        let mut bytes = vec![0; index(extent.len())];
        for (n, block) in (0..).zip(bytes.chunks_mut(ALIGN)) {
            let at = extent.offset() + n * ALIGN as u64;
            if read_padded(self.image.as_ref(), block, at).is_err() {
                block.fill(0);
            }
        }
        self.sums.write_at(&sums(&bytes), place.offset())
    }

    /// Where the hole at the start of `extent` ends, if there is one in the image.
    pub(super) fn hole(&self, extent: Extent) -> io::Result<Option<u64>> {
        let found = self.image.stretch(extent)?;
        Ok(found.hole.then_some(found.end))
    }
}

/// More than [`MAX_WRONG`] ranges are one.
pub(super) fn join_if_many(set: &mut ExtentSet) {
    if set.extents() > MAX_WRONG {
        let (first, last) = (set.iter().next(), set.iter().last());
        let hull = first.zip(last).and_then(|(a, b)| Extent::between(a.offset(), b.end()));
        hull.into_iter().for_each(|all| set.insert(all));
    }
}

/// Where the checksum of the sector at `at` is.
const fn sum_place(at: u64) -> u64 {
    at / SECTOR * SUM
}

fn sum(sector: &[u8]) -> [u8; 4] {
    (crc32c::crc32c(sector) ^ OF_ZEROES).to_le_bytes()
}

fn sums(bytes: &[u8]) -> Vec<u8> {
    bytes.chunks_exact(index(SECTOR)).flat_map(sum).collect()
}

/// Beyond the end of a file lie zeroes.
fn read_padded(file: &dyn DiskFile, out: &mut [u8], at: u64) -> io::Result<()> {
    match file.read_at(out, at) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            let there = file.len()?.saturating_sub(at).min(out.len() as u64);
            let (there, beyond) = out.split_at_mut(index(there));
            beyond.fill(0);
            if there.is_empty() { Ok(()) } else { file.read_at(there, at) }
        }
        other => other,
    }
}

fn zero(file: &dyn DiskFile, extent: Extent, distrust_holes: bool) -> io::Result<()> {
    let mut at = extent.offset();
    while let Some(rest) = Extent::between(at, extent.end()) {
        let here = file.stretch(rest)?;
        let end = here.end.clamp(at + 1, rest.end());
        if let Some(data) = Extent::between(at, end).filter(|_| !here.hole || distrust_holes) {
            let punched = data.len() >= PUNCH_FROM && file.punch(data).is_ok();
            if !punched {
                write_zeroes(file, data.offset(), data.end())?;
            }
        }
        at = end;
    }
    Ok(())
}

/// Lengths here are bounded by a buffer, so they fit.
fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hole_is_the_checksum_of_zeroes_and_of_nothing_likely_else() {
        assert_eq!(sum(&[0; 512]), [0; 4]);
        let mut sector = [0; 512];
        for n in 0..512 * 8 {
            sector[n / 8] = 1 << (n % 8);
            assert_ne!(sum(&sector), [0; 4]);
            sector[n / 8] = 0;
        }
    }
}
