//! What happens without anybody asking: replicas are reported to their sources, points expire,
//! views that are not served or whose devices have stopped are looked after, the clock of retention
//! is saved.

use std::sync::Arc;
use std::time::Duration;

use farshore_extent::{Problem, WallTime};
use farshore_protocol::message::FromTarget;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::daemon::{Daemon, blocking};
use crate::replica::Replica;
use crate::retention::{self, policy::Policy};
use crate::worker::Work;
use crate::{policy, views};

/// Bytes a second also where scrubbing by itself is off: for one that was asked for, and for
/// checksums that the base does not have yet.
pub(crate) const SLOWEST_SCRUB: u64 = 1 << 20;

const REPORT_EVERY: Duration = Duration::from_secs(1);
const TEND_EVERY: Duration = Duration::from_secs(1);
/// Expiry looks ten times in the shortest tier, at most and at least so often.
const EXPIRE_EVERY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Runs until the daemon stops.
pub(crate) async fn keep(daemon: Arc<Daemon>) {
    let mut report = interval(REPORT_EVERY);
    let mut expire = Instant::now();
    report.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let views = tokio::spawn(tend_views(daemon.clone()));
    loop {
        tokio::select! {
            () = daemon.stopped() => break,
            _ = report.tick() => {
                report_all(&daemon);
                scrub_all(&daemon);
            }
            () = sleep_until(expire) => {
                let pause = blocking(&daemon, expire_all).await.unwrap_or_else(|problem| {
                    tracing::warn!(why = problem.why, "{problem}");
                    EXPIRE_EVERY.1
                });
                expire = Instant::now() + pause;
            }
        }
    }
    // A panic there was reported when it happened.
    let _ = views.await;
}

/// On its own: taking over a device may last.
async fn tend_views(daemon: Arc<Daemon>) {
    let mut tend = interval(TEND_EVERY);
    tend.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = daemon.stopped() => return,
            _ = tend.tick() => {}
        }
        views::serve_again(&daemon).await;
        let tended = blocking(&daemon, |d| {
            d.views.tend(d);
            Ok(())
        });
        // Only fails while the runtime ends.
        let _ = tended.await;
    }
}

/// Tells every connected source what its replicas hold.
fn report_all(daemon: &Daemon) {
    for replica in daemon.replicas() {
        let facts = replica.facts();
        let session = daemon.sessions.get(facts.row.host).filter(|s| facts.session == Some(s.id));
        if let Some(session) = session {
            session.outbox.send(FromTarget::Replica {
                volume: replica.volume,
                points: facts.points.count,
                newest_point: facts.points.newest.unwrap_or(WallTime::from_nanos(0)),
                oldest_point: facts.points.oldest.unwrap_or(WallTime::from_nanos(0)),
            });
        }
    }
}

/// Lets every worker read a second's worth, and begin a pass when one is due.
fn scrub_all(daemon: &Daemon) {
    let rate = daemon.config.scrub_rate.bytes_per_second();
    let (now, every) = (WallTime::now(), daemon.config.scrub_every.duration());
    for replica in daemon.replicas() {
        let last = replica.facts().scrub.last;
        // A clock that was set back makes it early, never late.
        let due = last.is_none_or(|last| last.at > now || now.since(last.at) >= every);
        replica.offer(Work::Scrub { bytes: rate.max(SLOWEST_SCRUB), begin: due && rate > 0 });
    }
}

/// Returns when to look again.
fn expire_all(daemon: &Daemon) -> Result<Duration, Problem> {
    daemon.catalogue.lock().set_age(daemon.clock.now())?;
    let mut pause = EXPIRE_EVERY.1;
    for replica in daemon.replicas() {
        // While the point of a failover can be changed, all points stay.
        if replica.facts().pair.is_some_and(|pair| pair.fences()) {
            continue;
        }
        // Nothing expires by a policy that is not known; `policy::warn` has said so.
        let Ok(policy) = policy::of(daemon, &replica.facts().row) else { continue };
        expire_points(daemon, &replica, &policy)?;
        pause = pause.min(Duration::from_millis(policy.shortest() / 10));
    }
    Ok(pause.max(EXPIRE_EVERY.0))
}

/// Rows first, then the journal: a crash in between leaves journal that the next round frees,
/// never a row whose data is gone. Open views are pinned by the store itself.
fn expire_points(daemon: &Daemon, replica: &Replica, policy: &Policy) -> Result<(), Problem> {
    let points = daemon.catalogue.lock().points(replica.volume, None, 0)?;
    let expiry = retention::expire(&points, daemon.clock.now(), policy);
    if !expiry.drop.is_empty() {
        daemon.catalogue.lock().drop_points(&expiry.drop)?;
        replica.send_blocking(Work::Recount);
    }
    replica.update(|facts| facts.expired = facts.expired.max(expiry.floor.unwrap_or_default()));
    let facts = replica.facts();
    // Again and again while a view holds it.
    if facts.expired > facts.floor {
        replica.send_blocking(Work::Retain { floor: facts.expired });
    }
    Ok(())
}
