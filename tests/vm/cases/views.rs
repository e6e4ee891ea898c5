//! Points opened as block devices of the target host: a file system on one is whole, its device
//! goes away with the view and not with the daemon, and not under somebody who uses it.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use farshore_blkfilter::sys::ublk::control::{Call, call};
use farshore_blkfilter::sys::ublk::uapi::Control;
use farshore_protocol::admin::{TargetReply, TargetRequest, ViewInfo};

use crate::guest;
use crate::harness::{Daemons, Site, assert_same_bytes, run, said, view_uri, wait_for};
use crate::{Group, case_list};

pub const GROUP: Group = Group {
    name: "views",
    cases: case_list![
        a_view_is_no_device_where_the_kernel_has_no_driver,
        a_point_on_the_kernels_nbd_client_is_a_whole_file_system,
        a_view_outlives_its_device_of_the_kernels_nbd_client,
        a_point_on_ublk_is_a_whole_file_system_until_it_is_closed,
        a_read_only_view_takes_no_writes,
        a_mounted_view_on_ublk_goes_on_after_a_kill_of_the_target,
        a_view_on_the_kernels_nbd_client_goes_on_after_a_kill_of_the_target,
        a_view_outlives_its_deleted_ublk_device_and_ends_when_nobody_uses_it,
        a_view_outlives_its_stopped_ublk_device,
    ],
    ..Group::DEFAULT
};

const LIMIT: Duration = Duration::from_secs(60);

/// A site with the image `pgdata` protected, on which an ext4 holds one file, and a point of it.
struct Bed {
    site: Site,
    daemons: Daemons,
    image: PathBuf,
    content: Vec<u8>,
}

impl Bed {
    fn new() -> Self {
        let site = Site::new();
        let image = site.root().join("pgdata.img");
        let content: Vec<u8> = (0..300_000u32).map(|n| n.to_le_bytes()[1]).collect();
        let at = site.root().join("at");
        fs::create_dir(&at).expect("a folder");
        fs::File::create(&image).and_then(|f| f.set_len(32 << 20)).expect("an image");
        run("mkfs.ext4", &["-q", text(&image)]);
        guest::load("loop");
        run("mount", &["-o", "loop", text(&image), text(&at)]);
        fs::write(at.join("file"), &content).expect("a file");
        run("umount", &[text(&at)]);
        let daemons = site.start_all();
        let path = text(&image);
        site.cli(&["protect", path, "--name", "pgdata", "--attach", "socket", "--yes"]);
        site.wait_protected("pgdata");
        site.tag("pgdata", "whole");
        Self { site, daemons, image, content }
    }

    fn try_open(&self, more: &[&str]) -> std::process::Output {
        let words = ["failover", "test", "pgdata", "--point", "tag:whole", "--device"];
        self.site.try_cli(&[&words[..], more].concat())
    }

    fn open(&self, more: &[&str]) -> (ViewInfo, PathBuf) {
        let out = self.try_open(more);
        assert!(out.status.success(), "{}\n{}", said(&out), self.site.logs());
        let [view] = self.views().try_into().expect("one view is open");
        let device = view.device.clone().expect("it is a device");
        assert!(said(&out).contains(text(&device)), "{}", said(&out));
        (view, guest::block_device(&device))
    }

    fn views(&self) -> Vec<ViewInfo> {
        match self.site.ask_target(&TargetRequest::Views) {
            Ok(TargetReply::Views(views)) => views,
            other => panic!("no views: {other:?}\n{}", self.site.logs()),
        }
    }

    /// The file system at the point is clean, mounts, holds the file, and takes writes.
    fn assert_whole(&self, device: &Path) {
        assert_same_bytes(&self.image, device, "the device and the source");
        run("fsck.ext4", &["-f", "-n", text(device)]);
        let at = self.site.root().join("view");
        fs::create_dir_all(&at).expect("a folder");
        run("mount", &[text(device), text(&at)]);
        assert!(fs::read(at.join("file")).expect("the file") == self.content, "another content");
        fs::write(at.join("more"), vec![7; 1 << 20]).expect("a write to the scratch");
        run("sync", &[]);
        let refused = self.site.try_cli(&["failover", "cleanup"]);
        let why = said(&refused);
        assert_eq!(refused.status.code(), Some(4), "{why}");
        assert!(why.contains("FS-6607") && why.contains(text(&at)), "{why}");
        assert!(fs::read(at.join("more")).is_ok_and(|b| b.len() == 1 << 20), "it is served on");
        run("umount", &[text(&at)]);
        run("fsck.ext4", &["-f", "-n", text(device)]);
    }

