//! A file system on a protected volume: made, filled, replicated; the point's file system is clean
//! and its files are equal. The device comes from nbdfuse and a loop device with direct I/O.

mod harness;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use farshore_protocol::admin::PointChoice;
use harness::{Site, run, said, view_uri, wait_for};

/// An NBD export as a block device of this machine; taken apart when dropped.
struct Attached {
    fuse: Child,
    file: PathBuf,
    device: String,
    mounted: Option<PathBuf>,
}

impl Attached {
    fn new(uri: &str, file: &Path) -> Self {
        std::fs::write(file, b"").expect("mount point of nbdfuse");
        let fuse = Command::new("nbdfuse")
            .arg(file)
            .arg(uri)
            .stderr(Stdio::inherit())
            .spawn()
            .expect("nbdfuse");
        wait_for("nbdfuse's file", Duration::from_secs(20), || {
            std::fs::metadata(file).ok().filter(|m| m.len() > 0)
        });
        let out =
            run("losetup", &["--find", "--show", "--direct-io=on", file.to_str().expect("path")]);
        let device = String::from_utf8(out.stdout).expect("UTF-8").trim().to_owned();
        Self { fuse, file: file.to_owned(), device, mounted: None }
    }

    fn mount(&mut self, at: &Path) {
        std::fs::create_dir_all(at).expect("mount point");
        run("mount", &[&self.device, at.to_str().expect("path")]);
        self.mounted = Some(at.to_owned());
    }

    fn unmount(&mut self) {
        if let Some(at) = self.mounted.take() {
            run("umount", &[at.to_str().expect("path")]);
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let quiet = |program: &str, arg: &str| {
            Command::new(program).args(arg.split(' ')).stderr(Stdio::null()).status().ok();
        };
        if let Some(at) = self.mounted.take() {
            quiet("umount", &at.display().to_string());
        }
        quiet("losetup", &format!("-d {}", self.device));
        // The loop device lets go of the file a moment later.
        let gone = |_: &()| {
            let out = Command::new("fusermount3")
                .arg("-u")
                .arg(&self.file)
                .stderr(Stdio::null())
                .status();
            let out =
                out.or_else(|_| Command::new("fusermount").arg("-u").arg(&self.file).status());
            out.is_ok_and(|s| s.success())
        };
        for _ in 0..100 {
            if gone(&()) {
                break;
            }
            harness::pause(Duration::from_millis(50));
        }
        self.fuse.kill().ok();
        self.fuse.wait().ok();
    }
}

fn tree_digest(at: &Path) -> String {
    let script = "cd \"$0\" && find . -type f -print0 | sort -z | xargs -0 sha256sum";
    let out = Command::new("bash").args(["-c", script]).arg(at).output().expect("bash");
    assert!(out.status.success(), "{}", said(&out));
    String::from_utf8(out.stdout).expect("UTF-8")
}

#[test]
fn a_file_system_opened_at_a_point_is_clean_and_its_files_are_equal() {
    let site = Site::new();
    let _daemons = site.start_all();
    let (_, uri) = site.protect("files", 96 << 20, "1s");
    site.wait_protected("files");
    let mut disk = Attached::new(&uri, &site.root().join("disk"));
    run("mkfs.ext4", &["-q", &disk.device]);
    let at = site.root().join("mnt");
    disk.mount(&at);
    run("cp", &["-r", "/usr/share/doc/libc6", "/etc/apt", at.to_str().expect("path")]);
    run(
        "dd",
        &[
            "if=/dev/urandom",
            &format!("of={}", at.join("noise").display()),
            "bs=1M",
            "count=12",
            "status=none",
            "conv=fsync",
        ],
    );
    run("sync", &["-f", at.to_str().expect("path")]);
    let wanted = tree_digest(&at);
    assert!(wanted.lines().count() > 3, "there are files to compare: {wanted}");
    let synced = site.tag("files", "synced");
    // Go on, so that the live disk differs from the point.
    run("rm", &[at.join("noise").to_str().expect("path")]);
    run("fstrim", &["-v", at.to_str().expect("path")]);
    disk.unmount();
    let unmounted = site.tag("files", "unmounted");

    let view = site.open("files", PointChoice::Id(unmounted.point));
    let mut replica = Attached::new(&view_uri(&view), &site.root().join("view-unmounted"));
    run("fsck.ext4", &["-fn", &replica.device]);
    let at_view = site.root().join("mnt-view");
    replica.mount(&at_view);
    assert!(!at_view.join("noise").exists(), "a removed file is back");
    drop(replica);

    // The point cut while mounted: the journal of the file system recovers, then all is there.
    let view = site.open("files", PointChoice::Id(synced.point));
    let mut replica = Attached::new(&view_uri(&view), &site.root().join("view-synced"));
    replica.mount(&at_view);
    assert_eq!(tree_digest(&at_view), wanted, "files at the point differ");
    replica.unmount();
    run("fsck.ext4", &["-fn", &replica.device]);
}
