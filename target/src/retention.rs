//! Which points stay. A pure function; policies by day, week and month are a later issue.

use std::time::Duration;

use farshore_extent::{Lsn, PointId};

use crate::catalogue::{Age, PointRow};

/// What to forget.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Expiry {
    /// Points that have expired.
    pub drop: Vec<PointId>,
    /// No place before this one can be asked for any more; none while nothing expires.
    pub floor: Option<Lsn>,
}

/// Decides over all points of one volume (in any order) at the time `now`.
///
/// A point stays while it is younger than `window` by the clock of retention, while it is named
/// or pinned, or when it is the newest: so the last good point before a catch-up is never lost.
/// The floor is the oldest point that stays: what it shows, and every moment after it, can be
/// opened. A named point therefore holds the journal behind it.
#[must_use]
pub fn expire(points: &[PointRow], now: Age, window: Duration) -> Expiry {
    let newest = points.iter().map(|p| p.at.lsn).max();
    let window = u64::try_from(window.as_millis()).unwrap_or(u64::MAX);
    let stays = |point: &&PointRow| {
        let age = now.0.saturating_sub(point.recorded.0);
        age < window || point.pinned || !point.at.name.is_empty() || Some(point.at.lsn) == newest
    };
    let drop: Vec<PointId> = points.iter().filter(|p| !stays(p)).map(|p| p.point).collect();
    let oldest = points.iter().filter(stays).map(|p| p.at.lsn).min();
    let floor = if drop.is_empty() { None } else { oldest };
    Expiry { drop, floor }
}

#[cfg(test)]
mod tests {
    use farshore_extent::{Epoch, MarkerId, PointKind, Seq, VolumeId, WallTime};

    use super::*;
    use crate::catalogue::NewPoint;

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

    fn dropped(points: &[PointRow], now: u64) -> (Vec<u64>, Option<u64>) {
        let expiry = expire(points, Age(now), Duration::from_millis(100));
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
    }

    #[test]
    fn a_clock_that_goes_back_expires_nothing() {
        assert_eq!(
            dropped(&[point(1, 500, "", false), point(2, 501, "", false)], 3),
            (vec![], None)
        );
    }
}
