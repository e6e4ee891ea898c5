//! Control commands to the ublk driver.
//!
//! Some never end: a few kernels have defects, and START_DEV waits for the search for partitions,
//! which reads the device, which its server may never answer. A task that is stuck in such a command
//! cannot be killed. What it shares with the server, descriptors and memory, is then held for ever:
//! the claims of all disks and the character devices of all volumes, so that no later server could
//! have any of them, and the server itself counts as alive. So what may get stuck is given to a
//! program of its own, see [`use_helper`]; and a device with a command that was given up gets no
//! further one until that has ended, see [`CallError::Behind`].

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};

use super::uapi::{CONTROL_LEN, Control, ControlCommand};
use crate::sys::isolate;

/// Where control commands go.
pub const CONTROL_PATH: &str = "/dev/ublk-control";

/// Any device: what is asked of the driver itself.
const ANY: u32 = u32::MAX;

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

impl Call {
    /// Whose turn it is: a device's; or, where the driver looks after all of them at once, everyone's.
    fn of(&self) -> u32 {
        if self.command == Control::AddDev { ANY } else { self.device }
    }

    /// Whether the driver may have to wait for something. The others only look.
    fn may_wait(&self) -> bool {
        !matches!(
            self.command,
            Control::GetFeatures | Control::GetDevInfo | Control::GetQueueAffinity
        )
    }
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
    /// There is no ring to send the command through, or no thread or program for it.
    Ring(io::Error),
    /// The time has passed. The command is still being worked on.
    Late,
    /// This command was given up earlier and is still being worked on: nothing was sent.
    Behind(Control),
}

/// A command on its way; shared by who waits for it and who does it.
#[derive(Debug)]
struct Flight {
    of: u32,
    command: Control,
    /// Written under the lock of [`GIVEN_UP`].
    ended: AtomicBool,
}

/// Commands that were given up and have not ended.
static GIVEN_UP: Mutex<Vec<Arc<Flight>>> = Mutex::new(Vec::new());

fn given_up() -> MutexGuard<'static, Vec<Arc<Flight>>> {
    GIVEN_UP.lock().unwrap_or_else(PoisonError::into_inner) // plain data
}

impl Flight {
    fn give_up(self: &Arc<Self>) {
        let mut given_up = given_up();
        if !self.ended.load(Ordering::Relaxed) && !given_up.iter().any(|f| Arc::ptr_eq(f, self)) {
            given_up.push(Arc::clone(self));
        }
    }

    fn end(&self) {
        let mut given_up = given_up();
        self.ended.store(true, Ordering::Relaxed);
        given_up.retain(|flight| !std::ptr::eq(&raw const **flight, self));
    }
}

/// A command on its way. Dropping it before it has ended gives it up.
#[derive(Debug)]
pub struct Pending {
    answer: Receiver<Result<Answer, CallError>>,
    flight: Arc<Flight>,
}

