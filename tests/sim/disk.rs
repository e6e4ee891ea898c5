//! A volume of the source: a medium behind a volatile cache, the pool, and the state file on a disk
//! of its own that tears what was not synced.

use std::io;

use farshore_blkfilter::backing::{FileIdentity, Identity};
use farshore_blkfilter::core::{
    IntentCommit, IntentEnd, IntentLoss, PoolSlot, RegionMap, Start, VolumeKey,
};
use farshore_blkfilter::volume_state::{
    Begin, Found, Geometry, Left, Medium, Plan, StateFile, plan,
};
use farshore_extent::{BlockSizes, Epoch, Extent, ExtentSet, Lsn, SECTOR, VolumeId, VolumeSize};

use crate::coverage::{Coverage, Seen};
use crate::oracle::{Content, Oracle, sectors};
use crate::rng::Rng;

/// Two chunks.
const REGION: u64 = 4096;

/// A write that the medium may still forget.
pub struct Unflushed {
    pub id: u64,
    pub first: usize,
    /// None: something newer is durable there.
    pub content: Vec<Option<Content>>,
    pub completed: bool,
}

/// A volume of the source, and what is true of it.
pub struct Disk {
    pub id: VolumeId,
    pub size: VolumeSize,
    pub oracle: Oracle,
    pub medium: Vec<Content>,
    /// What a power cut leaves for sure.
    kept: Vec<Content>,
    /// In the order in which they reached the medium.
    pub cache: Vec<Unflushed>,
    pub pool: Vec<u8>,
    pub key: Option<VolumeKey>,
    pub copying: bool,
    pub copy_wanted: bool,
    pub intent_wanted: bool,
    /// Taken and not written yet.
    pub commit: Option<IntentCommit>,
    pub lost: bool,
    pub cap: u64,
    state: StateFile<StateDisk>,
    /// Bits were cleared on disk since the start.
    cleared: bool,
    /// As last written.
    written: RegionMap,
}

impl Disk {
    pub fn new(rng: &mut Rng) -> Self {
        let total = 24 + rng.below(72);
        let size = VolumeSize::new(total * SECTOR).expect("sectors");
        let mut id = [0; 16];
        id[..8].copy_from_slice(&rng.next().to_le_bytes());
        let old = rng.chance(500);
        let image: Vec<Content> =
            (0..total).map(|s| if old && rng.chance(700) { (1 << 40) + s } else { 0 }).collect();
        let pool = (24 << 10) + if rng.chance(300) { rng.below(32) << 10 } else { 512 << 10 };
        Self {
            id: VolumeId::from_bytes(id),
            size,
            oracle: Oracle::new(image.clone()),
            medium: image.clone(),
            kept: image,
            cache: Vec::new(),
            pool: vec![0; usize::try_from(pool).expect("small")],
            key: None,
            copying: false,
            copy_wanted: true,
            intent_wanted: true,
            commit: None,
            lost: false,
            cap: 1 + rng.below(6),
            state: StateFile::new(StateDisk::default()),
            cleared: false,
            written: RegionMap::full(size, REGION),
        }
    }

    /// What lies behind the old end is durable, whoever wrote it.
    pub fn grow(&mut self, content: &[Content]) {
        self.medium.extend_from_slice(content);
        self.kept.extend_from_slice(content);
        self.size = VolumeSize::new(self.medium.len() as u64 * SECTOR).expect("sectors");
        self.written.grow(self.size);
    }

    pub fn key(&self) -> VolumeKey {
        self.key.expect("attached at the start")
    }

    fn place(slot: PoolSlot) -> std::ops::Range<usize> {
        let start = usize::try_from(slot.offset()).expect("small");
        start..start + slot.len() as usize
    }

    pub fn pool_mut(&mut self, slot: PoolSlot) -> &mut [u8] {
        &mut self.pool[Self::place(slot)]
    }

    pub fn pool_bytes(&self, slot: PoolSlot) -> &[u8] {
        &self.pool[Self::place(slot)]
    }

    /// Writes that a flush that begins now makes durable.
    pub fn completed_writes(&self) -> Vec<u64> {
        self.cache.iter().filter(|w| w.completed).map(|w| w.id).collect()
    }

    pub fn completed(&mut self, ids: &[u64], durable: bool) {
        for write in self.cache.iter_mut().filter(|w| ids.contains(&w.id)) {
            write.completed = true;
        }
        if durable {
            self.flushed(ids);
        }
    }

