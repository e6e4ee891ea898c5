//! Every short history: all orders of a few steps, power cuts among them, behind a store that has
//! segments, runs and a base already. What chance seldom puts side by side stands side by side here.

use farshore_extent::Lsn;

use super::crash::World;
use crate::store::{Faults, Store, StoreError};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Append,
    Commit,
    /// Up to what was acknowledged when the history began.
    ExpireSome,
    /// Up to all that is acknowledged.
    ExpireAll,
    Merge,
    /// Closed and opened again.
    Reopen,
    /// The power goes at once.
    Cut,
    /// The power goes during the so manieth operation of the disk from here.
    CutSoon(u64),
}

const STEPS: [Step; 10] = [
    Step::Append,
    Step::Commit,
    Step::ExpireSome,
    Step::ExpireAll,
    Step::Merge,
    Step::Reopen,
    Step::Cut,
    Step::CutSoon(2),
    Step::CutSoon(6),
    Step::CutSoon(12),
];

/// Batches before a history begins: enough for segments, some of which can be merged.
const BEFORE: u32 = 18;

/// Steps of a history; two more with `FARSHORE_SOAK`.
const LENGTH: u32 = 3;

fn step(world: &mut World, store: &mut Store, begun: Lsn, step: Step) -> Result<(), StoreError> {
    match step {
        Step::Append => {
            world.source.batch();
            world.source.send(store);
        }
        Step::Commit => world.commit(store)?,
        Step::ExpireSome => world.expire(store, begun)?,
        Step::ExpireAll => world.expire(store, world.acked)?,
        Step::Merge => while store.merge_runs()? {},
        Step::Reopen | Step::Cut => {}
        Step::CutSoon(operations) => world.disk.crash_at(Some(world.disk.ops() + operations)),
    }
    Ok(())
}

fn life(seed: u64, steps: &[Step], faults: Faults) {
    let mut world = World::new(seed, faults);
    let mut store = world.open().unwrap();
    for _ in 0..BEFORE {
        world.source.batch();
        world.source.send(&mut store);
        world.commit(&mut store).unwrap();
    }
    let begun = world.acked;
    for next in steps {
        let done = step(&mut world, &mut store, begun, *next);
        assert!(done.is_ok() || world.disk.is_down(), "an error without a cause: {done:?}");
        match next {
            Step::Cut => world.disk.crash(),
            Step::Reopen => {}
            _ if done.is_err() => {}
            _ => continue,
        }
        drop(store);
        let again = if world.disk.is_down() { None } else { world.open().ok() };
        store = match again.filter(|_| !world.disk.is_down()) {
            Some(store) => store,
            None => world.recover(0),
        };
        world.check_everywhere(&store);
        world.go_on_from(&store);
    }
    drop(store);
    world.disk.crash();
    let store = world.recover(0);
    world.check_everywhere(&store);
}

/// The first history that shows that something is wrong.
fn wrong(length: u32, faults: Faults) -> Option<Vec<Step>> {
    let histories = (0..STEPS.len().pow(length)).map(|number| {
        let step = |n| STEPS[number / STEPS.len().pow(n) % STEPS.len()];
        (number as u64, (0..length).map(step).collect::<Vec<_>>())
    });
    let mut histories = histories
        .filter(|(seed, steps)| std::panic::catch_unwind(|| life(*seed, steps, faults)).is_err());
    histories.next().map(|(_, steps)| steps)
}

#[test]
fn every_short_history_is_right_at_every_place() {
    let length = LENGTH + 2 * u32::from(std::env::var_os("FARSHORE_SOAK").is_some());
    assert_eq!(wrong(length, Faults::default()), None);
}

#[test]
fn short_histories_find_planted_faults() {
    let none = Faults::default();
    let planted = [
        ("ack_before_sync", Faults { ack_before_sync: true, ..none }),
        ("floor_lowered_after_crash", Faults { floor_lowered_after_crash: true, ..none }),
        (
            "segments_deleted_before_base_synced",
            Faults { segments_deleted_before_base_synced: true, ..none },
        ),
        ("super_before_base_sync", Faults { super_before_base_sync: true, ..none }),
        ("run_oldest_wins", Faults { run_oldest_wins: true, ..none }),
    ];
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let missed = planted.iter().filter(|(_, faults)| wrong(LENGTH, *faults).is_none());
    let missed: Vec<_> = missed.map(|(name, _)| *name).collect();
    std::panic::set_hook(hook);
    assert!(missed.is_empty(), "not found: {missed:?}");
}
