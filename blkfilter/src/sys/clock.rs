//! What the kernel knows of its wall clock.

use std::io;
use std::time::Duration;

use nix::errno::Errno;

/// Discipline of the wall clock, as a time service (NTP, PTP) reports it to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Discipline {
    /// A time service keeps it.
    pub synchronised: bool,
    /// Largest error that the time service admits.
    pub max_error: Duration,
}

/// Asks without changing anything; needs no privileges.
///
/// # Errors
/// Where a sandbox forbids the question.
pub fn discipline() -> io::Result<Discipline> {
    let mut answer = std::mem::MaybeUninit::<libc::timex>::zeroed();
    // SAFETY: zeroes are a valid timex and `modes` 0 changes nothing; the kernel fills the
    // structure, which is valid for the call.
    let state = unsafe { libc::adjtimex(answer.as_mut_ptr()) };
    let state = Errno::result(state)?;
    // SAFETY: all bytes were zeroed above, which is a valid timex, and the kernel wrote whole
    // fields.
    let answer = unsafe { answer.assume_init() };
    let unsynchronised = state == libc::TIME_ERROR || answer.status & libc::STA_UNSYNC != 0;
    let micros = u64::try_from(answer.maxerror).unwrap_or(u64::MAX);
    Ok(Discipline { synchronised: !unsynchronised, max_error: Duration::from_micros(micros) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_nobody_keeps_admits_a_large_error() {
        match discipline() {
            // The kernel lets the error grow to 16 s and calls the clock unsynchronised then.
            Ok(known) => assert!(!known.synchronised || known.max_error.as_secs() < 16),
            Err(error) => println!("skipped: {error}"),
        }
    }
}
