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

    /// Notes elsewhere, for when the state file cannot be written, that it is not to be believed. The
    /// note lasts until the next boot at least.
    ///
    /// # Errors
    /// When it cannot be noted.
    fn doubt(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Whether that was noted; also when nobody can tell.
    fn is_doubted(&self) -> bool {
        false
    }

    /// The state file can be believed again: the note goes away, as soon as it can.
    fn trust(&mut self) {}
}

/// A medium in a directory: `ID.state` and `ID.ranges`.
#[derive(Debug)]
pub struct FileMedium {
    state: PathBuf,
    ranges: PathBuf,
    /// Is there when the state file is in doubt.
    note: Option<PathBuf>,
    /// Opened when first written to.
    file: Option<File>,
}

impl FileMedium {
    /// The files with this stem in `directory`. Nothing is opened or made yet.
    #[must_use]
    pub fn new(directory: &Path, stem: &str) -> Self {
        let named = |end: &str| directory.join(format!("{stem}.{end}"));
        Self { state: named("state"), ranges: named("ranges"), note: None, file: None }
    }

    /// The same, with a note in `directory`, which is on another file system: at best in memory.
    #[must_use]
    pub fn with_note(self, directory: &Path) -> Self {
        let stem = self.state.file_stem().unwrap_or_default();
        let note = Some(directory.join(stem).with_extension("doubted"));
        Self { note, ..self }
    }

    /// Removes both files, durably, and the note.
    ///
    /// # Errors
    /// Of the file system.
    pub fn remove(mut self) -> io::Result<()> {
        self.trust();
        durable_fs::remove(&self.state).and(durable_fs::remove(&self.ranges))
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

    fn doubt(&mut self) -> io::Result<()> {
        let note = self.note.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        durable_fs::write(note, b"", 0o600)
    }

    fn is_doubted(&self) -> bool {
        self.note.as_ref().is_some_and(|note| note.try_exists().unwrap_or(true))
    }

    fn trust(&mut self) {
        // A note that stays has the next start compare too much.
        self.note.as_ref().and_then(|note| std::fs::remove_file(note).ok());
    }
}
