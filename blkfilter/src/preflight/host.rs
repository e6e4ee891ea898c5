//! Who uses a device on this host, read from `/proc` and `/sys`.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::backing::sysfs_name;
use crate::sys::info::block_device_at;

/// Where the kernel tells; other places in tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRoots {
    /// `/proc`
    pub proc: PathBuf,
    /// `/sys`
    pub sys: PathBuf,
}

impl Default for HostRoots {
    fn default() -> Self {
        Self { proc: "/proc".into(), sys: "/sys".into() }
    }
}

/// A device number as `/sys/dev/block` and `mountinfo` write it: `8:16`.
pub(crate) type DevName = String;

/// A mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    pub dev: DevName,
    pub at: String,
    pub source: String,
    /// What happens to it happens to its peers in other namespaces.
    pub shared: bool,
}

impl Mount {
    /// Whether its file system lies on a device of `family`.
    pub(crate) fn is_on(&self, family: &BTreeSet<DevName>) -> bool {
        family.contains(&self.dev)
            // Some file systems (btrfs) have a number of their own: look at the source.
            || device_of(Path::new(&self.source)).is_some_and(|dev| family.contains(&dev))
    }
}

impl HostRoots {
    fn device(&self, dev: &str) -> PathBuf {
        self.sys.join("dev/block").join(dev)
    }

    /// The device itself, its partitions, and everything built on these.
    pub(crate) fn family(&self, dev: DevName) -> BTreeSet<DevName> {
        let mut family = BTreeSet::new();
        let mut left = vec![dev];
        while let Some(dev) = left.pop() {
            let directory = self.device(&dev);
            if family.insert(dev) {
                left.extend(partitions(&directory).into_iter().map(|(_, dev)| dev));
                left.extend(holders(&directory).into_iter().filter_map(|(_, dev)| dev));
            }
        }
        family
    }

    /// Names of the devices built directly on `dev` or on one of its partitions.
    pub(crate) fn holders(&self, dev: &str) -> Vec<String> {
        let directory = self.device(dev);
        let parts = partitions(&directory);
        std::iter::once(directory)
            .chain(parts.iter().map(|(path, _)| path.clone()))
            .flat_map(|directory| holders(&directory))
            .map(|(name, _)| name)
            .collect()
    }

    /// Names of the devices built directly on `dev`, not on its partitions.
    pub(super) fn direct_holders(&self, dev: &str) -> Vec<String> {
        holders(&self.device(dev)).into_iter().map(|(name, _)| name).collect()
    }

    /// Nodes and numbers of the partitions of `dev`.
    pub(super) fn partitions_of(&self, dev: &str) -> Vec<(PathBuf, DevName)> {
        let node = |path: &Path| Path::new("/dev").join(path.file_name().unwrap_or_default());
        let parts = partitions(&self.device(dev)).into_iter();
        let mut nodes: Vec<_> = parts.map(|(path, dev)| (node(&path), dev)).collect();
        nodes.sort();
        nodes
    }

    /// Another place of the machine: `run`, `etc` lie beside `/sys`.
    pub(super) fn beside(&self, path: &str) -> PathBuf {
        self.sys.with_file_name(path)
    }

    /// Directory of a device in `/sys`.
    pub(crate) fn directory(&self, dev: &str) -> PathBuf {
        self.device(dev)
    }

