//! Ctrl-C as a condition to wait on, and children that end with their parent.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};

/// Asks the kernel to end this process when the one that started it ends.
pub fn die_with_parent() {
    // Without it the daemon only outlives a killed demo: nothing to refuse service for.
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGTERM);
    if nix::unistd::getppid().as_raw() == 1 {
        // The parent was gone before the request was made.
        std::process::exit(1);
    }
}

/// Set by SIGINT or SIGTERM.
#[derive(Debug, Clone)]
pub struct Interrupt(Arc<(Mutex<bool>, Condvar)>);

impl Interrupt {
    /// Takes both signals over from their default action. Call it before any thread is started.
    pub fn install() -> Self {
        let mut set = SigSet::empty();
        set.add(Signal::SIGINT);
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGHUP);
        let this = Self(Arc::new((Mutex::new(false), Condvar::new())));
        if set.thread_block().is_ok() {
            let flag = this.clone();
            std::thread::spawn(move || {
                if set.wait().is_ok() {
                    flag.set();
                }
                // A second Ctrl-C ends the program at once.
                if set.wait().is_ok() {
                    std::process::exit(130);
                }
            });
        }
        this
    }

    fn set(&self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.1.notify_all();
    }

    /// Whether it has happened.
    pub fn happened(&self) -> bool {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it happens, at most `limit`; whether it has.
    pub fn wait(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut happened = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        while !*happened {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.0.1.wait_timeout(happened, left);
            happened = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *happened
    }
}
