//! Files that survive power loss; the only place that renames.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Creates `dir` and its missing parents, for the owner only.
///
/// # Errors
/// Of the file system.
pub fn create_private_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// Makes `path` hold exactly `bytes`: readers and a crash see the old content or the new. Written
/// beside it, synced, renamed, and the directory synced; `mode` is that of the new file.
///
/// # Errors
/// Of any step; the old content is then still there, or the new is complete.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(".new");
    let beside = path.with_file_name(name);
    // A left-over of a crash may have another mode.
    match std::fs::remove_file(&beside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    put_in_place(&beside, path)
}

/// Gives `beside`, which is durable and in the same directory, the name `path`: a crash leaves the
/// file that had it, or this one.
///
/// # Errors
/// Of either step; which of the two is there is then not known.
#[allow(clippy::disallowed_methods)] // the one place that syncs the directory after it
pub fn put_in_place(beside: &Path, path: &Path) -> io::Result<()> {
    std::fs::rename(beside, path)?;
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(dir)?.sync_all()
}
