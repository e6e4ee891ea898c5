//! The command line from outside: exit codes, errors, and that asking changes nothing.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

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
