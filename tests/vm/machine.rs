//! A virtual machine, seen from the host: boots, runs steps, exchanges signals, loses its power.
//! Nothing is taken for done because QEMU ended: a step is over when its result file is there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use farshore::nbd_client::NbdClient;

use crate::guest;
use crate::harness::{pause, wait_for};
use crate::image::{Cache, Disk, Kernel, SCRATCH, disk_image};

/// Longest boot; 10 s are usual on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// Over the limit of a step, for the machine to say that the step passed it.
const GRACE: Duration = Duration::from_secs(30);

/// What a machine is made of.
#[derive(Clone, Debug)]
pub struct Spec<'a> {
    pub kernel: &'a Kernel,
    pub disks: &'a [Disk],
    pub network: Network<'a>,
    pub memory_mib: u32,
    pub cpus: u8,
    /// With systemd as its first process: the shell script that sets its root up before.
    pub systemd: Option<&'a str>,
}

/// What its network card is joined to.
#[derive(Clone, Copy, Debug)]
pub enum Network<'a> {
    Nothing,
    /// Another machine: folder of the sockets, own side (0 or 1), own address.
    Cable(&'a Path, usize, &'a str),
    /// The host, and nothing else: its loopback address is `HOST` in the machine, and this port of it
    /// leads to `FORWARDED` in the machine.
    Host(u16),
}

/// The host, for a machine that is joined to it.
pub const HOST: &str = "10.0.2.2";
/// The port of a machine that the host reaches.
pub const FORWARDED: u16 = 10809;
/// Of a machine that is joined to the host. It has no route to anywhere else.
const BESIDE_HOST: &str = "10.0.2.15/24";

impl<'a> Network<'a> {
    const fn address(self) -> Option<&'a str> {
        match self {
            Self::Nothing => None,
            Self::Cable(_, _, address) => Some(address),
            Self::Host(_) => Some(BESIDE_HOST),
        }
    }

    fn attach(self, qemu: &mut Command) {
        let (backend, side) = match self {
            Self::Nothing => return,
            Self::Cable(ends, side, _) => {
                let [own, other] = [side, 1 - side].map(|s| ends.join(format!("net{s}")));
                // A machine that was cut leaves its end behind.
                fs::remove_file(&own).ok();
                let ends = [("local", own), ("remote", other)]
                    .map(|(end, path)| format!(",{end}.type=unix,{end}.path={}", path.display()));
                (format!("dgram,id=n{}", ends.concat()), side)
            }
            Self::Host(port) => {
                let forward = format!("hostfwd=tcp:127.0.0.1:{port}-:{FORWARDED}");
                (format!("user,id=n,ipv6=off,{forward}"), 0)
            }
        };
        let card = format!("virtio-net-pci,netdev=n,romfile=,mac=52:54:00:00:00:0{}", side + 1);
        qemu.args(["-netdev", &backend, "-device", &card]);
    }
}

/// A running machine. Dropping it cuts its power.
pub struct Machine {
    qemu: Child,
    /// Servers of the disks with a volatile cache.
    caches: Vec<Child>,
    /// Kept for the reader of a failure: console.log and what the steps said.
    dir: PathBuf,
    /// Sockets need short paths.
    sockets: tempfile::TempDir,
    steps: u32,
}

/// A step that has been started.
pub struct Step {
    name: String,
    number: u32,
    end: Instant,
}

/// A child process that dies with this one, whatever ends it.
fn command(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]);
    command.env("PATH", format!("/usr/bin:/bin:/usr/sbin:/sbin:{}", env_path()));
    command.stdin(Stdio::null());
    command
}

fn env_path() -> String {
    std::env::var("PATH").unwrap_or_default()
}

