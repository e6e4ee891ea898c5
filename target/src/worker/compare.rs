//! Digests of the source: compared in steps between commits, answered to who sent them, and
//! reported when verification found a difference.

use super::Worker;
use crate::store::{Compared, Defect, limits};

impl Worker {
    /// One bounded step, more only when too much waits; whether there is more.
    pub(super) fn compare_step(&mut self) -> bool {
        while let Some(store) = &mut self.store {
            let compared = store.compare(limits::COMPARE_STEP_BYTES);
            let (more, too_many) = (store.has_questions(), store.has_too_many_questions());
            if let Some(compared) = compared {
                self.answer(compared);
            }
            if !too_many {
                return more;
            }
        }
        false
    }

    /// Digests of a session that is over are not answered: the next one is told to ask again.
    pub(super) fn forget_questions(&mut self) {
        if let Some(store) = &mut self.store {
            store.forget_questions();
        }
    }

    fn answer(&mut self, compared: Compared) {
        // First, so that whoever saw the answer sees what is wrong.
        self.report_rot();
        let wrong = self.store.as_ref().map_or(0, |store| store.wrong().bytes());
        let differing = compared.differing.len() as u64;
        self.replica.update(|facts| {
            facts.compared.digests += compared.digests;
            facts.compared.differing += differing;
            facts.wrong_bytes = wrong;
        });
        if let Some(first) = compared.defects.first() {
            self.report_defects(first, compared.defects.len());
        }
        if let Some(sender) = &self.sender {
            sender.outbox.compared(self.replica.volume, compared.upto, compared.differing);
        }
    }

    fn report_defects(&self, first: &Defect, count: usize) {
        let what = match &first.unreadable {
            None => "differs from the source".to_owned(),
            Some(why) => format!("cannot be read: {why}"),
        };
        let text = format!(
            "verification at {}: {} {what} ({count} such ranges in this answer); points up to here \
             may hold it too",
            first.at, first.extent
        );
        tracing::error!(volume = %self.name(), "{text}");
        self.catalogue.note(3120, Some(&self.name()), text);
    }
}
