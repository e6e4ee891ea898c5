//! The medium of the agent's spool: a simulated disk that loses power, fails syncs and keeps what
//! was not synced or not, and a record of what would not survive.

use std::io;
use std::sync::{Arc, Mutex};

use farshore_agent::spool::SpoolDisk;
use farshore_changelog::{BatchHeader, SegmentHeader, SegmentId};
use farshore_extent::Lsn;
use farshore_target::store::{Disk, FileKind, SimDisk, SimFaults};

use crate::rng::Rng;

/// Of one volume; clones are the same disk.
#[derive(Clone)]
pub struct SimSpool {
    disk: SimDisk,
    /// Last places of the batches written since the last sync, of any segment.
    unsynced: Arc<Mutex<Vec<Lsn>>>,
    /// The segment being written is another one, merged: what it holds is there already.
    merging: Arc<Mutex<Option<SegmentId>>>,
    /// Last place of the newest batch ever written.
    newest: Arc<Mutex<Option<Lsn>>>,
}

impl SimSpool {
    pub fn new(rng: &mut Rng, faulty: bool) -> Self {
        let disk = SimDisk::new(rng.below(u64::MAX));
        if faulty {
            disk.set_faults(SimFaults { sync_fails: 60, write_fails: 20, read_fails: 0 });
        }
        Self { disk, unsynced: Arc::default(), merging: Arc::default(), newest: Arc::default() }
    }

    /// Whether a power cut now could take what lies at or before `place`.
    pub fn could_lose(&self, place: Lsn) -> bool {
        self.unsynced.lock().expect("no panic inside").iter().any(|unsynced| *unsynced <= place)
    }

    /// Whether this batch was ever written here.
    pub fn holds(&self, header: &BatchHeader) -> bool {
        self.newest.lock().expect("no panic inside").is_some_and(|newest| header.last() <= newest)
    }

    /// The power goes within the next operations.
    pub fn arm(&self, rng: &mut Rng) {
        self.disk.crash_at(Some(self.disk.ops() + 1 + rng.below(12)));
    }

    pub fn is_down(&self) -> bool {
        self.disk.is_down()
    }

    pub fn power_cycle(&self) {
        self.disk.crash();
        self.disk.restart();
        self.unsynced.lock().expect("no panic inside").clear();
        *self.merging.lock().expect("no panic inside") = None;
    }

    pub fn heal(&self) {
        self.disk.set_faults(SimFaults::default());
        self.disk.crash_at(None);
    }
}

fn name(id: SegmentId) -> String {
    format!("seg-{id}")
}

impl SpoolDisk for SimSpool {
    fn list(&self) -> io::Result<Vec<SegmentId>> {
        let number = |name: &String| u64::from_str_radix(name.strip_prefix("seg-")?, 16).ok();
        Ok(self.disk.list()?.iter().filter_map(number).map(SegmentId::new).collect())
    }

    fn create(&mut self, id: SegmentId) -> io::Result<()> {
        self.disk.create(&name(id), FileKind::Plain).map(drop)
    }

    fn write_at(&mut self, id: SegmentId, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut merging = self.merging.lock().expect("no panic inside");
        if SegmentHeader::parse(bytes).is_ok_and(|header| header.segment != id) {
            *merging = Some(id);
        } else if let (Ok(header), true) = (BatchHeader::parse(bytes), *merging != Some(id)) {
            self.unsynced.lock().expect("no panic inside").push(header.last());
            *self.newest.lock().expect("no panic inside") = Some(header.last());
        }
        self.disk.open(&name(id), FileKind::Plain)?.write_at(bytes, at)
    }

    fn read_at(&mut self, id: SegmentId, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        let file = self.disk.open(&name(id), FileKind::Plain)?;
        let there = file.len()?.saturating_sub(at).min(buf.len() as u64);
        let there = usize::try_from(there).expect("at most the buffer");
        file.read_at(&mut buf[..there], at)?;
        Ok(there)
    }

    fn sync(&mut self, id: SegmentId) -> io::Result<()> {
        self.disk.open(&name(id), FileKind::Plain)?.sync()?;
        self.disk.sync_dir()?;
        if *self.merging.lock().expect("no panic inside") != Some(id) {
            self.unsynced.lock().expect("no panic inside").clear();
        }
        Ok(())
    }

    fn delete(&mut self, id: SegmentId) -> io::Result<()> {
        self.disk.delete(&name(id))
    }

    fn replace(&mut self, by: SegmentId, id: SegmentId) -> io::Result<()> {
        self.disk.rename(&name(by), &name(id))?;
        self.disk.sync_dir()
    }

    fn note_sent(&mut self, id: SegmentId) -> io::Result<()> {
        match self.disk.create(&format!("sent-{id}"), FileKind::Plain) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
            _ => self.disk.sync_dir(),
        }
    }

    fn sent(&self) -> io::Result<Option<SegmentId>> {
        let number = |name: &String| u64::from_str_radix(name.strip_prefix("sent-")?, 16).ok();
        Ok(self.disk.list()?.iter().filter_map(number).map(SegmentId::new).max())
    }

    fn len(&mut self, id: SegmentId) -> io::Result<u64> {
        self.disk.open(&name(id), FileKind::Plain)?.len()
    }
}
