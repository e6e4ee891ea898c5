//! `farshore store check`: everything of a store read and verified, and of what is wrong said which
//! points and which ranges of the volume it spoils.

use std::path::Path;
use std::sync::Arc;

use farshore_changelog::{FooterHead, RecordBody, SegmentHeader, SegmentTrailer};
use farshore_extent::{Epoch, Extent, ExtentSet, Lsn, Seq, VolumeId, VolumeSize};
use serde::Serialize;

use super::base;
use super::disk::{ALIGN, Disk, FileKind};
use super::error::{ReadError, StoreError};
use super::offline::OfflineStore;
use super::order::behind;
use super::read_only::ReadOnlyDisk;
use super::runs::{RUN_PREFIX, Run};
use super::segment::{Segment, file_name, id_in_name};
use super::superblock::{self, Super};
use super::verify::{Flaw, SegmentCheck};

/// Findings told; more are only counted.
const MAX_FINDINGS: usize = 1000;

/// Ranges told of one finding; more are only added up.
const MAX_RANGES: usize = 64;

/// Read at once from the base, in bytes.
const PIECE: u64 = 1 << 20;

/// What a bad piece of the base is narrowed down to, in bytes.
const PAGE: u64 = ALIGN as u64;

/// Findings about the history rather than about one file.
const JOURNAL: &str = "journal";

/// Behind every place.
const END: Lsn = Lsn::new(Epoch::new(u64::MAX), Seq::new(u64::MAX));

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// In which file.
    pub file: String,
    /// At which byte of it, if it is one place.
    pub place: Option<u64>,
    /// Which check failed.
    pub what: String,
    /// Ranges of the volume that cannot be read, the first of them.
    pub ranges: Vec<Extent>,
    /// Bytes of all such ranges.
    pub range_bytes: u64,
    /// Points that cannot be opened, or in which these ranges cannot be read.
    pub points: u64,
    /// The oldest of them.
    pub first_point: Option<Lsn>,
    /// The newest of them.
    pub last_point: Option<Lsn>,
}

/// What was read, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// The volume.
    pub volume: VolumeId,
    /// Its size where the journal ends.
    pub size: VolumeSize,
    /// Oldest place that can be opened.
    pub floor: Lsn,
    /// The base holds this place.
    pub base: Lsn,
    /// The journal ends here.
    pub end: Lsn,
    /// Points that the journal knows.
    pub points: u64,
    /// Segments read.
    pub segments: u64,
    /// Batches verified.
    pub batches: u64,
    /// Frames decoded.
    pub frames: u64,
    /// Bytes read.
    pub bytes: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// Findings that are not told.
    pub more: u64,
    /// What is worth knowing and not wrong.
    pub notes: Vec<String>,
}

/// A finding whose effect goes on until its ranges are written again.
struct Wound {
    finding: Finding,
    shut: Option<(Lsn, Lsn)>,
    left: ExtentSet,
    from: Lsn,
    until: Option<Lsn>,
}

/// Reads and verifies the whole store in `dir`; changes nothing. `tell` hears how many bytes are
/// read of about how many.
///
/// # Errors
/// As for [`OfflineStore::open`]: it cannot be checked.
pub fn check(dir: &Path, tell: &mut dyn FnMut(u64, u64)) -> Result<CheckReport, StoreError> {
    let store = OfflineStore::open(dir)?;
    let disk = ReadOnlyDisk::open(dir).map_err(|e| StoreError::io("opening the store", e))?;
    let points: Vec<Lsn> = store.points().iter().map(|point| point.lsn).collect();
    let at = store.position();
    let segments = store.segments();
    let report = CheckReport {
        volume: store.volume(),
        size: at.size,
        floor: at.floor,
        base: at.base,
        end: at.durable,
        points: points.len() as u64,
        segments: segments.len() as u64,
        batches: 0,
        frames: 0,
        bytes: 0,
        findings: Vec::new(),
        more: 0,
        notes: Vec::new(),
    };
    let used = segments.iter().map(|s| s.header.capacity).sum::<u64>();
    let used = used + store.runs().map(|run| run.header.file_len()).sum::<u64>();
    let total = used + store.base_size().0;
    let largest = segments.iter().flat_map(|s| sizes(s)).fold(at.size, VolumeSize::max);
    let mut check = Check { report, points, wounds: Vec::new(), largest, total, tell };
    check.superblock(&disk);
    check.base(&store);
    for segment in segments {
        check.segment(SegmentCheck::new(segment));
    }
    store.runs().for_each(|run| check.run(run));
    check.lost(&disk, &store);
    check.notes(&disk, &store)?;
    Ok(check.finish())
}

