//! The life of a protected volume's block device: its names, who may not lose it, and filterd's
//! stops, kills and starts, which its users never notice. The same for both ways through the kernel.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use farshore_protocol::paths::Paths;

use crate::harness::{Daemon, Daemons, Site, farshore_bin, run, said, wait_for};
use crate::image::Disk;
use crate::volume::{Volume, Way};
use crate::{Case, Group, guest};

const DISKS: &[Disk] = &[Disk::new("data", 64), Disk::new("other", 64)];

/// The cases for one way of attaching, as a module of its own.
macro_rules! by {
    ($module:ident, $way:expr, $($name:ident),* $(,)?) => {
        mod $module {
            pub const CASES: &[crate::Case] = crate::case_list![$($name),*];
            $(fn $name() { super::$name($way) })*
        }
    };
}

macro_rules! cases {
    ($module:ident, $way:expr) => {
        by!(
            $module,
            $way,
            a_volume_has_a_stable_name_without_udev_until_it_is_unprotected,
            unprotect_is_refused_while_mounted_or_open_and_names_who,
            a_killed_filterd_is_followed_by_one_and_a_file_system_never_notices,
            what_is_written_while_filterd_is_stopped_waits_for_the_next_start,
            an_upgrade_in_place_is_clean_and_copies_nothing,
            a_device_whose_volume_is_gone_is_removed_at_the_next_start,
            udev_names_the_volume_and_hides_the_disk_behind_it,
        );
    };
}

cases!(by_ublk, crate::volume::Way::Ublk);
cases!(by_nbd, crate::volume::Way::Nbd);

const fn group(name: &'static str, cases: &'static [Case]) -> Group {
    Group { name, disks: DISKS, cases, limit: Duration::from_secs(300), ..Group::DEFAULT }
}

pub const UBLK_GROUP: Group = group("life_by_ublk", by_ublk::CASES);
pub const NBD_GROUP: Group = group("life_by_nbd", by_nbd::CASES);

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The kernel's name of the device behind a link.
fn kernel_name(device: &Path) -> String {
    let node = fs::canonicalize(device).expect("device");
    node.file_name().and_then(|n| n.to_str()).expect("name").to_owned()
}

fn exists_in_kernel(name: &str) -> bool {
    let size = fs::read_to_string(format!("/sys/class/block/{name}/size"));
    size.is_ok_and(|size| size.trim() != "0")
}

/// A new ext4 file system on the device, mounted; unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(device: &Path, at: &str) -> Self {
        run("mkfs.ext4", &["-q", text(device)]);
        Self::again(device, at)
    }

    fn again(device: &Path, at: &str) -> Self {
        let at = PathBuf::from(at);
        fs::create_dir_all(&at).expect("mount point");
        run("mount", &[text(device), text(&at)]);
        Self(at)
    }

    fn write(&self, name: &str) {
        let mut file = File::create(self.0.join(name)).expect("create");
        file.write_all(&[0x5a; 1 << 16]).and_then(|()| file.sync_all()).expect("write");
    }

    fn unmount(self) {
        drop(self);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A case that has failed throws its machine away.
        Command::new("umount").arg(&self.0).status().ok();
    }
}

/// No mount of a device of ours in the daemon's own namespace.
fn assert_sees_no_mount(filterd: &Daemon) {
    let seen = || {
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", filterd.pid())).expect("mounts");
        let ours = |l: &&str| {
            ["/dev/farshore/", "/dev/ublkb", "/dev/nbd"].iter().any(|d| l.starts_with(d))
        };
        mounts.lines().filter(ours).map(str::to_owned).collect::<Vec<_>>()
    };
    // What the host has just mounted is seen for a moment.
    wait_for("no mount of our own device", Duration::from_secs(20), || {
        seen().is_empty().then_some(())
    });
}

fn refused(out: &Output, code: &str, who: &str) {
    let said = said(out);
    assert_eq!(out.status.code(), Some(4), "{said}");
    assert!(said.contains(code) && said.contains(who), "{said}");
}

