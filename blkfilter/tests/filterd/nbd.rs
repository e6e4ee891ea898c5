//! A small NBD client: just enough to write and to be answered.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const WRITE_ZEROES: u16 = 6;

/// A connection in transmission, one request at a time.
pub struct Nbd {
    stream: UnixStream,
    cookie: u64,
}

fn read<const N: usize>(stream: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

impl Nbd {
    pub fn connect(path: &Path, export: &str) -> io::Result<Self> {
        let mut stream = UnixStream::connect(path)?;
        let greeting: [u8; 18] = read(&mut stream)?;
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        stream.write_all(&3u32.to_be_bytes())?; // fixed newstyle, no zeroes
        // NBD_OPT_GO, no information requests.
        let len = u32::try_from(export.len()).unwrap();
        let mut option = b"IHAVEOPT".to_vec();
        option.extend(7u32.to_be_bytes());
        option.extend((len + 6).to_be_bytes());
        option.extend(len.to_be_bytes());
        option.extend(export.as_bytes());
        option.extend([0, 0]);
        stream.write_all(&option)?;
        loop {
            let reply: [u8; 20] = read(&mut stream)?;
            let kind = u32::from_be_bytes(reply[12..16].try_into().unwrap());
            let len = u32::from_be_bytes(reply[16..20].try_into().unwrap());
            let mut rest = vec![0; len as usize];
            stream.read_exact(&mut rest)?;
            match kind {
                1 => return Ok(Self { stream, cookie: 0 }),
                3 => {}
                _ => return Err(io::Error::other(format!("refused: {kind:#x}"))),
            }
        }
    }

    fn request(&mut self, command: u16, offset: u64, len: u32, data: &[u8]) -> io::Result<()> {
        self.cookie += 1;
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend(0u16.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes.extend(data);
        self.stream.write_all(&bytes)?;
        let reply: [u8; 16] = read(&mut self.stream)?;
        assert_eq!(reply[8..16], self.cookie.to_be_bytes());
        match u32::from_be_bytes(reply[4..8].try_into().unwrap()) {
            0 => Ok(()),
            error => Err(io::Error::other(format!("error {error}"))),
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.request(WRITE, offset, u32::try_from(data.len()).unwrap(), data)
    }

    pub fn zero(&mut self, offset: u64, len: u32) -> io::Result<()> {
        self.request(WRITE_ZEROES, offset, len, &[])
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.request(FLUSH, 0, 0, &[])
    }

    pub fn read(&mut self, offset: u64, len: u32) -> io::Result<Vec<u8>> {
        self.request(READ, offset, len, &[])?;
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }
}
