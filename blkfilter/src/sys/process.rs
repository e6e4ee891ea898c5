//! What the process asks of the kernel for itself.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::wake::Event;

/// `CAP_IPC_LOCK`: bit in the effective capabilities.
const CAP_IPC_LOCK: u32 = 14;

/// `CAP_SYS_ADMIN`: likewise.
const CAP_SYS_ADMIN: u32 = 21;

/// From linux/prctl.h; libc does not name it for this target.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Tells the kernel that this process serves I/O: its allocations must not wait for writeback to
/// a device that it serves itself.
///
/// # Errors
/// `EPERM` without `CAP_SYS_RESOURCE`, `EINVAL` before Linux 5.6.
pub fn become_io_flusher() -> io::Result<()> {
    // SAFETY: this prctl takes plain numbers and changes a flag of the process.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    Errno::result(result).map(drop).map_err(io::Error::from)
}

/// Keeps every page of the process in memory from its first use on.
///
/// # Errors
/// `PermissionDenied` when the limit on locked memory is finite: once locked, a later allocation
/// beyond the limit would fail, which is worse than being swapped.
pub fn lock_memory() -> io::Result<()> {
    let (soft, _) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
    if soft != libc::RLIM_INFINITY && !has_capability(CAP_IPC_LOCK) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let on_fault = MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
    let flags = MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE | on_fault;
    mlockall(flags).map_err(io::Error::from)
}

/// Whether the process may make and remove block devices.
#[must_use]
pub fn may_administer() -> bool {
    has_capability(CAP_SYS_ADMIN)
}

fn has_capability(number: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    bits.is_some_and(|bits| bits >> number & 1 == 1)
}

/// The event that SIGTERM and SIGINT set; kept for ever, because a handler cannot be sure that it
/// is the last.
static TERMINATION: OnceLock<Arc<Event>> = OnceLock::new();

/// Its descriptor, for the handler.
static TERMINATION_FD: AtomicI32 = AtomicI32::new(-1);

extern "C" fn terminate(_signal: libc::c_int) {
    let one = 1u64.to_ne_bytes();
    let fd = TERMINATION_FD.load(Ordering::Relaxed);
    // SAFETY: write is async-signal-safe and reads eight bytes that live until it returns. It
    // succeeds on an event that is never full, so it leaves errno alone.
    let _ = unsafe { libc::write(fd, one.as_ptr().cast(), one.len()) };
}

/// The event that SIGTERM and SIGINT set from now on, instead of ending the process.
///
/// # Errors
/// Out of descriptors, or of the kernel.
pub fn on_termination() -> io::Result<Arc<Event>> {
    let event = match TERMINATION.get() {
        Some(event) => Arc::clone(event),
        None => {
            let made = Arc::new(Event::new()?);
            Arc::clone(TERMINATION.get_or_init(|| made))
        }
    };
    TERMINATION_FD.store(event.as_fd().as_raw_fd(), Ordering::Relaxed);
    let action =
        SigAction::new(SigHandler::Handler(terminate), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        // SAFETY: the handler does nothing but one async-signal-safe system call.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(event)
}
