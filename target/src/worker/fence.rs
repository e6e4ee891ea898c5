//! Which sources may send the volume: the answer to an `Open`, and the generation.

use std::sync::Arc;

use farshore_extent::{Generation, Lsn, Problem};
use farshore_protocol::message::{FromTarget, OpenVolume, Opened, Verdict};

use super::{Sender, Worker};
use crate::problem;
use crate::replica::Comparison;
use crate::session::verdict::{Decision, Position, decide};
use crate::session::{Outbox, SessionId};
use crate::store::Behind;

impl Worker {
    pub(super) fn open(&mut self, session: SessionId, outbox: Arc<Outbox>, open: &OpenVolume) {
        // The last word of a connection that a newer one has replaced already.
        if self.sender.as_ref().is_some_and(|s| s.session > session) {
            return;
        }
        self.commit();
        self.forget_questions();
        if self.store.is_none() {
            self.open_store();
        }
        let refuse = |problem: Problem, retry| {
            let volume = Some(open.volume);
            outbox.send(FromTarget::Refused { volume, problem, retry });
        };
        // Not open, or its disk is still full: what was sent is not durable yet.
        let working = self.store.as_mut().filter(|store| store.uncommitted_bytes() == 0);
        let Some(store) = working else {
            let stopped = || problem::store(&open.name, &"it was not opened");
            return refuse(self.replica.facts().problem.unwrap_or_else(stopped), true);
        };
        let at = store.position();
        let own = Position { generation: at.generation, lsn: at.durable, chain: at.chain };
        let pair = self.replica.facts().pair;
        let fenced = pair.as_ref().is_some_and(|pair| pair.fences());
        let generation =
            pair.map_or(open.generation, |pair| pair.taken_for(open.generation, at.generation));
        let source = Position { generation, lsn: open.acked, chain: open.acked_chain };
        let decision = if fenced { Decision::Fenced } else { decide(source, own) };
        let verdict = match decision {
            Decision::Continue | Decision::SkipAhead => Verdict::Continue,
            lost @ (Decision::RecopyLost | Decision::RecopyUnknownHistory) => {
                let text = format!(
                    "the source copies everything again ({lost:?}): it was acknowledged up to {}, the replica is at {}",
                    open.acked, at.durable
                );
                self.catalogue.note(3001, Some(&open.name), text);
                Verdict::Recopy
            }
            Decision::Fenced => {
                let fenced = problem::fenced(&open.name, at.generation, open.generation);
                self.catalogue.note(fenced.code.0, Some(&open.name), fenced.what.clone());
                return refuse(fenced, false);
            }
            Decision::TargetIsOld => {
                let old = problem::unknown_generation(&open.name, at.generation, open.generation);
                self.catalogue.note(old.code.0, Some(&open.name), old.what.clone());
                return refuse(old, false);
            }
        };
        outbox.send(FromTarget::Opened(Opened {
            volume: open.volume,
            generation: at.generation,
            durable: at.durable,
            chain: at.chain,
            verdict,
            point_interval_ms: self.replica.facts().row.point_interval_ms,
        }));
        self.sender = Some(Sender { session, outbox, accepting: true, owes_ack: false });
        self.replica.update(|facts| {
            facts.session = Some(session);
            facts.report = None;
            facts.problem = None;
            facts.compared = Comparison::default();
        });
    }

    /// Raises the generation durably, at least to `to`, and tells the source that is connected.
    /// Returns what it is then.
    pub(super) fn raise(&mut self, to: Generation) -> Result<Generation, Problem> {
        self.commit();
        if self.store.is_none() {
            self.open_store();
        }
        let name = self.name();
        let not_open = || problem::store(&name, &"it is not open; see farshore status");
        let Some(store) = &mut self.store else {
            return Err(self.replica.facts().problem.unwrap_or_else(not_open));
        };
        let before = store.position().generation;
        if let Err(error) = store.raise_generation_to(to) {
            let problem = error.problem(name.as_str());
            self.store_failed(&error);
            return Err(problem);
        }
        let own = store.position().generation;
        if own > before && self.sender.as_ref().is_some_and(|s| s.accepting) {
            self.refuse(problem::fenced(&name, own, before), false);
        }
        Ok(own)
    }

    /// The journal behind a place.
    pub(super) fn behind(&mut self, after: Lsn) -> Result<Behind, Problem> {
        self.commit();
        let not_open = || problem::store(&self.name(), &"it is not open; see farshore status");
        self.store.as_ref().map(|store| store.journal_behind(after)).ok_or_else(not_open)
    }
}
