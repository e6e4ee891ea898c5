//! Replies on their way out, in order. Small payload lies next to its header; large payload is
//! sent from its slot, which goes back to the queue once it is out.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::ops::Range;

use super::limits::COPY_REPLY;
use super::socket::Socket;
use crate::device::{Queue, Slot};

/// When this much of `bytes` has been sent, the rest is moved to the front.
const COMPACT: usize = 256 << 10;

/// Room that is kept when everything is sent; more is given back.
const KEEP: usize = 1 << 20;

#[derive(Debug)]
enum Piece {
    /// So many of `bytes`.
    Bytes(usize),
    /// A slot, and which of its bytes.
    Slot(Slot, Range<usize>),
}

/// The replies not yet taken by the socket.
#[derive(Debug, Default)]
pub struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
    pieces: VecDeque<Piece>,
    pending: u64,
    /// Replies added since the last attempt to send.
    pub replies: usize,
}

impl Outbox {
    /// Bytes not yet sent, slots included.
    pub fn pending(&self) -> u64 {
        self.pending
    }

    /// Nothing is left to send.
    pub fn is_empty(&self) -> bool {
        self.pending == 0
    }

    /// Appends a header or a whole small reply.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.lengthen(bytes.len());
    }

    /// Appends the `wanted` bytes of a slot; takes the slot over.
    pub fn push_payload(&mut self, slot: Slot, wanted: Range<usize>, queue: &mut dyn Queue) {
        if wanted.len() <= COPY_REPLY {
            self.bytes.extend_from_slice(&queue.bytes(&slot)[wanted.clone()]);
            self.lengthen(wanted.len());
            queue.release(slot);
        } else {
            self.pending += wanted.len() as u64;
            self.pieces.push_back(Piece::Slot(slot, wanted));
        }
    }

    fn lengthen(&mut self, by: usize) {
        self.pending += by as u64;
        match self.pieces.back_mut() {
            Some(Piece::Bytes(len)) => *len += by,
            Some(Piece::Slot(..)) | None => self.pieces.push_back(Piece::Bytes(by)),
        }
    }

    /// Sends what the socket takes now. Returns whether anything was sent.
    pub fn send(&mut self, socket: &Socket, queue: &mut dyn Queue) -> io::Result<bool> {
        self.replies = 0;
        let mut any = false;
        while !self.is_empty() {
            let sent = self.send_some(socket, queue)?;
            if sent == 0 {
                break;
            }
            any = true;
            self.advance(sent, queue);
        }
        Ok(any)
    }

    /// One send: bytes, at most one slot (a queue lends one at a time), bytes behind it.
    fn send_some(&self, socket: &Socket, queue: &mut dyn Queue) -> io::Result<usize> {
        let rest = &self.bytes[self.sent..];
        let at = |index: usize| self.pieces.get(index);
        let after = |index: usize| match at(index) {
            Some(Piece::Bytes(len)) => *len,
            Some(Piece::Slot(..)) | None => 0,
        };
        match (at(0), at(1)) {
            (Some(Piece::Bytes(len)), Some(Piece::Slot(slot, wanted))) => {
                let (before, behind) = rest.split_at(*len);
                let behind = &behind[..after(2)];
                let payload = &queue.bytes(slot)[wanted.clone()];
                let parts = [before, payload, behind].map(IoSlice::new);
                socket.send_now(&parts)
            }
            (Some(Piece::Bytes(len)), Some(Piece::Bytes(_)) | None) => {
                socket.send_now(&[IoSlice::new(&rest[..*len])])
            }
            (Some(Piece::Slot(slot, wanted)), _) => {
                let behind = &rest[..after(1)];
                let payload = &queue.bytes(slot)[wanted.clone()];
                socket.send_now(&[IoSlice::new(payload), IoSlice::new(behind)])
            }
            (None, _) => Ok(0),
        }
    }

    fn advance(&mut self, mut sent: usize, queue: &mut dyn Queue) {
        self.pending -= sent as u64;
        while sent > 0 {
            match self.pieces.pop_front() {
                Some(Piece::Bytes(len)) => {
                    let now = len.min(sent);
                    self.sent += now;
                    sent -= now;
                    if now < len {
                        self.pieces.push_front(Piece::Bytes(len - now));
                    }
                }
                Some(Piece::Slot(slot, wanted)) => {
                    let now = wanted.len().min(sent);
                    sent -= now;
                    if now < wanted.len() {
                        let later = wanted.start + now..wanted.end;
                        self.pieces.push_front(Piece::Slot(slot, later));
                    } else {
                        queue.release(slot);
                    }
                }
                None => break,
            }
        }
        if self.sent == self.bytes.len() {
            self.bytes.clear();
            self.bytes.shrink_to(KEEP);
            self.sent = 0;
        } else if self.sent >= COMPACT {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
    }

    /// Drops everything: the peer is gone.
    pub fn clear(&mut self, queue: &mut dyn Queue) {
        for piece in self.pieces.drain(..) {
            match piece {
                Piece::Slot(slot, _) => queue.release(slot),
                Piece::Bytes(_) => {}
            }
        }
        self.bytes.clear();
        self.sent = 0;
        self.pending = 0;
        self.replies = 0;
    }
}
