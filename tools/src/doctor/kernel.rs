//! Kernel: its release, ublk with its features, the NBD client, io_uring.

use std::io;

use super::finding::Finding;
use super::host::{Host, Module};

/// Features of ublk by bit, as `linux/ublk_cmd.h` names them.
const FEATURES: [&str; 20] = [
    "SUPPORT_ZERO_COPY",
    "URING_CMD_COMP_IN_TASK",
    "NEED_GET_DATA",
    "USER_RECOVERY",
    "USER_RECOVERY_REISSUE",
    "UNPRIVILEGED_DEV",
    "CMD_IOCTL_ENCODE",
    "USER_COPY",
    "ZONED",
    "USER_RECOVERY_FAIL_IO",
    "UPDATE_SIZE",
    "AUTO_BUF_REG",
    "QUIESCE",
    "PER_IO_DAEMON",
    "BUF_REG_OFF_DAEMON",
    "BATCH_IO",
    "INTEGRITY",
    "SAFE_STOP_DEV",
    "NO_AUTO_PART_SCAN",
    "SHMEM_ZC",
];

/// Without these a device is not made.
const NEEDED: [&str; 3] = ["USER_RECOVERY", "USER_RECOVERY_REISSUE", "CMD_IOCTL_ENCODE"];

const LOAD_UBLK: &str =
    "modprobe ublk_drv && echo ublk_drv > /etc/modules-load.d/farshore-ublk.conf";
const LOAD_NBD: &str = "modprobe nbd max_part=16 && echo 'options nbd max_part=16' > \
                        /etc/modprobe.d/farshore-nbd.conf && echo nbd > \
                        /etc/modules-load.d/farshore-nbd.conf";

/// Major, minor and patch of `6.12.107+deb13-amd64`.
fn version(release: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some((major, minor, numbers.next().and_then(Result::ok).unwrap_or(0)))
}

/// Kernels on which making a ublk device never ends: 6.18 before .6, and 6.17 as Ubuntu ships it.
fn hangs_in_ublk(release: &str) -> bool {
    match version(release) {
        Some((6, 18, patch)) => patch < 6,
        Some((6, 17, _)) => release.contains("-azure") || release.contains("-aws"),
        _ => false,
    }
}

/// The release.
pub fn release(host: &Host) -> Finding {
    let check = "kernel";
    match host.release() {
        Ok(release) if hangs_in_ublk(&release) && host.module("ublk_drv") != Module::Absent => {
            Finding::warning(
                check,
                format!("Linux {release} can hang while a ublk device is made"),
                "# install Linux 6.18.6 or later and reboot; until then protect with --attach nbd",
            )
        }
        Ok(release) => Finding::ok(check, format!("Linux {release}")),
        Err(e) => Finding::unseen(check, format!("no release: {e}"), "uname -r"),
    }
}

/// The ublk driver; `mask` asks it for its features.
pub fn ublk(host: &Host, mask: impl FnOnce() -> io::Result<u64>) -> Finding {
    let check = "ublk";
    let lost = "volumes become block devices by the kernel's NBD client, or none at all";
    match host.module("ublk_drv") {
        Module::Loaded => {}
        Module::Loadable => {
            return Finding::warning(
                check,
                format!("the module ublk_drv is not loaded; without it {lost}"),
                LOAD_UBLK,
            );
        }
        Module::Absent => {
            return Finding::warning(
                check,
                format!("this kernel has no ublk driver: {lost}"),
                "# install a kernel with CONFIG_BLK_DEV_UBLK (Debian 13 has it); some \
                 distributions keep it apart: apt install linux-modules-extra-$(uname -r)",
            );
        }
    }
    match mask() {
        Ok(mask) => features(check, mask),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Finding::unseen(
            check,
            "loaded; its features are told to root only",
            "sudo farshore doctor",
        ),
        Err(e) => Finding::warning(
            check,
            format!("loaded, but does not tell its features ({e}): {lost}"),
            "dmesg | grep -i ublk",
        ),
    }
}

