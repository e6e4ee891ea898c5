//! `filterd` and target as small as they can be, and a world in which everything can break.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use farshore_blkfilter::control::{CompareAnswer, Descriptor, DescriptorBody, PoolPlace};
use farshore_changelog::{EncodedBatch, RawBatch, RecordBody};
use farshore_extent::{
    BlockSizes, Chain, Epoch, Extent, Generation, Lsn, Problem, Seq, VolumeId, VolumeName,
    VolumeSize, WallTime,
};
use farshore_protocol::message::{OpenVolume, Opened, Verdict};

use super::super::*;
use crate::batch::{Feed, FeedOptions};

/// Numbers with their count of pieces, behind the place and chain of their batch.
pub(super) type Entry = (Lsn, Chain, Vec<(u64, usize)>);

pub(super) const EPOCH: Epoch = Epoch::new(3);

pub(super) fn at(seq: u64) -> Lsn {
    Lsn::new(EPOCH, Seq::new(seq))
}

pub(super) fn facts(volume: VolumeId) -> VolumeFacts {
    VolumeFacts {
        volume,
        name: VolumeName::new("disk").unwrap(),
        size: VolumeSize::new(1 << 30).unwrap(),
        blocks: BlockSizes::E512,
        point_interval_ms: None,
    }
}

pub(super) fn failure(retry: bool) -> LinkFailure {
    LinkFailure { problem: Problem::harmless(5002, "no connection", "test", "wait"), retry }
}

/// `filterd` as the agent sees it. A record's payload is its number, so that the target can
/// prove what it got.
#[derive(Default)]
pub(super) struct Filterd {
    pub(super) records: BTreeMap<u64, Vec<Descriptor>>,
    /// Pieces of every write there ever was.
    pub(super) writes: BTreeMap<u64, usize>,
    pub(super) pool: Vec<u8>,
    pub(super) next: u64,
    pub(super) released: u64,
    pub(super) recopies: u32,
    /// Digests without an answer: number, and whether the target must say that they differ.
    pub(super) asked: BTreeMap<u64, bool>,
    pub(super) answered: u32,
}

/// The extent of the digest with this number.
fn digested(number: u64) -> Extent {
    Extent::new(number * 4096, 4096).unwrap()
}

impl Filterd {
    /// One digest.
    pub(super) fn ask(&mut self, differs: bool) {
        let (extent, digest) = (digested(self.next + 1), [u8::from(differs); 32]);
        self.append(DescriptorBody::Hash { extent, verify: false, digest });
        self.asked.insert(self.next, differs);
    }

    fn compared(&mut self, upto: Lsn, answer: &CompareAnswer) {
        let later = self.asked.split_off(&(upto.seq.get() + 1));
        let over = std::mem::replace(&mut self.asked, later);
        for (number, differs) in over {
            match answer {
                CompareAnswer::Differing(extents) => {
                    self.answered += 1;
                    assert_eq!(extents.contains(&digested(number)), differs, "{number}");
                }
                CompareAnswer::Lost => self.ask(differs),
            }
        }
    }

    pub(super) fn append(&mut self, body: DescriptorBody) {
        self.next += 1;
        let seq = Seq::new(self.next);
        self.records.entry(self.next).or_default().push(Descriptor {
            seq,
            time: WallTime::from_nanos(1),
            body,
        });
    }

    /// One write, recorded in `parts` pieces with one number.
    pub(super) fn write(&mut self, parts: u64) {
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

    pub(super) fn recopy(&mut self) {
        self.recopies += 1;
        self.records.clear();
        self.asked.clear();
        self.append(DescriptorBody::OrderLost);
        self.write(3);
        self.append(DescriptorBody::OrderRestored);
    }

    pub(super) fn release(&mut self, upto: Lsn) {
        if upto.epoch == EPOCH {
            self.released = self.released.max(upto.seq.get());
            self.records.retain(|seq, _| *seq > upto.seq.get());
        }
    }
}

/// The target: durable history and what was received since.
#[derive(Default)]
pub(super) struct Target {
    pub(super) generation: u64,
    /// `(last, chain)` of every durable batch, and the numbers (with pieces) it holds.
    pub(super) durable: Vec<Entry>,
    pub(super) volatile: Vec<Entry>,
    pub(super) open: bool,
    pub(super) reopens: u32,
    pub(super) acked: Lsn,
    /// Digests that came over this connection: where, and whether they differ.
    pub(super) questions: BTreeMap<u64, (Extent, bool)>,
    /// Numbers the source released without an acknowledgement would show here.
    pub(super) lost_acked: bool,
}

impl Target {
    pub(super) fn end(&self) -> (Lsn, Chain) {
        let last = self.volatile.last().or(self.durable.last());
        last.map_or((Lsn::ZERO, Chain::EMPTY), |(lsn, chain, _)| (*lsn, *chain))
    }

    pub(super) fn durable_end(&self) -> (Lsn, Chain) {
        self.durable.last().map_or((Lsn::ZERO, Chain::EMPTY), |(lsn, chain, _)| (*lsn, *chain))
    }

    pub(super) fn disconnect(&mut self) {
        self.open = false;
        self.questions.clear();
    }

