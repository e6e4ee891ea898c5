//! A disk of the source that gets larger under its users.

use farshore_blkfilter::core::NewPart;
use farshore_extent::{CaptureOrder, Lsn};

use super::Source;
use crate::coverage::{Coverage, Seen};
use crate::oracle::Content;
use crate::rng::Rng;

/// Sectors that a disk has at most.
const MOST: usize = 160;

impl Source {
    /// A disk grows by zeroes or by whatever lay there before, and the volume takes that over.
    pub fn grow(&mut self, rng: &mut Rng, coverage: &mut Coverage) {
        let index = rng.index(self.disks.len());
        let disk = &mut self.disks[index];
        let total = disk.medium.len();
        if total >= MOST {
            return;
        }
        let more = 1 + rng.index(24);
        let old = rng.chance(600);
        let next_old = (1 << 41) + self.next_content;
        self.next_content += more as u64;
        let content: Vec<Content> = (next_old..next_old + more as u64)
            .map(|id| if old && rng.chance(700) { id } else { 0 })
            .collect();
        disk.grow(&content);
        let (id, key, size) = (disk.id, disk.key(), disk.size);
        let part = if old { NewPart::Unknown } else { NewPart::Zero };
        let ordered = self.order(id) == CaptureOrder::Ordered;
        let now = self.now();
        let mut actions = std::mem::take(&mut self.actions);
        assert_eq!(self.core.grow(now, key, size, part, &mut actions), Ok(true));
        let told = Lsn::new(self.epoch, self.core.last().seq);
        self.disks[index].oracle.append(told, content);
        self.carry_out(&mut actions, coverage);
        self.actions = actions;
        coverage.saw(Seen::Grown);
        if ordered && part == NewPart::Zero {
            assert_eq!(self.order(id), CaptureOrder::Ordered, "order was lost for nothing");
            coverage.saw(Seen::GrownInOrder);
        }
    }
}
