//! A word outside of the state directory: volumes of this host are protected. Where the file system
//! that holds the state is not mounted, its bare mount point must not pass for a host without any.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use farshore_extent::Problem;

use super::problem;
use super::state::EPOCH_FILE;
use crate::durable_fs;

/// Refuses a state directory that was never used although volumes are protected.
///
/// # Errors
/// FS-2039.
pub(super) fn check(marker: &Path, state: &Path) -> Result<(), Problem> {
    if marker.exists() && !state.join(EPOCH_FILE).exists() {
        return Err(problem::no_state(state, marker));
    }
    Ok(())
}

/// Of those who write the marker.
static TURN: Mutex<()> = Mutex::new(());

/// Has the marker say whether there is any volume. Without it a missing state is not noticed, which
/// is no reason to refuse a volume.
pub(super) fn keep(marker: &Path, state: &Path, any: impl FnOnce() -> bool) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let text = format!(
        "Volumes of this host are protected; their records are in {}.\n\
         While this file is here, filterd does not start without them (FS-2039).\n",
        state.display()
    );
    let known = fs::read_to_string(marker).ok();
    let written = match (any(), known) {
        (true, Some(known)) if known == text => Ok(()),
        (true, _) => marker
            .parent()
            .map_or(Ok(()), |directory| durable_fs::create_directory(directory, 0o755))
            .and_then(|()| durable_fs::write(marker, text.as_bytes(), 0o644)),
        (false, Some(_)) => durable_fs::remove(marker),
        (false, None) => Ok(()),
    };
    if let Err(error) = written {
        tracing::warn!(marker = %marker.display(), %error, "a missing state would not be noticed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_that_is_gone_is_told_from_one_that_never_was() {
        let dir = tempfile::tempdir().unwrap();
        let (marker, state) = (dir.path().join("etc/protected"), dir.path().join("state"));
        check(&marker, &state).expect("a new host");
        fs::create_dir(&state).unwrap();
        fs::write(state.join(EPOCH_FILE), "{}").unwrap();
        keep(&marker, &state, || true);
        check(&marker, &state).expect("all is there");
        fs::remove_dir_all(&state).unwrap();
        let refused = check(&marker, &state).unwrap_err();
        assert_eq!(refused.code.0, 2039);
        assert!(refused.why.contains(marker.to_str().unwrap()), "{}", refused.why);
        keep(&marker, &state, || false);
        check(&marker, &state).expect("nothing was protected any more");
        keep(&marker, &state, || false);
    }
}
