//! Ctrl-C as a condition to wait on, and children that end with their parent.

use nix::sys::signal::{SigSet, Signal};

use crate::flag::Flag;

/// Asks the kernel to end this process when the one that started it ends.
pub fn die_with_parent() {
    // Without it the daemon only outlives a killed demo: nothing to refuse service for.
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGTERM);
    if nix::unistd::getppid().as_raw() == 1 {
        // The parent was gone before the request was made.
        std::process::exit(1);
    }
}

/// A flag that SIGINT, SIGTERM or SIGHUP sets instead of ending the program. Call it before any
/// thread is started; a second Ctrl-C ends the program at once.
pub fn interrupt() -> Flag {
    let mut set = SigSet::empty();
    set.add(Signal::SIGINT);
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGHUP);
    let flag = Flag::default();
    if set.thread_block().is_ok() {
        let flag = flag.clone();
        std::thread::spawn(move || {
            if set.wait().is_ok() {
                flag.set();
            }
            if set.wait().is_ok() {
                std::process::exit(130);
            }
        });
    }
    flag
}
