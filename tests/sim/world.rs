//! One seed: a source host, an agent, a link and a target, and everything that can go wrong
//! between them, in an order that the seed decides.

use std::sync::Arc;

use crate::agent::{Agent, Memory, Spools};
use crate::coverage::{Coverage, Seen};
use crate::link::{Link, ToTarget};
use crate::rng::Rng;
use crate::source::Source;
use crate::spool::SimSpool;
use crate::target::Target;

/// Deliberate defects in each part; none by default.
#[derive(Debug, Clone, Copy, Default)]
pub struct Planted {
    pub core: farshore_blkfilter::core::Faults,
    pub session: farshore_agent::session::Faults,
    pub spool: farshore_agent::spool::SpoolFaults,
    pub store: farshore_target::store::Faults,
}

/// How often things go wrong in this seed, in permille of the steps.
struct Weather {
    steps: u64,
    cut: u64,
    agent_crash: u64,
    source_crash: u64,
    host_crash: u64,
    source_restart: u64,
    target_crash: u64,
    disk_lost: u64,
    faulty_disk: bool,
    expiry: u64,
    merge: u64,
    grow: u64,
}

impl Weather {
    fn of(rng: &mut Rng) -> Self {
        let mut rate =
            |often: u64, max: u64| if rng.chance(often) { 1 + rng.below(max) } else { 0 };
        Self {
            cut: rate(600, 6),
            agent_crash: rate(400, 3),
            source_crash: rate(400, 4),
            source_restart: rate(300, 20),
            host_crash: rate(300, 2),
            target_crash: rate(600, 5),
            disk_lost: rate(50, 1),
            expiry: rate(600, 12),
            merge: rate(700, 120),
            grow: rate(300, 4),
            faulty_disk: rate(500, 1) > 0,
            steps: 800 + rate(1000, 2400),
        }
    }
}

/// Runs one seed to its end.
///
/// # Panics
/// When any promise is broken; the message names it.
pub fn run(seed: u64, planted: Planted) -> Coverage {
    let mut rng = Rng::new(seed);
    let weather = Weather::of(&mut rng);
    let mut world = World::new(&mut rng, planted, weather.faulty_disk);
    for _ in 0..weather.steps {
        world.step(&mut rng, &weather);
    }
    world.drain(&mut rng);
    if rng.chance(300) {
        // Nothing is left: an orderly stop now must go on without a gap.
        world.source.restart(&mut rng, &mut world.coverage);
        world.drain(&mut rng);
    }
    world.coverage
}

struct World {
    planted: Planted,
    source: Source,
    agent: Agent,
    memory: Memory,
    spools: Spools,
    link: Link,
    was_up: bool,
    target: Target,
    coverage: Coverage,
}

impl World {
    fn new(rng: &mut Rng, planted: Planted, faulty_disk: bool) -> Self {
        let source = Source::new(rng, planted.core);
        let memory = Memory::new();
        let faulty = rng.chance(300);
        let spools: Spools =
            source.disks.iter().map(|d| (d.id, SimSpool::new(rng, faulty))).collect();
        let faults = (planted.session, planted.spool);
        let agent = Agent::new(rng, faults, &memory, &source, &spools);
        let target = Target::new(rng, planted.store, faulty_disk);
        Self {
            planted,
            source,
            agent,
            memory,
            spools,
            link: Link::default(),
            was_up: false,
            target,
            coverage: Coverage::default(),
        }
    }

    fn step(&mut self, rng: &mut Rng, weather: &Weather) {
        self.source.pass(rng.below(8));
        if rng.chance(weather.cut) {
            self.coverage.saw(Seen::LinkCut);
            self.link.cut();
            self.link.outage = rng.chance(300);
        }
        if self.link.outage && rng.chance(60) {
            self.link.outage = false;
        }
        if rng.chance(weather.agent_crash) {
            self.crash_agent(rng);
        }
        if rng.chance(weather.source_crash) {
            self.source.crash(rng, &mut self.coverage);
            // The agent sees another epoch and pool; its feeds go on from their places.
        }
        if rng.chance(weather.host_crash) {
            if rng.chance(500) {
                self.crash_host(rng);
            } else {
                self.spools.values().for_each(|spool| spool.arm(rng));
            }
        }
        if rng.chance(weather.source_restart) {
            self.source.restart(rng, &mut self.coverage);
        }
        if rng.chance(weather.target_crash) {
            if rng.chance(600) {
                self.target.arm(rng);
            } else {
                self.crash_target(rng);
            }
        }
        if rng.chance(weather.disk_lost) {
            self.link.cut();
            self.notice_the_link();
            self.target.lose_disk(rng);
        }
        if rng.chance(weather.expiry) && !self.target.expire(rng, &mut self.coverage) {
            self.crash_target(rng);
        }
        if rng.chance(weather.merge) && !self.target.merge(rng, &mut self.coverage) {
            self.crash_target(rng);
        }
        if rng.chance(weather.grow) {
            self.source.grow(rng, &mut self.coverage);
        }
        self.work(rng, true);
        if rng.chance(20) {
            self.target.check_somewhere(rng, &self.source, &mut self.coverage);
        }
        if rng.chance(10) {
            self.target.pin_or_unpin(rng, &self.source, &mut self.coverage);
        }
    }

