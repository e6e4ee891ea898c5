//! The seam between the spool and its medium: segment files of one folder, synchronous calls.
//!
//! [`FolderDisk`] is the real one; the simulator brings one that loses power.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use farshore_changelog::SegmentId;

use crate::durable_fs;

/// Segment files of one volume's spool. *Written* means that the call returned; *durable* means
/// that it would survive a power cut.
pub trait SpoolDisk: Send {
    /// The numbers of all segments, ascending.
    ///
    /// # Errors
    /// As they come, here and below.
    fn list(&self) -> io::Result<Vec<SegmentId>>;

    /// Makes an empty segment. Its name is durable after [`Self::sync`] of the same segment.
    ///
    /// # Errors
    /// `AlreadyExists`; others as they come.
    fn create(&mut self, id: SegmentId) -> io::Result<()>;

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// The range may then hold old, new or mixed bytes.
    fn write_at(&mut self, id: SegmentId, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// Reads at most `buf.len()` bytes; fewer only at the end of the file.
    ///
    /// # Errors
    /// As they come.
    fn read_at(&mut self, id: SegmentId, at: u64, buf: &mut [u8]) -> io::Result<usize>;

    /// Makes the content of a segment and its name durable.
    ///
    /// # Errors
    /// What was written since the last success may be lost, and trying again proves nothing.
    fn sync(&mut self, id: SegmentId) -> io::Result<()>;

    /// Removes a segment. It may come back after a power cut.
    ///
    /// # Errors
    /// As they come.
    fn delete(&mut self, id: SegmentId) -> io::Result<()>;

    /// Gives segment `by`, which is synced, the place and the name of segment `id`. Atomic, and
    /// durable when it returns.
    ///
    /// # Errors
    /// Either of the two may then be there.
    fn replace(&mut self, by: SegmentId, id: SegmentId) -> io::Result<()>;

    /// Notes that segments up to `id` may have been sent. Durable when it returns.
    ///
    /// # Errors
    /// As they come.
    fn note_sent(&mut self, id: SegmentId) -> io::Result<()>;

    /// What was noted last.
    ///
    /// # Errors
    /// As they come.
    fn sent(&self) -> io::Result<Option<SegmentId>>;

    /// Bytes of a segment.
    ///
    /// # Errors
    /// As they come.
    fn len(&mut self, id: SegmentId) -> io::Result<u64>;
}

/// A folder of the file system.
#[derive(Debug)]
pub struct FolderDisk {
    dir: PathBuf,
    /// The files used last: one that is written, one that is read, two that are merged.
    open: Vec<(SegmentId, File)>,
}

impl FolderDisk {
    /// The folder `dir`, made when it is missing.
    ///
    /// # Errors
    /// Of the file system.
    pub fn new(dir: &Path) -> io::Result<Self> {
        durable_fs::create_private_dir(dir)?;
        Ok(Self { dir: dir.to_owned(), open: Vec::new() })
    }

    fn path(&self, id: SegmentId) -> PathBuf {
        self.dir.join(format!("seg-{id}"))
    }

    /// The numbers behind this prefix, ascending.
    fn numbers(&self, prefix: &str) -> io::Result<Vec<SegmentId>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let digits = name.to_str().and_then(|n| n.strip_prefix(prefix));
            let number = digits.filter(|d| d.len() == 16);
            found.extend(number.and_then(|d| u64::from_str_radix(d, 16).ok()).map(SegmentId::new));
        }
        found.sort_unstable();
        Ok(found)
    }

    fn note(&self, id: SegmentId) -> PathBuf {
        self.dir.join(format!("sent-{id}"))
    }

    fn file(&mut self, id: SegmentId) -> io::Result<&File> {
        if let Some(at) = self.open.iter().position(|(open, _)| *open == id) {
            return Ok(&self.open[at].1);
        }
        let file = OpenOptions::new().read(true).write(true).open(self.path(id))?;
        Ok(self.keep(id, file))
    }

    fn keep(&mut self, id: SegmentId, file: File) -> &File {
        if self.open.len() >= 4 {
            self.open.remove(0);
        }
        self.open.push((id, file));
        &self.open[self.open.len() - 1].1
    }
}

impl SpoolDisk for FolderDisk {
    fn list(&self) -> io::Result<Vec<SegmentId>> {
        self.numbers("seg-")
    }

    fn create(&mut self, id: SegmentId) -> io::Result<()> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(self.path(id))?;
        self.keep(id, file);
        Ok(())
    }

    fn write_at(&mut self, id: SegmentId, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.file(id)?.write_all_at(bytes, at)
    }

    fn read_at(&mut self, id: SegmentId, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        let file = self.file(id)?;
        let mut read = 0;
        while read < buf.len() {
            match file.read_at(&mut buf[read..], at + read as u64) {
                Ok(0) => break,
                Ok(n) => read += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(read)
    }

    fn sync(&mut self, id: SegmentId) -> io::Result<()> {
        self.file(id)?.sync_data()?;
        File::open(&self.dir)?.sync_all()
    }

    fn delete(&mut self, id: SegmentId) -> io::Result<()> {
        self.open.retain(|(open, _)| *open != id);
        std::fs::remove_file(self.path(id))
    }

    fn replace(&mut self, by: SegmentId, id: SegmentId) -> io::Result<()> {
        self.open.retain(|(open, _)| *open != by && *open != id);
        durable_fs::put_in_place(&self.path(by), &self.path(id))
    }

    fn note_sent(&mut self, id: SegmentId) -> io::Result<()> {
        let older = self.numbers("sent-")?;
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.note(id))?;
        File::open(&self.dir)?.sync_all()?;
        older
            .into_iter()
            .filter(|old| *old < id)
            .try_for_each(|old| std::fs::remove_file(self.note(old)))
    }

    fn sent(&self) -> io::Result<Option<SegmentId>> {
        Ok(self.numbers("sent-")?.pop())
    }

    fn len(&mut self, id: SegmentId) -> io::Result<u64> {
        Ok(self.file(id)?.metadata()?.len())
    }
}
