//! The replication port: accepts connections, bounds them, does the TLS handshake, and hands each
//! to a session. Nobody is believed before the handshake; nothing is allocated for who is not.

use std::net::SocketAddr;
use std::sync::Arc;

use farshore_extent::Problem;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::authority::host_of;
use crate::config::Config;
use crate::daemon::Daemon;
use crate::problem;
use crate::session::{self, SessionEnd};

/// Binds the first of the configured addresses that works.
pub(crate) async fn bind(config: &Config) -> Result<TcpListener, Problem> {
    let addresses = config.listen_addresses().map_err(|e| problem::listen(&config.listen, &e))?;
    let bound = TcpListener::bind(&addresses[..]).await;
    bound.map_err(|e| problem::listen(&config.listen, &e))
}

/// Serves connections until the daemon stops and the sessions have ended.
pub(crate) async fn serve(daemon: Arc<Daemon>, listener: TcpListener, acceptor: TlsAcceptor) {
    let places = Arc::new(Semaphore::new(daemon.config.limits.connections));
    let mut connections = JoinSet::new();
    loop {
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors or the like: pause, so that the loop does not spin.
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            },
            Some(_) = connections.join_next() => continue,
            () = daemon.stopped() => break,
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            tracing::warn!(%peer, "refused: too many connections");
            continue;
        };
        let (daemon, acceptor) = (Arc::clone(&daemon), acceptor.clone());
        connections.spawn(async move {
            connection(&daemon, stream, peer, acceptor).await;
            drop(place);
        });
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn connection(
    daemon: &Arc<Daemon>,
    stream: TcpStream,
    peer: SocketAddr,
    acceptor: TlsAcceptor,
) {
    // Acks are small and waited for.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "the connection is gone already");
        return;
    }
    let limit = daemon.config.limits.handshake_timeout.duration();
    let stream = match tokio::time::timeout(limit, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::info!(%peer, %error, "TLS handshake failed");
            return;
        }
        Err(_) => {
            tracing::info!(%peer, "TLS handshake took longer than {limit:?}");
            return;
        }
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let host = match certificate.map(host_of) {
        Some(None) => {
            tracing::warn!(%peer, "a certificate of our CA names no host");
            return;
        }
        named => named.flatten(),
    };
    match session::serve(daemon, stream, host).await {
        SessionEnd::Refused(problem) => {
            tracing::warn!(%peer, why = problem.why, "{problem}");
            // Strangers must not be able to fill the event log.
            if host.is_some() {
                let text = format!("{}: {} ({peer})", problem.what, problem.why);
                crate::daemon::note(daemon, problem.code.0, None, text).await;
            }
        }
        end @ (SessionEnd::Wire(_) | SessionEnd::NotWritten) => {
            tracing::info!(%peer, "connection ended: {end}");
        }
        end @ (SessionEnd::Replaced | SessionEnd::Enrolled | SessionEnd::Stopping) => {
            tracing::debug!(%peer, "connection ended: {end}");
        }
    }
}
