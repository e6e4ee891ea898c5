//! The state file while a volume is attached, and what a start finds of it.

use std::io;

use farshore_extent::{Epoch, Extent, Lsn, VolumeId};

use super::layout::{
    self, Geometry, SECTOR, SUPER_AT, State, Superblock, block_at, decode_block, decode_ranges,
    encode_block, encode_ranges,
};
use super::medium::Medium;
use crate::backing::Identity;
use crate::core::{BLOCK_WORDS, IntentBlock, IntentCommit, IntentEnd, IntentLoss, RegionMap};

/// Most ranges worth keeping; beyond it whole regions are sent.
const MAX_RANGES: usize = 1 << 20;

/// The state of one volume, open for writing.
#[derive(Debug)]
pub struct StateFile<M> {
    medium: M,
    superblock: Option<Superblock>,
    /// Newest sequence number known.
    sequence: u64,
    /// Of the state that was loaded.
    loaded: Option<Geometry>,
}

/// What a start finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// The volume was never attached.
    Nothing,
    /// It cannot be believed: why.
    Damaged(String),
    /// What the last run left.
    Stored(Stored),
}

/// What the last run left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Of the volume then.
    pub geometry: Geometry,
    /// Of that run.
    pub epoch: Epoch,
    /// Of the backing: at the stop, or at that run's start when it did not stop in order.
    pub identity: Option<Identity>,
    /// How it ended.
    pub left: Left,
}

/// What may differ from the replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Left {
    /// Anything.
    Anything,
    /// Stopped in order: only these ranges, for a target that has everything up to `released`.
    Ranges {
        /// Ascending.
        ranges: Vec<Extent>,
        /// See above.
        released: Lsn,
    },
    /// Not stopped in order: only these regions, for a target that has everything up to
    /// `released`.
    Regions {
        /// The intent map.
        set: RegionMap,
        /// See above.
        released: Lsn,
        /// Blocks of the map that were torn or damaged; their regions are all set.
        damaged: usize,
    },
}

/// What a volume begins its epoch with.
#[derive(Debug, Clone)]
pub struct Begin<'a> {
    /// Of the volume now.
    pub geometry: Geometry,
    /// Of this run.
    pub epoch: Epoch,
    /// Of the backing, before the first write.
    pub identity: Option<Identity>,
    /// Covers everything that may differ for a target that has everything up to `released`.
    pub set: &'a RegionMap,
    /// See above.
    pub released: Lsn,
}

impl<M: Medium> StateFile<M> {
    /// The state on `medium`.
    pub const fn new(medium: M) -> Self {
        Self { medium, superblock: None, sequence: 0, loaded: None }
    }

    /// The medium below.
    pub const fn medium(&self) -> &M {
        &self.medium
    }

    /// The medium below.
    pub const fn medium_mut(&mut self) -> &mut M {
        &mut self.medium
    }

    /// Reads what the last run left of `volume`.
    pub fn load(&mut self, volume: VolumeId) -> Found {
        let bytes = match self.medium.read() {
            Ok(bytes) if bytes.is_empty() => return Found::Nothing,
            Ok(bytes) => bytes,
            Err(error) => return Found::Damaged(error.to_string()),
        };
        let superblock = match SUPER_AT.map(|at| superblock_at(&bytes, at)) {
            [Ok(a), Ok(b)] => {
                if a.sequence >= b.sequence {
                    a
                } else {
                    b
                }
            }
            [a, b] => {
                // What is written from now on has to be newer than the one that can be read.
                self.sequence =
                    [&a, &b].into_iter().flatten().map(|s| s.sequence).max().unwrap_or(0);
                let why = a.err().or(b.err()).unwrap_or_default();
                return Found::Damaged(format!("a superblock: {why}"));
            }
        };
        if superblock.geometry.volume != volume {
            return Found::Damaged("it belongs to another volume".into());
        }
        self.sequence = superblock.sequence;
        self.loaded = Some(superblock.geometry);
        let left = match superblock.state {
            _ if self.medium.is_doubted() => Left::Anything,
            State::AllMayDiffer => Left::Anything,
            State::Tracking => regions(&superblock.geometry, &bytes),
            State::Stopped { released, ranges_len: 0, .. } => {
                Left::Ranges { ranges: Vec::new(), released }
            }
            State::Stopped { released, ranges_len, ranges_crc } => {
                match self.ranges(&superblock.geometry, ranges_len, ranges_crc) {
                    Some(ranges) => Left::Ranges { ranges, released },
                    None => regions(&superblock.geometry, &bytes),
                }
            }
        };
        let Superblock { geometry, epoch, identity, .. } = superblock;
        Found::Stored(Stored { geometry, epoch, identity, left })
    }

