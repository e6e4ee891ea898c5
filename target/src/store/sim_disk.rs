//! A disk in memory with the habits of real ones: for the simulator and for tests.
//!
//! Unsynced sectors survive a crash at random and in any order; names that were not synced vanish
//! or come back; a failed sync keeps half and forgets that the rest was not written; space ends;
//! bits rot. One seed decides everything.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use farshore_extent::Extent;

use super::disk::{Disk, DiskFile, FileKind, Stretch};
use super::segment::guard;

/// What survives or is lost as one.
const SECTOR: u64 = 512;

/// How often things fail, in thousandths of the operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SimFaults {
    /// Syncs and durable writes that fail.
    pub sync_fails: u32,
    /// Plain writes that fail.
    pub write_fails: u32,
    /// Reads that fail.
    pub read_fails: u32,
}

/// A simulated disk; clones are the same disk.
#[derive(Clone)]
pub struct SimDisk(Arc<Mutex<State>>);

#[derive(Default)]
struct File {
    /// What a crash leaves.
    durable: BTreeMap<u64, Vec<u8>>,
    durable_len: u64,
    /// Written and not durable; none is a hole.
    pending: BTreeMap<u64, Option<Vec<u8>>>,
    /// Seen by readers, but lost by a failed sync that called it clean.
    phantom: BTreeMap<u64, Option<Vec<u8>>>,
    len: u64,
}

enum DirOp {
    Add(String, usize),
    Remove(String),
    Rename(String, String),
}

struct State {
    files: Vec<File>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    dir_ops: Vec<DirOp>,
    random: u64,
    ops: u64,
    crash_at: Option<u64>,
    down: bool,
    boot: u64,
    locked: bool,
    capacity: Option<u64>,
    faults: SimFaults,
}

impl SimDisk {
    /// An empty disk whose faults follow from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            files: Vec::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            dir_ops: Vec::new(),
            random: seed,
            ops: 0,
            crash_at: None,
            down: false,
            boot: 0,
            locked: false,
            capacity: None,
            faults: SimFaults::default(),
        })))
    }

    /// Operations that changed something, so far.
    #[must_use]
    pub fn ops(&self) -> u64 {
        self.state().ops
    }

    /// The power goes when operation `op` (counted from 1) is under way.
    pub fn crash_at(&self, op: Option<u64>) {
        self.state().crash_at = op;
    }

    /// The power goes now: every call fails until [`Self::restart`].
    pub fn crash(&self) {
        self.state().down = true;
    }

    /// Whether the power is gone.
    #[must_use]
    pub fn is_down(&self) -> bool {
        self.state().down
    }

    /// The power is back. What was not durable is there or not, sector by sector, name by name.
    /// Files that were open before fail from now on.
    pub fn restart(&self) {
        let mut state = self.state();
        state.settle();
        state.boot += 1;
        state.down = false;
        state.locked = false;
        state.crash_at = None;
    }

    /// How often things fail from now on.
    pub fn set_faults(&self, faults: SimFaults) {
        self.state().faults = faults;
    }

    /// Most bytes that all files together may hold; none is no limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state().capacity = bytes;
    }

    /// Bytes that all files hold.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.state().used()
    }

    /// Turns bits of one byte on the medium; false when there is none.
    pub fn rot(&self, name: &str, at: u64, mask: u8) -> bool {
        let mut state = self.state();
        let Some(&file) = state.names.get(name) else { return false };
        let file = &mut state.files[file];
        let within = index(at % SECTOR);
        let places = [
            file.durable.get_mut(&(at / SECTOR)),
            file.pending.get_mut(&(at / SECTOR)).and_then(Option::as_mut),
        ];
        let mut found = false;
        for sector in places.into_iter().flatten() {
            sector[within] ^= mask;
            found = true;
        }
        found
    }

    /// All bytes of a file as a reader would see them now.
    #[must_use]
    pub fn contents(&self, name: &str) -> Option<Vec<u8>> {
        let state = self.state();
        let file = &state.files[*state.names.get(name)?];
        let mut out = vec![0; index(file.len)];
        file.read(&mut out, 0);
        Some(out)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        guard(&self.0)
    }

    fn handle(&self, file: usize, boot: u64) -> Arc<dyn DiskFile> {
        Arc::new(SimFile { disk: self.clone(), file, boot })
    }
}

