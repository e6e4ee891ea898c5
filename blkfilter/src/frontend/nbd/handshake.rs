//! Drives the option phase over a socket, from the greeting to the begin of transmission. Every
//! wait is limited; hostile options cost at most [`limits`](super::limits).

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::export::{Exports, Offer};
use super::limits::{MAX_OPTION, MAX_OPTION_DRAINED, MAX_OPTIONS};
use super::negotiation::{Negotiation, Next, Tls, refuse};
use super::request::Mode;
use super::socket::Socket;
use super::wire::{ClientFlags, OPTION_LEN, decode_option, greeting, option, reply};
use crate::device::{Device, DeviceError, Queue};

/// How a handshake did not lead to transmission. All of these are the peer's affair.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection failed, ended or was too slow.
    #[error("connection failed in the handshake: {0}")]
    Socket(#[from] io::Error),
    /// The peer broke the protocol in a way that has no answer.
    #[error("{0}")]
    Protocol(&'static str),
    /// The device cannot be opened.
    #[error("device refused a new connection: {0}")]
    Device(#[from] DeviceError),
}

/// Where a connection is when the server gets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Nothing was said yet.
    Greeting,
    /// Someone else greeted, answered STARTTLS and set up TLS.
    AfterStartTls(ClientFlags),
}

/// What transmission needs.
pub struct Settled {
    pub device: Arc<dyn Device>,
    pub mode: Mode,
    pub queue: Box<dyn Queue>,
}

/// Negotiates; `None` when the client left in order.
pub fn negotiate(
    socket: &Socket,
    exports: &Exports,
    start: Start,
    limit: Duration,
) -> Result<Option<(Arc<Offer>, Settled)>, HandshakeError> {
    socket.limit_waits(Some(limit))?;
    let until = Instant::now() + limit * 10; // a person may type the options
    let (tls, flags) = match start {
        Start::Greeting => (Tls::NotOffered, greet(socket, until)?),
        Start::AfterStartTls(flags) => (Tls::Active, flags),
    };
    let mut negotiation = Negotiation::new(exports, tls, flags.no_zeroes);
    let mut data = Vec::new();
    let mut out = Vec::new();
    for _ in 0..MAX_OPTIONS {
        out.clear();
        let (option, fits) = receive_option(socket, &mut data, until)?;
        if !fits && option == option::EXPORT_NAME {
            return Err(HandshakeError::Protocol("too long a name by EXPORT_NAME"));
        }
        let next = if fits {
            negotiation.option(option, &data, &mut out)
        } else {
            refuse(&mut out, option, reply::ERR_TOO_BIG, "too much option data");
            Next::More
        };
        match next {
            Next::More => socket.send_all(&out)?,
            Next::Goodbye => {
                let _ = socket.send_all(&out); // the client need not wait for it
                return Ok(None);
            }
            Next::Drop(why) => return Err(HandshakeError::Protocol(why)),
            Next::Enter(offer) => {
                let mode = negotiation.mode(&offer);
                let device = offer.export.device.clone();
                match device.clone().open_queue() {
                    Ok(queue) => {
                        socket.send_all(&out)?;
                        socket.limit_waits(None)?;
                        return Ok(Some((offer, Settled { device, mode, queue })));
                    }
                    Err(error) => {
                        refuse_entry(socket, option, error, &mut out)?;
                    }
                }
            }
        }
    }
    Err(HandshakeError::Protocol("too many options"))
}

fn greet(socket: &Socket, until: Instant) -> Result<ClientFlags, HandshakeError> {
    socket.send_all(&greeting())?;
    let mut flags = [0; 4];
    socket.receive_exact(&mut flags, until)?;
    ClientFlags::decode(flags).ok_or(HandshakeError::Protocol("unknown client flags"))
}

/// Receives one option with its data; `false` when the data was too large and drained.
fn receive_option(
    socket: &Socket,
    data: &mut Vec<u8>,
    until: Instant,
) -> Result<(u32, bool), HandshakeError> {
    let mut header = [0; OPTION_LEN];
    socket.receive_exact(&mut header, until)?;
    let Some((option, len)) = decode_option(&header) else {
        return Err(HandshakeError::Protocol("option without its magic"));
    };
    if len > MAX_OPTION_DRAINED {
        return Err(HandshakeError::Protocol("absurd length of option data"));
    }
    let mut left = len as usize;
    let fits = len <= MAX_OPTION;
    data.resize(left.min(MAX_OPTION as usize), 0);
    while left > 0 {
        let now = left.min(data.len());
        socket.receive_exact(&mut data[..now], until)?;
        left -= now;
    }
    Ok((option, fits))
}

/// The device would not open: GO is told so, EXPORT_NAME knows no refusal.
fn refuse_entry(
    socket: &Socket,
    option: u32,
    error: DeviceError,
    out: &mut Vec<u8>,
) -> Result<(), HandshakeError> {
    if option == option::EXPORT_NAME {
        return Err(HandshakeError::Device(error));
    }
    out.clear();
    let shutdown = error == DeviceError::Shutdown;
    let number = if shutdown { reply::ERR_SHUTDOWN } else { reply::ERR_POLICY };
    refuse(out, option, number, &error.to_string());
    socket.send_all(out)?;
    Ok(())
}
