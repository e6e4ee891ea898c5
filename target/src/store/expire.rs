//! Expiry: what nobody will open any more is merged into the base, and its segments go.
//!
//! Design 04 rule 5, each step durable before the next: floor in super -> newest versions up to
//! the floor into the base, by address -> base in super -> segments. Bounded work per call. After
//! a crash it goes on to at least the recorded floor. Moves `applied`.

use std::io;
use std::sync::Arc;

use farshore_changelog::SegmentId;
use farshore_extent::{CaptureOrder, Extent, ExtentSet, Lsn, SECTOR, VolumeSize, WallTime};

use super::Store;
use super::error::{ReadError, StoreError, is_full};
use super::limits::MAX_UNKNOWN;
use super::segment::{Pages, Segment, guard};
use super::view::{PointReader, Source};

/// Pieces written to the base at once, in bytes.
const PIECE: u64 = 1 << 20;

/// Why the base cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// A view is open at this place.
    ByView(Lsn),
    /// More ranges of unknown content than super can name; the source must send them again.
    ByUnknownRanges,
}

/// How far expiry came in one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpireProgress {
    /// Nothing is left to do now: as far as was asked, or held.
    pub done: bool,
    /// Oldest place that can be opened.
    pub floor: Lsn,
    /// The base holds this place.
    pub base: Lsn,
    /// Bytes written to the base by this call.
    pub written: u64,
    /// Ranges whose frames were damaged: unknown in the base from now on, never served.
    pub damaged: Vec<Extent>,
    /// Why it did not go as far as asked.
    pub held: Option<Held>,
}

/// One round under way.
pub(super) struct Expiry {
    to: Lsn,
    time: WallTime,
    order: CaptureOrder,
    size: VolumeSize,
    reader: PointReader,
    /// What the round changes, by address, and the first byte not yet merged.
    touched: ExtentSet,
    cursor: u64,
    unknown: ExtentSet,
}

impl Store {
    /// Merges the oldest part of the journal, up to `upto` at most, into the base and drops it. A
    /// bounded step each call; call again until [`ExpireProgress::done`]. Places below `upto` may
    /// be gone after the first call.
    ///
    /// # Errors
    /// [`StoreError::DiskFull`]: give space and call again. Anything else poisons the store.
    pub fn expire(&mut self, upto: Lsn) -> Result<ExpireProgress, StoreError> {
        self.check_alive()?;
        self.drop_doomed()?;
        let mut progress = ExpireProgress {
            done: false,
            floor: self.sb.floor,
            base: self.sb.base,
            written: 0,
            damaged: Vec::new(),
            held: None,
        };
        if self.expiry.is_none() {
            let (target, held) = self.target(upto);
            progress.held = held;
            if target <= self.sb.base {
                progress.done = true;
                return Ok(progress);
            }
            self.expiry = Some(self.begin_round(target)?);
        }
        let Some(mut round) = self.expiry.take() else { return Ok(progress) };
        let merged = self.merge(&mut round, &mut progress);
        match merged {
            Ok(false) => self.expiry = Some(round),
            Ok(true) if round.unknown.extents() > MAX_UNKNOWN => {
                progress.held = Some(Held::ByUnknownRanges);
                progress.done = true;
            }
            Ok(true) => self.finish_round(round)?,
            // The round begins anew at the next call: merging twice is harmless.
            Err(e @ StoreError::DiskFull { .. }) => return Err(e),
            Err(e) => return Err(self.poison(e)),
        }
        progress.floor = self.sb.floor;
        progress.base = self.sb.base;
        Ok(progress)
    }

    /// How far this round may go, and what holds it.
    fn target(&self, upto: Lsn) -> (Lsn, Option<Held>) {
        let mut target = upto.min(self.durable);
        let mut held = None;
        let oldest_pin = guard(&self.pins).values().min().copied();
        if let Some(pin) = oldest_pin.filter(|pin| *pin < target) {
            target = pin;
            held = Some(Held::ByView(pin));
        }
        let segments = self.segments_between(self.sb.base, target);
        if let Some(last) = segments.get(self.config.apply_segments.saturating_sub(1)) {
            target = target.min(last.last);
        }
        // An interrupted round may have put parts of anything up to the floor into the base.
        (target.max(self.sb.floor), held)
    }

