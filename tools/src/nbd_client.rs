//! A small NBD client over unix sockets: many requests in flight on one connection, simple replies.
//!
//! It is a second opinion about our own server: written from the protocol's document and sharing
//! no code with it. It never reconnects; whoever uses it decides what a lost connection means.

use std::collections::HashMap;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags};

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;

const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const CMD_WRITE_ZEROES: u16 = 6;
const FLAG_FUA: u16 = 1;

/// Longest option reply believed, in bytes.
const MAX_OPTION_REPLY: u32 = 64 << 10;
/// A server that says nothing for so long is broken.
const PATIENCE: Duration = Duration::from_secs(60);

/// One request.
#[derive(Debug, Clone, Copy)]
pub enum Op<'a> {
    /// Bytes from an offset.
    Read {
        /// Where, in bytes.
        offset: u64,
        /// How many bytes.
        len: u32,
    },
    /// Bytes to an offset.
    Write {
        /// Where, in bytes.
        offset: u64,
        /// What.
        data: &'a [u8],
        /// Durable before the reply.
        fua: bool,
    },
    /// Make a range read as zero.
    Zero {
        /// Where, in bytes.
        offset: u64,
        /// How many bytes.
        len: u32,
        /// Durable before the reply.
        fua: bool,
    },
    /// Give a range back.
    Trim {
        /// Where, in bytes.
        offset: u64,
        /// How many bytes.
        len: u32,
    },
    /// Everything answered before is durable.
    Flush,
}

/// The reply to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// As [`NbdClient::submit`] returned it.
    pub cookie: u64,
    /// The protocol's error number, 0 for success.
    pub error: u32,
    /// What was read.
    pub data: Vec<u8>,
}

/// A connection in transmission.
#[derive(Debug)]
pub struct NbdClient {
    writer: UnixStream,
    reader: BufReader<UnixStream>,
    size: u64,
    flags: u16,
    max_payload: u32,
    next: u64,
    /// Length of what comes with the reply, by cookie.
    waiting: HashMap<u64, u32>,
}

