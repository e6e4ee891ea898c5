//! A host that systemd starts and stops, with `/var` on a disk of its own and the shipped units and
//! rule: a protected volume is served before it is mounted from fstab, keeps its mount when filterd
//! is killed or restarted, and is unmounted while filterd serves it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use farshore_extent::PairState;
use farshore_protocol::admin::{TargetReply, TargetRequest};
use farshore_protocol::paths::Paths;

use crate::harness::{ask, farshore_bin, run, said, wait_for};
use crate::image::Disk;
use crate::runner::{Lab, STABLE};
use crate::{Case, Scenario, case_list, guest};

pub const SCENARIO: Scenario = Scenario {
    name: "systemd::volumes_of_fstab_outlive_filterd_and_shutdowns_are_clean",
    kernel: STABLE,
    soak: false,
    run: volumes_of_fstab_outlive_filterd_and_shutdowns_are_clean,
};

pub const STEPS: &[Case] =
    case_list![set_up, kill_and_restart_filterd, look_after_the_boot, go_without_var, shut_down];

const DISKS: &[Disk] = &[Disk::new("data", 64), Disk::new("var", 256)];
const LIMIT: Duration = Duration::from_secs(180);
/// As docs/devices.md has it.
const FSTAB: &str = "/dev/farshore/data /srv ext4 \
                     defaults,_netdev,x-systemd.after=farshore-filterd.service 0 2";

fn volumes_of_fstab_outlive_filterd_and_shutdowns_are_clean(lab: &Lab) -> Result<(), String> {
    let mut machine = lab.boot_systemd("host", DISKS, &root("", "true"))?;
    machine.run_case("systemd::set_up", LIMIT)?;
    machine.run_case("systemd::kill_and_restart_filterd", LIMIT)?;
    machine.start_case("systemd::shut_down", LIMIT);
    let data = machine.out().with_file_name("data.img");
    let said = machine.wait_off(LIMIT)?;
    // "[  OK  ] Unmounted srv.mount - /srv.", then the last word of filterd.
    let place = |text: &str| said.rfind(text).ok_or(format!("{text} is missing in\n{said}"));
    if place("Unmounted srv.mount")? > place("stopped clean")? {
        return Err(format!("filterd was stopped before the unmount:\n{said}"));
    }
    assert_unmounted_in_order(&data)?;

    let enable = "systemctl enable farshore-filterd farshore-agent farshore-target";
    let mut machine = lab.boot_systemd("host", DISKS, &root(FSTAB, enable))?;
    machine.run_case("systemd::look_after_the_boot", LIMIT)?;
    machine.run_case("systemd::go_without_var", LIMIT)?;
    machine.start_case("systemd::shut_down", LIMIT);
    let said = machine.wait_off(LIMIT)?;
    // What a reboot leaves of CLEAN: not "had not stopped in order".
    if !said.contains("changed while filterd was stopped") {
        return Err(format!("the record was not clean:\n{said}"));
    }
    assert_unmounted_in_order(&data)
}

/// ext4 knows whether its unmount reached the disk.
fn assert_unmounted_in_order(image: &Path) -> Result<(), String> {
    let head = said(&run("dumpe2fs", &["-h", image.to_str().expect("UTF-8")]));
    let clean = head.contains("clean") && !head.contains("needs_recovery");
    if clean { Ok(()) } else { Err(format!("the file system was not unmounted:\n{head}")) }
}

