//! The session of a host: one connection, all volumes, one window.

use std::collections::BTreeMap;
use std::time::Duration;

use farshore_extent::{Lsn, Problem, VolumeId};

use super::event::{Action, Event, Faults, LinkFailure, VolumeFacts, VolumeMemory};
use super::retry::{Jitter, RetryPreset};
use super::volume::{Phase, VolumeSession};
use crate::limits::{DEFAULT_WINDOW_BYTES, MAX_WINDOW_BATCHES, PROVEN_AFTER};

/// Limits and habits of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionConfig {
    /// Bytes of batches built and not acknowledged, over all volumes. Each volume may always have
    /// one batch, so that a volume whose store is stuck does not hold up the others.
    pub window_bytes: usize,
    /// Batches of one volume built and not acknowledged.
    pub max_batches: usize,
    /// How patiently failures are tried again.
    pub retry: RetryPreset,
    /// None in the product.
    pub faults: Faults,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            window_bytes: usize::try_from(DEFAULT_WINDOW_BYTES).unwrap_or(usize::MAX),
            max_batches: MAX_WINDOW_BATCHES,
            retry: RetryPreset::default(),
            faults: Faults::default(),
        }
    }
}

/// State of the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkState {
    /// There is none; the next attempt is made at this time.
    Down {
        /// When, since the start.
        retry_at: Duration,
        /// Why the last one failed; none before the first attempt.
        problem: Option<Problem>,
    },
    /// An attempt is under way.
    Connecting {
        /// Why the last one failed.
        problem: Option<Problem>,
    },
    /// Up since then.
    Up {
        /// When, since the start.
        since: Duration,
    },
    /// An authentication error or a refusal: no more attempts.
    Halted {
        /// Why.
        problem: Problem,
    },
}

/// One connection with all volumes of a host; see the module.
#[derive(Debug)]
pub struct Session {
    config: SessionConfig,
    link: LinkState,
    volumes: BTreeMap<VolumeId, VolumeSession>,
    failures: u32,
    stopping: bool,
}

impl Session {
    /// A session without volumes that connects at its first [`Event::Tick`].
    #[must_use]
    pub const fn new(config: SessionConfig) -> Self {
        Self {
            config,
            link: LinkState::Down { retry_at: Duration::ZERO, problem: None },
            volumes: BTreeMap::new(),
            failures: 0,
            stopping: false,
        }
    }

    /// State of the connection.
    #[must_use]
    pub const fn link(&self) -> &LinkState {
        &self.link
    }

    /// Every volume, by identity.
    pub fn volumes(&self) -> impl Iterator<Item = &VolumeSession> {
        self.volumes.values()
    }

    /// One volume.
    #[must_use]
    pub fn volume(&self, volume: VolumeId) -> Option<&VolumeSession> {
        self.volumes.get(&volume)
    }

