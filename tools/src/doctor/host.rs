//! What the checks see of the machine: its files under one root (another one in tests), the user.

use std::io;
use std::path::{Path, PathBuf};

/// Files of the machine.
#[derive(Debug, Clone)]
pub struct Host {
    /// `/`
    root: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self { root: "/".into() }
    }
}

/// Bits of the effective capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// `CAP_IPC_LOCK`
    IpcLock = 14,
    /// `CAP_SYS_ADMIN`
    SysAdmin = 21,
    /// `CAP_SYS_RESOURCE`
    SysResource = 24,
}

impl Host {
    /// Where a file of the machine lies.
    pub fn path(&self, absolute: &str) -> PathBuf {
        self.root.join(absolute.trim_start_matches('/'))
    }

    /// Its text without blanks around it.
    pub fn read(&self, absolute: &str) -> io::Result<String> {
        Ok(std::fs::read_to_string(self.path(absolute))?.trim().to_owned())
    }

    /// Whether there is something.
    pub fn has(&self, absolute: &str) -> bool {
        self.path(absolute).exists()
    }

    /// `6.12.107+deb13-amd64`.
    pub fn release(&self) -> io::Result<String> {
        self.read("/proc/sys/kernel/osrelease")
    }

    /// Where a kernel module stands; `name` as in its file.
    pub fn module(&self, name: &str) -> Module {
        let folder = name.replace('-', "_");
        let release = self.release().unwrap_or_default();
        let listed = |list: &str| {
            let lists = ["/lib/modules", "/usr/lib/modules"];
            let texts =
                lists.iter().filter_map(|l| self.read(&format!("{l}/{release}/{list}")).ok());
            texts.flat_map(|text| module_names(&text)).any(|found| found == folder)
        };
        if self.has(&format!("/sys/module/{folder}")) || listed("modules.builtin") {
            Module::Loaded
        } else if listed("modules.dep") {
            Module::Loadable
        } else {
            Module::Absent
        }
    }

    /// Whether a process has a capability; none when the kernel does not show it.
    pub fn capable(&self, process: &str, capability: Capability) -> Option<bool> {
        let hex = self.status_line(process, "CapEff")?;
        let bits = u64::from_str_radix(&hex, 16).ok()?;
        Some(bits >> (capability as u32) & 1 == 1)
    }

    /// A field of `/proc/PROCESS/status`.
    pub fn status_line(&self, process: &str, field: &str) -> Option<String> {
        let status = self.read(&format!("/proc/{process}/status")).ok()?;
        let line = status.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'))?;
        Some(line.trim().to_owned())
    }
}

/// Where a kernel module stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Module {
    /// In the kernel now.
    Loaded,
    /// `modprobe` finds it.
    Loadable,
    /// Not on this machine.
    Absent,
}

/// Names of the modules in a `modules.dep` or `modules.builtin`: `kernel/drivers/block/nbd.ko.xz: …`.
fn module_names(list: &str) -> Vec<String> {
    let name = |line: &str| {
        let path = line.split(':').next().unwrap_or_default();
        let file = Path::new(path).file_name()?.to_str()?;
        Some(file.split('.').next().unwrap_or_default().replace('-', "_"))
    };
    list.lines().filter_map(name).collect()
}

/// A machine made of files.
#[cfg(test)]
pub mod fake {
    use super::*;

    /// A machine whose files are put there one by one.
    pub struct Machine {
        /// As the checks see it.
        pub host: Host,
        dir: tempfile::TempDir,
    }

    impl Machine {
        /// With kernel `release` and nothing else.
        pub fn with_kernel(release: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let machine = Self { host: Host { root: dir.path().to_owned() }, dir };
            machine.put("/proc/sys/kernel/osrelease", release);
            machine
        }

        /// A file.
        pub fn put(&self, path: &str, text: &str) -> &Self {
            let path = self.dir.path().join(path.trim_start_matches('/'));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
            self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_found_loaded_built_in_loadable_or_not_at_all() {
        let machine = fake::Machine::with_kernel("6.12.1");
        assert_eq!(machine.host.module("ublk_drv"), Module::Absent);
        let dep =
            "kernel/drivers/block/ublk_drv.ko.xz:\nkernel/drivers/block/nbd.ko: kernel/a.ko\n";
        machine.put("/lib/modules/6.12.1/modules.dep", dep);
        assert_eq!(machine.host.module("ublk_drv"), Module::Loadable);
        machine.put("/lib/modules/6.12.1/modules.builtin", "kernel/drivers/block/nbd.ko\n");
        assert_eq!(machine.host.module("nbd"), Module::Loaded);
        machine.put("/sys/module/ublk_drv/refcnt", "0");
        assert_eq!(machine.host.module("ublk_drv"), Module::Loaded);
        assert_eq!(machine.host.module("a"), Module::Absent, "a dependency is no entry");
    }

    #[test]
    fn capabilities_are_read_from_the_kernels_mask() {
        let machine = fake::Machine::with_kernel("6.12.1");
        assert_eq!(machine.host.capable("7", Capability::SysAdmin), None);
        machine.put("/proc/7/status", "Name:\tx\nCapEff:\t0000000000204000\n");
        assert_eq!(machine.host.capable("7", Capability::SysAdmin), Some(true));
        assert_eq!(machine.host.capable("7", Capability::IpcLock), Some(true));
        assert_eq!(machine.host.capable("7", Capability::SysResource), Some(false));
    }
}
