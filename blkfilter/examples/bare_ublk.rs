//! The ublk front end with capture off: for debugging, differential tests and benchmarks.
//!
//! Serves a RAM disk, or a file or block device through the product's own backing code, as
//! `/dev/ublkbN`. Prints one line when it is there. Takes commands as lines of standard input:
//! `leave`, `remove` and `resize BYTES`; a signal to end means `remove`.
//!
//! Usage: `bare-ublk (--memory BYTES | --file PATH) [--number N] [--queues N] [--depth N] [--copy]
//! [--show BYTES]`, or `bare-ublk features | state N | remove N`.

#[path = "../../benches/load/plain.rs"]
mod plain;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use farshore_blkfilter::backing::{Backing, Mode};
use farshore_blkfilter::device::{Device, DeviceError, DeviceInfo, Queue};
use farshore_blkfilter::frontend::memory::MemoryDevice;
use farshore_blkfilter::frontend::ublk::{Config, Server, existing, features, remove_stale};
use farshore_blkfilter::sys::process::on_termination;
use farshore_blkfilter::sys::wake::wait_readable;
use farshore_extent::VolumeSize;
use plain::Plain;
use std::os::fd::AsFd;

/// How the devices of this program are known.
const OWNER: u64 = 0x6661_7273_686f_7265;

/// How long everything in flight may take to end.
const GRACE: Duration = Duration::from_secs(20);

/// A device of which only the beginning is shown, to grow later.
struct Shown {
    device: Arc<dyn Device>,
    bytes: AtomicU64,
}

impl Device for Shown {
    fn info(&self) -> DeviceInfo {
        let info = self.device.info();
        let size = VolumeSize::new(self.bytes.load(Ordering::Relaxed));
        DeviceInfo { size: size.unwrap_or(info.size), ..info }
    }

    fn open_queue(self: Arc<Self>) -> Result<Box<dyn Queue>, DeviceError> {
        Arc::clone(&self.device).open_queue()
    }
}

/// The value after `name`.
fn value<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    let at = words.iter().position(|word| *word == name)?;
    words.get(at + 1).copied()
}

fn number<T: std::str::FromStr>(words: &[&str], name: &str) -> Result<Option<T>, String> {
    let parse = |text: &str| text.parse().map_err(|_| format!("{name} {text}: not a number"));
    value(words, name).map(parse).transpose()
}

fn device(words: &[&str]) -> Result<Arc<Shown>, String> {
    let device: Arc<dyn Device> = match (number(words, "--memory")?, value(words, "--file")) {
        (Some(bytes), None) => {
            Arc::new(MemoryDevice::new(VolumeSize::new(bytes).map_err(|e| e.to_string())?))
        }
        (None, Some(path)) => {
            let backing = Backing::open(path.as_ref(), Mode::ReadWrite).map_err(|p| p.what)?;
            Arc::new(Plain(backing))
        }
        _ => return Err("say one of --memory BYTES and --file PATH".into()),
    };
    let bytes = number(words, "--show")?.unwrap_or(device.info().size.get());
    Ok(Arc::new(Shown { device, bytes: bytes.into() }))
}

/// Lines of standard input, and `remove` for a signal.
fn commands() -> Result<impl Iterator<Item = String>, String> {
    let (sender, receiver) = channel();
    let ended = on_termination().map_err(|e| e.to_string())?;
    let lines = sender.clone();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    std::thread::spawn(move || {
        if wait_readable(&[ended.as_fd()], None).is_ok() {
            let _ = sender.send("remove".into());
        }
    });
    Ok(receiver.into_iter())
}

fn serve(words: &[&str]) -> Result<(), String> {
    let shown = device(words)?;
    let config = Config {
        number: number(words, "--number")?,
        owner: OWNER,
        queues: number(words, "--queues")?.unwrap_or(0),
        depth: number(words, "--depth")?.unwrap_or(0),
        copy: words.contains(&"--copy"),
        ..Config::default()
    };
    let commands = commands()?;
    let server = Server::start(shown.clone(), config).map_err(|e| e.to_string())?;
    println!("{} recovered={}", server.block_device().display(), server.recovered());
    for command in commands {
        match command.split_whitespace().collect::<Vec<_>>().as_slice() {
            ["leave"] => return if server.leave(GRACE) { Ok(()) } else { Err("in flight".into()) },
            ["remove"] => match server.remove(GRACE) {
                Ok(()) => return Ok(()),
                Err(error) => println!("{error}"),
            },
            ["resize", bytes] => {
                let size = bytes.parse().map_err(|_| "not a number")?;
                let size = VolumeSize::new(size).map_err(|e| e.to_string())?;
                shown.bytes.store(size.get(), Ordering::Relaxed);
                match server.resize(size) {
                    Ok(()) => println!("resized"),
                    Err(error) => println!("{error}"),
                }
            }
            _ => println!("what?"),
        }
    }
    Ok(())
}

fn run() -> Result<(), String> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let parsed = |number: &str| number.parse::<u32>().map_err(|e| e.to_string());
    match words.as_slice() {
        ["features"] => {
            let found = features().map_err(|e| e.to_string())?;
            println!("{:#x} {}", found.bits(), found.names().join(" "));
        }
        ["state", n] => println!("{:?}", existing(parsed(n)?).map_err(|e| e.to_string())?),
        ["remove", n] => {
            let removed = remove_stale(parsed(n)?, OWNER, GRACE).map_err(|e| e.to_string())?;
            println!("removed={removed}");
        }
        words => serve(words)?,
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bare-ublk: {error}");
            ExitCode::FAILURE
        }
    }
}
