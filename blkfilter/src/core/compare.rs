//! Comparing instead of sending: digests in the stream, answers from the target.
//!
//! A *suspect* chunk is a dirty one whose content the target probably has. The copy loop records
//! its digest; the target compares at that number and answers. Until then the chunk is *asked*: it
//! stays dirty, and the copy loop passes over it. An equal one becomes clean. Everything else makes
//! it an ordinary dirty chunk, which is sent as data: an answer that it differs, and a write that
//! completes in it meanwhile, because that write is in no record. Answers that were lost with their
//! connection are asked for again.
//!
//! A *verify* asks the same about clean chunks. They are equal at their number or there is a
//! defect: it is reported and nothing is repaired.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use farshore_extent::{CaptureOrder, ChunkMap, ChunkSize, Extent, ExtentSet, Lsn, Seq, VolumeSize};

use super::capture::CaptureCore;
use super::command::Refused;
use super::event::{Action, CopyEnd, Now, Outcome, PoolSlot, VolumeKey};
use super::limits::Faults;
use super::volume::{Context, Volume};
use crate::control::{CompareAnswer, DescriptorBody, VerifyProgress};

/// Questions without an answer at once; about 100 bytes each. At 256 KiB a chunk they cover
/// 256 MiB, more than a disk reads in a round trip.
const MAX_QUESTIONS: usize = 1024;

/// After so many answers it is decided whether asking pays.
const WINDOW: u32 = 64;

/// When most of a window differed, so many suspect chunks are sent without being asked about; four
/// times as many after the next such window.
const UNASKED: u64 = 256;

/// Extents of differences that are kept to be shown; their bytes are counted beyond.
const MAX_SHOWN: usize = 64;

/// What is being asked about one volume.
#[derive(Debug)]
pub(super) struct Compare {
    /// Dirty chunks to ask about before they are sent.
    suspect: ChunkMap,
    /// All questions without an answer.
    questions: BTreeMap<Seq, Question>,
    /// First byte of every asked chunk, with the number of the question that counts.
    asked: BTreeMap<u64, Seq>,
    answered: u32,
    differed: u32,
    unasked: u64,
    verify: Verify,
}

#[derive(Debug, Clone, Copy)]
struct Question {
    extent: Extent,
    verify: bool,
}

/// A pass over the clean chunks.
#[derive(Debug, Default)]
struct Verify {
    running: bool,
    /// Where it looks next.
    at: u64,
    /// Chunks whose answers were lost.
    again: VecDeque<Extent>,
    /// Chunks that are being read.
    reading: usize,
    /// Questions without an answer.
    open: usize,
    checked: u64,
    differing: u64,
    shown: ExtentSet,
}

impl Compare {
    pub(super) fn new(size: VolumeSize, chunk: ChunkSize) -> Self {
        Self {
            suspect: ChunkMap::clean(size, chunk),
            questions: BTreeMap::new(),
            asked: BTreeMap::new(),
            answered: 0,
            differed: 0,
            unasked: UNASKED,
            verify: Verify::default(),
        }
    }

    pub(super) fn grow(&mut self, size: VolumeSize) {
        self.suspect.grow(size);
    }

    /// Dirty chunks that wait for an answer.
    pub(super) fn asked_chunks(&self) -> u64 {
        self.asked.len() as u64
    }

    /// Whether no more may be asked for the moment.
    pub(super) fn is_full(&self) -> bool {
        self.questions.len() >= MAX_QUESTIONS
    }

    pub(super) fn is_asked(&self, chunk: Extent) -> bool {
        self.asked.contains_key(&chunk.offset())
    }

    pub(super) fn is_suspect(&self, chunk: Extent) -> bool {
        self.suspect.touches_dirty(chunk)
    }

    /// The chunks of `extent`, which are dirty, are to be asked about.
    fn suspect(&mut self, extent: Extent, chunk: ChunkSize) {
        self.touch(extent, chunk);
        self.suspect.mark(extent);
    }

    /// Something happened in `extent` that is in no record: answers about it say nothing.
    pub(super) fn touch(&mut self, extent: Extent, chunk: ChunkSize) {
        let first = extent.offset() - extent.offset() % chunk.get();
        while let Some((&offset, _)) = self.asked.range(first..extent.end()).next() {
            self.asked.remove(&offset);
        }
    }

    /// The whole chunk was sent.
    pub(super) fn sent(&mut self, extent: Extent, chunk: ChunkSize) {
        self.touch(extent, chunk);
        extent.split_at_multiples_of(chunk.get()).for_each(|chunk| self.suspect.clear(chunk));
    }

    fn ask(&mut self, seq: Seq, extent: Extent, verify: bool) {
        self.questions.insert(seq, Question { extent, verify });
        if verify {
            self.verify.open += 1;
        } else {
            self.suspect.clear(extent);
            self.asked.insert(extent.offset(), seq);
        }
    }

    /// Nothing that was asked will be answered: everything retained was dropped.
    pub(super) fn forget(&mut self) {
        self.postpone_verify();
        self.questions.clear();
        self.asked.clear();
    }

