//! Which way guests reach a volume: the best one this host has, or the one asked for.
//!
//! A ublk device is the fastest and survives a restart of the daemon; a device of the kernel's NBD
//! client survives it too; a plain socket needs nothing of the kernel.

use crate::control::{AttachChoice, AttachKind};
use crate::frontend::{kernel_nbd, ublk};

/// What this host has, asked only when it matters: asking for the kernel's NBD client loads it.
/// `Err` says what is missing and how to get it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ways<U, N> {
    ublk: U,
    nbd: N,
}

type Possible = Result<(), String>;

/// The way asked for is not possible here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Impossible {
    pub(super) kind: AttachKind,
    pub(super) why: String,
}

/// The way on this host; `wish`: the one asked for, none for the best.
pub(super) fn choose(wish: Option<AttachKind>) -> Result<AttachChoice, Impossible> {
    let ways = Ways {
        ublk: || ublk::features().map(drop).map_err(|why| why.to_string()),
        nbd: || kernel_nbd::available().map(drop).map_err(|why| why.to_string()),
    };
    ways.choose(wish)
}

impl<U: Fn() -> Possible, N: Fn() -> Possible> Ways<U, N> {
    fn choose(&self, wish: Option<AttachKind>) -> Result<AttachChoice, Impossible> {
        let Some(kind) = wish else { return Ok(self.best()) };
        let possible = match kind {
            AttachKind::Ublk => (self.ublk)(),
            AttachKind::Nbd => (self.nbd)(),
            AttachKind::Socket => Ok(()),
        };
        match possible {
            Ok(()) => Ok(AttachChoice { kind, why: "as asked for".to_owned() }),
            Err(why) => Err(Impossible { kind, why }),
        }
    }

    fn best(&self) -> AttachChoice {
        let choice = |kind, why| AttachChoice { kind, why };
        let Err(ublk) = (self.ublk)() else {
            return choice(AttachKind::Ublk, "the kernel has it".to_owned());
        };
        match (self.nbd)() {
            Ok(()) => choice(AttachKind::Nbd, format!("there is no ublk: {ublk}")),
            Err(nbd) => choice(
                AttachKind::Socket,
                format!("there is no ublk: {ublk}; and no kernel NBD: {nbd}"),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ways(
        ublk: Result<(), &'static str>,
        nbd: Result<(), &'static str>,
    ) -> Ways<impl Fn() -> Possible, impl Fn() -> Possible> {
        Ways { ublk: move || ublk.map_err(str::to_owned), nbd: move || nbd.map_err(str::to_owned) }
    }

    #[test]
    fn without_a_wish_the_best_way_is_taken_and_the_reason_names_what_a_better_one_lacks() {
        let chosen = |ublk, nbd| ways(ublk, nbd).choose(None).unwrap();
        assert_eq!(chosen(Ok(()), Err("x")).kind, AttachKind::Ublk);
        let second = chosen(Err("modprobe ublk_drv"), Ok(()));
        assert_eq!(second.kind, AttachKind::Nbd);
        assert!(second.why.contains("modprobe ublk_drv"));
        let last = chosen(Err("modprobe ublk_drv"), Err("modprobe nbd"));
        assert_eq!(last.kind, AttachKind::Socket);
        assert!(last.why.contains("ublk_drv") && last.why.contains("modprobe nbd"));
    }

    #[test]
    fn a_wish_is_granted_or_refused_with_what_is_missing_and_never_replaced() {
        let ways = ways(Err("no module"), Ok(()));
        let refused = ways.choose(Some(AttachKind::Ublk)).unwrap_err();
        assert_eq!((refused.kind, refused.why.as_str()), (AttachKind::Ublk, "no module"));
        for kind in [AttachKind::Nbd, AttachKind::Socket] {
            assert_eq!(ways.choose(Some(kind)).unwrap().kind, kind);
        }
    }

    #[test]
    fn a_way_that_is_not_needed_is_not_asked_for() {
        let never = || -> Possible { panic!("asking would load a module") };
        let none = Ways { ublk: never, nbd: never };
        assert_eq!(none.choose(Some(AttachKind::Socket)).unwrap().kind, AttachKind::Socket);
        let best = Ways { ublk: || Ok(()), nbd: never };
        for wish in [None, Some(AttachKind::Ublk)] {
            assert_eq!(best.choose(wish).unwrap().kind, AttachKind::Ublk);
        }
    }
}
