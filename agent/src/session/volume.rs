//! One volume of the session: window, feed, watermarks.
//!
//! The window holds, in order and without a gap, every batch that was built and not acknowledged.
//! `sent` of them were handed to the present connection; the others wait for it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use farshore_blkfilter::control::CompareAnswer;
use farshore_changelog::EncodedBatch;
use farshore_extent::{Chain, Extent, Lsn, Problem, SECTOR, Seq, SourceWatermarks, WallTime};
use farshore_protocol::failover::FENCED;
use farshore_protocol::message::{MAX_DIFFERING, OpenVolume, Opened, Verdict};

use super::event::{Action, Faults, FeedFailure, Resume, VolumeFacts, VolumeMemory};
use crate::limits::{MEMORY_INTERVAL, PULLS_AHEAD};

/// Where a volume stands with the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Not opened: there is no connection.
    Waiting,
    /// `Open` was sent.
    Opening,
    /// Opened: batches flow.
    Streaming,
    /// Opened again at this time.
    Delayed(Duration),
    /// Refused or diverged: only a reload or a restart tries again.
    Halted,
}

/// What was shipped since the agent started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Payload bytes before compression.
    pub raw_bytes: u64,
    /// Bytes on the wire for them; batches sent again count again.
    pub wire_bytes: u64,
    /// Times a feed was built again from `filterd` after the first.
    pub rebuilds: u64,
    /// Batches sent a second time byte for byte.
    pub resent: u64,
    /// Times everything was ordered to be copied again.
    pub recopies: u64,
}

#[derive(Debug)]
struct Feed {
    number: u64,
    /// Place, chain and generation after the last batch taken from it.
    end: Resume,
    /// Pulls not answered.
    pulls: usize,
}

/// State of one volume. Read by status; changed by the session only.
#[derive(Debug)]
pub struct VolumeSession {
    facts: VolumeFacts,
    phase: Phase,
    problem: Option<Problem>,
    /// Where the target was last seen to be. Less than `memory.acked` after it lost data, until
    /// the new copy has overtaken that.
    target_durable: Lsn,
    /// Newest known truth; `remembered` is what the disk has.
    memory: VolumeMemory,
    remembered: VolumeMemory,
    remembered_at: Duration,
    acked_time: WallTime,
    window: VecDeque<Arc<EncodedBatch>>,
    window_bytes: usize,
    /// How many batches at the front of the window the present connection was given.
    sent: usize,
    sent_place: Lsn,
    feed: Option<Feed>,
    feeds: u64,
    /// Everything must be copied again, and no batch of the feed that does it has arrived yet.
    recopy: Option<String>,
    captured: Lsn,
    released: Lsn,
    /// Reopens and refusals in a row, without progress in between.
    failures: u32,
    totals: Totals,
}

impl VolumeSession {
    pub(super) fn new(
        facts: VolumeFacts,
        memory: VolumeMemory,
        captured: Lsn,
        released: Lsn,
    ) -> Self {
        Self {
            facts,
            phase: Phase::Waiting,
            problem: None,
            target_durable: Lsn::ZERO,
            memory,
            remembered: memory,
            remembered_at: Duration::ZERO,
            acked_time: WallTime::default(),
            window: VecDeque::new(),
            window_bytes: 0,
            sent: 0,
            sent_place: Lsn::ZERO,
            feed: None,
            feeds: 0,
            recopy: None,
            captured,
            released,
            failures: 0,
            totals: Totals::default(),
        }
    }

    /// What it is.
    #[must_use]
    pub const fn facts(&self) -> &VolumeFacts {
        &self.facts
    }

    /// Where it stands.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// Why it is not being shipped, if so.
    #[must_use]
    pub const fn problem(&self) -> Option<&Problem> {
        self.problem.as_ref()
    }

    /// Newest acknowledged place, its chain, and the generation.
    #[must_use]
    pub const fn memory(&self) -> VolumeMemory {
        self.memory
    }

