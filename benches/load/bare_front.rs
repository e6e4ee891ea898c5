//! The front end with capture off: what filter-tax compares with, and what front-end measures.
//!
//! Serves a RAM disk, or a file through the product's own backing code, as export `vol` on a unix
//! socket. Between them there is only what a device without a filter needs: buffers and a ring.
//!
//! Usage: `bare-front --socket PATH (--memory BYTES | --file IMAGE)`. Ends by a signal.

mod plain;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use farshore_blkfilter::backing::{Backing, Mode};
use farshore_blkfilter::device::Device;
use farshore_blkfilter::frontend::memory::MemoryDevice;
use farshore_blkfilter::frontend::nbd::{Config, Export, Exports, Server};
use farshore_extent::VolumeSize;
use plain::Plain;

fn serve() -> Result<(), String> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (socket, device): (_, Arc<dyn Device>) = match words.as_slice() {
        ["--socket", socket, "--memory", bytes] => {
            let bytes = bytes.parse().map_err(|e| format!("{bytes}: {e}"))?;
            let size = VolumeSize::new(bytes).map_err(|e| e.to_string())?;
            (PathBuf::from(socket), Arc::new(MemoryDevice::new(size)))
        }
        ["--socket", socket, "--file", image] => {
            let backing = Backing::open(image.as_ref(), Mode::ReadWrite).map_err(|p| p.what)?;
            (PathBuf::from(socket), Arc::new(Plain(backing)))
        }
        _ => return Err("usage: --socket PATH (--memory BYTES | --file IMAGE)".into()),
    };
    let exports = Exports::new();
    let export = Export { name: "vol".into(), description: String::new(), device };
    exports.add(export).map_err(|e| e.to_string())?;
    let _server =
        Server::bind_unix(&socket, exports, Config::default()).map_err(|e| e.to_string())?;
    loop {
        std::thread::park();
    }
}

fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bare-front: {error}");
            ExitCode::FAILURE
        }
    }
}