    /// Whether no batch waits for an acknowledgement.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.volumes.values().all(|v| v.window_len() == 0)
    }

    /// When the next [`Event::Tick`] changes something, if nothing else happens before.
    #[must_use]
    pub fn wakes_at(&self) -> Option<Duration> {
        match &self.link {
            LinkState::Down { retry_at, .. } if !self.stopping => Some(*retry_at),
            LinkState::Up { .. } => self.volumes.values().filter_map(|v| v.wakes_at()).min(),
            LinkState::Down { .. } | LinkState::Connecting { .. } | LinkState::Halted { .. } => {
                None
            }
        }
    }

    /// Takes one event and appends what is to be done, in order. `now` is the time since any fixed
    /// start and never runs backwards.
    pub fn step(&mut self, now: Duration, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Tick => {}
            Event::VolumeAdded { facts, memory, captured, released } => {
                self.volume_added(facts, memory, (captured, released));
            }
            Event::VolumeSeen { volume, captured, released } => {
                if let Some(v) = self.volumes.get_mut(&volume) {
                    v.seen(captured, released);
                }
            }
            Event::VolumeGone { volume, unprotected } => {
                self.volume_gone(now, (volume, unprotected), actions);
            }
            Event::Connected => {
                if matches!(self.link, LinkState::Connecting { .. }) {
                    self.link = LinkState::Up { since: now };
                }
            }
            Event::Disconnected { failure, jitter } => self.link_failed(now, failure, jitter),
            Event::Opened(opened) => {
                if let (true, Some(v)) = (self.is_up(), self.volumes.get_mut(&opened.volume)) {
                    v.opened(now, &opened, self.config.faults, actions);
                }
            }
            Event::Ack { volume, durable, chain } => {
                let Some(v) = self.volumes.get_mut(&volume) else { return };
                match v.ack(durable, chain, actions) {
                    Ok(progress) => self.failures = if progress { 0 } else { self.failures },
                    Err(reason) => self.reopen(now, volume, &reason),
                }
            }
            Event::Compared { volume, upto, differing } => {
                if let Some(v) = self.volumes.get(&volume) {
                    v.compared(upto, differing, actions);
                }
            }
            Event::Reopen { volume, reason } => {
                // Any other phase has an Open under way or before it, which answers this too.
                let streaming = |v: &VolumeSession| v.phase() == Phase::Streaming;
                if self.volumes.get(&volume).is_some_and(streaming) {
                    self.reopen(now, volume, &reason);
                } else if let Some(v) = self.volumes.get_mut(&volume) {
                    v.try_again_if_fenced();
                }
            }
            Event::Refused { volume, problem, retry, jitter } => {
                self.refused(now, volume, LinkFailure { problem, retry }, jitter, actions);
            }
            Event::BatchReady { volume, feed, batch } => {
                let faults = self.config.faults;
                let Some(v) = self.volumes.get_mut(&volume) else { return };
                if !v.batch_ready(feed, batch, faults, actions) {
                    self.reopen(now, volume, "a batch was built that does not follow the window");
                }
            }
            Event::FeedFailed { volume, feed, failure } => {
                let Some(v) = self.volumes.get_mut(&volume) else { return };
                if v.feed_failed(feed, failure, actions) {
                    self.delay(now, volume, Jitter::default());
                }
            }
            Event::Reload { retry, window_bytes } => {
                (self.config.retry, self.config.window_bytes) = (retry, window_bytes);
                self.reload(now);
            }
            Event::Stop => self.stopping = true,
        }
        self.go_on(now, actions);
    }

    fn volume_added(
        &mut self,
        facts: VolumeFacts,
        memory: VolumeMemory,
        (captured, released): (Lsn, Lsn),
    ) {
        if let Some(known) = self.volumes.get_mut(&facts.volume) {
            known.refresh(facts);
            known.seen(captured, released);
        } else {
            let id = facts.volume;
            self.volumes.insert(id, VolumeSession::new(facts, memory, captured, released));
        }
    }

    const fn is_up(&self) -> bool {
        matches!(self.link, LinkState::Up { .. })
    }

    /// What follows from the state alone: connect, open, keep, pull.
    fn go_on(&mut self, now: Duration, actions: &mut Vec<Action>) {
        match &self.link {
            LinkState::Down { retry_at, problem } if *retry_at <= now && !self.stopping => {
                let problem = problem.clone();
                self.link = LinkState::Connecting { problem };
                actions.push(Action::Connect);
            }
            LinkState::Up { .. } => {
                for volume in self.volumes.values_mut().filter(|_| !self.stopping) {
                    volume.open(now, actions);
                }
            }
            LinkState::Down { .. } | LinkState::Connecting { .. } | LinkState::Halted { .. } => {}
        }
        for volume in self.volumes.values_mut() {
            volume.tick(now, self.stopping, actions);
        }
        if !self.stopping && self.is_up() {
            self.pull(actions);
        }
    }

    /// Asks for batches while the window has room, the volume with the least in it first.
    fn pull(&mut self, actions: &mut Vec<Action>) {
        let mut held: usize = self.volumes.values().map(VolumeSession::window_bytes).sum();
        let mut order: Vec<(usize, VolumeId)> = self
            .volumes
            .iter()
            .filter(|(_, v)| v.wants_pull(self.config.max_batches))
            .map(|(id, v)| (v.window_bytes(), *id))
            .collect();
        order.sort_unstable();
        for (bytes, id) in order {
            let Some(volume) = self.volumes.get_mut(&id) else { continue };
            while volume.wants_pull(self.config.max_batches)
                && (held < self.config.window_bytes || (bytes == 0 && volume.pulls() == 0))
            {
                volume.pull(actions);
                held = held.saturating_add(farshore_changelog::limits::BATCH_RAW_TARGET);
            }
        }
    }

    fn volume_gone(
        &mut self,
        now: Duration,
        (id, unprotected): (VolumeId, bool),
        actions: &mut Vec<Action>,
    ) {
        let Some(mut volume) = self.volumes.remove(&id) else { return };
        volume.tick(now, true, actions);
        actions.push(Action::StopFeed { volume: id });
        if self.is_up() {
            actions.push(Action::SendClose { volume: id, unprotected });
        }
    }

    fn link_failed(&mut self, now: Duration, failure: LinkFailure, jitter: Jitter) {
        if let LinkState::Up { since } = self.link
            && now.saturating_sub(since) >= PROVEN_AFTER
        {
            self.failures = 0;
        }
        self.volumes.values_mut().for_each(VolumeSession::disconnected);
        if !failure.retry {
            self.link = LinkState::Halted { problem: failure.problem };
            return;
        }
        self.failures = self.failures.saturating_add(1);
        let retry_at = now + self.config.retry.delay(self.failures, jitter);
        self.link = LinkState::Down { retry_at, problem: Some(failure.problem) };
    }

    fn refused(
        &mut self,
        now: Duration,
        volume: Option<VolumeId>,
        failure: LinkFailure,
        jitter: Jitter,
        actions: &mut Vec<Action>,
    ) {
        let Some(id) = volume else {
            actions.push(Action::Disconnect { reason: failure.problem.to_string() });
            self.link_failed(now, failure, jitter);
            return;
        };
        let Some(v) = self.volumes.get_mut(&id) else { return };
        if failure.retry {
            v.set_problem(failure.problem);
            self.delay(now, id, jitter);
        } else {
            v.halt(failure.problem, actions);
        }
    }

    /// Opens a volume again: at once the first time, then with growing pauses until the target
    /// acknowledges something.
    fn reopen(&mut self, now: Duration, id: VolumeId, reason: &str) {
        let Some(v) = self.volumes.get_mut(&id) else { return };
        v.set_problem(Problem::harmless(
            3012,
            format!("volume {} had to be opened again at the target", v.facts().name),
            reason,
            "nothing; it is tried again by itself. Look at the target's log when it stays",
        ));
        if v.failures() == 0 {
            v.retry_at(now);
        } else {
            self.delay(now, id, Jitter::default());
        }
    }

    fn delay(&mut self, now: Duration, id: VolumeId, jitter: Jitter) {
        let Some(v) = self.volumes.get_mut(&id) else { return };
        let failures = v.failures().saturating_add(1);
        v.retry_at(now + self.config.retry.delay(failures, jitter));
    }

    fn reload(&mut self, now: Duration) {
        self.failures = 0;
        self.volumes.values_mut().for_each(VolumeSession::reload);
        match &self.link {
            LinkState::Halted { problem } => {
                self.link = LinkState::Down { retry_at: now, problem: Some(problem.clone()) };
            }
            LinkState::Down { problem, .. } => {
                self.link = LinkState::Down { retry_at: now, problem: problem.clone() };
            }
            LinkState::Connecting { .. } | LinkState::Up { .. } => {}
        }
    }
}
