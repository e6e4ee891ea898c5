//! The agent: the real session core and the real batch building, driven by hand.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use farshore_agent::batch::{Feed, FeedOptions};
use farshore_agent::session::{
    Action, Event, Faults, FeedFailure, Jitter, LinkFailure, Session, SessionConfig, VolumeFacts,
    VolumeMemory,
};
use farshore_extent::{BlockSizes, Lsn, Problem, VolumeId, VolumeName};
use farshore_protocol::message::FromTarget;

use crate::coverage::{Coverage, Seen};
use crate::link::{Link, ToTarget};
use crate::rng::Rng;
use crate::source::Source;

/// What survives the agent's death.
pub type Memory = BTreeMap<VolumeId, VolumeMemory>;

/// One run of the agent.
pub struct Agent {
    session: Session,
    feeds: BTreeMap<VolumeId, Running>,
    actions: Vec<Action>,
    faults: Faults,
    batch_bytes: usize,
    compress: bool,
}

/// A feed and the batches asked of it.
struct Running {
    number: u64,
    feed: Feed,
    pulls: VecDeque<Lsn>,
}

fn trouble(why: &str) -> Problem {
    Problem::harmless(5999, "simulated", why, "nothing")
}

impl Agent {
    pub fn new(rng: &mut Rng, faults: Faults, memory: &Memory, source: &Source) -> Self {
        let config = SessionConfig {
            window_bytes: 16 << 10,
            max_batches: 1 + rng.index(6),
            faults,
            ..SessionConfig::default()
        };
        let mut agent = Self {
            session: Session::new(config),
            feeds: BTreeMap::new(),
            actions: Vec::new(),
            faults,
            batch_bytes: 512 + rng.index(8 << 10),
            compress: rng.chance(100),
        };
        for disk in &source.disks {
            let facts = VolumeFacts {
                volume: disk.id,
                name: VolumeName::new("disk").expect("name"),
                size: disk.size,
                blocks: BlockSizes::E512,
                point_interval_ms: None,
            };
            let (captured, released) = source.watermarks(disk.id);
            let memory = memory.get(&disk.id).copied().unwrap_or_default();
            let event = Event::VolumeAdded { facts, memory, captured, released };
            agent.session.step(Duration::ZERO, event, &mut agent.actions);
        }
        agent
    }

    fn now(source: &Source) -> Duration {
        Duration::from_millis(source.now().mono_ms)
    }

    /// Looks at filterd's watermarks and lets time pass.
    pub fn tick(&mut self, source: &Source) {
        for disk in &source.disks {
            let (captured, released) = source.watermarks(disk.id);
            let event = Event::VolumeSeen { volume: disk.id, captured, released };
            self.session.step(Self::now(source), event, &mut self.actions);
        }
        self.session.step(Self::now(source), Event::Tick, &mut self.actions);
    }

    /// Carries out what the session has decided.
    pub fn act(
        &mut self,
        source: &mut Source,
        link: &mut Link,
        memory: &mut Memory,
        coverage: &mut Coverage,
    ) {
        let mut actions = std::mem::take(&mut self.actions);
        for action in actions.drain(..) {
            match action {
                Action::Connect => {
                    link.connect();
                    let event = if link.is_up() {
                        Event::Connected
                    } else {
                        let failure = LinkFailure { problem: trouble("down"), retry: true };
                        Event::Disconnected { failure, jitter: Jitter(128) }
                    };
                    self.session.step(Self::now(source), event, &mut self.actions);
                }
                Action::Disconnect { .. } => link.cut(),
                Action::SendOpen(open) => link.send(ToTarget::Open(open)),
                Action::SendClose { .. } => {}
                Action::SendBatch { volume, batch } => {
                    if link.sent_before(batch.header.last()) {
                        coverage.saw(Seen::Resent);
                    }
                    link.send(ToTarget::Batch(volume, batch));
                }
                Action::StartFeed { volume, feed, resume, recopy } => {
                    if let Some(reason) = recopy {
                        source.recopy(volume, &reason, coverage);
                    }
                    let options = FeedOptions {
                        zstd_level: self.compress.then_some(1),
                        batch_bytes: self.batch_bytes,
                        divide_number: self.faults.divide_number,
                    };
                    let feed = Running {
                        number: feed,
                        feed: Feed::new(volume, resume, options),
                        pulls: VecDeque::new(),
                    };
                    self.feeds.insert(volume, feed);
                }
                Action::StopFeed { volume } => {
                    self.feeds.remove(&volume);
                }
                Action::Pull { volume, feed, durable } => {
                    if let Some(running) = self.feeds.get_mut(&volume).filter(|r| r.number == feed)
                    {
                        running.pulls.push_back(durable);
                    }
                }
                Action::Release { volume, upto } => source.release(volume, upto, coverage),
                Action::Remember { volume, memory: kept } => {
                    memory.insert(volume, kept);
                }
            }
        }
    }

    /// One feed builds one batch, when there are records.
    pub fn feed(&mut self, rng: &mut Rng, source: &Source) {
        let asked: Vec<VolumeId> =
            self.feeds.iter().filter(|(_, r)| !r.pulls.is_empty()).map(|(id, _)| *id).collect();
        if asked.is_empty() {
            return;
        }
        let volume = asked[rng.index(asked.len())];
        let Some(running) = self.feeds.get_mut(&volume) else { return };
        let most = 1 + rng.index(24);
        let event = match running.build(volume, source, most) {
            Ok(Some(batch)) => {
                running.pulls.pop_front();
                Event::BatchReady { volume, feed: running.number, batch: Arc::new(batch) }
            }
            Ok(None) => return,
            Err(failure) => Event::FeedFailed { volume, feed: running.number, failure },
        };
        self.session.step(Self::now(source), event, &mut self.actions);
    }

    /// A message of the target.
    pub fn hear(&mut self, message: FromTarget, source: &Source) {
        if let Ok(event) = Event::from_target(message, Jitter(128)) {
            self.session.step(Self::now(source), event, &mut self.actions);
        }
    }

    pub fn disconnected(&mut self, source: &Source) {
        let failure = LinkFailure { problem: trouble("cut"), retry: true };
        let event = Event::Disconnected { failure, jitter: Jitter(128) };
        self.session.step(Self::now(source), event, &mut self.actions);
    }

    pub fn problems(&self) -> Vec<String> {
        self.session.volumes().filter_map(|v| v.problem().map(ToString::to_string)).collect()
    }

    pub fn state(&self) -> String {
        format!(
            "{:?} {:?}",
            self.session.link(),
            self.session.volumes().map(|v| (v.phase(), v.window_len())).collect::<Vec<_>>()
        )
    }
}

impl Running {
    fn build(
        &mut self,
        volume: VolumeId,
        source: &Source,
        most: usize,
    ) -> Result<Option<farshore_changelog::EncodedBatch>, FeedFailure> {
        let durable = *self.pulls.front().expect("asked for");
        let mut records = Vec::new();
        source
            .fetch(volume, self.feed.place(), most, &mut records)
            .map_err(|why| FeedFailure::Damaged(trouble(&why)))?;
        for record in &records {
            let before = self
                .feed
                .add(source.epoch(), record, source.pool(volume), durable)
                .map_err(|e| e.failure("disk"))?;
            if before.is_some() {
                return Ok(before);
            }
        }
        // A fetch may end in the middle of a number only when the number has more records than
        // were asked for; the next fetch begins after the number, so they must not be cut.
        Ok(self.feed.finish(durable))
    }
}