/// The script that makes the root of the system: executable, units, rule, fstab. What the host has
/// in /etc/farshore is kept on the disk of /var meanwhile.
fn root(fstab: &str, finish: &str) -> String {
    let bin = farshore_bin().canonicalize().expect("the executable");
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools");
    let (bin, tools) = (bin.display(), tools.display());
    format!(
        r#"set -eux
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
modprobe -a virtio_blk ext4
var=$(grep -lx var /sys/block/vd*/serial)
var=/dev/$(basename "${{var%/serial}}")
mkdir -p /etc/farshore /mnt
blkid $var || mkfs.ext4 -q $var
mount $var /mnt
[ ! -e /mnt/etc ] || cp -a /mnt/etc/. /etc/farshore/
umount /mnt
rm -rf /etc/systemd/system/*.wants
# A copy: the units do not see /tmp and /home, where it may be.
cp '{bin}' /usr/bin/farshore
cp '{tools}'/systemd/*.service /etc/systemd/system/
cp '{tools}'/udev/61-farshore.rules /etc/udev/rules.d/
printf '%s\n' '/dev/disk/by-id/virtio-var /var ext4 defaults 0 0' '{fstab}' > /etc/fstab
cd /etc/systemd/system
rm -f /.dockerenv /run/.containerenv
# Slow here: it would clean up the /tmp of the host that runs the tests.
ln -s /dev/null systemd-tmpfiles-setup.service
# As little as can be beside it: one slow CPU has to start it all.
for unit in systemd-logind systemd-binfmt systemd-hwdb-update systemd-journal-catalog-update dbus nbd-server postgresql \
    console-getty serial-getty@ttyS0; do
    ln -sf /dev/null $unit.service
done
echo 'pool = "16MiB"' > /etc/farshore/filterd.toml
cat > farshore-test.service <<'END'
[Service]
Environment=HOME=/root
ExecStart=/bin/bash /vm/init steps
END
cat > farshore-test.target <<'END'
[Unit]
Requires=basic.target
Wants=remote-fs.target farshore-test.service
After=basic.target remote-fs.target
AllowIsolate=yes
END
mkdir farshore-filterd.service.d farshore-target.service.d
# The journal ends before it does.
printf '[Service]\nStandardError=file:/dev/console\n' > farshore-filterd.service.d/log.conf
# It stands for another host: it is there before the agent and goes after it.
printf '[Unit]\nBefore=farshore-agent.service\n' > farshore-target.service.d/host.conf
ln -s farshore-test.target multi-user.target
{finish}
"#
    )
}

fn systemctl(args: &[&str]) -> String {
    let out = Command::new("systemctl").args(args).output().expect("systemctl");
    if !out.status.success() {
        let journal = said(&run("journalctl", &["-b", "--no-pager", "-n", "60"]));
        panic!("systemctl {args:?}: {}\n{journal}", said(&out));
    }
    said(&out).trim().to_owned()
}

fn property(unit: &str, name: &str) -> String {
    systemctl(&["show", "--value", "--property", name, unit])
}

fn farshore(args: &[&str]) -> String {
    said(&run("farshore", args))
}

fn wait_protected() {
    let socket = Paths::system().target_socket();
    wait_for("protection", Duration::from_secs(120), || {
        let Ok(TargetReply::Status(all)) = ask(&socket, &TargetRequest::Status) else {
            return None;
        };
        all.iter().any(|r| r.state == PairState::Protected && r.points > 0).then_some(())
    });
}

/// The line of /srv in the kernel's table: a mount that was made again has another number.
fn mounted() -> String {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let line = table.lines().find(|l| l.contains(" /srv "));
    line.unwrap_or_else(|| panic!("/srv is not mounted:\n{table}")).to_owned()
}

fn write(name: &str) {
    let path = format!("/srv/{name}");
    fs::write(&path, name).and_then(|()| fs::File::open(&path)?.sync_all()).expect("a file");
}

fn set_up() {
    farshore(&["target", "init", "--listen", "127.0.0.1:7700", "--name", "127.0.0.1"]);
    systemctl(&["start", "farshore-target"]);
    let token = ["token", "create", "--for", "db1", "--address", "127.0.0.1:7700"];
    let token = wait_for("a token", Duration::from_secs(60), || {
        let out = Command::new("farshore").args(token).output().expect("farshore");
        said(&out).split_whitespace().find(|w| w.starts_with("fs1.")).map(str::to_owned)
    });
    farshore(&["enroll", &token]);
    systemctl(&["start", "farshore-filterd", "farshore-agent"]);
    let protect = ["protect", "/dev/disk/by-id/virtio-data", "--name", "data", "--policy", "1s"];
    farshore(&[&protect[..], &["--attach", "ublk", "--yes"]].concat());
    let device = guest::wait_block_device(Path::new("/dev/farshore/data"));
    run("mkfs.ext4", &["-q", device.to_str().expect("UTF-8")]);
    let table = fs::read_to_string("/etc/fstab").expect("fstab");
    fs::write("/etc/fstab", format!("{table}{FSTAB}\n")).expect("fstab");
    systemctl(&["daemon-reload"]);
    systemctl(&["start", "srv.mount"]);
    write("first");
    wait_protected();
    run("cp", &["-a", "/etc/farshore", "/var/etc"]);
}

fn kill_and_restart_filterd() {
    let before = mounted();
    let again = |how: &[&str]| {
        let pid = property("farshore-filterd", "MainPID");
        systemctl(how);
        wait_for("the next filterd", Duration::from_secs(60), || {
            let next = property("farshore-filterd", "MainPID");
            let runs = property("farshore-filterd", "ActiveState") == "active";
            (runs && next != pid && next != "0").then_some(())
        });
        write(how[0]);
        assert_eq!(mounted(), before, "it was mounted again after {how:?}");
    };
    again(&["kill", "--signal=KILL", "farshore-filterd"]);
    again(&["restart", "farshore-filterd"]);
    wait_protected();
}

fn look_after_the_boot() {
    wait_for("the mount", Duration::from_secs(150), || {
        (property("srv.mount", "ActiveState") == "active").then_some(())
    });
    assert!(mounted().contains("ublkb"), "{}", mounted());
    for name in ["first", "kill", "restart"] {
        assert_eq!(fs::read_to_string(format!("/srv/{name}")).expect(name), name);
    }
    let began = |unit| property(unit, "ActiveEnterTimestampMonotonic").parse::<u64>().expect(unit);
    assert!(began("var.mount") < began("farshore-filterd"), "its state was there before");
    assert!(began("farshore-filterd") < began("srv.mount"), "it served before the mount");
    wait_protected();
}

/// A start without the state directory must fail, not serve nothing; then a mount by hand, which
/// the shutdown has to wait for as well.
fn go_without_var() {
    systemctl(&["stop", "srv.mount", "farshore-agent", "farshore-target", "farshore-filterd"]);
    systemctl(&["stop", "var.mount"]);
    assert!(!Path::new("/var/lib/farshore").exists());
    let out = Command::new("farshore").arg("filterd").output().expect("farshore");
    assert!(!out.status.success() && said(&out).contains("FS-2039"), "{}", said(&out));
    assert!(!Path::new("/var/lib/farshore").exists(), "nothing is begun anew there");
    systemctl(&["start", "farshore-filterd"]);
    run("mountpoint", &["/var"]);
    let device = guest::wait_block_device(Path::new("/dev/farshore/data"));
    run("mount", &[device.to_str().expect("UTF-8"), "/mnt"]);
    fs::write("/mnt/by-hand", vec![7; 1 << 20]).expect("a file");
}

fn shut_down() {
    systemctl(&["reboot"]);
}