    /// Capture time of the newest acknowledged place; zero when nothing was acknowledged in this
    /// run.
    #[must_use]
    pub const fn acked_time(&self) -> WallTime {
        self.acked_time
    }

    /// Bytes built and not acknowledged.
    #[must_use]
    pub const fn window_bytes(&self) -> usize {
        self.window_bytes
    }

    /// Batches built and not acknowledged.
    #[must_use]
    pub fn window_len(&self) -> usize {
        self.window.len()
    }

    /// Figures since the agent started.
    #[must_use]
    pub const fn totals(&self) -> Totals {
        self.totals
    }

    /// The watermarks of the source; their order is checked here.
    ///
    /// # Panics
    /// In builds with debug assertions, when a stage claims more than the one before it.
    #[must_use]
    pub fn watermarks(&self) -> SourceWatermarks {
        let journaled = self.memory.acked;
        let sent = self.sent_place.max(journaled);
        let marks = SourceWatermarks::new(self.known_captured().max(sent), sent, journaled);
        debug_assert!(marks.is_ok(), "watermarks out of order: {marks:?}");
        marks.unwrap_or_default()
    }

    pub(super) const fn failures(&self) -> u32 {
        self.failures
    }

    pub(super) fn refresh(&mut self, facts: VolumeFacts) {
        self.facts = facts;
    }

    pub(super) fn seen(&mut self, captured: Lsn, released: Lsn) {
        self.captured = self.captured.max(captured);
        self.released = self.released.max(released);
    }

    fn known_captured(&self) -> Lsn {
        let fed = self.feed.as_ref().map_or(Lsn::ZERO, |f| f.end.after);
        self.captured.max(fed).max(self.sent_place)
    }

    /// The connection has gone; batches stay for the next one.
    pub(super) fn disconnected(&mut self) {
        self.sent = 0;
        match self.phase {
            Phase::Opening | Phase::Streaming => self.phase = Phase::Waiting,
            Phase::Waiting | Phase::Delayed(_) | Phase::Halted => {}
        }
        self.try_again_if_fenced();
    }

    /// A target may take back a source that it has fenced: it is asked once on each connection, and
    /// when it says so. Meanwhile the problem stays.
    pub(super) fn try_again_if_fenced(&mut self) {
        let fenced = self.problem.as_ref().is_some_and(|p| p.code.0 == FENCED);
        if fenced && self.phase == Phase::Halted {
            self.phase = Phase::Waiting;
        }
    }

    /// Sends `Open` when the volume may be opened now.
    pub(super) fn open(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let due = match self.phase {
            Phase::Waiting => true,
            Phase::Delayed(until) => until <= now,
            Phase::Opening | Phase::Streaming | Phase::Halted => false,
        };
        if !due {
            return;
        }
        self.phase = Phase::Opening;
        self.sent = 0;
        actions.push(Action::SendOpen(OpenVolume {
            volume: self.facts.volume,
            name: self.facts.name.clone(),
            size: self.facts.size,
            blocks: self.facts.blocks,
            generation: self.memory.generation,
            acked: self.memory.acked,
            acked_chain: self.memory.acked_chain,
            point_interval_ms: self.facts.point_interval_ms,
        }));
    }

    /// When a delayed open is due.
    pub(super) const fn wakes_at(&self) -> Option<Duration> {
        match self.phase {
            Phase::Delayed(until) => Some(until),
            Phase::Waiting | Phase::Opening | Phase::Streaming | Phase::Halted => None,
        }
    }

    /// Open again after `delay`; the window stays.
    pub(super) fn retry_at(&mut self, at: Duration) {
        if self.phase == Phase::Halted {
            return;
        }
        self.failures = self.failures.saturating_add(1);
        self.sent = 0;
        self.phase = Phase::Delayed(at);
    }

    /// No more attempts; memory is given back.
    pub(super) fn halt(&mut self, problem: Problem, actions: &mut Vec<Action>) {
        self.problem = Some(problem);
        self.phase = Phase::Halted;
        self.drop_feed(actions);
    }

    pub(super) fn set_problem(&mut self, problem: Problem) {
        self.problem = Some(problem);
    }

