//! Load generator of the benchmarks: an NBD client that writes real content, half file data and
//! half random, at full speed or at a fixed rate, and prints one line of JSON.
//!
//! fio cannot write file data, and compressors make content decide the figures. Owns: one
//! connection and the choice of what is written where. Never: judging, or any product code.

use std::io::{Error, ErrorKind, IoSlice, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const BLOCK: u64 = 4096;
const RANDOM_BYTES: usize = 32 << 20;

/// What to do, from the command line.
struct Options {
    socket: String,
    export: String,
    corpus: String,
    block: usize,
    depth: usize,
    rate: f64,
    seconds: f64,
    bytes: u64,
    seed: u64,
    read: bool,
}

fn bad(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidData, text.into())
}

fn options() -> Result<Options> {
    let mut chosen = Options {
        socket: String::new(),
        export: String::new(),
        corpus: String::new(),
        block: 4096,
        depth: 1,
        rate: 0.0,
        seconds: 1e9,
        bytes: u64::MAX,
        seed: 1,
        read: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| bad(format!("{word} needs a value")));
        match word.as_str() {
            "--socket" => chosen.socket = value()?,
            "--export" => chosen.export = value()?,
            "--corpus" => chosen.corpus = value()?,
            "--bs" => chosen.block = number(&value()?)?,
            "--qd" => chosen.depth = number(&value()?)?,
            "--rate-mb" => chosen.rate = number::<f64>(&value()?)? * 1e6,
            "--seconds" => chosen.seconds = number(&value()?)?,
            "--bytes" => chosen.bytes = number(&value()?)?,
            "--seed" => chosen.seed = number(&value()?)?,
            "--read" => chosen.read = true,
            other => return Err(bad(format!("unknown option {other}"))),
        }
    }
    if chosen.depth == 0 || chosen.block == 0 || !chosen.block.is_multiple_of(4096) {
        return Err(bad("--qd must be positive and --bs a multiple of 4096"));
    }
    Ok(chosen)
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T> {
    text.parse().map_err(|_| bad(format!("not a number: {text}")))
}

/// xorshift64*: quick, seeded, good enough to choose places and to be incompressible.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

/// File data and random data to cut payloads from.
struct Content {
    file: Vec<u8>,
    random: Vec<u8>,
}

impl Content {
    fn load(options: &Options) -> Result<Self> {
        let mut random = Vec::with_capacity(RANDOM_BYTES);
        let mut source = Random(options.seed | 1);
        while random.len() < RANDOM_BYTES {
            random.extend_from_slice(&source.next().to_le_bytes());
        }
        let file = if options.corpus.is_empty() {
            random.clone()
        } else {
            std::fs::read(&options.corpus)?
        };
        if file.len() < 2 * options.block {
            return Err(bad("the corpus is too small"));
        }
        Ok(Self { file, random })
    }

    /// Half of the payloads are file data, half random.
    fn payload(&self, choice: &mut Random, len: usize) -> &[u8] {
        let from = if choice.below(2) == 0 { &self.file } else { &self.random };
        let blocks = (from.len() - len) as u64 / BLOCK;
        let start = usize::try_from(choice.below(blocks) * BLOCK).unwrap_or(0);
        &from[start..start + len]
    }
}

/// Newstyle negotiation with simple replies. Returns the connection and the export's size.
fn connect(options: &Options) -> Result<(UnixStream, u64)> {
    let mut stream = UnixStream::connect(&options.socket)?;
    let mut hello = [0_u8; 18];
    stream.read_exact(&mut hello)?;
    if &hello[..16] != b"NBDMAGICIHAVEOPT" {
        return Err(bad("not a newstyle NBD server"));
    }
    stream.write_all(&3_u32.to_be_bytes())?;
    let name = options.export.as_bytes();
    let name_len = u32::try_from(name.len()).map_err(|_| bad("export name too long"))?;
    let mut go = b"IHAVEOPT".to_vec();
    go.extend_from_slice(&7_u32.to_be_bytes());
    go.extend_from_slice(&(name_len + 6).to_be_bytes());
    go.extend_from_slice(&name_len.to_be_bytes());
    go.extend_from_slice(name);
    go.extend_from_slice(&0_u16.to_be_bytes());
    stream.write_all(&go)?;
    let mut size = 0;
    loop {
        let mut head = [0_u8; 20];
        stream.read_exact(&mut head)?;
        let kind = be32(&head[12..16]);
        let mut data = vec![0_u8; be32(&head[16..20]) as usize];
        stream.read_exact(&mut data)?;
        match kind {
            1 => return Ok((stream, size)),
            3 if data.len() >= 12 && data[..2] == [0, 0] => {
                size = u64::from_be_bytes(data[2..10].try_into().map_err(|_| bad("short info"))?);
            }
            3 => {}
            other => return Err(bad(format!("the server refused the export: reply {other:#x}"))),
        }
    }
}

fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |sum, byte| (sum << 8) | u32::from(*byte))
}

fn request(command: u16, cookie: u64, offset: u64, len: usize) -> Result<[u8; 28]> {
    let mut head = [0_u8; 28];
    head[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    head[6..8].copy_from_slice(&command.to_be_bytes());
    head[8..16].copy_from_slice(&cookie.to_be_bytes());
    head[16..24].copy_from_slice(&offset.to_be_bytes());
    let len = u32::try_from(len).map_err(|_| bad("request too long"))?;
    head[24..].copy_from_slice(&len.to_be_bytes());
    Ok(head)
}

/// The running load.
struct Load<'a> {
    options: &'a Options,
    content: &'a Content,
    stream: UnixStream,
    choice: Random,
    blocks: u64,
    begun: Vec<Instant>,
    free: Vec<usize>,
    latencies: Vec<u32>,
    inbox: Vec<u8>,
    filled: usize,
    issued: u64,
}

impl Load<'_> {
    /// Sends one request for each of the first `count` free cookies, in one system call if it fits.
    fn issue(&mut self, count: usize) -> Result<()> {
        let len = self.options.block;
        let command = if self.options.read { CMD_READ } else { CMD_WRITE };
        let mut heads = Vec::with_capacity(count);
        let mut payloads = Vec::with_capacity(count);
        for _ in 0..count {
            let Some(cookie) = self.free.pop() else { break };
            let place = self.choice.below(self.blocks) * len as u64;
            heads.push(request(command, cookie as u64, place, len)?);
            let content = self.content;
            payloads.push(if self.options.read {
                &[]
            } else {
                content.payload(&mut self.choice, len)
            });
            self.begun[cookie] = Instant::now();
            self.issued += 1;
        }
        let mut slices: Vec<IoSlice<'_>> = heads
            .iter()
            .zip(&payloads)
            .flat_map(|(head, data)| [IoSlice::new(head), IoSlice::new(data)])
            .collect();
        let mut rest: &mut [IoSlice<'_>] = &mut slices;
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let sent = self.stream.write_vectored(rest)?;
            if sent == 0 {
                return Err(bad("the server closed the connection"));
            }
            IoSlice::advance_slices(&mut rest, sent);
        }
        Ok(())
    }

    /// Receives what there is (at least one reply) and returns how many requests ended.
    fn collect(&mut self) -> Result<usize> {
        let payload = if self.options.read { self.options.block } else { 0 };
        let mut ended = 0;
        while ended == 0 {
            let got = self.stream.read(&mut self.inbox[self.filled..])?;
            if got == 0 {
                return Err(bad("the server closed the connection"));
            }
            self.filled += got;
            let now = Instant::now();
            let mut at = 0;
            while self.filled - at >= 16 + payload {
                let head = &self.inbox[at..at + 16];
                if be32(&head[..4]) != REPLY_MAGIC || be32(&head[4..8]) != 0 {
                    return Err(bad(format!("bad reply or error {}", be32(&head[4..8]))));
                }
                let cookie = be32(&head[12..16]) as usize;
                let Some(begun) = self.begun.get(cookie) else { return Err(bad("unknown cookie")) };
                let nanos = now.duration_since(*begun).as_nanos();
                self.latencies.push(u32::try_from(nanos).unwrap_or(u32::MAX));
                self.free.push(cookie);
                at += 16 + payload;
                ended += 1;
            }
            self.inbox.copy_within(at..self.filled, 0);
            self.filled -= at;
        }
        Ok(ended)
    }

    /// As fast as it goes with `depth` requests in flight: one new request for each that ended.
    fn full_speed(&mut self, start: Instant) -> Result<()> {
        let total = self.options.bytes / self.options.block as u64;
        self.issue(self.options.depth.min(usize::try_from(total).unwrap_or(usize::MAX)))?;
        while self.free.len() < self.options.depth {
            let ended = self.collect()? as u64;
            if start.elapsed().as_secs_f64() < self.options.seconds {
                let more = ended.min(total - self.issued);
                self.issue(usize::try_from(more).unwrap_or(0))?;
            }
        }
        Ok(())
    }

    /// At a fixed rate: whatever is due is sent, at most `depth` together, and waited for.
    fn paced(&mut self, start: Instant) -> Result<()> {
        let total = self.options.bytes / self.options.block as u64;
        let per_second = self.options.rate / self.options.block as f64;
        while self.issued < total {
            let now = start.elapsed().as_secs_f64();
            if now >= self.options.seconds {
                break;
            }
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            // a count of requests, far below 2^53
            let due = ((now * per_second) as u64 + 1).min(total).saturating_sub(self.issued);
            if due == 0 {
                let next = self.issued as f64 / per_second - now;
                #[allow(clippy::disallowed_methods)] // pacing is what this program is for
                std::thread::sleep(Duration::from_secs_f64(next.clamp(5e-5, 0.1)));
                continue;
            }
            self.issue(usize::try_from(due).unwrap_or(usize::MAX).min(self.options.depth))?;
            while self.free.len() < self.options.depth {
                self.collect()?;
            }
        }
        Ok(())
    }

    /// Flushes, so that everything is on the device, and says good-bye.
    fn end(&mut self) -> Result<()> {
        self.stream.write_all(&request(CMD_FLUSH, 0, 0, 0)?)?;
        let mut reply = [0_u8; 16];
        self.stream.read_exact(&mut reply)?;
        if be32(&reply[4..8]) != 0 {
            return Err(bad("the flush failed"));
        }
        self.stream.write_all(&request(CMD_DISC, 0, 0, 0)?)
    }
}

