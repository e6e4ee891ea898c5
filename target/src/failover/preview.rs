//! What a failover to a point would cost, exactly, as far as the target can know. Changes nothing.

use std::sync::Arc;

use farshore_extent::{CaptureOrder, Problem};
use farshore_protocol::failover::{FailoverPreview, PreviewFailover};
use tokio::sync::oneshot;

use super::pair::Pair;
use super::store_generation;
use crate::daemon::{Daemon, blocking};
use crate::worker::Work;
use crate::{problem, views};

/// See the module.
pub(crate) async fn preview(
    daemon: &Arc<Daemon>,
    wish: PreviewFailover,
) -> Result<FailoverPreview, Problem> {
    let replica = daemon.replica(&wish.volume)?;
    let found = views::locate(daemon, &replica, &wish.point).await?;
    let own = store_generation(&replica).await?;
    let (reply, answer) = oneshot::channel();
    if !replica.send(Work::Behind { after: found.lsn, reply }).await {
        return Err(problem::stopping());
    }
    let behind = answer.await.map_err(|_| problem::stopping())??;
    let name = replica.name();
    // Reads the tables of every batch behind the point.
    let written = blocking(daemon, move |_| behind.count().map_err(|e| e.problem(name.as_str())));
    let written = written.await?;
    let facts = replica.facts();
    let pair = facts.pair.unwrap_or_else(|| Pair::new(own));
    let open = pair.open.map(|open| open.view);
    let view = daemon.views.list(daemon).into_iter().find(|info| Some(info.view) == open);
    Ok(FailoverPreview {
        volume: replica.name(),
        phase: pair.phase,
        generation: pair.generation,
        lsn: found.lsn,
        time: found.time,
        point: found.point,
        journaled: facts.durable,
        journaled_time: written.last.unwrap_or(found.time),
        ordered: facts.order == CaptureOrder::Ordered,
        lost_writes: written.writes,
        lost_bytes: written.bytes,
        connected: facts.session.is_some(),
        last_contact: facts.heard.map(|heard| heard.at),
        unsent_bytes: facts.heard.map_or(0, |heard| heard.unsent_bytes),
        view: view.map(Box::new),
    })
}