    pub fn flushed(&mut self, ids: &[u64]) {
        let mut newer: Vec<usize> = Vec::new();
        let mut left = Vec::new();
        for mut write in std::mem::take(&mut self.cache).into_iter().rev() {
            for (sector, content) in (write.first..).zip(&mut write.content) {
                if newer.contains(&sector) {
                    *content = None;
                } else if let Some(content) = content.filter(|_| ids.contains(&write.id)) {
                    self.kept[sector] = content;
                    newer.push(sector);
                }
            }
            if !ids.contains(&write.id) {
                left.push(write);
            }
        }
        left.reverse();
        self.cache = left;
    }

    /// What is not durable may be lost; without power that is so for the cache of the medium too.
    pub fn crash(&mut self, rng: &mut Rng, power: bool, coverage: &mut Coverage) {
        if self.cleared {
            coverage.saw(Seen::CrashAfterClear);
        }
        let state = self.state.medium_mut();
        if let Some(commit) = self.commit.take()
            && power
            && rng.chance(500)
        {
            // The power goes while the commit is being written.
            state.cut_after = Some(rng.below(2));
            let _ = self.state.commit(&commit);
        }
        self.state.medium_mut().crash(rng, power);
        if power {
            coverage.saw(Seen::PowerCut);
            self.medium.clone_from(&self.kept);
            for write in std::mem::take(&mut self.cache) {
                for (sector, content) in (write.first..).zip(write.content) {
                    if let Some(content) = content.filter(|_| rng.chance(500)) {
                        self.medium[sector] = content;
                    }
                }
            }
            self.kept.clone_from(&self.medium);
        } else {
            self.cache.iter_mut().for_each(|write| write.completed = true);
        }
    }

    fn identity(&self) -> Identity {
        let ino = u64::from_le_bytes(self.id.to_bytes()[..8].try_into().expect("eight"));
        let size = self.size.get();
        Identity::File(FileIdentity { dev: 1, ino, size, mtime_ns: 0, ctime_ns: 0 })
    }

    /// `missing` of `None`: something without a place is missing.
    pub fn stop(
        &mut self,
        released: Lsn,
        missing: Option<Vec<Extent>>,
        set: &RegionMap,
        coverage: &mut Coverage,
    ) {
        self.commit = None;
        self.state.medium_mut().heal();
        let all = self.cache.iter().map(|w| w.id).collect::<Vec<_>>();
        self.flushed(&all);
        let Some(missing) = missing else { return };
        let how =
            if missing.is_empty() { Seen::StoppedWithNothingLeft } else { Seen::StoppedWithRanges };
        coverage.saw(how);
        let identity = self.identity();
        self.state.stop(identity, released, &missing, set).expect("a well state disk");
    }

    /// Reads the state file as a new run does, proves that what it leaves out is the same on the
    /// medium and with the target, and begins.
    pub fn begin(&mut self, rng: &mut Rng, epoch: Epoch, coverage: &mut Coverage) -> Plan {
        loop {
            let medium = std::mem::take(self.state.medium_mut());
            self.state = StateFile::new(medium);
            let geometry = Geometry {
                volume: self.id,
                size: self.size,
                blocks: BlockSizes::E512,
                region: REGION,
            };
            let found = self.state.load(self.id);
            if let Found::Stored(stored) = &found
                && let Left::Regions { damaged: 1.., .. } = stored.left
            {
                coverage.saw(Seen::TornIntentBlock);
            }
            let plan = plan(&found, &geometry, Some(&self.identity()));
            self.check(&plan, coverage);
            let cut = epoch > Epoch::new(1) && rng.chance(100);
            self.state.medium_mut().cut_after = cut.then(|| rng.below(6));
            let identity = Some(self.identity());
            let begin =
                Begin { geometry, epoch, identity, set: &plan.set, released: plan.released };
            let begun = self.state.begin(&begin);
            if begun.is_ok() {
                self.state.medium_mut().cut_after = None;
                (self.lost, self.cleared, self.commit) = (false, false, None);
                self.written = plan.set.clone();
                return plan;
            }
            coverage.saw(Seen::CrashInBegin);
            self.state.medium_mut().crash(rng, true);
        }
    }