impl Machine {
    /// Boots a machine that keeps its files in `dir`: disks of a machine that ran there before
    /// have the content it left.
    pub fn boot(dir: &Path, spec: &Spec<'_>) -> Result<Self, String> {
        let out = dir.join("out");
        if out.exists() {
            fs::remove_dir_all(&out).expect("old results go away");
        }
        fs::create_dir_all(&out).expect("folder of the machine");
        let initramfs = dir.join("initramfs");
        spec.kernel.write_initramfs(&initramfs);
        // No watchdog: on a busy host a machine may stand still for half a minute. No test of the timer:
        // there it fails, and the kernel panics.
        let mut append = format!(
            "console=ttyS0 quiet nowatchdog no_timer_check mitigations=off panic=-1 {}",
            guest::CMDLINE_MARK
        );
        if let Some(script) = spec.systemd {
            fs::write(out.join("before-systemd"), script).expect("script");
            append += " TERM=dumb systemd.show_status=1 systemd.condition-needs-update=0";
            append += " systemd.unit=farshore-test.target";
        }
        if let Some(address) = spec.network.address() {
            append += &format!(" farshore.address={address}");
        }
        let mut qemu = command("qemu-system-x86_64");
        // One thread for all CPUs: with several, TCG crashes about one boot in twenty while the
        // kernel patches itself.
        qemu.args("-accel tcg,thread=single -cpu max -no-reboot -display none".split(' '));
        qemu.args(["-smp", &spec.cpus.to_string()]);
        qemu.args("-monitor none -nodefaults -serial".split(' '));
        qemu.arg(format!("file:{}", dir.join("console.log").display()));
        qemu.args(["-m", &spec.memory_mib.to_string()]).args(["-append", &append]);
        qemu.arg("-kernel").arg(spec.kernel.image()).arg("-initrd").arg(&initramfs);
        let modules = spec.kernel.modules();
        for (tag, path, more) in [
            ("host", Path::new("/"), ",readonly=on,multidevs=remap"),
            ("modules", &modules, ",readonly=on"),
            ("out", &out, ""),
        ] {
            let path = path.display();
            qemu.args(["-virtfs"]);
            qemu.arg(format!("local,path={path},mount_tag={tag},security_model=none{more}"));
        }
        let sockets =
            tempfile::Builder::new().prefix("fsvm").tempdir().map_err(|e| e.to_string())?;
        let mut caches = Vec::new();
        let own_scratch = spec.disks.iter().any(|d| d.name == SCRATCH.name);
        let scratch = [SCRATCH].into_iter().filter(|_| !own_scratch);
        for disk in scratch.chain(spec.disks.iter().copied()) {
            caches.extend(attach(&mut qemu, dir, sockets.path(), &disk));
        }
        spec.network.attach(&mut qemu);
        let said = fs::File::create(dir.join("qemu.log")).expect("qemu.log");
        qemu.stdout(said.try_clone().expect("qemu.log")).stderr(said);
        let qemu = qemu.spawn().map_err(|e| format!("setpriv: {e}"))?;
        let mut machine = Self { qemu, caches, dir: dir.to_owned(), sockets, steps: 0 };
        machine.wait_file("ready", "the end of the boot", Instant::now() + BOOT_LIMIT)?;
        Ok(machine)
    }

    /// The folder it shares with the host, `/vm/out` inside.
    pub fn out(&self) -> PathBuf {
        self.dir.join("out")
    }

    /// The NBD export of a disk with a volatile cache: what the machine would read, and a flush that it
    /// has not asked for.
    pub fn disk(&self, disk: &Disk) -> std::io::Result<NbdClient> {
        NbdClient::connect(&self.sockets.path().join(disk.name), "")
    }

    /// Starts a shell script in the machine; returns without waiting for it. A step begins when
    /// the one before has ended.
    pub fn start(&mut self, name: &str, script: &str, limit: Duration) -> Step {
        self.steps += 1;
        let file = self.out().join(format!("{}.step", self.steps));
        let draft = file.with_extension("draft");
        let (seconds, keep) = (limit.as_secs(), guest::environment());
        let quoted = script.replace('\'', r"'\''");
        let text = format!("{keep}exec timeout -k 5 {seconds} bash -c '{quoted}'\n");
        // Appears complete or not at all.
        fs::write(&draft, text).and_then(|()| fs::hard_link(&draft, &file)).expect("step");
        Step { name: name.to_owned(), number: self.steps, end: Instant::now() + limit + GRACE }
    }

    /// Starts a case or step of ours, `MODULE::FUNCTION`, in the machine.
    pub fn start_case(&mut self, name: &str, limit: Duration) -> Step {
        let program = std::env::current_exe().expect("own path");
        self.start(name, &format!("exec '{}' --in-guest {name}", program.display()), limit)
    }

    /// Runs a step of ours to its end, which must be a good one.
    pub fn run_case(&mut self, name: &str, limit: Duration) -> Result<String, String> {
        let step = self.start_case(name, limit);
        self.finish(&step)
    }

    /// Waits for the good end of a step; returns what it printed.
    pub fn finish(&mut self, step: &Step) -> Result<String, String> {
        match self.wait(step)? {
            (0, log) => self.kernel_trouble().map_or(Ok(log), Err),
            (124 | 137, log) => Err(format!("{}: its time was over\n{log}", step.name)),
            (rc, log) => Err(format!("{}: exit code {rc}\n{log}", step.name)),
        }
    }

    /// Waits for a step: exit code and everything it printed.
    pub fn wait(&mut self, step: &Step) -> Result<(i32, String), String> {
        let what = format!("the end of {}", step.name);
        let waited = self.wait_file(&format!("{}.rc", step.number), &what, step.end);
        let log = self.log(step);
        waited.map_err(|e| format!("{e}\n--- what the step said\n{log}"))?;
        let rc = fs::read_to_string(self.out().join(format!("{}.rc", step.number)));
        let rc = rc.ok().and_then(|t| t.trim().parse().ok());
        Ok((rc.ok_or(format!("{} left no exit code", step.name))?, log))
    }

