//! Work on the protected disk, points named on the way, and two kills under load.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use farshore_extent::{PairState, PointKind, WallTime};
use farshore_protocol::admin::{PointInfo, TargetReply, TargetRequest};

use super::stage::{Actor, PATIENCE, Stage, replica};
use super::story::{Story, count};
use super::{DemoArgs, End, cannot, disproved, proof};
use crate::disk::Place;
use crate::ledger::{Bounds, Running, Workload, WorkloadStats};
use crate::rpc::{self, Role};
use crate::units;

/// A point whose instant is known from outside.
#[derive(Debug, Clone)]
pub struct Named {
    /// As the target keeps it.
    pub point: PointInfo,
    /// What it must and must not contain.
    pub bounds: Bounds,
}

/// What happened under load.
#[derive(Debug, Default)]
pub struct Load {
    /// The ledger's figures.
    pub stats: WorkloadStats,
    /// Bytes and writes that fio did, when it ran.
    pub fio: Option<(u64, u64)>,
    /// How long the load lasted.
    pub took: Duration,
    /// Points that were named.
    pub named: Vec<Named>,
    /// Largest lag seen, in bytes.
    pub worst_lag: u64,
    /// Lag at each look, in bytes.
    pub lags: Vec<u64>,
    /// From the last write to everything durable at the target.
    pub drained_in: Duration,
    /// The first and the last instant of the load.
    pub span: (WallTime, WallTime),
}

/// Runs the load and everything that happens during it.
pub fn run(args: &DemoArgs, stage: &mut Stage, story: &Story) -> Result<Load, End> {
    let volume = stage.volume()?;
    let place = Stage::place_of(&volume)?;
    let fio = if args.no_fio { None } else { Fio::start(args, stage, &place) };
    let kinds = if fio.is_some() { "the ledger writer and fio" } else { "the ledger writer" };
    story.chapter(&format!("{} seconds of work on the disk, by {kinds}", args.seconds));
    let workload = Workload { place, writers: 4, depth: 4, bytes_per_second: args.rate, seed: 1 };
    let mut load = Load { span: (WallTime::now(), WallTime::now()), ..Load::default() };
    let begun = Instant::now();
    let running =
        workload.start(&stage.ledger).map_err(|e| cannot("cannot open the protected disk", e))?;
    let mut scene = Scene { stage, story, load: &mut load, running: &running, begun };
    scene.play(Duration::from_secs(args.seconds))?;
    load.stats = running.finish().map_err(|e| cannot("a write to the protected disk failed", e))?;
    load.fio = fio.map(Fio::finish).transpose()?;
    load.took = begun.elapsed();
    load.span.1 = WallTime::now();
    drain(stage, &mut load, story)?;
    Ok(load)
}

/// The state of the story while the load runs.
struct Scene<'a> {
    stage: &'a mut Stage,
    story: &'a Story,
    load: &'a mut Load,
    running: &'a Running,
    begun: Instant,
}