fn features(check: &str, mask: u64) -> Finding {
    let name = |bit: usize| FEATURES.get(bit).map_or(format!("bit{bit}"), |n| (*n).to_owned());
    let has: Vec<String> = (0..64).filter(|bit| mask >> bit & 1 == 1).map(name).collect();
    let lacks = |name: &str| !has.iter().any(|h| h == name);
    let missing: Vec<&str> = NEEDED.into_iter().filter(|n| lacks(n)).collect();
    let found = if !missing.is_empty() {
        let missing = missing.join(", ");
        Finding::warning(
            check,
            format!(
                "mask {mask:#x} lacks {missing}: a restart of filterd would be an I/O error for \
                 programs, so ublk is not used"
            ),
            "# install Linux 6.4 or later and reboot",
        )
    } else if lacks("USER_COPY") {
        Finding::warning(
            check,
            format!("mask {mask:#x} lacks USER_COPY: each request is copied once more"),
            "# install Linux 6.5 or later and reboot",
        )
    } else if lacks("UPDATE_SIZE") {
        Finding::ok(
            check,
            format!("mask {mask:#x}; a grown disk needs detach and attach (no UPDATE_SIZE)"),
        )
    } else {
        Finding::ok(check, format!("mask {mask:#x}; everything that Farshore uses"))
    };
    found.with_details(has)
}

/// The kernel's NBD client, the second way to a block device.
pub fn nbd(host: &Host, ublk_is_there: bool) -> Finding {
    let check = "kernel nbd";
    let parameter = "/sys/module/nbd/parameters/max_part";
    let state = host.module("nbd");
    if state == Module::Loaded {
        let parts = host.read(parameter).ok().and_then(|t| t.parse::<u32>().ok());
        return match parts {
            Some(0) => Finding::warning(
                check,
                "loaded with max_part=0: partitions on a volume are not shown",
                format!("modprobe -r nbd && {LOAD_NBD}"),
            ),
            Some(n) => Finding::ok(check, format!("loaded, {n} partitions a device")),
            None => Finding::ok(check, "in the kernel"),
        };
    }
    let absent = state == Module::Absent;
    match (ublk_is_there, absent) {
        (true, _) => Finding::ok(check, "not loaded, and not needed beside ublk"),
        (false, false) => {
            Finding::warning(check, "not loaded: volumes would be NBD sockets only", LOAD_NBD)
        }
        (false, true) => Finding::warning(
            check,
            "not in this kernel, nor is ublk: a volume is an NBD socket, which programs such as \
             QEMU, fio and nbdfuse use directly",
            "# install a kernel with CONFIG_BLK_DEV_UBLK or CONFIG_BLK_DEV_NBD and reboot",
        ),
    }
}