    /// Order is lost. From here on "differs" need not be a defect, and one answer may be about
    /// several numbers: what was asked for a verify is asked again later.
    pub(super) fn postpone_verify(&mut self) {
        let verified = self.questions.values().filter(|question| question.verify);
        self.verify.again.extend(verified.map(|question| question.extent));
        self.verify.open = 0;
        self.questions.retain(|_, question| !question.verify);
    }

    /// Whether a question that is not a verify's waits for its answer.
    fn expects_differences(&self) -> bool {
        self.questions.len() > self.verify.open
    }

    fn start_verify(&mut self) {
        self.questions.retain(|_, question| !question.verify);
        let reading = self.verify.reading;
        self.verify = Verify { running: true, reading, ..Verify::default() };
    }

    /// Counts an answer. When most differed, the next suspect chunks from `at` are only sent.
    fn count(&mut self, differs: bool, mut at: u64) {
        self.answered += 1;
        self.differed += u32::from(differs);
        if self.answered < WINDOW {
            return;
        }
        if self.differed * 2 > self.answered {
            for _ in 0..self.unasked {
                let Some(chunk) = self.suspect.next_dirty(at) else { break };
                self.suspect.clear(chunk);
                at = chunk.end();
            }
            self.unasked = self.unasked.saturating_mul(4);
        } else {
            self.unasked = UNASKED;
        }
        (self.answered, self.differed) = (0, 0);
    }

    pub(super) fn verify_progress(&self, size: VolumeSize) -> VerifyProgress {
        let Verify { running, checked, differing, ref shown, .. } = self.verify;
        VerifyProgress {
            running,
            checked_bytes: checked,
            total_bytes: size.get(),
            differing_bytes: differing,
            differing: shown.iter().collect(),
        }
    }
}

impl Verify {
    fn answered(&mut self, extent: Extent, differs: bool) {
        self.checked += extent.len();
        if differs {
            self.differing += extent.len();
            if self.shown.extents() < MAX_SHOWN {
                self.shown.insert(extent);
            }
        }
    }

    fn end_if_done(&mut self, size: VolumeSize) {
        let asked = self.at >= size.get() && self.again.is_empty() && self.reading == 0;
        if asked && self.open == 0 {
            self.running = false;
        }
    }
}

impl Volume {
    /// The next clean chunk of a verify that is under way.
    pub(super) fn next_verify(&self) -> Option<Extent> {
        if !self.wants_verify() {
            return None;
        }
        let verify = &self.compare.verify;
        let end = self.size.get().min(verify.at + self.chunk.get());
        verify.again.front().copied().or_else(|| Extent::between(verify.at, end))
    }

    /// That chunk is being read, to the end that [`Self::digested`] is told.
    pub(super) fn verify_reads(&mut self, chunk: Extent) {
        let verify = &mut self.compare.verify;
        verify.reading += 1;
        if verify.again.pop_front().is_none() {
            verify.at = chunk.end();
        }
    }

    /// Whether a verify has a chunk to look at now.
    pub(super) fn wants_verify(&self) -> bool {
        let Verify { running, at, ref again, .. } = self.compare.verify;
        let more = at < self.size.get() || !again.is_empty();
        let ordered = self.order == CaptureOrder::Ordered && !self.compare.expects_differences();
        running && more && ordered
    }

    /// The end of a read for a digest.
    pub(super) fn digested(
        &mut self,
        cx: &mut Context<'_>,
        (extent, verify): (Extent, bool),
        slot: PoolSlot,
        outcome: Outcome,
    ) -> CopyEnd {
        self.ring.drop_user(slot.ticket);
        if verify {
            self.compare.verify.reading -= 1;
        }
        let Outcome::Digest { digest, zero } = outcome else {
            self.figures.backing_errors += 1;
            if verify {
                self.compare.verify.again.push_back(extent);
            }
            return CopyEnd::Failed;
        };
        let bytes = extent.len();
        let changed = self.dirty.touches_dirty(extent) == verify;
        if changed {
            // Verify: order was lost while it waited for the range; it is looked at again. Resync:
            // it was sent meanwhile.
            if verify {
                self.compare.verify.again.push_back(extent);
            }
            return CopyEnd::Compared { bytes, verify };
        }
        if zero && !verify {
            return self.copied_zeroes(cx, extent);
        }
        let seq = self.append(cx, DescriptorBody::Hash { extent, verify, digest }, None);
        self.compare.ask(seq, extent, verify);
        CopyEnd::Compared { bytes, verify }
    }

    /// Order is lost, and everything is to be compared.
    pub(super) fn suspect_all(&mut self, cx: &mut Context<'_>, reason: Cow<'static, str>) -> Seq {
        self.compare.postpone_verify();
        self.losses += u64::from(self.order == CaptureOrder::Ordered);
        self.order = CaptureOrder::CatchUp;
        self.reason = reason;
        self.catch_up_total = 0;
        let seq = self.append(cx, DescriptorBody::OrderLost, None);
        self.suspect_everything();
        seq
    }

