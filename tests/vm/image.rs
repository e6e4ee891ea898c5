//! What a machine boots: the kernel that tools/vm-kernel fetches, an initramfs made of busybox,
//! `init` and a few modules, and its disks.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Modules without which the machine cannot reach its root; the rest is there for modprobe.
const BOOT_MODULES: [&str; 3] = ["9pnet_virtio", "9p", "overlay"];

/// A kernel as tools/vm-kernel leaves it.
#[derive(Clone, Debug)]
pub struct Kernel {
    dir: PathBuf,
}

impl Kernel {
    /// Fetches it unless it is there already.
    ///
    /// # Errors
    /// Why this machine cannot have it.
    pub fn fetch(version: &str) -> Result<Self, String> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/vm-kernel");
        let out = Command::new(&script).arg(version).output().map_err(|e| e.to_string())?;
        if !out.status.success() {
            return Err(String::from_utf8_lossy(&out.stderr).trim().replace('\n', "; "));
        }
        Ok(Self { dir: PathBuf::from(String::from_utf8_lossy(&out.stdout).trim()) })
    }

    pub fn image(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    pub fn modules(&self) -> PathBuf {
        self.dir.join("modules")
    }

    /// Files of the boot modules and what they need, in the order in which they are loaded.
    fn boot_modules(&self) -> Vec<PathBuf> {
        let list = fs::read_to_string(self.modules().join("modules.dep")).expect("modules.dep");
        let mut order: Vec<PathBuf> = Vec::new();
        for name in BOOT_MODULES {
            // "FILE: what it needs, direct and indirect, last one first". Built-in ones are missing.
            let Some((file, needs)) =
                list.lines().filter_map(|l| l.split_once(':')).find(|(f, _)| {
                    Path::new(f).file_name().is_some_and(|n| n == format!("{name}.ko").as_str())
                })
            else {
                continue;
            };
            for file in needs.split_whitespace().rev().chain([file]) {
                let file = self.modules().join(file);
                if !order.contains(&file) {
                    order.push(file);
                }
            }
        }
        order
    }

    /// Writes the initramfs (a cpio archive, not compressed: that boots faster).
    pub fn write_initramfs(&self, to: &Path) {
        let mut archive = Cpio::default();
        for dir in ["bin", "dev", "proc", "sys", "host", "overlay", "root", "modules"] {
            archive.add(dir, 0o040_755, &[]);
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().find_map(|p| fs::read(p).ok());
        archive.add("bin/busybox", 0o100_755, &busybox.expect("busybox: ./tools/test installs it"));
        archive.add("init", 0o100_755, include_bytes!("init"));
        for (number, file) in self.boot_modules().iter().enumerate() {
            let name = file.file_name().and_then(|n| n.to_str()).expect("a module's name");
            let content = fs::read(file).expect("module");
            archive.add(&format!("modules/{number:02}-{name}"), 0o100_644, &content);
        }
        archive.add("TRAILER!!!", 0, &[]);
        File::create(to).and_then(|mut f| f.write_all(&archive.bytes)).expect("initramfs");
    }
}

/// Archive in the "newc" format of the kernel's Documentation/driver-api/early-userspace.
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
}

impl Cpio {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(content.len()).expect("below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("short");
        // inode, mode, uid, gid, links, mtime, size, device (4 numbers), length of the name, check
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes().chain([0]));
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A disk of a machine; the case finds it by `guest::disk(name)`.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Its serial number in the machine; at most 20 letters.
    pub name: &'static str,
    pub bytes: u64,
    /// Logical and physical block size.
    pub blocks: (u32, u32),
    pub discard: bool,
    /// What a power cut leaves of what was written.
    pub cache: Cache,
}

/// What a disk does with what is written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Keeps it.
    Kept,
    /// Loses in a power cut what was not flushed.
    Volatile,
    /// Loses everything in a power cut: it answers a flush and does nothing.
    Lying,
}

impl Disk {
    /// 512-byte blocks, discard, and a cache that keeps its content.
    pub const fn new(name: &'static str, mib: u64) -> Self {
        Self { name, bytes: mib << 20, blocks: (512, 512), discard: true, cache: Cache::Kept }
    }

    pub const fn blocks(self, logical: u32, physical: u32) -> Self {
        Self { blocks: (logical, physical), ..self }
    }

    pub const fn without_discard(self) -> Self {
        Self { discard: false, ..self }
    }

    pub const fn volatile(self) -> Self {
        Self { cache: Cache::Volatile, ..self }
    }

    pub const fn lying(self) -> Self {
        Self { cache: Cache::Lying, ..self }
    }
}

/// The file system at /vm/scratch: where the daemons of a case keep their files. Every machine has it;
/// one whose disks include `SCRATCH.volatile()` has that.
pub const SCRATCH: Disk = Disk::new("scratch", 6144);

/// The image of a disk in `dir`, made when it is not there yet: content outlives the machine.
pub fn disk_image(dir: &Path, disk: &Disk) -> PathBuf {
    let path = dir.join(format!("{}.img", disk.name));
    if !path.exists() {
        File::create(&path).and_then(|f| f.set_len(disk.bytes)).expect("disk image");
        if disk.name == SCRATCH.name {
            crate::harness::run("mkfs.ext4", &["-q", "-F", path.to_str().expect("UTF-8")]);
        }
    }
    path
}
