//! Directories and files of the daemons: space, inodes, what they lie on, who may read the keys.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::sys::statvfs::statvfs;

use super::finding::Finding;
use crate::units;

/// Room on a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes that an ordinary user may still take.
    free: u64,
    bytes: u64,
    free_inodes: u64,
    /// 0 where inodes are not counted.
    inodes: u64,
    /// It is memory, gone after a reboot.
    volatile: bool,
}

/// How much is enough.
#[derive(Debug, Clone, Copy)]
pub struct Need {
    /// What lies there.
    pub what: &'static str,
    /// Below so many free bytes it does not work.
    pub least: u64,
    /// Below so many percent free it should be looked at.
    pub percent: u64,
}

/// Epochs and records of filterd, identity and memory of the agent: small files.
pub const STATE: Need = Need { what: "state", least: 16 << 20, percent: 2 };

/// Journals and bases: grows with every write.
pub const DATA: Need = Need { what: "data", least: 1 << 30, percent: 10 };

/// The directory, or the nearest one above that exists.
fn existing(dir: &Path) -> PathBuf {
    dir.ancestors().find(|d| d.exists()).unwrap_or(dir).to_owned()
}

fn measure(dir: &Path) -> io::Result<Room> {
    let at = existing(dir);
    let (room, kind) = (statvfs(&at)?, statfs(&at)?);
    let unit = room.fragment_size();
    Ok(Room {
        free: room.blocks_available().saturating_mul(unit),
        bytes: room.blocks().saturating_mul(unit),
        free_inodes: room.files_available(),
        inodes: room.files(),
        volatile: kind.filesystem_type() == TMPFS_MAGIC,
    })
}

/// Room for a directory that exists or will be made.
pub fn space(dir: &Path, need: Need) -> Finding {
    match measure(dir) {
        Ok(room) => enough(dir, need, room),
        Err(e) => {
            let text = format!("{} cannot be examined: {e}", dir.display());
            Finding::unseen(need.what, text, format!("df -h {0} && df -i {0}", dir.display()))
        }
    }
}

fn enough(dir: &Path, need: Need, room: Room) -> Finding {
    let (at, free, all) = (dir.display(), units::bytes(room.free), units::bytes(room.bytes));
    let look = format!("du -xh --max-depth=2 {} | sort -h | tail", existing(dir).display());
    let percent = |part: u64, of: u64| u128::from(part) * 100 / u128::from(of.max(1));
    if room.volatile {
        let text = format!("{at} is in memory (tmpfs) and gone after a reboot");
        return Finding::warning(
            need.what,
            text,
            format!("# mount a disk on {at}, or give another --root"),
        );
    }
    if room.free < need.least {
        let least = units::bytes(need.least);
        return Finding::problem(
            need.what,
            format!("{at}: {free} left, at least {least} wanted"),
            look,
        );
    }
    if room.inodes > 0 && room.free_inodes < 100 {
        let text = format!("{at}: {} inodes left", room.free_inodes);
        return Finding::problem(need.what, text, format!("df -i {}", existing(dir).display()));
    }
    if percent(room.free, room.bytes) < u128::from(need.percent) {
        let text = format!("{at}: {free} of {all} left, under {} %", need.percent);
        return Finding::warning(need.what, text, look);
    }
    if room.inodes > 0 && percent(room.free_inodes, room.inodes) < 2 {
        let text = format!("{at}: {} of {} inodes left", room.free_inodes, room.inodes);
        return Finding::warning(need.what, text, format!("df -i {}", existing(dir).display()));
    }
    Finding::ok(need.what, format!("{at}: {free} of {all} left"))
}

/// Keys: readable by the daemon's user alone. None while no file exists.
pub fn keys(check: &str, files: &[PathBuf]) -> Option<Finding> {
    let mut open = Vec::new();
    let mut seen = 0;
    for file in files {
        match std::fs::metadata(file) {
            Ok(metadata) if metadata.permissions().mode() & 0o077 != 0 => open.push(file),
            Ok(_) => seen += 1,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => {
                let text = format!("{}: {e}", file.display());
                return Some(Finding::unseen(check, text, "sudo farshore doctor"));
            }
        }
    }
    if !open.is_empty() {
        let list: Vec<_> = open.iter().map(|f| f.display().to_string()).collect();
        let list = list.join(" ");
        let text = format!("other users may read {list}");
        return Some(Finding::problem(check, text, format!("chmod 600 {list}")));
    }
    (seen > 0).then(|| Finding::ok(check, "private keys are readable by their owner only"))
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::*;

    const PLENTY: Room = Room {
        free: 50 << 30,
        bytes: 100 << 30,
        free_inodes: 1 << 20,
        inodes: 2 << 20,
        volatile: false,
    };

    #[test]
    fn space_inodes_and_memory_file_systems_are_told_apart() {
        let look = |room| {
            let found = enough(Path::new("/srv/farshore"), DATA, room);
            assert_eq!(found.state == State::Ok, found.fix.is_none());
            found.state
        };
        assert_eq!(look(PLENTY), State::Ok);
        assert_eq!(look(Room { inodes: 0, free_inodes: 0, ..PLENTY }), State::Ok, "btrfs");
        assert_eq!(look(Room { free: 9 << 30, ..PLENTY }), State::Warning);
        assert_eq!(look(Room { free: 1 << 20, ..PLENTY }), State::Problem);
        assert_eq!(look(Room { free_inodes: 7, ..PLENTY }), State::Problem);
        assert_eq!(look(Room { free_inodes: 1000, ..PLENTY }), State::Warning);
        assert_eq!(look(Room { volatile: true, ..PLENTY }), State::Warning);
    }

    #[test]
    fn a_directory_that_is_not_made_yet_is_measured_where_it_will_be() {
        let dir = tempfile::tempdir().unwrap();
        let later = dir.path().join("not/yet");
        assert_eq!(measure(&later).unwrap().bytes, measure(dir.path()).unwrap().bytes);
        let tiny = Need { least: 1, percent: 0, ..STATE };
        let found = space(&later, tiny);
        assert!(found.text.contains("not/yet"), "{}", found.text);
    }

    #[test]
    fn keys_that_others_may_read_are_closed_by_the_fix() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key.pem");
        assert_eq!(keys("key", std::slice::from_ref(&key)), None);
        std::fs::write(&key, "x").unwrap();
        std::fs::set_permissions(&key, PermissionsExt::from_mode(0o640)).unwrap();
        let found = keys("key", std::slice::from_ref(&key)).unwrap();
        assert_eq!(found.state, State::Problem);
        let fix = found.fix.unwrap();
        assert!(std::process::Command::new("sh").args(["-c", &fix]).status().unwrap().success());
        assert_eq!(keys("key", &[key]).unwrap().state, State::Ok);
    }
}