    fn suspect_everything(&mut self) {
        let all = self.size.extent();
        self.mark_dirty(all);
        self.cold.mark(all);
        self.compare.suspect(all, self.chunk);
        self.overrun = false; // whoever wants this has another reason
        // What a verify found is compared again.
        self.compare.verify.differing = 0;
        self.compare.verify.shown = ExtentSet::default();
    }

    /// As [`Self::suspect_all`] for the chunks of a volume that attaches.
    pub(super) fn suspect_dirty(&mut self) {
        let mut at = 0;
        while let Some(chunk) = self.dirty.next_dirty(at).filter(|chunk| chunk.offset() >= at) {
            self.compare.suspect.mark(chunk);
            at = chunk.end();
        }
    }

    /// `at`: the last number given out.
    fn answer(&mut self, upto: Seq, answer: &CompareAnswer, at: Seq, faults: Faults) {
        let later = self.compare.questions.split_off(&upto.next());
        let answered = std::mem::replace(&mut self.compare.questions, later);
        let place = |extent: &Extent| (extent.offset(), extent.len());
        let sets = |all: &[Extent]| -> (ExtentSet, BTreeSet<(u64, u64)>) {
            (all.iter().copied().collect(), all.iter().map(place).collect())
        };
        let differing = match answer {
            CompareAnswer::Differing(extents) => Some(sets(extents)),
            CompareAnswer::Lost if faults.lost_answer_is_equal => Some(sets(&[])),
            CompareAnswer::Lost => None,
        };
        for (seq, Question { extent, verify }) in answered {
            // An alarm has to be about this very question; sending too much harms nobody.
            let differs = differing.as_ref().map(|(all, exact)| {
                if verify { exact.contains(&place(&extent)) } else { all.overlaps(extent) }
            });
            if verify {
                self.compare.verify.open -= 1;
                match differs {
                    Some(differs) => self.compare.verify.answered(extent, differs),
                    None => self.compare.verify.again.push_back(extent),
                }
                continue;
            }
            let counts = self.compare.asked.get(&extent.offset()) == Some(&seq);
            if !(counts || faults.touched_chunk_is_answered) {
                continue;
            }
            self.compare.asked.remove(&extent.offset());
            match differs {
                Some(false) => {
                    self.sent(extent);
                    if let Some(intent) = &mut self.intent {
                        intent.copied(extent, at, &self.dirty);
                    }
                }
                Some(true) => {}
                None => self.compare.suspect.mark(extent),
            }
            if let Some(differs) = differs {
                self.compare.count(differs, self.cursor);
            }
        }
        self.compare.verify.end_if_done(self.size);
    }
}

impl CaptureCore {
    /// The target has compared everything up to `upto`, or the answers are lost.
    ///
    /// # Errors
    /// [`Refused::NoSuchVolume`]; [`Refused::AheadOfCaptured`].
    pub fn compared(
        &mut self,
        now: Now,
        volume: VolumeKey,
        upto: Lsn,
        answer: &CompareAnswer,
        out: &mut Vec<Action>,
    ) -> Result<(), Refused> {
        let (epoch, faults) = (self.counter.epoch, self.limits.faults);
        let done = self.with_volume(now, volume, out, |v, cx| {
            let captured = v.log.captured();
            if upto > captured {
                return Err(Refused::AheadOfCaptured { asked: upto, captured });
            }
            if upto.epoch == epoch {
                v.answer(upto.seq, answer, cx.counter.last, faults);
                v.try_restore(cx);
                v.want_copy(cx);
            }
            Ok(())
        });
        self.sweep(volume, out);
        done.unwrap_or(Err(Refused::NoSuchVolume))
    }

    /// Everything is compared with the replica, and what differs is sent. Points stop until that
    /// is done.
    ///
    /// # Errors
    /// [`Refused::NoSuchVolume`].
    pub fn resync(
        &mut self,
        now: Now,
        volume: VolumeKey,
        reason: String,
        out: &mut Vec<Action>,
    ) -> Result<(), Refused> {
        self.with_volume(now, volume, out, |v, cx| {
            if v.order == CaptureOrder::Ordered {
                v.suspect_all(cx, Cow::Owned(reason));
            } else {
                v.suspect_everything();
            }
            // A crash in between must not forget it.
            if let Some(intent) = &mut v.intent {
                intent.all_dirty();
            }
            v.ask_for_intent(cx.out);
            v.want_copy(cx);
        })
        .ok_or(Refused::NoSuchVolume)
    }

    /// Starts a verify from the beginning, or ends the one under way.
    ///
    /// # Errors
    /// [`Refused::NoSuchVolume`].
    pub fn verify(
        &mut self,
        now: Now,
        volume: VolumeKey,
        start: bool,
        out: &mut Vec<Action>,
    ) -> Result<(), Refused> {
        self.with_volume(now, volume, out, |v, cx| {
            if start {
                v.compare.start_verify();
            } else {
                v.compare.verify.running = false;
            }
            v.want_copy(cx);
        })
        .ok_or(Refused::NoSuchVolume)
    }
}
