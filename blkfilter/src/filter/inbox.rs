//! Actions of the core for a queue, decided on another thread.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::{io, mem};

use crate::core::Action;
use crate::sys::wake::Event;

/// Filled by any thread, emptied by the thread of its queue.
#[derive(Debug)]
pub(super) struct Inbox {
    actions: Mutex<Vec<Action>>,
    /// The event is set: spares the owner a lock and a system call when it is not. Raised after
    /// the event, so that an owner who was faster than the waker clears it the next time; the other
    /// way round the event would stay set with nobody to clear it.
    filled: AtomicBool,
    event: Event,
}

impl Inbox {
    pub(super) fn new() -> io::Result<Self> {
        let actions = Mutex::default();
        Ok(Self { actions, filled: AtomicBool::new(false), event: Event::new()? })
    }

    /// Puts an action in. [`Self::wake`] has to follow.
    pub(super) fn put(&self, action: Action) {
        self.actions.lock().unwrap_or_else(PoisonError::into_inner).push(action);
    }

    /// Makes the owner look.
    pub(super) fn wake(&self) {
        self.event.set();
        self.filled.store(true, Ordering::Release);
    }

    /// Moves what is inside to `out`. Clears the event.
    pub(super) fn take(&self, out: &mut Vec<Action>) {
        if self.filled.swap(false, Ordering::AcqRel) {
            self.event.clear();
            out.append(&mut self.actions.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// The same, also when only [`Self::wake`] was called.
    pub(super) fn take_all(&self, out: &mut Vec<Action>) {
        self.event.clear();
        self.filled.store(false, Ordering::Release);
        let mut inside = self.actions.lock().unwrap_or_else(PoisonError::into_inner);
        out.append(&mut mem::take(&mut inside));
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::VolumeKey;
    use crate::sys::wake::wait_readable;

    fn key() -> VolumeKey {
        use crate::core::{Attach, CaptureCore, Limits, Now, Start};
        use farshore_extent::{BlockSizes, ChunkSize, Epoch, Lsn, VolumeId, VolumeSize};
        let mut core = CaptureCore::new(Epoch::new(1), Limits::default());
        let attach = Attach {
            volume: VolumeId::random(),
            size: VolumeSize::new(1 << 20).unwrap(),
            blocks: BlockSizes::E512,
            chunk: ChunkSize::DEFAULT,
            pool_bytes: 4 << 20,
            start: Start::Continues { last: Lsn::ZERO },
            intent: None,
        };
        core.attach(Now::default(), attach, &mut Vec::new()).unwrap()
    }

    #[test]
    fn what_was_put_in_is_announced_until_taken() {
        let inbox = Inbox::new().unwrap();
        let readable = || wait_readable(&[inbox.fd()], Some(std::time::Duration::ZERO)).unwrap();
        let mut out = vec![];
        inbox.take(&mut out);
        assert!(out.is_empty() && readable() == [false]);
        inbox.put(Action::CopyWanted { volume: key() });
        inbox.wake();
        assert_eq!(readable(), [true]);
        inbox.take(&mut out);
        assert!(out.len() == 1 && readable() == [false]);
    }

    #[test]
    fn a_wake_that_comes_after_its_action_was_taken_does_not_stay() {
        let inbox = Inbox::new().unwrap();
        let readable = || wait_readable(&[inbox.fd()], Some(std::time::Duration::ZERO)).unwrap();
        let mut out = vec![];
        inbox.put(Action::CopyWanted { volume: key() });
        inbox.wake();
        inbox.put(Action::CopyWanted { volume: key() });
        inbox.take(&mut out);
        assert_eq!(out.len(), 2);
        inbox.wake();
        inbox.take(&mut out);
        assert_eq!(readable(), [false], "the owner would spin");
    }
}
