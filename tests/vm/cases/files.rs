//! File systems on a protected volume: made, filled and changed while replicated. A point cut while
//! it was mounted recovers like after a power cut and has every file; one cut after the unmount is
//! clean.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use farshore_protocol::admin::PointChoice;

use crate::harness::{Site, run};
use crate::image::Disk;
use crate::volume::{Attached, Volume, Way};
use crate::{Group, case_list};

pub const GROUP: Group = Group {
    name: "files",
    // The smallest that xfs takes.
    disks: &[Disk::new("files", 320)],
    cases: case_list![
        ext4_opened_at_a_point_is_clean_and_its_files_are_equal,
        xfs_opened_at_a_point_is_clean_and_its_files_are_equal,
        btrfs_opened_at_a_point_is_clean_and_its_files_are_equal,
    ],
    ..Group::DEFAULT
};

const WAY: Way = Way::Ublk;

struct FileSystem {
    name: &'static str,
    make: &'static [&'static str],
    /// Must find nothing to do.
    check: &'static [&'static str],
    /// For a second mount while the first one's disk is still there.
    options: &'static str,
}

fn ext4_opened_at_a_point_is_clean_and_its_files_are_equal() {
    round_trip(&FileSystem {
        name: "ext4",
        make: &["mkfs.ext4", "-q"],
        check: &["fsck.ext4", "-f", "-n"],
        options: "defaults",
    });
}

fn xfs_opened_at_a_point_is_clean_and_its_files_are_equal() {
    round_trip(&FileSystem {
        name: "xfs",
        make: &["mkfs.xfs", "-q", "-f"],
        check: &["xfs_repair", "-n"],
        options: "nouuid",
    });
}

fn btrfs_opened_at_a_point_is_clean_and_its_files_are_equal() {
    round_trip(&FileSystem {
        name: "btrfs",
        make: &["mkfs.btrfs", "-q", "-f"],
        check: &["btrfs", "check"],
        options: "defaults",
    });
}

fn on(device: &Path, command: &[&str]) {
    let (program, args) = command.split_first().expect("a program");
    run(program, &[args, &[device.to_str().expect("UTF-8")]].concat());
}

/// A mounted file system; unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(device: &Path, kind: &str, options: &str, at: &str) -> Self {
        let at = PathBuf::from(at);
        fs::create_dir_all(&at).expect("mount point");
        let [device, path] = [device, &at].map(|p| p.to_str().expect("UTF-8"));
        run("mount", &["-t", kind, "-o", options, device, path]);
        Self(at)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &[self.0.to_str().expect("UTF-8")]);
    }
}

/// Writes files of many sizes, changes some, renames and removes others; repeatable.
fn load(at: &Path, seed: u64) {
    let mut state = seed;
    let mut dice = |below: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for number in 0..60 {
        let folder = at.join(format!("{seed}-{}", number % 7));
        fs::create_dir_all(&folder).expect("folder");
        let path = folder.join(format!("file-{number}"));
        let length = usize::try_from(dice(200_000)).expect("small");
        let word = (seed << 32 | number).to_le_bytes();
        let content: Vec<u8> = word.into_iter().cycle().take(length).collect();
        let mut file = fs::File::create(&path).expect("file");
        file.write_all(&content).expect("write");
        match dice(6) {
            0 => file.sync_all().expect("fsync"),
            1 => fs::remove_file(&path).expect("remove"),
            2 => {
                fs::hard_link(&path, folder.join(format!("link-{number}"))).expect("link");
            }
            3 => file.set_len(dice(300_000)).expect("truncate"),
            4 => fs::write(&path, b"short").expect("rewrite"),
            _ => {}
        }
    }
}

/// Every file's path and digest.
fn digest(at: &Path) -> String {
    let script = "cd \"$0\" && find . -type f -print0 | sort -z | xargs -0 sha256sum";
    let out = run("bash", &["-c", script, at.to_str().expect("UTF-8")]);
    String::from_utf8(out.stdout).expect("UTF-8")
}

fn round_trip(kind: &FileSystem) {
    let site = Site::new();
    let _daemons = site.start_all();
    let volume = Volume::protect(&site, WAY, "files", "1s");
    on(&volume.device, kind.make);
    let mounted = Mounted::new(&volume.device, kind.name, "defaults", "/mnt/source");
    load(&mounted.0, 1);
    volume.wait_protected();
    load(&mounted.0, 2);
    run("sync", &["-f", mounted.0.to_str().expect("UTF-8")]);
    let wanted = digest(&mounted.0);
    assert!(wanted.lines().count() > 50, "there are files to compare: {wanted}");
    let synced = site.tag("files", "synced");
    // The live disk goes on and differs from the point.
    load(&mounted.0, 3);
    run("fstrim", &[mounted.0.to_str().expect("UTF-8")]);
    let last = digest(&mounted.0);
    drop(mounted);
    let unmounted = volume.assert_point_equals_disk("unmounted");
    volume.unprotect();

    let view = site.open("files", PointChoice::Id(unmounted.point));
    let device = Attached::view(&view);
    on(&device.device, kind.check);
    let mounted = Mounted::new(&device.device, kind.name, kind.options, "/mnt/view");
    assert_eq!(digest(&mounted.0), last, "files differ at the point after the unmount");
    drop(mounted);
    drop(device);
    site.close(&view);

    let view = site.open("files", PointChoice::Id(synced.point));
    let device = Attached::view(&view);
    let mounted = Mounted::new(&device.device, kind.name, kind.options, "/mnt/view");
    assert_eq!(digest(&mounted.0), wanted, "files differ at the point while mounted");
    drop(mounted);
    on(&device.device, kind.check);
    drop(device);
    site.close(&view);
}