    fn ranges(&self, geometry: &Geometry, len: u64, crc: u32) -> Option<Vec<Extent>> {
        let bytes = self.medium.read_ranges().ok()?;
        let intact = bytes.len() as u64 == len && crc32c::crc32c(&bytes) == crc;
        intact.then(|| decode_ranges(geometry.volume, geometry.size, &bytes)).flatten()
    }

    /// From here on the disk says that the last run has not stopped in order. Nothing may be
    /// written to the backing before.
    ///
    /// # Errors
    /// Of the medium. What it says then is what it said before, or that all may differ.
    pub fn begin(&mut self, begin: &Begin<'_>) -> io::Result<()> {
        let Begin { geometry, epoch, identity, set, released } = begin.clone();
        self.superblock = Some(Superblock {
            geometry,
            sequence: self.sequence,
            epoch,
            state: State::AllMayDiffer,
            identity,
        });
        // Until the last step a start would find what this one found. Where that could be less
        // than the new bits say, all counts.
        if self.loaded != Some(geometry) || set.count() == set.regions() {
            self.write_super(State::AllMayDiffer)?;
        }
        let blocks = (0..set.blocks()).map(|index| IntentBlock { index, words: set.block(index) });
        self.write_blocks(blocks, released)?;
        self.write_super(State::Tracking)?;
        self.medium.trust();
        Ok(())
    }

    /// The last step of an orderly stop, when the backing was flushed. `missing`: what a target
    /// that has everything up to `released` lacks; `set` covers it.
    ///
    /// # Errors
    /// Of the medium. What it says then is not less than what it said before.
    pub fn stop(
        &mut self,
        identity: Identity,
        released: Lsn,
        missing: &[Extent],
        set: &RegionMap,
    ) -> io::Result<()> {
        let blocks = (0..set.blocks()).map(|index| IntentBlock { index, words: set.block(index) });
        self.write_blocks(blocks, released)?;
        let Some(superblock) = &mut self.superblock else { return Err(not_begun()) };
        superblock.identity = Some(identity);
        if missing.is_empty() {
            return self.write_super(State::Stopped { released, ranges_len: 0, ranges_crc: 0 });
        }
        let volume = superblock.geometry.volume;
        // What is too long to be kept is damaged on purpose: then the regions count.
        let kept = if missing.len() > MAX_RANGES { &[] } else { missing };
        let bytes = encode_ranges(volume, kept);
        let ranges_crc = crc32c::crc32c(&bytes) ^ u32::from(kept.is_empty());
        self.medium.write_ranges(&bytes)?;
        let ranges_len = bytes.len() as u64;
        self.write_super(State::Stopped { released, ranges_len, ranges_crc })
    }

    /// Writes what changed of the intent map.
    pub fn commit(&mut self, commit: &IntentCommit) -> IntentEnd {
        match self.try_commit(commit) {
            Ok(()) => IntentEnd::Durable,
            Err(error) => {
                tracing::error!(%error, "the intent map cannot be kept");
                IntentEnd::Lost(self.say_that_all_may_differ())
            }
        }
    }

