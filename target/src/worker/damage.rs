//! Damage of the medium, found when the store was opened or while it is read: told to people.

use farshore_extent::WallTime;

use super::Worker;
use crate::catalogue::Scrub;
use crate::store::{RecoveryReport, ScrubFinding, StoreError, limits};

/// What may be scrubbed now, and what the pass under way has found.
#[derive(Default)]
pub(super) struct Scrubbing {
    /// Bytes until the next second.
    left: u64,
    /// A pass is to begin.
    wanted: bool,
    found: u64,
}

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

    /// When the last pass ended, as the catalogue knows it.
    pub(super) fn recall_scrub(&self) {
        match self.catalogue.lock().last_scrub(self.replica.volume) {
            Ok(last) => self.replica.update(|facts| facts.scrub.last = last),
            Err(error) => tracing::error!(%error, "the last scrub cannot be looked up"),
        }
    }

    /// A second has passed: so many bytes may be read, and perhaps a pass is to begin.
    pub(super) fn may_scrub(&mut self, bytes: u64, begin: bool) {
        self.scrubbing.left = bytes;
        self.scrubbing.wanted |= begin;
        // On a volume that is never idle it is this one step a second.
        self.scrub_step();
    }

    /// One bounded step of making checksums that the base does not have yet, or of a scrub; whether
    /// there is more to do now.
    pub(super) fn scrub_step(&mut self) -> bool {
        let step = limits::SCRUB_STEP_BYTES.min(self.scrubbing.left);
        let Some(store) = self.store.as_mut().filter(|_| step > 0) else { return false };
        let mut read = step;
        let stepped = store.make_sums(step).and_then(|made| {
            let wanted = std::mem::take(&mut self.scrubbing.wanted);
            if made {
                self.scrubbing.wanted = wanted;
                return Ok(None);
            }
            if store.scrubbing().is_none() {
                if !wanted {
                    read = 0;
                    return Ok(None);
                }
                self.scrubbing.found = 0;
            }
            store.scrub(step).map(Some)
        });
        let scrubbed = match stepped {
            Ok(scrubbed) => scrubbed,
            // Checksums can wait; status says how many are missing.
            Err(StoreError::DiskFull { .. }) => return false,
            Err(error) => {
                self.store_failed(&error);
                return false;
            }
        };
        let mut more = read > 0;
        if let Some(scrubbed) = scrubbed {
            read = scrubbed.read.max(limits::COMPARE_PIECE);
            more = !scrubbed.done && !scrubbed.waits;
            self.scrubbing.found += scrubbed.findings.len() as u64 + scrubbed.rotten;
            self.report_findings(&scrubbed.findings);
            self.report_rot();
            if scrubbed.done {
                self.end_scrub();
            }
        }
        if read > 0 {
            self.publish_position();
        }
        self.scrubbing.left = self.scrubbing.left.saturating_sub(read);
        more && self.scrubbing.left > 0
    }

    fn end_scrub(&mut self) {
        let last = Scrub { at: WallTime::now(), found: self.scrubbing.found };
        let noted = self.catalogue.lock().set_last_scrub(self.replica.volume, last);
        if let Err(error) = noted {
            tracing::error!(volume = %self.name(), %error, "the end of a scrub was not noted");
        }
        self.replica.update(|facts| facts.scrub.last = Some(last));
    }

    fn report_findings(&self, findings: &[ScrubFinding]) {
        for finding in findings {
            let ranges = finding.extents.first().map(|first| {
                format!(
                    "; ranges: {}, the first {first}; points from {} on that did not overwrite them lack them",
                    finding.extents.len(),
                    finding.from,
                )
            });
            let text = format!("{}{}", finding.what, ranges.unwrap_or_default());
            tracing::error!(volume = %self.name(), "{text}");
            self.catalogue.note(6009, Some(&self.name()), text);
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
