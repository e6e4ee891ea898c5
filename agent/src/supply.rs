//! The batches of one volume in the order of the log, wherever they are: first what lies in the
//! spool, then what was built and is in memory, then what the feed builds from the pool.
//!
//! ```text
//! durable at the target | spool on disk | recent: in memory | feed: pool of filterd
//! ```
//! A batch is built once and keeps its bytes, unless points of an outage have to be merged: what
//! lies behind a merged stretch is chained anew when it is handed out, and keeps its bytes from then
//! on. While the volume is not spooling, `recent` holds what the session has in its window; when
//! spooling begins, exactly these batches are written first, so the spool continues what the target
//! may have received. `filterd` is told that a record may leave the pool only after the sync of the
//! spool.
//!
//! Does no I/O but that of the spool's disk; the intake thread and the simulator drive it.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use farshore_changelog::EncodedBatch;
use farshore_extent::{Generation, Lsn, Seq, VolumeId, WallTime};

use crate::batch::{Feed, FeedOptions};
use crate::session::{Resume, VolumeMemory};
use crate::spool::{Border, Cursor, Merged, ReadError, Spool, SpoolDisk, SpoolFaults};

/// How full the pool is, and what the volume is doing: what the decision to spool needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pressure {
    /// Bytes of the pool in use.
    pub pool_used: u64,
    /// Bytes of the pool.
    pub pool_bytes: u64,
    /// The volume is in order.
    pub ordered: bool,
    /// Bytes the copy loop has still to send.
    pub copy_remaining: u64,
    /// The target takes batches at the moment.
    pub streaming: bool,
    /// Bytes the spool may still take.
    pub room: u64,
}

#[derive(Debug)]
struct Recent {
    batch: Arc<EncodedBatch>,
    /// Where it was written in the spool; none: only in memory.
    written: Option<Cursor>,
}

/// See the module.
pub struct Supply<D> {
    volume: VolumeId,
    options: FeedOptions,
    faults: SpoolFaults,
    spool: Option<Spool<D>>,
    /// The next batch to hand out lies on disk. None: everything on disk was handed out.
    reading: Option<Cursor>,
    recent: VecDeque<Recent>,
    /// How many of `recent` were handed out; 0 while `reading`.
    handed: usize,
    /// The border behind what was handed out last, as the target knows it.
    sent: Option<Border>,
    feed: Option<Feed>,
    spooling: bool,
}

impl<D: SpoolDisk> Supply<D> {
    /// Without a spool everything stays in the pool until the target has it.
    #[must_use]
    pub fn new(
        volume: VolumeId,
        options: FeedOptions,
        spool: Option<Spool<D>>,
        faults: SpoolFaults,
    ) -> Self {
        Self {
            volume,
            options,
            faults,
            spool,
            reading: None,
            recent: VecDeque::new(),
            handed: 0,
            sent: None,
            feed: None,
            spooling: false,
        }
    }

    /// Before the target was heard: goes on behind the spool, or behind the acknowledged place
    /// that was remembered, so that an outage that began before this run is spooled as well.
    pub fn begin(&mut self, memory: VolumeMemory) {
        if self.feed.is_some() {
            return;
        }
        self.remembered(memory);
        let end = self.spool.as_ref().and_then(Spool::end);
        let known = Border {
            after: memory.acked,
            chain: memory.acked_chain,
            generation: memory.generation,
        };
        let from = match end {
            // Without a memory the spool knows best.
            Some(end)
                if end.generation == known.generation || known.generation == Generation::ZERO =>
            {
                self.reading = self.spool.as_ref().and_then(Spool::first);
                end
            }
            // Of a history that the target has left.
            Some(_) => {
                self.clear_spool();
                known
            }
            None => known,
        };
        if from.after.seq > Seq::ZERO {
            self.feed = Some(Feed::new(self.volume, resume(from), self.options));
        }
    }

    /// The target is at `at`: the next batch handed out is the one behind it. True when it is
    /// here; otherwise (or after a new copy was ordered) everything held is dropped, and the feed
    /// begins there.
    ///
    /// # Errors
    /// [`ReadError`]; everything held was dropped.
    pub fn start(&mut self, at: Resume, recopy: bool) -> Result<bool, ReadError> {
        let wanted = Border { after: at.after, chain: at.chain, generation: at.generation };
        let found = if recopy { Ok(false) } else { self.position(wanted) };
        self.sent = Some(wanted);
        if !matches!(found, Ok(true)) {
            self.clear_spool();
            self.recent.clear();
            self.handed = 0;
            self.spooling = false;
            self.feed = Some(Feed::new(self.volume, at, self.options));
        }
        found
    }

