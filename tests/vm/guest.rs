//! What a case uses inside of the machine.
#![allow(dead_code)] // each case uses its part

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::harness::{run, wait_for};

/// On the kernel's command line of every test machine.
pub const CMDLINE_MARK: &str = "farshore.vm=1";
/// The folder shared with the host.
const OUT: &str = "/vm/out";
/// Variables of the host that the cases obey as well.
const PASSED_ON: [&str; 5] =
    ["FARSHORE_BIN", "FARSHORE_SOAK", "FARSHORE_KILLS", "FARSHORE_ROUNDS", "RUST_BACKTRACE"];

/// Whether this is one of our machines: cases take disks for their own, so nowhere else.
pub fn inside() -> bool {
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    cmdline.split_whitespace().any(|w| w == CMDLINE_MARK)
}

/// Shell lines that set the variables that are passed on.
pub fn environment() -> String {
    let lines = PASSED_ON.iter().filter_map(|name| {
        let value = std::env::var(name).ok()?.replace('\'', r"'\''");
        Some(format!("export {name}='{value}'\n"))
    });
    lines.collect()
}

/// Loads a kernel module with all it needs.
pub fn load(module: &str) {
    run("modprobe", &[module]);
}

/// The device of a disk of the group, by its name.
///
/// # Panics
/// If there is none: a case never goes on with a path that is not a block device.
pub fn disk(name: &str) -> PathBuf {
    let all = fs::read_dir("/sys/block").expect("/sys/block");
    for entry in all.flatten() {
        let serial = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        if serial.trim() == name {
            return block_device(&Path::new("/dev").join(entry.file_name()));
        }
    }
    panic!("the machine has no disk {name}: list it in the group");
}

/// `path`, which must be a block device: fio and mkfs would gladly make a plain file of that name.
pub fn block_device(path: &Path) -> PathBuf {
    let kind = fs::metadata(path).map(|m| m.file_type());
    assert!(
        kind.as_ref().is_ok_and(FileTypeExt::is_block_device),
        "{} is not a block device: {kind:?}",
        path.display()
    );
    path.to_owned()
}

/// Waits until `path` is a block device.
pub fn wait_block_device(path: &Path) -> PathBuf {
    wait_for(&format!("the device {}", path.display()), Duration::from_secs(60), || {
        fs::metadata(path).ok().filter(|m| m.file_type().is_block_device())
    });
    block_device(path)
}

/// Starts udevd and waits until it has seen every block device.
pub fn start_udev() {
    let daemon = ["/usr/lib/systemd/systemd-udevd", "/lib/systemd/systemd-udevd"];
    let daemon = daemon.iter().find(|p| Path::new(p).exists()).expect("udev: ./tools/test has it");
    run(daemon, &["--daemon"]);
    run("udevadm", &["trigger", "--subsystem-match=block"]);
    run("udevadm", &["settle"]);
}

/// A file of the folder shared with the host, `Machine::out` there. What is written to it survives a
/// cut.
pub fn shared(name: &str) -> PathBuf {
    Path::new(OUT).join(name)
}

/// Tells the host something: `Machine::wait_signal` sees it.
pub fn signal(name: &str) {
    fs::write(shared(&format!("signal-{name}")), b"").expect("signal");
}

/// Whether the host has told it.
pub fn signalled(name: &str) -> bool {
    shared(&format!("signal-{name}")).exists()
}

/// Waits for `Machine::signal`.
pub fn wait_signal(name: &str, limit: Duration) {
    wait_for(&format!("the signal {name}"), limit, || signalled(name).then_some(()));
}

/// Stays until the power is cut.
pub fn wait_for_the_cut() -> ! {
    signal("cut");
    loop {
        std::thread::park();
    }
}
