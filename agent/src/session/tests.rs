//! The session core against a model of `filterd` and a model of the target that may forget
//! what it did not acknowledge, restart, and lose acknowledged data.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use farshore_blkfilter::control::{Descriptor, DescriptorBody, PoolPlace};
use farshore_changelog::{EncodedBatch, RawBatch, RecordBody};
use farshore_extent::{
    BlockSizes, Chain, Epoch, Extent, Generation, Lsn, Problem, Seq, VolumeId, VolumeName,
    VolumeSize, WallTime,
};
use farshore_protocol::message::{OpenVolume, Opened, Verdict};
use proptest::prelude::*;

use super::*;
use crate::batch::{Feed, FeedOptions};

const EPOCH: Epoch = Epoch::new(3);

fn at(seq: u64) -> Lsn {
    Lsn::new(EPOCH, Seq::new(seq))
}

fn facts(volume: VolumeId) -> VolumeFacts {
    VolumeFacts {
        volume,
        name: VolumeName::new("disk").unwrap(),
        size: VolumeSize::new(1 << 30).unwrap(),
        blocks: BlockSizes::E512,
        point_interval_ms: None,
    }
}

fn failure(retry: bool) -> LinkFailure {
    LinkFailure { problem: Problem::harmless(5002, "no connection", "test", "wait"), retry }
}

/// `filterd` as the agent sees it. A record's payload is its number, so that the target can
/// prove what it got.
#[derive(Default)]
struct Filterd {
    records: BTreeMap<u64, Vec<Descriptor>>,
    /// Pieces of every write there ever was.
    writes: BTreeMap<u64, usize>,
    pool: Vec<u8>,
    next: u64,
    released: u64,
    recopies: u32,
}

impl Filterd {
    fn append(&mut self, body: DescriptorBody) {
        self.next += 1;
        let seq = Seq::new(self.next);
        self.records.entry(self.next).or_default().push(Descriptor {
            seq,
            time: WallTime::from_nanos(1),
            body,
        });
    }

    /// One write, recorded in `parts` pieces with one number.
    fn write(&mut self, parts: u64) {
        let number = self.next + 1;
        let pieces: Vec<Descriptor> = (0..parts)
            .map(|part| {
                let data = [number.to_le_bytes(); 64].concat();
                let offset = self.pool.len() as u64;
                self.pool.extend_from_slice(&data);
                let place = PoolPlace { offset, crc: crc32c::crc32c(&data) };
                let extent = Extent::new((number * 8 + part) * 512, 512).unwrap();
                let body = DescriptorBody::Write { extent, place };
                Descriptor { seq: Seq::new(number), time: WallTime::from_nanos(1), body }
            })
            .collect();
        self.next = number;
        self.writes.insert(number, pieces.len());
        self.records.insert(number, pieces);
    }

    fn recopy(&mut self) {
        self.recopies += 1;
        self.records.clear();
        self.append(DescriptorBody::OrderLost);
        self.write(3);
        self.append(DescriptorBody::OrderRestored);
    }

    fn release(&mut self, upto: Lsn) {
        if upto.epoch == EPOCH {
            self.released = self.released.max(upto.seq.get());
            self.records.retain(|seq, _| *seq > upto.seq.get());
        }
    }
}

/// The target: durable history and what was received since.
#[derive(Default)]
struct Target {
    generation: u64,
    /// `(last, chain)` of every durable batch, and the numbers (with pieces) it holds.
    durable: Vec<(Lsn, Chain, Vec<(u64, usize)>)>,
    volatile: Vec<(Lsn, Chain, Vec<(u64, usize)>)>,
    open: bool,
    reopens: u32,
    acked: Lsn,
    /// Numbers the source released without an acknowledgement would show here.
    lost_acked: bool,
}

impl Target {
    fn end(&self) -> (Lsn, Chain) {
        let last = self.volatile.last().or(self.durable.last());
        last.map_or((Lsn::ZERO, Chain::EMPTY), |(lsn, chain, _)| (*lsn, *chain))
    }

    fn durable_end(&self) -> (Lsn, Chain) {
        self.durable.last().map_or((Lsn::ZERO, Chain::EMPTY), |(lsn, chain, _)| (*lsn, *chain))
    }