    fn position(&mut self, wanted: Border) -> Result<bool, ReadError> {
        let Some(feed) = &self.feed else { return Ok(false) };
        // What was not handed out has the chain of the spool.
        let is_it = |b: Border| b == wanted || (self.sent == Some(wanted) && b.is_at(wanted));
        let in_memory = self.recent.iter().position(|r| is_it(border_before(&r.batch)));
        let at_end = || is_it(border_of(feed)).then_some(self.recent.len());
        if let Some(handed) = in_memory.or_else(at_end) {
            (self.reading, self.handed) = (None, handed);
            return Ok(true);
        }
        let Some(spool) = &mut self.spool else { return Ok(false) };
        self.reading = spool.find(wanted)?;
        self.handed = 0;
        Ok(self.reading.is_some())
    }

    fn clear_spool(&mut self) {
        self.reading = None;
        self.recent.iter_mut().for_each(|r| r.written = None);
        if let Some(spool) = &mut self.spool {
            spool.clear();
        }
    }

    /// The next batch that is ready, if any.
    ///
    /// # Errors
    /// [`ReadError`]: this batch and those after it are lost.
    pub fn take(&mut self) -> Result<Option<Arc<EncodedBatch>>, ReadError> {
        let skips = self.faults.sent_out_of_order && self.handed < self.recent.len();
        if let (Some(cursor), Some(spool), false) = (&mut self.reading, &mut self.spool, skips) {
            // What is written and not synced is still in memory, and is taken from there.
            let stop = self.recent.front().map(|r| border_before(&r.batch));
            if !stop.is_some_and(|stop| stop.is_at(cursor.border()))
                && let Some(batch) = spool.read(cursor)?
            {
                spool.note_sent(*cursor);
                return Ok(Some(self.chained(batch)));
            }
            (self.reading, self.handed) = (None, 0);
        }
        let Some(next) = self.recent.get(self.handed) else {
            // What is built from here on follows what was sent.
            if let (Some(feed), Some(sent)) = (&mut self.feed, self.sent)
                && border_of(feed).is_at(sent)
            {
                feed.set_chain(sent.chain);
            }
            return Ok(None);
        };
        let (batch, written) = (Arc::clone(&next.batch), next.written);
        if let (Some(spool), Some(cursor)) = (&mut self.spool, written) {
            spool.note_sent(cursor);
        }
        let batch = self.chained(batch);
        self.recent[self.handed].batch = Arc::clone(&batch);
        self.handed += 1;
        Ok(Some(batch))
    }

    /// The batch behind what was handed out before it.
    fn chained(&mut self, batch: Arc<EncodedBatch>) -> Arc<EncodedBatch> {
        let before = self.sent.filter(|sent| sent.chain != batch.header.prev_chain);
        let batch = match before {
            Some(sent) if sent.is_at(border_before(&batch)) => Arc::new(batch.chained(sent.chain)),
            _ => batch,
        };
        self.sent = Some(Border::behind(&batch.header));
        batch
    }

    /// Gives it a spool that could not be opened before. What lies in it counts only when nothing
    /// was built yet.
    pub fn attach(&mut self, spool: Spool<D>) {
        self.spool = Some(spool);
        if self.feed.is_some() {
            self.clear_spool();
        }
    }

    /// Whether it has a spool.
    #[must_use]
    pub const fn has_spool(&self) -> bool {
        self.spool.is_some()
    }

    /// The feed that builds the next batch; none before the first start.
    pub const fn feed(&mut self) -> Option<&mut Feed> {
        self.feed.as_mut()
    }

    /// The feed cannot go on, and the target has not been heard: waits for its word.
    pub fn drop_feed(&mut self) {
        self.feed = None;
    }

    /// Takes the batch that the feed has built, and writes it when spooling.
    ///
    /// # Errors
    /// Of the spool's disk: spooling has ended, nothing is lost.
    pub fn push(&mut self, batch: EncodedBatch) -> io::Result<()> {
        self.recent.push_back(Recent { batch: Arc::new(batch), written: None });
        self.write()
    }

    /// Decides whether to spool. Begins with what is in memory.
    ///
    /// It begins when the pool is half full, and ends when everything on disk was handed out and
    /// the pool is not half full. While changes are copied there is no order to keep: that is
    /// spooled only when the target is away and little is left to copy, so that order returns.
    ///
    /// # Errors
    /// As for [`Self::push`].
    pub fn decide(&mut self, now: &Pressure) -> io::Result<()> {
        let half = now.pool_used.saturating_mul(2) >= now.pool_bytes;
        let worth = now.ordered || (!now.streaming && now.copy_remaining <= now.room / 2);
        let room = now.room > 0 && self.spool.is_some() && self.feed.is_some();
        self.spooling = room && worth && (half || (self.spooling && self.has_unread()));
        self.write()
    }

