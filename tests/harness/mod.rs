//! Real daemons for system tests: a site is one `--root` folder with its processes; they die with
//! the test. Conditions are waited for, never slept for; every wait has a limit and says what it
//! waited for.
#![allow(dead_code)] // each test file uses its part

pub mod load;

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use farshore_changelog::codec;
use farshore_extent::{PairState, Problem, VolumeName};
use farshore_protocol::admin::{
    AgentReply, AgentRequest, AgentStatus, OpenView, PointChoice, PointInfo, ReplicaStatus,
    TargetReply, TargetRequest, ViewInfo,
};
use farshore_protocol::paths::Paths;

/// The executable under test: `FARSHORE_BIN`, else the one built beside the tests.
pub fn farshore_bin() -> PathBuf {
    if let Some(path) = std::env::var_os("FARSHORE_BIN") {
        return path.into();
    }
    let here = std::env::current_exe().expect("the test's own path");
    let profile = here.ancestors().nth(2).expect("deps/ lies in the profile's folder");
    let bin = profile.join("farshore");
    assert!(bin.is_file(), "{} is missing: cargo build first, or set FARSHORE_BIN", bin.display());
    bin
}

/// Waits for a condition, asking every few milliseconds.
///
/// # Panics
/// After `limit`, naming what was waited for.
pub fn wait_for<T>(what: &str, limit: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = ask() {
            return value;
        }
        assert!(Instant::now() < end, "waited {limit:?} in vain for: {what}");
        pause(Duration::from_millis(20));
    }
}

/// Lets time pass where passing time is the point (load runs on, a poll interval).
pub fn pause(time: Duration) {
    let lock = Mutex::new(());
    let guard = lock.lock().expect("own lock");
    drop(Condvar::new().wait_timeout(guard, time));
}

/// Runs a program and returns its output; fails the test with everything it said otherwise.
pub fn run(program: &str, args: &[&str]) -> Output {
    let out = try_run(program, args);
    assert!(out.status.success(), "{program} {args:?}: {}\n{}", out.status, said(&out));
    out
}

/// The same, whatever it did.
pub fn try_run(program: &str, args: &[&str]) -> Output {
    // The system's own programs first: nbdsh needs the python that has libnbd's module.
    let path = std::env::var("PATH").unwrap_or_default();
    Command::new(program)
        .args(args)
        .env("PATH", format!("/usr/bin:/bin:/usr/sbin:/sbin:{path}"))
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{program} cannot be run ({e}): ./tools/test installs it"))
}

