//! Which points stay: a pure function of points, policy and the clock of retention.
//!
//! A tier with slots keeps the first point of each slot, for the newest slots that have one. The
//! slot of a point is its age at recording divided by the length of the slot, so it never changes,
//! and which point is the first of a slot is settled when the second one comes. How long a slot
//! lives depends on the slot alone, not on the point in it, so no other point ever takes the place
//! of one that has gone. Hence what stays is the same however often, and whenever, one has looked
//! before: nothing is dropped that would be wanted later.

pub mod policy;
#[cfg(test)]
mod tests;

use farshore_extent::{Lsn, PointId, PointKind};

use crate::catalogue::{Age, PointRow};
use policy::{Policy, Tier};

/// What to forget.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Expiry {
    /// Points that have expired.
    pub drop: Vec<PointId>,
    /// No place before this one can be asked for any more; none while nothing expires.
    pub floor: Option<Lsn>,
}

/// Why a point stays: any number of reasons, none when it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reasons {
    tiers: u32,
    /// It is named or pinned.
    pub held: bool,
    /// It is the newest.
    pub newest: bool,
}

impl Reasons {
    /// Whether there is one.
    #[must_use]
    pub const fn stays(self) -> bool {
        self.tiers != 0 || self.held || self.newest
    }

    /// Whether the tier with this number of [`Policy::all_tiers`] keeps it.
    #[must_use]
    pub fn by_tier(self, number: usize) -> bool {
        u32::try_from(number).is_ok_and(|n| self.tiers.checked_shr(n).is_some_and(|t| t & 1 == 1))
    }
}

/// Decides over all points of one volume (in any order) at the time `now`.
///
/// Named and pinned points stay, and the newest: so the last good point before a catch-up is never
/// lost. The floor is the oldest point that stays: what it shows, and every moment after it, can be
/// opened. A named point therefore holds the journal behind it.
#[must_use]
pub fn expire(points: &[PointRow], now: Age, policy: &Policy) -> Expiry {
    let stays: Vec<bool> = reasons(points, now, policy).into_iter().map(Reasons::stays).collect();
    let having = |wanted: bool| {
        points.iter().zip(&stays).filter(move |(_, stays)| **stays == wanted).map(|(p, _)| p)
    };
    let drop: Vec<PointId> = having(false).map(|p| p.point).collect();
    let floor = if drop.is_empty() { None } else { having(true).map(|p| p.at.lsn).min() };
    Expiry { drop, floor }
}

/// Why each of the points stays, in their order. O(n log n).
#[must_use]
pub fn reasons(points: &[PointRow], now: Age, policy: &Policy) -> Vec<Reasons> {
    let newest = points.iter().map(|p| p.at.lsn).max();
    let mut all: Vec<Reasons> = points
        .iter()
        .map(|p| Reasons {
            tiers: 0,
            held: p.pinned || !p.at.name.is_empty(),
            newest: Some(p.at.lsn) == newest,
        })
        .collect();
    for (number, (tier, app)) in policy.all_tiers().enumerate() {
        let bit = u32::try_from(number).ok().and_then(|n| 1u32.checked_shl(n)).unwrap_or(0);
        let mut keep = |at: usize| {
            if let Some(reasons) = all.get_mut(at) {
                reasons.tiers |= bit;
            }
        };
        let of_tier =
            points.iter().enumerate().filter(|(_, p)| !app || p.at.kind == PointKind::App);
        match tier.slot {
            None => of_tier
                .filter(|(_, p)| now.0.saturating_sub(p.recorded.0) < tier.keep)
                .for_each(|(at, _)| keep(at)),
            Some(slot) => firsts(of_tier, slot, now, tier).into_iter().for_each(keep),
        }
    }
    all
}

/// The first point of each of the newest slots.
fn firsts<'a>(
    points: impl Iterator<Item = (usize, &'a PointRow)>,
    slot: u64,
    now: Age,
    tier: &Tier,
) -> Vec<usize> {
    let slot = slot.max(1);
    let ended = |number: u64| number.saturating_add(1).saturating_mul(slot);
    let alive = |number: u64| now.0.saturating_sub(ended(number)) < tier.keep;
    let mut all: Vec<(u64, Lsn, usize)> = points
        .map(|(at, p)| (p.recorded.0 / slot, p.at.lsn, at))
        .filter(|(number, ..)| alive(*number))
        .collect();
    all.sort_unstable();
    all.dedup_by_key(|(number, ..)| *number);
    let most = tier.most().and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
    all.into_iter().rev().take(most).map(|(.., at)| at).collect()
}
