//! Frames on an asynchronous stream. A length is checked before anything is allocated.

use std::time::Duration;

use farshore_changelog::codec;
use farshore_protocol::frame::{FrameError, FrameKind, HEADER_LEN};
use farshore_protocol::message::{FromAgent, FromTarget};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest first message, in bytes: its sender is not yet known.
pub(super) const MAX_FIRST_MESSAGE: usize = 64 << 10;

/// One frame from an agent.
pub(super) enum Incoming {
    Message(FromAgent),
    /// The bytes of a batch; nothing in them is believed yet.
    Batch(Vec<u8>),
}

/// Why nothing more can be read from a connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    /// The peer closed it in good order.
    #[error("the source closed the connection")]
    Closed,
    /// Nothing came in time.
    #[error("nothing came for {0:?}")]
    Silent(Duration),
    /// Bytes that no peer of ours sends.
    #[error("{0}")]
    Frame(#[from] FrameError),
    /// A message that cannot be decoded.
    #[error("{0}")]
    Message(#[from] codec::CodecError),
    /// The first message is too long.
    #[error("first message of {0} bytes")]
    FirstTooLong(usize),
    /// The connection broke.
    #[error("{0}")]
    Stream(std::io::Error),
}

impl WireError {
    /// Whether the peer broke the protocol (and not the network or its own life).
    pub(super) const fn is_violation(&self) -> bool {
        match self {
            Self::Frame(_) | Self::Message(_) | Self::FirstTooLong(_) => true,
            Self::Closed | Self::Silent(_) | Self::Stream(_) => false,
        }
    }
}

/// Reads one frame whose body has at most `max` bytes, within `limit` altogether.
pub(super) async fn read_frame(
    stream: &mut (impl AsyncRead + Unpin),
    limit: Duration,
    max: usize,
) -> Result<Incoming, WireError> {
    let read = tokio::time::timeout(limit, read_bounded(stream, max));
    read.await.map_err(|_| WireError::Silent(limit))?
}

async fn read_bounded(
    stream: &mut (impl AsyncRead + Unpin),
    max: usize,
) -> Result<Incoming, WireError> {
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).await.map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => WireError::Closed,
        _ => WireError::Stream(e),
    })?;
    let (kind, len) = FrameKind::parse(header)?;
    if len > max {
        return Err(WireError::FirstTooLong(len));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await.map_err(WireError::Stream)?;
    match kind {
        FrameKind::Control => Ok(Incoming::Message(codec::decode(&body)?)),
        FrameKind::Batch => Ok(Incoming::Batch(body)),
    }
}

/// Writes one message; the caller flushes.
pub(super) async fn write_message(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &FromTarget,
) -> std::io::Result<()> {
    let body = codec::encode(message).map_err(std::io::Error::other)?;
    let header = FrameKind::Control.header(body.len()).map_err(std::io::Error::other)?;
    stream.write_all(&header).await?;
    stream.write_all(&body).await
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(bytes: &[u8]) -> Result<Incoming, WireError> {
        read_frame(&mut &*bytes, Duration::from_secs(5), MAX_FIRST_MESSAGE).await
    }

    #[tokio::test]
    async fn hostile_lengths_are_refused_before_the_body_is_awaited() {
        let huge = [1, 0xff, 0xff, 0xff, 0xff];
        assert!(matches!(read(&huge).await, Err(WireError::Frame(_))));
        let long = FrameKind::Control.header(MAX_FIRST_MESSAGE + 1).unwrap();
        assert!(matches!(read(&long).await, Err(WireError::FirstTooLong(_))));
        assert!(matches!(read(&[7, 0, 0, 0, 0]).await, Err(WireError::Frame(_))));
    }

    #[tokio::test]
    async fn junk_cut_and_trailing_bytes_are_errors_not_panics() {
        let mut ping = codec::encode(&FromAgent::Ping(7)).unwrap();
        let frame = |body: &[u8]| {
            let mut all = FrameKind::Control.header(body.len()).unwrap().to_vec();
            all.extend_from_slice(body);
            all
        };
        let good = frame(&ping);
        assert!(matches!(read(&good).await, Ok(Incoming::Message(FromAgent::Ping(7)))));
        assert!(matches!(read(&good[..3]).await, Err(WireError::Closed)));
        assert!(matches!(read(&good[..8]).await, Err(WireError::Stream(_))));
        ping.push(0);
        assert!(matches!(read(&frame(&ping)).await, Err(WireError::Message(_))));
        assert!(matches!(read(&frame(&[0xff; 40])).await, Err(WireError::Message(_))));
    }
}
