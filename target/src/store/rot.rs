//! What is done about rot: checksums for a base that came without them, and telling what was found.

use farshore_extent::{Extent, ExtentSet, SECTOR};

use super::Store;
use super::base::{self, join_if_many};
use super::error::StoreError;
use super::view::Source;

impl Store {
    /// Makes the checksums of a base that has none yet (an image from elsewhere, or one of an older
    /// version), about `bytes` of it at a time. False: there is nothing to do now.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`]: give space and call again. Anything else poisons the store.
    pub fn make_sums(&mut self, bytes: u64) -> Result<bool, StoreError> {
        self.check_alive()?;
        // While a merge is not finished, nobody knows what the base holds.
        let merging = self.expiry.is_some() || self.sb.floor > self.sb.base;
        if merging || self.sb.summed == base::ALL {
            return Ok(false);
        }
        let size = self.sb.size.get();
        let from = self.summing.max(self.sb.summed);
        let upto = match Extent::between(from, size) {
            None => from,
            Some(rest) => self.sum_next(rest, bytes.next_multiple_of(SECTOR).max(SECTOR))?,
        };
        self.summing = upto;
        if upto >= size || upto - self.sb.summed >= self.config.apply_step_bytes {
            let synced = self.base.sync_sums();
            synced.map_err(|source| {
                self.poison(StoreError::Io { what: "syncing base.crc".to_owned(), source })
            })?;
            self.sb.summed = if upto >= size { base::ALL } else { upto };
            self.store_super()?;
        }
        Ok(true)
    }

    /// Makes checksums at the start of `rest`: of a hole, or about `bytes`. Returns their end.
    fn sum_next(&mut self, rest: Extent, bytes: u64) -> Result<u64, StoreError> {
        let made = self.base.hole(rest).and_then(|hole| {
            let some = rest.end().min(rest.offset() + bytes);
            let end = hole.filter(|end| end.is_multiple_of(SECTOR)).unwrap_or(some);
            let extent = Extent::between(rest.offset(), end);
            extent.map_or(Ok(()), |extent| self.base.make_sums(extent))?;
            Ok(end)
        });
        made.map_err(|e| match StoreError::io("writing base.crc", e) {
            full @ StoreError::DiskFull { .. } => full,
            other => self.poison(other),
        })
    }

    /// Bytes of the base, from its start, that have checksums; `u64::MAX`: all.
    #[must_use]
    pub const fn summed(&self) -> u64 {
        self.sb.summed
    }

    /// Ranges of the base that failed their checksum since the last call, whoever read them. What
    /// the newest state shows of them is from now on [`Self::rotten`].
    pub fn take_rot(&mut self) -> Vec<Extent> {
        let found = self.base.take_rot();
        if !found.is_empty() {
            let newest = self.reader(self.durable, None);
            let shown = |extent: &Extent| match newest.as_ref().map(|view| view.resolve(*extent)) {
                Ok(Ok(pieces)) => {
                    let of_base = pieces.into_iter().filter(|(_, from)| *from == Source::Base);
                    of_base.map(|(piece, _)| piece).collect()
                }
                // It cannot be told: then all of it.
                Ok(Err(_)) | Err(_) => vec![*extent],
            };
            let shown: ExtentSet = found.iter().flat_map(shown).collect();
            let rotten = self.comparer.rotten_mut();
            shown.iter().for_each(|extent| rotten.insert(extent));
            join_if_many(rotten);
        }
        found
    }
}
