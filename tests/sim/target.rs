//! The target: the real store on a simulated disk, with the answers that its daemon gives.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use farshore_changelog::{HashPurpose, RawBatch, RecordBody};
use farshore_extent::{
    BlockSizes, CaptureOrder, Epoch, Extent, Lsn, SECTOR, Seq, VolumeId, WallTime,
};
use farshore_protocol::message::{FromTarget, OpenVolume, Opened, Verdict};
use farshore_target::store::{
    AppendError, CommittedPoint, Compared, Faults, PointReader, ReadError, SimDisk, SimFaults,
    Store, StoreConfig, StoreEvent, StoreMeta,
};
use farshore_target::verdict::{Decision, FIRST_GENERATION, Position, decide};

use crate::coverage::{Coverage, Seen};
use crate::link::{Link, ToTarget};
use crate::oracle::{Content, content_of};
use crate::rng::Rng;
use crate::source::Source;

/// A digest of the source.
struct Asked {
    extent: Extent,
    digest: [u8; 32],
    verify: bool,
}

/// What the daemon keeps of one volume besides its store.
struct Replica {
    disk: SimDisk,
    /// None between a crash and the next start.
    store: Option<Store>,
    /// The newest place that was ever acknowledged.
    acked: Lsn,
    /// A batch came again: acknowledge once more.
    ack_again: bool,
    /// Digests that came over this connection and were not answered yet.
    asked: BTreeMap<Lsn, Asked>,
    /// Points that were ever reported.
    points: BTreeMap<Lsn, CommittedPoint>,
    pinned: Option<(Lsn, PointReader)>,
}

/// The target host.
pub struct Target {
    replicas: BTreeMap<VolumeId, Replica>,
    config: StoreConfig,
    faulty: bool,
    seeds: Rng,
    /// Volumes whose disk was lost: what they had acknowledged may be missing.
    lost: BTreeSet<VolumeId>,
    /// Volumes whose disk was lost once: the source may have counted more as durable.
    once_lost: BTreeSet<VolumeId>,
}

impl Target {
    pub fn new(rng: &mut Rng, faults: Faults, faulty: bool) -> Self {
        let config = StoreConfig {
            segment_bytes: 4096 * (16 + rng.below(32)),
            reserve_segments: 1,
            apply_segments: 1 + rng.index(3),
            apply_step_bytes: 512 * (1 + rng.below(64)),
            run_fanout: 2 + rng.below(3),
            merge_step: 1 + rng.index(40),
            faults,
        };
        Self {
            replicas: BTreeMap::new(),
            config,
            faulty,
            seeds: Rng::new(rng.next()),
            lost: BTreeSet::new(),
            once_lost: BTreeSet::new(),
        }
    }

    pub fn hear(&mut self, message: ToTarget, link: &mut Link) {
        match message {
            ToTarget::Open(open) => self.open(&open, link),
            ToTarget::Batch(volume, batch) => {
                let Some(replica) = self.replicas.get_mut(&volume) else { return };
                let raw = RawBatch::parse(&batch.bytes).expect("a batch that we made");
                replica.take(volume, raw, link);
            }
        }
    }

    fn open(&mut self, open: &OpenVolume, link: &mut Link) {
        if !self.replicas.contains_key(&open.volume) {
            let replica = Replica::create(open, self.config, &mut self.seeds, self.faulty);
            self.replicas.insert(open.volume, replica);
        }
        let Some(replica) = self.replicas.get_mut(&open.volume) else { return };
        replica.disconnected();
        let Some(store) = &mut replica.store else { return };
        let own = store.position();
        let source =
            Position { generation: open.generation, lsn: open.acked, chain: open.acked_chain };
        let here = Position { generation: own.generation, lsn: own.durable, chain: own.chain };
        let verdict = match decide(source, here) {
            Decision::Continue | Decision::SkipAhead => Verdict::Continue,
            Decision::RecopyLost if self.lost.contains(&open.volume) => Verdict::Recopy,
            Decision::RecopyLost | Decision::RecopyUnknownHistory => {
                panic!("the target lost what it had acknowledged: {source:?} {here:?}")
            }
            Decision::Fenced | Decision::TargetIsOld => panic!("nobody failed over"),
        };
        link.answer(FromTarget::Opened(Opened {
            volume: open.volume,
            generation: own.generation,
            durable: own.durable,
            chain: own.chain,
            verdict,
            point_interval_ms: 0,
        }));
    }

