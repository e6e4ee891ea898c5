//! Before protecting: every prerequisite that fails, not just the first.
//!
//! Looks and never changes anything; what it opens it closes again. A clean answer is no promise:
//! [`crate::backing::Backing::open`] claims the device and checks once more.

mod hints;
mod host;
mod lineage;
pub(crate) mod problem;

use std::collections::BTreeSet;
use std::fs::{File, Metadata, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use farshore_extent::{Problem, VolumeName};

use crate::backing::{self, Backing, Mode};
use crate::control::{AttachKind, ProtectRequest};
use crate::sys::info;
pub use hints::{fstab_hints, hints};
pub use host::HostRoots;
pub(crate) use host::{Mount, device_of};

/// Longest path of a unix socket in bytes.
const MAX_SOCKET_PATH: usize = 107;

/// Directories of filterd that must not lie on a protected volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnPlaces {
    /// Durable state.
    pub state: PathBuf,
    /// Sockets.
    pub run: PathBuf,
}

impl OwnPlaces {
    /// Where the volume of `request` will be served when it is attached by a socket.
    #[must_use]
    pub fn nbd_socket(&self, request: &ProtectRequest) -> PathBuf {
        request
            .nbd_socket
            .clone()
            .unwrap_or_else(|| self.run.join("nbd").join(format!("{}.sock", request.name)))
    }
}

/// A volume that is protected already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// Its name.
    pub name: VolumeName,
    /// Its backing device.
    pub backing: PathBuf,
    /// Where it is served; none for a block device.
    pub nbd_socket: Option<PathBuf>,
    /// The block device that it is served as; none for a socket.
    pub device: Option<PathBuf>,
}

/// Everything that stands in the way of `request`, whose way of attaching has been chosen; empty
/// means ready.
#[must_use]
pub fn preflight(
    roots: &HostRoots,
    request: &ProtectRequest,
    places: &OwnPlaces,
    running: &[Running],
) -> Vec<Problem> {
    let path = request.backing.as_path();
    let mut problems = names_and_sockets(request, places, running);
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) => {
            problems.push(problem::cannot_look(path, &error));
            return problems;
        }
    };
    let Some(subject) = Subject::new(roots, path, &metadata) else {
        problems.push(problem::not_a_disk(path, metadata.is_dir()));
        return problems;
    };
    let protected = subject.protected_by(running);
    problems.extend(protected.map(|volume| problem::already_protected(path, &volume.name)));
    let related = if protected.is_some() { None } else { subject.relative(roots, running) };
    let related_found = related.is_some();
    problems.extend(related);
    let users = subject.users(roots, &request.name, places);
    // A device in use is busy too; saying so again would only hide the reason.
    let explained = protected.is_some() || related_found || !users.is_empty();
    problems.extend(users);
    problems.extend(subject.nature(roots));
    // The last word has the very opening that protecting will do.
    if !explained
        && let Err(found) = Backing::open(path, Mode::ReadWrite)
        && problems.iter().all(|known| known.code != found.code)
    {
        problems.push(found);
    }
    problems
}

fn names_and_sockets(
    request: &ProtectRequest,
    places: &OwnPlaces,
    running: &[Running],
) -> Vec<Problem> {
    let path = request.backing.as_path();
    let mut problems = Vec::new();
    let same_name = running.iter().find(|volume| volume.name == request.name);
    problems.extend(same_name.map(|v| problem::name_taken(path, &request.name, &v.backing)));
    if request.attach != Some(AttachKind::Socket) {
        return problems;
    }
    let socket = places.nbd_socket(request);
    let same_socket = |volume: &&Running| volume.nbd_socket.as_ref() == Some(&socket);
    if let Some(other) = running.iter().find(same_socket).filter(|_| same_name.is_none()) {
        problems.push(problem::socket_in_use(path, &socket, &other.name));
    }
    let bytes = socket.as_os_str().as_bytes().len();
    if bytes > MAX_SOCKET_PATH {
        problems.push(problem::socket_too_long(path, &socket, bytes));
    }
    problems
}

/// What is to be protected.
struct Subject<'a> {
    path: &'a Path,
    /// The block device as `/sys` names it; none for a file.
    device: Option<String>,
    /// Device and inode of the file; none for a block device.
    file: Option<(u64, u64)>,
    /// Loop devices on the file.
    loops: Vec<(String, String)>,
    /// Block devices whose users write to it: itself, partitions, what is built on them, loops.
    family: BTreeSet<String>,
}

impl<'a> Subject<'a> {
    fn new(roots: &HostRoots, path: &'a Path, metadata: &Metadata) -> Option<Self> {
        if metadata.file_type().is_block_device() {
            let device = backing::sysfs_name(backing::device_numbers(metadata.rdev()));
            return Some(Self::device(roots, path, device));
        }
        let file = (metadata.dev(), metadata.ino());
        metadata.is_file().then(|| {
            let loops = roots.loops_on(file);
            let family = loops.iter().flat_map(|(_, dev)| roots.family(dev.clone())).collect();
            Self { path, device: None, file: Some(file), loops, family }
        })
    }

