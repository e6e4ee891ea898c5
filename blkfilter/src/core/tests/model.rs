//! Random schedules over several volumes: the drained replica equals the disk, every payload is
//! intact, and every place in an ordered stretch is a consistent cut over all volumes.

use proptest::prelude::*;

use super::super::*;
use super::rig::{NEVER, Rig, compare_start, continues, copy_start, limits, sectors};
use crate::device::DeviceError;

const SECTORS: u64 = 24;

const VOLUMES: usize = 2;

/// A guest's request: when it was submitted and answered, in steps of the schedule.
struct Guest {
    token: Token,
    volume: usize,
    first: u64,
    count: u64,
    zero: bool,
    submitted: u64,
    answered: Option<u64>,
    failed: bool,
}

struct World {
    rig: Rig,
    guests: Vec<Guest>,
    clock: u64,
    seed: u64,
    damaged: bool,
    holds: Vec<farshore_extent::MarkerId>,
    /// Volume, from and to: numbers whose records a new copy took from the reader.
    gaps: Vec<(VolumeKey, u64, u64)>,
}

impl World {
    fn new(seed: u64, faults: Faults) -> Self {
        let mut rig = Rig::new(Limits { faults, max_records: 60, ..limits() });
        for i in 0..VOLUMES {
            let start = match (seed >> i) & 1 {
                0 => continues(),
                _ if (seed >> (i + 4)) & 1 == 0 => compare_start(),
                _ => copy_start(),
            };
            let compares = start == compare_start();
            // Small pools lose order all the time, large ones hardly ever.
            let pool = if (seed >> (i + 2)) & 1 == 0 { 32 } else { 160 };
            rig.attach(SECTORS, pool, start);
            if compares {
                // The replica has most of it.
                rig.replicas[i].image[5..].fill(0);
            }
        }
        Self { rig, guests: vec![], clock: 0, seed, damaged: false, holds: vec![], gaps: vec![] }
    }

