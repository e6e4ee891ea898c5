//! What the kernel tells of its NBD devices under `/sys`.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::device::DeviceInfo;

/// What the identifier begins with in the kernel's eyes, so that people see whose device it is
/// and no other program's identifier is ever taken for ours.
const OURS: &str = "farshore:";

/// The kernel's identifier of our device `identifier`.
pub fn backend_of(identifier: &str) -> String {
    format!("{OURS}{identifier}")
}

/// The files of the NBD devices.
#[derive(Debug, Clone)]
pub struct Sysfs(PathBuf);

impl Default for Sysfs {
    fn default() -> Self {
        Self("/sys".into())
    }
}

impl Sysfs {
    /// Other files than the kernel's.
    #[cfg(test)]
    pub fn at(root: &std::path::Path) -> Self {
        Self(root.to_owned())
    }

    fn device(&self, number: u32) -> PathBuf {
        self.0.join(format!("block/nbd{number}"))
    }

    fn read(&self, number: u32, file: &str) -> Option<String> {
        let text = fs::read_to_string(self.device(number).join(file)).ok()?;
        Some(text.trim_end_matches('\n').to_owned())
    }

    fn number_in(&self, number: u32, file: &str) -> Option<u64> {
        self.read(number, file)?.trim().parse().ok()
    }

    /// Whether the device is attached, or disconnected but still open: it then has a `pid`.
    ///
    /// # Errors
    /// Of looking.
    pub fn try_configured(&self, number: u32) -> io::Result<bool> {
        self.device(number).join("pid").try_exists()
    }

    /// The same for devices that are known to be ours.
    pub fn is_configured(&self, number: u32) -> bool {
        self.try_configured(number).unwrap_or(false)
    }

    /// Our identifier of an attached device; `None` when it is not ours.
    pub fn identifier(&self, number: u32) -> Option<String> {
        let ours = self.is_configured(number).then(|| self.read(number, "backend")).flatten()?;
        ours.strip_prefix(OURS).map(str::to_owned)
    }

    /// Whose a device is, for people.
    pub fn owner(&self, number: u32) -> String {
        let backend = self.read(number, "backend").filter(|backend| !backend.is_empty());
        let pid = self.read(number, "pid");
        match (backend, pid) {
            (Some(backend), _) => format!("\"{backend}\""),
            (None, Some(pid)) => format!("process {pid}"),
            (None, None) => "somebody".to_owned(),
        }
    }

    /// The device attached as `identifier`, whatever its number.
    pub fn find(&self, identifier: &str) -> Option<u32> {
        let entries = fs::read_dir(self.0.join("block")).ok()?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut numbers = names.filter_map(|name| name.strip_prefix("nbd")?.parse().ok());
        numbers.find(|&number| self.identifier(number).as_deref() == Some(identifier))
    }

    /// How many connections the device was attached with: it has a queue for each.
    pub fn connections(&self, number: u32) -> u16 {
        let queues = fs::read_dir(self.device(number).join("mq"));
        let count = queues.map_or(0, |queues| queues.filter_map(Result::ok).count());
        u16::try_from(count).unwrap_or(1).max(1)
    }

    /// Size in bytes.
    pub fn size(&self, number: u32) -> Option<u64> {
        self.number_in(number, "size").map(|sectors| sectors << 9)
    }

    /// `major:minor`.
    pub fn device_number(&self, number: u32) -> Option<String> {
        self.read(number, "dev")
    }

    /// Whether the kernel was told of a volatile cache, so that it sends FLUSH.
    pub fn has_cache(&self, number: u32) -> bool {
        self.read(number, "queue/write_cache").is_some_and(|cache| cache == "write back")
    }

    /// What the kernel believes of an attached device that is true no more and that it cannot be
    /// told again; `None` when it may go on.
    pub fn contradiction(&self, number: u32, info: &DeviceInfo) -> Option<String> {
        let told = |file: &str| self.number_in(number, file).unwrap_or(0);
        let block = told("queue/logical_block_size");
        if block != u64::from(info.blocks.logical()) {
            return Some(format!("logical block size ({block}, now {})", info.blocks.logical()));
        }
        if told("ro") == 0 && info.read_only {
            return Some("mode (writable, now read-only)".to_owned());
        }
        if told("queue/write_zeroes_max_bytes") > 0 && !info.zeroes {
            return Some("zeroing (possible, now not)".to_owned());
        }
        None
    }

    /// How long a request is outstanding before the kernel looks at it.
    pub fn request_timer(&self, number: u32) -> Option<Duration> {
        self.number_in(number, "queue/io_timeout").map(Duration::from_millis)
    }

    /// Sets it. Since Linux 6.11 every write to a queue's file waits for all requests in flight.
    ///
    /// # Errors
    /// Of the file.
    pub fn set_request_timer(&self, number: u32, period: Duration) -> io::Result<()> {
        let file = self.device(number).join("queue/io_timeout");
        fs::write(file, period.as_millis().to_string())
    }

    /// How many partitions a device may have; `None` when the module is not there.
    pub fn max_part(&self) -> Option<u32> {
        let text = fs::read_to_string(self.0.join("module/nbd/parameters/max_part")).ok()?;
        text.trim().parse().ok()
    }
}