struct Check<'a> {
    report: CheckReport,
    points: Vec<Lsn>,
    wounds: Vec<Wound>,
    /// Largest size that the volume ever had.
    largest: VolumeSize,
    total: u64,
    tell: &'a mut dyn FnMut(u64, u64),
}

impl Check<'_> {
    fn wound(&mut self, file: &str, flaw: Flaw) {
        if self.wounds.len() >= MAX_FINDINGS {
            self.report.more += 1;
            return;
        }
        let left: ExtentSet = flaw.ranges.inside(self.largest.extent()).collect();
        let finding = Finding {
            file: file.to_owned(),
            place: (file != JOURNAL).then_some(flaw.place),
            what: flaw.what,
            ranges: left.iter().take(MAX_RANGES).collect(),
            range_bytes: left.bytes(),
            points: 0,
            first_point: None,
            last_point: None,
        };
        let Flaw { shut, from, .. } = flaw;
        self.wounds.push(Wound { finding, shut, left, from, until: None });
    }

    fn read(&mut self, bytes: u64) {
        self.report.bytes += bytes;
        (self.tell)(self.report.bytes, self.total.max(self.report.bytes));
    }

    /// Every copy; the opening was content with one of each generation.
    fn superblock(&mut self, disk: &dyn Disk) {
        let Ok(file) = disk.open(superblock::NAME, FileKind::Plain) else { return };
        for place in (0..4).map(|n| n * PAGE) {
            let mut bytes = vec![0; ALIGN];
            let read = file.read_at(&mut bytes, place).map_err(|e| e.to_string());
            let parsed = read.and_then(|()| Super::parse(&bytes).map_err(|e| e.to_string()));
            if let Err(why) = parsed {
                let what = format!("one of two copies: {why}; the daemon mends it");
                self.wound(superblock::NAME, harmless(place, what));
            }
        }
        self.read(4 * PAGE);
    }

    /// Reads what is stored of the base, and compares it with its checksums.
    fn base(&mut self, store: &OfflineStore) {
        if store.report().lost_checksums {
            let what = "it is missing: what is read from the base is not verified";
            self.wound(base::SUMS, harmless(0, what.to_owned()));
        }
        let (size, summed) = store.base_size();
        // Nobody reads there, or the journal answers for it.
        let mut needless = store.unknown().clone();
        match store.half_merged() {
            Ok(touched) => touched.iter().for_each(|extent| needless.insert(extent)),
            // Its segments have findings of their own.
            Err(_) => return,
        }
        let mut at = 0;
        while let Some(rest) = Extent::between(at, size) {
            let here = store.base().stretch(rest, summed).ok();
            at = here.map_or(rest.end(), |here| here.end.max(at + 1)).min(size);
            let data = Extent::between(rest.offset(), at).filter(|_| here.is_none_or(|h| !h.hole));
            for piece in data.into_iter().flat_map(|data| data.split_at_multiples_of(PIECE)) {
                self.read(piece.len());
                self.base_piece(store, piece, &needless);
            }
        }
    }

    fn base_piece(&mut self, store: &OfflineStore, piece: Extent, needless: &ExtentSet) {
        let (base, (_, summed)) = (store.base(), store.base_size());
        let mut bytes = vec![0; usize::try_from(piece.len()).unwrap_or(0)];
        let mut at = piece.offset();
        while let Some(rest) = Extent::between(at, piece.end()) {
            let len = usize::try_from(rest.len()).unwrap_or(0);
            let Err(why) = base.read(&mut bytes[..len], at, summed) else { return };
            let bad = match &why {
                ReadError::Base { extent } => *extent,
                // The disk fails: page by page.
                _ if rest.len() <= PAGE => rest,
                _ => {
                    for page in rest.split_at_multiples_of(PAGE) {
                        self.base_piece(store, page, needless);
                    }
                    return;
                }
            };
            let what = match why {
                ReadError::Base { .. } => "its checksum does not match".to_owned(),
                other => other.to_string(),
            };
            let mut wrong = ExtentSet::from_iter([bad]);
            needless.inside(bad).for_each(|extent| wrong.remove(extent));
            wrong.iter().for_each(|extent| self.bad_base(extent, &what));
            at = bad.end();
        }
    }

    fn bad_base(&mut self, extent: Extent, why: &str) {
        // Neighbours with one reason are one finding.
        if let Some(last) = self.wounds.last_mut()
            && last.finding.file == base::IMAGE
            && last.finding.what == why
        {
            last.left.insert(extent);
            last.finding.range_bytes = last.left.bytes();
            last.finding.ranges = last.left.iter().take(MAX_RANGES).collect();
            return;
        }
        let ranges = ExtentSet::from_iter([extent]);
        let what = why.to_owned();
        // Also a record before the base hides it: its segment is read first.
        let place = extent.offset();
        self.wound(base::IMAGE, Flaw { place, what, shut: None, ranges, from: Lsn::ZERO });
    }

    fn segment(&mut self, mut check: SegmentCheck) {
        let name = file_name(check.id());
        loop {
            let wounds = &mut self.wounds;
            let mut seen = |at: Lsn, extent: Extent| {
                for wound in wounds.iter_mut().filter(|w| w.from < at && !w.left.is_empty()) {
                    wound.left.remove(extent);
                    if wound.left.is_empty() {
                        wound.until = Some(at);
                    }
                }
            };
            let more = check.step(&mut seen);
            for flaw in check.take_flaws() {
                self.wound(&name, flaw);
            }
            self.read(check.take_read());
            if !more {
                break;
            }
        }
        self.report.batches += check.batches();
        self.report.frames += check.frames();
    }

    /// An index that can be made again from those of the segments.
    fn run(&mut self, run: &Arc<Run>) {
        let name = run.header.file_name();
        let useless = |why: StoreError| format!("{why}; its segments are read instead");
        for n in 0..run.pages() {
            if let Err(why) = run.page(n) {
                self.wound(&name, harmless((n as u64 + 1) * PAGE, useless(why)));
            }
        }
        if let Err(why) = run.opened() {
            self.wound(&name, harmless((run.pages() as u64 + 1) * PAGE, useless(why)));
        }
        self.read(run.header.file_len());
    }

    /// What recovery could not go on with, and the points behind it.
    fn lost(&mut self, disk: &dyn Disk, store: &OfflineStore) {
        let damage = store.report().damage.clone();
        for found in &damage {
            let what = format!("{}; nothing behind {} can be opened", found.what, found.after);
            let mut flaw = harmless(0, what);
            flaw.shut = Some((behind(found.after), END));
            self.wound(JOURNAL, flaw);
        }
        if damage.is_empty() {
            return;
        }
        let known: Vec<_> = store.segments().iter().map(|s| s.id()).collect();
        let names = disk.list().unwrap_or_default();
        let behind = names.iter().filter_map(|name| id_in_name(name));
        let behind = behind.filter(|id| known.last().is_none_or(|last| id > last));
        for id in behind {
            self.points.extend(points_of(disk, &file_name(id)).unwrap_or_default());
        }
    }

    fn notes(&mut self, disk: &dyn Disk, store: &OfflineStore) -> Result<(), StoreError> {
        let notes = &mut self.report.notes;
        let report = store.report();
        if let Some(at) = report.torn_tail {
            notes.push(format!(
                "behind {at} a write was cut off; nothing acknowledged was in it, the daemon cuts it"
            ));
        }
        if report.apply_pending {
            notes.push("merging into the base was interrupted; the daemon goes on with it".into());
        }
        let left = store.unverified_bytes();
        if left > 0 {
            notes.push(format!("{left} bytes of the base have no checksums yet"));
        }
        let unknown = store.unknown();
        if !unknown.is_empty() {
            let (bytes, count) = (unknown.bytes(), unknown.extents());
            notes.push(format!(
                "the content of {bytes} bytes in {count} ranges of the base is unknown"
            ));
        }
        let names = disk.list().map_err(|e| StoreError::io("listing the store", e))?;
        for name in names {
            if name.starts_with("lost-") {
                notes.push(format!("{name} was put aside by recovery and is never read"));
            } else if name.starts_with(RUN_PREFIX)
                && !store.runs().any(|run| run.header.file_name() == name)
            {
                notes
                    .push(format!("{name} is not an index of this journal; the daemon removes it"));
            }
        }
        Ok(())
    }

    fn finish(mut self) -> CheckReport {
        self.points.sort_unstable();
        self.points.dedup();
        for Wound { mut finding, shut, from, until, .. } in self.wounds {
            let has_ranges = finding.range_bytes > 0;
            let hit = |at: &&Lsn| {
                let spoilt = has_ranges && **at >= from && until.is_none_or(|until| **at < until);
                spoilt || shut.is_some_and(|(first, last)| (first..last).contains(*at))
            };
            let hits: Vec<Lsn> = self.points.iter().filter(hit).copied().collect();
            finding.points = hits.len() as u64;
            (finding.first_point, finding.last_point) =
                (hits.first().copied(), hits.last().copied());
            self.report.findings.push(finding);
        }
        self.report
    }
}

