//! A store's folder that is only looked at: nothing in it is ever written, made, removed or
//! renamed. What recovery wants to change (a super block mended, a torn tail cut) happens in
//! memory, so that opening runs through the very code of [`super::Store::open`], and is forgotten.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use farshore_extent::Extent;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::disk::{ALIGN, Disk, DiskFile, FileKind, Stretch};
use super::durable_fs;
use super::segment::guard;

const PAGE: u64 = ALIGN as u64;

/// One directory of the file system, and what was changed in memory.
#[derive(Debug, Clone)]
pub struct ReadOnlyDisk {
    dir: PathBuf,
    changed: Arc<Mutex<BTreeMap<String, Entry>>>,
}

/// What a changed name stands for.
#[derive(Debug, Clone)]
enum Entry {
    Gone,
    There { below: Option<PathBuf>, changes: Arc<Mutex<Changes>> },
}

/// What was written to a file.
#[derive(Debug, Default)]
struct Changes {
    len: Option<u64>,
    /// Bytes of the file below that count; none: all.
    below: Option<u64>,
    /// By page number; none is a page of zeroes.
    pages: BTreeMap<u64, Option<Vec<u8>>>,
}

impl ReadOnlyDisk {
    /// The directory `dir`, which must exist.
    ///
    /// # Errors
    /// As they come.
    pub fn open(dir: impl Into<PathBuf>) -> io::Result<Self> {
        let dir = dir.into();
        std::fs::read_dir(&dir)?;
        Ok(Self { dir, changed: Arc::default() })
    }

    fn entry(&self, name: &str) -> io::Result<(Option<PathBuf>, Arc<Mutex<Changes>>)> {
        let mut changed = guard(&self.changed);
        match changed.get(name) {
            Some(Entry::Gone) => Err(io::ErrorKind::NotFound.into()),
            Some(Entry::There { below, changes }) => Ok((below.clone(), Arc::clone(changes))),
            None => {
                let below = Some(self.dir.join(name)).filter(|path| path.exists());
                let below = below.ok_or(io::ErrorKind::NotFound)?;
                let changes = Arc::default();
                let there =
                    Entry::There { below: Some(below.clone()), changes: Arc::clone(&changes) };
                changed.insert(name.to_owned(), there);
                Ok((Some(below), changes))
            }
        }
    }

    fn shadow(below: Option<&Path>, changes: Arc<Mutex<Changes>>) -> io::Result<Arc<dyn DiskFile>> {
        let below = below.map(File::open).transpose()?;
        Ok(Arc::new(Shadow { below, changes }))
    }
}

