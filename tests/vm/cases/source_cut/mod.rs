//! The source loses its power again and again, at random moments of a random load, and is rebooted in
//! order in between; the target, a process of the host, stays. After each cut, before filterd runs
//! again: every region in which disk and replica differ is marked in the state on the source's
//! disk. Then: nothing else is compared, a new point equals the disk, the points from before are
//! the cuts of the load's ledger that they were, and of the files on a second volume all that were
//! durable are whole and no other holds a foreign byte. `FARSHORE_ROUNDS` sets how often.

mod bridge;
mod live;
mod marks;
mod tree;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use farshore::disk::Place;
use farshore::ledger::{Bounds, Ledger, Running, Workload};
use farshore::nbd_client::NbdClient;
use farshore_blkfilter::core::RegionMap;
use farshore_extent::PointId;
use farshore_protocol::admin::{PointChoice, PointInfo, ViewInfo};

use crate::harness::{Daemon, Site, chance, free_port, pause, run, wait_for};
use crate::image::{Disk, SCRATCH};
use crate::machine::{HOST, Machine, Step};
use crate::runner::{Lab, STABLE};
use crate::{Case, Scenario, case_list};
use bridge::Bridge;
use live::live;
use marks::{Marks, differing};

pub const SCENARIO: Scenario = Scenario {
    name: "source_cut::what_differs_after_a_cut_was_marked_and_every_file_is_its_own",
    kernel: STABLE,
    soak: false,
    run: what_differs_after_a_cut_was_marked_and_every_file_is_its_own,
};

pub const STEPS: &[Case] = case_list![live];

/// The load writes this one; 16 regions.
const BLOCKS: Disk = Disk::new("blocks", 256).volatile();
/// Has a file system.
const FILES: Disk = Disk::new("files", 64).volatile();
const DISKS: [Disk; 3] = [BLOCKS, FILES, SCRATCH.volatile()];
const LIMIT: Duration = Duration::from_secs(300);

// Files of the folder that host and machine share.
const TOKEN: &str = "token";
const ROUND: &str = "round";
const REPORT: &str = "report";
const LIST: &str = "list";

/// Four of the six ends are cuts in CI.
fn rounds() -> u64 {
    let soak = std::env::var_os("FARSHORE_SOAK").is_some();
    let wanted = std::env::var("FARSHORE_ROUNDS").ok();
    wanted.map_or(if soak { 200 } else { 6 }, |n| n.parse().expect("FARSHORE_ROUNDS is a number"))
}

fn seed() -> u64 {
    let given = std::env::var("FARSHORE_SEED").ok().map(|n| n.parse().expect("FARSHORE_SEED"));
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    given.unwrap_or_else(|| u64::from(now().expect("a clock").subsec_nanos()))
}

fn what_differs_after_a_cut_was_marked_and_every_file_is_its_own(lab: &Lab) -> Result<(), String> {
    let seed = seed();
    println!("source_cut: FARSHORE_SEED={seed}");
    let mut test = Test::new(lab, seed);
    for round in 0..rounds() {
        let life = test.boot(round)?;
        let end = if round % 3 == 1 { Test::stop } else { Test::cut };
        end(&mut test, life)?;
    }
    let life = test.boot(rounds())?;
    test.stop(life)?;
    test.check_files();
    test.prove_all_kept();
    println!("source_cut: {:?}", test.seen);
    // Without these it would have proved nothing.
    assert!(test.seen.differing > 0, "no cut left a difference: {:?}", test.seen);
    assert!(test.seen.unmarked > 0, "everything was always marked: {:?}", test.seen);
    assert!(test.seen.points > rounds(), "no points were proved: {:?}", test.seen);
    Ok(())
}

/// What was there to be looked at, over all rounds.
#[derive(Debug, Default)]
struct Seen {
    /// Regions in which disk and replica differed after a cut.
    differing: u64,
    marked: u64,
    unmarked: u64,
    /// Points that the ledger has proved.
    points: u64,
}

/// A load and the points it may be found in.
struct Proof {
    ledger: Arc<Ledger>,
    /// Cut before it began.
    before: PointInfo,
    named: BTreeMap<PointId, Bounds>,
}

/// A running machine and its step.
struct Life {
    round: u64,
    machine: Machine,
    step: Step,
    bridge: Bridge,
}

struct Test<'a> {
    lab: &'a Lab,
    /// Target and its command line, on the host.
    site: Site,
    _target: Daemon,
    token: Option<String>,
    /// The list of the tree's files.
    list: String,
    dice: u64,
    after_a_cut: bool,
    proof: Option<Proof>,
    /// Digests of whole points.
    kept: Vec<(PointId, blake3::Hash)>,
    seen: Seen,
}