    /// Compares the digests that are durable.
    fn judge(&mut self) -> Option<(Lsn, Vec<Extent>)> {
        let upto = self.durable_end().0;
        let later = self.questions.split_off(&(upto.seq.get() + 1));
        let over = std::mem::replace(&mut self.questions, later);
        let differing = over.values().filter(|q| q.1).map(|q| q.0).collect();
        (!over.is_empty()).then_some((upto, differing))
    }

    pub(super) fn open(&mut self, open: &OpenVolume) -> Opened {
        // Whatever was received is either durable by now or forgotten.
        self.volatile.clear();
        self.questions.clear();
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
    pub(super) fn receive(&mut self, batch: &EncodedBatch) -> bool {
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
            if let RecordBody::Hash { extent, digest, .. } = record.body {
                self.questions.insert(record.seq.get(), (extent, digest[0] == 1));
            }
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

    pub(super) fn make_durable(&mut self, count: usize) -> Option<(Lsn, Chain)> {
        let count = count.min(self.volatile.len());
        self.durable.extend(self.volatile.drain(..count));
        (count > 0 && self.open).then(|| {
            let end = self.durable_end();
            self.acked = self.acked.max(end.0);
            end
        })
    }
}

pub(super) struct Intake {
    pub(super) number: u64,
    pub(super) feed: Feed,
    pub(super) recopy: Option<String>,
    pub(super) pending: VecDeque<Descriptor>,
}

pub(super) struct World {
    pub(super) session: Session,
    pub(super) now: Duration,
    pub(super) filterd: Filterd,
    pub(super) target: Target,
    pub(super) volume: VolumeId,
    pub(super) feed: Option<Intake>,
    pub(super) pulls: u32,
    pub(super) wire: VecDeque<Arc<EncodedBatch>>,
    /// Answers about digests on their way back.
    pub(super) answers: VecDeque<(Lsn, Vec<Extent>)>,
    pub(super) up: bool,
    pub(super) memory: VolumeMemory,
    pub(super) options: FeedOptions,
    pub(super) config: SessionConfig,
    pub(super) history_may_break: bool,
    pub(super) events: VecDeque<Event>,
    pub(super) busy: bool,
}

impl World {
    pub(super) fn new(config: SessionConfig) -> Self {
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
            answers: VecDeque::new(),
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

    pub(super) fn add_volume(&mut self) {
        let (captured, released) = (at(self.filterd.next), at(self.filterd.released));
        let (facts, memory) = (facts(self.volume), self.memory);
        self.step(Event::VolumeAdded { facts, memory, captured, released });
    }

    pub(super) fn step(&mut self, event: Event) {
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

    pub(super) fn execute(&mut self, action: Action) {
        match action {
            Action::Connect => {
                self.up = true;
                self.step(Event::Connected);
            }
            Action::Disconnect { .. } => self.cut_wire(),
            Action::SendOpen(open) => {
                // Everything sent before arrives before.
                self.deliver(usize::MAX);
                self.hear();
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
            Action::Compared { upto, answer, .. } => {
                let durable = self.target.durable_end().0;
                assert!(upto <= durable || self.history_may_break, "{upto} is not durable");
                self.filterd.compared(upto, &answer);
            }
        }
    }

    /// The intake thread: answers one pull.
    pub(super) fn intake(&mut self) {
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

    pub(super) fn deliver(&mut self, count: usize) {
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

    pub(super) fn sync(&mut self, count: usize) {
        if let Some((durable, chain)) = self.target.make_durable(count)
            && self.up
        {
            self.step(Event::Ack { volume: self.volume, durable, chain });
        }
    }

    pub(super) fn judge(&mut self) {
        if self.up && self.target.open {
            self.answers.extend(self.target.judge());
        }
    }

    pub(super) fn hear(&mut self) {
        for (upto, differing) in std::mem::take(&mut self.answers) {
            self.step(Event::Compared { volume: self.volume, upto, differing });
        }
    }

    pub(super) fn cut_wire(&mut self) {
        self.up = false;
        self.wire.clear();
        self.answers.clear();
        self.target.disconnect();
    }

    pub(super) fn disconnect(&mut self) {
        if self.up {
            self.cut_wire();
            self.step(Event::Disconnected { failure: failure(true), jitter: Jitter(7) });
        }
    }

    pub(super) fn restart_agent(&mut self) {
        self.cut_wire();
        self.session = Session::new(self.config);
        self.feed = None;
        self.pulls = 0;
        self.add_volume();
    }

    pub(super) fn wait(&mut self, time: Duration) {
        self.now += time;
        self.step(Event::Tick);
    }

    pub(super) fn settle(&mut self) {
        for _ in 0..10_000 {
            self.wait(Duration::from_secs(1));
            self.intake();
            self.deliver(usize::MAX);
            self.sync(usize::MAX);
            self.judge();
            self.hear();
            let answered = self.filterd.asked.is_empty();
            let done = self.target.durable_end().0 == at(self.filterd.next) && answered;
            if (done || self.filterd.next == 0) && self.session.is_drained() {
                return;
            }
        }
        panic!("the target never got everything");
    }

    /// Every write exactly once and in order, with all its pieces.
    pub(super) fn check(&self) {
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