    /// What a step has printed so far.
    pub fn log(&self, step: &Step) -> String {
        let log = fs::read(self.out().join(format!("{}.log", step.number))).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// A step that should go on does.
    pub fn check_running(&mut self, step: &Step) -> Result<(), String> {
        if self.out().join(format!("{}.rc", step.number)).exists() {
            return Err(format!("{} has ended\n{}", step.name, self.log(step)));
        }
        self.check_alive(&step.name)
    }

    /// Tells the running step something: `guest::wait_signal` sees it.
    pub fn signal(&self, name: &str) {
        fs::write(self.out().join(format!("signal-{name}")), b"").expect("signal");
    }

    /// Waits for `guest::signal` of the running step.
    pub fn wait_signal(&mut self, name: &str, step: &Step) -> Result<(), String> {
        let end = step.end;
        let rc = self.out().join(format!("{}.rc", step.number));
        let file = self.out().join(format!("signal-{name}"));
        while !file.exists() {
            self.check_alive(name)?;
            if rc.exists() || Instant::now() > end {
                return Err(format!("no signal {name}; {} said:\n{}", step.name, self.log(step)));
            }
            pause(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Waits until the machine has shut itself down, or begun to boot again, which ends it too.
    /// Returns what it said on its console.
    pub fn wait_off(mut self, limit: Duration) -> Result<String, String> {
        let end = Instant::now() + limit;
        while self.qemu.try_wait().expect("wait for QEMU").is_none() {
            if Instant::now() > end {
                return Err(format!("it does not go down\n{}", self.console()));
            }
            pause(Duration::from_millis(50));
        }
        let all = fs::read(self.dir.join("console.log")).unwrap_or_default();
        self.kernel_trouble().map_or_else(|| Ok(String::from_utf8_lossy(&all).into_owned()), Err)
    }

    /// The power goes: the machine is dead at once, and with it what the volatile caches of its
    /// disks had not been told to keep.
    pub fn cut(mut self) {
        self.kill();
    }

    fn kill(&mut self) {
        for child in [&mut self.qemu].into_iter().chain(&mut self.caches) {
            // Already gone is as good.
            child.kill().ok();
            child.wait().ok();
        }
    }

    fn wait_file(&mut self, name: &str, what: &str, end: Instant) -> Result<(), String> {
        let file = self.out().join(name);
        while !file.exists() {
            self.check_alive(what)?;
            if Instant::now() > end {
                return Err(format!("waited in vain for {what}\n{}", self.console()));
            }
            pause(Duration::from_millis(50));
        }
        Ok(())
    }

    fn check_alive(&mut self, what: &str) -> Result<(), String> {
        match self.qemu.try_wait().expect("wait for QEMU") {
            None => Ok(()),
            Some(status) => {
                Err(format!("the machine died ({status}) before {what}\n{}", self.console()))
            }
        }
    }

    /// What the kernel complained about, if it did.
    fn kernel_trouble(&self) -> Option<String> {
        let all = fs::read(self.dir.join("console.log")).unwrap_or_default();
        let trouble =
            ["BUG:", "Oops", "general protection", "blocked for more than", "WARNING: CPU"];
        let all = String::from_utf8_lossy(&all).into_owned();
        let found = all.lines().any(|line| trouble.iter().any(|t| line.contains(t)));
        found.then(|| self.console())
    }

    fn console(&self) -> String {
        let mut text = String::new();
        for name in ["qemu.log", "console.log"] {
            let all = fs::read(self.dir.join(name)).unwrap_or_default();
            let all = String::from_utf8_lossy(&all).into_owned();
            let skip = all.lines().count().saturating_sub(60);
            text += &format!("--- {name}\n");
            all.lines().skip(skip).for_each(|l| text += &format!("{l}\n"));
        }
        text
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Adds a disk; one with a volatile cache gets a server that holds what was not flushed.
fn attach(qemu: &mut Command, dir: &Path, sockets: &Path, disk: &Disk) -> Option<Child> {
    let Disk { name, blocks: (logical, physical), discard, .. } = *disk;
    let image = disk_image(dir, disk);
    let on = if discard { "on" } else { "off" };
    let unmap = if discard { "unmap" } else { "ignore" };
    let mut server = None;
    let (file, cache) = if disk.cache != Cache::Kept {
        let socket = sockets.join(name);
        let mut nbdkit = command("nbdkit");
        nbdkit.args(["-f", "--filter=cache", "-U"]).arg(&socket).arg("file").arg(&image);
        // Larger than any disk here: what is reclaimed would no longer be volatile.
        let flushes = if disk.cache == Cache::Lying { "cache=unsafe" } else { "cache=writeback" };
        nbdkit.args([flushes, "cache-max-size=64G", "cache-on-read=false"]);
        server = Some(nbdkit.spawn().expect("setpriv"));
        wait_for("nbdkit's socket", Duration::from_secs(20), || socket.exists().then_some(()));
        (format!("nbd+unix:///?socket={}", socket.display()), "none")
    } else {
        (image.display().to_string(), "unsafe")
    };
    qemu.arg("-drive")
        .arg(format!("if=none,id={name},file={file},format=raw,cache={cache},discard={unmap}"));
    qemu.arg("-device").arg(format!(
        "virtio-blk-pci,drive={name},serial={name},logical_block_size={logical},\
         physical_block_size={physical},discard={on},write-zeroes={on}"
    ));
    server
}