    /// One commit of every volume. False when the medium failed: the daemon has to restart.
    pub fn commit(&mut self, link: &mut Link, coverage: &mut Coverage) -> bool {
        let mut well = true;
        for (volume, replica) in &mut self.replicas {
            let Some(store) = &mut replica.store else { continue };
            if store.uncommitted_bytes() == 0 && !replica.ack_again {
                continue;
            }
            replica.ack_again = false;
            match store.commit() {
                Ok(done) => {
                    replica.acked = replica.acked.max(done.durable);
                    let message = FromTarget::Ack {
                        volume: *volume,
                        durable: done.durable,
                        chain: done.chain,
                    };
                    link.answer(message);
                    replica.note(done.events);
                }
                Err(_) => {
                    let why =
                        if replica.disk.is_down() { Seen::CrashInCommit } else { Seen::SyncFailed };
                    coverage.saw(why);
                    well = false;
                }
            }
        }
        well
    }

    pub fn disconnected(&mut self) {
        self.replicas.values_mut().for_each(Replica::disconnected);
    }

    /// Every volume compares some digests, and says what it has found.
    pub fn compare(&mut self, rng: &mut Rng, link: &mut Link, coverage: &mut Coverage) {
        for (volume, replica) in &mut self.replicas {
            if let Some(answer) = replica.compare(512 * (1 + rng.below(32)), coverage) {
                let Compared { upto, differing, .. } = answer;
                link.answer(FromTarget::Compared { volume: *volume, upto, differing });
            }
        }
    }

    /// Lets the power go a few disk operations from now.
    pub fn arm(&mut self, rng: &mut Rng) {
        for replica in self.replicas.values_mut() {
            replica.disk.crash_at(Some(replica.disk.ops() + 1 + rng.below(12)));
        }
    }

    /// The power goes, comes back, and the daemon starts; perhaps not at the first attempt.
    pub fn crash(&mut self, rng: &mut Rng, coverage: &mut Coverage) {
        for replica in self.replicas.values_mut() {
            replica.pinned = None;
            replica.disconnected();
            replica.store = None;
            replica.disk.crash();
            replica.start(rng, self.config, coverage);
        }
    }

    /// The target's disk is gone with everything on it; an empty one takes its place.
    pub fn lose_disk(&mut self, rng: &mut Rng) {
        let ids: Vec<VolumeId> = self.replicas.keys().copied().collect();
        if !ids.is_empty() {
            let id = ids[rng.index(ids.len())];
            self.replicas.remove(&id);
            self.lost.insert(id);
            self.once_lost.insert(id);
        }
    }

    /// No more faults.
    pub fn heal(&mut self, rng: &mut Rng, coverage: &mut Coverage) {
        self.faulty = false;
        for replica in self.replicas.values_mut() {
            replica.disk.set_faults(SimFaults::default());
            replica.disk.crash_at(None);
            replica.pinned = None;
            if replica.disk.is_down()
                || replica.store.as_ref().is_none_or(|s| s.poisoned().is_some())
            {
                replica.store = None;
                replica.disk.crash();
                replica.start(rng, self.config, coverage);
            }
        }
    }

    /// Expires up to a random place.
    pub fn expire(&mut self, rng: &mut Rng, coverage: &mut Coverage) -> bool {
        let mut well = true;
        for replica in self.replicas.values_mut() {
            let Some(store) = &mut replica.store else { continue };
            let at = store.position();
            let places: Vec<Lsn> = replica
                .points
                .keys()
                .copied()
                .filter(|l| *l >= at.floor && *l <= at.durable)
                .collect();
            if places.is_empty() {
                continue;
            }
            let upto = places[rng.index(places.len())];
            for _ in 0..1 + rng.below(6) {
                match store.expire(upto) {
                    Ok(progress) if progress.done => break,
                    Ok(_) => coverage.saw(Seen::Expired),
                    Err(_) => {
                        coverage.saw(if replica.disk.is_down() {
                            Seen::CrashInExpiry
                        } else {
                            Seen::SyncFailed
                        });
                        well = false;
                        break;
                    }
                }
            }
        }
        well
    }

    /// Makes runs for a while.
    pub fn merge(&mut self, rng: &mut Rng, coverage: &mut Coverage) -> bool {
        let mut well = true;
        for replica in self.replicas.values_mut() {
            let Some(store) = &mut replica.store else { continue };
            for _ in 0..1 + rng.below(20) {
                let before = store.run_size().0;
                match store.merge_runs() {
                    Ok(true) if store.run_size().0 > before => coverage.saw(Seen::RunMade),
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(_) => {
                        coverage.saw(if replica.disk.is_down() {
                            Seen::CrashInMerge
                        } else {
                            Seen::SyncFailed
                        });
                        well = false;
                        break;
                    }
                }
            }
        }
        well
    }

