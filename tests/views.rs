//! Views of a target that is killed: what their clients have flushed is there afterwards, and
//! nothing else has changed.
#![allow(clippy::unwrap_used)] // a test that cannot go on fails

mod harness;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use farshore_protocol::admin::{PointChoice, TargetReply, TargetRequest, ViewInfo};
use harness::{Site, assert_same_bytes, run, said, view_uri, wait_for};

const SIZE: u64 = 32 << 20;
const BLOCK: usize = 4096;
const BLOCKS: u64 = SIZE / BLOCK as u64;

/// Writes numbered blocks all over the disk, flushes after each third and tells its number then.
const WRITER: &str = "\
def block(n): return n.to_bytes(8, 'little') * 512
n = 0
while True:
    for _ in range(3):
        n += 1
        h.pwrite(block(n), n * 37 % 8192 * 4096)
    h.flush()
    print(n, flush=True)
";

fn views(site: &Site) -> Option<Vec<ViewInfo>> {
    match site.ask_target(&TargetRequest::Views) {
        Ok(TargetReply::Views(views)) => Some(views),
        _ => None,
    }
}

fn served_again(site: &Site) -> Vec<ViewInfo> {
    wait_for("the views to be served again", Duration::from_secs(60), || {
        views(site).filter(|views| views.iter().all(|view| view.problems.is_empty()))
    })
}

/// Runs the writer until it has told of `rounds` flushes, kills the target, and returns the last
/// number that was told.
fn write_until_killed(view: &ViewInfo, rounds: usize, kill: impl FnOnce()) -> u64 {
    let mut writer = Command::new("nbdsh")
        .args(["-u", &view_uri(view), "-c", WRITER])
        .env("PATH", "/usr/bin:/bin")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("nbdsh");
    let mut told = BufReader::new(writer.stdout.take().unwrap()).lines().map_while(Result::ok);
    let last = told.by_ref().nth(rounds - 1).expect("the writer goes on");
    kill();
    let last = told.last().unwrap_or(last);
    assert!(!writer.wait().unwrap().success(), "its disk is gone");
    last.parse().unwrap()
}

/// Every block holds the last number flushed to it, or a later one, or else what the point has.
fn assert_kept(site: &Site, view: &ViewInfo, point: &[u8], flushed: u64) {
    let seen = std::fs::read(site.fetch_view(view, "kept.img")).unwrap();
    let mut newest = vec![0; usize::try_from(BLOCKS).unwrap()];
    for n in 1..=flushed {
        newest[usize::try_from(n * 37 % BLOCKS).unwrap()] = n;
    }
    let blocks = seen.chunks(BLOCK).zip(point.chunks(BLOCK)).enumerate();
    for (place, (block, before)) in blocks {
        if block == before && newest[place] == 0 {
            continue;
        }
        let n = u64::from_le_bytes(block[..8].try_into().unwrap());
        assert!(block.chunks(8).all(|word| word == &block[..8]), "block {place} is torn");
        assert_eq!(usize::try_from(n * 37 % BLOCKS).unwrap(), place, "{n} does not belong there");
        let unflushed = n > flushed && n <= flushed + 6;
        assert!(n == newest[place] || unflushed, "block {place}: {n} instead of {}", newest[place]);
    }
}

/// The target, a volume with half of it written, and a view of it before that changed again.
fn with_a_view(site: &Site) -> (harness::Daemons, ViewInfo, Vec<u8>) {
    let daemons = site.start_all();
    let (image, uri) = site.protect("disk", SIZE, "1s");
    site.wait_protected("disk");
    let fill = "import random\nr = random.Random(1)\n\
                for i in range(0, 32, 2): h.pwrite(r.randbytes(1 << 20), i << 20)\nh.flush()";
    run("nbdsh", &["-u", &uri, "-c", fill]);
    let point = PointChoice::Id(site.tag("disk", "before").point);
    let content = std::fs::read(&image).unwrap();
    let view = site.open("disk", point);
    // Replication goes on under it.
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'x' * (1 << 20), 0)\nh.flush()"]);
    (daemons, view, content)
}

