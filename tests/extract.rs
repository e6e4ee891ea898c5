//! Points read out of a replica's folder when nothing else is left: no daemon, no catalogue. What
//! comes out is what the disk was; what is damaged is named; nothing in the folder changes.

mod harness;

use std::collections::BTreeMap;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use farshore_extent::Lsn;
use farshore_target::store::{InspectedBatch, ReadOnlyDisk, inspect, inspect_segment};
use harness::{Daemons, Site, assert_same_bytes, farshore_bin, run, said};
use serde_json::Value;

const SIZE: u64 = 16 << 20;

/// Written before each point; places of what is overwritten repeat.
const PLACES_MIB: [u64; 5] = [0, 4, 8, 12, 4];

/// A replica's folder with nobody at it, and the disk at each of its points.
struct Left {
    _site: Site,
    folder: PathBuf,
    points: Vec<(String, Lsn, PathBuf)>,
}

impl Left {
    fn path(&self, name: &str) -> PathBuf {
        self._site.root().join(name)
    }

    /// The same folder again, to be damaged.
    fn copy(&self, name: &str) -> PathBuf {
        let to = self.path(name);
        let words = ["-r", "--sparse=always"];
        run("cp", &[&words[..], &[utf8(&self.folder), utf8(&to)]].concat());
        to
    }
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn folder_of(site: &Site) -> PathBuf {
    let out = run("find", &[utf8(site.root()), "-name", "super", "-path", "*volumes*"]);
    let found = String::from_utf8(out.stdout).expect("UTF-8");
    let found = Path::new(found.trim()).parent().expect("a folder");
    assert!(found.join("base.img").is_file(), "{}", found.display());
    found.to_owned()
}

/// Protects a disk, writes and tags several times, stops everything and forgets all but the folder.
fn left() -> Left {
    let site = Site::new();
    let Daemons { target, filterd, agent } = site.start_all();
    let (image, uri) = site.protect("disk", SIZE, "1s");
    site.wait_protected("disk");
    let mut points = Vec::new();
    for (n, place) in PLACES_MIB.iter().enumerate() {
        let script = format!(
            "import random\nr = random.Random({n})\nat = {place} << 20\n\
             for i in range(12): h.pwrite(r.randbytes(262144), at + i * 262144)\n\
             h.trim(65536, at + 131072)\nh.zero(65536, (15 << 20) + {n} * 131072)\nh.flush()\n"
        );
        run("nbdsh", &["-u", &uri, "-c", &script]);
        let name = format!("at-{n}");
        let point = site.tag("disk", &name);
        let then = site.root().join(format!("{name}.img"));
        run("cp", &["--sparse=always", utf8(&image), utf8(&then)]);
        points.push((name, point.lsn, then));
    }
    // What follows the last of them may be cut off at the end of the journal.
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'z' * 4096, 0)"]);
    site.tag("disk", "end");
    assert!(agent.stop().success() && filterd.stop().success() && target.stop().success());
    let folder = site.root().join("left");
    run("mv", &[utf8(&folder_of(&site)), utf8(&folder)]);
    for gone in ["etc", "var", "run"] {
        std::fs::remove_dir_all(site.root().join(gone)).ok();
    }
    Left { _site: site, folder, points }
}

fn farshore(words: &[&str]) -> Output {
    Command::new(farshore_bin()).args(words).output().expect("farshore can be run")
}

fn code(out: &Output) -> i32 {
    out.status.code().unwrap_or(-1)
}

fn extract(folder: &Path, point: &str, to: &Path, more: &[&str]) -> Output {
    let words = ["extract", utf8(folder), "--point", point, "--to", utf8(to), "--json"];
    farshore(&[&words[..], more].concat())
}

fn json(out: &Output) -> Value {
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(out)))
}

fn check(folder: &Path) -> (i32, Value) {
    let out = farshore(&["store", "check", utf8(folder), "--json"]);
    (code(&out), json(&out)["check"].clone())
}

/// Digest and time of change of every file.
fn state(folder: &Path) -> BTreeMap<String, (String, i64, i64)> {
    let files = std::fs::read_dir(folder).expect("folder").map(|f| f.expect("entry"));
    let of = |f: std::fs::DirEntry| {
        let bytes = std::fs::read(f.path()).expect("file");
        let meta = f.metadata().expect("metadata");
        let digest = blake3::hash(&bytes).to_hex().to_string();
        (f.file_name().into_string().expect("UTF-8"), (digest, meta.mtime(), meta.mtime_nsec()))
    };
    files.map(of).collect()
}

