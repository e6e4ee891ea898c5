//! Unplanned failover as a person types it: the loss that is told, the fence that holds whatever
//! the source does, the way back, and a target that is killed at every step of each job.

mod harness;

use std::path::Path;
use std::time::Duration;

use farshore_extent::PairState;
use farshore_protocol::admin::PointChoice;
use harness::{Daemon, Site, assert_same_bytes, run, said, try_run, wait_for};

const LIMIT: Duration = Duration::from_secs(60);

fn write(uri: &str, letter: char) {
    run("nbdsh", &["-u", uri, "-c", &format!("h.pwrite(b'{letter}' * 65536, 0)\nh.flush()")]);
}

fn reads(uri: &str, letter: char) {
    let script = format!("assert h.pread(65536, 0) == b'{letter}' * 65536, h.pread(4, 0)");
    run("nbdsh", &["-u", uri, "-c", &script]);
}

/// Whether a write to the device is taken.
fn takes_writes(uri: &str) -> bool {
    let script = "h.pwrite(b'?' * 512, 1 << 20)";
    try_run("nbdsh", &["-u", uri, "-c", script]).status.success()
}

fn fails(site: &Site, args: &[&str], exit: i32, code: &str) {
    let out = site.try_cli(args);
    let told = said(&out);
    assert_eq!(out.status.code(), Some(exit), "{args:?}: {told}");
    assert!(told.contains(code), "{args:?}: {told}");
}

/// Where the command says that the disk is.
fn address(text: &str) -> String {
    let start = text.find("nbd+unix://").unwrap_or_else(|| panic!("no address in {text}"));
    let word = text[start..].split_whitespace().next().expect("a word");
    word.trim_matches(['\'', '"']).to_owned()
}

/// Where status says that it is.
fn opened(site: &Site) -> String {
    address(&site.cli(&["failover", "show", "disk"]))
}

fn wait_state(site: &Site, state: PairState) {
    wait_for("the state of the pair", LIMIT, || {
        site.replica("disk").filter(|replica| replica.state == state)
    });
}

/// A volume with the points `one` and `two`, which begin with the letters a and b.
fn two_points(site: &Site) -> (std::path::PathBuf, String) {
    let (image, uri) = site.protect("disk", 16 << 20, "1s");
    site.wait_protected("disk");
    write(&uri, 'a');
    site.tag("disk", "one");
    write(&uri, 'b');
    site.tag("disk", "two");
    (image, uri)
}

fn fenced(site: &Site) {
    wait_for("the source to be told", LIMIT, || {
        let status = site.cli(&["status", "--json"]);
        let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
        let problems = status["problems"].as_array()?.clone();
        problems.iter().any(|p| p["code"] == "FS-6513").then_some(())
    });
}

#[test]
fn a_failed_over_volume_goes_on_here_and_its_source_takes_no_writes_until_it_is_taken_back() {
    let site = Site::new();
    let mut daemons = site.start_all();
    let (image, uri) = two_points(&site);

    // What would be lost is told, and nothing is done without an answer.
    let dry = ["failover", "unplanned", "disk", "--point", "tag:one"];
    let told = site.cli(&[&dry[..], &["--dry-run"]].concat());
    assert!(told.contains("1 writes, 64 KiB") && told.contains("CONNECTED"), "{told}");
    fails(&site, &dry, 4, "FS-4902");
    assert_eq!(site.replica("disk").expect("replica").state, PairState::Protected);

    let told = site.cli(&[&dry[..], &["--yes"]].concat());
    assert!(told.contains("<disk type='network'") && told.contains("-drive"), "{told}");
    reads(&address(&told), 'a');
    write(&address(&told), 'x');
    wait_state(&site, PairState::FailedOverPending);
    let view = site.cli(&["failover", "list", "--json"]);
    let view: serde_json::Value = serde_json::from_str(&view).expect("JSON");
    let view = view["views"][0]["view"].as_str().expect("a view").to_owned();
    fails(&site, &["failover", "cleanup", &view], 4, "FS-6805");

    // Its guest goes on; a new attach takes no writes, whatever is restarted.
    fenced(&site);
    assert!(takes_writes(&uri), "the guest of a fenced source must not fail");
    assert!(daemons.filterd.stop().success());
    daemons.filterd = site.start_filterd();
    assert!(!takes_writes(&uri), "attached anew, it takes no writes");
    run("nbdsh", &["-u", &uri, "-c", "assert h.is_read_only() and len(h.pread(512, 0)) == 512"]);
    let path = image.to_str().expect("UTF-8");
    fails(&site, &["protect", path, "--name", "disk", "--yes"], 4, "FS-4037");

    // With the target gone, too: filterd knows by itself.
    daemons.target.kill();
    daemons.filterd.kill();
    daemons.filterd = site.start_filterd();
    assert!(!takes_writes(&uri), "the fence is durable");
    daemons.target = site.start_target();
    wait_state(&site, PairState::FailedOverPending);
    wait_for("the view to be served again", LIMIT, || {
        let shown = opened(&site);
        let out = try_run("nbdinfo", &[&shown]);
        out.status.success().then_some(())
    });
    reads(&opened(&site), 'x');

    // Another point; then back.
    let other = ["failover", "unplanned", "disk", "--point", "tag:two", "--yes"];
    reads(&address(&site.cli(&other)), 'b');
    let told = site.cli(&["failover", "cancel", "disk", "--yes"]);
    assert!(told.contains("the source is taken back"), "{told}");
    wait_for("the source to take writes", LIMIT, || takes_writes(&uri).then_some(()));
    write(&uri, 'd');
    site.wait_protected("disk");
    site.assert_point_equals("disk", "back", &image);
    fails(&site, &["failover", "cancel", "disk", "--yes"], 4, "FS-6804");
    let jobs = site.cli(&["job", "list"]);
    assert_eq!(jobs.matches(" done ").count(), 3, "{jobs}");
}

