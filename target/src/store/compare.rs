//! Digests of the source, compared with the content here at their number.
//!
//! Every commit that made `Hash` records durable leaves a [`Round`]: its questions, and a reader
//! of the state behind it that pins what the questions need. They are answered in order and in
//! bounded steps, exactly for the content at their number, also where the order of writes is lost
//! and no point can be opened. An answer never turns an unequal extent into an equal one: what
//! cannot be read, and what is known to be unknown, differs.

use std::collections::VecDeque;

use farshore_changelog::{CheckedBatch, HashPurpose, Record, RecordBody};
use farshore_extent::{Extent, ExtentSet, Lsn, VolumeSize};

use super::Store;
use super::base::join_if_many;
use super::error::{ReadError, StoreError};
use super::limits::{COMPARE_PIECE, MAX_DIFFERING, MAX_ROUNDS};
use super::view::{Pin, PointReader};

/// What was found out about the digests since the last answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Compared {
    /// Every digest up to here is answered.
    pub upto: Lsn,
    /// How many these are.
    pub digests: u64,
    /// Extents of those that differ, in order; the others are equal. At most
    /// [`super::limits::MAX_DIFFERING`].
    pub differing: Vec<Extent>,
    /// What verification found; the extents are among `differing`.
    pub defects: Vec<Defect>,
}

/// A digest made for verification that is not that of the content here: one of the two sides lost
/// or changed something unseen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defect {
    /// The number at which both were compared.
    pub at: Lsn,
    /// Where.
    pub extent: Extent,
    /// Why the content here could not be read; none: it was, and it is another one.
    pub unreadable: Option<String>,
}

/// One digest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Question {
    at: Lsn,
    extent: Extent,
    purpose: HashPurpose,
    digest: [u8; 32],
    /// A later record of the same commit may have changed the extent.
    overtaken: bool,
}

/// The questions of one commit, in order.
struct Round {
    /// Last place of the commit.
    upto: Lsn,
    /// The state there; none when it could not be opened.
    reader: Option<PointReader>,
    questions: VecDeque<Question>,
}

/// The front question, half read.
#[derive(Default)]
struct Reading {
    /// For an overtaken question: the state at its own number.
    exact: Option<PointReader>,
    hasher: blake3::Hasher,
    done: u64,
}

/// Questions that wait, and what the answers say.
#[derive(Default)]
pub(super) struct Comparer {
    rounds: VecDeque<Round>,
    reading: Option<Reading>,
    /// Answered, and not given out yet.
    answer: Compared,
    /// More digests have the number of the last one answered: an answer would divide it.
    inside_number: bool,
    /// What verification found to be wrong and nothing has put right since.
    wrong: ExtentSet,
    /// What the newest state shows of the parts of the base that rotted.
    rotten: ExtentSet,
    buffer: Vec<u8>,
}

enum Verdict {
    Equal,
    Differs,
    /// The source said itself that it does not know the content.
    Unknown,
    Unreadable(String),
}

/// Whether a batch asks something.
pub(super) fn asks(body: &RecordBody) -> bool {
    matches!(body, RecordBody::Hash { .. })
}