    fn close(&self, device: &Path) {
        self.site.cli(&["failover", "cleanup"]);
        assert!(self.views().is_empty());
        assert_gone(device);
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A ublk device vanishes; one of the kernel's NBD client stays as a node without a size.
fn assert_gone(device: &Path) {
    let name = device.file_name().expect("a name").to_str().expect("UTF-8");
    let size = Path::new("/sys/block").join(name).join("size");
    wait_for("the device to be gone", Duration::from_secs(60), || {
        let size = fs::read_to_string(&size).unwrap_or_default();
        matches!(size.trim(), "" | "0").then_some(())
    });
}

/// The first case: nothing has loaded a driver yet.
fn a_view_is_no_device_where_the_kernel_has_no_driver() {
    let bed = Bed::new();
    // What the kernel calls when it lacks a driver.
    let loader = "/proc/sys/kernel/modprobe";
    let usual = fs::read_to_string(loader).expect("the loader");
    fs::write(loader, "/bin/false").expect("no loader");
    let out = bed.try_open(&[]);
    fs::write(loader, usual.trim()).expect("the usual loader");
    let why = said(&out);
    assert_eq!(out.status.code(), Some(1), "{why}");
    for word in ["FS-6606", "by ublk", "by the kernel's NBD client", "modprobe"] {
        assert!(why.contains(word), "{word} is missing: {why}");
    }
    assert!(bed.views().is_empty(), "nothing is left open");
}

fn a_point_on_the_kernels_nbd_client_is_a_whole_file_system() {
    guest::load("nbd");
    let bed = Bed::new();
    let (_, device) = bed.open(&[]);
    assert!(text(&device).starts_with("/dev/nbd"), "{}", device.display());
    bed.assert_whole(&device);
    bed.close(&device);
}

fn a_point_on_ublk_is_a_whole_file_system_until_it_is_closed() {
    guest::load("ublk_drv");
    let bed = Bed::new();
    let (_, device) = bed.open(&[]);
    assert!(text(&device).starts_with("/dev/ublkb"), "{}", device.display());
    bed.assert_whole(&device);
    bed.close(&device);
    // The next view of the point shows nothing of the writes.
    let (_, device) = bed.open(&[]);
    assert_same_bytes(&bed.image, &device, "the second view and the source");
    bed.close(&device);
}

fn a_read_only_view_takes_no_writes() {
    guest::load("ublk_drv");
    let bed = Bed::new();
    let (view, device) = bed.open(&["--read-only"]);
    assert!(view.read_only);
    let flag = run("blockdev", &["--getro", text(&device)]);
    assert_eq!(String::from_utf8_lossy(&flag.stdout).trim(), "1");
    let written = fs::OpenOptions::new().write(true).open(&device).and_then(|mut file| {
        file.write_all(&[7; 4096])?;
        file.sync_all()
    });
    assert!(written.is_err(), "a read-only device took a write");
    let at = bed.site.root().join("view");
    fs::create_dir_all(&at).expect("a folder");
    run("mount", &["-o", "ro,noload", text(&device), text(&at)]);
    assert!(fs::read(at.join("file")).expect("the file") == bed.content, "another content");
    run("umount", &[text(&at)]);
    assert_same_bytes(&bed.image, &device, "the read-only device and the source");
    bed.close(&device);
}

impl Bed {
    /// The view is served again, at the same places.
    fn served_again(&self, before: &ViewInfo) {
        let again = wait_for("the view to be served again", LIMIT, || {
            self.views().pop().filter(|view| view.problems.is_empty())
        });
        let places = |view: &ViewInfo| (view.nbd_socket.clone(), view.device.clone());
        assert_eq!((again.view, places(&again)), (before.view, places(before)));
    }

    /// A file system on the view outlives a killed target, and its content an orderly stop.
    fn assert_goes_on(self) {
        let (view, device) = self.open(&[]);
        let at = self.site.root().join("view");
        fs::create_dir_all(&at).expect("a folder");
        run("mount", &[text(&device), text(&at)]);
        fs::write(at.join("before"), vec![7; 1 << 20]).expect("a write to the view");
        run("sync", &["-f", text(&at)]);
        let mut bed = self;
        bed.daemons.target.kill();
        bed.daemons.target = bed.site.start_target();
        bed.served_again(&view);
        fs::write(at.join("after"), vec![8; 1 << 20]).expect("a write after the kill");
        run("sync", &["-f", text(&at)]);
        run("umount", &[text(&at)]);
        run("fsck.ext4", &["-f", "-n", text(&device)]);
        // Nobody uses it now.
        assert!(bed.daemons.target.stop().success());
        bed.daemons.target = bed.site.start_target();
        bed.served_again(&view);
        let device = guest::block_device(&device);
        run("mount", &[text(&device), text(&at)]);
        for (name, value) in [("before", 7), ("after", 8)] {
            let kept = fs::read(at.join(name)).expect("a file");
            assert!(kept == vec![value; 1 << 20], "{name} is another");
        }
        run("umount", &[text(&at)]);
        bed.close(&device);
    }
}

fn a_mounted_view_on_ublk_goes_on_after_a_kill_of_the_target() {
    guest::load("ublk_drv");
    Bed::new().assert_goes_on();
}

fn a_view_on_the_kernels_nbd_client_goes_on_after_a_kill_of_the_target() {
    guest::load("nbd");
    Bed::new().assert_goes_on();
}

/// What is written to a view before it loses its device.
fn write_a_mark(device: &Path) -> Vec<u8> {
    let mark = vec![0xA7; 8192];
    let file = fs::OpenOptions::new().write(true).open(device).expect("open");
    file.write_all_at(&mark, 1 << 20).and_then(|()| file.sync_all()).expect("write");
    mark
}

impl Bed {
    /// The view says that its device is gone, and shows what was written to it at its export.
    fn assert_outlives(&self, device: &Path, mark: &[u8]) -> ViewInfo {
        let lost = wait_for("the loss of the device to be seen", LIMIT, || {
            self.views().into_iter().find(|view| view.device_lost.is_some())
        });
        assert_eq!(lost.device, None, "a path that is not its own any more");
        assert_gone(device);
        wait_for("the event", LIMIT, || self.site.logs().contains("code=6608").then_some(()));
        let listed = self.site.cli(&["failover", "list"]);
        assert!(listed.contains("its device is gone"), "{listed}");
        let copy = self.site.fetch_view(&lost, "kept.img");
        let kept = fs::read(&copy).expect("the view's bytes");
        assert!(kept[1 << 20..][..mark.len()] == *mark, "what was written is gone");
        lost
    }
}

fn a_view_outlives_its_device_of_the_kernels_nbd_client() {
    guest::load("nbd");
    let bed = Bed::new();
    let (_, device) = bed.open(&[]);
    assert!(text(&device).starts_with("/dev/nbd"), "{}", device.display());
    let mark = write_a_mark(&device);
    run("nbd-client", &["-d", text(&device)]);
    bed.assert_outlives(&device, &mark);
    bed.site.cli(&["failover", "cleanup"]);
    assert!(bed.views().is_empty());
    // The number is free for the next one.
    let (_, again) = bed.open(&[]);
    assert_same_bytes(&bed.image, &again, "the next view and the source");
    bed.close(&again);
}

/// Another program's order to the driver about the ublk device at this node.
fn order_ublk(device: &Path, command: Control) {
    let number = text(device).strip_prefix("/dev/ublkb").and_then(|n| n.parse().ok());
    let device = number.expect("a ublk device");
    // A deletion ends when the daemon has let the device go.
    let answer = call(Call { command, device, data: 0, buffer: Vec::new() }, LIMIT);
    assert_eq!(answer.expect("the driver answers").result, 0, "{command:?}");
}

fn a_view_outlives_its_stopped_ublk_device() {
    guest::load("ublk_drv");
    let bed = Bed::new();
    let (_, device) = bed.open(&[]);
    let mark = write_a_mark(&device);
    order_ublk(&device, Control::StopDev);
    bed.assert_outlives(&device, &mark);
    bed.site.cli(&["failover", "cleanup"]);
    assert!(bed.views().is_empty());
}

fn a_view_outlives_its_deleted_ublk_device_and_ends_when_nobody_uses_it() {
    guest::load("ublk_drv");
    let mut bed = Bed::new();
    let file = bed.site.paths.etc.join("target.toml");
    let config = fs::read_to_string(&file).expect("target.toml");
    let short = config.replace("view_without_device = \"1h\"", "view_without_device = \"2s\"");
    assert_ne!(config, short, "the setting is there");
    fs::write(&file, short).expect("target.toml");
    bed.daemons.target.kill();
    bed.daemons.target = bed.site.start_target();
    let (view, device) = bed.open(&[]);
    let mark = write_a_mark(&device);
    // Somebody who is connected keeps the view.
    let mut client = Command::new("nbdsh")
        .args(["--uri", &view_uri(&view), "-c", "import sys; print(flush=True); sys.stdin.read()"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("nbdsh");
    let connected = client.stdout.take().expect("stdout").read_exact(&mut [0]);
    connected.expect("it is connected");
    order_ublk(&device, Control::DelDev);
    bed.assert_outlives(&device, &mark);
    client.kill().and_then(|()| client.wait()).expect("the client ends");
    wait_for("the view to be closed", LIMIT, || bed.views().is_empty().then_some(()));
    let (_, device) = bed.open(&[]);
    bed.close(&device);
}