#[test]
fn what_was_flushed_to_a_view_is_there_after_kill_9_of_the_target() {
    let site = Site::new();
    let (daemons, view, content) = with_a_view(&site);
    let harness::Daemons { target, filterd: _filterd, agent: _agent } = daemons;
    let other = site.open("disk", PointChoice::Name("before".into()));
    run("nbdsh", &["-u", &view_uri(&other), "-c", "h.pwrite(b'o' * 65536, 4096)\nh.flush()"]);

    let mut target = Some(target);
    let mut flushed = 0;
    for rounds in [1, 40, 400] {
        let kill = || target.take().unwrap().kill();
        // Each writer begins with 1 again, over what the one before has written.
        flushed = flushed.max(write_until_killed(&view, rounds, kill));
        target = Some(site.start_target());
        let again = served_again(&site);
        let same = again.iter().find(|found| found.view == view.view).expect("it is open");
        assert_eq!((&same.nbd_socket, &same.export), (&view.nbd_socket, &view.export));
        assert_kept(&site, same, &content, flushed);
    }
    let mut expected = content;
    expected[4096..69_632].fill(b'o');
    assert!(std::fs::read(site.fetch_view(&other, "other.img")).unwrap() == expected);
    let listed = site.cli(&["failover", "list"]);
    assert!(listed.contains(&view.view.to_string()), "{listed}");
    site.cli(&["failover", "cleanup", "disk"]);
    assert!(views(&site).unwrap().is_empty());
}

#[test]
fn a_view_is_flattened_under_load_and_over_a_kill_of_the_target() {
    let site = Site::new();
    let (daemons, view, content) = with_a_view(&site);
    let harness::Daemons { target, filterd: _filterd, agent: _agent } = daemons;
    let to = site.root().join("flat.img");
    // Slowly, so that the kill comes in the middle.
    let flatten = ["failover", "flatten", "disk", "--rate", "4MiB", "--to", to.to_str().unwrap()];
    site.cli(&flatten);
    let again = site.try_cli(&flatten);
    assert!(said(&again).contains("FS-6620"), "{}", said(&again));
    let first = write_until_killed(&view, 40, || target.kill());
    assert!(!to.exists(), "it has no name before it is whole");

    let target = site.start_target();
    served_again(&site);
    let done = |views: Vec<ViewInfo>| views.into_iter().find(|v| v.image.is_some());
    let flushed = write_until_killed(&view, 1, || {
        wait_for("the view to be flattened", Duration::from_secs(120), || done(views(&site)?));
        target.kill();
    });
    let _target = site.start_target();
    let flat = served_again(&site).remove(0);
    assert_eq!((flat.view, flat.image.as_ref()), (view.view, Some(&to)));
    assert_kept(&site, &flat, &content, flushed.max(first));
    let shown = site.fetch_view(&flat, "shown.img");
    assert_same_bytes(&to, &shown, "the image and what the view shows");
    let scratch = site.paths.state.join("target/views").join(view.view.to_string());
    assert!(!scratch.exists(), "nothing is left but the image");
    site.cli(&["failover", "cleanup", "disk"]);
    assert_same_bytes(&to, &shown, "the image stays");
}

/// A file system of a few megabytes; unmounted when dropped.
struct Small(PathBuf);

impl Small {
    fn new(at: PathBuf) -> Self {
        std::fs::create_dir(&at).unwrap();
        run("mount", &["-t", "tmpfs", "-o", "size=4m", "tmpfs", at.to_str().unwrap()]);
        Self(at)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        Command::new("umount").arg(&self.0).status().ok();
    }
}

#[test]
fn an_image_that_finds_no_room_is_told_and_the_view_stays_as_it_is() {
    let site = Site::new();
    let (_daemons, view, content) = with_a_view(&site);
    let small = Small::new(site.root().join("small"));
    let flatten = |to: &Path, more: &[&str]| {
        let words = ["failover", "flatten", "--to", to.to_str().unwrap()];
        site.try_cli(&[&words[..], more].concat())
    };
    let out = flatten(&small.0.join("flat.img"), &["--wait"]);
    assert!(!out.status.success() && said(&out).contains("FS-6622"), "{}", said(&out));
    let shown = views(&site).unwrap().remove(0);
    assert!(shown.image.is_none() && shown.problems.iter().any(|p| p.code.0 == 6622), "{shown:?}");
    assert!(std::fs::read(site.fetch_view(&view, "after.img")).unwrap() == content);
    let out = site.try_cli(&["failover", "flatten", "--stop"]);
    assert!(said(&out).contains("FS-6620"), "{}", said(&out));
    // What lies in the target's own data, or is there already, is no place.
    let inside = site.paths.state.join("target/flat.img");
    assert!(said(&flatten(&inside, &[])).contains("FS-6703"));
    let other = site.root().join("other");
    std::fs::write(&other, b"something").unwrap();
    assert!(said(&flatten(&other, &[])).contains("FS-6621"));
    let out = flatten(&other, &["--force", "--wait"]);
    assert!(out.status.success(), "{}", said(&out));
    assert!(std::fs::read(&other).unwrap() == content);
    assert!(views(&site).unwrap()[0].problems.is_empty());
    let left = std::fs::read_dir(&small.0).unwrap().count();
    assert_eq!(left, 0, "the image that was given up is gone");
}