impl<'a> Test<'a> {
    fn new(lab: &'a Lab, seed: u64) -> Self {
        let site = Site::new();
        let listen = format!("127.0.0.1:{}", site.port);
        site.cli(&["target", "init", "--listen", &listen, "--name", HOST]);
        let target = site.start_target();
        let address = format!("{HOST}:{}", site.port);
        let said = site.cli(&["token", "create", "--for", "source", "--address", &address]);
        let token = said.split_whitespace().find(|w| w.starts_with("fs1.")).map(str::to_owned);
        Self {
            lab,
            site,
            _target: target,
            token: Some(token.expect("a token")),
            list: String::new(),
            dice: seed,
            after_a_cut: false,
            proof: None,
            kept: Vec::new(),
            seen: Seen::default(),
        }
    }

    /// From power on to a source that is protected again, with everything proved on the way.
    fn boot(&mut self, round: u64) -> Result<Life, String> {
        let port = free_port();
        let mut machine = self.lab.boot_beside_host("source", &DISKS, port)?;
        let out = machine.out();
        fs::write(out.join(LIST), &self.list).expect("list");
        fs::write(out.join(ROUND), round.to_string()).expect("round");
        if let Some(token) = self.token.take() {
            fs::write(out.join(TOKEN), token).expect("token");
        }
        let step = machine.start_case("source_cut::live", LIMIT);
        machine.wait_signal("shown", &step)?;
        let marks = if round > 0 { self.compare(&machine)? } else { Vec::new() };
        machine.signal("start");
        machine.wait_signal("serving", &step)?;
        let again = self.site.tag_when_ordered(BLOCKS.name, &format!("again-{round}"));
        self.assert_point_is_disk(&again, &BLOCKS, &machine);
        self.site.tag_when_ordered(FILES.name, &format!("again-{round}"));
        machine.signal("settled");
        machine.wait_signal("writing", &step)?;
        if self.after_a_cut {
            assert_only_marked_were_compared(&marks, &out);
        }
        self.prove_points();
        let bridge = Bridge::new(port);
        Ok(Life { round, machine, step, bridge })
    }

    /// What the disks hold before filterd runs, what the replicas hold, and what is marked.
    fn compare(&mut self, machine: &Machine) -> Result<Vec<Marks>, String> {
        let mut all = Vec::new();
        for disk in [&BLOCKS, &FILES] {
            let replica = self.site.replica(disk.name).expect("the replica");
            let marks = Marks::read(&machine.out(), &replica)?;
            assert!(replica.journaled >= marks.released, "{:?} {:?}", replica, marks.released);
            let view = self.site.open(disk.name, PointChoice::At(replica.journaled));
            let mut content = machine.disk(disk).expect("the disk");
            let found = differing(&mut content, &mut client(&view), &marks.set);
            self.site.close(&view);
            let silent: Vec<u64> = found.iter().copied().filter(|r| !marks.set.has(*r)).collect();
            if !silent.is_empty() {
                return Err(format!("{}: regions {silent:?} differ and are not marked", disk.name));
            }
            println!(
                "  {}: {} differ, {} of {} marked",
                disk.name,
                found.len(),
                marks.set.count(),
                marks.set.regions()
            );
            if self.after_a_cut {
                self.seen.differing += found.len() as u64;
                self.seen.marked += marks.set.count();
                self.seen.unmarked += marks.set.regions() - marks.set.count();
            }
            all.push(marks);
        }
        Ok(all)
    }

    fn assert_point_is_disk(&self, point: &PointInfo, disk: &Disk, machine: &Machine) {
        let view = self.site.open(disk.name, PointChoice::Id(point.point));
        let mut content = machine.disk(disk).expect("the disk");
        let regions = RegionMap::new(view.size, RegionMap::DEFAULT_REGION);
        let found = differing(&mut content, &mut client(&view), &regions);
        self.site.close(&view);
        assert!(found.is_empty(), "{} differs from {} in regions {found:?}", disk.name, point.name);
    }

    /// Every point of the last load, and some older ones, are what they were.
    fn prove_points(&mut self) {
        let Some(Proof { ledger, before, named }) = self.proof.take() else { return };
        let mut points = self.site.points(BLOCKS.name);
        // From the cut on the disk is no cut of the ledger: it has lost what was not flushed.
        points.retain(|p| p.lsn > before.lsn && p.lsn.epoch == before.lsn.epoch);
        for point in &points {
            let bounds = named.get(&point.point).copied().unwrap_or(Bounds::ANY);
            let view = self.site.open(BLOCKS.name, PointChoice::Id(point.point));
            let mut client = client(&view);
            let checked = ledger.check(|offset, to| client.read_at(offset, to), bounds);
            assert!(checked.is_ok(), "{} {} is wrong: {checked:?}", point.point, point.name);
            self.site.close(&view);
            self.seen.points += 1;
        }
        for point in named.keys() {
            self.kept.push((*point, self.digest(*point)));
        }
        let old = chance(&mut self.dice, self.kept.len() as u64 + 1);
        self.prove_kept(usize::try_from(old).expect("small"));
    }

    fn digest(&self, point: PointId) -> blake3::Hash {
        let view = self.site.open(BLOCKS.name, PointChoice::Id(point));
        let (mut client, mut hash) = (client(&view), blake3::Hasher::new());
        let mut bytes = vec![0; 1 << 20];
        for offset in (0..view.size.get()).step_by(bytes.len()) {
            client.read_at(offset, &mut bytes).expect("the view answers");
            hash.update(&bytes);
        }
        self.site.close(&view);
        hash.finalize()
    }

