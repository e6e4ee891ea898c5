//! Boots what the chosen tests need and reports like any other test program, so that tools/test and
//! a person read one form: "test NAME ... ok", the failures, "test result: ...".

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::image::{Disk, Kernel};
use crate::machine::{Machine, Network, Spec};
use crate::{Case, Group, Scenario, cases, guest};

/// Kernel of Debian's stable release.
pub const STABLE: &str = "6.12";
/// Newest kernel that Debian has built.
pub const NEWEST: &str = "7.2";
const MEMORY_MIB: u32 = 2048;

/// Runs one case or step. Never outside of a test machine.
pub fn in_guest(name: &str) {
    assert!(guest::inside(), "{name} runs in a test machine only: start this program without it");
    let (module, function) = name.split_once("::").expect("MODULE::FUNCTION");
    let groups = cases::GROUPS.iter().map(|g| (g.name, g.cases));
    let known = groups.chain(cases::STEPS.iter().copied());
    let case = known
        .filter(|(of, _)| *of == module)
        .find_map(|(_, all)| all.iter().find(|c| c.name == function));
    (case.unwrap_or_else(|| panic!("there is no case {name}")).run)();
}

/// Where a scenario's machines live.
pub struct Lab {
    dir: PathBuf,
    kernel: Kernel,
    /// Of every machine it boots.
    cpus: u8,
    sockets: tempfile::TempDir,
}

impl Lab {
    /// Files of a test are kept until it runs again: console.log, what the steps said.
    fn new(name: &str, kernel: &Kernel, cpus: u8) -> Self {
        let dir =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("vm").join(name.replace("::", "."));
        if dir.exists() {
            std::fs::remove_dir_all(&dir).expect("old files go away");
        }
        let sockets = tempfile::Builder::new().prefix("fsvm").tempdir().expect("folder");
        Self { dir, kernel: kernel.clone(), cpus, sockets }
    }

    /// Boots a machine. One of the same name that ran before has left its disks.
    pub fn boot(&self, name: &str, disks: &[Disk]) -> Result<Machine, String> {
        Machine::boot(&self.dir.join(name), &Spec { disks, ..self.spec() })
    }

    /// The same with systemd. The root is as new at each boot: `before`, a shell script, sets it up.
    pub fn boot_systemd(
        &self,
        name: &str,
        disks: &[Disk],
        before: &str,
    ) -> Result<Machine, String> {
        let systemd = Some(before);
        Machine::boot(&self.dir.join(name), &Spec { disks, systemd, ..self.spec() })
    }

    fn spec(&self) -> Spec<'_> {
        let (kernel, cpus, memory_mib) = (&self.kernel, self.cpus, MEMORY_MIB);
        let network = Network::Nothing;
        Spec { kernel, disks: &[], network, memory_mib, cpus, systemd: None }
    }

    /// Boots one of two machines that a cable joins; `side` is 0 or 1, `address` its own, with the
    /// length of the prefix.
    pub fn boot_joined(
        &self,
        name: &str,
        disks: &[Disk],
        side: usize,
        address: &str,
    ) -> Result<Machine, String> {
        let network = Network::Cable(self.sockets.path(), side, address);
        Machine::boot(&self.dir.join(name), &Spec { disks, network, ..self.spec() })
    }

    /// Boots a machine that reaches the host's loopback address as `machine::HOST`, and which the
    /// host reaches by `port`.
    pub fn boot_beside_host(
        &self,
        name: &str,
        disks: &[Disk],
        port: u16,
    ) -> Result<Machine, String> {
        let network = Network::Host(port);
        Machine::boot(&self.dir.join(name), &Spec { disks, network, ..self.spec() })
    }
}

/// Something that one thread does from boot to end.
enum Job {
    Group(&'static Group, Vec<&'static Case>),
    Scenario(&'static Scenario),
}

impl Job {
    fn kernel(&self) -> &'static str {
        match self {
            Self::Group(group, _) => group.kernel,
            Self::Scenario(scenario) => scenario.kernel,
        }
    }

    fn names(&self) -> Vec<String> {
        match self {
            Self::Group(group, all) => all.iter().map(|c| full_name(group, c)).collect(),
            Self::Scenario(scenario) => vec![scenario.name.to_owned()],
        }
    }

    fn soak(&self) -> bool {
        match self {
            Self::Group(group, _) => group.soak,
            Self::Scenario(scenario) => scenario.soak,
        }
    }
}

fn full_name(group: &Group, case: &Case) -> String {
    format!("{}::{}", group.name, case.name)
}

/// What the command line asks for; a subset of what other test programs understand.
#[derive(Default)]
struct Options {
    filters: Vec<String>,
    exact: bool,
    list: bool,
    include_soak: bool,
    show: bool,
    threads: Option<usize>,
    /// In place of those that the tests ask for.
    kernel: Option<String>,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, String> {
        let mut options = Self::default();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "--exact" => options.exact = true,
                "--list" => options.list = true,
                "--include-ignored" => options.include_soak = true,
                "--show-output" | "--nocapture" => options.show = true,
                "--test-threads" => {
                    let number = rest.next().and_then(|n| n.parse().ok());
                    options.threads = Some(number.ok_or("--test-threads needs a number")?);
                }
                "--kernel" => {
                    let version = rest.next().ok_or("--kernel needs a version")?;
                    options.kernel = Some(version.clone());
                }
                flag if flag.starts_with('-') => return Err(format!("unknown option {flag}")),
                filter => options.filters.push(filter.to_owned()),
            }
        }
        Ok(options)
    }

    fn chooses(&self, name: &str) -> bool {
        let fits = |f: &String| if self.exact { name == f } else { name.contains(f.as_str()) };
        self.filters.is_empty() || self.filters.iter().any(fits)
    }

    fn kernel<'a>(&'a self, job: &'a Job) -> &'a str {
        self.kernel.as_deref().unwrap_or_else(|| job.kernel())
    }

    fn jobs(&self) -> Vec<Job> {
        let groups = cases::GROUPS.iter().map(|group| {
            let chosen = group.cases.iter().filter(|c| self.chooses(&full_name(group, c)));
            Job::Group(group, chosen.collect())
        });
        let scenarios = cases::SCENARIOS.iter().filter(|s| self.chooses(s.name));
        let all = groups.chain(scenarios.map(Job::Scenario));
        all.filter(|job| !job.names().is_empty()).collect()
    }
}