    /// Opens a view that stays, or compares and closes the one that is open.
    pub fn pin_or_unpin(&mut self, rng: &mut Rng, source: &Source, coverage: &mut Coverage) {
        for (volume, replica) in &mut self.replicas {
            match replica.pinned.take() {
                Some((lsn, reader)) if replica.is_well() => {
                    coverage.saw(Seen::PinnedView);
                    compare(&reader, lsn, *volume, source);
                }
                _ => {
                    if let Some(lsn) = replica.random_point(rng) {
                        replica.pinned = replica.view(lsn).map(|view| (lsn, view));
                    }
                }
            }
        }
    }

    /// Compares one kept point, or any place of an ordered stretch, with the truth.
    pub fn check_somewhere(&self, rng: &mut Rng, source: &Source, coverage: &mut Coverage) {
        for (volume, replica) in self.replicas.iter().filter(|(_, r)| r.is_well()) {
            if let Some(lsn) = replica.random_point(rng) {
                replica.check(*volume, lsn, source);
                coverage.saw(Seen::PointChecked);
                if replica.view(lsn).is_some_and(|view| view.runs() > 0) {
                    coverage.saw(Seen::PointThroughRun);
                }
            }
            if let Some(lsn) = replica.random_moment(rng) {
                replica.check(*volume, lsn, source);
                coverage.saw(Seen::MomentChecked);
                replica.check_rotten(*volume, lsn, source, rng, coverage);
            }
        }
    }

    /// Compares what every start must have kept: the newest points and some older ones.
    pub fn check_all(&self, rng: &mut Rng, source: &Source, coverage: &mut Coverage) {
        for (volume, replica) in self.replicas.iter().filter(|(_, r)| r.is_well()) {
            let kept: Vec<Lsn> = replica.kept_points().collect();
            let some = if kept.is_empty() { 0 } else { 3 };
            let old = (0..some).map(|_| kept[rng.index(kept.len())]);
            for lsn in kept.iter().rev().take(2).copied().chain(old) {
                replica.check(*volume, lsn, source);
                coverage.saw(Seen::PointChecked);
            }
        }
    }

    /// The source never counts as durable here what is not.
    pub fn check_released(&self, source: &Source) {
        for (volume, replica) in &self.replicas {
            let Some(store) = replica.store.as_ref() else { continue };
            if self.once_lost.contains(volume) {
                continue;
            }
            let (_, believed) = source.watermarks(*volume);
            let durable = store.position().durable.max(replica.acked);
            // A place of an earlier epoch is what a reader must have, in its spool perhaps.
            let of_this_run = believed.epoch == source.epoch();
            assert!(
                !of_this_run || believed <= durable,
                "released {believed}, but only {durable} is durable"
            );
        }
    }

    /// Whether every volume is in order and durable up to the last number.
    pub fn has_everything(&self, source: &Source) -> bool {
        source.disks.iter().all(|disk| {
            let store = self.replicas.get(&disk.id).and_then(|r| r.store.as_ref());
            store.is_some_and(|s| s.position().durable >= source.watermarks(disk.id).0)
                && source.order(disk.id) == CaptureOrder::Ordered
        })
    }

    /// At rest, the newest place equals the source.
    pub fn check_end(&self, source: &Source) {
        for disk in &source.disks {
            let replica = &self.replicas[&disk.id];
            let durable = replica.store.as_ref().expect("it runs").position().durable;
            let view = replica.view(durable).expect("the end of an ordered stretch can be opened");
            let image =
                read(&view).unwrap_or_else(|e| panic!("the newest place cannot be read: {e}"));
            assert!(image == disk.oracle.now(), "at rest the replica differs from the source");
        }
    }

    pub fn state(&self) -> String {
        let positions: Vec<_> =
            self.replicas.values().map(|r| r.store.as_ref().map(Store::position)).collect();
        format!("{positions:?}")
    }
}

impl Replica {
    fn create(open: &OpenVolume, config: StoreConfig, seeds: &mut Rng, faulty: bool) -> Self {
        let disk = SimDisk::new(seeds.next());
        let meta = StoreMeta {
            volume: open.volume,
            size: open.size,
            blocks: BlockSizes::E512,
            generation: FIRST_GENERATION,
            created: WallTime::default(),
        };
        let (store, _) = Store::create(Arc::new(disk.clone()), &meta, config).expect("a new store");
        if faulty {
            disk.set_faults(SimFaults { sync_fails: 12, write_fails: 4, read_fails: 0 });
        }
        Self {
            disk,
            store: Some(store),
            acked: Lsn::ZERO,
            ack_again: false,
            asked: BTreeMap::new(),
            points: BTreeMap::new(),
            pinned: None,
        }
    }

