//! The command line from outside: exit codes, errors, and that asking changes nothing.
#![allow(clippy::unwrap_used)] // a test that cannot go on fails

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use farshore::flag::Flag;

/// The executable under test: `FARSHORE_BIN`, or the one built beside this test.
fn farshore() -> Command {
    let path = std::env::var_os("FARSHORE_BIN").map_or_else(beside_this_test, PathBuf::from);
    assert!(path.exists(), "{} is missing: cargo build --package farshore", path.display());
    let mut command = Command::new(path);
    command.env_remove("RUST_LOG").env("NO_COLOR", "1").stdin(std::process::Stdio::null());
    command
}

fn beside_this_test() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(Path::parent).unwrap().join("farshore")
}

fn run(root: &Path, words: &[&str]) -> Output {
    farshore().arg("--root").arg(root).args(words).output().unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or(-1)
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_mistyped_command_is_a_usage_error_in_text_and_in_json() {
    let root = tempfile::tempdir().unwrap();
    for words in [&["frobnicate"][..], &["protect"], &["status", "--nonsense"], &[]] {
        let output = run(root.path(), words);
        assert_eq!(code(&output), 2, "{words:?}: {}", err(&output));
        assert!(output.stdout.is_empty(), "{words:?} prints nothing as a result");
    }
    let output = run(root.path(), &["status", "--nonsense", "--json"]);
    let error = json(&output);
    assert_eq!(code(&output), 2);
    assert_eq!(error["schema"], "farshore.error/1");
    assert_eq!(error["error"]["code"], "FS-1901");
}

#[test]
fn the_rule_for_names_is_told_when_it_is_broken() {
    let root = tempfile::tempdir().unwrap();
    for name in ["a_b", "-a", "a-", ".", &"x".repeat(64)] {
        let output = run(root.path(), &["protect", "/dev/null", &format!("--name={name}")]);
        assert_eq!(code(&output), 2, "{name}");
        assert!(err(&output).contains("1 to 63 letters, digits and hyphens"), "{}", err(&output));
    }
}

#[test]
fn a_daemon_that_does_not_run_is_unreachable_and_named() {
    let root = tempfile::tempdir().unwrap();
    for (words, daemon) in [
        (&["protect", "/dev/null", "--name", "x"][..], "filterd"),
        (&["unprotect", "x", "--yes"], "filterd"),
        (&["point", "list", "x"], "target"),
        (&["point", "tag", "x", "--name", "y"], "target"),
        (&["failover", "test", "x"], "target"),
        (&["failover", "cleanup"], "target"),
        (&["token", "create", "--for", "db1", "--address", "a:1"], "target"),
        (&["host", "list"], "target"),
        (&["policy", "list"], "target"),
        (&["scrub", "x", "--wait"], "target"),
        (&["policy", "set", "x", "24h", "--yes"], "target"),
        (&["event", "list"], "target"),
        (&["status"], "daemon"),
    ] {
        let output = run(root.path(), words);
        let text = err(&output);
        assert_eq!(code(&output), 5, "{words:?}: {text}");
        assert!(text.starts_with("error FS-59") && text.contains(daemon), "{words:?}: {text}");
        for line in ["\n  risk   ", "\n  why    ", "\n  next   "] {
            assert!(text.contains(line), "{words:?}: {text}");
        }
    }
    let output = run(root.path(), &["status", "--json"]);
    assert_eq!(json(&output)["exit"], 5);
    let entries = std::fs::read_dir(root.path()).unwrap().count();
    assert_eq!(entries, 0, "asking makes no files");
}

#[test]
fn a_monitoring_system_is_told_unknown_when_nothing_answers() {
    let root = tempfile::tempdir().unwrap();
    let output = run(root.path(), &["check", "--rpo", "30s"]);
    assert_eq!(code(&output), 3);
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("FARSHORE UNKNOWN - "));
}

#[test]
fn every_listed_code_is_explained_and_others_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let list = run(root.path(), &["explain"]);
    let list = String::from_utf8(list.stdout).unwrap();
    assert!(list.lines().count() > 50);
    for line in list.lines().step_by(7) {
        let output = run(root.path(), &["explain", &line[..7]]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(code(&output) == 0 && text.starts_with(&line[..7]), "{line}: {text}");
    }
    let bare = run(root.path(), &["explain", "4012"]);
    assert!(String::from_utf8_lossy(&bare.stdout).contains("mounted"));
    assert_eq!(code(&run(root.path(), &["explain", "FS-0001"])), 2);
}

