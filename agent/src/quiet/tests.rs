use farshore_extent::{Epoch, Seq};

use super::*;

fn problem(code: u16) -> Problem {
    Problem::harmless(code, "it failed", "so", "try")
}

fn wish(by: By, app: bool) -> Wish {
    let markers = [MarkerId::random(), MarkerId::random()];
    let names = vec![VolumeName::new("a").unwrap()];
    Wish { by, volumes: vec![VolumeId::random()], names, point: "x".into(), app, markers }
}

fn placed(seq: u64) -> MarkerPlaced {
    let lsn = Lsn::new(Epoch::new(1), Seq::new(seq));
    MarkerPlaced { lsn, time: WallTime::from_nanos(5), volumes: vec![], not_ordered: vec![] }
}

/// What a freezer and a filterd may answer to the actions of one point.
#[derive(Debug, Clone, Copy)]
struct World {
    quiet: bool,
    held: bool,
    placed: bool,
    committed: bool,
    again: bool,
    post: bool,
}

/// Everything that was done for one wish, in order, in a world.
fn live(points: &mut QuietPoints, wish: &Wish, world: World) -> Vec<Action> {
    let mut all = Vec::new();
    points.step(Event::Wanted(wish.clone()), &mut all);
    let mut at = 0;
    while at < all.len() {
        let answer = |ok: bool, code| if ok { Ok(()) } else { Err(problem(code)) };
        let event = match &all[at] {
            Action::Quiet(_) => Some(Event::Quiet(answer(world.quiet, 3403))),
            Action::Mark { kind: PointKind::App, .. } => {
                Some(Event::Marked(answer(world.placed, 3013).map(|()| placed(7))))
            }
            Action::Mark { .. } => {
                Some(Event::Marked(answer(world.again, 3013).map(|()| placed(9))))
            }
            Action::Thaw => Some(Event::Thawed(answer(world.held, 3407))),
            Action::Resolve { commit: true, .. } => {
                Some(Event::Committed(answer(world.committed, 2038)))
            }
            Action::Finish => {
                Some(Event::Finished(if world.post { vec![] } else { vec![problem(3404)] }))
            }
            Action::Resolve { commit: false, .. } | Action::Done(..) | Action::Note { .. } => None,
        };
        event.into_iter().for_each(|event| points.step(event, &mut all));
        at += 1;
    }
    all
}

fn worlds() -> impl Iterator<Item = World> {
    (0u8..64).map(|bits| {
        let bit = |n: u8| bits >> n & 1 == 1;
        World {
            quiet: bit(0),
            held: bit(1),
            placed: bit(2),
            committed: bit(3),
            again: bit(4),
            post: bit(5),
        }
    })
}

#[test]
fn whatever_fails_a_point_is_called_app_only_when_it_was_quiet_around_its_committed_marker() {
    for world in worlds() {
        let mut points = QuietPoints::default();
        let wish = wish(By::Target(1), true);
        let all = live(&mut points, &wish, world);
        let done: Vec<_> = all.iter().filter(|a| matches!(a, Action::Done(..))).collect();
        let [Action::Done(_, result)] = done[..] else { panic!("{world:?}: {done:?}") };
        let app = world.quiet && world.placed && world.held && world.committed;
        // A second marker is placed when the first may not count.
        let crash = (world.placed || !world.quiet) && world.again && !app;
        match result {
            Ok(cut) if cut.kind == PointKind::App => {
                assert!(app && cut.reason.is_none() && cut.lsn == placed(7).lsn, "{world:?}");
            }
            Ok(cut) => {
                assert!(crash && cut.reason.is_some() && cut.lsn == placed(9).lsn, "{world:?}");
            }
            Err(problem) => assert!(!app && !crash && problem.code.0 == 3013, "{world:?}"),
        }
        // What was made quiet was ended, and before anything waits for the marker's outcome.
        let place = |wanted: &dyn Fn(&Action) -> bool| all.iter().position(wanted);
        let thaw = place(&|a| *a == Action::Thaw);
        assert_eq!(thaw.is_some(), world.quiet, "{world:?}: {all:?}");
        let resolve = place(&|a| matches!(a, Action::Resolve { .. }));
        assert!(resolve.is_none_or(|at| Some(at) > thaw), "{world:?}");
        let pending = place(&|a| matches!(a, Action::Mark { kind: PointKind::App, .. }));
        assert_eq!(pending.is_some(), resolve.is_some(), "no marker stays pending: {world:?}");
        // The reason is told before the answer; post hooks that failed after it.
        let notes = all.iter().filter(|a| matches!(a, Action::Note { .. })).count();
        let expected = usize::from(crash) + usize::from(!world.post && result.is_ok());
        assert_eq!(notes, expected, "{world:?}: {all:?}");
        assert_eq!(all.iter().filter(|a| **a == Action::Finish).count(), 1, "{world:?}");
        assert!(points.running.is_none(), "{world:?}");
    }
}