    fn take(&mut self, volume: VolumeId, raw: RawBatch<'_>, link: &mut Link) {
        let Some(store) = &mut self.store else { return };
        let batch = raw.check().expect("a batch that we made");
        match store.append(batch) {
            Ok(()) => {
                for record in batch.records() {
                    if let RecordBody::Hash { extent, purpose, digest } = record.body {
                        let lsn = Lsn::new(batch.header().epoch, record.seq);
                        let verify = purpose == HashPurpose::Verify;
                        self.asked.insert(lsn, Asked { extent, digest, verify });
                    }
                }
            }
            Err(AppendError::Duplicate { .. }) => self.ack_again = true,
            Err(
                e @ (AppendError::Gap { .. }
                | AppendError::Diverged { .. }
                | AppendError::EpochBack { .. }),
            ) => {
                link.answer(FromTarget::Reopen { volume, reason: e.to_string() });
            }
            Err(AppendError::Poisoned { .. } | AppendError::GroupFull) => {
                link.answer(FromTarget::Reopen { volume, reason: "busy".into() });
            }
            Err(e) => panic!("the store refused a good batch: {e}"),
        }
    }

    /// Nothing that waits for the daemon is of use to the next connection.
    fn disconnected(&mut self) {
        self.asked.clear();
        if let Some(store) = &mut self.store {
            store.forget_uncommitted();
            store.forget_questions();
        }
    }

    /// One step of comparing, checked against another way to read the same places.
    fn compare(&mut self, bytes: u64, coverage: &mut Coverage) -> Option<Compared> {
        let store = self.store.as_mut().filter(|_| !self.disk.is_down())?;
        let answer = store.compare(bytes)?;
        let position = store.position();
        assert!(answer.upto <= position.durable, "compared before it was durable");
        assert_eq!(answer.defects, [], "a false alarm of a verify");
        let later = self.asked.split_off(&answer.upto);
        let mut answered = std::mem::replace(&mut self.asked, later);
        answered.extend(self.asked.remove_entry(&answer.upto));
        let mut differing = answer.differing.iter();
        for (lsn, asked) in answered {
            let Ok(view) = store.open_unordered_view(lsn) else {
                // It has expired; whether it differs cannot be told any more.
                differing = answer.differing[..0].iter();
                break;
            };
            let mut bytes = vec![0; usize::try_from(asked.extent.len()).expect("tiny volumes")];
            let read = view.read_at(&mut bytes, asked.extent.offset());
            let equal = read.is_ok() && blake3::hash(&bytes) == asked.digest;
            coverage.saw(if equal { Seen::FoundEqual } else { Seen::FoundDifferent });
            assert!(equal || !asked.verify, "a verify of {} at {lsn} found a defect", asked.extent);
            if !equal {
                let said = differing.next();
                assert_eq!(said, Some(&asked.extent), "{lsn} is called equal and differs");
            }
        }
        assert_eq!(differing.next(), None, "an extent is called different and is equal");
        Some(answer)
    }

    fn start(&mut self, rng: &mut Rng, config: StoreConfig, coverage: &mut Coverage) {
        for attempt in 0..50 {
            self.disk.restart();
            if attempt < 3 && rng.chance(150) {
                self.disk.crash_at(Some(self.disk.ops() + 1 + rng.below(5)));
            }
            let opened = Store::open(Arc::new(self.disk.clone()), config);
            if self.disk.is_down() {
                coverage.saw(Seen::CrashInRecovery);
                continue;
            }
            self.disk.crash_at(None);
            let Ok((store, report)) = opened else { continue };
            if report.torn_tail.is_some() {
                coverage.saw(Seen::TornTailCut);
            }
            assert!(report.damage.is_empty(), "a crash is taken for damage: {:?}", report.damage);
            let position = store.position();
            assert!(
                position.durable >= self.acked,
                "acknowledged {} but only {} is durable",
                self.acked,
                position.durable
            );
            let mut history = Vec::new();
            let told = store.history(|event| history.push(event));
            told.expect("a journal that can be read");
            // The journal tells of points behind the base; one at the base is the catalogue's.
            let told = |l: &&Lsn| **l > position.base && **l >= position.floor && **l <= self.acked;
            for lsn in self.points.keys().filter(told) {
                let there =
                    history.iter().any(|e| matches!(e, StoreEvent::Point(p) if p.lsn == *lsn));
                assert!(there, "the point at {lsn} was forgotten by a restart");
            }
            self.store = Some(store);
            self.note(history);
            return;
        }
        panic!("the store cannot be opened");
    }