impl State {
    /// splitmix64.
    fn roll(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn one_in(&mut self, thousandths: u32) -> bool {
        thousandths > 0 && self.roll() % 1000 < u64::from(thousandths)
    }

    /// Counts an operation; true when the power goes during it.
    fn begin(&mut self) -> io::Result<bool> {
        if self.down {
            return Err(io::Error::other("simulated power loss"));
        }
        self.ops += 1;
        self.down = self.crash_at.is_some_and(|at| self.ops >= at);
        Ok(self.down)
    }

    fn end(&self) -> io::Result<()> {
        if self.down { Err(io::Error::other("simulated power loss")) } else { Ok(()) }
    }

    fn used(&self) -> u64 {
        let sectors = |file: &usize| self.files[*file].allocated();
        self.names.values().map(sectors).sum::<u64>() * SECTOR
    }

    fn settle(&mut self) {
        for n in 0..self.files.len() {
            let pending = std::mem::take(&mut self.files[n].pending);
            for (sector, bytes) in pending {
                if self.roll() & 1 == 0 {
                    self.files[n].store(sector, bytes);
                }
            }
            let (len, durable_len) = (self.files[n].len, self.files[n].durable_len);
            if len != durable_len && self.roll() & 1 == 0 {
                self.files[n].durable_len = len;
            }
            let file = &mut self.files[n];
            file.phantom.clear();
            file.len = file.durable_len;
            let end = file.len.div_ceil(SECTOR);
            file.durable.retain(|sector, _| *sector < end);
        }
        for op in std::mem::take(&mut self.dir_ops) {
            if self.roll() & 1 == 0 {
                op.apply(&mut self.durable_names);
            }
        }
        self.names = self.durable_names.clone();
    }
}

impl DirOp {
    fn apply(self, names: &mut BTreeMap<String, usize>) {
        match self {
            Self::Add(name, file) => {
                names.insert(name, file);
            }
            Self::Remove(name) => {
                names.remove(&name);
            }
            Self::Rename(from, to) => {
                if let Some(file) = names.remove(&from) {
                    names.insert(to, file);
                }
            }
        }
    }
}

impl File {
    fn sector(&self, sector: u64) -> Option<&Vec<u8>> {
        for newer in [&self.pending, &self.phantom] {
            if let Some(bytes) = newer.get(&sector) {
                return bytes.as_ref();
            }
        }
        self.durable.get(&sector)
    }

    fn read(&self, out: &mut [u8], at: u64) {
        let mut done = 0;
        while done < out.len() {
            let place = at + done as u64;
            let within = index(place % SECTOR);
            let len = (index(SECTOR) - within).min(out.len() - done);
            let target = &mut out[done..done + len];
            match self.sector(place / SECTOR) {
                Some(bytes) => target.copy_from_slice(&bytes[within..within + len]),
                None => target.fill(0),
            }
            done += len;
        }
    }

    fn write(&mut self, data: &[u8], at: u64) {
        let mut done = 0;
        while done < data.len() {
            let place = at + done as u64;
            let within = index(place % SECTOR);
            let len = (index(SECTOR) - within).min(data.len() - done);
            let empty = || vec![0; index(SECTOR)];
            let mut sector = self.sector(place / SECTOR).cloned().unwrap_or_else(empty);
            sector[within..within + len].copy_from_slice(&data[done..done + len]);
            self.pending.insert(place / SECTOR, Some(sector));
            done += len;
        }
        self.len = self.len.max(at + data.len() as u64);
    }

    fn store(&mut self, sector: u64, bytes: Option<Vec<u8>>) {
        match bytes {
            Some(bytes) => self.durable.insert(sector, bytes),
            None => self.durable.remove(&sector),
        };
    }

    fn make_durable(&mut self, from: u64, to: u64) {
        let rest = self.pending.split_off(&from);
        let (mut now, mut later) = (rest, BTreeMap::new());
        if to < u64::MAX {
            later = now.split_off(&to);
        }
        self.pending.append(&mut later);
        for (sector, bytes) in now {
            self.phantom.remove(&sector);
            self.store(sector, bytes);
        }
        self.durable_len = self.len;
    }

    fn allocated(&self) -> u64 {
        let new = self.pending.iter().filter(|(s, b)| b.is_some() && !self.durable.contains_key(s));
        (self.durable.len() + new.count()) as u64
    }
}

impl Disk for SimDisk {
    fn lock(&self) -> io::Result<Box<dyn Send>> {
        let mut state = self.state();
        state.end()?;
        if state.locked {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "the simulated lock is held"));
        }
        state.locked = true;
        Ok(Box::new(Lock { disk: self.clone(), boot: state.boot }))
    }

    fn create(&self, name: &str, _kind: FileKind) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.state();
        state.begin()?;
        if state.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let file = state.files.len();
        state.files.push(File::default());
        state.names.insert(name.to_owned(), file);
        state.dir_ops.push(DirOp::Add(name.to_owned(), file));
        state.end()?;
        Ok(self.handle(file, state.boot))
    }

    fn open(&self, name: &str, kind: FileKind) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.state();
        state.end()?;
        let file = *state.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        if kind == FileKind::Journal {
            // As the real driver: what the cache shows and the medium lacks is dropped.
            state.files[file].phantom.clear();
        }
        Ok(self.handle(file, state.boot))
    }

    fn delete(&self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        state.begin()?;
        state.names.remove(name).ok_or(io::ErrorKind::NotFound)?;
        state.dir_ops.push(DirOp::Remove(name.to_owned()));
        state.end()
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state();
        state.begin()?;
        let file = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.to_owned(), file);
        state.dir_ops.push(DirOp::Rename(from.to_owned(), to.to_owned()));
        state.end()
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let state = self.state();
        state.end()?;
        Ok(state.names.keys().cloned().collect())
    }

    fn sync_dir(&self) -> io::Result<()> {
        let mut state = self.state();
        if state.begin()? {
            return state.end();
        }
        for op in std::mem::take(&mut state.dir_ops) {
            op.apply(&mut state.durable_names);
        }
        Ok(())
    }
}