fn flip(folder: &Path, file: &str, at: u64) {
    let file = std::fs::File::options().read(true).write(true).open(folder.join(file));
    let file = file.expect("file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 4], at).expect("write");
}

/// The newest batch with payload at or before the place: file, and the batch.
fn batch_at(folder: &Path, at: Lsn) -> (String, InspectedBatch) {
    let disk = ReadOnlyDisk::open(folder).expect("folder");
    let (_, segments) = inspect(&disk).expect("a store");
    let batches = segments.iter().flat_map(|s| {
        let batches = inspect_segment(&disk, &s.name).expect("segment");
        batches.map(move |batch| (s.name.clone(), batch))
    });
    let of = batches.filter(|(_, b)| b.header.last() <= at && b.header.frame_count > 0);
    of.last().expect("a batch")
}

#[test]
fn every_point_comes_out_of_the_folder_alone_and_nothing_in_it_changes() {
    let left = left();
    let before = state(&left.folder);
    let list = farshore(&["extract", utf8(&left.folder), "--list", "--json"]);
    assert_eq!(code(&list), 0, "{}", said(&list));
    let list = json(&list)["store"].clone();
    let named = |name: &str| {
        let points = list["points"].as_array().expect("points");
        points.iter().find(|p| p["name"] == name).cloned().expect("listed")
    };
    assert_eq!(list["damage"], serde_json::json!([]));
    let to = left.path("out.img");
    for (name, lsn, then) in &left.points {
        let lsn = format!("lsn:{lsn}");
        let tag = format!("tag:{name}");
        let time = named(name)["time"].as_str().expect("a time").to_owned();
        assert_eq!(format!("lsn:{}", named(name)["lsn"].as_str().expect("lsn")), lsn);
        for point in [name, &tag, &lsn, &time] {
            let out = extract(&left.folder, point, &to, &["--verify"]);
            assert_eq!(code(&out), 0, "{point}: {}", said(&out));
            assert_same_bytes(then, &to, point);
            let told = json(&out)["extracted"].clone();
            let digest = blake3::hash(&std::fs::read(&to).expect("image")).to_hex().to_string();
            assert_eq!((&told["blake3"], &told["bytes"]), (&digest.into(), &SIZE.into()));
            assert_eq!(
                (&told["read_back"], &told["base_unverified_bytes"]),
                (&true.into(), &0.into())
            );
            assert!(told["lsn"] == named(name)["lsn"] || *point == time, "{point}: {told}");
            let stored = std::fs::metadata(&to).expect("image").blocks() * 512;
            assert!(stored < SIZE - (1 << 20), "{stored} bytes stored: holes are kept");
            std::fs::remove_file(&to).expect("the image goes away");
        }
    }
    for point in ["newest", "oldest", "latest"] {
        let out = extract(&left.folder, point, &to, &["--yes"]);
        assert_eq!(code(&out), 0, "{point}: {}", said(&out));
    }
    let (ended, report) = check(&left.folder);
    assert_eq!((ended, &report["findings"]), (0, &serde_json::json!([])), "{report}");
    assert!(report["segments"].as_u64() > Some(1) && report["frames"].as_u64() > Some(100));
    assert_eq!(state(&left.folder), before);
    let made = std::fs::read_dir(left.path("")).expect("site").flatten();
    assert!(made.into_iter().all(|f| !f.file_name().to_string_lossy().contains(".new")));
}

#[test]
fn the_descriptions_of_the_format_are_enough_to_read_every_point() {
    let left = left();
    let reader = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/format_reader.py");
    let read = |words: &[&str]| {
        let words = [&[utf8(&reader), utf8(&left.folder)], words].concat();
        String::from_utf8(run("python3", &words).stdout).expect("UTF-8")
    };
    let listed = farshore(&["extract", utf8(&left.folder), "--list", "--json"]);
    let ours = json(&listed)["store"]["points"].clone();
    let ours: Vec<String> = ours
        .as_array()
        .expect("points")
        .iter()
        .map(|p| {
            format!("{} {}", p["lsn"].as_str().expect("lsn"), p["name"].as_str().expect("name"))
        })
        .collect();
    let theirs: Vec<String> = read(&["list"]).lines().map(str::to_owned).collect();
    assert_eq!(theirs, ours);
    let (one, other) = (left.path("one.img"), left.path("other.img"));
    for point in ["newest", "at-1", "at-4"] {
        read(&[point, utf8(&one)]);
        let out = extract(&left.folder, point, &other, &["--yes"]);
        assert_eq!(code(&out), 0, "{point}: {}", said(&out));
        assert_same_bytes(&one, &other, point);
    }
}

#[test]
fn a_damaged_batch_spoils_the_points_that_are_named_and_no_other() {
    let left = left();
    let damaged = left.copy("damaged");
    let (file, batch) = batch_at(&damaged, left.points[1].1);
    flip(&damaged, &file, batch.place + batch.header.total_len() as u64 - 1);
    let before = state(&damaged);
    let (ended, report) = check(&damaged);
    assert_eq!(ended, 1, "{report}");
    let finding = &report["findings"][0];
    assert_eq!((&finding["file"], &finding["place"]), (&file.into(), &batch.place.into()));
    let to = left.path("out.img");
    let mut spoilt = Vec::new();
    for (name, lsn, then) in &left.points {
        let out = extract(&damaged, name, &to, &[]);
        if code(&out) == 0 {
            assert_same_bytes(then, &to, name);
            std::fs::remove_file(&to).expect("the image goes away");
            continue;
        }
        assert!(said(&out).contains("FS-6706") && code(&out) == 1, "{name}: {}", said(&out));
        assert!(!to.exists(), "no file of a point that is not whole");
        spoilt.push(name.as_str());
        let place = |key: &str| finding[key].as_str().expect("a place").parse::<Lsn>();
        let named = place("first_point").expect("lsn")..=place("last_point").expect("lsn");
        assert!(named.contains(lsn), "{name} is not named: {finding}");
        let out = extract(&damaged, name, &to, &["--damaged", "zero"]);
        assert_eq!(code(&out), 6, "{}", said(&out));
        let mut expected = std::fs::read(then).expect("image");
        for range in json(&out)["extracted"]["unreadable"].as_array().expect("ranges") {
            let number = |n: usize| usize::try_from(range[n].as_u64().expect("number"));
            let (at, len) = (number(0).expect("fits"), number(1).expect("fits"));
            expected[at..at + len].fill(0);
        }
        assert!(std::fs::read(&to).expect("image") == expected, "{name}");
        std::fs::remove_file(&to).expect("the image goes away");
    }
    // The range was written again before the last point.
    assert_eq!(spoilt, ["at-1", "at-2", "at-3"], "{report}");
    assert_eq!(state(&damaged), before);
}

#[test]
fn a_bad_copy_of_the_super_block_and_a_torn_tail_are_read_over_and_left_alone() {
    let left = left();
    let (name, _, then) = &left.points[4];
    let to = left.path("out.img");
    let torn = left.copy("torn");
    let disk = ReadOnlyDisk::open(&torn).expect("folder");
    let (_, segments) = inspect(&disk).expect("a store");
    let last = &segments.last().expect("segments").name;
    let batch = inspect_segment(&disk, last).expect("segment").last().expect("a batch");
    flip(&torn, last, batch.place + 256);
    let super_copy = left.copy("super-copy");
    flip(&super_copy, "super", 4096 + 100);
    for (folder, ended, told) in [(&torn, 0, "cut off"), (&super_copy, 1, "checksum")] {
        let before = state(folder);
        let out = extract(folder, name, &to, &["--yes"]);
        assert_eq!(code(&out), 0, "{}", said(&out));
        assert_same_bytes(then, &to, name);
        let (got, report) = check(folder);
        assert_eq!(got, ended, "{report}");
        assert!(report.to_string().contains(told), "{report}");
        assert_eq!(state(folder), before, "{}", folder.display());
    }
    let mut gone = farshore(&["store", "check", utf8(&left.path("nothing"))]);
    assert_eq!(code(&gone), 3, "{}", said(&gone));
    flip(&super_copy, "super", 100);
    gone = farshore(&["store", "check", utf8(&super_copy)]);
    assert!(code(&gone) == 1 && said(&gone).contains("FS-6004"), "{}", said(&gone));
}

/// A loop device over a new file; taken apart when dropped.
struct Loop(String);

impl Loop {
    fn new(file: &Path, bytes: u64) -> Self {
        std::fs::File::create(file).and_then(|f| f.set_len(bytes)).expect("file");
        let out = run("losetup", &["--find", "--show", utf8(file)]);
        Self(String::from_utf8(out.stdout).expect("UTF-8").trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Command::new("umount").arg(&self.0).output().ok();
        Command::new("losetup").args(["-d", &self.0]).output().ok();
    }
}

#[test]
fn a_place_that_cannot_take_the_image_is_refused_with_its_reason() {
    let left = left();
    let (name, _, then) = &left.points[4];
    let before = state(&left.folder);
    let refused = |to: &Path, more: &[&str], exit: i32, told: &str| {
        let out = extract(&left.folder, name, to, more);
        assert!(
            code(&out) == exit && said(&out).contains(told),
            "{}: {}",
            to.display(),
            said(&out)
        );
    };
    refused(&left.folder.join("base.img"), &["--yes"], 2, "FS-6703");
    refused(&left.folder.join("new.img"), &["--yes"], 2, "FS-6703");
    refused(Path::new("/dev/null"), &["--yes"], 2, "FS-6703");
    refused(&left.path("nowhere/out.img"), &["--yes"], 2, "FS-6703");
    let old = left.path("old.img");
    std::fs::write(&old, b"old").expect("file");
    refused(&old, &[], 4, "FS-4902");
    assert_eq!(std::fs::read(&old).expect("file"), b"old");
    let dry = extract(&left.folder, name, &old, &["--dry-run"]);
    assert_eq!((code(&dry), std::fs::read(&old).expect("file")), (0, b"old".to_vec()));

    let full = left.path("full");
    std::fs::create_dir(&full).expect("mount point");
    run("mount", &["-t", "tmpfs", "-o", "size=2m", "tmpfs", utf8(&full)]);
    let out = extract(&left.folder, name, &full.join("out.img"), &[]);
    let remains = std::fs::read_dir(&full).expect("full").count();
    run("umount", &[utf8(&full)]);
    assert!(code(&out) == 1 && said(&out).contains("FS-6705"), "{}", said(&out));
    assert_eq!(remains, 0, "nothing is left of what is not whole");

    let small = Loop::new(&left.path("small"), SIZE / 2);
    refused(Path::new(&small.0), &["--yes"], 4, "FS-6704");
    let large = Loop::new(&left.path("large"), SIZE + (8 << 20));
    run("mkfs.ext4", &["-q", &large.0]);
    std::fs::create_dir(left.path("mnt")).expect("mount point");
    run("mount", &[&large.0, utf8(&left.path("mnt"))]);
    refused(Path::new(&large.0), &["--yes"], 4, "mounted on");
    run("umount", &[&large.0]);
    refused(Path::new(&large.0), &[], 4, "FS-4902");
    let out = extract(&left.folder, name, Path::new(&large.0), &["--yes", "--verify"]);
    assert_eq!(code(&out), 0, "{}", said(&out));
    run("cmp", &["-n", &SIZE.to_string(), utf8(then), &large.0]);
    assert_eq!(state(&left.folder), before);
}

#[test]
fn a_store_that_a_target_has_open_is_not_read_beside_it() {
    let site = Site::new();
    let daemons = site.start_all();
    site.protect("disk", SIZE, "1s");
    site.wait_protected("disk");
    let folder = folder_of(&site);
    let to = site.root().join("out.img");
    let pid = format!("pid {}", daemons.target.pid());
    for out in [extract(&folder, "newest", &to, &[]), farshore(&["store", "check", utf8(&folder)])]
    {
        let told = said(&out);
        assert!(code(&out) == 4 && told.contains("FS-6701") && told.contains(&pid), "{told}");
    }
    assert!(!to.exists());
    // A kill ends its claim, and the folder is as good as ever.
    daemons.target.kill();
    let out = extract(&folder, "newest", &to, &[]);
    assert_eq!(code(&out), 0, "{}", said(&out));
}
