//! Versions of the replication protocol. The list is its change log, newest first.

/// Versions this program speaks, newest first.
///
/// - 1: the first. Hello, volumes by name and identity, batches, cumulative durable acks, policy
///   and tag requests from the target, enrolment and renewal of certificates.
pub const SPOKEN: &[u16] = &[1];

/// The highest version both sides speak.
#[must_use]
pub fn choose(theirs: &[u16]) -> Option<u16> {
    SPOKEN.iter().copied().find(|v| theirs.contains(v))
}
