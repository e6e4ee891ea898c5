//! Files whose names tell what they hold: a byte of another file, or of nothing at all, is found
//! whatever was lost. A list outside of the machine tells which of them had been made durable.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::harness::{chance, pause};

const FILES: usize = 60;
const LONGEST: usize = 300_000;
const BLOCK: usize = 4096;

/// What the file of this name holds.
fn content(name: &str) -> Vec<u8> {
    let mut noise = blake3::Hasher::new().update(name.as_bytes()).finalize_xof();
    let mut length = [0; 8];
    noise.fill(&mut length);
    let mut bytes =
        vec![0; usize::try_from(u64::from_le_bytes(length) >> 8).expect("64 bit") % LONGEST];
    noise.fill(&mut bytes);
    bytes
}

/// A folder of files on a mounted file system.
pub struct Tree {
    at: PathBuf,
    /// Line by line: `+NAME` the file is durable, `-NAME` it is about to be removed.
    list: PathBuf,
}

impl Tree {
    pub fn new(at: &Path, list: &Path) -> Self {
        Self { at: at.to_owned(), list: list.to_owned() }
    }

    fn names(&self) -> Vec<String> {
        let all = fs::read_dir(&self.at).expect("the folder").map(|entry| {
            entry.and_then(|e| {
                e.file_name().into_string().map_err(|_| std::io::ErrorKind::InvalidData.into())
            })
        });
        let mut names: Vec<String> =
            all.map(|name| name.expect("a name")).filter(|name| name != "lost+found").collect();
        names.sort_unstable();
        names
    }

    /// Every file that was made durable is there, whole; whatever else is there holds nothing but
    /// its own bytes or, where they were not written yet, zeroes; it goes when it is not whole.
    /// Returns how many were durable.
    pub fn verify(&self) -> usize {
        let list = fs::read_to_string(&self.list).unwrap_or_default();
        let mut durable = BTreeSet::new();
        for line in list.lines() {
            match line.split_at_checked(1) {
                Some(("+", name)) => durable.insert(name),
                Some(("-", name)) => durable.remove(name),
                _ => panic!("the list of the files has a line {line:?}"),
            };
        }
        let names = self.names();
        for name in &names {
            assert!(name.starts_with('r'), "nobody made a file {name:?}");
            let (found, own) = (fs::read(self.at.join(name)).expect("read"), content(name));
            if durable.contains(name.as_str()) {
                assert!(found == own, "{name} was durable and has changed");
            }
            let foreign = found.chunks(BLOCK).zip(own.chunks(BLOCK)).position(|(found, own)| {
                own.get(..found.len()) != Some(found) && found.iter().any(|byte| *byte != 0)
            });
            assert_eq!(foreign, None, "{name}: a block holds foreign bytes");
            assert!(found.len() <= own.len(), "{name} is longer than it was ever written");
            if found != own {
                fs::remove_file(self.at.join(name)).expect("remove");
            }
        }
        for name in &durable {
            assert!(names.iter().any(|n| n == name), "{name} was durable and is gone");
        }
        durable.len()
    }

    /// Writes and removes files until told to stop; makes a third of them durable.
    pub fn write(&self, round: u64, stop: impl Fn() -> bool) {
        let mut dice = round.wrapping_mul(0x5eed) + 1;
        let mut below = |n: usize| usize::try_from(chance(&mut dice, n as u64)).expect("small");
        let mut names = self.names();
        let mut number = 0;
        while !stop() {
            pause(Duration::from_millis(below(30) as u64));
            if names.len() > FILES || (!names.is_empty() && below(5) == 0) {
                let name = names.swap_remove(below(names.len()));
                self.note(format!("-{name}\n"));
                fs::remove_file(self.at.join(name)).expect("remove");
                continue;
            }
            let name = format!("r{round}-{number}");
            let mut file = File::create(self.at.join(&name)).expect("create");
            file.write_all(&content(&name)).expect("write");
            if below(3) == 0 {
                file.sync_all().and_then(|()| File::open(&self.at)?.sync_all()).expect("fsync");
                self.note(format!("+{name}\n"));
            }
            names.push(name);
            number += 1;
        }
    }

    /// From now on every file is durable: the file system is being unmounted.
    pub fn unmounting(&self) {
        self.note(self.names().iter().map(|name| format!("+{name}\n")).collect());
    }

    /// With one write: the power may go at any moment.
    fn note(&self, lines: String) {
        let list = File::options().append(true).open(&self.list);
        list.and_then(|mut list| list.write_all(lines.as_bytes())).expect("the list");
    }
}