    /// A reload forgets refusals.
    pub(super) fn reload(&mut self) {
        self.failures = 0;
        if matches!(self.phase, Phase::Halted | Phase::Delayed(_)) {
            self.phase = Phase::Waiting;
            self.problem = None;
        }
    }

    fn drop_feed(&mut self, actions: &mut Vec<Action>) {
        self.window.clear();
        self.window_bytes = 0;
        self.sent = 0;
        if self.feed.take().is_some() {
            actions.push(Action::StopFeed { volume: self.facts.volume });
        }
    }

    /// The target said where it is.
    pub(super) fn opened(
        &mut self,
        now: Duration,
        opened: &Opened,
        faults: Faults,
        actions: &mut Vec<Action>,
    ) {
        if self.phase != Phase::Opening {
            return; // an answer to an Open that a disconnect or a Reopen has overtaken
        }
        if opened.durable > self.known_captured() {
            let problem = diverged(&self.facts, opened.durable, self.known_captured());
            self.halt(problem, actions);
            return;
        }
        self.phase = Phase::Streaming;
        self.problem = None;
        self.target_durable = opened.durable;
        if opened.durable > Lsn::ZERO && !faults.lost_answers_not_said {
            // What was said about them may have gone with the connection before.
            self.say(opened.durable, CompareAnswer::Lost, actions);
        }
        let reason = self.recopy_reason(opened);
        let generation_changed = self.memory.generation != opened.generation;
        self.memory.generation = opened.generation;
        if generation_changed {
            // Durable at once, with the old acknowledged place: an old primary must never come
            // back as a source without a generation.
            self.remembered.generation = opened.generation;
            self.remember(now, self.remembered, actions);
        }
        if let Some(reason) = reason {
            self.totals.recopies += 1;
            self.recopy = Some(reason);
            self.rebuild(opened, faults, actions);
            return;
        }
        if faults.resend_without_reopen_position && !self.window.is_empty() {
            self.send_waiting(faults, actions);
            return;
        }
        match self.border(opened) {
            Some(count) if !generation_changed => self.pop(count),
            _ => self.rebuild(opened, faults, actions),
        }
        self.memory.acked = opened.durable;
        self.memory.acked_chain = opened.chain;
        self.release(actions);
        self.send_waiting(faults, actions);
    }

    /// Why the target cannot follow the log from where it is, if so. Our own knowledge counts as
    /// much as the target's verdict: records that `filterd` has let go cannot be sent.
    fn recopy_reason(&self, opened: &Opened) -> Option<String> {
        let (durable, acked) = (opened.durable, self.memory.acked);
        match opened.verdict {
            Verdict::Recopy => Some(format!(
                "the target cannot follow the log: it is at {durable}, this source knows {acked} as \
                 acknowledged"
            )),
            Verdict::Continue if durable < acked => {
                Some(format!("the target lost acknowledged data: {acked} was, it is at {durable}"))
            }
            // Number 0 of an epoch stands for "nothing of it yet". What is in the window can be sent
            // whatever filterd has let go (after a recopy it lets go of everything).
            Verdict::Continue
                if durable < self.released
                    && self.released.seq > Seq::ZERO
                    && self.border(opened).is_none() =>
            {
                Some(format!(
                    "the target is at {durable}, and records up to {} were already given up",
                    self.released
                ))
            }
            Verdict::Continue if durable == acked && opened.chain != self.memory.acked_chain => {
                Some(format!("the target holds another history up to {durable}"))
            }
            Verdict::Continue => None,
        }
    }

    /// How many batches of the window the target has. None when its place is not on a border of the
    /// window with the same chain: then the window is of no use.
    fn border(&self, opened: &Opened) -> Option<usize> {
        let feed = self.feed.as_ref()?;
        let here = (opened.durable, opened.chain);
        if (feed.end.after, feed.end.chain) == here {
            return Some(self.window.len());
        }
        self.window.iter().position(|b| (b.header.prev, b.header.prev_chain) == here)
    }