fn broken(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

fn read_array<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn read_u64(from: &mut impl Read) -> io::Result<u64> {
    read_array(from).map(u64::from_be_bytes)
}

fn read_u32(from: &mut impl Read) -> io::Result<u32> {
    read_array(from).map(u32::from_be_bytes)
}

fn read_u16(from: &mut impl Read) -> io::Result<u16> {
    read_array(from).map(u16::from_be_bytes)
}

impl NbdClient {
    /// Connects and opens `export`.
    ///
    /// # Errors
    /// Of the socket; `InvalidData` when the server breaks the protocol; `NotFound` with the
    /// server's words when it refuses the export.
    pub fn connect(socket: &Path, export: &str) -> io::Result<Self> {
        let writer = UnixStream::connect(socket)?;
        writer.set_read_timeout(Some(PATIENCE))?;
        writer.set_write_timeout(Some(PATIENCE))?;
        let mut client = Self {
            reader: BufReader::with_capacity(256 << 10, writer.try_clone()?),
            writer,
            size: 0,
            flags: 0,
            max_payload: 32 << 20,
            next: 1,
            waiting: HashMap::new(),
        };
        client.handshake(export)?;
        Ok(client)
    }

    fn handshake(&mut self, export: &str) -> io::Result<()> {
        let magic = (read_u64(&mut self.reader)?, read_u64(&mut self.reader)?);
        if magic != (NBDMAGIC, IHAVEOPT) {
            return Err(broken("not an NBD server of the newstyle protocol"));
        }
        let server = read_u16(&mut self.reader)?;
        // Fixed newstyle is wanted of both; "no zeroes" is echoed.
        if server & 1 == 0 {
            return Err(broken("the server does not speak fixed newstyle"));
        }
        let mut hello = u32::from(server & 3).to_be_bytes().to_vec();
        let name = u32::try_from(export.len()).map_err(|_| broken("export name too long"))?;
        hello.extend(IHAVEOPT.to_be_bytes());
        hello.extend(OPT_GO.to_be_bytes());
        hello.extend((4 + name + 2 + 2).to_be_bytes());
        hello.extend(name.to_be_bytes());
        hello.extend(export.as_bytes());
        hello.extend(1u16.to_be_bytes());
        hello.extend(INFO_BLOCK_SIZE.to_be_bytes());
        self.writer.write_all(&hello)?;
        while !self.option_reply()? {}
        Ok(())
    }

    /// One reply to OPT_GO; true for the last.
    fn option_reply(&mut self) -> io::Result<bool> {
        let head = (read_u64(&mut self.reader)?, read_u32(&mut self.reader)?);
        let (kind, len) = (read_u32(&mut self.reader)?, read_u32(&mut self.reader)?);
        if head != (OPTION_REPLY, OPT_GO) || len > MAX_OPTION_REPLY {
            return Err(broken("malformed reply to an option"));
        }
        let mut body = vec![0; usize::try_from(len).map_err(|e| broken(e.to_string()))?];
        self.reader.read_exact(&mut body)?;
        if kind & (1 << 31) != 0 {
            let text = format!("{} (option error {:#x})", String::from_utf8_lossy(&body), kind);
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        if kind == REP_INFO {
            let mut body = body.as_slice();
            match read_u16(&mut body)? {
                INFO_EXPORT => {
                    self.size = read_u64(&mut body)?;
                    self.flags = read_u16(&mut body)?;
                }
                INFO_BLOCK_SIZE => {
                    let _minimum_and_preferred = read_u64(&mut body)?;
                    self.max_payload = read_u32(&mut body)?;
                }
                _ => {}
            }
        }
        Ok(kind == REP_ACK)
    }

    /// Size of the export in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Transmission flags as the server sent them.
    #[must_use]
    pub const fn flags(&self) -> u16 {
        self.flags
    }

    /// Largest payload of one request that the server takes, in bytes.
    #[must_use]
    pub const fn max_payload(&self) -> u32 {
        self.max_payload
    }

    /// Waits until an answer can be taken, at most `limit` (in whole milliseconds, at least one);
    /// false when none has come.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn answer_within(&self, limit: Duration) -> io::Result<bool> {
        if !self.reader.buffer().is_empty() {
            return Ok(true);
        }
        let millis = u16::try_from(limit.as_millis()).unwrap_or(u16::MAX).max(1);
        let mut wanted = [PollFd::new(self.reader.get_ref().as_fd(), PollFlags::POLLIN)];
        match nix::poll::poll(&mut wanted, millis) {
            Ok(ready) => Ok(ready > 0),
            Err(nix::errno::Errno::EINTR) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Requests without a reply yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    /// Sends a request without waiting; returns its cookie.
    ///
    /// # Errors
    /// Of the socket.
    pub fn submit(&mut self, op: Op<'_>) -> io::Result<u64> {
        let flag = |fua: bool| if fua { FLAG_FUA } else { 0 };
        let (command, flags, offset, len, data): (_, _, _, _, &[u8]) = match op {
            Op::Read { offset, len } => (CMD_READ, 0, offset, len, &[]),
            Op::Write { offset, data, fua } => {
                let len = u32::try_from(data.len()).map_err(|_| broken("write too long"))?;
                (CMD_WRITE, flag(fua), offset, len, data)
            }
            Op::Zero { offset, len, fua } => (CMD_WRITE_ZEROES, flag(fua), offset, len, &[]),
            Op::Trim { offset, len } => (CMD_TRIM, 0, offset, len, &[]),
            Op::Flush => (CMD_FLUSH, 0, 0, 0, &[]),
        };
        let cookie = self.next;
        self.next += 1;
        let head = request(command, flags, cookie, offset, len);
        self.writer.write_all(&head)?;
        self.writer.write_all(data)?;
        self.waiting.insert(cookie, if command == CMD_READ { len } else { 0 });
        Ok(cookie)
    }

    /// Waits for the next reply, of whichever request.
    ///
    /// # Errors
    /// Of the socket; `InvalidData` for a reply to nothing.
    pub fn complete(&mut self) -> io::Result<Done> {
        if read_u32(&mut self.reader)? != SIMPLE_REPLY {
            return Err(broken("malformed reply: the stream is out of step"));
        }
        let error = read_u32(&mut self.reader)?;
        let cookie = read_u64(&mut self.reader)?;
        let Some(len) = self.waiting.remove(&cookie) else {
            return Err(broken(format!("reply to the unknown request {cookie}")));
        };
        let len = if error == 0 { usize::try_from(len).unwrap_or(0) } else { 0 };
        let mut data = vec![0; len];
        self.reader.read_exact(&mut data)?;
        Ok(Done { cookie, error, data })
    }

    fn run(&mut self, op: Op<'_>) -> io::Result<Vec<u8>> {
        let cookie = self.submit(op)?;
        let done = self.complete()?;
        if done.cookie != cookie {
            return Err(broken("reply to another request"));
        }
        match done.error {
            0 => Ok(done.data),
            // The protocol's numbers are those of Linux.
            error => Err(io::Error::from_raw_os_error(i32::try_from(error).unwrap_or(5))),
        }
    }

    /// Reads into `buf`; nothing else may be in flight.
    ///
    /// # Errors
    /// Of the socket, or the server's error.
    pub fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let len = u32::try_from(buf.len()).map_err(|_| broken("read too long"))?;
        buf.copy_from_slice(&self.run(Op::Read { offset, len })?);
        Ok(())
    }

    /// Writes `data`; nothing else may be in flight.
    ///
    /// # Errors
    /// Of the socket, or the server's error.
    pub fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.run(Op::Write { offset, data, fua: false }).map(drop)
    }

    /// Makes everything answered so far durable; nothing else may be in flight.
    ///
    /// # Errors
    /// Of the socket, or the server's error.
    pub fn flush(&mut self) -> io::Result<()> {
        self.run(Op::Flush).map(drop)
    }

    /// Makes a range read as zero; nothing else may be in flight.
    ///
    /// # Errors
    /// Of the socket, or the server's error.
    pub fn zero(&mut self, offset: u64, len: u32) -> io::Result<()> {
        self.run(Op::Zero { offset, len, fua: false }).map(drop)
    }
}

impl Drop for NbdClient {
    /// Says goodbye, as the protocol asks.
    fn drop(&mut self) {
        let _ = self.writer.write_all(&request(CMD_DISC, 0, 0, 0, 0));
    }
}

fn request(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> [u8; 28] {
    let mut head = [0; 28];
    head[0..4].copy_from_slice(&REQUEST.to_be_bytes());
    head[4..6].copy_from_slice(&flags.to_be_bytes());
    head[6..8].copy_from_slice(&command.to_be_bytes());
    head[8..16].copy_from_slice(&cookie.to_be_bytes());
    head[16..24].copy_from_slice(&offset.to_be_bytes());
    head[24..28].copy_from_slice(&len.to_be_bytes());
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With a real server: nbdkit, when it is installed (the `real` lane installs it).
    #[test]
    fn a_real_server_understands_this_client() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let server = std::process::Command::new("nbdkit")
            .args(["--foreground", "--exit-with-parent", "-U"])
            .arg(&socket)
            .args(["memory", "1M"])
            .spawn();
        let Ok(mut server) = server else {
            eprintln!("skipped: nbdkit is not installed");
            return;
        };
        let pause = crate::flag::Flag::default();
        let mut client = (0..500)
            .find_map(|_| {
                let client = NbdClient::connect(&socket, "");
                client.ok().or_else(|| {
                    let _ = pause.wait(Duration::from_millis(10));
                    None
                })
            })
            .expect("nbdkit answers within 5 s");
        assert_eq!(client.size(), 1 << 20);
        client.write_at(4096, &[7; 8192]).unwrap();
        client.zero(8192, 4096).unwrap();
        client.flush().unwrap();
        let mut back = vec![1; 12288];
        client.read_at(4096, &mut back).unwrap();
        assert!(back[..4096].iter().all(|b| *b == 7));
        assert!(back[4096..].iter().all(|b| *b == 0));
        let many: Vec<_> = (0..16)
            .map(|i| client.submit(Op::Read { offset: i * 4096, len: 4096 }).unwrap())
            .collect();
        let mut done: Vec<_> = many.iter().map(|_| client.complete().unwrap().cookie).collect();
        done.sort_unstable();
        assert_eq!(many, done);
        assert!(client.read_at(1 << 20, &mut [0; 512]).is_err(), "beyond the end");
        drop(client);
        server.kill().unwrap();
        server.wait().unwrap();
    }
}
