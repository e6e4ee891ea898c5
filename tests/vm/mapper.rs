//! A device-mapper device over a disk of the machine: ranges that fail, a disk that is slow,
//! and one that stands still.

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
        guest::load("dm_mod");
        let path = guest::disk(disk);
        let size = Path::new("/sys/class/block").join(path.file_name().expect("name"));
        let size = fs::read_to_string(size.join("size")).expect("size");
        let mapped = Self { name: disk, disk: path, sectors: size.trim().parse().expect("number") };
        run("dmsetup", &["create", mapped.name, "--table", &mapped.linear(0, mapped.sectors)]);
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