    /// What will not be sent again is on the medium as a target has it that has everything up to
    /// the place that the state file names.
    fn check(&self, plan: &Plan, coverage: &mut Coverage) {
        let again: ExtentSet = match &plan.start {
            Start::Copy { .. } | Start::Compare { .. } => return,
            Start::Continues { .. } => ExtentSet::new(),
            Start::CopyPart { ranges, .. } => {
                coverage.saw(Seen::CopiedInPart);
                ranges.iter().copied().collect()
            }
        };
        let there = self.oracle.at(plan.released);
        for sector in 0..self.size.get() / SECTOR {
            let extent = Extent::new(sector * SECTOR, SECTOR).expect("a sector");
            let at = sectors(extent).start;
            // The start tells the size of now: what a smaller replica gets reads as zeroes.
            let with_target = there.get(at).copied().unwrap_or(0);
            assert!(
                again.overlaps(extent) || self.medium[at] == with_target,
                "sector {sector} differs from the replica and is in no region that is set: {:?}",
                plan.start
            );
        }
    }

    /// Writes a commit; sometimes the state disk refuses.
    pub fn write_intent(
        &mut self,
        commit: &IntentCommit,
        rng: &mut Rng,
        coverage: &mut Coverage,
    ) -> IntentEnd {
        if rng.chance(5) {
            self.state.medium_mut().broken = true;
        }
        let end = self.state.commit(commit);
        match end {
            IntentEnd::Durable => {
                for block in &commit.blocks {
                    let before = self.written.count();
                    self.written.keep_in_block(block.index, &block.words);
                    if self.written.count() < before {
                        coverage.saw(Seen::RegionCleared);
                        self.cleared = true;
                    }
                    self.written.add_block(block.index, &block.words);
                }
            }
            IntentEnd::Lost(loss) => {
                assert_eq!(loss, IntentLoss::AllMayDiffer, "only the blocks cannot be written");
                coverage.saw(Seen::IntentLost);
                self.lost = true;
            }
        }
        end
    }

    /// Whether the map may be kept again.
    pub fn works_again(&mut self, rng: &mut Rng) -> bool {
        if rng.chance(500) {
            self.heal();
        }
        if self.state.works_again() {
            self.lost = false;
        }
        !self.lost
    }

    pub fn heal(&mut self) {
        self.state.medium_mut().heal();
    }
}

/// The disk that the state file is on: keeps what was synced; of the rest any sector, or a part.
#[derive(Default)]
pub struct StateDisk {
    bytes: Vec<u8>,
    unsynced: Vec<(usize, Vec<u8>)>,
    ranges: Vec<u8>,
    /// The power goes after so many more writes and syncs.
    pub cut_after: Option<u64>,
    /// Blocks of bits cannot be written, superblocks can.
    pub broken: bool,
}

impl StateDisk {
    fn heal(&mut self) {
        (self.cut_after, self.broken) = (None, false);
    }

    fn put(&mut self, at: usize, sector: &[u8]) {
        let end = at + sector.len();
        self.bytes.resize(self.bytes.len().max(end), 0);
        self.bytes[at..end].copy_from_slice(sector);
    }

    fn crash(&mut self, rng: &mut Rng, power: bool) {
        self.heal();
        for (at, sector) in std::mem::take(&mut self.unsynced) {
            match rng.below(5) {
                0 if power => {}
                // Between the head and the checksum of a block of bits.
                1 | 2 if power => self.put(at, &sector[..25 + rng.index(24)]),
                _ => self.put(at, &sector),
            }
        }
    }

    fn step(&mut self) -> io::Result<()> {
        match &mut self.cut_after {
            Some(0) => Err(io::Error::other("the power is off")),
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Medium for StateDisk {
    fn read(&self) -> io::Result<Vec<u8>> {
        Ok(self.bytes.clone())
    }

    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.step()?;
        if self.broken && offset >= 8192 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let at = usize::try_from(offset).expect("small");
        for (index, sector) in bytes.chunks(512).enumerate() {
            self.unsynced.push((at + index * 512, sector.to_vec()));
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.step()?;
        for (at, sector) in std::mem::take(&mut self.unsynced) {
            self.put(at, &sector);
        }
        Ok(())
    }

    fn read_ranges(&self) -> io::Result<Vec<u8>> {
        Ok(self.ranges.clone())
    }

    fn write_ranges(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.step()?;
        self.ranges = bytes.to_vec();
        Ok(())
    }
}