impl Disk for ReadOnlyDisk {
    /// Shared, so that several may look at once and no daemon begins to write meanwhile. A folder
    /// without a lock file (a copy of a store) cannot be in use.
    fn lock(&self) -> io::Result<Box<dyn Send>> {
        let path = self.dir.join(durable_fs::LOCK);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Box::new(())),
            Err(e) => return Err(e),
        };
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(held) => Ok(Box::new(held)),
            Err((file, Errno::EAGAIN)) => Err(durable_fs::held(&path, &file)),
            Err((_, errno)) => Err(errno.into()),
        }
    }

    fn create(&self, name: &str, _: FileKind) -> io::Result<Arc<dyn DiskFile>> {
        if self.entry(name).is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let changes = Arc::new(Mutex::new(Changes { len: Some(0), ..Changes::default() }));
        let there = Entry::There { below: None, changes: Arc::clone(&changes) };
        guard(&self.changed).insert(name.to_owned(), there);
        Self::shadow(None, changes)
    }

    fn open(&self, name: &str, _: FileKind) -> io::Result<Arc<dyn DiskFile>> {
        let (below, changes) = self.entry(name)?;
        Self::shadow(below.as_deref(), changes)
    }

    fn delete(&self, name: &str) -> io::Result<()> {
        self.entry(name)?;
        guard(&self.changed).insert(name.to_owned(), Entry::Gone);
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (below, changes) = self.entry(from)?;
        let mut changed = guard(&self.changed);
        changed.insert(to.to_owned(), Entry::There { below, changes });
        changed.insert(from.to_owned(), Entry::Gone);
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let below = std::fs::read_dir(&self.dir)?
            .map(|entry| entry.map(|e| (e.file_name().to_string_lossy().into_owned(), true)));
        let mut names = below.collect::<io::Result<BTreeMap<_, _>>>()?;
        for (name, entry) in guard(&self.changed).iter() {
            names.insert(name.clone(), !matches!(entry, Entry::Gone));
        }
        Ok(names.into_iter().filter_map(|(name, there)| there.then_some(name)).collect())
    }

    fn sync_dir(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A file, read below and written in memory.
struct Shadow {
    below: Option<File>,
    changes: Arc<Mutex<Changes>>,
}

impl Shadow {
    fn length(&self, changes: &Changes) -> io::Result<u64> {
        match (changes.len, &self.below) {
            (Some(len), _) => Ok(len),
            (None, Some(file)) => Ok(file.metadata()?.len()),
            (None, None) => Ok(0),
        }
    }

    /// Fills `buf` as far as the file below reaches; zeroes behind it.
    fn read_below(&self, changes: &Changes, buf: &mut [u8], at: u64) -> io::Result<()> {
        let counts = changes.below.unwrap_or(u64::MAX).saturating_sub(at);
        let wanted = index(counts).min(buf.len());
        let mut done = 0;
        while let Some(file) = self.below.as_ref().filter(|_| done < wanted) {
            match file.read_at(&mut buf[done..wanted], at + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        buf[done..].fill(0);
        Ok(())
    }

    fn read(&self, changes: &Changes, buf: &mut [u8], at: u64) -> io::Result<()> {
        let end = at + buf.len() as u64;
        if end > self.length(changes)? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.read_below(changes, buf, at)?;
        for (page, content) in changes.pages.range(at / PAGE..end.div_ceil(PAGE)) {
            let (from, to) = ((page * PAGE).max(at), ((page + 1) * PAGE).min(end));
            let out = &mut buf[index(from - at)..index(to - at)];
            match content {
                None => out.fill(0),
                Some(bytes) => {
                    out.copy_from_slice(&bytes[index(from % PAGE)..][..index(to - from)]);
                }
            }
        }
        Ok(())
    }

    /// `None` writes zeroes.
    fn change(&self, data: Option<&[u8]>, extent: Extent) -> io::Result<()> {
        let changes = &mut *guard(&self.changes);
        changes.len = Some(self.length(changes)?.max(extent.end()));
        for piece in extent.split_at_multiples_of(PAGE) {
            let page = piece.offset() / PAGE;
            let data = data.map(|d| &d[index(piece.offset() - extent.offset())..]);
            let data = data.map(|d| &d[..index(piece.len())]);
            let zero = data.is_none_or(|d| d.iter().all(|byte| *byte == 0));
            if zero && piece.len() == PAGE {
                changes.pages.insert(page, None);
                continue;
            }
            let mut bytes = vec![0; ALIGN];
            let there = self.length(changes)?.saturating_sub(page * PAGE).min(PAGE);
            self.read(changes, &mut bytes[..index(there)], page * PAGE)?;
            let out = &mut bytes[index(piece.offset() % PAGE)..][..index(piece.len())];
            match data {
                Some(data) => out.copy_from_slice(data),
                None => out.fill(0),
            }
            changes.pages.insert(page, Some(bytes));
        }
        Ok(())
    }
}

impl DiskFile for Shadow {
    fn len(&self) -> io::Result<u64> {
        self.length(&guard(&self.changes))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        // What is cut off and comes back reads as zero.
        if let Some(page) = Extent::between(len, self.len()?.min(len.next_multiple_of(PAGE))) {
            self.change(None, page)?;
        }
        let changes = &mut *guard(&self.changes);
        changes.pages.split_off(&len.div_ceil(PAGE));
        changes.below = Some(changes.below.unwrap_or(u64::MAX).min(len));
        changes.len = Some(len);
        Ok(())
    }

    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        self.read(&guard(&self.changes), buf, at)
    }

    fn write_at(&self, buf: &[u8], at: u64) -> io::Result<()> {
        let extent = Extent::between(at, at + buf.len() as u64);
        extent.map_or(Ok(()), |extent| self.change(Some(buf), extent))
    }

    fn write_durable(&self, buf: &[u8], at: u64) -> io::Result<()> {
        self.write_at(buf, at)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, extent: Extent) -> io::Result<()> {
        self.change(None, extent)
    }

    fn stretch(&self, extent: Extent) -> io::Result<Stretch> {
        let changes = guard(&self.changes);
        match &self.below {
            Some(file) if changes.pages.is_empty() && changes.len.is_none() => {
                durable_fs::stretch(file, extent)
            }
            _ => Ok(Stretch { hole: false, end: extent.end() }),
        }
    }
}

/// Offsets within a buffer.
fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// Whether two paths are the same file or directory.
pub(crate) fn same_file(a: &Path, b: &Path) -> bool {
    let id = |path: &Path| std::fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    id(a).is_some() && id(a) == id(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(file: &dyn DiskFile) -> Vec<u8> {
        let mut bytes = vec![0; index(file.len().unwrap())];
        file.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn what_is_changed_is_seen_here_and_never_on_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let before: Vec<u8> = (0..10_000u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
        std::fs::write(dir.path().join("a"), &before).unwrap();
        std::fs::write(dir.path().join("b"), b"other").unwrap();
        let disk = ReadOnlyDisk::open(dir.path()).unwrap();
        let open = |name: &str| disk.open(name, FileKind::Plain);

        let a = open("a").unwrap();
        assert_eq!(bytes_of(a.as_ref()), before);
        let mut model = before.clone();
        a.write_at(&[7; 300], 4000).unwrap();
        model[4000..4300].fill(7);
        a.write_at(&[0; 8192], 0).unwrap();
        model[..8192].fill(0);
        a.write_durable(&[9; 100], 9_950).unwrap();
        model.resize(10_050, 0);
        model[9_950..].fill(9);
        assert_eq!(bytes_of(a.as_ref()), model);
        assert_eq!(bytes_of(open("a").unwrap().as_ref()), model, "another opening sees it, too");
        a.set_len(5_000).unwrap();
        a.set_len(6_000).unwrap();
        model.truncate(5_000);
        model.resize(6_000, 0);
        assert_eq!(bytes_of(a.as_ref()), model);
        assert!(a.read_at(&mut [0; 8], 5_996).is_err());

        disk.rename("a", "lost-a").unwrap();
        disk.delete("b").unwrap();
        disk.create("c", FileKind::Plain).unwrap().write_at(b"new", 0).unwrap();
        assert_eq!(disk.list().unwrap(), ["c", "lost-a"]);
        assert!(open("a").is_err() && open("b").is_err());
        assert_eq!(bytes_of(open("lost-a").unwrap().as_ref()), model);
        assert_eq!(bytes_of(open("c").unwrap().as_ref()), b"new");
        assert!(disk.create("c", FileKind::Plain).is_err());

        assert_eq!(std::fs::read(dir.path().join("a")).unwrap(), before);
        assert_eq!(std::fs::read(dir.path().join("b")).unwrap(), b"other");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn several_may_look_at_once_but_not_while_a_daemon_has_the_store() {
        let dir = tempfile::tempdir().unwrap();
        let looking = ReadOnlyDisk::open(dir.path()).unwrap();
        assert!(looking.lock().is_ok(), "no lock file: nobody can have it");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let daemon = super::super::FileDisk::open(dir.path()).unwrap();
        let held = daemon.lock().unwrap();
        let refused = looking.lock().map(drop).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        assert!(refused.to_string().contains(&format!("pid {}", std::process::id())));
        drop(held);
        let _one = looking.lock().unwrap();
        let _two = looking.lock().unwrap();
        assert!(daemon.lock().is_err(), "nobody writes what is being looked at");
    }
}