    fn disconnect(&mut self) {
        self.open = false;
    }

    fn open(&mut self, open: &OpenVolume) -> Opened {
        // Whatever was received is either durable by now or forgotten.
        self.volatile.clear();
        self.open = true;
        self.generation = self.generation.max(1);
        let (durable, chain) = self.durable_end();
        let knows = open.acked == Lsn::ZERO
            || self.durable.iter().any(|(l, c, _)| (*l, *c) == (open.acked, open.acked_chain));
        let verdict = if knows { Verdict::Continue } else { Verdict::Recopy };
        let generation = Generation::new(self.generation);
        Opened { volume: open.volume, generation, durable, chain, verdict, point_interval_ms: 0 }
    }

    /// `false`: reopen.
    fn receive(&mut self, batch: &EncodedBatch) -> bool {
        if !self.open {
            return true;
        }
        let checked = RawBatch::parse(&batch.bytes).and_then(RawBatch::check);
        let Ok(checked) = checked else {
            self.open = false;
            return false;
        };
        let head = checked.header();
        if (head.prev, head.prev_chain) != self.end() {
            self.open = false;
            self.reopens += 1;
            return false;
        }
        let mut numbers: Vec<(u64, usize)> = Vec::new();
        for record in checked.records() {
            if let RecordBody::Write { .. } = record.body {
                match numbers.last_mut() {
                    Some((n, parts)) if *n == record.seq.get() => *parts += 1,
                    _ => numbers.push((record.seq.get(), 1)),
                }
            }
        }
        self.volatile.push((head.last(), head.chain, numbers));
        true
    }

    fn make_durable(&mut self, count: usize) -> Option<(Lsn, Chain)> {
        let count = count.min(self.volatile.len());
        self.durable.extend(self.volatile.drain(..count));
        (count > 0 && self.open).then(|| {
            let end = self.durable_end();
            self.acked = self.acked.max(end.0);
            end
        })
    }
}

struct Intake {
    number: u64,
    feed: Feed,
    recopy: Option<String>,
    pending: VecDeque<Descriptor>,
}

struct World {
    session: Session,
    now: Duration,
    filterd: Filterd,
    target: Target,
    volume: VolumeId,
    feed: Option<Intake>,
    pulls: u32,
    wire: VecDeque<Arc<EncodedBatch>>,
    up: bool,
    memory: VolumeMemory,
    options: FeedOptions,
    config: SessionConfig,
    history_may_break: bool,
    events: VecDeque<Event>,
    busy: bool,
}

impl World {
    fn new(config: SessionConfig) -> Self {
        let options = FeedOptions {
            batch_bytes: 1024,
            zstd_level: None,
            divide_number: config.faults.divide_number,
        };
        let mut world = Self {
            session: Session::new(config),
            now: Duration::ZERO,
            filterd: Filterd::default(),
            target: Target::default(),
            volume: VolumeId::random(),
            feed: None,
            pulls: 0,
            wire: VecDeque::new(),
            up: false,
            memory: VolumeMemory::default(),
            options,
            config,
            history_may_break: false,
            events: VecDeque::new(),
            busy: false,
        };
        world.add_volume();
        world
    }

    fn add_volume(&mut self) {
        let (captured, released) = (at(self.filterd.next), at(self.filterd.released));
        let (facts, memory) = (facts(self.volume), self.memory);
        self.step(Event::VolumeAdded { facts, memory, captured, released });
    }

    fn step(&mut self, event: Event) {
        self.events.push_back(event);
        if self.busy {
            return; // an answer to an action: taken when all actions before it are executed
        }
        self.busy = true;
        while let Some(event) = self.events.pop_front() {
            let mut actions = Vec::new();
            self.session.step(self.now, event, &mut actions);
            for action in actions {
                self.execute(action);
            }
        }
        self.busy = false;
        let held: usize = self.session.volumes().map(VolumeSession::window_bytes).sum();
        assert!(held <= self.config.window_bytes + 3 * 8192, "window of {held} bytes");
        for volume in self.session.volumes() {
            let _ordered = volume.watermarks();
        }
    }