    fn begin_round(&mut self, to: Lsn) -> Result<Expiry, StoreError> {
        if to > self.sb.floor {
            self.sb.floor = to;
            self.store_super()?;
        }
        let reader = self.journal_reader(to)?;
        let mut touched = ExtentSet::new();
        for segment in reader.segments() {
            collect(segment, &mut touched)?;
        }
        Ok(Expiry {
            to,
            time: self.time_at(to)?,
            order: self.book.at(to),
            size: reader.size(),
            reader,
            touched,
            cursor: 0,
            unknown: self.sb.unknown.clone(),
        })
    }

    /// Merges about [`super::StoreConfig::apply_step_bytes`]; true when all is merged.
    fn merge(
        &mut self,
        round: &mut Expiry,
        progress: &mut ExpireProgress,
    ) -> Result<bool, StoreError> {
        while progress.written < self.config.apply_step_bytes {
            let rest = Extent::between(round.cursor, round.size.get());
            let next = rest.and_then(|rest| round.touched.inside(rest).next());
            let Some(next) = next else { return Ok(true) };
            let end = next.end().min(next.offset() + PIECE.max(SECTOR));
            let Some(piece) = Extent::between(next.offset(), end) else { return Ok(true) };
            // Zero ranges can be huge and cost nothing: counted as one sector.
            progress.written += self.merge_piece(round, piece, &mut progress.damaged)?.max(SECTOR);
            round.cursor = piece.end();
        }
        Ok(false)
    }

    fn merge_piece(
        &mut self,
        round: &mut Expiry,
        piece: Extent,
        damaged: &mut Vec<Extent>,
    ) -> Result<u64, StoreError> {
        let mut written = 0;
        let mut run: Option<(u64, Vec<u8>)> = None;
        for (extent, source) in round.reader.resolve(piece)? {
            let data = match source {
                Source::Frame { segment, frame, skip } => {
                    bytes_of(&round.reader, segment, frame, skip, extent)?
                }
                Source::Zero => {
                    round.unknown.remove(extent);
                    written += self.flush_run(&mut run)?;
                    self.with_reserve(|store| store.base.zero(extent, store.distrust_holes))?;
                    continue;
                }
                Source::Unknown => None,
                Source::Base => continue,
            };
            let Some(data) = data else {
                if source != Source::Unknown {
                    damaged.push(extent);
                }
                round.unknown.insert(extent);
                continue;
            };
            round.unknown.remove(extent);
            match &mut run {
                Some((at, bytes)) if *at + bytes.len() as u64 == extent.offset() => {
                    bytes.extend_from_slice(&data);
                }
                _ => {
                    written += self.flush_run(&mut run)?;
                    run = Some((extent.offset(), data));
                }
            }
        }
        Ok(written + self.flush_run(&mut run)?)
    }

    fn flush_run(&mut self, run: &mut Option<(u64, Vec<u8>)>) -> Result<u64, StoreError> {
        let Some((at, bytes)) = run.take() else { return Ok(0) };
        self.with_reserve(|store| store.base.write(&bytes, at))?;
        Ok(bytes.len() as u64)
    }

    /// Runs a write to the base; on a full disk gives up the reserve and tries again.
    fn with_reserve(&mut self, write: impl Fn(&Self) -> io::Result<()>) -> Result<(), StoreError> {
        loop {
            match write(self) {
                Err(e) if is_full(&e) && self.give_up_reserve() => {}
                done => return done.map_err(|e| StoreError::io("writing base.img", e)),
            }
        }
    }