    /// xorshift: deterministic, and one number is the whole schedule.
    fn below(&mut self, n: u64) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        (self.seed >> 11) % n
    }

    fn index(&mut self, n: usize) -> usize {
        usize::try_from(self.below(n as u64)).unwrap()
    }

    fn guest(&mut self, zero: bool) {
        let volume = self.index(VOLUMES);
        let first = self.below(SECTORS);
        let count = (self.below(6) + 1).min(SECTORS - first);
        let key = self.rig.keys[volume];
        let submitted = self.clock;
        let extent = sectors(first, count);
        let token = if zero { self.rig.zero(key, extent) } else { self.rig.write(key, extent) };
        let (answered, failed) = (None, false);
        let guest = Guest { token, volume, first, count, zero, submitted, answered, failed };
        self.guests.push(guest);
    }

    fn hold_or_release(&mut self) {
        match self.holds.pop() {
            Some(marker) => {
                self.rig.command(|core, now, out| core.release_hold(now, marker, out));
            }
            None => {
                let spec = self.rig.spec(&self.rig.keys.clone());
                if self.rig.command(|core, now, out| core.hold(now, &spec, 50, out)).is_ok() {
                    self.holds.push(spec.marker);
                }
            }
        }
    }

    fn turn(&mut self) {
        self.clock += 1;
        self.rig.now.mono_ms += self.below(3);
        let key = {
            let volume = self.index(VOLUMES);
            self.rig.keys[volume]
        };
        match self.below(100) {
            0..20 if self.rig.running.len() < 12 => self.guest(false),
            20..24 if self.rig.running.len() < 12 => self.guest(true),
            24..36 if !self.rig.running.is_empty() => {
                let index = self.index(self.rig.running.len());
                self.rig.take_effect(index);
            }
            36..60 if !self.rig.running.is_empty() => {
                let index = self.index(self.rig.running.len());
                let failed = self.below(40) == 0;
                let token = self.rig.running[index].token;
                if failed && let Some(g) = self.guests.iter_mut().find(|g| g.token == token) {
                    g.failed = true;
                }
                self.rig.complete(index, failed.then_some(DeviceError::Io));
            }
            60..74 => {
                let hole = (self.below(3) == 0).then(|| sectors(0, SECTORS));
                self.rig.copy(key, hole);
            }
            74..84 => self.damaged |= !self.rig.read(key, 9),
            84..93 => self.rig.release(key),
            93 => self.rig.release_and_lose_answers(key),
            94..96 => self.hold_or_release(),
            96 => {
                let spec = self.rig.spec(&self.rig.keys.clone());
                self.rig.command(|core, now, out| core.marker(now, &spec, out)).unwrap();
            }
            97 if self.below(4) == 0 => {
                self.rig.command(|core, now, out| core.verify(now, key, true, out)).unwrap();
            }
            97 => {
                let held = self.below(2) == 0;
                self.rig.command(|core, now, out| core.hold_copy(now, key, held, out)).unwrap();
            }
            98 if self.below(6) == 0 => {
                let reason = "asked for".to_owned();
                self.rig.command(|core, now, out| core.resync(now, key, reason, out)).unwrap();
            }
            99 if self.below(4) == 0 => {
                let reason = "asked for".to_owned();
                let from = self.rig.replicas[key.index()].after.seq.get();
                self.rig.command(|core, now, out| core.recopy(now, key, reason, out)).unwrap();
                self.gaps.push((key, from, self.rig.core.last().seq.get()));
            }
            _ => self.rig.step(Event::Tick),
        }
        for guest in self.guests.iter_mut().filter(|g| g.answered.is_none()) {
            if self.rig.answers.contains_key(&guest.token) {
                guest.answered = Some(self.clock);
            }
        }
    }

    fn run(&mut self, turns: u64) {
        for _ in 0..turns {
            self.turn();
        }
        for marker in std::mem::take(&mut self.holds) {
            self.rig.command(|core, now, out| core.release_hold(now, marker, out));
        }
        for key in self.rig.keys.clone() {
            self.rig.command(|core, now, out| core.hold_copy(now, key, false, out)).unwrap();
        }
        for _ in 0..10_000 {
            self.rig.finish_all();
            let mut busy = false;
            for key in self.rig.keys.clone() {
                self.damaged |= !self.rig.read(key, usize::MAX);
                self.rig.release(key);
                if self.rig.core.is_catching_up(key) || self.rig.status(key).verify.running {
                    self.rig.copy(key, None);
                    busy = true;
                }
                // The last answer restores order, which is a record.
                busy |= self.rig.status(key).records > 0;
            }
            if !busy && self.rig.running.is_empty() {
                break;
            }
        }
    }

    /// What is wrong, if anything.
    fn verdict(&self) -> Result<(), String> {
        if self.damaged {
            return Err("a payload was damaged or a number came twice".into());
        }
        for volume in 0..VOLUMES {
            let (image, disk) = (&self.rig.replicas[volume].image, &self.rig.disks[volume]);
            if image != disk {
                return Err(format!("volume {volume}: replica {image:?} is not disk {disk:?}"));
            }
            let status = self.rig.status(self.rig.keys[volume]);
            if status.verify.running || status.verify.differing_bytes > 0 {
                return Err(format!("volume {volume}: a false alarm, or no end: {status:?}"));
            }
            if status.pool_used != 0 || status.records != 0 || status.in_flight != 0 {
                return Err(format!("something was left behind: {status:?}"));
            }
        }
        for guest in &self.guests {
            let answer = self.rig.answers.get(&guest.token);
            if answer.is_none_or(|a| a.is_err() != guest.failed) {
                return Err(format!("request {:?} was answered {answer:?}", guest.token));
            }
        }
        for cut in &self.rig.replicas[0].cuts {
            self.check_cut(cut.0)?;
        }
        Ok(())
    }

    /// The images of all volumes at number `n`, when all were ordered there.
    fn images_at(&self, n: u64) -> Option<Vec<&Vec<u64>>> {
        let image = |volume: usize| {
            let replica = &self.rig.replicas[volume];
            let key = self.rig.keys[volume];
            if self.gaps.iter().any(|(v, from, to)| *v == key && *from < n && n < *to) {
                return None;
            }
            let newest = replica.records.iter().rev().find(|r| r.seq.get() <= n)?.seq.get();
            replica.cuts.iter().find(|(at, _)| *at == newest).map(|(_, image)| image)
        };
        (0..VOLUMES).map(image).collect()
    }

    /// Everything answered before any visible write was submitted must be visible too: no sector
    /// may hold something that is surely older.
    fn check_cut(&self, n: u64) -> Result<(), String> {
        let Some(images) = self.images_at(n) else { return Ok(()) };
        let seen = |g: &&Guest| !g.zero && images[g.volume].contains(&g.token.0);
        let Some(newest) = self.guests.iter().filter(seen).map(|g| g.submitted).max() else {
            return Ok(());
        };
        let must = |g: &&Guest| !g.failed && g.answered.is_some_and(|a| a < newest);
        for cause in self.guests.iter().filter(must) {
            for sector in cause.first..cause.first + cause.count {
                let held = images[cause.volume][usize::try_from(sector).unwrap()];
                if self.surely_older(held, cause, sector) {
                    return Err(format!(
                        "cut {n}: sector {sector} of volume {} holds {held}, but {:?} was answered before a visible write",
                        cause.volume, cause.token
                    ));
                }
            }
        }
        Ok(())
    }

    /// Whether the content of a sector can only have been there before `cause`.
    fn surely_older(&self, held: u64, cause: &Guest, sector: u64) -> bool {
        if held == NEVER {
            return true;
        }
        let covers =
            |g: &&Guest| g.volume == cause.volume && (g.first..g.first + g.count).contains(&sector);
        let mut makers = self
            .guests
            .iter()
            .filter(covers)
            .filter(|g| if held == 0 { g.zero } else { g.token.0 == held });
        // Zero is also the initial content, which is older than everything.
        !makers.any(|g| g.answered.is_none_or(|a| a >= cause.submitted))
    }
}