/// Both streams of a finished program.
pub fn said(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// How often daemons are killed under load.
const DEFAULT_KILLS: u64 = 10;
const SOAK_KILLS: u64 = 200;

/// The same, or as `FARSHORE_KILLS` says.
pub fn kills() -> u64 {
    let soak = std::env::var_os("FARSHORE_SOAK").is_some();
    let wanted = std::env::var("FARSHORE_KILLS").ok();
    let default = if soak { SOAK_KILLS } else { DEFAULT_KILLS };
    wanted.map_or(default, |n| n.parse().expect("FARSHORE_KILLS is a number"))
}

/// Repeatable chance: a number below `below`.
pub fn chance(state: &mut u64, below: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % below
}

/// A free TCP port on the loopback address.
pub fn free_port() -> u16 {
    let probe = TcpListener::bind("127.0.0.1:0").expect("loopback");
    probe.local_addr().expect("bound").port()
}

/// One of our daemons.
pub struct Daemon {
    pub role: &'static str,
    child: Child,
}

impl Daemon {
    /// SIGKILL, and gone when this returns.
    pub fn kill(mut self) {
        self.child.kill().expect("kill -9");
        self.child.wait().expect("reaped");
    }

    /// SIGTERM, and its exit status.
    pub fn stop(mut self) -> std::process::ExitStatus {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).expect("pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("SIGTERM");
        wait_for("an orderly stop", Duration::from_secs(30), || {
            self.child.try_wait().expect("wait")
        })
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Already gone is fine: the test killed or stopped it.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// All roles on this machine below one folder.
pub struct Site {
    root: PathBuf,
    /// Goes away with the site; none for a folder that stays.
    _temporary: Option<tempfile::TempDir>,
    pub paths: Paths,
    pub port: u16,
    /// Runs every program behind this prefix, such as `ip netns exec NAME`.
    prefix: Vec<String>,
}

impl Site {
    /// An empty folder; nothing runs yet.
    pub fn new() -> Self {
        // Short names: unix socket paths have at most 107 bytes.
        let dir = tempfile::Builder::new().prefix("fs").tempdir().expect("temporary folder");
        let path = dir.path().to_owned();
        Self { _temporary: Some(dir), ..Self::at(&path) }
    }

    /// A folder that stays, with whatever is in it: what is left of a host that lost its power.
    pub fn at(root: &Path) -> Self {
        std::fs::create_dir_all(root).expect("folder of the site");
        let paths = Paths::under(root);
        Self { root: root.into(), _temporary: None, paths, port: free_port(), prefix: Vec::new() }
    }

    /// The same in a network namespace.
    pub fn in_namespace(name: &str) -> Self {
        let prefix = ["ip", "netns", "exec", name].map(str::to_owned).to_vec();
        Self { prefix, ..Self::new() }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    fn command(&self, args: &[&str]) -> Command {
        let bin = farshore_bin();
        let mut command = match self.prefix.split_first() {
            Some((first, rest)) => {
                let mut c = Command::new(first);
                c.args(rest).arg(bin);
                c
            }
            None => Command::new(bin),
        };
        command.arg("--root").arg(self.root()).args(args).stdin(Stdio::null());
        command
    }

    /// Runs the command line and returns whatever it did.
    pub fn try_cli(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("farshore can be run")
    }

    /// Runs the command line; it must succeed. Returns what it printed on stdout.
    pub fn cli(&self, args: &[&str]) -> String {
        let out = self.try_cli(args);
        assert!(
            out.status.success(),
            "farshore {args:?}: {}\n{}\n{}",
            out.status,
            said(&out),
            self.logs()
        );
        String::from_utf8(out.stdout).expect("UTF-8")
    }

    /// Starts a role; its log goes to ROLE.log in the site's folder.
    pub fn start(&self, role: &'static str, args: &[&str]) -> Daemon {
        self.start_with(role, self.command(args))
    }

    fn start_with(&self, role: &'static str, mut command: Command) -> Daemon {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.root().join(format!("{role}.log")))
            .expect("log file");
        command.stdout(log.try_clone().expect("log")).stderr(log).process_group(0);
        let child = command.spawn().expect("farshore can be started");
        Daemon { role, child }
    }

    pub fn start_target(&self) -> Daemon {
        self.start_target_with(&[])
    }

    /// With these variables in its environment.
    pub fn start_target_with(&self, variables: &[(&str, &str)]) -> Daemon {
        let mut command = self.command(&["target", "run"]);
        command.envs(variables.iter().copied());
        let mut daemon = self.start_with("target", command);
        wait_for("the target's admin socket", Duration::from_secs(20), || {
            assert!(daemon.is_alive(), "the target ended\n{}", self.logs());
            self.ask_target(&TargetRequest::Hosts).ok()
        });
        daemon
    }

    pub fn start_agent(&self) -> Daemon {
        self.start("agent", &["agent"])
    }

    /// Returns when it says that it is ready, as it says to systemd.
    pub fn start_filterd(&self) -> Daemon {
        let path = self.root().join("ready.sock");
        std::fs::remove_file(&path).ok();
        let ready = UnixDatagram::bind(&path).expect("a socket to be told");
        ready.set_nonblocking(true).expect("socket");
        let mut command = self.command(&["filterd"]);
        command.env("NOTIFY_SOCKET", &path);
        let mut daemon = self.start_with("filterd", command);
        wait_for("filterd to be ready", Duration::from_secs(90), || {
            assert!(daemon.is_alive(), "filterd ended\n{}", self.logs());
            let mut text = [0; 256];
            let len = ready.recv(&mut text).ok()?;
            text[..len].starts_with(b"READY=1").then_some(())
        });
        daemon
    }

    /// Target initialised and running, host enrolled, filterd and agent running.
    pub fn start_all(&self) -> Daemons {
        let address = format!("127.0.0.1:{}", self.port);
        self.cli(&["target", "init", "--listen", &address, "--name", "127.0.0.1"]);
        let target = self.start_target();
        let token = self.cli(&["token", "create", "--for", "test-host", "--address", &address]);
        let token = token.split_whitespace().find(|w| w.starts_with("fs1.")).expect("a token");
        self.cli(&["enroll", token]);
        let filterd = self.start_filterd();
        let agent = self.start_agent();
        Daemons { target, filterd, agent }
    }

    /// All daemons of a site that was set up before.
    pub fn start_again(&self) -> Daemons {
        let target = self.start_target();
        Daemons { target, filterd: self.start_filterd(), agent: self.start_agent() }
    }

    /// What every daemon has logged.
    pub fn logs(&self) -> String {
        let mut all = String::new();
        for role in ["target", "filterd", "agent", "freezer"] {
            let mut text = String::new();
            if let Ok(mut file) = File::open(self.root().join(format!("{role}.log"))) {
                file.read_to_string(&mut text).ok();
                let tail: Vec<&str> = text.lines().rev().take(40).collect();
                all += &format!("--- {role}.log\n");
                tail.iter().rev().for_each(|l| all += &format!("{l}\n"));
            }
        }
        all
    }

    /// A sparse raw image in the site's folder, protected under `name` with points every
    /// `interval`. Returns the image and the NBD address.
    pub fn protect(&self, name: &str, bytes: u64, interval: &str) -> (PathBuf, String) {
        let image = self.root().join(format!("{name}.img"));
        File::create(&image).and_then(|f| f.set_len(bytes)).expect("image");
        self.protect_image(name, &image, interval);
        (image, self.nbd_uri(name))
    }

    pub fn protect_image(&self, name: &str, image: &Path, interval: &str) {
        let path = image.to_str().expect("UTF-8 path");
        let by = ["--attach", "socket", "--yes"];
        self.cli(&[&["protect", path, "--name", name, "--policy", interval][..], &by].concat());
    }

    /// Address of a protected volume for NBD clients.
    pub fn nbd_uri(&self, name: &str) -> String {
        let socket = self.paths.run.join("nbd").join(format!("{name}.sock"));
        format!("nbd+unix:///{name}?socket={}", socket.display())
    }

    pub fn ask_target(&self, request: &TargetRequest) -> Result<TargetReply, Problem> {
        ask(&self.paths.target_socket(), request)
    }

    pub fn agent_status(&self) -> Option<AgentStatus> {
        match ask(&self.paths.agent_socket(), &AgentRequest::Status) {
            Ok(AgentReply::Status(status)) => Some(status),
            Ok(AgentReply::Events(_) | AgentReply::Tagged(_)) | Err(_) => None,
        }
    }

    pub fn replica(&self, name: &str) -> Option<ReplicaStatus> {
        match self.ask_target(&TargetRequest::Status) {
            Ok(TargetReply::Status(all)) => all.into_iter().find(|r| r.name.as_str() == name),
            _ => None,
        }
    }

    /// Waits until the volume is in order at the target and has a point.
    pub fn wait_protected(&self, name: &str) -> ReplicaStatus {
        let ready = |r: &ReplicaStatus| r.state == PairState::Protected && r.points > 0;
        match self.try_wait(Duration::from_secs(60), || self.replica(name).filter(ready)) {
            Some(status) => status,
            None => {
                panic!("{name} never became protected: {:?}\n{}", self.replica(name), self.logs())
            }
        }
    }

    fn try_wait<T>(&self, limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            if let Some(value) = ask() {
                return Some(value);
            }
            pause(Duration::from_millis(50));
        }
        None
    }

    /// Cuts a named point and waits until it is durable at the target.
    pub fn tag(&self, volume: &str, name: &str) -> PointInfo {
        wait_for("the source to be connected", Duration::from_secs(30), || {
            self.replica(volume).filter(|r| r.connected)
        });
        // A connection that has just died looks alive for a moment (FS-6605, FS-5904): try again, as the
        // answer says.
        wait_for("the point to be made", Duration::from_secs(60), || {
            let out = self.try_cli(&["point", "tag", volume, "--name", name]);
            let told = String::from_utf8_lossy(&out.stderr);
            let refused = ["FS-6605", "FS-5904"].iter().any(|code| told.contains(code));
            assert!(out.status.success() || refused, "point tag: {}\n{}", said(&out), self.logs());
            out.status.success().then_some(())
        });
        let points = self.points(volume);
        points.into_iter().find(|p| p.name == name).expect("the tagged point is listed")
    }

    /// As [`Self::tag`], for a volume that may be catching up: as soon as a point can be cut.
    pub fn tag_when_ordered(&self, volume: &str, name: &str) -> PointInfo {
        wait_for("order", Duration::from_secs(120), || {
            let out = self.try_cli(&["point", "tag", volume, "--name", name]);
            let told = String::from_utf8_lossy(&out.stderr);
            // FS-6530: the source has only just begun to protect it.
            let early = ["FS-3013", "FS-6530", "FS-6605", "FS-5904"];
            let early = early.iter().any(|code| told.contains(code));
            assert!(out.status.success() || early, "point tag: {}\n{}", said(&out), self.logs());
            out.status.success().then_some(())
        });
        let points = self.points(volume);
        points.into_iter().find(|p| p.name == name).expect("the tagged point is listed")
    }

    pub fn points(&self, volume: &str) -> Vec<PointInfo> {
        let volume = VolumeName::new(volume).expect("name");
        match self.ask_target(&TargetRequest::Points { volume, limit: 0 }) {
            Ok(TargetReply::Points(points)) => points,
            other => panic!("no points: {other:?}\n{}", self.logs()),
        }
    }

    pub fn open(&self, volume: &str, point: PointChoice) -> ViewInfo {
        self.try_open(volume, point)
            .unwrap_or_else(|e| panic!("the view did not open: {e:?}\n{}", self.logs()))
    }

    pub fn try_open(&self, volume: &str, point: PointChoice) -> Result<ViewInfo, Problem> {
        let volume = VolumeName::new(volume).expect("name");
        let request = OpenView::new(volume, point);
        match self.ask_target(&TargetRequest::OpenView(request))? {
            TargetReply::View(view) => Ok(*view),
            other => panic!("no view: {other:?}"),
        }
    }

    pub fn close(&self, view: &ViewInfo) {
        let request = TargetRequest::CloseView { view: view.view, note: String::new() };
        assert!(
            matches!(self.ask_target(&request), Ok(TargetReply::Done)),
            "the view did not close"
        );
    }

    /// Copies a view's content into a file of the site and returns it.
    pub fn fetch_view(&self, view: &ViewInfo, name: &str) -> PathBuf {
        let to = self.root().join(name);
        run("nbdcopy", &[&view_uri(view), to.to_str().expect("UTF-8")]);
        to
    }

    /// Cuts a point as soon as one can be cut; it must be equal to the disk, which nobody writes to.
    pub fn assert_point_equals(&self, volume: &str, name: &str, disk: &Path) -> PointInfo {
        let point = self.tag_when_ordered(volume, name);
        let view = self.open(volume, PointChoice::Id(point.point));
        let copy = self.fetch_view(&view, &format!("{name}.img"));
        if std::fs::metadata(disk).expect("disk").file_type().is_block_device() {
            // What the disk holds, and not what the page cache remembers of it: a buffered read that
            // overlaps a direct write may leave the old bytes there.
            run("blockdev", &["--flushbufs", disk.to_str().expect("UTF-8")]);
        }
        assert_same_bytes(disk, &copy, "disk and point differ");
        std::fs::remove_file(copy).expect("the copy goes away");
        self.close(&view);
        point
    }
}

/// The three daemons of a whole site.
pub struct Daemons {
    pub target: Daemon,
    pub filterd: Daemon,
    pub agent: Daemon,
}

/// Address of a view for NBD clients.
pub fn view_uri(view: &ViewInfo) -> String {
    format!("nbd+unix:///{}?socket={}", view.export, view.nbd_socket.display())
}

/// One request on a local socket of ours.
pub fn ask<Q: serde::Serialize, R: serde::de::DeserializeOwned>(
    socket: &Path,
    request: &Q,
) -> Result<R, Problem> {
    let gone = |e: std::io::Error| Problem::harmless(5000, e.to_string(), "", "");
    let mut stream = UnixStream::connect(socket).map_err(gone)?;
    stream.set_read_timeout(Some(Duration::from_secs(60))).map_err(gone)?;
    codec::write_message(&mut stream, request).map_err(gone)?;
    stream.flush().map_err(gone)?;
    codec::read_message::<Result<R, Problem>>(&mut stream).map_err(gone)?
}

/// Both files have the same content; names the first difference.
pub fn assert_same_bytes(a: &Path, b: &Path, what: &str) {
    let out = Command::new("cmp").arg(a).arg(b).output().expect("cmp");
    assert!(out.status.success(), "{what}: {}", said(&out));
}
