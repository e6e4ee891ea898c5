//! The disk behind a protected volume has the same identifiers as the volume. What finds disks by
//! these (udev, LVM, md, btrfs) takes the volume, with the recipes of docs/origin.md as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::life::{System, udev_property};
use crate::harness::{farshore_bin, run, said, wait_for};
use crate::image::Disk;
use crate::{Group, case_list, guest};

pub const GROUP: Group = Group {
    name: "origin",
    disks: &[Disk::new("lvm", 64), Disk::new("btrfs", 128), Disk::new("md", 64)],
    cases: case_list![
        a_volume_group_is_activated_on_the_protected_device,
        a_btrfs_is_mounted_from_the_protected_device,
        an_array_is_assembled_from_the_protected_device,
    ],
    ..Group::DEFAULT
};

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A protected disk with udev and our rule.
struct Protected {
    name: &'static str,
    origin: PathBuf,
    /// As the kernel calls it.
    device: PathBuf,
    _filterd: System,
}

impl Protected {
    /// The dry run must name `hint` before.
    fn new(name: &'static str, kind: &str, hint: &str) -> Self {
        let origin = guest::disk(name);
        guest::load("ublk_drv");
        let filterd = System::start();
        settle();
        let protect = ["protect", text(&origin), "--name", name, "--policy", "off", "--yes"];
        let ready = said(&run(text(&farshore_bin()), &[&protect[..], &["--dry-run"]].concat()));
        assert!(ready.contains(hint), "{ready}");
        run(text(&farshore_bin()), &[&protect[..], &["--attach", "ublk"]].concat());
        settle();
        let device = fs::canonicalize(format!("/dev/farshore/{name}")).expect("the volume");
        assert_eq!(udev_property(&origin, "ID_FS_TYPE"), "farshore_origin");
        assert_eq!(udev_property(&device, "ID_FS_TYPE"), kind);
        Self { name, origin, device, _filterd: filterd }
    }

    /// Refused while something is built on it, which `undo` takes apart.
    fn unprotect(self, undo: impl FnOnce()) {
        let unprotect = ["unprotect", self.name, "--yes"];
        let out = std::process::Command::new(farshore_bin()).args(unprotect).output();
        let told = said(&out.expect("farshore"));
        assert!(told.contains("FS-2046"), "{told}");
        undo();
        settle();
        run(text(&farshore_bin()), &unprotect);
        run("wipefs", &["-q", "-a", text(&self.origin)]);
    }
}

fn settle() {
    if !Path::new("/run/udev/control").exists() {
        let rule = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/udev/61-farshore.rules");
        fs::create_dir_all("/run/udev/rules.d").expect("rules.d");
        fs::copy(rule, "/run/udev/rules.d/61-farshore.rules").expect("rule");
        guest::start_udev();
    }
    run("udevadm", &["settle"]);
}

/// What a device is built on, by the kernel's names.
fn built_on(device: &Path) -> Vec<String> {
    let node = fs::canonicalize(device).expect("device");
    let name = node.file_name().expect("name").to_str().expect("UTF-8");
    let below = fs::read_dir(format!("/sys/block/{name}/slaves")).expect("slaves");
    below.flatten().map(|e| format!("/dev/{}", e.file_name().to_string_lossy())).collect()
}

fn a_volume_group_is_activated_on_the_protected_device() {
    let disk = guest::disk("lvm");
    guest::load("dm_mod");
    run("pvcreate", &["-q", text(&disk)]);
    run("vgcreate", &["-q", "vg0", text(&disk)]);
    run("lvcreate", &["-q", "-y", "-Wn", "-an", "-l", "4", "-n", "lv0", "vg0"]);
    let volume = Protected::new("lvm", "LVM2_member", "physical volume of LVM");
    let others = r#""r|^/dev/disk/|", "r|^/dev/block/|", "a|.*|""#;
    let rules = format!("\"r|^{}$|\", {others}", text(&disk));
    let filter = format!("devices {{ global_filter = [ {rules} ] }}");
    let list = ["--config", &filter, "--noheadings", "-o", "pv_name"];
    let found = said(&run("pvs", &list));
    assert_eq!(found.split_whitespace().collect::<Vec<_>>(), [text(&volume.device)]);
    run("vgchange", &["-q", "--config", &filter, "-ay", "vg0"]);
    let below = built_on(Path::new("/dev/mapper/vg0-lv0"));
    assert_eq!(below, [text(&volume.device).to_owned()]);
    volume.unprotect(|| drop(run("vgchange", &["-q", "--config", &filter, "-an", "vg0"])));
}

fn a_btrfs_is_mounted_from_the_protected_device() {
    let disk = guest::disk("btrfs");
    let uuid = "5a5a5a5a-1111-2222-3333-555555555555";
    guest::load("btrfs");
    run("mkfs.btrfs", &["-q", "-f", "-U", uuid, text(&disk)]);
    run("btrfs", &["device", "scan", text(&disk)]);
    let volume = Protected::new("btrfs", "btrfs", "btrfs device scan --forget");
    run("btrfs", &["device", "scan", "--forget", text(&disk)]);
    run("btrfs", &["device", "scan", "/dev/farshore/btrfs"]);
    assert_eq!(said(&run("blkid", &["-U", uuid])).trim(), text(&volume.device));
    fs::create_dir_all("/mnt/btrfs").expect("mount point");
    run("mount", &[&format!("UUID={uuid}"), "/mnt/btrfs"]);
    let source = said(&run("findmnt", &["-no", "SOURCE", "/mnt/btrfs"]));
    assert_eq!(source.trim(), text(&volume.device));
    volume.unprotect(|| drop(run("umount", &["/mnt/btrfs"])));
}

fn an_array_is_assembled_from_the_protected_device() {
    let disk = guest::disk("md");
    guest::load("raid1");
    let create = ["--create", "/dev/md7", "--level=1", "--raid-devices=2", "--metadata=1.2"];
    run("mdadm", &[&create[..], &["--run", "--quiet", text(&disk), "missing"]].concat());
    fs::create_dir_all("/etc/mdadm").expect("/etc/mdadm");
    fs::write("/etc/mdadm/mdadm.conf", "DEVICE /dev/farshore/*\n").expect("mdadm.conf");
    run("mdadm", &["--stop", "--quiet", "/dev/md7"]);
    let volume = Protected::new("md", "linux_raid_member", "member of an md array");
    // udev may have assembled it already, from ours: then there is nothing left to do.
    let assemble = ["--assemble", "--scan", "--run"];
    std::process::Command::new("mdadm").args(assemble).output().expect("mdadm");
    let array = wait_for("the array", Duration::from_secs(30), || {
        let arrays = fs::read_dir("/sys/block").ok()?.flatten().map(|e| e.file_name());
        arrays.filter_map(|n| n.into_string().ok()).find(|name| name.starts_with("md"))
    });
    let array = Path::new("/dev").join(array);
    assert_eq!(built_on(&array), [text(&volume.device).to_owned()]);
    volume.unprotect(|| drop(run("mdadm", &["--stop", "--quiet", text(&array)])));
}