fn run(seed: u64, faults: Faults) -> Result<(), String> {
    let mut world = World::new(seed | 1 << 40, faults);
    world.run(400);
    world.verdict()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn any_schedule_ends_equal_and_every_ordered_place_is_a_consistent_cut(seed in 0u64..1 << 40) {
        prop_assert_eq!(run(seed, Faults::default()), Ok(()));
    }
}

/// The checker counts only when it finds what is planted.
fn finds(faults: Faults) -> bool {
    (0..400).any(|seed| {
        let seed = 0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(seed + 1);
        let found = std::panic::catch_unwind(|| run(seed & ((1 << 40) - 1), faults).is_err());
        found.unwrap_or(true)
    })
}

#[test]
fn the_model_finds_a_missing_range_lock() {
    assert!(finds(Faults { no_range_lock: true, ..Faults::default() }));
}

#[test]
fn the_model_finds_numbers_taken_before_the_backing() {
    assert!(finds(Faults { number_before_backing: true, ..Faults::default() }));
}

#[test]
fn the_model_finds_a_copy_without_the_lock() {
    assert!(finds(Faults { copy_without_lock: true, ..Faults::default() }));
}

#[test]
fn the_model_finds_a_bit_cleared_before_the_read_is_recorded() {
    assert!(finds(Faults { clear_bit_before_read_recorded: true, ..Faults::default() }));
}

#[test]
fn the_model_finds_answers_that_a_write_has_overtaken() {
    assert!(finds(Faults { touched_chunk_is_answered: true, ..Faults::default() }));
}

#[test]
fn the_model_finds_lost_answers_taken_for_equal() {
    assert!(finds(Faults { lost_answer_is_equal: true, ..Faults::default() }));
}

#[test]
fn the_model_finds_room_used_again_before_its_release() {
    assert!(finds(Faults { reuse_pool_before_release: true, ..Faults::default() }));
}
