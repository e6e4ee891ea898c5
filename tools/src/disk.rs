//! A disk to write and read: an NBD export, or a block device of this host.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc::{O_DIRECT, O_DSYNC};

use crate::nbd_client::{Done, NbdClient, Op};

/// What a direct transfer's memory is aligned to, in bytes: enough for every disk.
const ALIGN: usize = 4096;

/// Where a disk is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// An export on a unix socket.
    Nbd {
        /// The socket.
        socket: PathBuf,
        /// Name of the export.
        export: String,
    },
    /// A block device.
    Device(PathBuf),
}

impl Place {
    /// Opens it for reading and writing.
    ///
    /// # Errors
    /// Of the system; `InvalidInput` when the path is no block device.
    pub fn open(&self) -> io::Result<Disk> {
        match self {
            Self::Nbd { socket, export } => NbdClient::connect(socket, export).map(Disk::Nbd),
            Self::Device(path) => BlockDevice::open(path).map(Disk::Device),
        }
    }
}

/// An open disk, past every cache of this host.
#[derive(Debug)]
pub enum Disk {
    /// Many requests in flight.
    Nbd(NbdClient),
    /// One request at a time: it is done when [`Disk::submit`] returns.
    Device(BlockDevice),
}

impl Disk {
    /// Requests without a reply taken yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        match self {
            Self::Nbd(client) => client.in_flight(),
            Self::Device(device) => device.done.len(),
        }
    }

    /// Sends a request; its cookie.
    ///
    /// # Errors
    /// Of the connection. What the disk answers comes with the reply.
    pub fn submit(&mut self, op: Op<'_>) -> io::Result<u64> {
        match self {
            Self::Nbd(client) => client.submit(op),
            Self::Device(device) => Ok(device.submit(op)),
        }
    }

    /// The next reply, of whichever request.
    ///
    /// # Errors
    /// Of the connection.
    pub fn complete(&mut self) -> io::Result<Done> {
        match self {
            Self::Nbd(client) => client.complete(),
            Self::Device(device) => {
                device.done.pop_front().ok_or_else(|| io::Error::other("nothing is in flight"))
            }
        }
    }

    /// Waits until a reply can be taken, at most `limit`; false when none has come.
    ///
    /// # Errors
    /// Of the connection.
    pub fn answer_within(&self, limit: Duration) -> io::Result<bool> {
        match self {
            Self::Nbd(client) => client.answer_within(limit),
            Self::Device(device) => Ok(!device.done.is_empty()),
        }
    }

    /// Makes everything answered before durable.
    ///
    /// # Errors
    /// Of connection and disk.
    pub fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Nbd(client) => client.flush(),
            Self::Device(device) => device.file.sync_data(),
        }
    }

    /// Fills `buf` from a byte offset; both in whole blocks of 4 KiB.
    ///
    /// # Errors
    /// Of connection and disk.
    pub fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Nbd(client) => client.read_at(offset, buf),
            Self::Device(device) => device.read_at(offset, buf),
        }
    }
}

/// A block device, opened for direct transfers.
#[derive(Debug)]
pub struct BlockDevice {
    file: File,
    /// Writes through this are durable when they return.
    durable: File,
    memory: Vec<u8>,
    next: u64,
    done: VecDeque<Done>,
}

impl BlockDevice {
    fn open(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::FileTypeExt;
        // Never a plain file that somebody made where a device is missing.
        if !std::fs::metadata(path)?.file_type().is_block_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no block device"));
        }
        let open = |flags| File::options().read(true).write(true).custom_flags(flags).open(path);
        Ok(Self {
            file: open(O_DIRECT)?,
            durable: open(O_DIRECT | O_DSYNC)?,
            memory: Vec::new(),
            next: 0,
            done: VecDeque::new(),
        })
    }

    /// Aligned memory of so many bytes.
    fn aligned(memory: &mut Vec<u8>, len: usize) -> &mut [u8] {
        memory.resize(memory.len().max(len + ALIGN), 0);
        let skip = memory.as_ptr().align_offset(ALIGN);
        &mut memory[skip..skip + len]
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let bytes = Self::aligned(&mut self.memory, buf.len());
        self.file.read_exact_at(bytes, offset)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn run(&mut self, op: Op<'_>) -> io::Result<Vec<u8>> {
        let signed = |n: u64| i64::try_from(n).map_err(io::Error::other);
        match op {
            Op::Read { offset, len } => {
                let mut data = vec![0; usize::try_from(len).unwrap_or(0)];
                return self.read_at(offset, &mut data).map(|()| data);
            }
            Op::Write { offset, data, fua } => {
                let file = if fua { &self.durable } else { &self.file };
                let bytes = Self::aligned(&mut self.memory, data.len());
                bytes.copy_from_slice(data);
                // One call, one request: a second call for the rest would be another write.
                let written = file.write_at(bytes, offset)?;
                if written != data.len() {
                    return Err(io::Error::other(format!("only {written} bytes were written")));
                }
            }
            Op::Zero { offset, len, fua } => {
                let how = FallocateFlags::FALLOC_FL_ZERO_RANGE;
                let how = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(&self.file, how, signed(offset)?, i64::from(len))?;
                if fua {
                    self.file.sync_data()?;
                }
            }
            Op::Trim { offset, len } => {
                let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE;
                let how = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(&self.file, how, signed(offset)?, i64::from(len))?;
            }
            Op::Flush => self.file.sync_data()?,
        }
        Ok(Vec::new())
    }

    fn submit(&mut self, op: Op<'_>) -> u64 {
        let cookie = self.next;
        self.next += 1;
        let (error, data) = match self.run(op) {
            Ok(data) => (0, data),
            Err(error) => (error.raw_os_error().unwrap_or(nix::libc::EIO), Vec::new()),
        };
        let error = u32::try_from(error).unwrap_or(0);
        self.done.push_back(Done { cookie, error, data });
        cookie
    }
}
