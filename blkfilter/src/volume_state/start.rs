//! How a volume begins its epoch, from what the last run left.

use farshore_extent::{Extent, Lsn};

use super::file::{Found, Left, Stored};
use super::layout::Geometry;
use crate::backing::Identity;
use crate::core::{RegionMap, Start};

/// How a volume begins its epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// For the core.
    pub start: Start,
    /// Covers everything that the start will send.
    pub set: RegionMap,
    /// What is not in `set` lies with a target that has everything up to here.
    pub released: Lsn,
}

/// Decides what is sent again. `identity`: of the backing now, none when nothing tells.
#[must_use]
pub fn plan(found: &Found, now: &Geometry, identity: Option<&Identity>) -> Plan {
    match found {
        Found::Nothing => {
            let start = Start::Copy { reason: "first copy".to_owned() };
            Plan { start, ..everything(now, "") }
        }
        Found::Damaged(why) => {
            everything(now, &format!("the state of the volume is damaged: {why}"))
        }
        Found::Stored(stored) => after(stored, now, identity),
    }
}

fn everything(now: &Geometry, reason: &str) -> Plan {
    let start = Start::Compare { reason: reason.to_owned() };
    Plan { start, set: RegionMap::full(now.size, now.region), released: Lsn::ZERO }
}

fn after(stored: &Stored, now: &Geometry, identity: Option<&Identity>) -> Plan {
    let was = &stored.geometry;
    if (was.size, was.blocks) != (now.size, now.blocks) {
        return everything(now, "the size of the backing device changed");
    }
    match &stored.left {
        Left::Anything => everything(now, "filterd could not record which regions changed"),
        Left::Ranges { ranges, released } => match (&stored.identity, identity) {
            (Some(before), Some(now_is)) if before == now_is => stopped(ranges, *released, now),
            (_, Some(_)) => everything(now, "the backing device changed while filterd was stopped"),
            (_, None) => everything(now, "nothing tells whether the backing device changed"),
        },
        Left::Regions { set, released, damaged } => {
            let same = stored.identity.as_ref().zip(identity);
            if !same.is_some_and(|(before, now)| before.may_be_followed_by(now)) {
                return everything(
                    now,
                    "filterd had not stopped in order, and the backing device was replaced or \
                     written to since",
                );
            }
            let ranges: Vec<Extent> = set.iter().filter_map(|r| set.extent(r)).collect();
            let (some, all) = (set.count(), set.regions());
            let torn = if *damaged > 0 { " (a part of the intent map is damaged)" } else { "" };
            let reason = format!(
                "filterd had not stopped in order: comparing {some} of {all} regions{torn}"
            );
            part(&ranges, *released, true, now, reason)
        }
    }
}

fn stopped(ranges: &[Extent], released: Lsn, now: &Geometry) -> Plan {
    if ranges.is_empty() {
        let start = Start::Continues { last: released };
        return Plan { start, set: RegionMap::new(now.size, now.region), released };
    }
    let bytes: u64 = ranges.iter().map(|range| range.len()).sum();
    let reason = format!("filterd stopped before the target had everything: {bytes} bytes left");
    part(ranges, released, false, now, reason)
}

fn part(ranges: &[Extent], released: Lsn, compare: bool, now: &Geometry, reason: String) -> Plan {
    let mut set = RegionMap::new(now.size, now.region);
    for range in ranges {
        for region in set.touched(*range) {
            set.set(region);
        }
    }
    Plan {
        start: Start::CopyPart { ranges: ranges.to_vec(), released, compare, reason },
        set,
        released,
    }
}
