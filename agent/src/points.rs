//! Recovery points at the target's interval: when to ask `filterd` for a marker, over which
//! volumes. Owns no clock and cuts nothing itself.
//!
//! Volumes with the same interval share one marker, so one number: their points belong together.
//! Points are cut while the target is away, too: they wait in the log.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use farshore_extent::VolumeId;

#[derive(Debug)]
struct Group {
    next: Duration,
    volumes: BTreeSet<VolumeId>,
}

/// The schedule of all volumes of the host.
#[derive(Debug, Default)]
pub struct Points {
    groups: BTreeMap<Duration, Group>,
    skipped: BTreeMap<VolumeId, u64>,
}

impl Points {
    /// Sets the interval of a volume in milliseconds; 0 cuts none.
    pub fn set(&mut self, now: Duration, volume: VolumeId, interval_ms: u64) {
        let interval = Duration::from_millis(interval_ms);
        if self.groups.get(&interval).is_some_and(|g| g.volumes.contains(&volume)) {
            return;
        }
        self.remove(volume);
        if interval.is_zero() {
            return;
        }
        let fresh = || Group { next: now + interval, volumes: BTreeSet::new() };
        self.groups.entry(interval).or_insert_with(fresh).volumes.insert(volume);
    }

    /// The volume is no longer protected.
    pub fn remove(&mut self, volume: VolumeId) {
        self.groups.retain(|_, group| {
            group.volumes.remove(&volume);
            !group.volumes.is_empty()
        });
    }

    /// When the next marker is due.
    #[must_use]
    pub fn wakes_at(&self) -> Option<Duration> {
        self.groups.values().map(|g| g.next).min()
    }

    /// The volumes of every marker that is due, without those that `is_ordered` says cannot carry
    /// one (each is counted as skipped). After a pause one marker is due, not many.
    pub fn due(
        &mut self,
        now: Duration,
        is_ordered: impl Fn(VolumeId) -> bool,
    ) -> Vec<Vec<VolumeId>> {
        let mut due = Vec::new();
        for (interval, group) in &mut self.groups {
            if group.next > now {
                continue;
            }
            group.next += *interval;
            if group.next <= now {
                group.next = now + *interval;
            }
            let (ready, not): (Vec<_>, Vec<_>) =
                group.volumes.iter().copied().partition(|v| is_ordered(*v));
            for volume in not {
                *self.skipped.entry(volume).or_default() += 1;
            }
            if !ready.is_empty() {
                due.push(ready);
            }
        }
        due
    }

    /// A marker was placed without these volumes.
    pub fn skipped(&mut self, volumes: &[VolumeId]) {
        for volume in volumes {
            *self.skipped.entry(*volume).or_default() += 1;
        }
    }

    /// Points not cut since the agent started, because the volume was catching up.
    #[must_use]
    pub fn skipped_of(&self, volume: VolumeId) -> u64 {
        self.skipped.get(&volume).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn volumes_with_one_interval_share_a_marker_and_keep_its_beat() {
        let mut points = Points::default();
        let mut ids = [VolumeId::random(), VolumeId::random(), VolumeId::random()];
        ids.sort_unstable();
        let [a, b, c] = ids;
        points.set(ms(0), a, 1000);
        points.set(ms(300), b, 1000);
        points.set(ms(0), c, 5000);
        assert_eq!(points.wakes_at(), Some(ms(1000)));
        assert!(points.due(ms(999), |_| true).is_empty());
        assert_eq!(points.due(ms(1004), |_| true), [vec![a, b]]);
        assert_eq!(points.wakes_at(), Some(ms(2000)), "lateness does not add up");
        assert_eq!(points.due(ms(7700), |_| true), [vec![a, b], vec![c]]);
        assert_eq!(points.wakes_at(), Some(ms(8700)));
    }

    #[test]
    fn volumes_that_catch_up_are_skipped_and_counted() {
        let mut points = Points::default();
        let (a, b) = (VolumeId::random(), VolumeId::random());
        points.set(ms(0), a, 1000);
        points.set(ms(0), b, 1000);
        assert_eq!(points.due(ms(1000), |v| v == a), [vec![a]]);
        assert!(points.due(ms(2000), |_| false).is_empty());
        assert_eq!((points.skipped_of(a), points.skipped_of(b)), (1, 2));
        points.set(ms(2000), b, 0);
        points.remove(a);
        assert_eq!(points.wakes_at(), None);
    }
}
