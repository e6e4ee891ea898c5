//! Ctrl-C as a condition to wait on, and children that end with their parent.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};

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

/// A Ctrl-C so soon after the first is the same one (some tools send it to the process and to its
/// group).
const SAME: Duration = Duration::from_secs(1);

/// A flag that SIGINT, SIGTERM or SIGHUP sets instead of ending the program; the next one ends it
/// at once. By handlers, not by blocking: a mask would be inherited by every child.
pub fn interrupt() -> Flag {
    let flag = Flag::default();
    let set = flag.clone();
    std::thread::spawn(move || {
        // Without a runtime the signals keep their default action, which ends the program.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        if let Ok(runtime) = runtime {
            runtime.block_on(watch(&set));
        }
    });
    flag
}

async fn watch(flag: &Flag) {
    let kinds = (SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup());
    let streams = (signal(kinds.0), signal(kinds.1), signal(kinds.2));
    let (Ok(mut int), Ok(mut term), Ok(mut hangup)) = streams else { return };
    let mut first = None;
    loop {
        tokio::select! { _ = int.recv() => {}, _ = term.recv() => {}, _ = hangup.recv() => {} }
        if first.is_some_and(|at: Instant| at.elapsed() > SAME) {
            std::process::exit(130);
        }
        first.get_or_insert_with(Instant::now);
        flag.set();
    }
}
