//! Places in long work at which a test can have the daemon end as if it were killed: the one that
//! `FARSHORE_END_AT` names. Without it nothing is looked at twice.

use std::sync::OnceLock;

static END_AT: OnceLock<Option<String>> = OnceLock::new();

/// Ends the process here when this is the place that was asked for.
pub(crate) fn reach(place: &str) {
    let wanted = END_AT.get_or_init(|| std::env::var("FARSHORE_END_AT").ok());
    if wanted.as_deref() == Some(place) {
        tracing::error!(place, "FARSHORE_END_AT: ends here");
        std::process::abort();
    }
}
