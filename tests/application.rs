//! Points for which applications are made quiet, with real daemons and real hooks: order, labels and
//! what happens when hooks fail or hang. `tests/freeze.rs` has the freeze, `tests/mount.rs` points of
//! frozen file systems on a protected volume.

mod harness;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use farshore_extent::{PointKind, Problem};
use farshore_protocol::admin::{EventInfo, PointInfo, TargetReply, TargetRequest};
use harness::{Daemon, Daemons, Site, said, wait_for};

const LONG: Duration = Duration::from_secs(60);
/// Written by hooks, one line a call.
const TRACE: &str = "trace";

/// A site with one protected volume and a freezer.
struct Stage {
    site: Site,
    _daemons: Daemons,
    freezer: Option<Daemon>,
}

impl Stage {
    /// `lines` are those of the application besides name and volumes; `DIR` is the site's folder.
    fn new(lines: &str) -> Self {
        let site = Site::new();
        let daemons = site.start_all();
        site.protect("disk", 16 << 20, "off");
        wait_for("order", LONG, || {
            site.replica("disk").filter(|r| r.order == farshore_extent::CaptureOrder::Ordered)
        });
        let mut stage = Self { site, _daemons: daemons, freezer: None };
        stage.configure(lines);
        stage.start_freezer();
        stage
    }

    fn configure(&self, lines: &str) {
        let lines = lines.replace("DIR", self.site.root().to_str().expect("UTF-8"));
        let text = format!("[[application]]\nname = \"shop\"\nvolumes = [\"disk\"]\n{lines}");
        fs::create_dir_all(&self.site.paths.etc).expect("folder");
        fs::write(self.site.paths.etc.join("freezer.toml"), text).expect("configuration");
    }

    fn start_freezer(&mut self) {
        self.freezer = Some(self.site.start("freezer", &["freezer"]));
        let socket = self.site.paths.freezer_socket();
        wait_for("the freezer", LONG, || std::os::unix::net::UnixStream::connect(&socket).ok());
    }

    /// A hook that notes its stage and runs `body`.
    fn hook(&self, name: &str, body: &str) {
        let path = self.site.root().join(name);
        let trace = self.trace_file();
        let text = format!(
            "#!/bin/sh\nset -e\ncd '{}'\necho \"$FARSHORE_STAGE $1\" >> '{}'\n{body}\n",
            self.site.root().display(),
            trace.display()
        );
        fs::write(&path, text).expect("hook");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("mode");
    }

    fn trace_file(&self) -> PathBuf {
        self.site.root().join(TRACE)
    }

