//! The one place where bincode is called: control messages only, always with a limit.
//!
//! Without the limit a message of 80 bytes makes bincode ask for 16 TiB and abort the process.
//! The `legacy()` configuration (fixed integers) is also what wincode reads and writes, should
//! bincode have to go; golden bytes in `farshore-protocol` pin it. Disk formats and the data path
//! never use it.

use crate::limits::MAX_CONTROL_MESSAGE;

/// A control message that cannot be encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The message does not fit the limit.
    #[error("control message larger than {MAX_CONTROL_MESSAGE} bytes or not encodable: {0}")]
    Encode(#[from] bincode::error::EncodeError),
    /// The bytes are no message of this type, or larger than the limit.
    #[error("malformed control message: {0}")]
    Decode(#[from] bincode::error::DecodeError),
    /// bincode ignores trailing bytes; we do not.
    #[error("control message of {used} bytes in a frame of {framed}")]
    TrailingBytes {
        /// Bytes the message took.
        used: usize,
        /// Bytes the frame had.
        framed: usize,
    },
}

const fn config() -> impl bincode::config::Config {
    bincode::config::legacy().with_limit::<MAX_CONTROL_MESSAGE>()
}

/// Encodes one control message.
///
/// # Errors
/// [`CodecError::Encode`] when it exceeds [`MAX_CONTROL_MESSAGE`].
pub fn encode<M: serde::Serialize>(message: &M) -> Result<Vec<u8>, CodecError> {
    let bytes = bincode::serde::encode_to_vec(message, config())?;
    if bytes.len() > MAX_CONTROL_MESSAGE {
        return Err(CodecError::Encode(bincode::error::EncodeError::Other("over the limit")));
    }
    Ok(bytes)
}

/// Decodes exactly one control message that fills `bytes`.
///
/// # Errors
/// [`CodecError::Decode`] for anything else, [`CodecError::TrailingBytes`] for left-overs.
pub fn decode<M: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<M, CodecError> {
    let (message, used) = bincode::serde::decode_from_slice(bytes, config())?;
    if used != bytes.len() {
        return Err(CodecError::TrailingBytes { used, framed: bytes.len() });
    }
    Ok(message)
}

/// Writes one control message behind its length (u32, little-endian). Buffered streams need a
/// flush by the caller.
///
/// # Errors
/// Of the stream, or `InvalidData` when the message exceeds the limit.
pub fn write_message<M: serde::Serialize>(
    stream: &mut impl std::io::Write,
    message: &M,
) -> std::io::Result<()> {
    let body = encode(message).map_err(invalid)?;
    let len = u32::try_from(body.len()).map_err(invalid)?;
    let mut framed = Vec::with_capacity(4 + body.len());
    framed.extend_from_slice(&len.to_le_bytes());
    framed.extend_from_slice(&body);
    stream.write_all(&framed)
}

/// Reads one control message written by [`write_message`].
///
/// # Errors
/// Of the stream (`UnexpectedEof` when the peer has gone), or `InvalidData` for a length over
/// [`MAX_CONTROL_MESSAGE`] or malformed bytes; the stream is then out of step and must be closed.
pub fn read_message<M: serde::de::DeserializeOwned>(
    stream: &mut impl std::io::Read,
) -> std::io::Result<M> {
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len) as usize;
    if len > MAX_CONTROL_MESSAGE {
        return Err(invalid(format!("control message of {len} bytes refused")));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    decode(&body).map_err(invalid)
}

fn invalid(e: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidData, e)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_length_is_refused_without_allocating() {
        let mut bytes = (1u64 << 40).to_le_bytes().to_vec();
        bytes.extend([0; 72]);
        assert!(matches!(decode::<Vec<u8>>(&bytes), Err(CodecError::Decode(_))));
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut bytes = encode(&7u32).unwrap();
        assert_eq!(decode::<u32>(&bytes).unwrap(), 7);
        bytes.push(0);
        assert!(matches!(decode::<u32>(&bytes), Err(CodecError::TrailingBytes { .. })));
    }
}