    fn execute(&mut self, action: Action) {
        match action {
            Action::Connect => {
                self.up = true;
                self.step(Event::Connected);
            }
            Action::Disconnect { .. } => self.cut_wire(),
            Action::SendOpen(open) => {
                // Everything sent before arrives before.
                self.deliver(usize::MAX);
                let opened = self.target.open(&open);
                self.step(Event::Opened(opened));
            }
            Action::SendClose { .. } | Action::StopFeed { .. } => self.feed = None,
            Action::SendBatch { batch, .. } => {
                assert!(self.up, "a batch was sent without a connection");
                self.wire.push_back(batch);
            }
            Action::StartFeed { feed, resume, recopy, .. } => {
                self.pulls = 0;
                self.feed = Some(Intake {
                    number: feed,
                    feed: Feed::new(self.volume, resume, self.options),
                    recopy,
                    pending: VecDeque::new(),
                });
            }
            Action::Pull { feed, .. } => {
                assert_eq!(self.feed.as_ref().map(|f| f.number), Some(feed));
                self.pulls += 1;
            }
            Action::Release { upto, .. } => {
                assert!(
                    upto <= self.target.durable_end().0 || self.history_may_break,
                    "released {upto} beyond what is durable"
                );
                self.filterd.release(upto);
            }
            Action::Remember { memory, .. } => self.memory = memory,
        }
    }

    /// The intake thread: answers one pull.
    fn intake(&mut self) {
        let Some(Intake { number, feed, recopy, pending }) = &mut self.feed else { return };
        if self.pulls == 0 {
            return;
        }
        if recopy.take().is_some() {
            self.filterd.recopy();
        }
        if pending.is_empty() {
            let after = feed.place();
            let from = if after.epoch == EPOCH { after.seq.get() } else { 0 };
            pending.extend(self.filterd.records.range(from + 1..).flat_map(|(_, r)| r.clone()));
        }
        let mut batch = None;
        while batch.is_none() {
            let Some(record) = pending.pop_front() else { break };
            batch = feed.add(EPOCH, &record, &self.filterd.pool[..], Lsn::ZERO).unwrap();
        }
        let Some(batch) = batch.or_else(|| feed.finish(Lsn::ZERO)) else { return };
        self.pulls -= 1;
        let (volume, feed) = (self.volume, *number);
        self.step(Event::BatchReady { volume, feed, batch: Arc::new(batch) });
    }

    fn deliver(&mut self, count: usize) {
        for _ in 0..count {
            let Some(batch) = self.wire.pop_front() else { return };
            if !self.target.receive(&batch) {
                self.wire.clear();
                let (volume, reason) = (self.volume, "does not fit".to_owned());
                self.step(Event::Reopen { volume, reason });
                return;
            }
        }
    }

    fn sync(&mut self, count: usize) {
        if let Some((durable, chain)) = self.target.make_durable(count)
            && self.up
        {
            self.step(Event::Ack { volume: self.volume, durable, chain });
        }
    }

    fn cut_wire(&mut self) {
        self.up = false;
        self.wire.clear();
        self.target.disconnect();
    }

    fn disconnect(&mut self) {
        if self.up {
            self.cut_wire();
            self.step(Event::Disconnected { failure: failure(true), jitter: Jitter(7) });
        }
    }

    fn restart_agent(&mut self) {
        self.cut_wire();
        self.session = Session::new(self.config);
        self.feed = None;
        self.pulls = 0;
        self.add_volume();
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.step(Event::Tick);
    }

    fn settle(&mut self) {
        for _ in 0..10_000 {
            self.wait(Duration::from_secs(1));
            self.intake();
            self.deliver(usize::MAX);
            self.sync(usize::MAX);
            let done = self.target.durable_end().0 == at(self.filterd.next);
            if (done || self.filterd.next == 0) && self.session.is_drained() {
                return;
            }
        }
        panic!("the target never got everything");
    }

