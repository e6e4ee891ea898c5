//! A unix socket on the host that leads to a port of the machine: our NBD client knows no other.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

pub struct Bridge {
    folder: tempfile::TempDir,
}

impl Bridge {
    /// To a port of the loopback address. It ends with its connections.
    pub fn new(port: u16) -> Self {
        let bridge = Self { folder: tempfile::tempdir().expect("folder") };
        let listener = UnixListener::bind(bridge.socket()).expect("socket");
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                // The machine may be gone: then the client's connection ends as well.
                join(client, TcpStream::connect(("127.0.0.1", port))).ok();
            }
        });
        bridge
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd")
    }
}

fn join(client: UnixStream, server: io::Result<TcpStream>) -> io::Result<()> {
    let server = server?;
    server.set_nodelay(true)?;
    let (mut from_client, mut to_client) = (client.try_clone()?, client);
    let (mut from_server, mut to_server) = (server.try_clone()?, server);
    std::thread::spawn(move || {
        io::copy(&mut from_client, &mut to_server).ok();
        to_server.shutdown(Shutdown::Both).ok();
    });
    std::thread::spawn(move || {
        io::copy(&mut from_server, &mut to_client).ok();
        to_client.shutdown(Shutdown::Both).ok();
    });
    Ok(())
}