    /// Steps after the merge: base durable, super, segments.
    fn finish_round(&mut self, round: Expiry) -> Result<(), StoreError> {
        let faults = self.config.faults;
        let Expiry { to, time, order, size, mut unknown, reader, .. } = round;
        drop(reader);
        // What lies beyond the end reads as zero should the volume grow again.
        if let Some(beyond) = Extent::between(size.get(), i64::MAX as u64) {
            unknown.remove(beyond);
        }
        if faults.segments_deleted_before_base_synced {
            self.drop_segments(to)?;
        }
        match self.with_reserve(|store| store.base.cut_sums(size.get(), store.distrust_holes)) {
            Ok(()) => {}
            Err(e @ StoreError::DiskFull { .. }) => return Err(e),
            Err(e) => return Err(self.poison(e)),
        }
        if !faults.super_before_base_sync {
            self.sync_base(size)?;
        }
        self.distrust_holes = false;
        self.sb.base = to;
        self.sb.base_time = time;
        self.sb.base_order = order;
        self.sb.size = size;
        self.sb.unknown = unknown;
        self.sb.first_segment = self.first_needed(to);
        self.store_super()?;
        if faults.super_before_base_sync {
            self.sync_base(size)?;
        }
        self.book.rebase(to, time);
        self.drop_segments(to)
    }

    fn sync_base(&mut self, size: VolumeSize) -> Result<(), StoreError> {
        self.base.sync(size.get()).map_err(|e| {
            // Never StoreError::DiskFull: a sync that failed, for whatever reason, is final.
            let what = "syncing base.img and base.crc".to_owned();
            self.poison(StoreError::Io { what, source: e })
        })
    }

    /// The last segment stays whatever it holds: it says where the history has come to.
    fn first_needed(&self, base: Lsn) -> SegmentId {
        let needed = self.segments.iter().find(|s| s.last > base).map(|s| s.id());
        let open = self.open.as_ref().map(|open| open.header().segment);
        let newest = self.segments.last().map(|s| s.id());
        needed.or(open).or(newest).unwrap_or(self.next_segment)
    }

    fn drop_segments(&mut self, base: Lsn) -> Result<(), StoreError> {
        let first = self.first_needed(base);
        let gone = self.segments.iter().take_while(|s| s.id() < first).count();
        self.doomed.extend(self.segments.drain(..gone));
        self.forget_runs().map_err(|e| self.poison(e))?;
        self.drop_doomed()
    }

    /// Removes the files of segments below the base that no view reads any more.
    fn drop_doomed(&mut self) -> Result<(), StoreError> {
        if self.doomed.is_empty() {
            return Ok(());
        }
        let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut self.doomed)
            .into_iter()
            // Only this thread hands out new references, so one means no view has it. A view that
            // was opened while the segment was written shares the file alone.
            .partition(|s| Arc::strong_count(s) > 1 || Arc::strong_count(&s.file) > 1);
        self.doomed = kept;
        for segment in &gone {
            self.discard(segment)?;
        }
        if gone.is_empty() { Ok(()) } else { self.sync_dir() }
    }
}

/// The bytes of a piece, or none when the frame is damaged.
fn bytes_of(
    reader: &PointReader,
    segment: SegmentId,
    frame: u32,
    skip: usize,
    extent: Extent,
) -> Result<Option<Vec<u8>>, StoreError> {
    let len = usize::try_from(extent.len()).unwrap_or(usize::MAX);
    match reader.frame(segment, frame, extent) {
        Ok(raw) => Ok(raw.get(skip..).and_then(|rest| rest.get(..len)).map(<[u8]>::to_vec)),
        Err(ReadError::Store(e)) => Err(e),
        Err(
            ReadError::Damaged { .. }
            | ReadError::Base { .. }
            | ReadError::Unknown { .. }
            | ReadError::Outside { .. },
        ) => Ok(None),
    }
}

fn collect(segment: &Segment, touched: &mut ExtentSet) -> Result<(), StoreError> {
    let mut entries = Vec::new();
    segment.lookup(0, u64::MAX, &Pages::new(1), &mut entries)?;
    entries.iter().filter_map(|e| e.extent()).for_each(|e| touched.insert(e));
    Ok(())
}