    /// Starts a feed exactly behind the target.
    fn rebuild(&mut self, opened: &Opened, faults: Faults, actions: &mut Vec<Action>) {
        self.window.clear();
        self.window_bytes = 0;
        self.sent = 0;
        if self.recopy.is_none() {
            self.sent_place = opened.durable;
        }
        let chain = if faults.chain_not_continued { Chain::EMPTY } else { opened.chain };
        let resume = Resume { after: opened.durable, chain, generation: opened.generation };
        self.start_feed(resume, actions);
    }

    fn start_feed(&mut self, resume: Resume, actions: &mut Vec<Action>) {
        self.totals.rebuilds += u64::from(self.feeds > 0);
        self.feeds += 1;
        self.feed = Some(Feed { number: self.feeds, end: resume, pulls: 0 });
        actions.push(Action::StartFeed {
            volume: self.facts.volume,
            feed: self.feeds,
            resume,
            recopy: self.recopy.clone(),
        });
    }

    /// A batch was built. Refuses what does not follow the window: then `false`.
    pub(super) fn batch_ready(
        &mut self,
        feed: u64,
        batch: Arc<EncodedBatch>,
        faults: Faults,
        actions: &mut Vec<Action>,
    ) -> bool {
        let Some(current) = self.feed.as_mut().filter(|f| f.number == feed) else { return true };
        current.pulls = current.pulls.saturating_sub(1);
        let header = &batch.header;
        let follows = (header.prev, header.prev_chain, header.generation)
            == (current.end.after, current.end.chain, current.end.generation);
        if !follows {
            return false;
        }
        current.end.after = header.last();
        current.end.chain = header.chain;
        if self.recopy.take().is_some() {
            // filterd has accepted: what was acknowledged of the old history counts no more.
            let before = (header.prev, header.prev_chain);
            (self.memory.acked, self.memory.acked_chain) = before;
            self.sent_place = header.prev;
        }
        self.window_bytes += batch.bytes.len();
        self.window.push_back(batch);
        if self.phase == Phase::Streaming {
            self.send_waiting(faults, actions);
        }
        true
    }

    fn send_waiting(&mut self, faults: Faults, actions: &mut Vec<Action>) {
        while let Some(batch) = self.window.get(self.sent) {
            self.sent += 1;
            let wire = batch.bytes.len() as u64;
            self.totals.wire_bytes = self.totals.wire_bytes.saturating_add(wire);
            let last = batch.header.last();
            if last > self.sent_place {
                self.sent_place = last;
                self.totals.raw_bytes += u64::from(batch.header.raw_len);
            } else {
                self.totals.resent += 1;
            }
            let (volume, batch) = (self.facts.volume, batch.clone());
            actions.push(Action::SendBatch { volume, batch });
            if faults.release_before_ack {
                actions.push(Action::Release { volume, upto: last });
            }
        }
    }

    /// Takes an acknowledgement. `Err` when it names a place that was not sent, or another chain.
    pub(super) fn ack(
        &mut self,
        durable: Lsn,
        chain: Chain,
        actions: &mut Vec<Action>,
    ) -> Result<bool, String> {
        if self.phase != Phase::Streaming || durable <= self.memory.acked {
            return Ok(false);
        }
        let sent = self.window.iter().take(self.sent);
        let Some(index) = sent.into_iter().position(|b| b.header.last() == durable) else {
            return Err(format!("{durable} was acknowledged, which ends no batch that was sent"));
        };
        if self.window[index].header.chain != chain {
            return Err(format!("{durable} was acknowledged with another chain"));
        }
        self.acked_time = self.window[index].header.last_time;
        self.pop(index + 1);
        self.memory.acked = durable;
        self.target_durable = durable;
        self.memory.acked_chain = chain;
        self.failures = 0;
        self.problem = None;
        self.release(actions);
        let _checked = self.watermarks();
        Ok(true)
    }

