//! `farshore doctor`: every prerequisite of this host's roles, one line each, with the command that
//! mends it.
//!
//! Looks and never changes anything. Needs no daemon and no privileges: what it may not see is a
//! line that says so. Nothing it asks can hang it: see [`bounded`].

mod bounded;
mod certificate;
mod daemons;
mod finding;
mod host;
mod kernel;
mod places;
mod process;
mod shipped;
mod source;
mod system;
mod target;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use farshore_blkfilter::frontend::kernel_nbd;
use farshore_blkfilter::frontend::ublk::features;
use farshore_blkfilter::sys::clock;
use farshore_blkfilter::sys::ring::{Ring, RingConfig};
use farshore_extent::WallTime;
use farshore_protocol::paths::Paths;
use serde::Serialize;

use crate::args::Global;
use crate::exit::{Exit, Failure};
use crate::output::{Out, Tone};
use crate::roles;
use bounded::{Pending, begin, within};
use daemons::Answers;
use finding::{Area, Finding, State};
use host::Host;

/// Version of the document.
const SCHEMA: &str = "farshore.doctor/1";

/// Longest wait for the daemons' answers, and then for everything else.
const LIMIT: Duration = Duration::from_secs(8);

/// Options of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Look at what a source needs, even if this host is none yet
    #[arg(long)]
    source: bool,
    /// Look at what a target needs, even if this host is none yet
    #[arg(long)]
    target: bool,
}

/// The report; also its JSON document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Report {
    /// `source`, `target`: what was looked at.
    roles: Vec<Area>,
    /// The worst state of a finding.
    verdict: State,
    /// Every prerequisite, in a fixed order.
    findings: Vec<Finding>,
}

/// Which roles are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Roles {
    source: bool,
    target: bool,
}

impl Roles {
    /// What was asked for, or what there is.
    fn of(args: &DoctorArgs, paths: &Paths) -> Self {
        if args.source || args.target {
            return Self { source: args.source, target: args.target };
        }
        let any = |traces: &[PathBuf]| traces.iter().any(|t| t.symlink_metadata().is_ok());
        Self { source: any(&source::traces(paths)), target: any(&target::traces(paths)) }
    }
}

/// `farshore doctor`. Exit code 0 when all is ok, 1 with a problem, 6 without one when something
/// is lost or could not be looked at.
pub fn run(args: &DoctorArgs, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let paths = global.paths();
    let report = examine(&Host::default(), &paths, Roles::of(args, &paths));
    if out.json {
        out.document(SCHEMA, "doctor", &report);
    } else {
        out.text(&text(&report, out));
    }
    Ok(exit(report.verdict))
}

const fn exit(verdict: State) -> Exit {
    match verdict {
        State::Ok => Exit::Ok,
        State::Unseen | State::Warning => Exit::Partial,
        State::Problem => Exit::Failed,
    }
}

fn examine(host: &Host, paths: &Paths, roles: Roles) -> Report {
    let now = WallTime::now();
    let asked = Arc::new(Answers::ask(paths, within(LIMIT)));
    let groups = [host_groups(host, paths, now), role_groups(host, paths, roles, &asked, now)];
    let deadline = within(LIMIT);
    let mut findings = Vec::new();
    for (area, name, pending) in groups.into_iter().flatten() {
        let found = pending.by(deadline).unwrap_or_else(|| vec![hangs(name)]);
        findings.extend(found.into_iter().map(|finding| finding.of(area)));
    }
    let mut volumes = asked.volumes(paths, now);
    volumes.retain(|v| if v.area == Area::Source { roles.source } else { roles.target });
    findings.extend(volumes);
    if !roles.source && !roles.target {
        findings.push(Finding::unseen(
            "role",
            "nothing is set up here, so only the host was looked at",
            "farshore doctor --source   # or --target",
        ));
    }
    findings.sort_by_key(|f| f.area as u8);
    let mut looked_at = Vec::new();
    looked_at.extend(roles.source.then_some(Area::Source));
    looked_at.extend(roles.target.then_some(Area::Target));
    let verdict = findings.iter().map(|f| f.state).max().unwrap_or(State::Unseen);
    Report { roles: looked_at, verdict, findings }
}

