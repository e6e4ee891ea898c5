//! The processes and files of the demo: started, killed, started again, and cleared away.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use farshore_blkfilter::control::{AttachKind, ProtectRequest, VolumeStatus};
use farshore_extent::{PairState, VolumeName};
use farshore_protocol::admin::{ReplicaStatus, TargetReply, TargetRequest};
use farshore_protocol::paths::Paths;

use super::story::Story;
use super::{End, cannot};
use crate::disk::Place;
use crate::flag::Flag;
use crate::ledger::Ledger;
use crate::protect::Way;
use crate::{rpc, units};

/// Longest wait for a daemon to answer, and for a state to be reached.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Longest wait for a process to end, and for the device to be let go.
const GRACE: Duration = Duration::from_secs(20);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// A daemon; in the order in which they are stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Actor {
    /// `farshore filterd`
    Filterd,
    /// `farshore agent`
    Agent,
    /// `farshore target run`
    Target,
}

impl Actor {
    const fn words(self) -> &'static [&'static str] {
        match self {
            Self::Target => &["target", "run"],
            Self::Filterd => &["filterd"],
            Self::Agent => &["agent"],
        }
    }

    /// For people.
    pub fn name(self) -> &'static str {
        self.words()[0]
    }
}

/// How the first copy went.
#[derive(Debug, Clone, Copy)]
pub struct FirstCopy {
    /// Bytes of the volume.
    pub size: u64,
    /// From the command to "protected".
    pub took: Duration,
}

/// Everything on the machine that belongs to the demo.
pub struct Stage {
    root: PathBuf,
    keep: bool,
    paths: Paths,
    exe: PathBuf,
    interrupt: Flag,
    running: Vec<(Actor, Child)>,
    /// The volume's name.
    pub name: VolumeName,
    /// The raw disk.
    pub disk: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// What must be on it, in its first three quarters.
    pub ledger: Arc<Ledger>,
    /// Writes that filled it before anything began.
    pub primed: u64,
    /// It is a block device of the kernel, which outlives its daemon.
    pub device: bool,
}

impl Stage {
    /// A directory, and a disk in it that is full of ledger blocks.
    pub fn set_up(keep: Option<PathBuf>, size: u64, interrupt: Flag) -> Result<Self, End> {
        let kept = keep.is_some();
        let root = directory(keep)?;
        let disk = root.join("disk.img");
        let ledger = Arc::new(Ledger::new(0, size / 4 * 3));
        let made = File::options().write(true).create_new(true).open(&disk).and_then(|file| {
            file.set_len(size)?;
            ledger.prime(|offset, bytes| file.write_all_at(bytes, offset))?;
            file.sync_all()
        });
        made.map_err(|e| cannot(format!("cannot make the disk {}", disk.display()), e))?;
        std::fs::create_dir_all(root.join("log"))
            .map_err(|e| cannot("cannot make a directory for the logs", e))?;
        let exe = std::env::current_exe().map_err(|e| cannot("cannot find this program", e))?;
        let name = VolumeName::new("demo").map_err(|e| cannot("cannot name the volume", e))?;
        Ok(Self {
            paths: Paths::under(&root),
            root,
            keep: kept,
            exe,
            interrupt,
            running: Vec::new(),
            name,
            disk,
            size,
            primed: ledger.issued(),
            ledger,
            device: false,
        })
    }

    /// The directory, for people.
    pub fn place(&self) -> String {
        self.root.display().to_string()
    }

    /// Where the sockets are.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Carries a command out, telling it; its output.
    fn command(&self, story: &Story, shown: &str, words: &[&str]) -> Result<String, End> {
        story.command(shown);
        let done = Command::new(&self.exe)
            .arg("--root")
            .arg(&self.root)
            .args(words)
            .stdin(Stdio::null())
            .output()
            .map_err(|e| cannot(format!("cannot run farshore {shown}"), e))?;
        self.check_interrupt()?;
        if done.status.success() {
            return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&done.stderr);
        Err(cannot(format!("`farshore {shown}` failed"), said.trim()))
    }

    /// Ctrl-C ends the demo at the next step.
    pub fn check_interrupt(&self) -> Result<(), End> {
        if self.interrupt.is_set() { Err(End::Interrupted) } else { Ok(()) }
    }

    /// Waits a while.
    pub fn pause(&self, time: Duration) -> Result<(), End> {
        if self.interrupt.wait(time) { Err(End::Interrupted) } else { Ok(()) }
    }