impl Pending {
    /// Waits for the answer; [`CallError::Late`] when there is none yet, ask again then.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn wait(&self, limit: Duration) -> Result<Answer, CallError> {
        match self.answer.recv_timeout(limit) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => Err(CallError::Late),
            // The thread is gone without a word: it panicked.
            Err(RecvTimeoutError::Disconnected) => {
                Err(CallError::Ring(io::ErrorKind::BrokenPipe.into()))
            }
        }
    }

    /// From now on, and until it has ended, nothing else is sent to the device.
    pub fn give_up(&self) {
        self.flight.give_up();
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// Sends a command.
///
/// # Errors
/// [`CallError::Behind`]; [`CallError::Ring`] when there is no thread for it.
pub fn begin(call: Call) -> Result<Pending, CallError> {
    let of = call.of();
    if let Some(flight) = given_up().iter().find(|flight| flight.of == of) {
        return Err(CallError::Behind(flight.command));
    }
    let flight = Arc::new(Flight { of, command: call.command, ended: AtomicBool::new(false) });
    let (sender, answer) = sync_channel(1);
    let doing = Arc::clone(&flight);
    let run = move || {
        let answer = perform(call);
        doing.end();
        // Whoever asked may have given up by now.
        let _ = sender.send(answer);
    };
    let thread = thread::Builder::new().name("ublk-control".into()).spawn(run);
    thread.map(|_| Pending { answer, flight }).map_err(CallError::Ring)
}

/// Sends a command and waits for the answer.
///
/// # Errors
/// [`CallError`].
pub fn call(call: Call, limit: Duration) -> Result<Answer, CallError> {
    begin(call)?.wait(limit)
}

/// What this program is started with to be the helper.
static HELPER: OnceLock<OsString> = OnceLock::new();

/// From now on commands that may get stuck are done by this very program, started anew with the one
/// argument `word`, upon which it calls [`help`]. Without a helper they are done in this process.
pub fn use_helper(word: &str) {
    let _ = HELPER.set(word.into()); // it is the same word each time
}

/// The helper's whole life: does the one command that standard input has, and tells standard
/// output.
///
/// # Errors
/// Of standard input and output.
pub fn help() -> io::Result<()> {
    let mut bytes = Vec::new();
    io::stdin().read_to_end(&mut bytes)?;
    let call = decode_call(&bytes).ok_or(io::ErrorKind::InvalidData)?;
    io::stdout().write_all(&encode_answer(perform_here(call)))
}

fn encode_call(call: &Call) -> Vec<u8> {
    let mut bytes = (call.command as u32).to_ne_bytes().to_vec();
    bytes.extend(call.device.to_ne_bytes());
    bytes.extend(call.data.to_ne_bytes());
    bytes.extend(&call.buffer);
    bytes
}

fn decode_call(bytes: &[u8]) -> Option<Call> {
    let (command, rest) = bytes.split_first_chunk()?;
    let (device, rest) = rest.split_first_chunk()?;
    let (data, buffer) = rest.split_first_chunk()?;
    let command = Control::of(u32::from_ne_bytes(*command))?;
    let (device, data) = (u32::from_ne_bytes(*device), u64::from_ne_bytes(*data));
    Some(Call { command, device, data, buffer: buffer.to_vec() })
}

/// How the command went, a number, the buffer.
fn encode_answer(answer: Result<Answer, CallError>) -> Vec<u8> {
    let errno = |error: &io::Error| error.raw_os_error().unwrap_or(libc::EIO);
    let (how, number, buffer) = match answer {
        Ok(answer) => (b'=', answer.result, answer.buffer),
        Err(CallError::Open(error)) => (b'o', errno(&error), Vec::new()),
        Err(CallError::Ring(error)) => (b'r', errno(&error), Vec::new()),
        Err(CallError::Late | CallError::Behind(_)) => (b'r', libc::EIO, Vec::new()),
    };
    let mut bytes = vec![how];
    bytes.extend(number.to_ne_bytes());
    bytes.extend(buffer);
    bytes
}

fn decode_answer(bytes: &[u8]) -> Result<Answer, CallError> {
    let broken = || CallError::Ring(io::Error::other("the helper ended without an answer"));
    let (how, rest) = bytes.split_first().ok_or_else(broken)?;
    let (number, buffer) = rest.split_first_chunk().ok_or_else(broken)?;
    let number = i32::from_ne_bytes(*number);
    match how {
        b'=' => Ok(Answer { result: number, buffer: buffer.to_vec() }),
        b'o' => Err(CallError::Open(io::Error::from_raw_os_error(number))),
        _ => Err(CallError::Ring(io::Error::from_raw_os_error(number))),
    }
}

fn by_helper(call: &Call, word: &OsString) -> io::Result<Vec<u8>> {
    let mut helper = Command::new("/proc/self/exe");
    helper.arg(word).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut helper = helper.spawn()?;
    if let Some(mut to) = helper.stdin.take() {
        to.write_all(&encode_call(call))?;
    }
    let mut said = Vec::new();
    if let Some(mut from) = helper.stdout.take() {
        from.read_to_end(&mut said)?;
    }
    helper.wait()?;
    Ok(said)
}

fn perform(call: Call) -> Result<Answer, CallError> {
    match HELPER.get().filter(|_| call.may_wait()) {
        Some(word) => decode_answer(&by_helper(&call, word).map_err(CallError::Ring)?),
        None => {
            isolate::forget_descriptors(Vec::new()).map_err(CallError::Ring)?;
            perform_here(call)
        }
    }
}

/// On the calling thread.
fn perform_here(call: Call) -> Result<Answer, CallError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn call(command: Control) -> Call {
        Call { command, device: 3, data: u64::MAX, buffer: vec![1, 2, 3] }
    }

    #[test]
    fn a_call_and_its_answer_reach_the_helper_and_come_back() {
        let sent = call(Control::StartDev);
        let got = decode_call(&encode_call(&sent)).unwrap();
        assert_eq!((got.command, got.device, got.data), (sent.command, sent.device, sent.data));
        assert_eq!(got.buffer, sent.buffer);
        let answer = Answer { result: -16, buffer: vec![7; 64] };
        let got = decode_answer(&encode_answer(Ok(answer))).unwrap();
        assert_eq!((got.result, got.buffer), (-16, vec![7; 64]));
        let missing = CallError::Open(io::Error::from_raw_os_error(libc::ENOENT));
        let got = decode_answer(&encode_answer(Err(missing))).unwrap_err();
        assert!(matches!(got, CallError::Open(e) if e.raw_os_error() == Some(libc::ENOENT)));
        for broken in [&[][..], b"=", b"=123"] {
            assert!(matches!(decode_answer(broken), Err(CallError::Ring(_))));
        }
        assert!(decode_call(&[0; 40]).is_none(), "there is no such command");
    }

    #[test]
    fn a_device_gets_no_command_while_one_that_was_given_up_is_with_the_driver() {
        let (_sender, answer) = sync_channel(1);
        let flight = |of, command| Arc::new(Flight { of, command, ended: AtomicBool::new(false) });
        // A number that no other test has.
        let stuck = flight(77, Control::StartDev);
        drop(Pending { answer, flight: Arc::clone(&stuck) });
        let next = |device| {
            // Waited for: a command that is dropped is given up itself.
            let call = Call { device, ..call(Control::GetDevInfo) };
            super::call(call, Duration::from_secs(20))
        };
        assert!(matches!(next(77), Err(CallError::Behind(Control::StartDev))));
        assert!(!matches!(next(78), Err(CallError::Behind(_))), "another device");
        stuck.end();
        assert!(!matches!(next(77), Err(CallError::Behind(_))), "it has ended");
        stuck.give_up();
        assert!(!matches!(next(77), Err(CallError::Behind(_))), "too late to give it up");
    }
}
