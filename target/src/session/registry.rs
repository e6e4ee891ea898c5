//! Which hosts are connected, and how the rest of the daemon reaches them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farshore_extent::{HostId, Lsn, PointKind, Problem, VolumeId};
use farshore_protocol::message::FromTarget;
use tokio::sync::{oneshot, watch};

use super::outbox::Outbox;

/// One connection of one host; never reused within a run of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SessionId(u64);

/// Tag requests waiting for one host; more are refused.
const MAX_TAGS: usize = 64;

/// A connected host.
pub(crate) struct Session {
    pub(crate) id: SessionId,
    pub(crate) outbox: Arc<Outbox>,
    replaced: watch::Sender<bool>,
    tags: Mutex<BTreeMap<u64, oneshot::Sender<Result<Lsn, Problem>>>>,
}

#[derive(Default)]
struct Connected {
    next_session: u64,
    next_tag: u64,
    by_host: BTreeMap<HostId, Arc<Session>>,
}

/// All connected hosts: at most one session each.
#[derive(Default)]
pub(crate) struct Registry(Mutex<Connected>);

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Connected> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A host has connected; an older connection of it is told to end.
    pub(crate) fn enter(&self, host: HostId) -> Arc<Session> {
        let mut connected = self.lock();
        connected.next_session += 1;
        let session = Arc::new(Session {
            id: SessionId(connected.next_session),
            outbox: Arc::new(Outbox::default()),
            replaced: watch::Sender::new(false),
            tags: Mutex::default(),
        });
        if let Some(old) = connected.by_host.insert(host, Arc::clone(&session)) {
            old.replaced.send_replace(true);
        }
        session
    }

    /// The session has ended; a newer one of the same host stays.
    pub(crate) fn leave(&self, host: HostId, session: SessionId) {
        let mut connected = self.lock();
        if connected.by_host.get(&host).is_some_and(|s| s.id == session) {
            connected.by_host.remove(&host);
        }
    }

    /// The session of a host.
    pub(crate) fn get(&self, host: HostId) -> Option<Arc<Session>> {
        self.lock().by_host.get(&host).cloned()
    }

    /// Asks the host's agent to cut a marker. The receiver gets where it was placed.
    pub(crate) fn tag(
        &self,
        host: HostId,
        volumes: Vec<VolumeId>,
        kind: PointKind,
        name: String,
    ) -> Option<oneshot::Receiver<Result<Lsn, Problem>>> {
        let mut connected = self.lock();
        let session = Arc::clone(connected.by_host.get(&host)?);
        connected.next_tag += 1;
        let request = connected.next_tag;
        drop(connected);
        let (answer, receiver) = oneshot::channel();
        {
            let mut tags = session.tags();
            tags.retain(|_, waiting| !waiting.is_closed());
            if tags.len() >= MAX_TAGS {
                return None;
            }
            tags.insert(request, answer);
        }
        session.outbox.send(FromTarget::Tag { request, volumes, kind, name });
        Some(receiver)
    }
}

impl Session {
    fn tags(&self) -> MutexGuard<'_, BTreeMap<u64, oneshot::Sender<Result<Lsn, Problem>>>> {
        self.tags.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The agent's answer to a tag request; unknown requests are old ones that timed out.
    pub(crate) fn tagged(&self, request: u64, result: Result<Lsn, Problem>) {
        if let Some(waiting) = self.tags().remove(&request) {
            // Nobody waits any more: the marker is there all the same.
            let _ = waiting.send(result);
        }
    }

    /// Waits until a newer connection of the host takes over.
    pub(crate) async fn replaced(&self) {
        let mut replaced = self.replaced.subscribe();
        // The sender lives in self, so this ends only with the value.
        let _ = replaced.wait_for(|gone| *gone).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_new_connection_replaces_the_old_one_and_survives_its_end() {
        let (registry, host) = (Registry::default(), HostId::random());
        let old = registry.enter(host);
        let new = registry.enter(host);
        old.replaced().await;
        registry.leave(host, old.id);
        assert_eq!(registry.get(host).unwrap().id, new.id);
        registry.leave(host, new.id);
        assert!(registry.get(host).is_none());
    }

    #[tokio::test]
    async fn a_tag_is_answered_by_its_number_and_a_gone_host_is_none() {
        let (registry, host) = (Registry::default(), HostId::random());
        assert!(registry.tag(host, vec![], PointKind::App, "x".into()).is_none());
        let session = registry.enter(host);
        let answer = registry.tag(host, vec![], PointKind::App, "x".into()).unwrap();
        session.tagged(99, Ok(Lsn::ZERO));
        session.tagged(1, Ok(Lsn::ZERO));
        assert_eq!(answer.await.unwrap(), Ok(Lsn::ZERO));
        drop(registry.tag(host, vec![], PointKind::App, String::new()).unwrap());
        assert_eq!(session.tags().len(), 1, "an abandoned request is swept by the next");
    }
}