    /// Every write exactly once and in order, with all its pieces.
    fn check(&self) {
        let got: Vec<(u64, usize)> =
            self.target.durable.iter().flat_map(|(_, _, n)| n).copied().collect();
        assert!(got.windows(2).all(|w| w[0].0 < w[1].0), "a number came twice or out of order");
        for (number, parts) in &got {
            assert_eq!(self.filterd.writes.get(number), Some(parts), "a number was divided");
        }
        if !self.target.lost_acked {
            assert_eq!(got.len(), self.filterd.writes.len(), "a number is missing");
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64),
    Intake,
    Deliver(usize),
    Sync(usize),
    Disconnect,
    TargetCrash,
    RestartAgent,
    LoseAcked(usize),
    Wait(u64),
}

fn steps(lose: bool) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (1u64..6).prop_map(Step::Write),
        8 => Just(Step::Intake),
        6 => (1usize..4).prop_map(Step::Deliver),
        6 => (1usize..4).prop_map(Step::Sync),
        1 => Just(Step::Disconnect),
        1 => Just(Step::TargetCrash),
        1 => Just(Step::RestartAgent),
        u32::from(lose) => (1usize..4).prop_map(Step::LoseAcked),
        3 => (1u64..400).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 1..120)
}

fn run(config: SessionConfig, steps: &[Step]) -> World {
    let mut world = World::new(config);
    world.wait(Duration::ZERO);
    for step in steps {
        match step {
            Step::Write(parts) => world.filterd.write(*parts),
            Step::Intake => world.intake(),
            Step::Deliver(count) => world.deliver(*count),
            Step::Sync(count) => world.sync(*count),
            Step::Disconnect => world.disconnect(),
            Step::TargetCrash => {
                world.target.volatile.clear();
                world.disconnect();
            }
            Step::RestartAgent => world.restart_agent(),
            Step::LoseAcked(count) => {
                world.disconnect();
                let keep = world.target.durable.len().saturating_sub(*count);
                world.history_may_break = true;
                world.target.volatile.clear();
                world.target.durable.truncate(keep);
                let released = at(world.filterd.released);
                let lost = world.filterd.released > 0 && world.target.durable_end().0 < released;
                world.target.lost_acked |= lost;
            }
            Step::Wait(ms) => world.wait(Duration::from_millis(*ms)),
        }
    }
    world.settle();
    world.check();
    world
}

