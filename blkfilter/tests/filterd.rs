//! filterd as a process of its own, written to over NBD, read by an agent-like consumer.

#![allow(clippy::unwrap_used)] // a test that cannot go on says so by panicking

#[path = "filterd/consumer.rs"]
mod consumer;
#[path = "filterd/nbd.rs"]
mod nbd;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use consumer::Consumer;
use farshore_blkfilter::control::{AttachKind, Client, MarkerRequest, ProtectRequest, VolumeInfo};
use farshore_blkfilter::filterd::{Config, Shutdown, run};
use farshore_extent::{CaptureOrder, GroupId, MarkerId, PointKind, VolumeName};
use nbd::Nbd;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SIZE: usize = 32 << 20;

/// Set in the child: it runs the daemon instead of the tests.
const CHILD: &str = "FARSHORE_TEST_FILTERD";

#[test]
fn child_runs_filterd() {
    let Ok(root) = std::env::var(CHILD) else { return };
    let shutdown = Shutdown::on_signals().unwrap();
    let root = Path::new(&root);
    let mut config = Config::new(root.join("state"), root.join("run"));
    config.harden = false;
    config.release_grace = Duration::from_secs(2);
    run(config, &shutdown, |_| ()).unwrap();
}

struct World {
    dir: tempfile::TempDir,
    daemon: Child,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = fs::File::create(dir.path().join("disk.img")).unwrap();
        file.set_len(SIZE as u64).unwrap();
        let daemon = start(dir.path());
        Self { dir, daemon }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("run/filterd.sock")
    }

    fn image(&self) -> Vec<u8> {
        fs::read(self.dir.path().join("disk.img")).unwrap()
    }

    fn client(&self) -> Client {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            match Client::connect(&self.socket()) {
                Ok(client) => return client,
                Err(problem) if Instant::now() > until => panic!("{problem}"),
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    fn request(&self, name: &str, pool: u64) -> ProtectRequest {
        ProtectRequest {
            name: VolumeName::new(name).unwrap(),
            backing: self.dir.path().join("disk.img"),
            attach: Some(AttachKind::Socket),
            nbd_socket: None,
            pool_bytes: Some(pool),
            point_interval_ms: None,
            seeded: false,
            copy_at: None,
        }
    }

    fn protect(&self, pool: u64) -> VolumeInfo {
        let request = self.request("disk", pool);
        let mut client = self.client();
        assert_eq!(client.preflight(request.clone()).unwrap().problems, vec![]);
        client.protect(request).unwrap()
    }

    fn connect(&self) -> Nbd {
        Nbd::connect(&self.dir.path().join("run/nbd/disk.sock"), "disk").unwrap()
    }

    fn end(&mut self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.daemon.id()).unwrap()), signal).unwrap();
        let status = self.daemon.wait().unwrap();
        assert_eq!(status.success(), signal == Signal::SIGTERM, "{status}");
    }

    fn restart(&mut self, signal: Signal) {
        self.end(signal);
        self.daemon = start(self.dir.path());
        self.client();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn start(root: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["child_runs_filterd", "--exact", "--test-threads=1"])
        .env(CHILD, root)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Bytes that differ from place to place and from round to round.
fn content(round: u64, len: usize) -> Vec<u8> {
    let mut state = round.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Writes all over the volume: small and large, overlapping, zeroes and flushes between.
fn scribble(nbd: &mut Nbd, seed: u64, rounds: u64) {
    for round in seed..seed + rounds {
        let pick = round.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16;
        let len = [512, 4096, 8192, 65536, 1 << 20][usize::try_from(pick % 5).unwrap()];
        let offset = (pick >> 8) % (SIZE as u64 - len as u64) / 512 * 512;
        match pick % 23 {
            0 => nbd.zero(offset, u32::try_from(len).unwrap()).unwrap(),
            1 => nbd.flush().unwrap(),
            _ => nbd.write(offset, &content(round, len)).unwrap(),
        }
    }
}

#[test]
fn writes_reach_the_replica_byte_for_byte_and_markers_cut_what_was_there() {
    let world = World::new();
    let info = world.protect(64 << 20);
    let mut nbd = world.connect();
    nbd.write(4096, &content(1, 8192)).unwrap();
    assert_eq!(nbd.read(4096, 8192).unwrap(), content(1, 8192));
    let mut consumer = Consumer::new(&world.socket(), info.volume, SIZE);
    scribble(&mut nbd, 100, 100);
    consumer.drain();
    assert_eq!((consumer.starts.as_slice(), consumer.restored), (&[false][..], 1));
    assert!(consumer.copied_bytes < SIZE as u64, "holes are not copied");
    assert!(consumer.image == world.image());

    scribble(&mut nbd, 300, 50);
    let marker = MarkerId::random();
    let request = MarkerRequest {
        marker,
        volumes: vec![],
        kind: PointKind::Crash,
        group: GroupId::NIL,
        name: "before".into(),
        pending: false,
    };
    let placed = world.client().marker(request).unwrap();
    assert_eq!((placed.volumes, placed.not_ordered), (vec![info.volume], vec![]));
    let at_marker = world.image();
    scribble(&mut nbd, 400, 50);
    consumer.drain();
    assert!(consumer.image == world.image());
    assert_eq!(consumer.points.len(), 1);
    assert!(consumer.points[0] == (marker, at_marker));

    let status = world.client().list().unwrap().remove(0);
    assert_eq!((status.order, status.clients, status.pool_used), (CaptureOrder::Ordered, 1, 0));
    assert_eq!((status.captured, status.released), (consumer.after, consumer.after));
    assert!(status.writes > 150 && status.reads == 1 && status.backing_errors == 0);
    assert_eq!(status.copy.remaining_bytes, 0);
}

#[test]
fn a_full_pool_never_stalls_the_writer_and_order_comes_back() {
    let world = World::new();
    let info = world.protect(8 << 20);
    let mut nbd = world.connect();
    let mut consumer = Consumer::new(&world.socket(), info.volume, SIZE);
    consumer.drain();
    // Nobody reads: three times the pool.
    for round in 0..24 {
        nbd.write(round << 20, &content(round, 1 << 20)).unwrap();
    }
    let status = world.client().list().unwrap().remove(0);
    assert_eq!(status.order, CaptureOrder::CatchUp);
    assert_eq!(status.reason, "the capture pool was full");
    assert!(status.copy.remaining_bytes >= 16 << 20, "{:?}", status.copy);
    let request = MarkerRequest {
        marker: MarkerId::random(),
        volumes: vec![info.volume],
        kind: PointKind::Crash,
        group: GroupId::NIL,
        name: String::new(),
        pending: false,
    };
    let placed = world.client().marker(request).unwrap();
    assert_eq!(placed.not_ordered, [info.volume]);
    scribble(&mut nbd, 700, 40);
    consumer.drain();
    assert_eq!((consumer.lost, consumer.restored), (1, 2));
    assert!(consumer.image == world.image());
}

#[test]
fn a_clean_stop_continues_and_a_kill_copies_again() {
    let mut world = World::new();
    let info = world.protect(64 << 20);
    let mut consumer = Consumer::new(&world.socket(), info.volume, SIZE);
    let mut nbd = world.connect();
    scribble(&mut nbd, 10, 60);
    consumer.drain();
    drop(nbd);

    world.restart(Signal::SIGTERM);
    consumer.reconnect(&world.socket());
    let mut nbd = world.connect();
    scribble(&mut nbd, 200, 60);
    consumer.drain();
    assert_eq!(consumer.starts, [false, true], "the history goes on");
    assert!(consumer.image == world.image());

    world.restart(Signal::SIGKILL);
    consumer.reconnect(&world.socket());
    consumer.drain();
    assert_eq!(consumer.starts, [false, true, false]);
    assert!(consumer.image == world.image());

    // Captured but never released: not clean either.
    let mut nbd = world.connect();
    scribble(&mut nbd, 500, 20);
    drop(nbd);
    world.restart(Signal::SIGTERM);
    consumer.reconnect(&world.socket());
    consumer.drain();
    assert_eq!(consumer.starts, [false, true, false, false]);
    assert!(consumer.image == world.image());

    // Changed behind our back between a clean stop and the next start.
    world.end(Signal::SIGTERM);
    let disk = world.dir.path().join("disk.img");
    let mut bytes = fs::read(&disk).unwrap();
    bytes[5 << 20] ^= 1;
    fs::write(&disk, &bytes).unwrap();
    world.daemon = start(world.dir.path());
    world.client();
    consumer.reconnect(&world.socket());
    consumer.drain();
    assert_eq!(consumer.starts.last(), Some(&false));
    assert!(consumer.image == world.image());
}

#[test]
fn a_marker_asked_for_during_a_stop_does_not_make_it_unclean() {
    let mut world = World::new();
    let info = world.protect(64 << 20);
    let mut consumer = Consumer::new(&world.socket(), info.volume, SIZE);
    consumer.drain();
    let mut nbd = world.connect();
    scribble(&mut nbd, 10, 5);
    drop(nbd);
    let mut client = world.client();
    kill(Pid::from_raw(i32::try_from(world.daemon.id()).unwrap()), Signal::SIGTERM).unwrap();
    let refused = loop {
        let asked = client.marker(MarkerRequest {
            marker: MarkerId::random(),
            volumes: vec![info.volume],
            kind: PointKind::Crash,
            group: GroupId::NIL,
            name: String::new(),
            pending: false,
        });
        if let Err(problem) = asked {
            break problem;
        }
    };
    assert_eq!(refused.code.0, 2041, "{refused}");
    consumer.pull(false);
    consumer.release_last();
    assert!(world.daemon.wait().unwrap().success());
    world.daemon = start(world.dir.path());
    world.client();
    consumer.reconnect(&world.socket());
    consumer.drain();
    assert_eq!(consumer.starts, [false, true], "the stop was clean");
}

#[test]
fn a_recopy_sends_everything_again_and_unprotect_leaves_the_disk_alone() {
    let world = World::new();
    let info = world.protect(16 << 20);
    let mut nbd = world.connect();
    let mut consumer = Consumer::new(&world.socket(), info.volume, SIZE);
    scribble(&mut nbd, 30, 60);
    consumer.drain();
    consumer.image.fill(0);
    let mut client = world.client();
    client.copy_rate(info.volume, 1 << 30).unwrap();
    client.recopy(info.volume, "the target lost data").unwrap();
    consumer.drain();
    assert!(consumer.image == world.image());
    let name = info.name.clone();
    let refused = client.unprotect(name.clone(), false).unwrap_err();
    assert_eq!(refused.code.0, 2036, "a client is connected");
    let before = world.image();
    client.unprotect(name.clone(), true).unwrap();
    assert!(nbd.flush().is_err(), "the client was disconnected");
    assert!(client.list().unwrap().is_empty() && world.image() == before);
    assert_eq!(client.unprotect(name, false).unwrap_err().code.0, 2035);
}

#[test]
fn a_backing_that_comes_late_is_attached_when_it_is_there() {
    let mut world = World::new();
    let info = world.protect(16 << 20);
    world.end(Signal::SIGTERM);
    let (disk, aside) = (world.dir.path().join("disk.img"), world.dir.path().join("aside"));
    fs::hard_link(&disk, &aside).unwrap();
    fs::remove_file(&disk).unwrap();
    world.daemon = start(world.dir.path());
    assert!(world.client().list().unwrap().is_empty());
    fs::hard_link(&aside, &disk).unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    let attached = loop {
        match world.client().list().unwrap().pop() {
            Some(status) => break status.info,
            None => assert!(Instant::now() < until, "not attached in time"),
        }
    };
    assert_eq!(attached.volume, info.volume);
    assert!(attached.epoch > info.epoch);
    world.connect().write(0, &content(1, 4096)).unwrap();
}

#[test]
fn a_name_like_a_partitions_is_refused_unless_a_volume_on_record_has_it() {
    let mut world = World::new();
    let refused = world.client().protect(world.request("disk-part1", 16 << 20)).unwrap_err();
    assert_eq!(refused.code.0, 4036, "{refused}");
    let info = world.protect(16 << 20);
    world.end(Signal::SIGTERM);
    let record = world.dir.path().join(format!("state/volumes/{}.json", info.volume));
    let text = fs::read_to_string(&record).unwrap();
    let older = text.replace(r#""name": "disk""#, r#""name": "disk-part1""#);
    assert_ne!(text, older);
    fs::write(&record, older).unwrap();
    world.daemon = start(world.dir.path());
    let mut client = world.client();
    let served = client.list().unwrap().pop().expect("served as before").info;
    assert_eq!((served.volume, served.name.as_str()), (info.volume, "disk-part1"));
    client.unprotect(served.name, false).unwrap();
}