#[test]
fn a_wrong_point_a_wrong_token_and_a_wrong_journal_have_their_codes() {
    let root = tempfile::tempdir().unwrap();
    for (words, exit, code_text) in [
        (&["failover", "test", "x", "--point", "whenever"][..], 2, "FS-1905"),
        (&["enroll", "nonsense"], 2, "FS-5202"),
        (&["journal", "inspect", "/nonexistent/journal"], 3, "FS-6994"),
        (&["token", "create", "--for", "db1", "--address", "a:0"], 2, "FS-1910"),
        (&["agent"], 2, "FS-5201"),
        (&["target", "run", "--config", "/nonexistent/config"], 2, "FS-1902"),
    ] {
        let output = run(root.path(), words);
        assert_eq!(code(&output), exit, "{words:?}: {}", err(&output));
        assert!(err(&output).contains(code_text), "{words:?}: {}", err(&output));
    }
    let empty = tempfile::tempdir().unwrap();
    let output = run(root.path(), &["journal", "inspect", &empty.path().display().to_string()]);
    assert_eq!(code(&output), 3, "{}", err(&output));
}

#[test]
fn target_init_can_be_tried_dry_and_repeated() {
    let root = tempfile::tempdir().unwrap();
    let output = run(root.path(), &["target", "init", "--dry-run"]);
    assert_eq!(code(&output), 0);
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0, "dry means dry");
    let made = run(root.path(), &["target", "init", "--listen", "127.0.0.1:9443", "--json"]);
    assert_eq!(code(&made), 0, "{}", err(&made));
    assert_eq!(json(&made)["target"]["created"], true);
    let again = run(root.path(), &["target", "init", "--json"]);
    assert_eq!(json(&again)["target"]["created"], false);
    assert_eq!(json(&again)["target"]["fingerprint"], json(&made)["target"]["fingerprint"]);
    assert_eq!(code(&run(root.path(), &["config", "check"])), 0);
    let file = root.path().join("etc/target.toml");
    std::fs::write(&file, "lissten = \":9443\"\n").unwrap();
    let wrong = run(root.path(), &["config", "check"]);
    assert_eq!(code(&wrong), 2);
    for part in ["FS-1102", "line 1, column 1", "did you mean `listen`"] {
        assert!(err(&wrong).contains(part), "{part}: {}", err(&wrong));
    }
}

#[test]
fn completion_is_made_for_every_shell() {
    let root = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let output = run(root.path(), &["completion", shell]);
        assert!(String::from_utf8_lossy(&output.stdout).contains("failover"), "{shell}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let root = tempfile::tempdir().unwrap();
    let mut child = farshore()
        .arg("--root")
        .arg(root.path())
        .arg("explain")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}");
}

/// A daemon that ends with the test.
struct Daemon(Child);

