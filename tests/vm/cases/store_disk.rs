//! The disk under the target's store: at every moment of which it has told that all is durable, the
//! store on it opens and its points are right; and when it fails, the source does not notice, and
//! nothing that it had acknowledged is lost.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use farshore_protocol::admin::PointChoice;

use crate::harness::load::Load;
use crate::harness::{Site, chance, farshore_bin, run, said, wait_for};
use crate::image::Disk;
use crate::mapper::Mapped;
use crate::{Group, case_list, guest};

pub const GROUP: Group = Group {
    name: "store_disk",
    disks: &[
        Disk::new("data", DATA_MIB),
        Disk::new("log", 3072),
        Disk::new("replay", DATA_MIB),
        Disk::new("changes", 256),
    ],
    limit: Duration::from_secs(600),
    cases: case_list![
        at_every_flush_of_the_targets_disk_the_store_opens_and_its_points_are_right,
        a_target_whose_disk_fails_says_so_and_goes_on_where_it_was_when_it_is_mended,
    ],
    ..Group::DEFAULT
};

const DATA_MIB: u64 = 512;
const SIZE: u64 = 16 << 20;
/// Points whose content is written down while the load runs.
const MARKS: usize = 6;
/// Flushes that are looked at besides.
const FLUSHES: u64 = 10;
const LIMIT: Duration = Duration::from_secs(120);

/// A file system on the target's disk, mounted as its data directory; unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(device: &Path, at: &Path) -> Self {
        fs::create_dir_all(at).expect("mount point");
        run("mount", &["-t", "ext4", utf8(device), utf8(at)]);
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        Command::new("umount").arg(&self.0).status().ok();
    }
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A target whose data lies on `disk`, and a source with a writer.
fn begin(disk: &Mapped) -> (Site, Mounted) {
    run("mkfs.ext4", &["-q", "-E", "nodiscard,lazy_itable_init=0", utf8(&disk.path())]);
    let site = Site::new();
    let data = Mounted::new(&disk.path(), &site.paths.state.join("target"));
    (site, data)
}

/// A place of the history and the digest of the volume there, as the target showed it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    lsn: String,
    digest: String,
}

fn digest(file: &Path) -> String {
    let mut hash = blake3::Hasher::new();
    let mut bytes = Vec::new();
    File::open(file).expect("copy").read_to_end(&mut bytes).expect("copy");
    hash.update(&bytes);
    hash.finalize().to_hex().to_string()
}

fn at_every_flush_of_the_targets_disk_the_store_opens_and_its_points_are_right() {
    let log = guest::disk("log");
    {
        let disk = Mapped::logged("data", &log);
        let (site, data) = begin(&disk);
        let daemons = site.start_all();
        let (_image, uri) = site.protect("disk", SIZE, "200ms");
        site.wait_protected("disk");
        let first = site.points("disk").remove(0);
        // Points expire, and the journal is merged into the base, while the load runs.
        site.cli(&["policy", "set", "disk", "5s", "--yes"]);
        let load = Load::start(&uri, &["--bs=4k-64k", "--rate=3m"]);
        for _ in 0..MARKS {
            let newest = site.points("disk").into_iter().next().expect("a point");
            let view = site.open("disk", PointChoice::Id(newest.point));
            let copy = site.fetch_view(&view, "point.img");
            // The view keeps the point until it is in the log.
            disk.mark(&format!("{},{}", newest.lsn, digest(&copy)));
            site.close(&view);
            wait_for("newer points", LIMIT, || {
                (site.points("disk").first()?.lsn > newest.lsn).then_some(())
            });
        }
        load.stop();
        let floor = site.replica("disk").expect("status").floor;
        assert!(floor > first.lsn, "nothing has expired");
        drop(daemons);
        drop(data);
    }
    let mut replay = Replay::new(&log, &guest::disk("replay"));
    let (flushes, marks) = replay.count();
    assert!(marks >= MARKS, "the log ends after {marks} marks");
    println!("{flushes} flushes");
    let mut seed = 7;
    let mut wanted: Vec<u64> = (0..FLUSHES).map(|_| chance(&mut seed, flushes)).collect();
    wanted.sort_unstable();
    let (mut looked, mut stores) = (0, 0);
    let mut known: Option<Known> = None;
    while let Some(stop) = replay.step() {
        let place = replay.flushes;
        let wanted = wanted.contains(&place) && stop == Stop::Flush;
        if let Stop::Mark(mark) = &stop {
            known = Some(mark.clone());
        }
        if wanted || stop != Stop::Flush {
            looked += 1;
            stores += usize::from(look(known.as_ref(), stop != Stop::Flush, place));
        }
    }
    assert!(looked > MARKS + 3 && stores >= MARKS + 3, "{looked} looks, {stores} at a store");
}

