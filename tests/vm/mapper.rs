//! A device-mapper device over a disk of the machine: ranges that fail, a disk that is slow,
//! one that stands still, one whose writes are written down, and one whose changes are thrown away.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::guest;
use crate::harness::run;

/// Gone when dropped.
pub struct Mapped {
    name: &'static str,
    disk: PathBuf,
    sectors: u64,
}

impl Mapped {
    /// Passes everything on to the disk of this name.
    pub fn new(disk: &'static str) -> Self {
        Self::of(disk, |mapped| mapped.linear(0, mapped.sectors))
    }

    /// The same, and everything that is written, and when it was flushed, is written to `log` as well.
    pub fn logged(disk: &'static str, log: &Path) -> Self {
        guest::load("dm_log_writes");
        let table = |mapped: &Self| {
            let (disk, log) = (mapped.disk.display(), log.display());
            format!("0 {} log-writes {disk} {log}\n", mapped.sectors)
        };
        Self::of(disk, table)
    }

    /// Puts a text between the writes in the log.
    pub fn mark(&self, text: &str) {
        run("dmsetup", &["message", self.name, "0", "mark", text]);
    }

    /// A disk with the content of that one; what is written to it goes to `changes` and is gone with it.
    pub fn snapshot(disk: &'static str, changes: &Path) -> Self {
        guest::load("dm_snapshot");
        let table = |mapped: &Self| {
            let (disk, changes) = (mapped.disk.display(), changes.display());
            format!("0 {} snapshot {disk} {changes} N 8\n", mapped.sectors)
        };
        Self::of(disk, table)
    }

    fn of(disk: &'static str, table: impl FnOnce(&Self) -> String) -> Self {
        guest::load("dm_mod");
        let path = guest::disk(disk);
        let size = Path::new("/sys/class/block").join(path.file_name().expect("name"));
        let size = fs::read_to_string(size.join("size")).expect("size");
        let mapped = Self { name: disk, disk: path, sectors: size.trim().parse().expect("number") };
        run("dmsetup", &["create", mapped.name, "--table", table(&mapped).trim_end()]);
        run("dmsetup", &["mknodes"]);
        mapped
    }

    pub fn path(&self) -> PathBuf {
        fs::canonicalize(Path::new("/dev/mapper").join(self.name)).expect("its node")
    }

    fn linear(&self, from: u64, to: u64) -> String {
        format!("{from} {} linear {} {from}\n", to - from, self.disk.display())
    }

    /// Reads and writes of these sectors fail from the next [`Self::resume`] on.
    pub fn fail(&self, sectors: std::ops::Range<u64>) {
        let error = format!("{} {} error\n", sectors.start, sectors.end - sectors.start);
        let parts = [
            (sectors.start > 0).then(|| self.linear(0, sectors.start)),
            Some(error),
            (sectors.end < self.sectors).then(|| self.linear(sectors.end, self.sectors)),
        ];
        self.table(&parts.into_iter().flatten().collect::<String>());
    }

    /// All of it works from the next [`Self::resume`] on.
    pub fn mend(&self) {
        self.table(&self.linear(0, self.sectors));
    }

    /// From now on reads and writes take so much longer.
    pub fn delay(&self, reads_ms: u32, writes_ms: u32) {
        guest::load("dm_delay");
        let disk = self.disk.display();
        let both = format!("{disk} 0 {reads_ms} {disk} 0 {writes_ms}");
        self.table(&format!("0 {} delay {both}\n", self.sectors));
        self.resume();
    }

    fn table(&self, table: &str) {
        let file = Path::new("/tmp").join(format!("{}.table", self.name));
        fs::write(&file, table).expect("table");
        run("dmsetup", &["reload", self.name, file.to_str().expect("UTF-8")]);
    }

    /// Every request waits from now on.
    pub fn suspend(&self) {
        run("dmsetup", &["suspend", "--nolockfs", "--noflush", self.name]);
    }

    pub fn resume(&self) {
        run("dmsetup", &["resume", self.name]);
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // Of a case that has failed its machine is thrown away.
        Command::new("dmsetup").args(["resume", self.name]).status().ok();
        Command::new("dmsetup").args(["remove", "--retry", self.name]).status().ok();
    }
}
