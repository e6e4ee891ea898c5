//! Work that may hang, done on threads of its own: a disk, a daemon or a name server that does not
//! answer costs its line of the report, never the report.

use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// The outcome of work that runs elsewhere.
pub struct Pending<T>(Receiver<T>);

/// Starts `work`. Its thread ends with the program when it hangs.
pub fn begin<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Pending<T> {
    let (done, outcome) = mpsc::sync_channel(1);
    // Without a thread nobody answers, which is what the report then says.
    let _ = std::thread::Builder::new().name("doctor".into()).spawn(move || done.send(work()));
    Pending(outcome)
}

impl<T> Pending<T> {
    /// What it found; none when it has not by `deadline`, or failed.
    pub fn by(self, deadline: Instant) -> Option<T> {
        self.0.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
    }
}

/// The instant in `limit`.
pub fn within(limit: Duration) -> Instant {
    Instant::now() + limit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hangs_is_given_up_and_what_answers_is_kept() {
        let (_open, never) = mpsc::channel::<()>();
        let hanging = begin(move || never.recv().is_ok());
        let answering = begin(|| 7);
        let deadline = within(Duration::from_millis(50));
        assert_eq!(hanging.by(deadline), None);
        assert_eq!(answering.by(deadline), Some(7), "an answer is there after the deadline too");
    }
}