/// Whether there was a store. What lies on the disk to be looked at is not changed.
fn look(known: Option<&Known>, must_have: bool, place: u64) -> bool {
    let snapshot = Mapped::snapshot("replay", &guest::disk("changes"));
    let at = Path::new("/vm/scratch/look");
    let out = Command::new("blkid").arg(snapshot.path()).output().expect("blkid");
    if !said(&out).contains("ext4") {
        return false;
    }
    let _data = Mounted::new(&snapshot.path(), at);
    let Some(store) = store_below(&at.join("volumes")) else {
        assert!(known.is_none(), "flush {place}: the store of a point is gone");
        return false;
    };
    let bin = farshore_bin();
    let out = Command::new(&bin).args(["store", "check", utf8(&store), "--json"]).output();
    let out = out.expect("farshore");
    assert!(out.status.success(), "flush {place}: the store is not right: {}", said(&out));
    if let Some(known) = known {
        let copy = Path::new("/vm/scratch/extracted.img");
        fs::remove_file(copy).ok();
        let point = format!("lsn:{}", known.lsn);
        let words = ["extract", utf8(&store), "--point", &point, "--to", utf8(copy)];
        let out = Command::new(&bin).args(words).output().expect("farshore");
        // Between the marks it may have expired.
        let expired = !must_have && said(&out).contains("FS-6010");
        assert!(out.status.success() || expired, "flush {place}: {known:?}: {}", said(&out));
        if !expired {
            assert_eq!(digest(copy), known.digest, "flush {place}: {known:?} has changed");
        }
    }
    true
}

/// The folder of the one volume, when its store has been made.
fn store_below(volumes: &Path) -> Option<PathBuf> {
    let folders = fs::read_dir(volumes).ok()?.flatten().map(|entry| entry.path());
    // A super block and its base are there before anything is acknowledged.
    let made = |folder: &PathBuf| folder.join("super").metadata().is_ok_and(|m| m.len() > 0);
    folders.filter(|folder| folder.join("base.img").is_file()).find(made)
}

#[derive(Debug, PartialEq, Eq)]
enum Stop {
    Flush,
    Mark(Known),
}

/// Plays back what the kernel's `log-writes` target has written down (its format: a super block, then for
/// each request a sector that describes it and its data).
struct Replay {
    log: File,
    disk: File,
    sector: u64,
    entries: u64,
    next: u64,
    place: u64,
    /// Flushes until now.
    flushes: u64,
}

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const DISCARD: u64 = 1 << 2;
const MARK: u64 = 1 << 3;

impl Replay {
    fn new(log: &Path, disk: &Path) -> Self {
        let log = File::open(log).expect("log");
        let disk = File::options().write(true).open(disk).expect("disk");
        let mut head = [0; 28];
        log.read_exact_at(&mut head, 0).expect("super block");
        assert_eq!(number(&head, 0), MAGIC, "not a log of writes");
        let sector = u64::from(u32::from_le_bytes(head[24..28].try_into().expect("4 bytes")));
        Self { log, disk, sector, entries: number(&head, 16), next: 0, place: sector, flushes: 0 }
    }