#[test]
fn the_machine_descriptions_of_a_failed_over_volume_are_well_formed_and_taken_by_qemu() {
    let site = Site::new();
    let _daemons = site.start_all();
    two_points(&site);
    let told = site.cli(&["failover", "unplanned", "disk", "--yes"]);
    let start = told.find("<disk ").expect("a description");
    let end = told.find("</disk>").expect("its end") + "</disk>".len();
    let file = site.root().join("disk.xml");
    std::fs::write(&file, &told[start..end]).expect("file");
    let script = "import sys, xml.dom.minidom as m\n\
                  d = m.parse(sys.argv[1]).documentElement\n\
                  s = d.getElementsByTagName('source')[0]\n\
                  assert d.getAttribute('type') == 'network' and s.getAttribute('protocol') == 'nbd'\n\
                  h = s.getElementsByTagName('host')[0]\n\
                  assert h.getAttribute('transport') == 'unix' and h.getAttribute('socket')";
    run("python3", &["-c", script, file.to_str().expect("UTF-8")]);
    // Libvirt's own schema.
    let machine = format!(
        "<domain type='qemu'><name>m</name><memory>1</memory><os><type arch='x86_64'>hvm</type></os>\
         <devices>{}</devices></domain>",
        &told[start..end]
    );
    std::fs::write(&file, machine).expect("file");
    run("virt-xml-validate", &[file.to_str().expect("UTF-8"), "domain"]);
    // QEMU itself takes the other one.
    let drive = told.split("-drive '").nth(1).and_then(|rest| rest.split('\'').next());
    let file = drive.and_then(|d| d.strip_prefix("file=")).and_then(|d| d.split(',').next());
    run("qemu-img", &["info", "-f", "raw", file.expect("a drive")]);
}

fn start_target(site: &Site, end_at: Option<&str>) -> Daemon {
    match end_at {
        Some(place) => site.start_target_with(&[("FARSHORE_END_AT", place)]),
        None => site.start_target(),
    }
}

/// Has the target end at `place` of the job that `args` begins, and another one go on.
fn interrupted(site: &Site, target: Daemon, place: &str, args: &[&str]) -> Daemon {
    target.kill();
    let mut target = start_target(site, Some(place));
    // The daemon may end before it has answered.
    let out = site.try_cli(args);
    wait_for(&format!("the target to end at `{place}`: {}", said(&out)), LIMIT, || {
        (!target.is_alive()).then_some(())
    });
    drop(target);
    let target = start_target(site, None);
    wait_for("the job to go on to its end", LIMIT, || {
        let jobs = site.cli(&["job", "list", "--limit", "1", "--json"]);
        let jobs: serde_json::Value = serde_json::from_str(&jobs).expect("JSON");
        (jobs["jobs"][0]["state"] != "running").then_some(())
    });
    target
}

fn done(site: &Site, place: &str) {
    let jobs = site.cli(&["job", "list", "--limit", "1"]);
    assert!(jobs.contains(" done "), "{place}: {jobs}\n{}", site.logs());
}

fn served(site: &Site, letter: char) {
    wait_for("the view to be served", LIMIT, || {
        let uri = opened(site);
        let out = try_run("nbdinfo", &[&uri]);
        out.status.success().then_some(())
    });
    reads(&opened(site), letter);
}

#[test]
fn a_target_killed_at_every_step_of_a_failover_finishes_it_after_the_restart() {
    let site = Site::new();
    let harness::Daemons { mut target, filterd: _filterd, agent: _agent } = site.start_all();
    let (image, uri) = two_points(&site);
    let over = ["failover", "unplanned", "disk", "--point", "tag:one", "--yes"];
    let change = ["failover", "unplanned", "disk", "--point", "tag:two", "--yes"];
    let cancel = ["failover", "cancel", "disk", "--yes"];
    let opens = [
        "failover: begun",
        "failover: raise the generation",
        "failover: raise the generation is recorded",
        "failover: open the point",
        "failover: open the point is recorded",
    ];
    let closes = [
        "failover: begun",
        "failover: close the view",
        "failover: close the view is recorded",
        "failover: raise the generation",
        "failover: raise the generation is recorded",
    ];
    for (open, close) in opens.iter().zip(closes) {
        target = interrupted(&site, target, open, &over);
        done(&site, open);
        assert_eq!(site.replica("disk").expect("replica").state, PairState::FailedOverPending);
        served(&site, 'a');
        target = interrupted(&site, target, close, &change);
        done(&site, close);
        served(&site, 'b');
        // What was written outlives a kill.
        write(&opened(&site), 'w');
        target = interrupted(&site, target, close, &cancel);
        done(&site, close);
        site.wait_protected("disk");
        wait_for("the source to take writes", LIMIT, || takes_writes(&uri).then_some(()));
    }
    drop(target);
    let _target = start_target(&site, None);
    write(&uri, 'z');
    site.wait_protected("disk");
    let end = site.tag_when_ordered("disk", "end");
    let view = site.open("disk", PointChoice::Id(end.point));
    let copy = site.fetch_view(&view, "end.img");
    same(&image, &copy);
}

fn same(image: &Path, copy: &Path) {
    assert_same_bytes(image, copy, "source and replica differ after all that");
}
