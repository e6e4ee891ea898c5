//! The hooks that are shipped as examples, with clients of the databases played by scripts where there
//! is no server.

mod harness;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use harness::{run, said, wait_for};

const HOOKS: [&str; 3] = ["generic", "mariadb", "postgresql"];

fn hook(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/hooks").join(name)
}

/// Runs a hook as the freezer does, with programs of `bin` before those of the system.
fn call(name: &str, stage: &str, bin: &Path, application: &str) -> Output {
    let path = format!("{}:/usr/bin:/bin", bin.display());
    Command::new(hook(name))
        .env_clear()
        .env("PATH", path)
        .env("FARSHORE_STAGE", stage)
        .env("FARSHORE_APPLICATION", application)
        .env("FARSHORE_QUIET_LIMIT", "10")
        .env("PLAYED", bin)
        .stdin(Stdio::null())
        .output()
        .expect("the hook")
}

fn play(dir: &Path, client: &str, script: &str) {
    let file = dir.join(client);
    fs::write(&file, format!("#!/bin/bash\n{script}\n")).expect("script");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("mode");
}

#[test]
fn every_hook_is_a_valid_script_and_knows_the_stages() {
    for name in HOOKS {
        let path = hook(name);
        let path = path.to_str().expect("UTF-8");
        run("bash", &["-n", path]);
        run("shellcheck", &[path]);
    }
    let dir = tempfile::tempdir().expect("folder");
    for stage in ["pre", "post"] {
        let out = call("generic", stage, dir.path(), "x");
        assert!(out.status.success(), "{}", said(&out));
    }
    assert_eq!(call("generic", "else", dir.path(), "x").status.code(), Some(2));
}

#[test]
fn the_postgresql_hook_makes_a_checkpoint_and_fails_with_the_server() {
    let dir = tempfile::tempdir().expect("folder");
    play(dir.path(), "psql", "echo \"$*\" > \"$PLAYED/asked\"");
    assert!(call("postgresql", "pre", dir.path(), "x").status.success());
    let asked = fs::read_to_string(dir.path().join("asked")).expect("asked");
    assert!(asked.contains("CHECKPOINT") && asked.contains("--port 5432"), "{asked}");
    play(dir.path(), "psql", "echo 'no server' >&2; exit 2");
    let out = call("postgresql", "pre", dir.path(), "x");
    assert!(!out.status.success() && said(&out).contains("no server"));
    assert!(call("postgresql", "post", dir.path(), "x").status.success(), "nothing to undo");
}

/// A client whose session "has the lock" while the file `locked` is there.
const SESSION: &str = r#"
case "$*" in
*KILL*) echo "$*" >> "$PLAYED/killed"; pkill -P "$(cat "$PLAYED/session")" sleep ;;
*)
    [ ! -f "$PLAYED/broken" ] || { echo "access denied" >&2; exit 1; }
    echo $$ > "$PLAYED/session"
    touch "$PLAYED/locked"; trap 'rm -f "$PLAYED/locked"' EXIT
    echo 42; echo locked; sleep 30
esac"#;

#[test]
fn the_mariadb_hook_holds_its_lock_from_pre_to_post() {
    let dir = tempfile::tempdir().expect("folder");
    play(dir.path(), "mariadb", SESSION);
    let application = format!("test-{}", std::process::id());
    let (locked, killed) = (dir.path().join("locked"), dir.path().join("killed"));
    let out = call("mariadb", "post", dir.path(), &application);
    assert!(out.status.success() && !killed.exists(), "nothing to undo: {}", said(&out));
    let out = call("mariadb", "pre", dir.path(), &application);
    assert!(out.status.success() && locked.exists(), "{}", said(&out));
    let out = call("mariadb", "post", dir.path(), &application);
    assert!(out.status.success(), "{}", said(&out));
    assert!(fs::read_to_string(&killed).expect("asked").contains("KILL 42"));
    wait_for("the lock to be gone", Duration::from_secs(20), || (!locked.exists()).then_some(()));
    fs::write(dir.path().join("broken"), "").expect("file");
    let out = call("mariadb", "pre", dir.path(), &application);
    assert!(!out.status.success() && said(&out).contains("access denied"), "{}", said(&out));
}
