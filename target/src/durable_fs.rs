//! Small files that must survive a power cut: written aside, synced, renamed, directory synced.
//!
//! The only place of the daemon that renames. Owns no names of files.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Makes a directory (and those above it) that only the owner can enter, durably.
///
/// # Errors
/// Of the file system.
pub fn create_private_dir(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(above) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        if !above.is_dir() {
            create_private_dir(above)?;
        }
        match std::fs::DirBuilder::new().mode(0o700).create(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            other => other?,
        }
        return sync_dir(above);
    }
    std::fs::DirBuilder::new().mode(0o700).create(path)
}

/// Syncs a directory: names made or removed in it are durable afterwards.
///
/// # Errors
/// Of the file system.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Makes a file that only the owner can read.
///
/// # Errors
/// Of the file system.
pub fn create_private(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Gives a synced file another name, durably; one that has it is replaced.
///
/// # Errors
/// Of the file system.
#[allow(clippy::disallowed_methods)] // this is the durable rename
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::rename(from, to)?;
    let dirs = [to.parent(), from.parent().filter(|dir| to.parent() != Some(dir))];
    dirs.into_iter().flatten().try_for_each(sync_dir)
}

/// Replaces the file with `bytes`, readable as `mode` says. After a crash it is the old file or
/// the new one, never a mix.
///
/// # Errors
/// Of the file system; the old file is then still there.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = dir.join(format!(".{name}.new"));
    match std::fs::remove_file(&aside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&aside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    rename(&aside, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_replaced_file_has_the_new_bytes_and_the_asked_mode() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        create_private_dir(&deep).unwrap();
        create_private_dir(&deep).unwrap();
        let path = deep.join("key");
        replace(&path, b"one", 0o600).unwrap();
        replace(&path, b"two", 0o600).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(&deep).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(std::fs::read_dir(&deep).unwrap().count(), 1);
    }
}
