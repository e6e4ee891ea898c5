//! Freezing real file systems (ext4 and xfs on loop devices) for a point, and that they are thawed in
//! time whoever is killed or hangs in between. Needs root.

mod harness;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use farshore_extent::{CaptureOrder, PointKind};
use farshore_protocol::admin::PointInfo;
use harness::{Daemon, Daemons, Site, pause, run, said, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LONG: Duration = Duration::from_secs(60);
/// A thaw that nobody waits for a time limit for.
const SOON: Duration = Duration::from_secs(4);

/// A file system in a file, mounted.
struct Mounted(PathBuf);

impl Mounted {
    fn new(root: &Path, kind: &str) -> Self {
        let (image, at) = (root.join(format!("{kind}.fs")), root.join(kind));
        let file = fs::File::create(&image).expect("image");
        file.set_len(400 << 20).expect("size");
        fs::create_dir(&at).expect("mount point");
        let (image, place) = (image.to_str().expect("UTF-8"), at.to_str().expect("UTF-8"));
        run(&format!("mkfs.{kind}"), &["-q", image]);
        run("mount", &["-o", "loop", image, place]);
        Self(at)
    }

    /// Begins to write; ends when the file system takes it.
    fn write(&self) -> Probe {
        let file = self.0.join("probe");
        let script = format!("echo x >> '{}'", file.display());
        let child = Command::new("/bin/sh").args(["-c", &script]).stdin(Stdio::null()).spawn();
        Probe(child.expect("sh"))
    }

    /// Waits until a write is stuck.
    fn wait_frozen(&self) -> Probe {
        wait_for("the file system to be frozen", LONG, || {
            let mut probe = self.write();
            (!probe.ends_within(Duration::from_millis(300))).then_some(probe)
        })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Only a test that fails leaves it frozen.
        for (program, option) in [("fsfreeze", "-u"), ("umount", "-l")] {
            Command::new(program).arg(option).arg(&self.0).stderr(Stdio::null()).status().ok();
        }
    }
}

/// A write under way.
struct Probe(Child);

impl Probe {
    fn ends_within(&mut self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            if self.0.try_wait().expect("wait").is_some() {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            pause(Duration::from_millis(10));
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.0.kill().ok();
        if self.ends_within(LONG) {
            self.0.wait().ok();
        }
    }
}

/// A protected volume, a freezer, and two file systems that it freezes.
struct Stage {
    site: Site,
    daemons: Option<Daemons>,
    freezer: Option<Daemon>,
    mounts: Vec<Mounted>,
}

impl Stage {
    /// None, and said so, where this cannot be done.
    fn new(quiet_limit: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
            eprintln!("skipped: freezing needs root and loop devices");
            return None;
        }
        let site = Site::new();
        let daemons = Some(site.start_all());
        site.protect("disk", 16 << 20, "off");
        wait_for("order", LONG, || {
            site.replica("disk").filter(|r| r.order == CaptureOrder::Ordered)
        });
        let mounts = ["ext4", "xfs"].map(|kind| Mounted::new(site.root(), kind)).into();
        let mut stage = Self { site, daemons, freezer: None, mounts };
        stage.configure(&format!(
            "quiet_limit = \"{quiet_limit}\"\nfreeze = [\"DIR/ext4\", \"DIR/xfs\"]\n"
        ));
        stage.start_freezer();
        Some(stage)
    }

    fn configure(&self, lines: &str) {
        let root = self.site.root();
        let hook = root.join("hook");
        let text =
            format!("#!/bin/sh\necho $FARSHORE_STAGE >> '{}'\n", root.join("trace").display());
        fs::write(&hook, text).expect("hook");
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).expect("mode");
        let text = format!(
            "[[application]]\nname = \"shop\"\nvolumes = [\"disk\"]\npre = [\"DIR/hook\"]\n\
             post = [\"DIR/hook\"]\n{lines}"
        );
        let text = text.replace("DIR", root.to_str().expect("UTF-8"));
        fs::create_dir_all(&self.site.paths.etc).expect("folder");
        fs::write(self.site.paths.etc.join("freezer.toml"), text).expect("configuration");
    }

    fn start_freezer(&mut self) {
        self.freezer = Some(self.site.start("freezer", &["freezer"]));
        let socket = self.site.paths.freezer_socket();
        wait_for("the freezer", LONG, || std::os::unix::net::UnixStream::connect(&socket).ok());
    }

    /// Asks for a point and leaves it to itself.
    fn begin(&self, name: &str) -> Child {
        let mut command = Command::new(harness::farshore_bin());
        command.arg("--root").arg(self.site.root());
        command.args(["point", "tag", "disk", "--app", "--name", name]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("farshore")
    }

    fn signal_filterd(&self, signal: Signal) {
        let pid = self.daemons.as_ref().expect("they run").filterd.pid();
        kill(Pid::from_raw(i32::try_from(pid).expect("pid")), signal).expect("signal");
    }

    /// The watchdogs of this site.
    fn watchdogs(&self) -> Vec<Pid> {
        let root = self.site.root().to_str().expect("UTF-8").to_owned();
        let processes = fs::read_dir("/proc").expect("/proc").flatten();
        let numbers = processes.filter_map(|p| p.file_name().to_str()?.parse::<i32>().ok());
        let ours = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains("freezer-watchdog") && line.contains(&root)
        };
        numbers.filter(ours).map(Pid::from_raw).collect()
    }

    /// A point for which filterd hangs while the file systems are frozen, and writes that wait.
    fn frozen(&self, name: &str) -> (Child, Vec<Probe>) {
        self.signal_filterd(Signal::SIGSTOP);
        let tag = self.begin(name);
        let probes = self.mounts.iter().map(Mounted::wait_frozen).collect();
        assert_eq!(self.watchdogs().len(), 1, "one watches");
        (tag, probes)
    }

    /// Lets filterd go on and waits for the point.
    fn end(&self, mut tag: Child, name: &str) -> PointInfo {
        self.signal_filterd(Signal::SIGCONT);
        tag.wait().expect("farshore");
        let points = self.site.points("disk");
        let point = points.into_iter().find(|p| p.name == name);
        point.unwrap_or_else(|| panic!("no point {name}\n{}", self.site.logs()))
    }

    fn trace(&self) -> Vec<String> {
        let text = fs::read_to_string(self.site.root().join("trace")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn wait_trace(&self, expected: &[&str]) {
        wait_for("the hooks", LONG, || (self.trace() == expected).then_some(()));
    }
}

fn all_end_within(probes: &mut [Probe], limit: Duration) {
    let began = Instant::now();
    for probe in probes {
        let left = limit.saturating_sub(began.elapsed());
        assert!(probe.ends_within(left), "frozen still after {limit:?}");
    }
}

fn code(point: &PointInfo) -> (PointKind, Option<u16>) {
    (point.kind, point.note.as_ref().map(|note| note.code.0))
}

#[test]
fn mounts_are_frozen_for_the_point_and_writable_again() {
    let Some(stage) = Stage::new("10s") else { return };
    for round in 0..3 {
        let name = format!("round-{round}");
        let status = stage.begin(&name).wait().expect("farshore");
        let points = stage.site.points("disk");
        let point = points.iter().find(|p| p.name == name).expect("the point");
        assert_eq!(code(point), (PointKind::App, None), "{}", stage.site.logs());
        assert!(status.success());
        let mut probes: Vec<_> = stage.mounts.iter().map(Mounted::write).collect();
        all_end_within(&mut probes, SOON);
    }
    stage.wait_trace(&["pre", "post"].repeat(3));
    wait_for("the watchdogs to end", LONG, || stage.watchdogs().is_empty().then_some(()));
}

#[test]
fn a_marker_that_is_not_answered_keeps_nothing_frozen_beyond_the_limit() {
    let Some(stage) = Stage::new("2s") else { return };
    let (tag, mut probes) = stage.frozen("slow");
    all_end_within(&mut probes, Duration::from_secs(2) + SOON);
    let point = stage.end(tag, "slow");
    assert_eq!(code(&point), (PointKind::Crash, Some(3407)), "{}", stage.site.logs());
    stage.wait_trace(&["pre", "post"]);
}

#[test]
fn the_watchdog_thaws_at_once_when_the_freezer_is_killed() {
    let Some(mut stage) = Stage::new("60s") else { return };
    let (tag, mut probes) = stage.frozen("killed");
    stage.freezer.take().expect("it runs").kill();
    all_end_within(&mut probes, SOON);
    let point = stage.end(tag, "killed");
    assert_eq!(code(&point), (PointKind::Crash, Some(3402)), "{}", stage.site.logs());
    assert_eq!(stage.trace(), ["pre"]);
    stage.start_freezer();
    stage.wait_trace(&["pre", "post"]);
}

#[test]
fn the_freezer_thaws_at_the_limit_when_the_watchdog_is_killed() {
    let Some(stage) = Stage::new("2s") else { return };
    let (tag, mut probes) = stage.frozen("unwatched");
    for watchdog in stage.watchdogs() {
        kill(watchdog, Signal::SIGKILL).expect("kill -9");
    }
    all_end_within(&mut probes, Duration::from_secs(2) + SOON);
    let point = stage.end(tag, "unwatched");
    assert_eq!(code(&point), (PointKind::Crash, Some(3407)), "{}", stage.site.logs());
}

#[test]
fn the_next_freezer_thaws_when_freezer_and_watchdog_are_killed_together() {
    let Some(mut stage) = Stage::new("60s") else { return };
    let (tag, mut probes) = stage.frozen("both");
    let freezer = stage.freezer.take().expect("it runs");
    for watchdog in stage.watchdogs() {
        kill(watchdog, Signal::SIGKILL).expect("kill -9");
    }
    freezer.kill();
    assert!(!probes[0].ends_within(Duration::from_millis(500)), "nobody is left to thaw");
    stage.start_freezer();
    all_end_within(&mut probes, SOON);
    stage.wait_trace(&["pre", "post"]);
    let point = stage.end(tag, "both");
    assert_eq!(point.kind, PointKind::Crash);
}

#[test]
fn a_killed_agent_leaves_nothing_frozen_and_no_hook_open() {
    let Some(mut stage) = Stage::new("60s") else { return };
    let (mut tag, mut probes) = stage.frozen("no agent");
    let Daemons { target, filterd, agent } = stage.daemons.take().expect("they run");
    agent.kill();
    all_end_within(&mut probes, SOON);
    stage.wait_trace(&["pre", "post"]);
    let agent = stage.site.start_agent();
    stage.daemons = Some(Daemons { target, filterd, agent });
    stage.signal_filterd(Signal::SIGCONT);
    tag.wait().expect("farshore");
    // Nothing of it is in the way of the next one.
    wait_for("an application-consistent point", LONG, || {
        stage.begin("again").wait().expect("farshore").success().then_some(())
    });
}

#[test]
fn what_somebody_else_thaws_is_not_called_quiet() {
    let Some(stage) = Stage::new("30s") else { return };
    let (tag, mut probes) = stage.frozen("thawed");
    let at = stage.mounts[1].0.to_str().expect("UTF-8");
    run("fsfreeze", &["--unfreeze", at]);
    all_end_within(&mut probes[1..], SOON);
    let point = stage.end(tag, "thawed");
    all_end_within(&mut probes, SOON);
    assert_eq!(code(&point), (PointKind::Crash, Some(3407)), "{}", stage.site.logs());
}

#[test]
fn what_cannot_or_must_not_be_frozen_is_told_and_nothing_stays_frozen() {
    let Some(stage) = Stage::new("5s") else { return };
    let ext4 = stage.mounts[0].0.clone();
    // The state of every role, and the image of the volume itself.
    for (freeze, wanted) in [
        ("/", 3406),
        ("DIR/nothing-here", 3405),
        ("/proc", 3405),
        ("DIR", 3405), // no mount point
    ] {
        stage.configure(&format!("freeze = [\"DIR/ext4\", \"{freeze}\"]\n"));
        let out = stage.site.try_cli(&["point", "tag", "disk", "--app", "--name", freeze]);
        assert_eq!(out.status.code(), Some(6), "{freeze}: {}", said(&out));
        let told = said(&out);
        assert!(told.contains(&format!("FS-{wanted}")), "{freeze}: {told}\n{}", stage.site.logs());
        let mut probe = Mounted::write(&stage.mounts[0]);
        assert!(probe.ends_within(SOON), "{} stays writable", ext4.display());
    }
    // Frozen already by somebody else: told, and left as it was.
    stage.configure("freeze = [\"DIR/ext4\", \"DIR/xfs\"]\n");
    let xfs = stage.mounts[1].0.to_str().expect("UTF-8").to_owned();
    run("fsfreeze", &["--freeze", &xfs]);
    let out = stage.site.try_cli(&["point", "tag", "disk", "--app", "--name", "frozen before"]);
    assert!(said(&out).contains("FS-3405"), "{}", said(&out));
    let mut probe = stage.mounts[0].write();
    assert!(probe.ends_within(SOON), "the other one is thawed");
    run("fsfreeze", &["--unfreeze", &xfs]);
}
