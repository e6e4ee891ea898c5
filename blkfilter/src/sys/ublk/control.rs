//! Control commands to the ublk driver.
//!
//! Each runs on a thread of its own, because some kernels never finish some of them; who waits
//! can give up, and the thread keeps what the kernel may still write to.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};

use super::uapi::{CONTROL_LEN, Control, ControlCommand};

/// Where control commands go.
pub const CONTROL_PATH: &str = "/dev/ublk-control";

/// A command with its buffer.
#[derive(Debug)]
pub struct Call {
    /// What to do.
    pub command: Control,
    /// To which device.
    pub device: u32,
    /// Meaning by command.
    pub data: u64,
    /// Read or filled by the driver; at most 65535 bytes.
    pub buffer: Vec<u8>,
}

/// What the driver said.
#[derive(Debug)]
pub struct Answer {
    /// Zero or more, or a negative errno.
    pub result: i32,
    /// As the driver left it.
    pub buffer: Vec<u8>,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum CallError {
    /// The control device cannot be opened.
    Open(io::Error),
    /// There is no ring to send the command through, or no thread for it.
    Ring(io::Error),
    /// The time has passed. The command is still being worked on.
    Late,
}

/// A command on its way.
#[derive(Debug)]
pub struct Pending(Receiver<Result<Answer, CallError>>);

impl Pending {
    /// Waits for the answer; [`CallError::Late`] when there is none yet, ask again then.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn wait(&self, limit: Duration) -> Result<Answer, CallError> {
        match self.0.recv_timeout(limit) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => Err(CallError::Late),
            // The thread is gone without a word: it panicked.
            Err(RecvTimeoutError::Disconnected) => {
                Err(CallError::Ring(io::ErrorKind::BrokenPipe.into()))
            }
        }
    }
}

/// Sends a command.
///
/// # Errors
/// [`CallError::Ring`] when there is no thread for it.
pub fn begin(call: Call) -> Result<Pending, CallError> {
    let (sender, receiver) = sync_channel(1);
    let thread = thread::Builder::new().name("ublk-control".into());
    let run = move || {
        // Whoever asked may have given up by now.
        let _ = sender.send(perform(call));
    };
    thread.spawn(run).map(|_| Pending(receiver)).map_err(CallError::Ring)
}

/// Sends a command and waits for the answer.
///
/// # Errors
/// [`CallError`].
pub fn call(call: Call, limit: Duration) -> Result<Answer, CallError> {
    begin(call)?.wait(limit)
}

fn perform(call: Call) -> Result<Answer, CallError> {
    let Call { command, device, data, mut buffer } = call;
    let control =
        OpenOptions::new().read(true).write(true).open(CONTROL_PATH).map_err(CallError::Open)?;
    // The driver takes its commands from the second half of double-sized entries.
    let mut ring: IoUring<Entry128, cqueue::Entry> =
        IoUring::builder().build(2).map_err(CallError::Ring)?;
    let len = u16::try_from(buffer.len())
        .map_err(|_| CallError::Ring(io::ErrorKind::InvalidInput.into()))?;
    let address = if len == 0 { 0 } else { buffer.as_mut_ptr().expose_provenance() as u64 };
    let fixed = ControlCommand { device, len, address, data }.encode();
    let mut bytes = [0; 80];
    bytes[..CONTROL_LEN].copy_from_slice(&fixed);
    let fd = types::Fd(control.as_raw_fd());
    let entry = opcode::UringCmd80::new(fd, command as u32).cmd(bytes).build();
    // SAFETY: `buffer` is not touched until the completion was taken below, and is leaked where it
    // cannot be; the descriptor is open until then.
    let pushed = unsafe { ring.submission().push(&entry) };
    pushed.map_err(|_| CallError::Ring(io::ErrorKind::WouldBlock.into()))?;
    loop {
        match ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                std::mem::forget(buffer);
                return Err(CallError::Ring(error));
            }
        }
        if let Some(entry) = ring.completion().next() {
            return Ok(Answer { result: entry.result(), buffer });
        }
    }
}
