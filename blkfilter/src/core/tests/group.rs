//! A group point over two hosts: acknowledgements held for one round make it a consistent cut.

use super::super::*;
use super::rig::{Rig, continues, limits, sectors};

const HOSTS: usize = 2;

struct Guest {
    host: usize,
    token: Token,
    submitted: u64,
    answered: Option<u64>,
    number: Option<u64>,
}

struct Group {
    hosts: Vec<Rig>,
    guests: Vec<Guest>,
    clock: u64,
    seed: u64,
    /// Cut: the number of each host's marker.
    cut: Vec<Option<(farshore_extent::MarkerId, u64)>>,
    broken: bool,
}

impl Group {
    fn new(seed: u64, faults: Faults) -> Self {
        let host = |_| {
            let mut rig = Rig::new(Limits { faults, ..limits() });
            rig.attach(64, 4096, continues());
            rig
        };
        let hosts = (0..HOSTS).map(host).collect();
        let cut = vec![None; HOSTS];
        Self { hosts, guests: vec![], clock: 0, seed, cut, broken: false }
    }

    fn below(&mut self, n: usize) -> usize {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        usize::try_from((self.seed >> 11) % n as u64).unwrap()
    }

    /// One write or one completion on some host.
    fn turn(&mut self) {
        self.clock += 1;
        let host = self.below(HOSTS);
        let (submitted, pick) = (self.clock, self.below(64));
        let rig = &mut self.hosts[host];
        let volume = rig.keys[0];
        if rig.running.len() < 3 && pick % 2 == 0 {
            let token = rig.write(volume, sectors(pick as u64, 1));
            self.guests.push(Guest { host, token, submitted, answered: None, number: None });
        } else if let Some(run) = rig.running.first() {
            let token = run.token;
            rig.complete(0, None);
            let number = Some(rig.core.last().seq.get());
            let guest = self.guests.iter_mut().find(|g| g.host == host && g.token == token);
            guest.unwrap().number = number;
        }
        self.note_answers();
    }

    fn note_answers(&mut self) {
        for guest in self.guests.iter_mut().filter(|g| g.answered.is_none()) {
            guest.answered = self.hosts[guest.host].answered(guest.token).then_some(self.clock);
        }
    }

    fn run(&mut self, timeout: bool) {
        for phase in 0..HOSTS {
            (0..15).for_each(|_| self.turn());
            let rig = &mut self.hosts[phase];
            let spec = rig.spec(&rig.keys.clone());
            let placed = rig.command(|core, now, out| core.hold(now, &spec, 100, out)).unwrap();
            self.cut[phase] = Some((spec.marker, placed.lsn.seq.get()));
            if timeout && phase == 0 {
                self.hosts[0].now.mono_ms += 100;
                self.hosts[0].step(Event::Tick);
            }
        }
        (0..15).for_each(|_| self.turn());
        for host in 0..HOSTS {
            let (marker, _) = self.cut[host].unwrap();
            let end =
                self.hosts[host].command(|core, now, out| core.release_hold(now, marker, out));
            self.broken |= end == HoldEnd::Broken;
        }
        (0..30).for_each(|_| self.turn());
    }

    fn consistent(&self) -> bool {
        let inside = |g: &Guest| g.number.is_some_and(|n| n <= self.cut[g.host].unwrap().1);
        let effects = self.guests.iter().filter(|g| inside(g));
        let newest = effects.map(|g| g.submitted).max().unwrap_or(0);
        self.guests.iter().all(|g| inside(g) || g.answered.is_none_or(|a| a >= newest))
    }
}

fn cuts(faults: Faults, timeout: bool) -> (usize, usize) {
    let (mut bad, mut broken) = (0, 0);
    for seed in 1..300u64 {
        let mut group = Group::new(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1, faults);
        group.run(timeout);
        bad += usize::from(!group.consistent());
        broken += usize::from(group.broken);
    }
    (bad, broken)
}

#[test]
fn a_group_marker_that_was_held_everywhere_is_a_consistent_cut_over_all_hosts() {
    assert_eq!(cuts(Faults::default(), false), (0, 0));
}

#[test]
fn a_hold_that_timed_out_says_so_because_its_cut_may_be_wrong() {
    let (bad, broken) = cuts(Faults::default(), true);
    assert_eq!(broken, 299);
    assert!(bad > 0, "the schedule shows why a broken hold must not become a point");
}

#[test]
fn the_model_finds_an_ignored_gate() {
    assert!(cuts(Faults { gate_ignored: true, ..Faults::default() }, false).0 > 0);
}

#[test]
fn the_model_finds_a_marker_before_its_gate() {
    assert!(cuts(Faults { marker_before_gate: true, ..Faults::default() }, false).0 > 0);
}
