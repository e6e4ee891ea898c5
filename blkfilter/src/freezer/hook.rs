//! Running a hook: as whom, with which environment, and for how long.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use farshore_extent::{Problem, VolumeName};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, geteuid, pipe2};

use super::config::{Application, RunAs};
use super::problem;
use super::trust::trusted_file;
use crate::sys::wake::wait_readable;

/// Most bytes of what a hook says that are told.
const SAID: usize = 400;
/// Between two looks whether it has ended.
const LOOK: Duration = Duration::from_millis(10);
/// From the request to end to the end by force.
const GRACE: Duration = Duration::from_secs(2);

/// When a hook runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Before the freeze.
    Pre,
    /// After the thaw.
    Post,
}

impl Stage {
    const fn word(self) -> &'static str {
        match self {
            Self::Pre => "pre",
            Self::Post => "post",
        }
    }
}

/// For which point a hook runs.
#[derive(Debug, Clone)]
pub(super) struct Occasion {
    pub(super) volumes: Vec<VolumeName>,
    pub(super) point: String,
}

/// Runs the hook of a stage, if there is one, and waits for its end.
///
/// # Errors
/// FS-3403, FS-3404, FS-3409: it failed, took too long, or is not run at all.
pub(super) fn run(app: &Application, stage: Stage, occasion: &Occasion) -> Result<(), Problem> {
    let hook = match stage {
        Stage::Pre => &app.pre,
        Stage::Post => &app.post,
    };
    let Some((program, arguments)) = hook.split_first() else { return Ok(()) };
    let own = geteuid().as_raw();
    let runs_as = app.user.as_ref().map_or(own, |user| user.uid);
    // Root runs nothing that others can write; a user may run what is its own.
    let owners = if runs_as == 0 { vec![0] } else { vec![0, own, runs_as] };
    trusted_file(Path::new(program), &owners).map_err(|why| {
        problem::setting(&format!("the {} hook of {}", stage.word(), app.name), why)
    })?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).current_dir("/").process_group(0);
    environment(&mut command, app, stage, occasion);
    if let Some(RunAs { uid, gid, .. }) = app.user.as_ref().filter(|user| user.uid != own) {
        command.uid(*uid).gid(*gid);
    }
    let ended = run_within(command, app.hook_limit);
    match ended {
        Ok((Some(status), _)) if status.success() => Ok(()),
        Ok((Some(status), said)) => {
            Err(problem::hook_failed(stage.word(), &app.name, &status.to_string(), &said))
        }
        Ok((None, said)) => Err(problem::hook_late(stage.word(), &app.name, app.hook_limit, &said)),
        Err(error) => {
            let how = format!("{program} cannot be run: {error}");
            Err(problem::hook_failed(stage.word(), &app.name, &how, ""))
        }
    }
}

fn environment(command: &mut Command, app: &Application, stage: Stage, occasion: &Occasion) {
    let names: Vec<&str> = occasion.volumes.iter().map(VolumeName::as_str).collect();
    // Of a person at the target: nothing that ends a line or a text goes on.
    let point: String = occasion.point.chars().filter(|c| !c.is_control()).collect();
    command
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LANG", "C.UTF-8")
        .env("FARSHORE_STAGE", stage.word())
        .env("FARSHORE_APPLICATION", app.name.as_str())
        .env("FARSHORE_VOLUMES", names.join(" "))
        .env("FARSHORE_POINT", point)
        .env("FARSHORE_QUIET_LIMIT", app.quiet_limit.as_secs_f64().ceil().to_string());
    if let Some(user) = &app.user {
        command.env("HOME", &user.home).env("USER", &user.name).env("LOGNAME", &user.name);
    }
}

/// Runs it to its end, or ends it with everything it has started in its group. Returns how it
/// ended, none when it was too late, and the last of what it said.
fn run_within(mut command: Command, limit: Duration) -> io::Result<(Option<ExitStatus>, String)> {
    let (from_hook, to_us) = pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&from_hook, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    command.stdout(to_us.try_clone()?).stderr(to_us);
    let mut child = command.spawn()?;
    // It has our writing end.
    drop(command);
    let mut said = Said { from: from_hook.into(), last: Vec::new(), open: true };
    let started = Instant::now();
    let mut asked = None;
    loop {
        said.take();
        if let Some(status) = child.try_wait()? {
            said.take();
            // A hook that ends because it was asked to is late all the same.
            return Ok((asked.is_none().then_some(status), said.text()));
        }
        match asked {
            None if started.elapsed() >= limit => {
                signal(&child, Signal::SIGTERM);
                asked = Some(Instant::now());
            }
            Some(since) if since.elapsed() >= GRACE => {
                signal(&child, Signal::SIGKILL);
                child.wait()?;
                return Ok((None, said.text()));
            }
            None | Some(_) => {}
        }
        said.wait(LOOK);
    }
}