/// The questions of the batches of one commit, in order.
pub(super) fn questions(batches: &[CheckedBatch<'_>]) -> VecDeque<Question> {
    let (mut found, mut touched, mut resized) = (VecDeque::new(), ExtentSet::new(), false);
    for batch in batches.iter().rev() {
        let records: Vec<Record> = batch.records().collect();
        for record in records.into_iter().rev() {
            let at = Lsn::new(batch.header().epoch, record.seq);
            match record.body {
                RecordBody::Hash { extent, purpose, digest } => {
                    let overtaken = resized || touched.overlaps(extent);
                    found.push_front(Question { at, extent, purpose, digest, overtaken });
                }
                body if resize_of(&body).is_some() => resized = true,
                body => body.extent().into_iter().for_each(|extent| touched.insert(extent)),
            }
        }
    }
    found
}

const fn resize_of(body: &RecordBody) -> Option<VolumeSize> {
    match body {
        RecordBody::Resize(size) => Some(*size),
        RecordBody::EpochStart(start) => Some(start.size),
        _ => None,
    }
}

impl Comparer {
    pub(super) fn has_wrong(&self) -> bool {
        !self.wrong.is_empty() || !self.rotten.is_empty()
    }

    pub(super) const fn rotten_mut(&mut self) -> &mut ExtentSet {
        &mut self.rotten
    }

    fn is_right(&mut self, extent: Extent) {
        self.wrong.remove(extent);
        self.rotten.remove(extent);
    }

    /// What a durable batch writes anew is no longer known to be wrong.
    pub(super) fn repaired_by(&mut self, batch: &CheckedBatch<'_>) {
        for record in batch.records() {
            match record.body {
                RecordBody::Write { extent, .. }
                | RecordBody::Copy { extent, .. }
                | RecordBody::Zero { extent, .. } => self.is_right(extent),
                body => {
                    let gone = resize_of(&body)
                        .and_then(|size| Extent::between(size.get(), i64::MAX as u64));
                    gone.into_iter().for_each(|gone| self.is_right(gone));
                }
            }
        }
    }

    fn front(&self) -> Option<Question> {
        self.rounds.front().and_then(|round| round.questions.front()).copied()
    }

    /// Takes away the front question, which is answered.
    fn next(&mut self) {
        let Some(round) = self.rounds.front_mut() else { return };
        let Some(answered) = round.questions.pop_front() else { return };
        match round.questions.front() {
            Some(next) => {
                self.inside_number = next.at == answered.at;
                self.answer.upto = answered.at;
            }
            None => {
                self.inside_number = false;
                self.answer.upto = round.upto;
                self.rounds.pop_front();
            }
        }
    }

    fn has_reader(&self) -> bool {
        self.rounds.front().is_some_and(|round| round.reader.is_some())
    }

    fn read(&self, reading: &Reading, buf: &mut [u8], at: u64) -> Result<(), ReadError> {
        let shared = self.rounds.front().and_then(|round| round.reader.as_ref());
        match reading.exact.as_ref().or(shared) {
            Some(reader) => reader.read_at(buf, at),
            None => Err(StoreError::Poisoned { first: "no reader".into() }.into()),
        }
    }

    fn is_wrong(&mut self, extent: Extent) {
        self.wrong.insert(extent);
        join_if_many(&mut self.wrong);
    }

    fn note(&mut self, question: &Question, verdict: Verdict) {
        let Question { at, extent, purpose, .. } = *question;
        self.answer.digests += 1;
        let unreadable = match verdict {
            Verdict::Equal => return self.is_right(extent),
            Verdict::Unknown => return self.answer.differing.push(extent),
            Verdict::Differs => None,
            Verdict::Unreadable(why) => Some(why),
        };
        self.answer.differing.push(extent);
        if purpose == HashPurpose::Verify {
            self.answer.defects.push(Defect { at, extent, unreadable });
            self.is_wrong(extent);
        }
    }
}

impl Store {
    /// Whether digests wait to be compared.
    #[must_use]
    pub fn has_questions(&self) -> bool {
        !self.comparer.rounds.is_empty()
    }

    /// Whether so many wait that nothing more should be taken before some are answered.
    #[must_use]
    pub fn has_too_many_questions(&self) -> bool {
        self.comparer.rounds.len() >= MAX_ROUNDS
    }

    /// Forgets all digests that wait: who sent them is gone and will be told to ask again.
    pub fn forget_questions(&mut self) {
        let Comparer { wrong, rotten, .. } = std::mem::take(&mut self.comparer);
        self.comparer = Comparer { wrong, rotten, ..Comparer::default() };
    }

    /// What verification found to be wrong, and neither a later comparison nor new content has put
    /// right. Known since the store was opened.
    #[must_use]
    pub const fn wrong(&self) -> &ExtentSet {
        &self.comparer.wrong
    }

    /// What the newest state shows of the base that failed its checksum, and neither a comparison
    /// nor new content has put right. Known since the store was opened.
    #[must_use]
    pub const fn rotten(&self) -> &ExtentSet {
        &self.comparer.rotten
    }

    /// Keeps the questions of what has just become durable, up to `upto`.
    pub(super) fn ask(&mut self, questions: VecDeque<Question>, upto: Lsn) {
        let Some(first) = questions.front() else { return };
        let pin = Pin::new(&self.pins, first.at.min(self.durable));
        let reader = self.reader(self.durable, Some(pin)).ok();
        self.comparer.rounds.push_back(Round { upto, reader, questions });
    }

    /// Compares on, reading about `bytes` of content. None: nothing new can be said yet.
    pub fn compare(&mut self, bytes: u64) -> Option<Compared> {
        let mut left = bytes;
        while let Some(question) = self.comparer.front() {
            let full = self.comparer.answer.differing.len() >= MAX_DIFFERING / 2;
            if left == 0 || (full && !self.comparer.inside_number) {
                break;
            }
            let Some(verdict) = self.judge(&question, &mut left) else { break };
            self.comparer.note(&question, verdict);
            self.comparer.next();
        }
        let says = !self.comparer.inside_number && self.comparer.answer.digests > 0;
        says.then(|| std::mem::take(&mut self.comparer.answer))
    }

    /// Reads and hashes on; none when `left` bytes were read before the end.
    fn judge(&mut self, question: &Question, left: &mut u64) -> Option<Verdict> {
        let mut reading =
            match self.comparer.reading.take().map_or_else(|| self.begin(question), Ok) {
                Ok(reading) => reading,
                Err(error) => return Some(Verdict::Unreadable(error.to_string())),
            };
        let mut buffer = std::mem::take(&mut self.comparer.buffer);
        let whole = question.extent;
        let end = loop {
            let at = whole.offset() + reading.done;
            let piece = whole.end().min(at + COMPARE_PIECE) - at;
            if piece == 0 {
                let same = reading.hasher.finalize() == question.digest;
                break Some(if same { Verdict::Equal } else { Verdict::Differs });
            }
            if *left == 0 {
                break None;
            }
            buffer.resize(usize::try_from(piece).unwrap_or_default(), 0);
            match self.comparer.read(&reading, &mut buffer, at) {
                Ok(()) => reading.hasher.update(&buffer),
                Err(ReadError::Unknown { .. }) => break Some(Verdict::Unknown),
                Err(error) => break Some(Verdict::Unreadable(error.to_string())),
            };
            reading.done += piece;
            *left = left.saturating_sub(piece);
        };
        self.comparer.buffer = buffer;
        if end.is_none() {
            self.comparer.reading = Some(reading);
        }
        end
    }

    fn begin(&self, question: &Question) -> Result<Reading, StoreError> {
        let newest = self.config.faults.judge_newest_content;
        let at = if newest { self.durable } else { question.at };
        let shared = !question.overtaken && self.comparer.has_reader() && !newest;
        let exact = if shared { None } else { Some(self.reader(at, None)?) };
        Ok(Reading { exact, ..Reading::default() })
    }
}
