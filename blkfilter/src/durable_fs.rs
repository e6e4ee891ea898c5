//! Changes to files and directories that survive power loss; the only place that renames.
//!
//! A rename or removal is durable only when the directory was synced after it. Callers treat every
//! error as "unknown whether it happened": read again before deciding.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Makes `path` hold exactly `bytes`, durably and all or nothing: readers and a crash see the old
/// content or the new. `mode` is that of a new file (before the umask).
///
/// # Errors
/// Of any step, with the path in the text. The old content is still there, or the new is complete.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let beside = beside(path)?;
    let written = write_beside(&beside, bytes, mode).and_then(|()| rename(&beside, path));
    if written.is_err() {
        // Best effort: a left-over is overwritten next time.
        let _ = fs::remove_file(&beside);
    }
    written.map_err(|e| about("write", path, &e))
}

fn write_beside(beside: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(beside)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn beside(path: &Path) -> io::Result<PathBuf> {
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(".new");
    Ok(path.with_file_name(name))
}

/// Renames and syncs the directories of both names. The content of a file is the caller's to sync
/// before.
///
/// # Errors
/// Of the rename or of the sync after it.
#[allow(clippy::disallowed_methods)] // the one place that syncs the directories after it
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    let (old, new) = (directory(from), directory(to));
    sync_directory(new)?;
    if old == new { Ok(()) } else { sync_directory(old) }
}

/// Creates a directory with all parents that are missing, durably. `mode` is that of new ones.
/// One that exists is left as it is.
///
/// # Errors
/// Of any step, with the path in the text.
pub fn create_directory(path: &Path, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = directory(path);
    create_directory(parent, mode)?;
    match DirBuilder::new().mode(mode).create(path) {
        Ok(()) => {}
        // Another process was faster.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        Err(e) => return Err(about("create directory", path, &e)),
    }
    sync_directory(parent).map_err(|e| about("create directory", path, &e))
}

/// Removes a file, durably. One that does not exist is fine.
///
/// # Errors
/// Of any step, with the path in the text.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(about("remove", path, &e)),
    }
    sync_directory(directory(path)).map_err(|e| about("remove", path, &e))
}

/// Makes creations, renames and removals in a directory durable.
///
/// # Errors
/// When it cannot be opened or synced.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => Path::new("/"),
    }
}

fn about(action: &str, path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot {action} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_write_replaces_the_whole_content_and_leaves_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        write(&path, b"a longer first content", 0o600).unwrap();
        write(&path, b"second", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_keeps_the_old_content_and_names_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("occupied");
        fs::create_dir_all(path.join("inner")).unwrap();
        let error = write(&path, b"x", 0o600).unwrap_err();
        assert!(error.to_string().contains("occupied"));
        assert!(path.join("inner").is_dir());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn directories_are_made_with_parents_and_mode_and_may_exist() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/c");
        create_directory(&path, 0o700).unwrap();
        create_directory(&path, 0o700).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        fs::write(dir.path().join("file"), b"").unwrap();
        assert!(create_directory(&dir.path().join("file/x"), 0o700).is_err());
    }

    #[test]
    fn removing_twice_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, b"").unwrap();
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert!(!path.exists());
    }
}
