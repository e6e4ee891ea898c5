//! Kernel: its release, ublk with its features, the NBD client, io_uring.

use farshore_blkfilter::frontend::kernel_nbd::{self, Support};
use farshore_blkfilter::frontend::ublk::{Features, Unavailable};

use super::finding::Finding;
use super::host::{Host, Module};

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

/// The ublk driver; `features` asks it what it can do.
pub fn ublk(host: &Host, features: impl FnOnce() -> Result<Features, Unavailable>) -> Finding {
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
    let unusable = |why: &Unavailable, fix: &str| {
        Finding::warning(check, format!("not usable, so {lost}: {why}"), fix)
    };
    match features() {
        Ok(features) => usable(check, features),
        Err(Unavailable::NotPermitted) => Finding::unseen(
            check,
            "loaded; its features are told to root only",
            "sudo farshore doctor",
        ),
        Err(why @ Unavailable::NoDriver) => unusable(&why, LOAD_UBLK),
        Err(why @ Unavailable::Missing { .. }) => {
            unusable(&why, "# install Linux 6.5 or later and reboot")
        }
        Err(why @ Unavailable::NoIoUring(_)) => {
            unusable(&why, "sysctl -w kernel.io_uring_disabled=0")
        }
        Err(why @ (Unavailable::Hangs | Unavailable::Failed(_))) => {
            unusable(&why, "dmesg | grep -i ublk")
        }
    }
}

fn usable(check: &str, features: Features) -> Finding {
    let mask = features.bits();
    let found = if !features.user_copy() {
        Finding::warning(
            check,
            format!("mask {mask:#x} lacks USER_COPY: each request is copied once more"),
            "# install Linux 6.5 or later and reboot",
        )
    } else if features.update_size() {
        Finding::ok(check, format!("mask {mask:#x}: everything that Farshore uses"))
    } else {
        Finding::ok(
            check,
            format!("mask {mask:#x}; a grown disk needs detach and attach (no UPDATE_SIZE)"),
        )
    };
    found.with_details(features.names().into_iter().map(str::to_owned).collect())
}

/// The kernel's NBD client, the second way to a block device.
pub fn nbd(
    host: &Host,
    ublk_is_there: bool,
    client: impl FnOnce() -> Result<Support, kernel_nbd::Unavailable>,
) -> Finding {
    let check = "kernel nbd";
    if host.module("nbd") == Module::Loadable {
        // Asking would load it.
        return Finding::ok(check, "not loaded; the kernel loads it when it is needed");
    }
    match client() {
        Ok(Support { max_part: 0 }) => Finding::warning(
            check,
            "loaded with max_part=0: partitions on a volume are not shown",
            format!("modprobe -r nbd && {LOAD_NBD}"),
        ),
        Ok(Support { max_part }) => Finding::ok(check, format!("{max_part} partitions a device")),
        Err(_) if ublk_is_there => Finding::ok(check, "not usable now, and not needed beside ublk"),
        Err(missing) => Finding::warning(
            check,
            format!(
                "{}, and there is no ublk: a volume is an NBD socket, which programs such as QEMU, \
                 fio and nbdfuse use directly",
                missing.why
            ),
            if missing.remedy.is_empty() {
                "# install a kernel with CONFIG_BLK_DEV_UBLK or CONFIG_BLK_DEV_NBD".to_owned()
            } else {
                format!("# {}", missing.remedy)
            },
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
        let look = |mask| ublk(&with_ublk().host, || Features::of(mask));
        let trixie = look(0x1fe);
        assert_eq!(trixie.state, State::Ok);
        assert!(trixie.text.contains("0x1fe") && trixie.text.contains("UPDATE_SIZE"));
        assert!(trixie.details.contains(&"USER_RECOVERY_REISSUE".to_owned()));
        assert!(!trixie.details.contains(&"SUPPORT_ZERO_COPY".to_owned()));
        let newest = look(0xf_ffff);
        assert_eq!((newest.state, newest.details.len()), (State::Ok, 20));
        let old = look(0x0e);
        assert_eq!(old.state, State::Warning);
        assert!(old.text.contains("USER_RECOVERY_REISSUE"), "{}", old.text);
        assert!(look(0x7e).text.contains("USER_COPY"));
    }

    #[test]
    fn a_missing_driver_has_the_command_that_brings_it() {
        let machine = Machine::with_kernel("6.12.1");
        let never = || panic!("an absent driver is not asked");
        assert!(ublk(&machine.host, never).fix.unwrap().contains("CONFIG_BLK_DEV_UBLK"));
        machine.put("/lib/modules/6.12.1/modules.dep", "kernel/ublk_drv.ko.xz:\n");
        let never = || panic!("a driver that is not loaded is not asked");
        assert!(ublk(&machine.host, never).fix.unwrap().starts_with("modprobe ublk_drv"));
        let look = |why| ublk(&with_ublk().host, || Err(why)).state;
        assert_eq!(look(Unavailable::NotPermitted), State::Unseen);
        assert_eq!(look(Unavailable::Hangs), State::Warning);
    }

    #[test]
    fn kernel_nbd_is_needed_only_without_ublk_and_with_partitions() {
        let machine = Machine::with_kernel("6.12.1");
        let missing = || {
            let (why, remedy) = ("no module nbd".to_owned(), "modprobe nbd".to_owned());
            Err(kernel_nbd::Unavailable { why, remedy })
        };
        assert_eq!(nbd(&machine.host, true, missing).state, State::Ok);
        assert!(nbd(&machine.host, false, missing).text.contains("no module nbd, and there"));
        let parts = |max_part| nbd(&machine.host, true, || Ok(Support { max_part }));
        assert!(parts(0).fix.unwrap().contains("max_part=16"));
        assert_eq!(parts(16).state, State::Ok);
        machine.put("/usr/lib/modules/6.12.1/modules.dep", "kernel/nbd.ko.zst:\n");
        let never = || panic!("asking would load it");
        assert_eq!(nbd(&machine.host, false, never).state, State::Ok);
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