struct Lock {
    disk: SimDisk,
    boot: u64,
}

impl Drop for Lock {
    fn drop(&mut self) {
        let mut state = self.disk.state();
        if state.boot == self.boot {
            state.locked = false;
        }
    }
}

struct SimFile {
    disk: SimDisk,
    file: usize,
    boot: u64,
}

impl SimFile {
    fn state(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.disk.state();
        if state.boot != self.boot {
            return Err(io::Error::other("file of an earlier life of the simulated machine"));
        }
        state.end()?;
        Ok(state)
    }

    fn write(&self, buf: &[u8], at: u64) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state()?;
        let thousandths = state.faults.write_fails;
        state.begin()?;
        if state.one_in(thousandths) {
            return Err(io::Error::other("simulated write error"));
        }
        if let Some(capacity) = state.capacity {
            let file = &state.files[self.file];
            let sectors = at / SECTOR..(at + buf.len() as u64).div_ceil(SECTOR);
            let new = sectors.filter(|s| file.sector(*s).is_none()).count() as u64 * SECTOR;
            if state.used() + new > capacity {
                return Err(io::ErrorKind::StorageFull.into());
            }
        }
        state.files[self.file].write(buf, at);
        state.end()?;
        Ok(state)
    }

    /// Half of what waits becomes durable, the rest is forgotten but still seen.
    fn fail_sync(state: &mut State, file: usize) -> io::Error {
        for (sector, bytes) in std::mem::take(&mut state.files[file].pending) {
            if state.roll() & 1 == 0 {
                state.files[file].store(sector, bytes);
            } else {
                state.files[file].phantom.insert(sector, bytes);
            }
        }
        io::Error::other("simulated sync error")
    }
}

impl DiskFile for SimFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state()?.files[self.file].len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.state()?;
        state.begin()?;
        let file = &mut state.files[self.file];
        let sectors: Vec<_> = file
            .durable
            .keys()
            .chain(file.pending.keys())
            .chain(file.phantom.keys())
            .copied()
            .collect();
        for sector in sectors.into_iter().filter(|s| *s >= len.div_ceil(SECTOR)) {
            file.pending.insert(sector, None);
        }
        file.len = len;
        state.end()
    }

    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        let mut state = self.state()?;
        let thousandths = state.faults.read_fails;
        if state.one_in(thousandths) {
            return Err(io::Error::other("simulated read error"));
        }
        let file = &state.files[self.file];
        if at + buf.len() as u64 > file.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        file.read(buf, at);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], at: u64) -> io::Result<()> {
        self.write(buf, at).map(drop)
    }

    fn write_durable(&self, buf: &[u8], at: u64) -> io::Result<()> {
        let mut state = self.write(buf, at)?;
        let thousandths = state.faults.sync_fails;
        if state.one_in(thousandths) {
            return Err(Self::fail_sync(&mut state, self.file));
        }
        let (from, to) = (at / SECTOR, (at + buf.len() as u64).div_ceil(SECTOR));
        state.files[self.file].make_durable(from, to);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.state()?;
        let thousandths = state.faults.sync_fails;
        if state.begin()? {
            return state.end();
        }
        if state.one_in(thousandths) {
            return Err(Self::fail_sync(&mut state, self.file));
        }
        state.files[self.file].make_durable(0, u64::MAX);
        Ok(())
    }

    fn punch(&self, extent: Extent) -> io::Result<()> {
        let mut state = self.state()?;
        state.begin()?;
        let file = &mut state.files[self.file];
        for sector in extent.offset() / SECTOR..extent.end().div_ceil(SECTOR) {
            file.pending.insert(sector, None);
        }
        state.end()
    }

    fn stretch(&self, extent: Extent) -> io::Result<Stretch> {
        let state = self.state()?;
        let file = &state.files[self.file];
        let hole = |at: u64| file.sector(at / SECTOR).is_none();
        let first = hole(extent.offset());
        let mut end = extent.offset();
        while end < extent.end() && hole(end) == first {
            end = (end / SECTOR + 1) * SECTOR;
        }
        Ok(Stretch { hole: first, end: end.min(extent.end()) })
    }
}

/// Simulated files are small.
fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