fn hangs(name: &str) -> Finding {
    Finding::problem(
        name,
        format!(
            "no answer within {} s: a disk, a file system or a name server hangs",
            LIMIT.as_secs()
        ),
        "ps -eo pid,stat,wchan:32,args | awk '$2 ~ /D/'   # what waits; then: dmesg | tail",
    )
}

type Group = (Area, &'static str, Pending<Vec<Finding>>);

fn host_groups(host: &Host, paths: &Paths, now: WallTime) -> Vec<Group> {
    let (kernel, around) = (host.clone(), host.clone());
    let paths = paths.clone();
    vec![
        (
            Area::Host,
            "kernel",
            begin(move || {
                let ublk = kernel::ublk(&kernel, features);
                let there = ublk.state == State::Ok;
                let nbd = kernel::nbd(&kernel, there, kernel_nbd::available);
                vec![kernel::release(&kernel), ublk, nbd, kernel::io_uring(&kernel, makes_a_ring)]
            }),
        ),
        (
            Area::Host,
            "clock",
            begin(move || {
                vec![
                    system::udev(&around),
                    system::clock(clock::discipline(), now, newest(&paths.state)),
                ]
            }),
        ),
    ]
}

fn role_groups(
    host: &Host,
    paths: &Paths,
    roles: Roles,
    asked: &Arc<Answers>,
    now: WallTime,
) -> Vec<Group> {
    let given = || (host.clone(), paths.clone(), Arc::clone(asked));
    let mut groups = Vec::new();
    if roles.source {
        let (host, paths, asked) = given();
        let look = move || {
            let mut found = source::daemons(&host, &paths, &asked);
            found.extend(source::unserved(&paths, &asked));
            found.extend(source::origins(&asked));
            found
        };
        groups.push((Area::Source, "filterd", begin(look)));
        let (_, paths, _) = given();
        groups.push((Area::Source, "state", begin(move || source::files(&paths))));
        let (_, paths, _) = given();
        groups.push((Area::Source, "settings", begin(move || settings(&paths, source::is_ours))));
        let (_, paths, _) = given();
        groups.push((Area::Source, "link", begin(move || source::enrolment(&paths, now))));
    }
    if roles.target {
        let (host, paths, asked) = given();
        let look = move || target::daemons(&host, &paths, &asked);
        groups.push((Area::Target, "target", begin(look)));
        let (_, paths, _) = given();
        groups.push((Area::Target, "settings", begin(move || settings(&paths, target::is_ours))));
        let (_, paths, _) = given();
        groups.push((Area::Target, "data", begin(move || target::files(&paths, now))));
    }
    groups
}

/// Configuration files that exist.
fn settings(paths: &Paths, ours: fn(&Path) -> bool) -> Vec<Finding> {
    let check = "settings";
    let files = roles::configurations(paths).into_iter();
    let there = files.filter(|(file, _)| ours(file) && file.symlink_metadata().is_ok());
    there
        .map(|(file, problem)| {
            let name = file.display();
            match (source::unreadable(check, &file), problem) {
                (Some(hidden), _) => hidden,
                (None, None) => Finding::ok(check, format!("{name} is understood")),
                (None, Some(problem)) => Finding {
                    fix: Some(format!(
                        "editor {name} && farshore config check   # {}",
                        problem.next
                    )),
                    ..Finding::said(check, &problem)
                },
            }
        })
        .collect()
}

/// The date of the newest file of a daemon, two levels deep.
fn newest(state: &Path) -> Option<WallTime> {
    let entries = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten();
    let dates = entries(state).flat_map(|role| entries(&role.path())).filter_map(|file| {
        let modified = file.metadata().ok()?.modified().ok()?;
        let since = modified.duration_since(std::time::UNIX_EPOCH).ok()?;
        i64::try_from(since.as_nanos()).ok().map(WallTime::from_nanos)
    });
    dates.max()
}

fn makes_a_ring() -> bool {
    let Ok(file) = std::fs::File::open("/dev/null") else { return false };
    let config = RingConfig { depth: 1, ..RingConfig::default() };
    Ring::new(Arc::new(file), config).is_ok_and(|ring| ring.is_async())
}

/// The report for a person.
fn text(report: &Report, out: &Out) -> String {
    let width = report.findings.iter().map(|f| f.check.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    let mut area = None;
    for f in &report.findings {
        if area != Some(f.area) {
            let gap = if area.is_some() { "\n" } else { "" };
            text.push_str(&format!("{gap}{}\n", out.paint(Tone::Strong, f.area.title())));
            area = Some(f.area);
        }
        let tone = match f.state {
            State::Ok => Tone::Good,
            State::Unseen => Tone::Faint,
            State::Warning => Tone::Warn,
            State::Problem => Tone::Bad,
        };
        let word = out.paint(tone, &format!("{:<7}", f.state.word()));
        let code = f.code.map_or(String::new(), |code| format!("  {code}"));
        text.push_str(&format!("  {word}  {:<width$}  {}{code}\n", f.check, f.text));
        if let Some(fix) = &f.fix {
            text.push_str(&format!("           {:<width$}  {fix}\n", "fix"));
        }
        if out.verbose && !f.details.is_empty() {
            text.push_str(&format!("           {:<width$}  {}\n", "", f.details.join(" ")));
        }
    }
    let count = |state: State| report.findings.iter().filter(|f| f.state == state).count();
    let total = format!(
        "\n{} ok, {} problems, {} warnings, {} not seen\n",
        count(State::Ok),
        count(State::Problem),
        count(State::Warning),
        count(State::Unseen),
    );
    text + &total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(state: State) -> Finding {
        match state {
            State::Ok => Finding::ok("a", "fine"),
            State::Unseen => Finding::unseen("a", "hidden", "sudo farshore doctor"),
            State::Warning => Finding::warning("a", "lost", "mend"),
            State::Problem => Finding::problem("a", "broken", "mend"),
        }
    }

    #[test]
    fn the_worst_finding_decides_the_exit_code() {
        for (state, code) in
            [(State::Ok, 0), (State::Unseen, 6), (State::Warning, 6), (State::Problem, 1)]
        {
            assert_eq!(exit(state).number(), code);
        }
        assert!(State::Ok < State::Unseen && State::Warning < State::Problem);
    }

    #[test]
    fn roles_are_what_was_asked_for_or_what_there_is() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::under(root.path());
        let roles = |source, target| Roles::of(&DoctorArgs { source, target }, &paths);
        assert_eq!(roles(false, false), Roles { source: false, target: false });
        assert_eq!(roles(true, false), Roles { source: true, target: false });
        std::fs::create_dir_all(paths.state.join("filterd")).unwrap();
        assert_eq!(roles(false, false), Roles { source: true, target: false });
        assert_eq!(roles(false, true), Roles { source: false, target: true });
    }

    #[test]
    fn a_host_without_anything_is_examined_and_each_line_has_its_fix() {
        let root = tempfile::tempdir().unwrap();
        let machine = host::fake::Machine::with_kernel("6.12.1");
        let paths = Paths::under(root.path());
        let all = Roles { source: true, target: true };
        let report = examine(&machine.host, &paths, all);
        assert_eq!(report.roles, [Area::Source, Area::Target]);
        assert_eq!(report.verdict, State::Problem, "neither enrolled nor initialised");
        for f in &report.findings {
            assert_eq!(f.fix.is_none(), f.state == State::Ok, "{f:?}");
            assert!(!f.text.is_empty() && !f.text.contains('\n'), "{f:?}");
        }
        assert!(std::fs::read_dir(root.path()).unwrap().next().is_none(), "looking makes nothing");
        let none = examine(&machine.host, &paths, Roles { source: false, target: false });
        assert!(none.findings.iter().any(|f| f.check == "role"));
        assert!(none.findings.iter().all(|f| f.area == Area::Host));
    }

    #[test]
    fn the_report_as_json_is_a_contract() {
        let known = finding(State::Ok).with_details(vec!["USER_COPY".into()]);
        let problem = farshore_extent::Problem::harmless(5201, "not enrolled", "no file", "enroll");
        let findings = vec![
            known,
            finding(State::Unseen),
            finding(State::Warning).of(Area::Target),
            Finding::said("identity", &problem).of(Area::Source),
        ];
        let report = Report { roles: vec![Area::Source], verdict: State::Problem, findings };
        let document = crate::output::document(SCHEMA, "doctor", &report);
        crate::status::golden::same("doctor.json", &document);
        let out = Out::new(&Global::default());
        let text = text(&report, &out);
        assert!(
            text.contains("FS-5201") && text.contains("1 ok, 1 problems, 1 warnings, 1 not seen")
        );
    }
}