fn a_volume_has_a_stable_name_without_udev_until_it_is_unprotected(way: Way) {
    let site = Site::new();
    let filterd = site.start_filterd();
    let volume = Volume::protect(&site, way, "data", "off");
    let link = PathBuf::from("/dev/farshore/data");
    assert_eq!(volume.device, link);
    let kernel = kernel_name(&link);
    let mut sfdisk = Command::new("sfdisk")
        .args(["--quiet", "--no-tell-kernel", text(&link)])
        .stdin(Stdio::piped())
        .spawn()
        .expect("sfdisk");
    sfdisk.stdin.take().expect("stdin").write_all(b"label: gpt\n,16MiB\n").expect("script");
    assert!(sfdisk.wait().expect("sfdisk").success());
    assert!(filterd.stop().success());
    assert!(!link.exists() && !exists_in_kernel(&kernel), "nobody used it: it is gone");
    let _filterd = site.start_filterd();
    assert_eq!(kernel_name(&link), kernel, "the same number again");
    if way == Way::Ublk {
        guest::block_device(Path::new("/dev/farshore/data-part1"));
    }
    volume.unprotect();
    assert!(!link.exists() && !Path::new("/dev/farshore").exists(), "the names are gone");
    assert!(!exists_in_kernel(&kernel));
    run("wipefs", &["-q", "-a", text(&guest::disk("data"))]);
}

fn unprotect_is_refused_while_mounted_or_open_and_names_who(way: Way) {
    let site = Site::new();
    let _filterd = site.start_filterd();
    let volume = Volume::protect(&site, way, "data", "off");
    let mounted = Mounted::new(&volume.device, "/mnt/data");
    for force in [&[][..], &["--force"]] {
        let out = site.try_cli(&[&["unprotect", "data", "--yes"][..], force].concat());
        refused(&out, "FS-2046", "/mnt/data");
    }
    mounted.write("still-there");
    mounted.unmount();
    let mut reader = Command::new("sleep")
        .arg("600")
        .stdin(File::open(&volume.device).expect("open"))
        .spawn()
        .expect("sleep");
    for force in [&[][..], &["--force"]] {
        let out = site.try_cli(&[&["unprotect", "data", "--yes"][..], force].concat());
        refused(&out, "FS-2036", &format!("sleep (process {})", reader.id()));
    }
    reader.kill().and_then(|()| reader.wait()).expect("ended");
    volume.unprotect();
    run("fsck.ext4", &["-f", "-n", text(&guest::disk("data"))]);
}

fn a_killed_filterd_is_followed_by_one_and_a_file_system_never_notices(way: Way) {
    let site = Site::new();
    let mut filterd = site.start_filterd();
    let volume = Volume::protect(&site, way, "data", "off");
    let mounted = Mounted::new(&volume.device, "/mnt/data");
    for round in 0..3 {
        assert_sees_no_mount(&filterd);
        let mut writer = copying(&mounted.0, round);
        filterd.kill();
        filterd = site.start_filterd();
        wait_for("the writer to end", Duration::from_secs(120), || {
            writer.try_wait().expect("wait")
        });
        assert!(writer.wait().expect("wait").success(), "a write failed\n{}", site.logs());
        mounted.write(&format!("after-{round}"));
    }
    assert_sees_no_mount(&filterd);
    mounted.unmount();
    run("fsck.ext4", &["-f", "-n", text(&volume.device)]);
    volume.unprotect();
}

/// A program that writes files with fsync; needs its disk to answer.
fn copying(at: &Path, round: u32) -> Child {
    let script = "for i in 1 2 3 4 5 6 7 8; do dd if=/dev/zero of=$0/$1-$i bs=64k count=4 conv=fsync \
                  status=none || exit 1; done";
    let round = round.to_string();
    Command::new("sh").args(["-c", script, text(at), &round]).spawn().expect("sh")
}

fn what_is_written_while_filterd_is_stopped_waits_for_the_next_start(way: Way) {
    let site = Site::new();
    let filterd = site.start_filterd();
    let volume = Volume::protect(&site, way, "data", "off");
    let mounted = Mounted::new(&volume.device, "/mnt/data");
    let kernel = kernel_name(&volume.device);
    assert!(filterd.stop().success());
    assert!(exists_in_kernel(&kernel), "it is in use: it stays");
    let mut writer = copying(&mounted.0, 0);
    assert_eq!(writer.try_wait().expect("wait"), None, "it waits");
    let filterd = site.start_filterd();
    wait_for("the writer to end", Duration::from_secs(120), || writer.try_wait().expect("wait"));
    assert!(writer.wait().expect("wait").success(), "a write failed\n{}", site.logs());
    assert_sees_no_mount(&filterd);
    mounted.unmount();
    volume.unprotect();
}

fn an_upgrade_in_place_is_clean_and_copies_nothing(way: Way) {
    let site = Site::new();
    let Daemons { target: _target, filterd, agent: _agent } = site.start_all();
    let volume = Volume::protect(&site, way, "other", "1s");
    volume.wait_protected();
    let mounted = Mounted::new(&volume.device, "/mnt/other");
    mounted.write("before");
    volume.wait_protected();
    assert!(filterd.stop().success());
    let _filterd = site.start_filterd();
    let log = fs::read_to_string(site.root().join("filterd.log")).expect("log");
    assert!(log.contains("stopped clean"), "{log}");
    let starts: Vec<&str> = log.lines().filter(|l| l.contains("attaching a protected")).collect();
    assert!(starts.last().is_some_and(|l| l.contains("Continues")), "{starts:#?}");
    mounted.write("after");
    mounted.unmount();
    volume.assert_point_equals_disk("upgraded");
    volume.unprotect();
}