    /// Loop devices whose backing file is the file with this device and inode: name and number.
    pub(crate) fn loops_on(&self, file: (u64, u64)) -> Vec<(String, DevName)> {
        let Ok(entries) = fs::read_dir(self.sys.join("block")) else { return Vec::new() };
        let mut loops: Vec<_> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let backing = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
                let backing = fs::metadata(unescape(backing.trim_end_matches('\n'))).ok()?;
                let dev = first_line(&entry.path().join("dev"))?;
                ((backing.dev(), backing.ino()) == file).then_some((name, dev))
            })
            .collect();
        loops.sort();
        loops
    }

    /// All mounts that the calling thread sees.
    pub(crate) fn mounts(&self) -> Vec<Mount> {
        let text = fs::read_to_string(self.proc.join("thread-self/mountinfo"));
        parse_mounts(&text.unwrap_or_default())
    }

    /// All mounts that any process sees.
    pub(crate) fn mounts_of_all(&self) -> Vec<Mount> {
        let mut namespaces = BTreeSet::new();
        let mut mounts = Vec::new();
        for process in self.processes() {
            // Without the right to know which it is, it counts as one of its own.
            let namespace = fs::read_link(process.join("ns/mnt"));
            if namespace.is_ok_and(|name| !namespaces.insert(name)) {
                continue;
            }
            let text = fs::read_to_string(process.join("mountinfo"));
            mounts.extend(parse_mounts(&text.unwrap_or_default()));
        }
        mounts
    }

    /// Directories of all processes in `/proc`.
    pub(crate) fn processes(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(&self.proc) else { return Vec::new() };
        let is_number = |name: &str| name.bytes().all(|b| b.is_ascii_digit());
        let named = |entry: &fs::DirEntry| entry.file_name().to_str().is_some_and(is_number);
        entries.flatten().filter(named).map(|entry| entry.path()).collect()
    }

    /// The kernel's name of the block device at `path`, such as `vdb`; none for anything else.
    pub(crate) fn name_of(&self, path: &Path) -> Option<String> {
        let directory = fs::canonicalize(self.device(&device_of(path)?)).ok()?;
        directory.file_name()?.to_str().map(str::to_owned)
    }

    /// Number of the block device with this name, such as `ublkb3`.
    pub(crate) fn number_of(&self, name: &str) -> Option<DevName> {
        first_line(&self.sys.join("class/block").join(name).join("dev"))
    }

    /// Mount points of any device in `family`.
    pub(crate) fn mounted(&self, family: &BTreeSet<DevName>) -> Vec<String> {
        let mut at: Vec<_> = self
            .mounts()
            .into_iter()
            .filter(|mount| mount.is_on(family))
            .map(|mount| mount.at)
            .collect();
        at.sort();
        at.dedup();
        at
    }

    /// Whether a device of `family`, or the file with this device and inode, is swap space.
    pub(crate) fn swaps(&self, family: &BTreeSet<DevName>, file: Option<(u64, u64)>) -> bool {
        let text = fs::read_to_string(self.proc.join("swaps")).unwrap_or_default();
        text.lines().skip(1).filter_map(|line| line.split_whitespace().next()).any(|path| {
            let path = PathBuf::from(unescape(path));
            let Ok(metadata) = fs::metadata(&path) else { return false };
            device_of(&path).is_some_and(|dev| family.contains(&dev))
                || file == Some((metadata.dev(), metadata.ino()))
        })
    }
}

/// Number of the block device at `path`; `None` when there is none.
pub(crate) fn device_of(path: &Path) -> Option<DevName> {
    path.is_absolute().then(|| block_device_at(path)).flatten().map(sysfs_name)
}

fn first_line(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

fn partitions(directory: &Path) -> Vec<(PathBuf, DevName)> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join("partition").exists())
        .filter_map(|path| {
            let dev = first_line(&path.join("dev"))?;
            Some((path, dev))
        })
        .collect()
}

fn holders(directory: &Path) -> Vec<(String, Option<DevName>)> {
    let Ok(entries) = fs::read_dir(directory.join("holders")) else { return Vec::new() };
    let mut found: Vec<_> = entries
        .flatten()
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, first_line(&entry.path().join("dev")))
        })
        .collect();
    found.sort();
    found
}

fn parse_mounts(mountinfo: &str) -> Vec<Mount> {
    mountinfo.lines().filter_map(mount).collect()
}

/// One line of mountinfo: `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`.
fn mount(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ');
    let dev = left.nth(2)?.to_owned();
    let at = unescape(left.nth(1)?);
    let source = unescape(right.split(' ').nth(1)?);
    let shared = left.skip(1).any(|field| field.starts_with("shared:"));
    Some(Mount { dev, at, source, shared })
}

/// The kernel writes blanks and backslashes in paths as octal: `\040`.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| byte == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(byte) = octal {
            bytes.push(byte);
            rest = &after[3..];
        } else {
            bytes.push(byte);
            rest = after;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_the_kernel_are_unescaped() {
        assert_eq!(unescape(r"/mnt/a\040b\134c"), r"/mnt/a b\c");
        assert_eq!(unescape(r"/short\04"), r"/short\04");
        assert_eq!(unescape(r"\"), r"\");
    }

    #[test]
    fn a_line_of_mountinfo_is_understood() {
        let line = r"36 35 8:17 / /mnt\0402 rw shared:1 master:2 - ext4 /dev/sdb1 rw";
        let (dev, at, source) = ("8:17".into(), "/mnt 2".into(), "/dev/sdb1".into());
        let expected = Mount { dev, at, source, shared: true };
        assert_eq!(mount(line), Some(expected));
        assert_eq!(mount("nonsense"), None);
    }
}
