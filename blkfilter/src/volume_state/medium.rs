//! Where the state of a volume lies.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::durable_fs;

/// The two files of a volume's state.
pub trait Medium {
    /// The state file; empty when there is none.
    ///
    /// # Errors
    /// Of the medium.
    fn read(&self) -> io::Result<Vec<u8>>;

    /// Writes to the state file. Durable only after [`Self::sync`]; until then any part of it,
    /// by sectors of 512 bytes, may be on the medium.
    ///
    /// # Errors
    /// Of the medium; then nothing is known about the bytes.
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes everything written durable.
    ///
    /// # Errors
    /// Of the medium; then nothing is known about what was written since the last success.
    fn sync(&mut self) -> io::Result<()>;

    /// The file of ranges, if there is one.
    ///
    /// # Errors
    /// Of the medium.
    fn read_ranges(&self) -> io::Result<Vec<u8>>;

    /// Replaces the file of ranges, durably and all or nothing.
    ///
    /// # Errors
    /// Of the medium.
    fn write_ranges(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// A medium in a directory: `ID.state` and `ID.ranges`.
#[derive(Debug)]
pub struct FileMedium {
    state: PathBuf,
    ranges: PathBuf,
    /// Opened when first written to.
    file: Option<File>,
}

impl FileMedium {
    /// The files with this stem in `directory`. Nothing is opened or made yet.
    #[must_use]
    pub fn new(directory: &Path, stem: &str) -> Self {
        let named = |end: &str| directory.join(format!("{stem}.{end}"));
        Self { state: named("state"), ranges: named("ranges"), file: None }
    }

    /// Removes both files, durably.
    ///
    /// # Errors
    /// Of the file system.
    pub fn remove(directory: &Path, stem: &str) -> io::Result<()> {
        let medium = Self::new(directory, stem);
        durable_fs::remove(&medium.state).and(durable_fs::remove(&medium.ranges))
    }

    fn open(&mut self) -> io::Result<&File> {
        if self.file.is_none() {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let file = options.open(&self.state)?;
            if let Some(directory) = self.state.parent() {
                durable_fs::sync_directory(directory)?;
            }
            self.file = Some(file);
        }
        self.file.as_ref().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

fn read_or_empty(path: &Path) -> io::Result<Vec<u8>> {
    match std::fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other,
    }
}

impl Medium for FileMedium {
    fn read(&self) -> io::Result<Vec<u8>> {
        read_or_empty(&self.state)
    }

    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.open()?.write_all_at(bytes, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.open()?.sync_data()
    }

    fn read_ranges(&self) -> io::Result<Vec<u8>> {
        read_or_empty(&self.ranges)
    }

    fn write_ranges(&mut self, bytes: &[u8]) -> io::Result<()> {
        durable_fs::write(&self.ranges, bytes, 0o600)
    }
}