/// Results as they come in.
#[derive(Default)]
struct Report {
    passed: usize,
    ignored: usize,
    failures: Vec<(String, String)>,
    show: bool,
}

impl Report {
    fn add(&mut self, name: &str, time: Duration, result: Result<String, String>) {
        match result {
            Ok(log) => {
                // A case that could not run says so; that is not a success.
                if let Some(reason) = log.lines().find_map(|l| l.strip_prefix("skipped: ")) {
                    println!("skipped: {name}: {reason}");
                }
                self.passed += 1;
                println!("test {name} ... ok ({:.1} s)", time.as_secs_f64());
                if self.show && !log.trim().is_empty() {
                    println!("---- {name} ----\n{}", log.trim_end().replace("\nskipped: ", "\n"));
                }
            }
            Err(why) => {
                println!("test {name} ... FAILED");
                self.failures.push((name.to_owned(), why));
            }
        }
    }
}

/// Runs the chosen tests; returns the exit code.
pub fn on_host(arguments: &[String]) -> i32 {
    let options = match Options::parse(arguments) {
        Ok(options) => options,
        Err(why) => {
            eprintln!(
                "{why}\nusage: [FILTER...] [--exact] [--list] [--include-ignored] [--show-output] \
                 [--test-threads N] [--kernel VERSION]"
            );
            return 2;
        }
    };
    let jobs = options.jobs();
    if options.list {
        jobs.iter().flat_map(Job::names).for_each(|name| println!("{name}: test"));
        return 0;
    }
    assert!(!guest::inside(), "a test machine boots no test machines");
    let began = Instant::now();
    let mut report = Report { show: options.show, ..Report::default() };
    let (soak, jobs): (Vec<Job>, Vec<Job>) =
        jobs.into_iter().partition(|job| job.soak() && !options.include_soak);
    for name in soak.iter().flat_map(Job::names) {
        println!("test {name} ... ignored, soak");
        report.ignored += 1;
    }
    let mut kernels = BTreeMap::new();
    let (ready, without): (Vec<Job>, Vec<Job>) = jobs.into_iter().partition(|job| {
        let wanted = options.kernel(job);
        kernels.entry(wanted.to_owned()).or_insert_with(|| Kernel::fetch(wanted)).is_ok()
    });
    for job in &without {
        let why = kernels[options.kernel(job)].as_ref().err().cloned().unwrap_or_default();
        for name in job.names() {
            report.add(&name, Duration::ZERO, Ok(format!("skipped: {why}")));
        }
    }
    let report = Mutex::new(report);
    let next = AtomicUsize::new(0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..options.threads.unwrap_or(cores.min(4)) {
            scope.spawn(|| {
                while let Some(job) = ready.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let kernel = kernels[options.kernel(job)].as_ref().expect("partitioned by it");
                    run_job(job, kernel, &report);
                }
            });
        }
    });
    let report = report.into_inner().expect("threads do not die with it");
    print_end(&report, began.elapsed())
}

fn print_end(report: &Report, time: Duration) -> i32 {
    if !report.failures.is_empty() {
        println!("\nfailures:\n");
        for (name, why) in &report.failures {
            println!("---- {name} ----\n{why}\n");
        }
    }
    let verdict = if report.failures.is_empty() { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {} passed; {} failed; {} ignored; 0 measured; 0 filtered out; \
         finished in {:.2}s",
        report.passed,
        report.failures.len(),
        report.ignored,
        time.as_secs_f64()
    );
    i32::from(!report.failures.is_empty())
}

fn run_job(job: &Job, kernel: &Kernel, report: &Mutex<Report>) {
    let add = |name: &str, time: Duration, result: Result<String, String>| {
        report.lock().expect("threads do not die with it").add(name, time, result);
    };
    match job {
        Job::Scenario(scenario) => {
            let began = Instant::now();
            let lab = Lab::new(scenario.name, kernel, 1);
            let result = guarded(|| (scenario.run)(&lab).map(|()| String::new()));
            add(scenario.name, began.elapsed(), result);
        }
        Job::Group(group, chosen) => {
            let lab = Lab::new(group.name, kernel, group.cpus);
            let mut machine: Option<Machine> = None;
            for case in chosen {
                let name = full_name(group, case);
                let began = Instant::now();
                let result = guarded(|| {
                    let mut running = match machine.take() {
                        Some(running) => running,
                        None => lab.boot("machine", group.disks)?,
                    };
                    let log = running.run_case(&name, group.limit)?;
                    // Kept for the next one: only a machine in which all went well.
                    machine = Some(running);
                    Ok(log)
                });
                add(&name, began.elapsed(), result);
            }
        }
    }
}

/// A panic of the harness is a failure of the test it served.
fn guarded(run: impl FnOnce() -> Result<String, String>) -> Result<String, String> {
    std::panic::catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Err(text.unwrap_or_else(|| "the harness panicked".into()))
    })
}