impl Daemon {
    /// Starts it and waits until `probe` (words of the command line) succeeds.
    fn start(root: &Path, words: &[&str], probe: &[&str]) -> Self {
        let log = std::fs::File::create(root.join(format!("{}.log", words[0]))).unwrap();
        let mut command = farshore();
        command.arg("--die-with-parent").arg("--root").arg(root).args(words).stderr(log);
        let daemon = Self(command.spawn().unwrap());
        let begun = Instant::now();
        while code(&run(root, probe)) == 5 {
            assert!(begun.elapsed() < Duration::from_secs(30), "{words:?} does not answer");
            let _ = Flag::default().wait(Duration::from_millis(20));
        }
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A block device that is mounted on this machine.
fn mounted_device() -> Option<String> {
    use std::os::unix::fs::FileTypeExt;
    let mounts = std::fs::read_to_string("/proc/mounts").ok()?;
    let devices = mounts.lines().filter_map(|line| line.split(' ').next());
    let is_block = |d: &&str| std::fs::metadata(d).is_ok_and(|m| m.file_type().is_block_device());
    devices.filter(|d| d.starts_with("/dev/")).find(is_block).map(str::to_owned)
}

fn disk(root: &Path, name: &str, bytes: u64) -> String {
    let path = root.join(name);
    std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
    path.display().to_string()
}

#[test]
fn the_preflight_names_what_stands_in_the_way_and_dry_run_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let _filterd = Daemon::start(root, &["filterd"], &["unprotect", "x", "--yes"]);
    let small = disk(root, "small.img", 4096);
    let dir = root.display().to_string();
    for (path, exit, code_text) in [
        (dir.as_str(), 4, "FS-4013"),
        (small.as_str(), 4, "FS-4019"),
        ("/nonexistent/disk", 3, "FS-4011"),
    ] {
        for dry in [true, false] {
            let mut words = vec!["protect", path, "--name", "x"];
            words.extend(dry.then_some("--dry-run"));
            let output = run(root, &words);
            assert_eq!(code(&output), exit, "{path}: {}", err(&output));
            assert!(err(&output).contains(code_text), "{path}: {}", err(&output));
            assert!(err(&output).contains("nothing was changed"), "{path}: {}", err(&output));
        }
    }
    let good = disk(root, "disk.img", 4 << 20);
    let dry = run(root, &["protect", &good, "--name", "good", "--dry-run"]);
    assert_eq!(code(&dry), 0, "{}", err(&dry));
    assert!(text(&dry).contains("attached by "), "the way and its reason: {}", text(&dry));
    assert_eq!(code(&run(root, &["unprotect", "good", "--yes"])), 3, "it was a dry run");
    let by = ["--attach", "socket", "--policy", "30s", "--json"];
    let done = run(root, &[&["protect", &good, "--name", "good"][..], &by].concat());
    assert_eq!(code(&done), 0, "{}", err(&done));
    assert_eq!(json(&done)["volume"]["point_interval_ms"], 30_000);
    assert!(json(&done)["volume"]["attachment"]["socket"]["path"].is_string(), "{}", text(&done));
    let twice = run(root, &["protect", &good, "--name", "again"]);
    assert_eq!(code(&twice), 4, "{}", err(&twice));
    let unasked = run(root, &["unprotect", "good"]);
    assert_eq!(code(&unasked), 4, "nobody can be asked: {}", err(&unasked));
    assert!(err(&unasked).contains("FS-4902"));
    assert_eq!(code(&run(root, &["unprotect", "good", "--yes", "--dry-run"])), 0);
    assert_eq!(code(&run(root, &["unprotect", "good", "--yes"])), 0);
    assert_eq!(code(&run(root, &["unprotect", "good", "--yes"])), 3);
}

#[test]
fn a_way_of_attaching_that_this_host_lacks_is_refused_and_never_replaced() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let _filterd = Daemon::start(root, &["filterd"], &["unprotect", "x", "--yes"]);
    let good = disk(root, "disk.img", 4 << 20);
    for (way, there) in [("ublk", "/dev/ublk-control"), ("nbd", "/sys/module/nbd")] {
        if Path::new(there).exists() {
            continue;
        }
        let output = run(root, &["protect", &good, "--name", "x", "--attach", way]);
        assert_eq!(code(&output), 4, "{}", err(&output));
        assert!(err(&output).contains("FS-4031"), "{}", err(&output));
    }
    let socket = root.join("x.sock").display().to_string();
    let both = ["--attach", "ublk", "--nbd-socket", &socket];
    let output = run(root, &[&["protect", &good, "--name", "x"][..], &both].concat());
    assert_eq!(code(&output), 2, "{}", err(&output));
}

#[test]
fn a_mounted_device_is_refused() {
    let Some(device) = mounted_device() else {
        println!("skipped: no block device is mounted on this machine");
        return;
    };
    let root = tempfile::tempdir().unwrap();
    let _filterd = Daemon::start(root.path(), &["filterd"], &["unprotect", "x", "--yes"]);
    let output = run(root.path(), &["protect", &device, "--name", "x"]);
    assert_eq!(code(&output), 4, "{}", err(&output));
    assert!(err(&output).contains("FS-4012"), "{}", err(&output));
}

#[test]
fn status_says_what_is_missing_and_is_partial_then() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let _filterd = Daemon::start(root, &["filterd"], &["unprotect", "x", "--yes"]);
    let good = disk(root, "disk.img", 4 << 20);
    let protect = ["protect", &good, "--name", "good", "--attach", "socket"];
    assert_eq!(code(&run(root, &protect)), 0);
    let output = run(root, &["status", "--json"]);
    let status = json(&output);
    assert_eq!(code(&output), 6, "the agent is missing");
    assert_eq!(status["schema"], "farshore.status/1");
    assert_eq!(status["volumes"][0]["volume"], "good");
    assert_ne!(status["volumes"][0]["state"], "protected", "never ok with a problem inside");
    assert_eq!(status["problems"][0]["code"], "FS-5902");
    let check = run(root, &["check", "--rpo", "30s"]);
    assert_eq!(code(&check), 2, "no point exists: critical");
}