    fn crash_agent(&mut self, rng: &mut Rng) {
        self.coverage.saw(Seen::AgentCrash);
        self.link.cut();
        self.was_up = false;
        let faults = (self.planted.session, self.planted.spool);
        self.agent = Agent::new(rng, faults, &self.memory, &self.source, &self.spools);
    }

    /// The source host loses power: pool and agent are gone, the spool keeps what was synced.
    fn crash_host(&mut self, rng: &mut Rng) {
        self.coverage.saw(Seen::HostCrash);
        self.source.crash(rng, &mut self.coverage);
        self.spools.values().for_each(SimSpool::power_cycle);
        self.crash_agent(rng);
    }

    fn crash_target(&mut self, rng: &mut Rng) {
        self.coverage.saw(Seen::TargetCrash);
        self.link.cut();
        self.target.crash(rng, &mut self.coverage);
        self.target.check_all(rng, &self.source, &mut self.coverage);
    }

    /// Everybody who has something to do may do a little of it.
    fn work(&mut self, rng: &mut Rng, guests: bool) {
        match rng.below(20) {
            0..=2 if guests => self.source.guest(rng, &mut self.coverage),
            0..=7 => self.source.backing(rng, &mut self.coverage),
            8..=9 => self.source.copy(rng, &mut self.coverage),
            10 => {
                if rng.chance(300) {
                    self.source.marker(rng, &mut self.coverage);
                } else if rng.chance(150) {
                    self.source.hold_or_release(rng, &mut self.coverage);
                } else if rng.chance(30) {
                    self.source.verify(rng, &mut self.coverage);
                } else {
                    self.source.tick(&mut self.coverage);
                }
            }
            11 => self.agent.tick(&self.source),
            12..=13 => {
                let (source, link) = (&mut self.source, &self.link);
                self.agent.feed(rng, source, link, &mut self.coverage);
                if self.spools.values().any(SimSpool::is_down) {
                    self.crash_host(rng);
                }
            }
            14..=15 => self.deliver(rng),
            16..=17 => self.source.keep_intent(rng, &mut self.coverage),
            _ => self.target_works(rng),
        }
        self.source.check_medium();
        self.notice_the_link();
        let (source, link) = (&mut self.source, &mut self.link);
        self.agent.act(source, link, &mut self.memory, &mut self.coverage);
        self.target.check_released(&self.source);
        self.notice_the_link();
    }

    fn notice_the_link(&mut self) {
        if self.was_up && !self.link.is_up() {
            self.agent.disconnected(&self.source);
            self.target.disconnected();
        }
        self.was_up = self.link.is_up();
    }

    fn deliver(&mut self, rng: &mut Rng) {
        if let Some(message) = self.link.to_target.pop_front() {
            if let (ToTarget::Batch(volume, batch), true) = (&message, rng.chance(30)) {
                self.coverage.saw(Seen::Repeated);
                self.link.to_target.push_front(ToTarget::Batch(*volume, Arc::clone(batch)));
            }
            self.target.hear(message, &mut self.link);
        }
        if let Some(message) = self.link.to_agent.pop_front() {
            self.agent.hear(message, &self.source);
        }
    }

    fn target_works(&mut self, rng: &mut Rng) {
        if rng.chance(600) {
            self.target.compare(rng, &mut self.link, &mut self.coverage);
        }
        if !self.target.commit(&mut self.link, &mut self.coverage) {
            // A write or sync failed: the daemon ends and is started again.
            self.crash_target(rng);
        }
    }

    /// The weather is fine again: everything must come to rest with equal content.
    fn drain(&mut self, rng: &mut Rng) {
        self.link.outage = false;
        self.spools.values().for_each(SimSpool::heal);
        self.target.heal(rng, &mut self.coverage);
        self.source.heal();
        for round in 0..60_000 {
            self.source.pass(rng.below(8));
            self.work(rng, false);
            let rest = round % 16 == 0 && self.source.is_idle() && self.source.all_released();
            if rest && self.target.has_everything(&self.source) {
                self.target.check_end(&self.source);
                self.source.check_verifies(&mut self.coverage);
                self.coverage.saw(Seen::Drained);
                return;
            }
        }
        panic!(
            "it never came to rest: agent {} {:?}, target {}, source {:?}",
            self.agent.state(),
            self.agent.problems(),
            self.target.state(),
            self.source
                .disks
                .iter()
                .map(|d| (self.source.order(d.id), self.source.watermarks(d.id)))
                .collect::<Vec<_>>()
        );
    }
}