fn signal(child: &Child, signal: Signal) {
    // Its number is taken until it is waited for. It may have ended by itself: fine.
    let _ = i32::try_from(child.id()).map(|pid| killpg(Pid::from_raw(pid), signal));
}

/// The end of what a hook writes; what it leaves running in the background is not waited for.
struct Said {
    from: std::fs::File,
    last: Vec<u8>,
    open: bool,
}

impl Said {
    fn take(&mut self) {
        let mut bytes = [0; 4096];
        // Bounded: one that writes without end must not keep the clock from being looked at.
        for _ in 0..64 {
            match self.from.read(&mut bytes) {
                Ok(0) => {
                    self.open = false;
                    return;
                }
                Ok(len) => self.last.extend_from_slice(&bytes[..len]),
                Err(_) => return, // nothing there
            }
            let too_much = self.last.len().saturating_sub(SAID);
            self.last.drain(..too_much);
        }
    }

    fn wait(&self, time: Duration) {
        let fds = [self.from.as_fd()];
        // A failure to wait only makes the next look come sooner.
        let _ = wait_readable(if self.open { &fds } else { &[] }, Some(time));
    }

    fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.last);
        let plain: Vec<&str> = text.split(|c: char| c.is_control()).collect();
        plain.join(" ").trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn app(pre: &[&str], limit: Duration) -> Application {
        Application {
            name: VolumeName::new("shop").unwrap(),
            volumes: vec![],
            every: Duration::ZERO,
            pre: pre.iter().map(|&s| s.to_owned()).collect(),
            post: vec![],
            user: None,
            hook_limit: limit,
            freeze: vec![],
            quiet_limit: Duration::from_secs(10),
        }
    }

    fn occasion() -> Occasion {
        let volumes = ["a", "b"].map(|n| VolumeName::new(n).unwrap()).to_vec();
        Occasion { volumes, point: "before\nupgrade".into() }
    }

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn a_hook_knows_the_occasion_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("env");
        let script = format!("env > {}", file.display());
        run(&app(&["/bin/sh", "-c", &script], LONG), Stage::Pre, &occasion()).unwrap();
        let env = fs::read_to_string(&file).unwrap();
        for line in ["FARSHORE_STAGE=pre", "FARSHORE_VOLUMES=a b", "FARSHORE_POINT=beforeupgrade"] {
            assert!(env.lines().any(|l| l == line), "{line} in {env}");
        }
        assert!(!env.contains("CARGO"), "the freezer's own environment: {env}");
        run(&app(&["/bin/false"], LONG), Stage::Post, &occasion()).expect("there is no post hook");
    }

    #[test]
    fn a_hook_that_fails_says_why() {
        let failed = app(&["/bin/sh", "-c", "echo no such database >&2; exit 3"], LONG);
        let problem = run(&failed, Stage::Pre, &occasion()).unwrap_err();
        assert_eq!(problem.code.0, 3403);
        assert!(
            problem.why.contains("3") && problem.why.contains("no such database"),
            "{problem:?}"
        );
        let loud = app(&["/bin/sh", "-c", "yes | head -c 9000000; echo the end; exit 1"], LONG);
        let problem = run(&loud, Stage::Pre, &occasion()).unwrap_err();
        assert!(problem.why.ends_with("the end") && problem.why.len() < 2 * SAID);
        let problem = run(&app(&["/no/such"], LONG), Stage::Pre, &occasion()).unwrap_err();
        assert_eq!(problem.code.0, 3409);
    }

    #[test]
    fn a_hook_that_hangs_is_ended_with_its_children_and_one_that_leaves_some_is_not_waited_for() {
        let begun = Instant::now();
        let hangs =
            app(&["/bin/sh", "-c", "echo waiting; sleep 600 & wait"], Duration::from_millis(200));
        let problem = run(&hangs, Stage::Pre, &occasion()).unwrap_err();
        assert_eq!(problem.code.0, 3404);
        assert!(problem.why.contains("waiting"), "{problem:?}");
        let deaf = app(&["/bin/sh", "-c", "trap '' TERM; sleep 600"], Duration::from_millis(200));
        assert_eq!(run(&deaf, Stage::Pre, &occasion()).unwrap_err().code.0, 3404);
        let dir = tempfile::tempdir().unwrap();
        let gate = dir.path().join("gate");
        nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let leaves = format!("cat {} & exit 0", gate.display());
        run(&app(&["/bin/sh", "-c", &leaves], LONG), Stage::Pre, &occasion()).unwrap();
        drop(fs::File::options().write(true).open(&gate).expect("the one that was left reads it"));
        assert!(begun.elapsed() < LONG, "{:?}", begun.elapsed());
    }
}
