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

/// Bytes of every file of the writer.
const FILE: usize = 96_000;

/// Writes file after file, each under its name only when it is complete, and syncs none.
struct Writer(Child);

impl Writer {
    fn start(at: &Path) -> Self {
        let at = at.display();
        let script = format!(
            "n=0; while :; do n=$((n+1)); yes $n | head -c {FILE} > {at}/new && \
             mv {at}/new {at}/file-$n; sleep 0.02; done"
        );
        let child = Command::new("bash").args(["-c", &script]).stdin(Stdio::null()).spawn();
        Self(child.expect("a writer"))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn files(at: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(at).into_iter().flatten().flatten().map(|e| e.path());
    let named =
        |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("file-"));
    entries.filter(named).collect()
}

fn assert_whole(at: &Path, before: usize, after: usize) {
    let found = files(at);
    assert!((before..=after).contains(&found.len()), "{} of {before} to {after}", found.len());
    for file in &found {
        let content = std::fs::read(file).expect("content");
        let name = file.file_name().and_then(|n| n.to_str()).expect("name");
        let line = format!("{}\n", name.trim_start_matches("file-"));
        let wanted: Vec<u8> = line.bytes().cycle().take(FILE).collect();
        assert!(content == wanted, "{name} is not whole: {} bytes", content.len());
    }
}

fn needs_recovery(image: &Path) -> bool {
    said(&run("dumpe2fs", &["-h", image.to_str().expect("path")])).contains("needs_recovery")
}

/// Points of a file system under a writer that is not stopped for them, opened without a replay.
fn app_points_are_whole(kind: &str, options: &str, mebibytes: u64) {
    let site = Site::new();
    let _daemons = site.start_all();
    let at = site.root().join("mnt");
    let text = format!(
        "[[application]]\nname = \"files\"\nvolumes = [\"files\"]\nfreeze = [\"{}\"]\n\
         quiet_limit = \"30s\"\n",
        at.display()
    );
    std::fs::write(site.paths.etc.join("freezer.toml"), text).expect("configuration");
    let _freezer = site.start("freezer", &["freezer"]);
    let (_, uri) = site.protect("files", mebibytes << 20, "off");
    let mut disk = Attached::new(&uri, &site.root().join("disk"));
    run(&format!("mkfs.{kind}"), &["-q", &disk.device]);
    disk.mount(&at);
    site.tag_when_ordered("files", "first");
    let writer = Writer::start(&at);
    for round in 0..3 {
        let wanted = 15 * (round + 1);
        wait_for("files", Duration::from_secs(60), || (files(&at).len() > wanted).then_some(()));
        let before = files(&at).len();
        let name = format!("app-{round}");
        let out = site.try_cli(&["point", "tag", "files", "--app", "--name", &name]);
        assert!(out.status.success(), "{}\n{}", said(&out), site.logs());
        let after = files(&at).len() + 1;
        let view = site.open("files", PointChoice::Name(name.clone()));
        let image = site.fetch_view(&view, &format!("{name}.img"));
        assert!(kind != "ext4" || !needs_recovery(&image), "its journal is to be replayed");
        let seen = site.root().join(&name);
        std::fs::create_dir(&seen).expect("mount point");
        let [image, path] = [&image, &seen].map(|p| p.to_str().expect("path"));
        run("mount", &["-t", kind, "-o", options, image, path]);
        assert_whole(&seen, before, after);
        run("umount", &[path]);
        site.close(&view);
    }
    if kind == "ext4" {
        // What shows that this was no accident.
        let crash = site.tag("files", "crash");
        let view = site.open("files", PointChoice::Id(crash.point));
        assert!(needs_recovery(&site.fetch_view(&view, "crash.img")), "it was not frozen");
    }
    drop(writer);
    disk.unmount();
}

#[test]
fn an_app_point_of_ext4_needs_no_replay_of_its_journal() {
    app_points_are_whole("ext4", "loop,ro,noload", 96);
}

#[test]
fn an_app_point_of_xfs_is_whole_without_its_log() {
    app_points_are_whole("xfs", "loop,ro,norecovery,nouuid", 320);
}