    /// Flushes and marks in the whole log.
    fn count(&self) -> (u64, usize) {
        let (mut flushes, mut marks, mut place) = (0, 0, self.sector);
        for _ in 0..self.entries {
            let (sectors, flags) = self.entry(place);
            flushes += u64::from(flags[1] & FLUSH != 0);
            marks += usize::from(flags[1] & MARK != 0);
            place += self.sector + if data_follows(flags[1]) { sectors * self.sector } else { 0 };
        }
        (flushes, marks)
    }

    /// Number of sectors; first sector, flags and length of what is in the entry itself.
    fn entry(&self, place: u64) -> (u64, [u64; 3]) {
        let mut entry = [0; 32];
        self.log.read_exact_at(&mut entry, place).expect("entry");
        (number(&entry, 8), [number(&entry, 0), number(&entry, 16), number(&entry, 24)])
    }

    /// Plays on until after the next flush or mark; none at the end.
    fn step(&mut self) -> Option<Stop> {
        while self.next < self.entries {
            let (sectors, [first, flags, inline]) = self.entry(self.place);
            let data = self.place + self.sector;
            self.next += 1;
            self.place = data;
            if flags & MARK != 0 {
                let mut text = vec![0; usize::try_from(inline).expect("short")];
                self.log.read_exact_at(&mut text, data - self.sector + 32).expect("mark");
                let text = String::from_utf8(text).expect("UTF-8");
                let text = text.trim_end_matches('\0');
                // The kernel marks the end of the log by itself.
                let Some((lsn, digest)) = text.split_once(',') else { continue };
                self.disk.sync_all().expect("sync");
                return Some(Stop::Mark(Known { lsn: lsn.into(), digest: digest.into() }));
            }
            // What a discarded range reads as afterwards is not defined: it stays as it was.
            if data_follows(flags) {
                self.place += sectors * self.sector;
                let mut bytes = vec![0; usize::try_from(sectors * self.sector).expect("memory")];
                self.log.read_exact_at(&mut bytes, data).expect("data");
                self.disk.write_all_at(&bytes, first * self.sector).expect("replay");
            }
            if flags & FLUSH != 0 {
                self.flushes += 1;
                self.disk.sync_all().expect("sync");
                return Some(Stop::Flush);
            }
        }
        None
    }
}

const fn data_follows(flags: u64) -> bool {
    flags & (DISCARD | MARK) == 0
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

fn a_target_whose_disk_fails_says_so_and_goes_on_where_it_was_when_it_is_mended() {
    let disk = Mapped::new("data");
    let (site, data) = begin(&disk);
    let daemons = site.start_all();
    let (image, uri) = site.protect("disk", SIZE, "1s");
    site.wait_protected("disk");
    let load = Load::start(&uri, &["--bs=4k-64k", "--rate=1m"]);
    let before = site.tag("disk", "before");
    let view = site.open("disk", PointChoice::Id(before.point));
    let wanted = digest(&site.fetch_view(&view, "before.img"));
    site.close(&view);

    disk.fail(0..DATA_MIB << 11);
    disk.resume();
    let status = wait_for("the target to say so", LIMIT, || {
        let out = site.try_cli(&["status"]);
        said(&out).contains("FS-6").then(|| said(&out))
    });
    println!("{status}");
    disk.mend();
    // Its file system is no longer able to write down its state.
    disk.suspend();
    disk.resume();
    daemons.target.kill();
    drop(data);
    run("fsck.ext4", &["-p", utf8(&disk.path())]);
    let _data = Mounted::new(&disk.path(), &site.paths.state.join("target"));
    let _target = site.start_target();
    // The guest has not seen an error.
    load.stop();
    let view = site.open("disk", PointChoice::Id(before.point));
    assert_eq!(digest(&site.fetch_view(&view, "again.img")), wanted, "a point has changed");
    site.close(&view);
    site.assert_point_equals("disk", "after", &image);
}
