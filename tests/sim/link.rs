//! The connection: ordered and reliable while it lasts, and gone with everything in it when cut.

use std::collections::VecDeque;
use std::sync::Arc;

use farshore_changelog::EncodedBatch;
use farshore_extent::{Lsn, VolumeId};
use farshore_protocol::message::{FromTarget, OpenVolume};

/// Agent to target.
pub enum ToTarget {
    Open(OpenVolume),
    Batch(VolumeId, Arc<EncodedBatch>),
}

/// One connection at a time.
#[derive(Default)]
pub struct Link {
    up: bool,
    /// No connection can be made until then.
    pub outage: bool,
    pub to_target: VecDeque<ToTarget>,
    pub to_agent: VecDeque<FromTarget>,
    newest: Lsn,
}

impl Link {
    pub const fn is_up(&self) -> bool {
        self.up
    }

    pub fn connect(&mut self) {
        self.cut();
        self.up = !self.outage;
    }

    pub fn cut(&mut self) {
        self.up = false;
        self.to_target.clear();
        self.to_agent.clear();
    }

    pub fn send(&mut self, message: ToTarget) {
        if !self.up {
            return;
        }
        if let ToTarget::Batch(_, batch) = &message {
            self.newest = self.newest.max(batch.header.last());
        }
        self.to_target.push_back(message);
    }

    /// Whether something at or after this place was sent before.
    pub fn sent_before(&self, lsn: Lsn) -> bool {
        lsn <= self.newest
    }

    pub fn answer(&mut self, message: FromTarget) {
        if self.up {
            self.to_agent.push_back(message);
        }
    }
}