/// io_uring; `works` tries to make a ring.
pub fn io_uring(host: &Host, works: impl FnOnce() -> bool) -> Finding {
    let check = "io_uring";
    if works() {
        return Finding::ok(check, "permitted");
    }
    let lost = "no ublk, and blocking calls for the disk";
    let disabled = host.read("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let seccomp = host.status_line("self", "Seccomp").is_some_and(|mode| mode != "0");
    let enable = "sysctl -w kernel.io_uring_disabled=0 && echo 'kernel.io_uring_disabled = 0' > \
                  /etc/sysctl.d/60-farshore.conf";
    match disabled.as_str() {
        "2" => Finding::warning(check, format!("switched off by sysctl: {lost}"), enable),
        "1" => Finding::unseen(
            check,
            "for privileged users only (sysctl), and this is another",
            "sudo farshore doctor",
        ),
        _ if seccomp => Finding::warning(
            check,
            format!("forbidden by a seccomp filter, as containers have one: {lost}"),
            "# allow io_uring_setup, io_uring_enter and io_uring_register in the container's \
             seccomp profile",
        ),
        _ => Finding::warning(
            check,
            format!("no ring can be made: {lost}"),
            "# install a kernel with CONFIG_IO_URING (5.10 or later) and reboot",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::super::host::fake::Machine;
    use super::*;

    fn with_ublk() -> Machine {
        let machine = Machine::with_kernel("6.12.107+deb13-amd64");
        machine.put("/sys/module/ublk_drv/refcnt", "0");
        machine
    }

    #[test]
    fn a_kernel_on_which_ublk_hangs_is_named_when_it_has_ublk() {
        for (release, hangs) in [
            ("6.18.5", true),
            ("6.18.4-arch1-1", true),
            ("6.18.6", false),
            ("6.17.0-1015-azure", true),
            ("6.17.0-9-generic", false),
            ("7.2.12", false),
            ("6.12.107+deb13-amd64", false),
        ] {
            let machine = Machine::with_kernel(release);
            assert_eq!(super::release(&machine.host).state, State::Ok, "{release}, no ublk");
            machine.put("/sys/module/ublk_drv/refcnt", "0");
            let expected = if hangs { State::Warning } else { State::Ok };
            assert_eq!(super::release(&machine.host).state, expected, "{release}");
        }
    }

    #[test]
    fn the_mask_is_decoded_by_name_and_what_is_missing_is_said() {
        let look = |mask| ublk(&with_ublk().host, || Ok(mask));
        let trixie = look(0x1fe);
        assert_eq!(trixie.state, State::Ok);
        assert!(trixie.text.contains("UPDATE_SIZE"), "{}", trixie.text);
        assert!(trixie.details.contains(&"USER_RECOVERY_REISSUE".to_owned()));
        assert!(!trixie.details.contains(&"SUPPORT_ZERO_COPY".to_owned()));
        let newest = look(0xf_ffff);
        assert_eq!((newest.state, newest.details.len()), (State::Ok, 20));
        let old = look(0x0e);
        assert_eq!(old.state, State::Warning);
        assert!(old.text.contains("USER_RECOVERY_REISSUE, CMD_IOCTL_ENCODE"), "{}", old.text);
        assert!(look(0x7e).text.contains("USER_COPY"));
        assert_eq!(look(1 << 40).details, ["bit40"]);
    }

    #[test]
    fn a_missing_driver_has_the_command_that_brings_it() {
        let machine = Machine::with_kernel("6.12.1");
        let never = || panic!("an absent driver is not asked");
        assert!(ublk(&machine.host, never).fix.unwrap().contains("CONFIG_BLK_DEV_UBLK"));
        machine.put("/lib/modules/6.12.1/modules.dep", "kernel/ublk_drv.ko.xz:\n");
        let never = || panic!("a driver that is not loaded is not asked");
        assert!(ublk(&machine.host, never).fix.unwrap().starts_with("modprobe ublk_drv"));
        let denied = || Err(io::ErrorKind::PermissionDenied.into());
        assert_eq!(ublk(&with_ublk().host, denied).state, State::Unseen);
        let silent = || Err(io::ErrorKind::TimedOut.into());
        assert_eq!(ublk(&with_ublk().host, silent).state, State::Warning);
    }

    #[test]
    fn kernel_nbd_is_needed_only_without_ublk_and_with_partitions() {
        let machine = Machine::with_kernel("6.12.1");
        assert_eq!(nbd(&machine.host, true).state, State::Ok);
        assert!(nbd(&machine.host, false).text.contains("nor is ublk"));
        machine.put("/usr/lib/modules/6.12.1/modules.dep", "kernel/nbd.ko.zst:\n");
        assert!(nbd(&machine.host, false).fix.unwrap().starts_with("modprobe nbd"));
        machine.put("/sys/module/nbd/parameters/max_part", "0\n");
        assert!(nbd(&machine.host, true).fix.unwrap().contains("max_part=16"));
        machine.put("/sys/module/nbd/parameters/max_part", "16\n");
        assert_eq!(nbd(&machine.host, false).state, State::Ok);
    }

    #[test]
    fn forbidden_io_uring_is_traced_to_what_forbids_it() {
        let machine = Machine::with_kernel("6.12.1");
        assert_eq!(io_uring(&machine.host, || true).state, State::Ok);
        assert!(io_uring(&machine.host, || false).fix.unwrap().contains("CONFIG_IO_URING"));
        machine.put("/proc/self/status", "Seccomp:\t2\n");
        assert!(io_uring(&machine.host, || false).text.contains("seccomp"));
        machine.put("/proc/sys/kernel/io_uring_disabled", "1\n");
        assert_eq!(io_uring(&machine.host, || false).state, State::Unseen);
        machine.put("/proc/sys/kernel/io_uring_disabled", "2\n");
        assert!(io_uring(&machine.host, || false).fix.unwrap().starts_with("sysctl -w"));
    }
}