impl Scene<'_> {
    fn play(&mut self, length: Duration) -> Result<(), End> {
        self.watch_until(length / 6)?;
        let first = self.tag("before-any-accident")?;
        proof::while_running(self.stage, &first, self.story)?;
        self.watch_until(length * 2 / 6)?;
        self.accident(Actor::Agent, "nobody ships now; writes go on and are remembered")?;
        self.tag("after-the-agent")?;
        self.watch_until(length * 4 / 6)?;
        self.accident(Actor::Target, "nobody receives now; writes go on and are remembered")?;
        self.tag("after-the-target")?;
        if self.stage.device {
            self.watch_until(length * 5 / 6)?;
            self.filterd_dies()?;
        }
        self.watch_until(length)
    }

    /// A line of figures each second.
    fn watch_until(&mut self, until: Duration) -> Result<(), End> {
        while self.begun.elapsed() < until {
            let left = until.saturating_sub(self.begun.elapsed());
            self.stage.pause(left.min(Duration::from_secs(1)))?;
            if self.running.broken() {
                let why = "a connection to filterd was lost, or the device answered with an error";
                return Err(cannot("the writers have stopped", why));
            }
            let name = self.stage.name.clone();
            let replica = self.stage.until("the target's status", |p| replica(p, &name))?;
            let lag = self.stage.volume()?.pool_used;
            self.load.lags.push(lag);
            self.load.worst_lag = self.load.worst_lag.max(lag);
            self.story.say(&format!(
                "{:>5}  {:<12}  {:>9} written  lag {:>8}  newest point {:>5} old  {:>3} points",
                units::span(self.begun.elapsed()),
                replica.state.as_str(),
                units::bytes(self.running.bytes.load(std::sync::atomic::Ordering::Relaxed)),
                units::bytes(lag),
                replica.rpo_ms.map_or("-".into(), |ms| units::span(Duration::from_millis(ms))),
                replica.points,
            ));
        }
        Ok(())
    }

    /// Cuts a named point while the writers write.
    fn tag(&mut self, name: &str) -> Result<Named, End> {
        let ledger = std::sync::Arc::clone(&self.stage.ledger);
        let not_before = ledger.now();
        let begun = Instant::now();
        let point = tag(self.stage, name)?;
        let bounds = Bounds { not_before, not_after: ledger.now() };
        self.story.command(&format!("point tag demo --name {name}"));
        let took = units::moment(begun.elapsed());
        self.story.say(&format!("{} is durable at the target after {took}.", point.point));
        let named = Named { point, bounds };
        self.load.named.push(named.clone());
        Ok(named)
    }

    fn accident(&mut self, victim: Actor, meanwhile: &str) -> Result<(), End> {
        self.stage.kill(victim)?;
        let name = victim.name();
        self.story.event(&format!("kill -9 {name}: {meanwhile}"));
        let before = self.stage.volume()?.writes;
        self.stage.pause(Duration::from_millis(700))?;
        let volume = self.stage.volume()?;
        self.load.worst_lag = self.load.worst_lag.max(volume.pool_used);
        let (more, lag) = (count(volume.writes - before), units::bytes(volume.pool_used));
        let start = self.stage.start(victim)?;
        let back = Instant::now();
        let volume_name = self.stage.name.clone();
        self.stage.until("replication to go on", |paths| {
            let replica = replica(paths, &volume_name)?;
            (replica.connected && replica.state == PairState::Protected).then_some(())
        })?;
        self.story.say(&format!(
            "{more} writes were made meanwhile ({lag} waiting). {name} answers after {}, \
             replication goes on after {}.",
            units::moment(start),
            units::moment(back.elapsed())
        ));
        Ok(())
    }

    /// Only with a block device: the kernel keeps it and its requests for the next filterd.
    fn filterd_dies(&mut self) -> Result<(), End> {
        use std::sync::atomic::Ordering::Relaxed;
        self.stage.kill(Actor::Filterd)?;
        let dead = Instant::now();
        self.story.event("kill -9 filterd: its device answers nobody; writers wait");
        self.stage.pause(Duration::from_millis(300))?;
        let before = self.running.bytes.load(Relaxed);
        self.stage.start(Actor::Filterd)?;
        let bytes = std::sync::Arc::clone(&self.running.bytes);
        self.stage.until("the waiting writes", |_| (bytes.load(Relaxed) > before).then_some(()))?;
        let waited = units::moment(dead.elapsed());
        if self.running.broken() {
            return Err(disproved("a write failed when filterd died", "it had to wait"));
        }
        // Once a point can be cut, order is restored: what may have been missed is there again.
        let back = Instant::now();
        while let Err(end) = self.tag("after-filterd") {
            match end {
                End::Problem(_) if back.elapsed() < PATIENCE => {
                    self.stage.pause(Duration::from_millis(200))?;
                }
                end => return Err(end),
            }
        }
        self.story.say(&format!(
            "Writes waited {waited} and none failed; what may have been missed was there again \
             within {}.",
            units::moment(back.elapsed())
        ));
        Ok(())
    }
}