fn a_device_whose_volume_is_gone_is_removed_at_the_next_start(way: Way) {
    let site = Site::new();
    let filterd = site.start_filterd();
    let volume = Volume::protect(&site, way, "data", "off");
    let kernel = kernel_name(&volume.device);
    let open = File::open(&volume.device).expect("open");
    assert!(filterd.stop().success());
    assert!(exists_in_kernel(&kernel), "it was open: it stays");
    let records = site.paths.state.join("filterd/volumes");
    for record in fs::read_dir(records).expect("records").flatten() {
        fs::remove_file(record.path()).expect("removed");
    }
    let filterd = site.start_filterd();
    assert!(exists_in_kernel(&kernel), "it is still open: it stays, and the log says why");
    wait_for("the log to say why", Duration::from_secs(60), || {
        site.logs().contains("FS-2036").then_some(())
    });
    drop(open);
    filterd.kill();
    let _filterd = site.start_filterd();
    wait_for("the device to go", Duration::from_secs(20), || {
        (!exists_in_kernel(&kernel)).then_some(())
    });
}

/// filterd with the system's own directories, which the udev rules read.
pub(super) struct System(Child);

impl System {
    pub(super) fn start() -> Self {
        let mut command = Command::new(farshore_bin());
        let child = command.arg("filterd").stdin(Stdio::null()).spawn().expect("filterd");
        let socket = Paths::system().filterd_socket();
        wait_for("filterd's control socket", Duration::from_secs(30), || {
            std::os::unix::net::UnixStream::connect(&socket).ok()
        });
        Self(child)
    }
}

impl Drop for System {
    fn drop(&mut self) {
        self.0.kill().and_then(|()| self.0.wait()).ok();
    }
}

pub(super) fn udev_property(device: &Path, name: &str) -> String {
    let out = run("udevadm", &["info", "--query=property", text(device)]);
    let all = said(&out);
    let value = all.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix('='));
    value.unwrap_or_default().to_owned()
}

fn udev_names_the_volume_and_hides_the_disk_behind_it(way: Way) {
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/udev/61-farshore.rules");
    fs::create_dir_all("/run/udev/rules.d").expect("rules.d");
    fs::copy(rules, "/run/udev/rules.d/61-farshore.rules").expect("rules");
    guest::start_udev();
    let disk = guest::disk("data");
    let uuid = "5a5a5a5a-1111-2222-3333-444444444444";
    run("mkfs.ext4", &["-q", "-F", "-U", uuid, text(&disk)]);
    run("udevadm", &["trigger", text(&disk)]);
    run("udevadm", &["settle"]);
    let by_uuid = Path::new("/dev/disk/by-uuid").join(uuid);
    assert_eq!(fs::canonicalize(&by_uuid).expect("link"), disk);

    let filterd = System::start();
    let module = if way == Way::Ublk { "ublk_drv" } else { "nbd" };
    guest::load(module);
    let attach = if way == Way::Ublk { "ublk" } else { "nbd" };
    let farshore = text(&farshore_bin()).to_owned();
    let protect = ["protect", text(&disk), "--name", "data", "--policy", "off", "--yes"];
    run(&farshore, &[&protect[..], &["--attach", attach]].concat());
    run("udevadm", &["settle"]);
    let device = fs::canonicalize("/dev/farshore/data").expect("the volume's name");
    for name in ["/dev/disk/by-id/farshore-data", text(&by_uuid)] {
        assert_eq!(fs::canonicalize(name).expect("link"), device, "{name}");
    }
    assert_eq!(udev_property(&disk, "SYSTEMD_READY"), "0");
    assert_eq!(udev_property(&disk, "UDISKS_IGNORE"), "1");
    assert_eq!(fs::canonicalize("/dev/disk/by-id/virtio-data").expect("its own link"), disk);

    run(&farshore, &["unprotect", "data", "--yes"]);
    run("udevadm", &["settle"]);
    assert_eq!(fs::canonicalize(&by_uuid).expect("link"), disk, "an ordinary disk again");
    assert_eq!(udev_property(&disk, "SYSTEMD_READY"), "");
    assert!(!Path::new("/dev/farshore/data").exists());
    drop(filterd);
}