    fn trace(&self) -> Vec<String> {
        let text = fs::read_to_string(self.trace_file()).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// What `point tag --app` says, and the point.
    fn tag(&self, name: &str) -> (String, PointInfo) {
        let out = self.site.try_cli(&["point", "tag", "disk", "--app", "--name", name]);
        let points = self.site.points("disk");
        let point = points.into_iter().find(|p| p.name == name);
        let point = point.unwrap_or_else(|| panic!("{}\n{}", said(&out), self.site.logs()));
        let whole = point.kind == PointKind::App;
        assert_eq!(out.status.code(), Some(if whole { 0 } else { 6 }), "{}", said(&out));
        (said(&out), point)
    }

    fn events(&self) -> Vec<EventInfo> {
        match self.site.ask_target(&TargetRequest::Events { limit: 50 }) {
            Ok(TargetReply::Events(events)) => events,
            other => panic!("{other:?}"),
        }
    }
}

fn code(point: &PointInfo) -> Option<u16> {
    point.note.as_ref().map(|note: &Problem| note.code.0)
}

const HOOKS: &str = "pre = [\"DIR/pre\", \"one\"]\npost = [\"DIR/post\", \"two\"]\n";

#[test]
fn hooks_run_around_the_point_and_know_it() {
    let stage = Stage::new(HOOKS);
    stage.hook("pre", "env | grep FARSHORE_ | sort > env.pre");
    stage.hook("post", "env | grep FARSHORE_ | sort > env.post");
    let (told, point) = stage.tag("before upgrade");
    assert_eq!((point.kind, code(&point)), (PointKind::App, None), "{told}");
    wait_for("the post hook", LONG, || (stage.trace().len() == 2).then_some(()));
    assert_eq!(stage.trace(), ["pre one", "post two"]);
    for stage_name in ["pre", "post"] {
        let file = stage.site.root().join(format!("env.{stage_name}"));
        let env = wait_for("the hook's environment", LONG, || {
            let env = fs::read_to_string(&file).unwrap_or_default();
            env.contains("FARSHORE_VOLUMES").then_some(env)
        });
        for line in [
            "FARSHORE_APPLICATION=shop",
            "FARSHORE_POINT=before upgrade",
            "FARSHORE_VOLUMES=disk",
            &format!("FARSHORE_STAGE={stage_name}"),
        ] {
            assert!(env.lines().any(|l| l == line), "{line} in {env}");
        }
    }
    let listed = stage.site.cli(&["point", "list", "disk"]);
    assert!(listed.lines().any(|l| l.contains("app") && l.contains("before upgrade")), "{listed}");
    // The newest application-consistent point can be asked for.
    let view = stage.site.open("disk", farshore_protocol::admin::PointChoice::LatestApp);
    assert_eq!(view.point, Some(point.point));
}

#[test]
fn whatever_fails_the_point_is_cut_and_says_why_it_is_less() {
    let mut stage = Stage::new(&format!("{HOOKS}hook_limit = \"500ms\"\n"));
    stage.hook("post", "");

    stage.hook("pre", "echo the database is down >&2; exit 7");
    let (told, point) = stage.tag("failed");
    assert_eq!((point.kind, code(&point)), (PointKind::Crash, Some(3403)), "{told}");
    assert!(
        told.contains("not application-consistent") && told.contains("database is down"),
        "{told}"
    );
    wait_for("the post hook", LONG, || (stage.trace() == ["pre one", "post two"]).then_some(()));
    let listed = stage.site.cli(&["point", "list", "disk"]);
    assert!(listed.contains("FS-3403"), "{listed}");
    let noted = stage.events().into_iter().find(|e| e.code == 3403).expect("an event");
    assert!(noted.volume.is_some_and(|v| v.as_str() == "disk"));

    stage.hook("pre", "sleep 600");
    let began = Instant::now();
    let (_, point) = stage.tag("late");
    assert_eq!((point.kind, code(&point)), (PointKind::Crash, Some(3404)));
    assert!(began.elapsed() < LONG, "it was ended at its limit: {:?}", began.elapsed());

    // Others could change what would be run.
    stage.hook("pre", "");
    fs::set_permissions(stage.site.root().join("pre"), fs::Permissions::from_mode(0o777))
        .expect("mode");
    let (_, point) = stage.tag("shared");
    assert_eq!((point.kind, code(&point)), (PointKind::Crash, Some(3409)));
    let ran = stage.trace().iter().filter(|l| l.starts_with("pre")).count();
    assert_eq!(ran, 2, "it was not run: {:?}", stage.trace());

    // The post hook fails: the point was whole before.
    stage.hook("pre", "");
    stage.hook("post", "exit 1");
    let (_, point) = stage.tag("post");
    assert_eq!(point.kind, PointKind::App);
    wait_for("the note", LONG, || {
        stage.events().iter().any(|e| e.text.contains("post hook")).then_some(())
    });

    drop(stage.freezer.take());
    let (told, point) = stage.tag("gone");
    assert_eq!((point.kind, code(&point)), (PointKind::Crash, Some(3402)), "{told}");
    stage.configure("pre = [\"relative\"]\n");
    stage.start_freezer();
    let (_, point) = stage.tag("mistyped");
    assert_eq!((point.kind, code(&point)), (PointKind::Crash, Some(3409)));
    let checked = stage.site.try_cli(&["config", "check"]);
    assert!(said(&checked).contains("FS-3409"), "{}", said(&checked));
}