    /// Looks again and again until `look` sees something; a role that has ended is an error.
    pub fn until<T>(
        &mut self,
        what: &str,
        mut look: impl FnMut(&Paths) -> Option<T>,
    ) -> Result<T, End> {
        let begun = Instant::now();
        loop {
            if let Some(seen) = look(&self.paths) {
                return Ok(seen);
            }
            self.require_all_alive()?;
            if begun.elapsed() > PATIENCE {
                let why = format!("it did not happen within {} s", PATIENCE.as_secs());
                return Err(cannot(format!("waited in vain for {what}"), why));
            }
            self.pause(LOOK)?;
        }
    }

    /// Starts a role and waits until it answers.
    pub fn start(&mut self, actor: Actor) -> Result<Duration, End> {
        let begun = Instant::now();
        let log = self.root.join("log").join(format!("{}.log", actor.name()));
        let opened = File::options().create(true).append(true).open(&log);
        let child = opened.and_then(|log| {
            Command::new(&self.exe)
                .arg("--die-with-parent")
                .arg("--root")
                .arg(&self.root)
                .args(actor.words())
                .stdin(Stdio::null())
                .stdout(Stdio::from(log.try_clone()?))
                .stderr(Stdio::from(log))
                .spawn()
        });
        let child = child.map_err(|e| cannot(format!("cannot start {}", actor.name()), e))?;
        self.running.push((actor, child));
        self.until(&format!("{} to answer", actor.name()), |paths| match actor {
            Actor::Filterd => rpc::filterd(paths).and_then(|mut f| f.list()).ok().map(drop),
            Actor::Agent => {
                let ask = farshore_protocol::admin::AgentRequest::Status;
                rpc::agent(paths, &ask).ok().map(drop)
            }
            Actor::Target => rpc::target(paths, &TargetRequest::Status).ok().map(drop),
        })?;
        Ok(begun.elapsed())
    }

    /// `kill -9`.
    pub fn kill(&mut self, actor: Actor) -> Result<(), End> {
        let at = self.running.iter().position(|(a, _)| *a == actor);
        let Some(at) = at else {
            return Err(cannot(format!("cannot kill {}", actor.name()), "it does not run"));
        };
        let (_, mut child) = self.running.remove(at);
        let killed = child.kill().and_then(|()| child.wait());
        killed.map(drop).map_err(|e| cannot(format!("cannot kill {}", actor.name()), e))
    }

    fn require_all_alive(&mut self) -> Result<(), End> {
        for (actor, child) in &mut self.running {
            if let Ok(Some(status)) = child.try_wait() {
                let log = self.root.join("log").join(format!("{}.log", actor.name()));
                let said = last_lines(&log);
                return Err(cannot(format!("{} has ended: {status}", actor.name()), said));
            }
        }
        Ok(())
    }

    /// Sets both hosts up as a person would, and waits for the first copy. `wish`: how the disk is
    /// to be reached.
    pub fn protect(&mut self, wish: Option<Way>, story: &Story) -> Result<FirstCopy, End> {
        let size = units::bytes(self.size);
        story.chapter(&format!("A disk of {size} gets a target that will keep its past"));
        let listen = format!("127.0.0.1:{}", free_port()?);
        self.command(
            story,
            &format!("target init --listen {listen}"),
            &["target", "init", "--listen", &listen],
        )?;
        story.command("target run &");
        self.start(Actor::Target)?;
        let token = self.command(
            story,
            &format!("token create --for demo-host --address {listen}"),
            &["token", "create", "--for", "demo-host", "--address", &listen],
        )?;
        let token = token.trim();
        let short: String = token.chars().take(12).collect();
        self.command(
            story,
            &format!("enroll {short}... --name demo-host"),
            &["enroll", token, "--name", "demo-host"],
        )?;
        story.command("filterd &");
        self.start(Actor::Filterd)?;
        story.command("agent &");
        self.start(Actor::Agent)?;
        let way = self.choose(wish, story)?;
        self.device = way != Way::Socket;
        let begun = Instant::now();
        let disk = self.disk.display().to_string();
        self.command(
            story,
            &format!("protect disk.img --name demo --policy 1s --attach {}", way.word()),
            &["protect", &disk, "--name", "demo", "--policy", "1s", "--attach", way.word()],
        )?;
        if let Place::Device(device) = Self::place_of(&self.volume()?)? {
            story.say(&format!("The disk is {}, a block device of this host.", device.display()));
        }
        let name = self.name.clone();
        self.until("the first point", |paths| {
            let replica = replica(paths, &name)?;
            (replica.points > 0 && replica.state == PairState::Protected).then_some(())
        })?;
        let copy = FirstCopy { size: self.size, took: begun.elapsed() };
        story.say(&format!(
            "The first copy of {size} is done and the disk is protected after {}.",
            units::span(copy.took)
        ));
        Ok(copy)
    }

