//! Serves a RAM disk over NBD until it is interrupted: the front end alone, for measurements and
//! for a first look with any NBD client.
//!
//! `cargo run --release --example ram_nbd -- SOCKET [MIB]`

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use farshore_blkfilter::frontend::memory::MemoryDevice;
use farshore_blkfilter::frontend::nbd::{Config, Export, Exports, Server};
use farshore_extent::VolumeSize;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let path = PathBuf::from(args.next().ok_or("usage: ram_nbd SOCKET [MIB]")?);
    let mib: u64 = args.next().map_or(Ok(1024), |n| n.parse())?;
    let exports = Exports::new();
    exports.add(Export {
        name: "ram".into(),
        description: "a RAM disk".into(),
        device: Arc::new(MemoryDevice::new(VolumeSize::new(mib << 20)?)),
    })?;
    let server = Server::bind_unix(&path, exports, Config::default())?;
    println!("nbd+unix:///ram?socket={}", server.path().display());
    // Ends with its standard input, so that whoever started it need not kill it.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