    fn write(&mut self) -> io::Result<()> {
        let Some(spool) = self.spool.as_mut().filter(|_| self.spooling) else { return Ok(()) };
        // After a failure the target may have acknowledged what the spool has given up: then it
        // has everything that is left there, too.
        let next = self.recent.front().filter(|r| r.written.is_none()).map(|r| &r.batch.header);
        if next.is_some_and(|h| spool.end().is_some_and(|end| !end.is_at(Border::before(h)))) {
            spool.clear();
            if spool.end().is_some() {
                // Nothing may follow it that does not.
                let stays = io::Error::other("an old segment of the spool cannot be removed");
                return Err(self.failed(stays));
            }
        }
        let handed = self.handed;
        for (at, recent) in self.recent.iter_mut().enumerate() {
            if recent.written.is_some() {
                continue;
            }
            match spool.append(&recent.batch, at < handed) {
                Ok(cursor) => recent.written = Some(cursor),
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(())
    }

    fn failed(&mut self, error: io::Error) -> io::Error {
        self.spooling = false;
        let Some(spool) = &mut self.spool else { return error };
        spool.give_up_tail();
        // A segment that was closed before the failure is durable.
        let end = spool.end().map_or(Lsn::ZERO, |end| end.after);
        let lost = |r: &&mut Recent| r.batch.header.last() > end;
        self.recent.iter_mut().filter(lost).for_each(|r| r.written = None);
        self.forget_written();
        error
    }

    /// What is durable in the spool needs no memory.
    fn forget_written(&mut self) {
        while let Some(cursor) = self.recent.front().and_then(|r| r.written) {
            self.recent.pop_front();
            if self.handed > 0 {
                self.handed -= 1;
            } else if self.reading.is_none() {
                self.reading = Some(cursor);
            }
        }
    }

    /// Makes durable what was written; afterwards it needs no memory.
    ///
    /// # Errors
    /// As for [`Self::push`].
    pub fn sync(&mut self) -> io::Result<()> {
        let Some(spool) = &mut self.spool else { return Ok(()) };
        if let Err(error) = spool.sync() {
            return Err(self.failed(error));
        }
        self.forget_written();
        Ok(())
    }

    /// Last place that `filterd` may let go of, because it is in the spool.
    #[must_use]
    pub fn kept(&self) -> Option<Lsn> {
        let spool = self.spool.as_ref()?;
        let end = if self.faults.release_before_sync { spool.end() } else { spool.durable_end() };
        end.map(|end| end.after)
    }

    /// Everything up to `upto` is durable at the target.
    pub fn trim(&mut self, upto: Lsn) {
        while self.recent.front().is_some_and(|r| r.batch.header.last() <= upto) {
            self.recent.pop_front();
            self.handed = self.handed.saturating_sub(1);
        }
        // Behind what was merged a restart needs the chain that was sent.
        if let Some(spool) = self.spool.as_mut().filter(|spool| spool.is_straight()) {
            spool.trim(upto);
        }
    }

    /// This was made durable: a restart begins with it, and needs nothing in the spool before it.
    pub fn remembered(&mut self, memory: VolumeMemory) {
        let Some(spool) = &mut self.spool else { return };
        spool.acknowledged(Border {
            after: memory.acked,
            chain: memory.acked_chain,
            generation: memory.generation,
        });
        spool.trim(memory.acked);
    }

    /// One bounded step of merging points in the spool ([`Spool::merge`]), of what was never handed
    /// out. `room` is what the spool may take beside what it holds, in bytes. False when there is
    /// nothing to do.
    ///
    /// # Errors
    /// Of the spool's disk; nothing is lost.
    pub fn merge(&mut self, room: u64) -> io::Result<bool> {
        // All was handed out, or memory points to what is not synced.
        let (Some(spool), Some(reading)) = (&mut self.spool, self.reading) else {
            return Ok(false);
        };
        let unsynced = self.recent.front().and_then(|r| r.written).map(|c| c.segment());
        let may = |id| id > reading.segment() && unsynced.is_none_or(|unsynced| id < unsynced);
        spool.merge(may, room, self.options.zstd_level)
    }

    /// What was merged since the spool was empty.
    #[must_use]
    pub fn merged(&self) -> Option<Merged> {
        self.spool.as_ref().and_then(Spool::merged)
    }

    /// Batches are written to the spool as they are built.
    #[must_use]
    pub const fn is_spooling(&self) -> bool {
        self.spooling && self.feed.is_some()
    }

    /// Batches were built and not handed out.
    #[must_use]
    pub fn has_unread(&self) -> bool {
        self.reading.is_some() || self.handed < self.recent.len()
    }

    /// Bytes written and not synced.
    #[must_use]
    pub fn unsynced(&self) -> u64 {
        self.spool.as_ref().map_or(0, Spool::unsynced)
    }

    /// Bytes of the spool.
    #[must_use]
    pub fn spool_bytes(&self) -> u64 {
        self.spool.as_ref().map_or(0, Spool::bytes)
    }

    /// Capture time of the oldest batch in the spool.
    #[must_use]
    pub fn spool_since(&self) -> Option<WallTime> {
        self.spool.as_ref().and_then(Spool::since)
    }
}

const fn border_before(batch: &EncodedBatch) -> Border {
    Border::before(&batch.header)
}

fn border_of(feed: &Feed) -> Border {
    let Resume { after, chain, generation } = feed.border();
    Border { after, chain, generation }
}

const fn resume(border: Border) -> Resume {
    Resume { after: border.after, chain: border.chain, generation: border.generation }
}
