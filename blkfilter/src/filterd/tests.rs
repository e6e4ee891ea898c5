//! Volumes as the daemon has them, on files and sockets: coming, going, and not quite gone.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farshore_extent::{BlockSizes, Epoch, VolumeId, VolumeName, VolumeSize};

use super::attached::{Attached, Ground, open};
use super::config::Config;
use super::names::Names;
use super::namespace::OwnDevices;
use super::service::Service;
use super::state::{Front, StateDir, VolumeRecord};
use crate::control::server::Serve;
use crate::control::{AttachKind, Reply, Request};
use crate::device::Device;
use crate::filter::Host;
use crate::preflight::HostRoots;
use crate::volume_state::{Found, Left};

const SIZE: u64 = 1 << 20;

/// Longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(30);

struct World {
    dir: tempfile::TempDir,
    ground: Ground,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::new(dir.path().join("state"), dir.path().join("run"));
        config.harden = false;
        let state = StateDir::open(&config.state, &config.run).unwrap();
        let ground = Ground {
            names: Names::new(&config.run),
            host: Arc::new(Host::new(Epoch::new(1), config.limits.clone())),
            config: Arc::new(config),
            state: Arc::new(state),
            own: OwnDevices::default(),
            roots: HostRoots::default(),
            lingering: Arc::default(),
        };
        Self { dir, ground }
    }

    fn disk(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        File::options().create(true).append(true).open(&path).unwrap().set_len(SIZE).unwrap();
        path
    }

    fn record(&self, name: &str) -> VolumeRecord {
        VolumeRecord {
            version: VolumeRecord::VERSION,
            volume: VolumeId::random(),
            name: VolumeName::new(name).unwrap(),
            backing: self.disk(name),
            front: Front::Socket { path: self.dir.path().join(name).with_extension("sock") },
            pool_bytes: 8 << 20,
            point_interval_ms: None,
            copy_rate: 0,
            seeded: false,
            wait: None,
            size: VolumeSize::new(SIZE).unwrap(),
            blocks: BlockSizes::E512,
            epoch: Epoch::new(1),
            fenced: None,
        }
    }

    fn attach(&self, record: &VolumeRecord) -> Result<Arc<Attached>, farshore_extent::Problem> {
        Attached::attach(&self.ground, open(&record.backing)?, record.clone(), true)
    }

    /// Plays an agent until the first copy is durable at the target.
    fn make_ordered(&self, volume: VolumeId) {
        let host = &self.ground.host;
        wait("the first copy", || {
            let status = host.status(volume).unwrap();
            host.release(volume, status.captured).unwrap();
            let now = host.status(volume).unwrap();
            now.order == farshore_extent::CaptureOrder::Ordered && now.captured == now.durable
        });
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < until, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_volume_that_somebody_is_still_at_leaves_later_and_can_be_attached_again_then() {
    let world = World::new();
    let record = world.record("disk");
    let attached = world.attach(&record).unwrap();
    // What a client has whose last read the backing device has not answered: a queue.
    let reader = Arc::clone(attached.device()).open_queue().unwrap();
    attached.stop_serving(Duration::ZERO);
    assert_eq!(attached.detach(Duration::ZERO).unwrap_err().code.0, 2037);
    attached.let_go();
    drop(attached);
    world.ground.lingering.sweep();
    let (id, path) = (record.volume, record.backing.as_path());
    for (volume, backing) in [(Some(id), "/another".as_ref()), (None, path)] {
        let obstacle = world.ground.lingering.obstacle(volume, backing).unwrap();
        assert_eq!(obstacle.code.0, 2037);
    }
    assert!(world.ground.host.status(id).is_some(), "what was captured can still be fetched");
    assert_eq!(world.attach(&record).err().unwrap().code.0, 4016, "the claim is still held");
    drop(reader);
    wait("rest", || {
        world.ground.lingering.sweep();
        world.ground.lingering.obstacle(Some(id), path).is_none()
    });
    assert!(world.ground.host.status(id).is_none());
    let again = world.attach(&record).unwrap();
    again.stop_serving(LIMIT);
    again.detach(LIMIT).unwrap();
}

#[test]
fn a_volume_is_not_marked_clean_while_somebody_is_still_at_it() {
    let world = World::new();
    let record = world.record("disk");
    let attached = world.attach(&record).unwrap();
    world.make_ordered(record.volume);
    let client = Arc::clone(attached.device()).open_queue().unwrap();
    attached.stop_serving(Duration::ZERO);
    assert!(!attached.mark_stopped().unwrap(), "a client may write yet");
    let left = || match world.ground.state.volume_state(record.volume).load(record.volume) {
        Found::Stored(stored) => stored.left,
        other => panic!("{other:?}"),
    };
    assert!(matches!(left(), Left::Regions { .. }));
    drop(client);
    assert!(attached.is_at_rest(LIMIT));
    assert!(attached.mark_stopped().unwrap());
    assert!(matches!(left(), Left::Ranges { ranges, .. } if ranges.is_empty()));
}

fn service(world: &World, names: &[&str]) -> (Arc<Service>, Vec<VolumeRecord>) {
    let records: Vec<VolumeRecord> = names.iter().map(|name| world.record(name)).collect();
    let service = Service::new(world.ground.clone(), records.clone()).unwrap();
    (Arc::new(service), records)
}

fn listed(service: &Service) -> Vec<String> {
    let Reply::Volumes(volumes) = service.serve(Request::List).unwrap().reply else {
        panic!("another answer")
    };
    volumes.into_iter().map(|v| v.info.name.to_string()).collect()
}

#[test]
fn a_volume_that_hangs_holds_up_no_other_and_no_answer() {
    let world = World::new();
    let (service, records) = service(&world, &["a", "hangs", "z"]);
    // What a thread has whose disk does not answer.
    let hanging = service.turns.take(&records[1].name, Duration::ZERO).unwrap();
    service.attach_missing();
    wait("the others", || listed(&service) == ["a", "z"]);
    assert!(!service.wait_settled(Duration::ZERO), "one was not tried yet");
    let other = records[2].name.clone();
    service.serve(Request::Unprotect { name: other, force: false }).unwrap();
    assert_eq!(listed(&service), ["a"]);
    drop(hanging);
    service.attach_missing();
    assert!(service.wait_settled(LIMIT));
    assert_eq!(listed(&service), ["a", "hangs"]);
    service.quiesce();
    assert_eq!(service.finish().len(), 2, "nobody has made them durable");
}

#[test]
fn volumes_whose_users_wait_come_first() {
    let world = World::new();
    let (service, records) = service(&world, &["a", "b", "c"]);
    let left = &records[2];
    world.ground.names.announce("ublkb7", &left.name, left.volume, false).unwrap();
    let due: Vec<String> = service.due().into_iter().map(|(_, name)| name.to_string()).collect();
    assert_eq!(due, ["c", "a", "b"]);
}

#[test]
fn a_stop_waits_for_no_disk_that_hangs_and_what_comes_late_is_not_served() {
    let mut world = World::new();
    let mut config = (*world.ground.config).clone();
    (config.client_grace, config.release_grace) = (Duration::ZERO, Duration::ZERO);
    world.ground.config = Arc::new(config);
    let (service, records) = service(&world, &["late"]);
    let _hanging = service.turns.take(&records[0].name, Duration::ZERO).unwrap();
    service.quiesce();
    let late = world.attach(&records[0]).unwrap();
    service.enter(Arc::clone(&late));
    assert!(!late.is_served() && listed(&service).is_empty());
    assert_eq!(service.finish(), []);
    let id = records[0].volume;
    let Found::Stored(stored) = world.ground.state.volume_state(id).load(id) else {
        panic!("no state")
    };
    assert!(matches!(stored.left, Left::Regions { .. }), "it has not stopped in order");
}

#[test]
fn two_who_ask_for_a_free_number_get_different_ones() {
    let world = World::new();
    let name = VolumeName::new("disk").unwrap();
    let free = || world.ground.free_front(&name, AttachKind::Nbd, vec![]).unwrap();
    assert_ne!(free(), free());
}