/// Cuts a point and waits until it is durable.
pub fn tag(stage: &Stage, name: &str) -> Result<PointInfo, End> {
    let request = TargetRequest::Tag {
        volumes: vec![stage.name.clone()],
        name: name.to_owned(),
        kind: PointKind::Crash,
    };
    match rpc::target(stage.paths(), &request)? {
        TargetReply::Tagged(points) => points
            .into_iter()
            .next()
            .ok_or_else(|| cannot("no point was cut", "the answer of the target is empty")),
        _ => Err(rpc::unexpected(Role::Target).into()),
    }
}

/// Waits until everything written is durable at the target, and names that moment.
fn drain(stage: &mut Stage, load: &mut Load, story: &Story) -> Result<(), End> {
    let begun = Instant::now();
    let id = stage.volume()?.info.volume;
    let drained = rpc::filterd(stage.paths())?.drain(id, Duration::from_secs(60))?;
    if !drained {
        return Err(cannot("the backlog was not sent", "60 s were not enough"));
    }
    load.drained_in = begun.elapsed();
    let took = units::moment(load.drained_in);
    story.say(&format!("The writers stop; {took} later everything is durable at the target."));
    let not_before = stage.ledger.now();
    let point = tag(stage, "the-end")?;
    let bounds = Bounds { not_before, not_after: stage.ledger.now() };
    load.named.push(Named { point, bounds });
    Ok(())
}

/// fio on the last quarter of the disk.
struct Fio(Child);

impl Fio {
    /// None when fio, or the engine it needs, is not installed.
    fn start(args: &DemoArgs, stage: &Stage, place: &Place) -> Option<Self> {
        let (engine, whereto) = match place {
            Place::Nbd { socket, export } => {
                ("nbd", format!("--uri=nbd+unix:///{export}?socket={}", socket.display()))
            }
            Place::Device(path) => ("libaio", format!("--filename={}", path.display())),
        };
        let probe = Command::new("fio").arg(format!("--enghelp={engine}")).output().ok()?;
        if !probe.status.success() {
            return None;
        }
        let child = Command::new("fio")
            .args([&format!("--ioengine={engine}"), "--name=demo", "--direct=1"])
            .args(["--rw=randrw", "--bsrange=4k-64k", &whereto])
            .args(["--iodepth=8", "--time_based", "--rate=2m,4m", "--output-format=json"])
            .arg(format!("--offset={}", stage.size / 4 * 3))
            .arg(format!("--size={}", stage.size / 4))
            .arg(format!("--runtime={}", args.seconds))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        child.ok().map(Self)
    }

    /// Bytes and writes. An error of fio is one of the disk.
    fn finish(mut self) -> Result<(u64, u64), End> {
        let failed = |why: String| cannot("fio could not do its work on the disk", why);
        let output = self.0.stdout.take().map(std::io::read_to_string);
        let text = output.and_then(Result::ok).unwrap_or_default();
        let status = self.0.wait().map_err(|e| failed(e.to_string()))?;
        if !status.success() {
            return Err(failed(format!("it ended with {status}")));
        }
        let json = text.find('{').and_then(|at| text.get(at..)).unwrap_or_default();
        let report: serde_json::Value =
            serde_json::from_str(json).map_err(|e| failed(e.to_string()))?;
        let write = &report["jobs"][0]["write"];
        let figure = |name: &str| write[name].as_u64().unwrap_or(0);
        Ok((figure("io_bytes"), figure("total_ios")))
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        // Not waited for: its I/O may wait for a daemon that is dead.
        let _ = self.0.kill();
        let _ = self.0.try_wait();
    }
}
