//! Framing of the replication connection.

use farshore_changelog::limits::{MAX_BATCH_BYTES, MAX_CONTROL_MESSAGE};

/// Bytes before every body.
pub const HEADER_LEN: usize = 5;

/// What the body of a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// A control message in the limited codec.
    Control,
    /// The bytes of one batch.
    Batch,
}

/// A frame header that no peer of ours sends; the connection must be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Unknown kind.
    #[error("frame kind {0} is unknown: the peer does not speak this protocol")]
    Kind(u8),
    /// Longer than allowed for its kind.
    #[error("frame of {len} bytes, more than the {max} allowed")]
    TooLong {
        /// Announced length in bytes.
        len: usize,
        /// Limit in bytes.
        max: usize,
    },
}

impl FrameKind {
    /// Longest body in bytes.
    #[must_use]
    pub const fn max_len(self) -> usize {
        match self {
            Self::Control => MAX_CONTROL_MESSAGE,
            Self::Batch => MAX_BATCH_BYTES,
        }
    }

    /// Header for a body of `len` bytes.
    ///
    /// # Errors
    /// [`FrameError::TooLong`].
    pub fn header(self, len: usize) -> Result<[u8; HEADER_LEN], FrameError> {
        let max = self.max_len();
        let wire = u32::try_from(len).ok().filter(|_| len <= max);
        let wire = wire.ok_or(FrameError::TooLong { len, max })?.to_le_bytes();
        let kind = match self {
            Self::Control => 1,
            Self::Batch => 2,
        };
        Ok([kind, wire[0], wire[1], wire[2], wire[3]])
    }

    /// Reads a header: what follows and how many bytes of it.
    ///
    /// # Errors
    /// [`FrameError`]; check this before allocating anything.
    pub fn parse(header: [u8; HEADER_LEN]) -> Result<(Self, usize), FrameError> {
        let kind = match header[0] {
            1 => Self::Control,
            2 => Self::Batch,
            other => return Err(FrameError::Kind(other)),
        };
        let len = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        let max = kind.max_len();
        if len > max { Err(FrameError::TooLong { len, max }) } else { Ok((kind, len)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip_and_limits_hold() {
        let header = FrameKind::Batch.header(70_000).unwrap();
        assert_eq!(FrameKind::parse(header), Ok((FrameKind::Batch, 70_000)));
        assert!(FrameKind::Control.header(MAX_CONTROL_MESSAGE + 1).is_err());
        assert!(FrameKind::parse([1, 0xff, 0xff, 0xff, 0xff]).is_err());
        assert_eq!(FrameKind::parse([9, 0, 0, 0, 0]), Err(FrameError::Kind(9)));
    }
}
