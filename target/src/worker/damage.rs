//! Damage of the medium, found when the store was opened or while it is read: told to people.

use super::Worker;
use crate::store::{RecoveryReport, limits};

impl Worker {
    pub(super) fn report_recovery(&self, report: &RecoveryReport) {
        let name = self.name();
        if let Some(at) = report.torn_tail {
            tracing::info!(volume = %name, %at, "a write cut off by a power loss was removed");
        }
        if report.lost_checksums {
            let text = "base.crc was gone: the checksums of the base image are made anew, and what \
                        rotted in it before is not found";
            self.catalogue.note(6015, Some(&name), text.to_owned());
        }
        for damage in &report.damage {
            let text = format!(
                "damaged: {}; places after {} up to {} are lost here and copied again",
                damage.what, damage.after, damage.upto
            );
            self.catalogue.note(6009, Some(&name), text);
        }
    }

    /// One bounded step of making checksums that the base does not have yet; whether there is more.
    pub(super) fn sum_step(&mut self) -> bool {
        match self.store.as_mut().map(|store| store.make_sums(limits::COMPARE_STEP_BYTES)) {
            None | Some(Ok(false)) => false,
            Some(Ok(true)) => true,
            Some(Err(error)) => {
                self.store_failed(&error);
                false
            }
        }
    }

    /// What whoever read the base has found to be rotten.
    pub(super) fn report_rot(&mut self) {
        let Some(store) = &mut self.store else { return };
        let found = store.take_rot();
        let Some(first) = found.first() else { return };
        let (bytes, newest) = (found.iter().map(|e| e.len()).sum::<u64>(), store.rotten().bytes());
        let text = format!(
            "base.img is damaged: {bytes} bytes in {} ranges, the first {first}; points up to {} \
             that did not overwrite them lack them, the newest state lacks {newest}",
            found.len(),
            store.position().durable,
        );
        tracing::error!(volume = %self.name(), "{text}");
        self.catalogue.note(6015, Some(&self.name()), text);
        self.publish_position();
    }
}
