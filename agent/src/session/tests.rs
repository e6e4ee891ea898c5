//! The session core against a model of `filterd` and a model of the target that may forget
//! what it did not acknowledge, restart, and lose acknowledged data.

mod model;

use std::time::Duration;

use farshore_extent::{Chain, Extent, Generation, Lsn, Problem};
use farshore_protocol::failover::FENCED;
use farshore_protocol::message::MAX_DIFFERING;
use proptest::prelude::*;

use super::*;
use model::{World, at, failure};

#[derive(Debug, Clone)]
enum Step {
    Write(u64),
    Ask(bool),
    Judge,
    Hear,
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
        2 => any::<bool>().prop_map(Step::Ask),
        3 => Just(Step::Judge),
        3 => Just(Step::Hear),
        8 => Just(Step::Intake),
        6 => (1usize..4).prop_map(Step::Deliver),
        6 => (1usize..4).prop_map(Step::Sync),
        1 => Just(Step::Disconnect),
        1 => Just(Step::TargetCrash),
        1 => Just(Step::RestartAgent),
        1 => (1usize..4).prop_map(move |n| if lose { Step::LoseAcked(n) } else { Step::Hear }),
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
            Step::Ask(differs) => world.filterd.ask(*differs),
            Step::Judge => world.judge(),
            Step::Hear => world.hear(),
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
    let asked = [Step::Ask(true), Intake, Deliver(1), Sync(1)];
    let unheard = [asked.as_slice(), &[Step::Judge, Step::Disconnect, Wait(9000)]].concat();
    assert!(is_found(Faults { lost_answers_not_said: true, ..Faults::default() }, &unheard));
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
    world.wait(Duration::from_secs(2));
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
fn answers_about_digests_arrive_and_those_that_break_a_limit_are_asked_again() {
    let mut world = World::new(small());
    world.wait(Duration::ZERO);
    world.filterd.ask(false);
    world.filterd.ask(true);
    world.settle();
    assert_eq!((world.filterd.answered, world.filterd.next), (2, 2));
    let volume = world.volume;
    let beyond = vec![Extent::new(1 << 30, 4096).unwrap()];
    let many = vec![Extent::new(0, 4096).unwrap(); MAX_DIFFERING + 1];
    let odd = vec![Extent::new(1, 4096).unwrap()];
    for (upto, differing) in [(at(3), beyond), (at(3), many), (at(3), odd), (at(900), vec![])] {
        world.filterd.ask(true);
        let asked = world.filterd.next;
        world.intake();
        world.deliver(1);
        world.sync(1);
        let upto = if upto == at(3) { at(asked) } else { upto };
        world.step(Event::Compared { volume, upto, differing });
        assert_eq!(world.filterd.next, asked + 1, "asked again");
        world.settle();
    }
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
    world.step(Event::Reload { retry: RetryPreset::Fast, window_bytes: 64 << 20 });
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
    world.step(Event::Reload { retry: RetryPreset::Fast, window_bytes: 64 << 20 });
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
fn a_fenced_source_asks_once_a_connection_and_when_it_is_told_and_never_in_a_loop() {
    let mut world = World::new(small());
    world.wait(Duration::ZERO);
    let phase = |world: &World| world.session.volume(world.volume).unwrap().phase();
    let fence = |world: &mut World| {
        let problem = Problem::harmless(FENCED, "failed over", "test", "-");
        let (volume, jitter) = (Some(world.volume), Jitter::default());
        world.step(Event::Refused { volume, problem, retry: false, jitter });
        assert_eq!(phase(world), Phase::Halted);
    };
    fence(&mut world);
    world.wait(Duration::from_secs(3600));
    assert_eq!(phase(&world), Phase::Halted, "no loop");
    world.step(Event::Reopen { volume: world.volume, reason: "taken back".into() });
    assert_eq!(phase(&world), Phase::Streaming, "the target has taken it back");
    fence(&mut world);
    world.disconnect();
    let problem = world.session.volume(world.volume).unwrap().problem().map(|p| p.code.0);
    assert_eq!(problem, Some(FENCED), "status says so until it is opened");
    world.wait(Duration::from_secs(1));
    assert_eq!(phase(&world), Phase::Streaming, "a new connection asks again");
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
