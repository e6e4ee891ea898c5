//! Whether the target can be reached with what this host has: name, TCP or proxy, TLS with both
//! certificates. No session is begun, so a running agent is not disturbed.

use std::time::{Duration, Instant};

use farshore_extent::Problem;

use crate::config::Config;
use crate::identity::Identity;
use crate::link::{Link, LinkConfig};

/// Longest wait for a refusal after the handshake.
const REFUSAL: Duration = Duration::from_secs(1);

/// A target that took this host's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reached {
    /// `host:port` of the target.
    pub address: String,
    /// From the first packet to the end of the TLS handshake.
    pub took: Duration,
}

/// Knocks at the target, for at most about `limit`.
///
/// # Errors
/// FS-5204 for an unusable identity, FS-5101 to FS-5106 as a session would end with.
pub async fn reach(
    config: &Config,
    identity: &Identity,
    limit: Duration,
) -> Result<Reached, Problem> {
    let address = config.target.clone().unwrap_or_else(|| identity.target.clone());
    let mut link = LinkConfig::new(address.clone(), config.proxy.clone());
    link.connect_timeout = limit;
    let started = Instant::now();
    let mut link = Link::dial(&link, identity.tls()?).await.map_err(|f| f.problem)?;
    let took = started.elapsed();
    link.accepted(REFUSAL).await.map_err(|f| f.problem)?;
    Ok(Reached { address, took })
}
