//! Merging runs and segments into one run: of every sector the newest entry stays.

use std::sync::Arc;
use std::vec::IntoIter;

use farshore_changelog::IndexEntry;

use super::file::{Run, RunEntry, RunWriter};
use crate::store::error::StoreError;
use crate::store::segment::Segment;

/// What is merged.
#[derive(Clone)]
pub(crate) enum Input {
    Segment(Arc<Segment>),
    Run(Arc<Run>),
}

impl Input {
    fn pages(&self) -> usize {
        match self {
            Self::Segment(segment) => segment.run_pages(),
            Self::Run(run) => run.pages(),
        }
    }

    fn page(&self, n: usize) -> Result<Vec<RunEntry>, StoreError> {
        match self {
            Self::Segment(segment) => {
                let of_segment = |entry: IndexEntry| RunEntry { segment: segment.id(), entry };
                Ok(segment.run_page(n)?.into_iter().map(of_segment).collect())
            }
            Self::Run(run) => run.page(n),
        }
    }
}

/// An input from its first entry to its last.
struct Reader {
    input: Input,
    next_page: usize,
    page: IntoIter<RunEntry>,
    /// The entry that comes next, or what is left of it.
    head: Option<RunEntry>,
}

impl Reader {
    fn new(input: Input) -> Result<Self, StoreError> {
        let page = Vec::new().into_iter();
        let mut reader = Self { input, next_page: 0, page, head: None };
        reader.advance()?;
        Ok(reader)
    }

    fn advance(&mut self) -> Result<(), StoreError> {
        self.head = self.page.next();
        while self.head.is_none() && self.next_page < self.input.pages() {
            self.page = self.input.page(self.next_page)?.into_iter();
            self.next_page += 1;
            self.head = self.page.next();
        }
        Ok(())
    }

    /// Leaves out everything before sector `at`.
    fn skip_to(&mut self, at: u64) -> Result<(), StoreError> {
        while let Some(head) = self.head.filter(|head| head.entry.sector < at) {
            if head.entry.end() > at {
                self.head = Some(head.starting_at(at));
                return Ok(());
            }
            self.advance()?;
        }
        Ok(())
    }
}

/// A merge under way.
pub(crate) struct Merge {
    /// Newest first.
    inputs: Vec<Reader>,
    writer: RunWriter,
}

impl Merge {
    /// `inputs` newest first.
    pub(crate) fn new(
        inputs: impl IntoIterator<Item = Input>,
        writer: RunWriter,
    ) -> Result<Self, StoreError> {
        let inputs = inputs.into_iter().map(Reader::new).collect::<Result<_, _>>()?;
        Ok(Self { inputs, writer })
    }

    pub(crate) const fn writer(&self) -> &RunWriter {
        &self.writer
    }

    /// Merges about so many entries; true when all are merged and [`Self::finish`] is due.
    pub(crate) fn step(&mut self, entries: usize) -> Result<bool, StoreError> {
        for _ in 0..entries {
            let heads = || self.inputs.iter().map(|i| i.head.map_or(u64::MAX, |h| h.entry.sector));
            let Some(at) = heads().min().filter(|at| *at < u64::MAX) else { return Ok(true) };
            // The newest that begins here counts, up to where a newer one begins.
            let winner = heads().take_while(|sector| *sector > at).count();
            let newer = heads().take(winner).min().unwrap_or(u64::MAX);
            let Some(entry) = self.inputs[winner].head else { return Ok(true) };
            let entry = entry.upto(entry.entry.end().min(newer));
            self.writer.push(entry)?;
            for input in &mut self.inputs[winner..] {
                input.skip_to(entry.entry.end())?;
            }
        }
        Ok(false)
    }

    pub(crate) fn finish(self) -> Result<Run, StoreError> {
        self.writer.finish()
    }
}
