//! A view on TCP: the NBD greeting and STARTTLS here, TLS 1.3 with a certificate of an enrolled
//! host, then the plaintext goes to the same NBD server as the unix socket's.

use std::net::SocketAddr;
use std::os::unix::net::UnixStream as BlockingStream;
use std::sync::Arc;
use std::time::Duration;

use farshore_blkfilter::frontend::nbd::starttls::{BeforeTls, Step};
use farshore_blkfilter::frontend::nbd::{Exports, serve_after_starttls, wire::ClientFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// Longest wait for a peer until it is in transmission.
const HANDSHAKE_WAIT: Duration = Duration::from_secs(10);
/// Connections of one TLS export at a time.
const MAX_CONNECTIONS: usize = 16;
/// Bytes read at once before TLS; an option has at most a few hundred.
const READ: usize = 4096;

/// Accepts until dropped (the task is aborted when the view is closed).
pub(super) async fn serve(listener: TcpListener, tls: TlsAcceptor, exports: Exports) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors or the like: pause, so that the loop does not spin.
                tracing::warn!(%error, "a connection to a view could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let (tls, exports) = (tls.clone(), exports.clone());
        connections.spawn(async move {
            if let Err(error) = connection(stream, peer, tls, exports).await {
                tracing::info!(%peer, %error, "connection to a view ended");
            }
            drop(place);
        });
    }
}

async fn connection(
    mut stream: TcpStream,
    peer: SocketAddr,
    tls: TlsAcceptor,
    exports: Exports,
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let begun = async {
        let Some(flags) = before_tls(&mut stream).await? else { return Ok(None) };
        Ok::<_, std::io::Error>(Some((tls.accept(stream).await?, flags)))
    };
    let Some((mut outside, flags)) = tokio::time::timeout(HANDSHAKE_WAIT, begun).await?? else {
        return Ok(());
    };
    tracing::debug!(%peer, "TLS client of a view");
    let (inside, served) = BlockingStream::pair()?;
    inside.set_nonblocking(true)?;
    let mut inside = UnixStream::from_std(inside)?;
    // Ends when either side of the pair is closed.
    std::thread::Builder::new()
        .name("nbd-tls".into())
        .spawn(move || serve_after_starttls(served, &exports, flags, HANDSHAKE_WAIT))?;
    tokio::io::copy_bidirectional(&mut outside, &mut inside).await?;
    Ok(())
}

/// The plaintext part; none when the client leaves or does not want TLS.
async fn before_tls(stream: &mut TcpStream) -> std::io::Result<Option<ClientFlags>> {
    stream.write_all(&BeforeTls::greeting()).await?;
    let mut state = BeforeTls::new();
    let mut bytes = [0; READ];
    loop {
        let got = stream.read(&mut bytes).await?;
        if got == 0 {
            return Ok(None);
        }
        let mut out = Vec::new();
        let step = state.feed(&bytes[..got], &mut out);
        stream.write_all(&out).await?;
        match step {
            Step::More => {}
            Step::BeginTls(flags) => return Ok(Some(flags)),
            Step::Close => return Ok(None),
        }
    }
}
