//! The acknowledgement gate: completed writes and flushes wait for their answer while a group
//! point is being cut.
//!
//! A completion takes its number first and looks at the gate then; a hold closes the gate first and
//! takes its marker's number then. One hold a host at a time. The gate opens alone at its deadline.

use farshore_extent::MarkerId;

use super::event::{Action, QueueId, Token, VolumeKey};
use crate::device::DeviceError;

type Result = std::result::Result<(), DeviceError>;

#[derive(Debug)]
struct Hold {
    marker: MarkerId,
    volumes: Vec<VolumeKey>,
    deadline_ms: u64,
}

/// Open, or closed for some volumes until a deadline.
#[derive(Debug, Default)]
pub(super) struct AckGate {
    hold: Option<Hold>,
    waiting: Vec<(QueueId, Token, Result)>,
    /// Planted fault: closes one event late.
    late: Option<Hold>,
}

impl AckGate {
    pub(super) fn is_closed(&self) -> bool {
        self.hold.is_some() || self.late.is_some()
    }

    pub(super) fn holds(&self, volume: VolumeKey) -> bool {
        self.hold.as_ref().is_some_and(|hold| hold.volumes.contains(&volume))
    }

    pub(super) fn close(
        &mut self,
        marker: MarkerId,
        volumes: Vec<VolumeKey>,
        deadline_ms: u64,
        late: bool,
    ) {
        let hold = Hold { marker, volumes, deadline_ms };
        if late {
            self.late = Some(hold);
        } else {
            self.hold = Some(hold);
        }
    }

    /// Planted fault: the event after the marker has passed.
    pub(super) fn close_late(&mut self) {
        if let Some(hold) = self.late.take() {
            self.hold = Some(hold);
        }
    }

    pub(super) fn wait(&mut self, queue: QueueId, token: Token, result: Result) {
        self.waiting.push((queue, token, result));
    }

    /// Opens when the hold of `marker` is still on; false when it had opened before.
    pub(super) fn release(&mut self, marker: MarkerId, out: &mut Vec<Action>) -> bool {
        self.close_late();
        let on = self.hold.as_ref().is_some_and(|hold| hold.marker == marker);
        if on {
            self.open(out);
        }
        on
    }

    /// Opens when the deadline has passed.
    pub(super) fn expire(&mut self, mono_ms: u64, out: &mut Vec<Action>) {
        let Some(hold) = self.hold.as_ref().filter(|hold| hold.deadline_ms <= mono_ms) else {
            return;
        };
        out.push(Action::HoldBroken { marker: hold.marker });
        self.open(out);
    }

    pub(super) fn deadline_ms(&self) -> Option<u64> {
        self.hold.as_ref().map(|hold| hold.deadline_ms)
    }

    fn open(&mut self, out: &mut Vec<Action>) {
        self.hold = None;
        let waiting = self.waiting.drain(..);
        out.extend(waiting.map(|(queue, token, result)| Action::Answer { queue, token, result }));
    }
}
