//! A raw client that can also say what no real client says.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use farshore_extent::VolumeSize;

use crate::device::Device;
use crate::frontend::memory::MemoryDevice;
use crate::frontend::nbd::wire::{
    OPTION_MAGIC, OPTION_REPLY_MAGIC, RawRequest, Reader, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, chunk, command, option, reply,
};
use crate::frontend::nbd::{Export, Exports, serve};

/// Longest wait of any test for a single answer: a hang fails instead of blocking.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Client {
    pub stream: UnixStream,
    pub structured: bool,
}

/// A whole reply, its chunks put together.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub cookie: u64,
    pub error: u32,
    pub data: Vec<u8>,
}

pub fn ram(bytes: u64) -> Arc<MemoryDevice> {
    Arc::new(MemoryDevice::new(VolumeSize::new(bytes).unwrap()))
}

pub fn exports(device: Arc<dyn Device>) -> Exports {
    let exports = Exports::new();
    let description = "for tests".to_owned();
    exports.add(Export { name: "disk".into(), description, device }).unwrap();
    exports
}

/// A server thread on one end of a socket pair, and the other end.
pub fn served(exports: &Exports) -> (UnixStream, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    ours.set_write_timeout(Some(PATIENCE)).unwrap();
    let exports = exports.clone();
    (ours, std::thread::spawn(move || serve(theirs, &exports, PATIENCE)))
}

pub fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Data of GO and INFO for `name`, asking for `kinds`.
pub fn info_data(name: &str, kinds: &[u16]) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&u16::try_from(kinds.len()).unwrap().to_be_bytes());
    kinds.iter().for_each(|kind| data.extend_from_slice(&kind.to_be_bytes()));
    data
}

/// Data of the meta context options.
pub fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&u32::try_from(queries.len()).unwrap().to_be_bytes());
    for query in queries {
        data.extend_from_slice(&u32::try_from(query.len()).unwrap().to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

impl Client {
    /// Reads the greeting and says the client's flags.
    pub fn greet(stream: UnixStream) -> Self {
        let mut client = Self { stream, structured: false };
        let greeting = client.take(18);
        assert_eq!(greeting, super::super::wire::greeting());
        client.say(&[0, 0, 0, 3]);
        client
    }

    /// All the way into transmission.
    pub fn enter(stream: UnixStream, structured: bool) -> Self {
        let mut client = Self::greet(stream);
        if structured {
            let (last, _) = client.ask(option::STRUCTURED_REPLY, &[]);
            assert_eq!(last, reply::ACK);
            let meta = meta_data("disk", &["base:allocation"]);
            assert_eq!(client.ask(option::SET_META_CONTEXT, &meta).0, reply::ACK);
        }
        client.structured = structured;
        assert_eq!(client.ask(option::GO, &info_data("", &[])).0, reply::ACK);
        client
    }

    pub fn say(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Whether the server has ended the stream.
    pub fn at_end(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0))
    }

    /// How many bytes come before the server ends the stream.
    pub fn rest(&mut self) -> usize {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).unwrap();
        rest.len()
    }

    /// Sends an option and collects its replies: the last one's kind and all before it.
    pub fn ask(&mut self, option: u32, data: &[u8]) -> (u32, Vec<(u32, Vec<u8>)>) {
        self.say(&option_bytes(option, data));
        self.answers(option)
    }

    pub fn answers(&mut self, option: u32) -> (u32, Vec<(u32, Vec<u8>)>) {
        let mut before = Vec::new();
        loop {
            let header = self.take(20);
            let mut from = Reader(&header);
            assert_eq!(from.u64(), Some(OPTION_REPLY_MAGIC));
            assert_eq!(from.u32(), Some(option), "the reply names its option");
            let (kind, len) = (from.u32().unwrap(), from.u32().unwrap());
            let data = self.take(len as usize);
            if kind == reply::ACK || kind & (1 << 31) != 0 {
                return (kind, before);
            }
            before.push((kind, data));
        }
    }

    pub fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, len: u32) {
        self.say(&RawRequest { flags, command, cookie, offset, len }.encode());
    }

    pub fn write(&mut self, cookie: u64, offset: u64, payload: &[u8]) {
        let len = u32::try_from(payload.len()).unwrap();
        self.request(command::WRITE, 0, cookie, offset, len);
        self.say(payload);
    }

    /// Takes a whole reply. `asked` tells offset and length of the read with a cookie: so many
    /// bytes follow a simple reply without error, and the chunks of a structured one must cover
    /// them.
    pub fn answer(&mut self, asked: impl Fn(u64) -> (u64, usize)) -> Answer {
        let magic = u32::from_be_bytes(self.take(4).try_into().unwrap());
        if magic == SIMPLE_REPLY_MAGIC {
            let rest = self.take(12);
            let mut from = Reader(&rest);
            let (error, cookie) = (from.u32().unwrap(), from.u64().unwrap());
            let len = if error == 0 { asked(cookie).1 } else { 0 };
            assert!(len == 0 || !self.structured, "a structured read by a simple reply");
            return Answer { cookie, error, data: self.take(len) };
        }
        self.chunks(magic, asked)
    }

    fn chunks(&mut self, first: u32, asked: impl Fn(u64) -> (u64, usize)) -> Answer {
        let mut magic = first;
        let mut answer = Answer { cookie: 0, error: 0, data: Vec::new() };
        let mut covered = 0;
        loop {
            assert_eq!(magic, STRUCTURED_REPLY_MAGIC);
            let header = self.take(16);
            let mut from = Reader(&header);
            let (flags, kind) = (from.u16().unwrap(), from.u16().unwrap());
            answer.cookie = from.u64().unwrap();
            let content = self.take(from.u32().unwrap() as usize);
            match kind {
                chunk::NONE => assert_eq!(flags, chunk::DONE),
                chunk::OFFSET_DATA => {
                    let (base, len) = asked(answer.cookie);
                    let offset = u64::from_be_bytes(content[..8].try_into().unwrap());
                    let at = usize::try_from(offset - base).unwrap();
                    answer.data.resize(len, 0);
                    answer.data[at..at + content.len() - 8].copy_from_slice(&content[8..]);
                    covered += content.len() - 8;
                }
                chunk::BLOCK_STATUS => answer.data = content,
                chunk::ERROR => {
                    answer.error = u32::from_be_bytes(content[..4].try_into().unwrap());
                }
                other => panic!("unknown chunk {other}"),
            }
            if flags & chunk::DONE != 0 {
                assert!(answer.error != 0 || covered == 0 || covered == answer.data.len());
                return answer;
            }
            magic = u32::from_be_bytes(self.take(4).try_into().unwrap());
        }
    }

    /// Reads and expects success.
    pub fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.request(command::READ, 0, 77, offset, u32::try_from(len).unwrap());
        let answer = self.answer(|_| (offset, len));
        assert_eq!((answer.cookie, answer.error), (77, 0));
        answer.data
    }

    /// Takes a reply without payload: its cookie and its error.
    pub fn outcome(&mut self) -> (u64, u32) {
        let answer = self.answer(|_| (0, 0));
        (answer.cookie, answer.error)
    }

    /// Leaves in order and waits for the server's thread.
    pub fn leave(mut self, server: JoinHandle<()>) {
        self.request(command::DISC, 0, 0, 0, 0);
        assert!(self.at_end(), "nothing follows a goodbye");
        server.join().unwrap();
    }
}