/// Sizes that the volume had in a segment.
fn sizes(segment: &Segment) -> impl Iterator<Item = VolumeSize> {
    // A footer that cannot be read is a finding of its own.
    let events = segment.events().unwrap_or_default().into_iter();
    let resized = events.filter_map(|event| match event.record.body {
        RecordBody::Resize(size) => Some(size),
        RecordBody::EpochStart(start) => Some(start.size),
        _ => None,
    });
    resized.chain([segment.header.size, segment.size])
}

fn harmless(place: u64, what: String) -> Flaw {
    Flaw { place, what, shut: None, ranges: ExtentSet::new(), from: Lsn::ZERO }
}

/// Committed markers of a sealed segment that the history does not reach.
fn points_of(disk: &dyn Disk, name: &str) -> Option<Vec<Lsn>> {
    let file = disk.open(name, FileKind::Journal).ok()?;
    let mut block = vec![0; ALIGN];
    file.read_at(&mut block, 0).ok()?;
    let header = SegmentHeader::parse(&block).ok()?;
    file.read_at(&mut block, header.trailer_place()).ok()?;
    let trailer = SegmentTrailer::parse(&block, &header).ok()?;
    let mut head = vec![0; trailer.head_pages() * ALIGN];
    file.read_at(&mut head, trailer.footer_place()).ok()?;
    let head = FooterHead::parse(&trailer, &head).ok()?;
    let is_point = |body: &RecordBody| match body {
        RecordBody::Marker(marker) => marker.state == farshore_changelog::MarkerState::Committed,
        _ => false,
    };
    Some(head.events.iter().filter(|e| is_point(&e.record.body)).map(|e| e.lsn()).collect())
}