    /// Takes what the target said about digests. An answer that breaks a limit is worth nothing:
    /// then they are asked again. One to an earlier open is too; that they are lost is said anyway.
    pub(super) fn compared(&self, upto: Lsn, differing: Vec<Extent>, actions: &mut Vec<Action>) {
        if self.phase != Phase::Streaming {
            return;
        }
        let inside = |e: &Extent| e.is_aligned_to(SECTOR) && self.facts.size.extent().contains(*e);
        let sound = upto <= self.sent_place
            && differing.len() <= MAX_DIFFERING
            && differing.iter().all(inside);
        if sound {
            self.say(upto, CompareAnswer::Differing(differing), actions);
        } else {
            self.say(upto.min(self.sent_place), CompareAnswer::Lost, actions);
        }
    }

    fn say(&self, upto: Lsn, answer: CompareAnswer, actions: &mut Vec<Action>) {
        actions.push(Action::Compared { volume: self.facts.volume, upto, answer });
    }

    fn pop(&mut self, count: usize) {
        for batch in self.window.drain(..count) {
            self.window_bytes -= batch.bytes.len();
        }
        self.sent = self.sent.saturating_sub(count);
    }

    fn release(&mut self, actions: &mut Vec<Action>) {
        if self.memory.acked > self.released {
            self.released = self.memory.acked;
            actions.push(Action::Release { volume: self.facts.volume, upto: self.memory.acked });
        }
    }

    /// The feed reported that it cannot go on; `true` asks for a reopen after a pause.
    pub(super) fn feed_failed(
        &mut self,
        feed: u64,
        failure: FeedFailure,
        actions: &mut Vec<Action>,
    ) -> bool {
        if self.feed.as_ref().is_none_or(|f| f.number != feed) {
            return false;
        }
        match failure {
            FeedFailure::Diverged(problem) => {
                self.halt(problem, actions);
                false
            }
            FeedFailure::Damaged(problem) => {
                self.totals.recopies += 1;
                self.recopy = Some(problem.to_string());
                self.problem = Some(problem);
                self.drop_feed(actions);
                true
            }
        }
    }

    /// Whether one more batch may be asked for, the share of the host's window aside.
    pub(super) fn wants_pull(&self, max_batches: usize) -> bool {
        self.phase == Phase::Streaming
            && self.feed.as_ref().is_some_and(|f| f.pulls < PULLS_AHEAD)
            && self.window.len() < max_batches
    }

    /// Batches asked for and not arrived.
    pub(super) fn pulls(&self) -> usize {
        self.feed.as_ref().map_or(0, |f| f.pulls)
    }

    pub(super) fn pull(&mut self, actions: &mut Vec<Action>) {
        // Never what a target has lost: batches would claim it, and the next torn tail would look
        // like damage.
        let (volume, durable) = (self.facts.volume, self.target_durable);
        if let Some(feed) = &mut self.feed {
            feed.pulls += 1;
            actions.push(Action::Pull { volume, feed: feed.number, durable });
        }
    }

    /// Keeps the acknowledged place once in a while; `now` or never after a recopy that is not
    /// accepted yet.
    pub(super) fn tick(&mut self, now: Duration, last: bool, actions: &mut Vec<Action>) {
        let due = last || now.saturating_sub(self.remembered_at) >= MEMORY_INTERVAL;
        if due && self.recopy.is_none() && self.memory != self.remembered {
            self.remember(now, self.memory, actions);
        }
    }

    fn remember(&mut self, now: Duration, memory: VolumeMemory, actions: &mut Vec<Action>) {
        self.remembered = memory;
        self.remembered_at = now;
        actions.push(Action::Remember { volume: self.facts.volume, memory });
    }
}

fn diverged(facts: &VolumeFacts, durable: Lsn, captured: Lsn) -> Problem {
    Problem::harmless(
        3011,
        format!("volume {} cannot be replicated: the target is ahead of this source", facts.name),
        format!(
            "the target holds {durable}, this source has only come to {captured}: the state of \
             filterd was lost or belongs to another machine"
        ),
        "restore the state directory of filterd, or unprotect the volume and protect it under a \
         new name",
    )
}