fn percentile(sorted: &[u32], share: f64) -> f64 {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // an index below the length
    let index = ((sorted.len().saturating_sub(1)) as f64 * share) as usize;
    sorted.get(index).map_or(0.0, |nanos| f64::from(*nanos) / 1000.0)
}

fn run() -> Result<String> {
    let options = options()?;
    let content = Content::load(&options)?;
    let (stream, size) = connect(&options)?;
    let mut load = Load {
        options: &options,
        content: &content,
        stream,
        choice: Random(options.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
        blocks: size / options.block as u64,
        begun: vec![Instant::now(); options.depth],
        free: (0..options.depth).rev().collect(),
        latencies: Vec::with_capacity(1 << 20),
        inbox: vec![0; (options.block + 16) * options.depth.max(4)],
        filled: 0,
        issued: 0,
    };
    let start = Instant::now();
    if options.rate > 0.0 {
        load.paced(start)?
    } else {
        load.full_speed(start)?
    }
    let seconds = start.elapsed().as_secs_f64();
    load.end()?;
    load.latencies.sort_unstable();
    let (ios, bytes) = (load.issued, load.issued * options.block as u64);
    Ok(format!(
        "{{\"ios\":{ios},\"bytes\":{bytes},\"seconds\":{seconds:.6},\"iops\":{:.1},\"mb_per_s\":{:.3},\
         \"p50_us\":{:.2},\"p99_us\":{:.2},\"max_us\":{:.2}}}",
        ios as f64 / seconds,
        bytes as f64 / seconds / 1e6,
        percentile(&load.latencies, 0.5),
        percentile(&load.latencies, 0.99),
        percentile(&load.latencies, 1.0),
    ))
}

fn main() -> std::process::ExitCode {
    match run() {
        Ok(line) => {
            println!("{line}");
            std::process::ExitCode::SUCCESS
        }
        Err(failed) => {
            eprintln!("nbd-load: {failed}");
            std::process::ExitCode::FAILURE
        }
    }
}