    fn device(roots: &HostRoots, path: &'a Path, device: String) -> Self {
        let family = roots.family(device.clone());
        Self { path, device: Some(device), file: None, loops: Vec::new(), family }
    }

    fn protected_by<'r>(&self, running: &'r [Running]) -> Option<&'r Running> {
        running.iter().find(|volume| {
            volume.backing == self.path
                || std::fs::metadata(&volume.backing).is_ok_and(|other| {
                    if other.file_type().is_block_device() {
                        let name = backing::sysfs_name(backing::device_numbers(other.rdev()));
                        self.device.as_ref() == Some(&name)
                    } else {
                        self.file == Some((other.dev(), other.ino()))
                    }
                })
        })
    }

    /// A volume that holds the same blocks: on its disk, on a partition of it, or below it.
    fn relative(&self, roots: &HostRoots, running: &[Running]) -> Option<Problem> {
        let device = self.device.as_ref();
        // A file lies on the device of its file system.
        let on_file_system = |(dev, _)| backing::sysfs_name(backing::device_numbers(dev));
        let lowest = device.cloned().or_else(|| self.file.map(on_file_system))?;
        let below = lineage::below(roots, &lowest);
        let disk = device.and_then(|device| lineage::disk_of(roots, device));
        running.iter().find_map(|volume| {
            let served = volume.device.as_deref().and_then(block_device);
            if served.is_some_and(|served| below.contains(&served)) {
                return Some(problem::on_protected(self.path, &volume.name));
            }
            let device = device?;
            let backing = block_device(&volume.backing)?;
            let is_part = lineage::disk_of(roots, &backing).as_ref() == Some(device);
            (is_part || disk.as_ref() == Some(&backing))
                .then(|| problem::overlaps(self.path, &volume.backing, &volume.name))
        })
    }

    /// Who uses it now.
    fn users(&self, roots: &HostRoots, name: &VolumeName, places: &OwnPlaces) -> Vec<Problem> {
        let mut found = Vec::new();
        let mounted = roots.mounted(&self.family);
        found.extend(mounted.iter().map(|at| problem::mounted(self.path, name, at)));
        if roots.swaps(&self.family, self.file) {
            found.push(problem::swap(self.path));
        }
        let disk = self.device.as_ref().and_then(|dev| lineage::disk_of(roots, dev));
        let mut holders = self.device.as_ref().map(|dev| roots.holders(dev)).unwrap_or_default();
        // What is built on the whole disk writes to its partitions, too.
        holders.extend(disk.map(|disk| roots.direct_holders(&disk)).unwrap_or_default());
        if !holders.is_empty() {
            found.push(problem::holders(self.path, &holders));
        }
        found.extend(self.loops.iter().map(|(name, _)| problem::loop_backing(self.path, name)));
        for (what, place) in
            [("the state directory", &places.state), ("the socket directory", &places.run)]
        {
            if self.carries(place, &mounted) {
                found.push(problem::own_files(self.path, what, place));
            }
        }
        found
    }

    /// Whether `place`, or the directory it will be made in, is on a file system on this device.
    fn carries(&self, place: &Path, mounted: &[String]) -> bool {
        let existing = place.ancestors().find_map(|p| std::fs::metadata(p).ok());
        let Some(number) = existing.map(|metadata| metadata.dev()) else { return false };
        // Some file systems (btrfs) have numbers of their own: compare with the mount points.
        self.family.contains(&backing::sysfs_name(backing::device_numbers(number)))
            || mounted.iter().any(|at| std::fs::metadata(at).is_ok_and(|m| m.dev() == number))
    }

    /// What it is, as far as it makes it unfit.
    fn nature(&self, roots: &HostRoots) -> Vec<Problem> {
        let mut found = Vec::new();
        let writable = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(self.path);
        if let Err(error) = &writable {
            let refusal = problem::cannot_open(self.path, error);
            // Busy is for the claim to find out.
            if error.raw_os_error() != Some(libc::EBUSY) {
                found.push(refusal);
            }
        }
        let file = writable.or_else(|_| File::open(self.path));
        if let Some(device) = &self.device {
            let directory = roots.directory(device);
            let marked = std::fs::read_to_string(directory.join("ro"));
            if marked.is_ok_and(|text| text.trim() == "1")
                && found.iter().all(|known| known.code.0 != 4017)
            {
                found.push(problem::read_only(self.path));
            }
            found.extend(backing::zoned(&directory).map(|model| problem::zoned(self.path, &model)));
        }
        if let Ok(file) = file {
            found.extend(self.size(&file));
        }
        found
    }

    fn size(&self, file: &File) -> Option<Problem> {
        let (bytes, logical) = if self.device.is_some() {
            let fd = file.as_fd();
            (info::block_size_bytes(fd).ok()?, info::block_units(fd).ok()?.0)
        } else {
            (file.metadata().ok()?.len(), backing::file_block_size(file))
        };
        problem::bad_size(self.path, bytes, logical)
    }
}

fn block_device(path: &Path) -> Option<String> {
    let metadata = std::fs::metadata(path).ok()?;
    let is_block = metadata.file_type().is_block_device();
    is_block.then(|| backing::sysfs_name(backing::device_numbers(metadata.rdev())))
}

#[cfg(test)]
mod tests;