fn small() -> SessionConfig {
    SessionConfig { window_bytes: 8192, max_batches: 8, ..SessionConfig::default() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_record_arrives_once_and_in_order_whatever_breaks(steps in steps(false)) {
        let world = run(small(), &steps);
        prop_assert_eq!(world.filterd.recopies, 0, "nothing acknowledged was lost");
        prop_assert_eq!(world.target.reopens, 0, "a batch was sent that could not fit");
    }

    #[test]
    fn a_target_that_lost_acknowledged_data_gets_everything_again(steps in steps(true)) {
        let world = run(small(), &steps);
        prop_assert!(!world.target.lost_acked || world.filterd.recopies > 0);
    }
}

/// Runs a scenario in which an honest session settles; true when the fault was noticed.
fn is_found(faults: Faults, scenario: &[Step]) -> bool {
    let config = SessionConfig { faults, ..small() };
    run(small(), scenario);
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let result = std::panic::catch_unwind(|| run(config, scenario));
    std::panic::set_hook(previous);
    result.map_or(true, |world| world.target.reopens > 0)
}

#[test]
fn each_planted_fault_is_noticed() {
    use Step::{Deliver, Intake, Sync, Wait, Write};
    let busy = [Write(3), Write(5), Write(5), Intake, Intake, Deliver(1), Sync(1)];
    assert!(is_found(Faults { release_before_ack: true, ..Faults::default() }, &busy));
    assert!(is_found(Faults { divide_number: true, ..Faults::default() }, &busy));
    let restart = [busy.as_slice(), &[Step::RestartAgent, Wait(1)]].concat();
    assert!(is_found(Faults { chain_not_continued: true, ..Faults::default() }, &restart));
    let faults = Faults { resend_without_reopen_position: true, ..Faults::default() };
    let mut world = World::new(SessionConfig { faults, ..small() });
    lost_acknowledgement(&mut world);
    assert!(world.target.reopens > 0);
}

/// The batch became durable, and the connection went before its acknowledgement arrived.
fn lost_acknowledgement(world: &mut World) {
    world.filterd.write(3);
    world.intake();
    world.filterd.write(2);
    world.intake();
    world.deliver(2);
    world.target.make_durable(1);
    world.disconnect();
    world.wait(Duration::from_millis(400));
    world.deliver(usize::MAX);
}

#[test]
fn a_lost_acknowledgement_resends_only_what_the_target_lacks_byte_for_byte() {
    let mut world = World::new(small());
    world.wait(Duration::ZERO);
    lost_acknowledgement(&mut world);
    let totals = world.session.volume(world.volume).unwrap().totals();
    assert_eq!((totals.resent, totals.rebuilds), (1, 0));
    world.settle();
    world.check();
    assert_eq!(world.target.reopens, 0);
}

#[test]
fn an_acknowledgement_of_something_never_sent_opens_the_volume_again() {
    let mut world = World::new(small());
    world.wait(Duration::ZERO);
    world.filterd.write(1);
    world.intake();
    let volume = world.volume;
    world.step(Event::Ack { volume, durable: at(900), chain: Chain::EMPTY });
    assert_eq!(world.filterd.released, 0);
    let session = world.session.volume(volume).unwrap();
    assert_eq!(session.phase(), Phase::Streaming, "it was opened again at once");
    assert_eq!(session.memory().acked, Lsn::ZERO);
    world.settle();
    world.check();
}

#[test]
fn nothing_is_tried_again_after_an_authentication_error_until_a_reload() {
    let mut world = World::new(small());
    world.wait(Duration::ZERO);
    world.cut_wire();
    world.step(Event::Disconnected { failure: failure(false), jitter: Jitter(0) });
    world.wait(Duration::from_secs(100_000));
    assert!(matches!(world.session.link(), LinkState::Halted { .. }) && !world.up);
    world.step(Event::Reload);
    assert!(world.up);
}

#[test]
fn a_refused_volume_stays_refused_over_reconnects_and_gives_its_memory_back() {
    let mut world = World::new(small());
    world.wait(Duration::ZERO);
    world.filterd.write(1);
    world.intake();
    let problem = Problem::harmless(4004, "refused", "test", "ask");
    let volume = Some(world.volume);
    world.step(Event::Refused { volume, problem, retry: false, jitter: Jitter(0) });
    world.disconnect();
    world.wait(Duration::from_secs(60));
    let session = world.session.volume(world.volume).unwrap();
    assert_eq!((session.phase(), session.window_bytes()), (Phase::Halted, 0));
    assert_eq!(session.problem().map(|p| p.code.0), Some(4004));
    world.step(Event::Reload);
    world.settle();
    world.check();
}

#[test]
fn a_target_ahead_of_the_source_stops_the_volume() {
    let mut world = World::new(small());
    let chain = Chain::from_bytes([1; 32]);
    world.target.durable.push((at(50), chain, vec![]));
    world.restart_agent();
    let session = world.session.volume(world.volume).unwrap();
    assert_eq!(session.phase(), Phase::Halted);
    assert_eq!(session.problem().map(|p| p.code.0), Some(3011));
}

#[test]
fn a_new_generation_builds_the_window_again_and_is_kept_before_anything_is_sent() {
    let mut world = World::new(small());
    world.wait(Duration::ZERO);
    world.filterd.write(1);
    world.intake();
    world.disconnect();
    world.target.generation = 4;
    world.wait(Duration::from_secs(1));
    assert_eq!(world.memory.generation, Generation::new(4));
    world.settle();
    world.check();
    assert_eq!(world.session.volume(world.volume).unwrap().totals().rebuilds, 1);
}

#[test]
fn damaged_records_are_never_shipped_and_everything_is_copied_again() {
    let mut world = World::new(small());
    world.wait(Duration::ZERO);
    world.filterd.write(1);
    let number = world.feed.as_ref().unwrap().number;
    let problem = Problem::harmless(3014, "damaged", "test", "-");
    world.filterd.pool[5] ^= 1;
    let failure = FeedFailure::Damaged(problem);
    world.step(Event::FeedFailed { volume: world.volume, feed: number, failure });
    world.target.lost_acked = true;
    world.settle();
    world.check();
    assert_eq!(world.filterd.recopies, 1);
}
