//! Stands in for the agent when only the cost of capture is measured: fetches every record of a
//! volume, looks at no payload, and releases at once.
//!
//! Usage: `null-consumer FILTERD_SOCKET VOLUME`. Ends when the daemon goes away.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use farshore_blkfilter::control::{Client, FetchWish};
use farshore_extent::{Lsn, Problem};

/// As the agent asks: a batch of 1 MiB or 20 ms.
const WISH: FetchWish = FetchWish {
    want_bytes: 1 << 20,
    wait: Duration::from_millis(20),
    idle: Duration::from_secs(5),
};

fn consume(socket: &Path, name: &str) -> Result<(), Problem> {
    let mut client = Client::connect(socket)?;
    let volumes = client.list()?;
    let Some(found) = volumes.iter().find(|v| v.info.name.as_str() == name) else {
        return Err(Problem::harmless(5001, format!("no volume {name}"), "", "protect it first"));
    };
    let volume = found.info.volume;
    let mut at = Lsn::ZERO;
    loop {
        let fetched = client.fetch(volume, at, WISH)?;
        if let Some(last) = fetched.records.last() {
            at = Lsn::new(fetched.epoch, last.seq);
            client.release(volume, at)?;
        }
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    let [_, socket, name] = words.as_slice() else {
        eprintln!("usage: null-consumer FILTERD_SOCKET VOLUME");
        return ExitCode::FAILURE;
    };
    match consume(Path::new(socket), name) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("null-consumer: {}", problem.what);
            ExitCode::FAILURE
        }
    }
}
