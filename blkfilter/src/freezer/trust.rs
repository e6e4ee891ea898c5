//! Whether somebody else could change what is run with our rights.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Anybody may write, but only the owner of a file may remove or replace it.
const STICKY: u32 = 0o1000;
/// Group and others may write.
const SHARED: u32 = 0o022;

/// Why the file at `path` may not be relied on, if so: it, or a folder on its way, could be changed
/// by a user who is not one of `owners`.
///
/// # Errors
/// A sentence for the problem.
pub fn trusted_file(path: &Path, owners: &[u32]) -> Result<(), String> {
    let real = fs::canonicalize(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let file = fs::metadata(&real).map_err(|e| format!("{}: {e}", path.display()))?;
    if !file.is_file() {
        return Err(format!("{} is not a file", path.display()));
    }
    // The way that was written, in case it has links, and the one that they lead to.
    let ways = path.ancestors().skip(1).chain(real.ancestors());
    for way in ways.filter(|way| !way.as_os_str().is_empty()) {
        let found = fs::metadata(way).map_err(|e| format!("{}: {e}", way.display()))?;
        if !owners.contains(&found.uid()) {
            return Err(format!("{} belongs to user {}", way.display(), found.uid()));
        }
        let guarded = found.is_dir() && found.mode() & STICKY != 0;
        if found.mode() & SHARED != 0 && !guarded {
            return Err(format!("{} can be written by others than its owner", way.display()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_others_can_change_is_not_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let me = nix::unistd::geteuid().as_raw();
        let hook = dir.path().join("hook");
        fs::write(&hook, "#!/bin/sh\n").unwrap();
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(&hook, 0o755);
        trusted_file(&hook, &[me, 0]).unwrap();
        assert!(trusted_file(&hook, &[me + 1]).is_err(), "of another user");
        assert!(trusted_file(&dir.path().join("none"), &[me, 0]).is_err());
        assert!(trusted_file(dir.path(), &[me, 0]).is_err(), "a folder");
        mode(&hook, 0o775);
        assert!(trusted_file(&hook, &[me, 0]).unwrap_err().contains("written by others"));
        mode(&hook, 0o755);
        mode(dir.path(), 0o777);
        assert!(trusted_file(&hook, &[me, 0]).is_err(), "its folder");
        mode(dir.path(), 0o700);

        let open = dir.path().join("open");
        fs::create_dir(&open).unwrap();
        mode(&open, 0o777);
        std::os::unix::fs::symlink(&hook, open.join("link")).unwrap();
        assert!(trusted_file(&open.join("link"), &[me, 0]).is_err(), "a link that others can turn");
    }
}
