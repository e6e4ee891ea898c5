//! A mounted file system never loses its device: a mount that comes between the look at the users
//! and the removal of a device either wins, and the removal is refused, or fails.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::harness::{Site, pause, run, said, wait_for};
use crate::image::Disk;
use crate::volume::{Volume, Way};
use crate::{Group, case_list, guest};

pub const GROUP: Group = Group {
    name: "guard",
    disks: &[Disk::new("data", 64)],
    // Two that really interleave.
    cpus: 2,
    cases: case_list![
        mounts_race_with_unprotect_on_ublk_and_none_loses_its_device,
        mounts_race_with_unprotect_on_kernel_nbd_and_none_loses_its_device,
    ],
    ..Group::DEFAULT
};

const AT: &str = "/mnt/raced";
const ROUNDS: u32 = 6;

fn mounts_race_with_unprotect_on_ublk_and_none_loses_its_device() {
    race(Way::Ublk);
}

fn mounts_race_with_unprotect_on_kernel_nbd_and_none_loses_its_device() {
    race(Way::Nbd);
}

fn race(way: Way) {
    let site = Site::new();
    let _filterd = site.start_filterd();
    fs::create_dir_all(AT).expect("mount point");
    run("mkfs.ext4", &["-q", "-F", guest::disk("data").to_str().expect("UTF-8")]);
    let (mut refused, mounts) = (0, AtomicU32::new(0));
    for _ in 0..ROUNDS {
        let volume = Volume::protect(&site, way, "data", "off");
        let device = fs::canonicalize(&volume.device).expect("device");
        let stop = AtomicBool::new(false);
        let errors = std::thread::scope(|scope| {
            let racing = scope.spawn(|| mount_again_and_again(&device, &stop, &mounts));
            let begun = mounts.load(Ordering::Relaxed);
            wait_for("a mount", Duration::from_secs(60), || {
                (mounts.load(Ordering::Relaxed) > begun).then_some(())
            });
            wait_for("unprotect to win", Duration::from_secs(180), || {
                let out = site.try_cli(&["unprotect", "data", "--yes"]);
                let told = said(&out);
                let busy = ["FS-2046", "FS-2036", "FS-2047"].iter().any(|c| told.contains(c));
                assert!(out.status.success() || busy, "{told}\n{}", site.logs());
                refused += u32::from(!out.status.success());
                out.status.success().then_some(())
            });
            stop.store(true, Ordering::Relaxed);
            racing.join().expect("the mounts")
        });
        assert_eq!(errors, Vec::<String>::new(), "a mounted file system lost its device");
    }
    let kernel = said(&run("dmesg", &[]));
    let broken =
        kernel.lines().filter(|l| l.contains("EXT4-fs error") || l.contains("JBD2: Error"));
    assert_eq!(broken.collect::<Vec<_>>(), Vec::<&str>::new());
    run("fsck.ext4", &["-f", "-n", guest::disk("data").to_str().expect("UTF-8")]);
    let mounts = mounts.into_inner();
    println!("{mounts} mounts, {refused} refusals in {ROUNDS} rounds");
    assert!(refused > 0, "the mounts were never in the way: nothing was raced");
}

/// Mounts, writes, unmounts and pauses, until told to stop; what went wrong while it was mounted.
fn mount_again_and_again(device: &Path, stop: &AtomicBool, mounts: &AtomicU32) -> Vec<String> {
    let mut errors = Vec::new();
    let none: Option<&str> = None;
    while !stop.load(Ordering::Relaxed) {
        if mount(Some(device), AT, Some("ext4"), MsFlags::empty(), none).is_err() {
            pause(Duration::from_millis(2));
            continue;
        }
        let mounted = Instant::now();
        mounts.fetch_add(1, Ordering::Relaxed);
        let written = File::create(Path::new(AT).join("file"))
            .and_then(|mut file| file.write_all(&[7; 4096]).and_then(|()| file.sync_all()));
        errors.extend(written.err().map(|e| format!("write: {e}")));
        // filterd, which lets go of its own copy of the mount, makes it busy for a moment.
        wait_for("the unmount", Duration::from_secs(60), || umount2(AT, MntFlags::empty()).ok());
        // Unmounted for about as long as mounted: both sides come to their turn.
        pause(mounted.elapsed().min(Duration::from_millis(50)));
    }
    errors
}