    /// The volume as filterd knows it.
    pub fn volume(&self) -> Result<VolumeStatus, End> {
        let volumes = rpc::filterd(&self.paths)?.list()?;
        let volume = volumes.into_iter().find(|v| v.info.name == self.name);
        volume.ok_or_else(|| cannot("filterd does not know the volume", "it was protected before"))
    }

    /// The wish, else ublk where it is possible, else a socket, telling why.
    fn choose(&self, wish: Option<Way>, story: &Story) -> Result<Way, End> {
        if let Some(way) = wish {
            return Ok(way);
        }
        let request = ProtectRequest {
            name: self.name.clone(),
            backing: self.disk.clone(),
            attach: None,
            nbd_socket: None,
            pool_bytes: None,
            point_interval_ms: None,
            seeded: false,
            copy_at: None,
        };
        let best = rpc::filterd(&self.paths)?.preflight(request)?.attach;
        if best.as_ref().is_some_and(|best| best.kind == AttachKind::Ublk) {
            return Ok(Way::Ublk);
        }
        let why = best.map_or_else(|| "filterd did not say why".to_owned(), |best| best.why);
        story.say(&format!("The disk will be a socket, not a block device: {why}."));
        Ok(Way::Socket)
    }

    /// Where the volume is found.
    pub fn place_of(volume: &VolumeStatus) -> Result<Place, End> {
        let info = &volume.info;
        let device = info.link.as_deref().or(info.attachment.device()).map(PathBuf::from);
        let socket = info.attachment.socket().map(PathBuf::from);
        match (device, socket) {
            (Some(device), _) => Ok(Place::Device(device)),
            (None, Some(socket)) => Ok(Place::Nbd { socket, export: info.name.to_string() }),
            (None, None) => Err(cannot("the volume cannot be found", "no device and no socket")),
        }
    }

    /// A block device stays in the kernel without its daemon, and its users wait: it is removed
    /// while there is a daemon to do it.
    fn remove_device(&mut self) {
        if !self.device {
            return;
        }
        if !self.running.iter().any(|(actor, _)| *actor == Actor::Filterd) {
            let _ = self.start(Actor::Filterd);
        }
        let begun = Instant::now();
        while begun.elapsed() < GRACE {
            let removed = rpc::filterd(&self.paths)
                .is_ok_and(|mut filterd| filterd.unprotect(self.name.clone(), false).is_ok());
            if removed {
                self.device = false;
                return;
            }
            let _ = Flag::default().wait(LOOK);
        }
    }

    /// Ends every process, gently first.
    pub fn stop_all(&mut self) {
        use nix::sys::signal::{Signal, kill};
        self.remove_device();
        let pause = Flag::default();
        // The source first: while it stops, the others take what it captured, and it ends clean.
        self.running.sort_by_key(|(actor, _)| *actor);
        for (_, mut child) in self.running.drain(..) {
            if let Ok(pid) = i32::try_from(child.id()) {
                let _ = kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM);
            }
            let begun = Instant::now();
            while matches!(child.try_wait(), Ok(None)) {
                if begun.elapsed() > GRACE {
                    let _ = child.kill();
                    let _ = child.wait();
                    break;
                }
                let _ = pause.wait(LOOK);
            }
        }
    }

    /// Removes every file, unless they are to be kept.
    pub fn clear_away(&self) {
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.root);
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.stop_all();
    }
}

/// The volume as the target knows it.
pub fn replica(paths: &Paths, name: &VolumeName) -> Option<ReplicaStatus> {
    match rpc::target(paths, &TargetRequest::Status) {
        Ok(TargetReply::Status(all)) => all.into_iter().find(|r| r.name == *name),
        _ => None,
    }
}

fn directory(keep: Option<PathBuf>) -> Result<PathBuf, End> {
    let made = match keep {
        Some(dir) => {
            std::path::absolute(&dir).and_then(|dir| std::fs::create_dir_all(&dir).map(|()| dir))
        }
        None => {
            let pattern = std::env::temp_dir().join("farshore-demo-XXXXXX");
            nix::unistd::mkdtemp(&pattern).map_err(std::io::Error::from)
        }
    };
    let dir = made.map_err(|e| cannot("cannot make a directory to work in", e))?;
    // Room for the names of the sockets below it.
    if dir.as_os_str().len() > farshore_protocol::paths::MAX_SOCKET_PATH - 60 {
        let why = "paths of unix sockets are at most 107 bytes long";
        return Err(cannot(format!("the path {} is too long", dir.display()), why));
    }
    Ok(dir)
}

/// A port that nobody uses now; the target is started again on the same one after its kill.
fn free_port() -> Result<u16, End> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| l.local_addr());
    port.map(|a| a.port()).map_err(|e| cannot("cannot find a free port", e))
}

fn last_lines(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(5).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" / ")
}