    fn try_commit(&mut self, commit: &IntentCommit) -> io::Result<()> {
        self.write_blocks(commit.blocks.iter().cloned(), commit.released)?;
        let superblock = self.superblock.as_mut().ok_or_else(not_begun)?;
        let grown = superblock.geometry.size != commit.size;
        superblock.geometry.size = commit.size;
        match superblock.state {
            State::Tracking if !grown => Ok(()),
            // After a loss the commit has all blocks.
            State::Tracking | State::AllMayDiffer => self.write_super(State::Tracking),
            State::Stopped { .. } => Err(not_begun()),
        }
    }

    /// One copy is enough: the newest counts.
    fn say_that_all_may_differ(&mut self) -> IntentLoss {
        let Some(superblock) = &mut self.superblock else { return IntentLoss::Nothing };
        // First: what is said on the medium may be torn by the error that is the reason.
        let doubted = self.medium.doubt().is_ok();
        superblock.state = State::AllMayDiffer;
        self.sequence += 1;
        superblock.sequence = self.sequence;
        let bytes = superblock.encode();
        let mut said = false;
        for at in SUPER_AT {
            said |= self.medium.write_at(&bytes, at).and_then(|()| self.medium.sync()).is_ok();
        }
        match (said, doubted) {
            (true, _) => {
                self.medium.trust();
                IntentLoss::AllMayDiffer
            }
            (false, true) => IntentLoss::UntilBoot,
            (false, false) => IntentLoss::Nothing,
        }
    }

    /// After a loss: whether the medium takes writes again. Costs nothing when it does not.
    pub fn works_again(&mut self) -> bool {
        self.say_that_all_may_differ() == IntentLoss::AllMayDiffer
    }

    fn write_blocks(
        &mut self,
        blocks: impl Iterator<Item = IntentBlock>,
        released: Lsn,
    ) -> io::Result<()> {
        let volume = self.superblock.as_ref().ok_or_else(not_begun)?.geometry.volume;
        // Neighbours go with one write.
        let mut run: Vec<u8> = Vec::new();
        let mut from = 0;
        for block in blocks {
            if !run.is_empty() && block_at(block.index) != from + run.len() as u64 {
                self.medium.write_at(&run, from)?;
                run.clear();
            }
            if run.is_empty() {
                from = block_at(block.index);
            }
            run.extend_from_slice(&encode_block(volume, released, &block));
        }
        if !run.is_empty() {
            self.medium.write_at(&run, from)?;
        }
        self.medium.sync()
    }

    /// One after the other: a crash leaves at least one of them whole.
    fn write_super(&mut self, state: State) -> io::Result<()> {
        let superblock = self.superblock.as_mut().ok_or_else(not_begun)?;
        superblock.state = state;
        self.sequence += 1;
        superblock.sequence = self.sequence;
        let bytes = superblock.encode();
        for at in SUPER_AT {
            self.medium.write_at(&bytes, at)?;
            self.medium.sync()?;
        }
        Ok(())
    }
}

fn not_begun() -> io::Error {
    io::Error::other("the state of the volume is not open")
}

/// Good news needs both copies: the one that cannot be read may have been the only one that could
/// be written when all had to be said to differ.
fn superblock_at(bytes: &[u8], at: u64) -> Result<Superblock, &'static str> {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    let end = at.saturating_add(SECTOR);
    Superblock::decode(bytes.get(at..end).ok_or("it is missing")?)
}

fn regions(geometry: &Geometry, bytes: &[u8]) -> Left {
    let mut set = RegionMap::new(geometry.size, geometry.region);
    let (mut released, mut damaged) = (Lsn::ZERO, 0);
    for index in 0..set.blocks() {
        let at = usize::try_from(block_at(index)).unwrap_or(usize::MAX);
        let block = bytes.get(at..at + layout::SECTOR);
        match block.and_then(|b| decode_block(geometry.volume, index, b)) {
            Some((words, reached)) => {
                set.add_block(index, &words);
                released = released.max(reached);
            }
            None => {
                set.add_block(index, &[u64::MAX; BLOCK_WORDS]);
                damaged += 1;
            }
        }
    }
    Left::Regions { set, released, damaged }
}
