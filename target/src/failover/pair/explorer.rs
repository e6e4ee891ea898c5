//! Every order of events of the fencing protocol, with the rows and decisions of the product: two
//! operators, a source that writes, reboots and comes back, a network that loses its connection, and
//! a target that is killed between any two things it does and may lose its catalogue.

use std::collections::{HashSet, VecDeque};

use farshore_extent::{Chain, Epoch, Generation, Lsn, Seq, ViewId, WallTime};
use farshore_protocol::failover::FailoverPhase as Phase;

use super::{Opening, Pair, Todo};
use crate::session::verdict::{Decision, FIRST_GENERATION, Position, decide};

/// Failovers, changes and cancels that are begun, each with a generation.
const MOST_GENERATIONS: u64 = 4;
const MOST_WRITES: u8 = 1;
const NOW: WallTime = WallTime::from_nanos(0);

/// Mistakes built in on purpose: each must be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Mistake {
    None,
    /// A source that opens is judged by its generation alone.
    PhaseNotAsked,
    /// The point is opened before the generation is raised.
    OpensFirst,
    /// The source is taken back before what was opened is closed.
    ClosesLast,
    /// Nobody asks what a person has seen.
    SeenNotAsked,
    /// A source that was fenced is attached for writing after a reboot.
    FenceForgotten,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct View {
    id: ViewId,
    written: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Link {
    Down,
    Up,
    /// `Open` is on its way, with the generation it names.
    Opening(Generation),
    /// `Opened` is on its way.
    Opened(Generation),
    Refused,
    /// The target takes batches of this generation.
    Streaming(Generation),
    Halted,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[allow(clippy::struct_excessive_bools)] // independent facts
struct State {
    /// Of the target, on disk.
    row: Option<Pair>,
    job: bool,
    store: Generation,
    durable: u8,
    views: Vec<View>,
    catalogue_lost: bool,
    /// The daemon runs.
    up: bool,
    /// What is to be done was done, and is not recorded.
    performed: bool,
    /// The sender that the worker accepts: its generation.
    sender: Option<Generation>,
    /// What each operator has been shown: generation, and what is open.
    seen: [Option<(Generation, Option<ViewId>)>; 2],
    /// The source: memory, fence and disk are durable.
    generation: Generation,
    fenced: bool,
    writable: bool,
    written: u8,
    acked: u8,
    link: Link,
    /// The oldest generation that may write, while a point is open in place of the source.
    current: Option<Generation>,
}

fn view(n: u64) -> ViewId {
    ViewId::from_bytes([u8::try_from(n).unwrap(); 16])
}

fn opening(n: u64) -> Opening {
    let (lsn, time) = (Lsn::ZERO, NOW);
    Opening { view: view(n), lsn, time, point: None, device: false, tls_listen: None }
}

impl State {
    fn first() -> Self {
        Self {
            row: None,
            job: false,
            store: FIRST_GENERATION,
            durable: 0,
            views: vec![],
            catalogue_lost: false,
            up: true,
            performed: false,
            sender: None,
            seen: [None, None],
            generation: Generation::ZERO,
            fenced: false,
            writable: true,
            written: 0,
            acked: 0,
            link: Link::Down,
            current: None,
        }
    }

    fn pair(&self) -> Pair {
        self.row.clone().unwrap_or_else(|| Pair::new(self.store))
    }

    /// Every state that can follow, each with its name.
    fn next(&self, mistake: Mistake) -> Vec<(String, Self)> {
        let mut all = Vec::new();
        let mut add = |name: &str, change: &dyn Fn(&mut Self) -> bool| {
            let mut next = self.clone();
            if change(&mut next) && next != *self {
                next.forget();
                all.push((name.to_owned(), next));
            }
        };
        add("the guest writes", &|s| {
            s.written += 1;
            s.writable && s.written <= MOST_WRITES
        });
        add("the source reboots", &|s| {
            s.writable = !s.fenced || mistake == Mistake::FenceForgotten;
            s.disconnect();
            true
        });
        add("the link is cut", &|s| {
            s.disconnect();
            true
        });
        add("the agent connects", &|s| {
            s.link = Link::Up;
            self.up && self.link == Link::Down
        });
        add("the agent opens", &|s| {
            s.link = Link::Opening(s.generation);
            self.link == Link::Up
        });
        add("the target answers", &|s| s.answer(mistake));
        add("the agent hears", &|s| s.hear());
        add("a batch arrives", &|s| s.batch());
        add("the target is killed", &|s| {
            (s.up, s.performed) = (false, false);
            s.disconnect();
            self.up
        });
        add("the target starts", &|s| {
            s.up = true;
            s.store = s.store.max(s.row.as_ref().map_or(Generation::ZERO, Pair::raised));
            !self.up
        });
        add("the catalogue is lost", &|s| {
            (s.row, s.job, s.views, s.catalogue_lost) = (None, false, vec![], true);
            !self.up && !self.catalogue_lost
        });
        add("the view is written", &|s| {
            let Some(view) = s.views.first_mut() else { return false };
            view.written = true;
            self.up
        });
        add("the target works", &|s| s.perform(mistake));
        add("the target records", &|s| s.record());
        add("the target cannot", &|s| s.fail());
        for operator in 0..2 {
            add("an operator looks", &|s| {
                let pair = s.pair();
                s.seen[operator] = Some((pair.generation, pair.open.map(|open| open.view)));
                self.up
            });
            add("an operator fails over", &|s| s.begin(operator, true, mistake));
            add("an operator cancels", &|s| s.begin(operator, false, mistake));
        }
        all
    }

    /// Operators are alike, and what one has seen of before is refused whatever it was.
    fn forget(&mut self) {
        let now = self.pair().generation;
        for seen in &mut self.seen {
            if seen.is_some_and(|(generation, _)| generation < now) {
                *seen = Some((Generation::ZERO, None));
            }
        }
        self.seen.sort();
    }

    fn disconnect(&mut self) {
        (self.link, self.sender) = (Link::Down, None);
    }

    fn answer(&mut self, mistake: Mistake) -> bool {
        let Link::Opening(theirs) = self.link else { return false };
        let (mut pair, own) = (self.pair(), self.store);
        if mistake == Mistake::PhaseNotAsked {
            pair.phase = Phase::Source;
        }
        let at = |generation| Position { generation, lsn: Lsn::ZERO, chain: Chain::EMPTY };
        let decision = if pair.fences() {
            Decision::Fenced
        } else {
            decide(at(pair.taken_for(theirs, own)), at(own))
        };
        let accepted = decision == Decision::Continue;
        if accepted {
            self.sender = Some(own);
        }
        self.link = if accepted { Link::Opened(own) } else { Link::Refused };
        self.up
    }

    fn hear(&mut self) -> bool {
        match self.link {
            Link::Opened(generation) => {
                (self.generation, self.fenced) = (generation, false);
                self.link = Link::Streaming(generation);
            }
            Link::Refused => {
                self.fenced = true;
                self.link = Link::Halted;
            }
            _ => return false,
        }
        true
    }

    fn batch(&mut self) -> bool {
        let Link::Streaming(generation) = self.link else { return false };
        if self.written == self.durable || !self.up {
            return false;
        }
        if self.sender.is_some() && generation >= self.store {
            (self.durable, self.acked) = (self.written, self.written);
        } else {
            self.link = Link::Refused;
        }
        true
    }

    fn begin(&mut self, operator: usize, over: bool, mistake: Mistake) -> bool {
        let Some((generation, seen)) = self.seen[operator].take() else { return false };
        let pair = self.pair();
        if !self.up || self.job || pair.generation.get() >= MOST_GENERATIONS {
            return false;
        }
        let open = pair.open.as_ref().map(|open| open.view);
        if (pair.generation, open) != (generation, seen) && mistake != Mistake::SeenNotAsked {
            return true; // refused; they look again
        }
        let next = opening(pair.generation.get() + 1);
        let begun = if over { pair.fail_over(next, NOW) } else { pair.cancel() };
        let Some((_, row)) = begun else { return true };
        assert!(open == seen || open.is_none(), "what was not seen is closed: {open:?}");
        (self.row, self.job, self.performed) = (Some(row), true, false);
        if mistake == Mistake::ClosesLast && !over {
            let done = Pair { phase: Phase::Source, ..self.pair() };
            self.row = Some(done);
        }
        true
    }

    fn perform(&mut self, mistake: Mistake) -> bool {
        if !self.up || !self.job || self.performed {
            return false;
        }
        match self.pair().todo() {
            Todo::Rest => return false,
            Todo::Raise(to) if mistake == Mistake::OpensFirst => {
                if let Some(next) = self.pair().next {
                    self.open(next.view, to);
                }
            }
            Todo::Raise(to) => {
                self.store = self.store.max(to);
                self.sender = None;
                if matches!(self.link, Link::Streaming(_) | Link::Opened(_)) {
                    self.link = Link::Refused;
                }
            }
            Todo::Open(open) => self.open(open.view, self.pair().generation),
            Todo::Close(view) => self.views.retain(|v| v.id != view),
        }
        self.performed = true;
        true
    }

    fn open(&mut self, id: ViewId, generation: Generation) {
        if self.views.iter().all(|v| v.id != id) {
            self.views.push(View { id, written: false });
        }
        self.current = Some(generation);
    }

    fn record(&mut self) -> bool {
        if !self.up || !self.performed {
            return false;
        }
        let row = self.pair().done(NOW);
        self.settle(row);
        true
    }

    fn fail(&mut self) -> bool {
        if !self.up || !self.job || self.performed {
            return false;
        }
        // What is open already cannot fail to be opened.
        if let Todo::Open(open) = self.pair().todo()
            && self.views.iter().any(|v| v.id == open.view)
        {
            return false;
        }
        let row = self.pair().failed(NOW);
        self.job = false;
        self.settle(row);
        true
    }

    fn settle(&mut self, row: Pair) {
        self.job &= row.todo() != Todo::Rest;
        self.performed = false;
        if row.phase == Phase::Source {
            self.current = None;
            if self.link == Link::Halted {
                self.link = Link::Up; // it is told
            }
        }
        self.row = Some(row);
    }

    /// What must hold in every state.
    fn check(&self) -> Result<(), &'static str> {
        let taking = self.sender.is_some_and(|generation| generation >= self.store);
        let oldest = self.current.unwrap_or(Generation::ZERO);
        let rules = [
            (self.views.len() <= 1, "one point is open at most"),
            (!taking || self.views.is_empty(), "a source and an open point are current at once"),
            (
                self.sender.is_none_or(|s| s >= oldest) || !taking,
                "a source of before the failover is taken",
            ),
            (self.store >= oldest, "open without a generation on disk"),
            (self.acked <= self.durable, "what was acknowledged is lost"),
            (
                self.sender.is_none() || self.catalogue_lost || !self.pair().fences() || self.job,
                "a source is taken while the row fences it",
            ),
        ];
        rules.iter().find(|(holds, _)| !holds).map_or(Ok(()), |(_, rule)| Err(rule))
    }
}

/// Looks at every state that can be reached. The first that breaks a rule, with the way there.
fn explore(mistake: Mistake) -> Result<usize, String> {
    let first = State::first();
    let mut seen = HashSet::from([first.clone()]);
    let mut queue = VecDeque::from([(first, None::<usize>)]);
    let mut ways: Vec<(Option<usize>, String)> = Vec::new();
    while let Some((state, way)) = queue.pop_front() {
        for (name, next) in state.next(mistake) {
            if let Err(rule) = check_step(&state, &name, &next) {
                return Err(format!("{rule}: {}, {name}", told(&ways, way)));
            }
            if seen.insert(next.clone()) {
                ways.push((way, name));
                queue.push_back((next, Some(ways.len() - 1)));
            }
        }
    }
    Ok(seen.len())
}

fn check_step(before: &State, name: &str, after: &State) -> Result<(), &'static str> {
    after.check()?;
    let rebooted = name == "the source reboots";
    if rebooted && before.fenced && after.writable {
        return Err("a fenced source is attached for writing");
    }
    Ok(())
}

fn told(ways: &[(Option<usize>, String)], mut way: Option<usize>) -> String {
    let mut names = Vec::new();
    while let Some((before, name)) = way.and_then(|n| ways.get(n)) {
        names.push(name.as_str());
        way = *before;
    }
    names.reverse();
    names.join(", ")
}

#[test]
fn no_order_of_events_has_two_current_writers_or_loses_what_was_acknowledged() {
    let states = explore(Mistake::None).unwrap();
    assert!(states > 10_000, "{states} states were looked at");
}

#[test]
fn every_planted_mistake_of_fencing_is_found() {
    for mistake in
        [Mistake::PhaseNotAsked, Mistake::OpensFirst, Mistake::ClosesLast, Mistake::FenceForgotten]
    {
        let found = explore(mistake);
        assert!(found.is_err(), "{mistake:?} was not found in {found:?} states");
    }
    let blind = std::panic::catch_unwind(|| explore(Mistake::SeenNotAsked));
    assert!(blind.is_err(), "what nobody has seen was closed");
}

#[test]
fn places_of_the_model_are_those_of_the_product() {
    assert_eq!(Lsn::new(Epoch::ZERO, Seq::ZERO), Lsn::ZERO);
    assert_eq!(opening(2).view, view(2));
}