    fn note(&mut self, events: Vec<StoreEvent>) {
        for event in events {
            if let StoreEvent::Point(point) = event {
                self.points.insert(point.lsn, point);
            }
        }
    }

    fn is_well(&self) -> bool {
        !self.disk.is_down() && self.store.as_ref().is_some_and(|s| s.poisoned().is_none())
    }

    fn kept_points(&self) -> impl Iterator<Item = Lsn> {
        let position = self.store.as_ref().map(Store::position);
        let kept = move |l: &Lsn| position.is_some_and(|p| *l >= p.floor && *l <= p.durable);
        self.points.keys().copied().filter(kept)
    }

    fn random_point(&self, rng: &mut Rng) -> Option<Lsn> {
        let kept: Vec<Lsn> = self.kept_points().collect();
        (!kept.is_empty()).then(|| kept[rng.index(kept.len())])
    }

    fn random_moment(&self, rng: &mut Rng) -> Option<Lsn> {
        let store = self.store.as_ref()?;
        let position = store.position();
        let seq = Seq::new(1 + rng.below(position.durable.seq.get().max(1)));
        let durable = position.durable;
        let epochs = durable.epoch.get() - position.floor.epoch.get();
        let epoch = Epoch::new(durable.epoch.get() - rng.below(epochs.min(2) + 1));
        let lsn = Lsn::new(epoch, seq);
        (lsn >= position.floor && lsn <= durable && store.is_ordered_at(lsn)).then_some(lsn)
    }

    fn view(&self, lsn: Lsn) -> Option<PointReader> {
        self.store.as_ref()?.open_view(lsn).ok()
    }

    /// A bit of the base or its checksums rots: each sector is right or refused. Then it is as
    /// before.
    fn check_rotten(
        &self,
        volume: VolumeId,
        lsn: Lsn,
        source: &Source,
        rng: &mut Rng,
        coverage: &mut Coverage,
    ) {
        let file = if rng.chance(500) { "base.img" } else { "base.crc" };
        let len = self.disk.contents(file).map_or(0, |bytes| bytes.len() as u64);
        let (at, bit) = (rng.below(len.max(1)), 1 << rng.below(8));
        if !self.disk.rot(file, at, bit) {
            return;
        }
        let Some(view) = self.view(lsn) else { panic!("the place {lsn} cannot be opened") };
        let mut seen = Seen::RotHarmless;
        for (n, truth) in source.disk(volume).oracle.at(lsn).iter().enumerate() {
            let mut bytes = [0; 512];
            match view.read_at(&mut bytes, n as u64 * SECTOR) {
                Ok(()) => assert_eq!(content_of(&bytes), Some(*truth), "rot in sector {n}"),
                Err(ReadError::Base { .. }) => seen = Seen::RotRefused,
                Err(e) => panic!("sector {n} of the place {lsn}: {e}"),
            }
        }
        coverage.saw(seen);
        assert!(self.disk.rot(file, at, bit));
    }

    fn check(&self, volume: VolumeId, lsn: Lsn, source: &Source) {
        let store = self.store.as_ref().expect("a running store");
        match store.open_view(lsn) {
            Ok(view) => compare(&view, lsn, volume, source),
            Err(e) => panic!("the place {lsn} cannot be opened: {e}"),
        }
    }
}

fn read(view: &PointReader) -> Result<Vec<Content>, String> {
    let len = usize::try_from(view.size().get()).expect("tiny volumes");
    let mut bytes = vec![0; len];
    view.read_at(&mut bytes, 0).map_err(|e| e.to_string())?;
    let mixed = |at: usize| format!("sector {at} holds bytes of no write");
    bytes.chunks(512).enumerate().map(|(at, s)| content_of(s).ok_or_else(|| mixed(at))).collect()
}

fn compare(view: &PointReader, lsn: Lsn, volume: VolumeId, source: &Source) {
    let image = read(view).unwrap_or_else(|e| panic!("the place {lsn} cannot be read: {e}"));
    let truth = source.disk(volume).oracle.at(lsn);
    assert_eq!(image.len(), truth.len(), "the place {lsn} has another size than the source had");
    if let Some(at) = (0..truth.len()).find(|at| image[*at] != truth[*at]) {
        panic!("the place {lsn} differs at sector {at}: {} instead of {}", image[at], truth[at]);
    }
}
