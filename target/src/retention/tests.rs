use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use farshore_extent::{Epoch, MarkerId, Seq, VolumeId, WallTime};
use proptest::prelude::*;

use super::*;
use crate::catalogue::NewPoint;

const SECOND: u64 = 1_000;
const HOUR: u64 = 3_600 * SECOND;
const DAY: u64 = 24 * HOUR;

fn point(n: u64, recorded: u64, name: &str, pinned: bool) -> PointRow {
    PointRow {
        point: PointId::new(n),
        volume: VolumeId::NIL,
        at: NewPoint {
            lsn: Lsn::new(Epoch::new(1), Seq::new(n)),
            time: WallTime::default(),
            kind: PointKind::Crash,
            name: name.into(),
            marker: MarkerId::NIL,
        },
        pinned,
        recorded: Age(recorded),
    }
}

fn app(n: u64, recorded: u64) -> PointRow {
    let mut point = point(n, recorded, "", false);
    point.at.kind = PointKind::App;
    point
}

/// A point every `step` from `from` on, up to `now`.
fn regular(from: u64, step: u64, now: u64) -> Vec<PointRow> {
    (0..=(now - from) / step).map(|n| point(n + 1, from + n * step, "", false)).collect()
}

fn policy(text: &str) -> Policy {
    policy::resolve(text, &Default::default()).unwrap()
}

fn kept(points: &[PointRow], now: u64, policy: &Policy) -> Vec<PointRow> {
    let gone: BTreeSet<PointId> = expire(points, Age(now), policy).drop.into_iter().collect();
    points.iter().filter(|p| !gone.contains(&p.point)).cloned().collect()
}

fn numbers(points: &[PointRow]) -> Vec<u64> {
    points.iter().map(|p| p.point.get()).collect()
}

fn dropped(points: &[PointRow], now: u64) -> (Vec<u64>, Option<u64>) {
    let expiry = expire(points, Age(now), &policy("100ms"));
    let drop = expiry.drop.iter().map(|p| p.get()).collect();
    (drop, expiry.floor.map(|lsn| lsn.seq.get()))
}

#[test]
fn points_live_as_long_as_the_window_and_the_floor_follows() {
    let points: Vec<_> = (1..=5).map(|n| point(n, n * 50, "", false)).collect();
    assert_eq!(dropped(&points, 100), (vec![], None));
    assert_eq!(dropped(&points, 200), (vec![1, 2], Some(3)));
}

#[test]
fn named_and_pinned_points_stay_and_hold_the_floor() {
    let points = [
        point(1, 0, "", true),
        point(2, 0, "x", false),
        point(3, 0, "", false),
        point(4, 900, "", false),
    ];
    assert_eq!(dropped(&points, 950), (vec![3], Some(1)));
    assert_eq!(dropped(&points[1..], 950), (vec![3], Some(2)));
}

#[test]
fn the_newest_point_is_never_dropped_however_old() {
    let points = [point(1, 0, "", false), point(2, 0, "", false)];
    assert_eq!(dropped(&points, 1_000_000), (vec![1], Some(2)));
    assert_eq!(dropped(&[], 1_000_000), (vec![], None));
    let standard = policy("standard");
    assert_eq!(numbers(&kept(&points, 1_000 * DAY, &standard)), [2]);
}

#[test]
fn a_clock_that_goes_back_expires_nothing() {
    assert_eq!(dropped(&[point(1, 500, "", false), point(2, 501, "", false)], 3), (vec![], None));
    let standard = policy("standard");
    let points = kept(&regular(7, 5 * SECOND, 3 * DAY), 3 * DAY, &standard);
    for earlier in [0, HOUR, 2 * DAY, 3 * DAY - 1] {
        assert_eq!(kept(&points, earlier, &standard).len(), points.len(), "{earlier}");
    }
}