#[test]
fn wishes_are_fulfilled_one_after_the_other_and_not_without_end() {
    let mut points = QuietPoints::default();
    let mut out = Vec::new();
    for n in 0..=u64::try_from(MAX_WAITING).unwrap() {
        points.step(Event::Wanted(wish(By::Target(n), n % 2 == 0)), &mut out);
    }
    assert!(matches!(out[..], [Action::Quiet(_)]), "{out:?}");
    points.step(Event::Wanted(wish(By::Person(1), true)), &mut out);
    assert!(matches!(&out[1..], [Action::Done(Wish { by: By::Person(1), .. }, Err(_))]), "{out:?}");
    // Answers out of turn change nothing.
    points.step(Event::Thawed(Ok(())), &mut out);
    points.step(Event::Committed(Ok(())), &mut out);
    points.step(Event::Finished(vec![]), &mut out);
    assert_eq!(out.len(), 2);
    points.step(Event::Quiet(Err(problem(3402))), &mut out);
    points.step(Event::Marked(Ok(placed(3))), &mut out);
    points.step(Event::Finished(vec![]), &mut out);
    let second = out.last().unwrap();
    assert!(matches!(second, Action::Mark { kind: PointKind::Crash, .. }), "not app: {second:?}");
    points.step(Event::Marked(Ok(placed(4))), &mut out);
    let Some(Action::Done(_, Ok(cut))) = out.iter().rev().nth(1) else { panic!("{out:?}") };
    assert_eq!((cut.kind, &cut.reason), (PointKind::Crash, &None), "nothing more was wanted");
}

#[test]
fn the_schedule_keeps_to_the_clock_and_waits_for_what_is_not_ready() {
    const HOUR: i64 = 3_600_000_000_000;
    let app = |name: &str, every_ms| ApplicationInfo {
        name: VolumeName::new(name).unwrap(),
        volumes: vec![],
        every_ms,
        hook_limit_ms: 1,
        quiet_limit_ms: 1,
    };
    let apps = [app("hourly", 3_600_000), app("by-hand", 0), app("often", 10_000)];
    let mut schedule = Schedule::default();
    let mut due = |at: i64, ready: bool| -> Vec<String> {
        let found = schedule.due(WallTime::from_nanos(at), &apps, |_| ready);
        found.into_iter().map(|app| app.name.to_string()).collect()
    };
    assert!(due(100 * HOUR + 5, true).is_empty(), "the first look begins a turn");
    assert_eq!(due(100 * HOUR + 11_000_000_000, true), ["often"]);
    assert!(due(100 * HOUR + 12_000_000_000, true).is_empty());
    assert!(due(101 * HOUR, false).is_empty(), "catching up");
    assert_eq!(due(101 * HOUR + 1, true), ["hourly", "often"], "as soon as it is ready");
    assert_eq!(due(110 * HOUR, true), ["hourly", "often"], "one for all that were missed");
    assert!(due(50 * HOUR, true).is_empty(), "the clock was set back");
    assert_eq!(due(51 * HOUR, true), ["hourly", "often"]);
}