    fn prove_kept(&self, which: usize) {
        let Some((point, digest)) = self.kept.get(which) else { return };
        assert_eq!(self.digest(*point), *digest, "{point} has changed since it was proved");
    }

    fn prove_all_kept(&self) {
        (0..self.kept.len()).for_each(|which| self.prove_kept(which));
    }

    /// Writers all over the disk, which reads as zero at first.
    fn load(&mut self, life: &Life) -> (Arc<Ledger>, Running) {
        let socket = life.bridge.socket();
        let mut disk = NbdClient::connect(&socket, "").expect("the machine's export");
        for offset in (0..BLOCKS.bytes).step_by(32 << 20) {
            disk.zero(offset, 32 << 20).expect("zero");
        }
        // So that the marks of this can be cleared.
        disk.flush().expect("flush");
        let before = self.site.tag(BLOCKS.name, &format!("before-{}", life.round));
        let ledger = Arc::new(Ledger::new(0, BLOCKS.bytes));
        let workload = Workload {
            place: Place::Nbd { socket, export: String::new() },
            writers: 2,
            depth: 4,
            bytes_per_second: 0,
            seed: chance(&mut self.dice, u64::MAX >> 33),
        };
        let running = workload.start(&ledger).expect("the load starts");
        let named = BTreeMap::new();
        self.proof = Some(Proof { ledger: Arc::clone(&ledger), before, named });
        (ledger, running)
    }

    /// Lets the load run, with a named point somewhere in it.
    fn let_run(&mut self, life: &mut Life, running: &Running) -> Result<(), String> {
        let proof = self.proof.as_mut().expect("the load's proof");
        let ledger = &proof.ledger;
        wait_for("the load to get going", LIMIT, || (ledger.issued() > 50).then_some(()));
        pause(Duration::from_millis(chance(&mut self.dice, 2000)));
        let not_before = ledger.now();
        let point = self.site.tag(BLOCKS.name, &format!("during-{}", life.round));
        let not_after = ledger.now();
        proof.named.insert(point.point, Bounds { not_before, not_after });
        pause(Duration::from_millis(chance(&mut self.dice, 2000)));
        assert!(!running.broken(), "the load got an error in round {}", life.round);
        life.machine.check_running(&life.step)
    }

    fn cut(&mut self, mut life: Life) -> Result<(), String> {
        let (ledger, running) = self.load(&life);
        self.let_run(&mut life, &running)?;
        // A disk may write back what it has not been asked for, and only some of it.
        for disk in [&BLOCKS, &FILES, &DISKS[2]] {
            if chance(&mut self.dice, 3) == 0 {
                life.machine.disk(disk).and_then(|mut disk| disk.flush()).expect("the disk");
            }
        }
        pause(Duration::from_millis(chance(&mut self.dice, 50)));
        let list = life.machine.out().join(LIST);
        life.machine.cut();
        self.list = fs::read_to_string(list).expect("list");
        // Its writers have lost their machine.
        drop(running.finish());
        println!("source_cut: round {}: cut after {} writes", life.round, ledger.issued());
        self.after_a_cut = true;
        Ok(())
    }

    fn stop(&mut self, mut life: Life) -> Result<(), String> {
        let (ledger, running) = self.load(&life);
        self.let_run(&mut life, &running)?;
        running.finish().expect("no write failed");
        let Life { round, mut machine, step, bridge: _ } = life;
        machine.signal("stop");
        machine.wait_signal("unmounted", &step)?;
        for disk in [&BLOCKS, &FILES] {
            let point = self.site.tag(disk.name, &format!("end-{round}"));
            self.assert_point_is_disk(&point, disk, &machine);
        }
        machine.signal("off");
        machine.finish(&step)?;
        self.list = fs::read_to_string(machine.out().join(LIST)).expect("list");
        // What has not reached the disks by now is gone.
        machine.cut();
        println!("source_cut: round {round}: stopped after {} writes", ledger.issued());
        self.after_a_cut = false;
        Ok(())
    }

    /// The last point of the files, which equals the disk, is a clean file system.
    fn check_files(&self) {
        let view = self.site.open(FILES.name, PointChoice::Latest);
        let copy = self.site.fetch_view(&view, "files.img");
        self.site.close(&view);
        run("fsck.ext4", &["-f", "-n", copy.to_str().expect("UTF-8")]);
    }
}

fn client(view: &ViewInfo) -> NbdClient {
    NbdClient::connect(&view.nbd_socket, &view.export).expect("the view answers")
}

fn assert_only_marked_were_compared(marks: &[Marks], out: &Path) {
    let report = fs::read_to_string(out.join(REPORT)).expect("report");
    for volume in marks {
        let line = report.lines().find_map(|line| line.strip_prefix(&format!("{} ", volume.name)));
        let compared: u64 = line.and_then(|bytes| bytes.parse().ok()).expect("a line");
        assert_eq!(compared, volume.bytes(), "{}: more than the marked was compared", volume.name);
    }
}