/// The literal rule: the first hour has exactly so many points, then one an hour, up to the
/// retention; with 0 hours only the first hour is kept. At every moment, not only at full hours.
#[test]
fn presets_keep_exactly_their_numbers_at_every_moment() {
    for (preset, step, first) in [("30s", 30, 120), ("5m", 300, 12), ("15m", 900, 4)] {
        for (hours, hourly) in [(24, 23), (4, 3), (2, 1), (1, 0), (0, 0)] {
            let policy = policy(&format!("every-{preset}-{hours}h"));
            let mut points = Vec::new();
            for n in 0..=(30 * 3_600 / step) {
                let now = 12_345 + n * step * SECOND;
                points.push(point(n + 1, now, "", false));
                points = kept(&points, now, &policy);
                for later in [0, 1, step * SECOND / 2, step * SECOND - 1] {
                    let points = kept(&points, now + later, &policy);
                    let old = |p: &&PointRow| now - p.recorded.0 >= HOUR;
                    if n * step >= 26 * 3_600 {
                        let all = points.len();
                        let old = points.iter().filter(old).count();
                        assert_eq!(
                            (all - old, old),
                            (first, hourly),
                            "{preset} {hours} h at {now}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn more_points_than_a_preset_has_slots_are_thinned_to_its_number() {
    let points = regular(3, SECOND, 2 * HOUR);
    let all = kept(&points, 2 * HOUR, &policy("every-30s-0h"));
    assert_eq!(all.len(), 121, "120 and the newest");
}

#[test]
fn the_standard_policy_gets_sparser_with_age() {
    let policy = policy("standard");
    let now = 33 * DAY;
    let points = kept(&regular(77, 10 * SECOND, now), now, &policy);
    let within = |from: u64, to: u64| {
        let aged = |p: &&PointRow| (from..to).contains(&(now - p.recorded.0));
        points.iter().filter(aged).count()
    };
    assert_eq!(within(0, HOUR), 360, "every point");
    assert_eq!(within(HOUR, 24 * HOUR), 23 * 60, "one a minute");
    assert_eq!(within(24 * HOUR, 7 * DAY), 6 * 24, "one an hour");
    assert_eq!(within(7 * DAY, 30 * DAY), 23, "one a day");
    assert_eq!(within(30 * DAY, u64::MAX), 0);
}

#[test]
fn application_consistent_points_have_their_own_rule_besides_the_general_one() {
    let with = policy("all:1h,1h:24h,app-all:7d");
    let without = policy("all:1h,1h:24h");
    let mut points = regular(0, 600 * SECOND, 10 * DAY);
    for p in points.iter_mut().skip(1).step_by(24) {
        p.at.kind = PointKind::App;
    }
    let apps = |policy| {
        let points = kept(&points, 10 * DAY, policy);
        points.iter().filter(|p| p.at.kind == PointKind::App).count()
    };
    assert_eq!(apps(&with), 7 * 6, "every fourth hour for seven days");
    assert!(apps(&without) <= 1);
    let sparse = policy("all:1h,app-1h:24h");
    let two = [app(1, 1), app(2, 2), point(3, 3, "", false), point(4, 2 * HOUR, "", false)];
    assert_eq!(numbers(&kept(&two, 2 * HOUR, &sparse)), [1, 4]);
}

#[test]
fn a_hundred_thousand_points_are_decided_quickly() {
    let points = regular(0, 5 * SECOND, 500_000 * SECOND);
    assert!(points.len() > 100_000);
    let begun = Instant::now();
    let left = kept(&points, 500_000 * SECOND, &policy("standard")).len();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!((2_000..3_000).contains(&left), "{left}");
}

#[test]
fn why_a_point_stays_is_told() {
    let policy = policy("1h:24h,app-all:7d");
    let points = [app(1, 0), point(2, 1, "x", false), point(3, 2, "", false), app(4, 3)];
    let all = reasons(&points, Age(10), &policy);
    let told = |r: &Reasons| (r.by_tier(0), r.by_tier(1), r.held, r.newest);
    assert_eq!(told(&all[0]), (true, true, false, false));
    assert_eq!(told(&all[1]), (false, false, true, false));
    assert_eq!((told(&all[2]), all[2].stays()), ((false, false, false, false), false));
    assert_eq!(told(&all[3]), (false, true, false, true));
    assert!(!all[0].by_tier(2) && !all[0].by_tier(40));
}

/// Policies with slots that do and do not fit into each other.
const POLICIES: [&str; 6] = [
    "100ms",
    "all:200ms,100ms:700ms,500ms:3s",
    "100ms:300ms,170ms:1s,1s:5s",
    "all:50ms,1s:1s,app-all:400ms,app-300ms:2s",
    "300ms:400ms,app-100ms:2s",
    "130ms:3s",
];

/// Steps of a history: how far the clock moves (it may be set back a little, as after a crash of
/// the daemon), whether a point comes and of what kind, and whether one looks.
fn history() -> impl Strategy<Value = Vec<(i64, u8, bool)>> {
    prop::collection::vec((-40..300i64, 0..10u8, any::<bool>()), 1..120)
}

/// A point that arrives at `now`; none for some values of `what`.
fn arriving(n: u64, now: u64, what: u8) -> Option<PointRow> {
    match what {
        0..=1 => None,
        2 => Some(app(n, now)),
        3 => Some(point(n, now, "named", false)),
        _ => Some(point(n, now, "", false)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// The heart of it: looking at every step, or at some, leaves exactly what looking once at the
    /// end would leave, so no drop was ever premature.
    #[test]
    fn looking_often_leaves_what_looking_once_leaves(which in 0..POLICIES.len(), steps in history()) {
        let policy = policy(POLICIES[which]);
        let (mut now, mut latest) = (1_000i64, 0u64);
        let (mut all, mut stepwise) = (Vec::new(), Vec::new());
        for (n, (forward, what, look)) in steps.into_iter().enumerate() {
            now = (now + forward).max(0);
            let at = now.unsigned_abs();
            latest = latest.max(at);
            if let Some(point) = arriving(n as u64 + 1, at, what) {
                all.push(point.clone());
                stepwise.push(point);
            }
            if look {
                stepwise = kept(&stepwise, at, &policy);
            }
        }
        let once = kept(&all, latest, &policy);
        prop_assert_eq!(kept(&stepwise, latest, &policy), once);
    }

    /// Every slot of a tier that is not too old is represented by a point of that slot, the
    /// application-consistent ones besides, and no tier keeps more than its number.
    #[test]
    fn each_living_slot_has_its_point(which in 0..POLICIES.len(), steps in history()) {
        let policy = policy(POLICIES[which]);
        let mut now = 0u64;
        let (mut all, mut stepwise) = (Vec::new(), Vec::new());
        for (n, (forward, what, _)) in steps.into_iter().enumerate() {
            now += forward.unsigned_abs();
            if let Some(point) = arriving(n as u64 + 1, now, what) {
                all.push(point.clone());
                stepwise.push(point);
            }
            stepwise = kept(&stepwise, now, &policy);
        }
        let why = reasons(&stepwise, Age(now), &policy);
        for (number, (tier, of_app)) in policy.all_tiers().enumerate() {
            let counted = |p: &&PointRow| !of_app || p.at.kind == PointKind::App;
            let by_tier = why.iter().filter(|r| r.by_tier(number)).count() as u64;
            let Some((slot, most)) = tier.slot.zip(tier.most()) else { continue };
            prop_assert!(by_tier <= most);
            // The newest slots, as many as fit, that are not older than they may be.
            let slots = |points: &[PointRow]| -> BTreeSet<u64> {
                points.iter().filter(counted).map(|p| p.recorded.0 / slot).collect()
            };
            for wanted in slots(&all).into_iter().rev().take(usize::try_from(most).unwrap()) {
                if now < (wanted + 1) * slot + tier.keep {
                    prop_assert!(slots(&stepwise).contains(&wanted), "{} lost slot {}", tier, wanted);
                }
            }
        }
        prop_assert_eq!(stepwise.last().map(|p| p.point), all.last().map(|p| p.point));
    }

    /// A policy in use may be changed at any time; what it then keeps is stable again.
    #[test]
    fn a_changed_policy_drops_only_once(a in 0..POLICIES.len(), b in 0..POLICIES.len(), steps in history()) {
        let (before, after) = (policy(POLICIES[a]), policy(POLICIES[b]));
        let mut now = 0u64;
        let mut points = Vec::new();
        for (n, (forward, what, _)) in steps.into_iter().enumerate() {
            now += forward.unsigned_abs();
            points.extend(arriving(n as u64 + 1, now, what));
            points = kept(&points, now, &before);
        }
        let changed = kept(&points, now, &after);
        prop_assert_eq!(&kept(&changed, now, &after), &changed);
        prop_assert_eq!(points.last(), changed.last());
    }
}
