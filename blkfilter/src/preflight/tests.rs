use std::fs;

use super::*;
use crate::sys::ring::{Done, Engine, IoBuf, Op};

/// A directory for a fake host, a good image file on the disk, and filterd's places.
struct Host {
    dir: tempfile::TempDir,
    roots: HostRoots,
}

impl Host {
    fn new() -> Self {
        let dir = crate::sys::disk_dir();
        let roots = HostRoots { proc: dir.path().join("proc"), sys: dir.path().join("sys") };
        let host = Self { dir, roots };
        host.put("proc/thread-self/mountinfo", "");
        host.put("proc/swaps", "Filename Type Size Used Priority\n");
        host
    }

    fn put(&self, path: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    fn image(&self, bytes: u64) -> PathBuf {
        let path = self.put("image", "");
        File::options().write(true).open(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    fn request(&self, backing: &Path) -> ProtectRequest {
        ProtectRequest {
            name: name("pgdata"),
            backing: backing.to_owned(),
            attach: Some(AttachKind::Socket),
            nbd_socket: Some("/tmp/s".into()),
            pool_bytes: None,
            point_interval_ms: None,
            seeded: false,
            copy_at: None,
        }
    }

    fn check(&self, request: &ProtectRequest, running: &[Running]) -> Vec<u16> {
        // On another file system than the images.
        let places = OwnPlaces { state: "/dev/shm/x".into(), run: "/dev/shm/y".into() };
        codes(&preflight(&self.roots, request, &places, running))
    }

    /// Users of the fake block device `dev`.
    fn users(&self, dev: &str, places: &OwnPlaces) -> Vec<Problem> {
        let subject = Subject::device(&self.roots, Path::new("/dev/vdb"), dev.into());
        subject.users(&self.roots, &name("pgdata"), places)
    }
}

fn name(text: &str) -> VolumeName {
    VolumeName::new(text).unwrap()
}

fn nowhere() -> OwnPlaces {
    OwnPlaces { state: "/proc".into(), run: "/proc".into() }
}

fn codes(problems: &[Problem]) -> Vec<u16> {
    for problem in problems {
        let Problem { what, why, next, risk, .. } = problem;
        assert!(![what, why, next, risk].iter().any(|text| text.is_empty()));
        assert!(!what.ends_with('.') && !what.contains('\n'), "{what}");
    }
    problems.iter().map(|p| p.code.0).collect()
}

#[test]
fn a_good_file_has_no_obstacle_and_is_left_alone() {
    let host = Host::new();
    let image = host.image(4 << 20);
    let before = fs::metadata(&image).unwrap();
    assert_eq!(host.check(&host.request(&image), &[]), [0u16; 0]);
    let after = fs::metadata(&image).unwrap();
    assert_eq!((before.mtime_nsec(), before.blocks()), (after.mtime_nsec(), after.blocks()));
    Backing::open(&image, Mode::ReadWrite).unwrap();
}

#[test]
fn what_is_no_disk_is_refused() {
    let host = Host::new();
    assert_eq!(host.check(&host.request(Path::new("/nonexistent/x")), &[]), [4011]);
    assert_eq!(host.check(&host.request(host.dir.path()), &[]), [4013]);
    assert_eq!(host.check(&host.request(Path::new("/dev/null")), &[]), [4013]);
}

#[test]
fn every_failed_prerequisite_is_named_not_just_the_first() {
    let host = Host::new();
    let image = host.image(1000);
    let mut request = host.request(&image);
    request.nbd_socket = Some(format!("/tmp/{}", "s".repeat(103)).into());
    let other = Running {
        name: request.name.clone(),
        backing: "/dev/vdz".into(),
        nbd_socket: Some("/run/z".into()),
        device: None,
    };
    host.put("proc/swaps", &format!("Filename\n{} file 1 0 -2\n", image.display()));
    host.put("sys/block/loop3/dev", "7:3\n");
    host.put("sys/block/loop3/loop/backing_file", &format!("{}\n", image.display()));
    host.put("proc/thread-self/mountinfo", "1 2 7:3 / /mnt/a\\040b rw - ext4 /dev/loop3 rw\n");
    assert_eq!(host.check(&request, &[other]), [4022, 4024, 4012, 4014, 4025, 4019]);
    let places = OwnPlaces { state: "/dev/shm/x".into(), run: "/dev/shm/y".into() };
    let problems = preflight(&host.roots, &request, &places, &[]);
    let mounted = problems.iter().find(|p| p.code.0 == 4012).unwrap();
    assert!(mounted.what.contains("/mnt/a b") && mounted.why.contains("pgdata"));
}

#[test]
fn a_size_that_direct_io_cannot_reach_is_refused() {
    let host = Host::new();
    let image = host.image((1 << 20) + 100);
    assert_eq!(host.check(&host.request(&image), &[]), [4020]);
}

#[test]
fn the_same_device_by_another_path_is_already_protected() {
    let host = Host::new();
    let image = host.image(4 << 20);
    let link = host.dir.path().join("link");
    std::os::unix::fs::symlink(&image, &link).unwrap();
    let _held = Backing::open(&image, Mode::ReadWrite).unwrap();
    let running = Running {
        name: name("other"),
        backing: image.clone(),
        nbd_socket: Some("/tmp/s".into()),
        device: None,
    };
    // The claim of that very volume is not reported as a stranger's.
    assert_eq!(host.check(&host.request(&link), std::slice::from_ref(&running)), [4028, 4021]);
    assert_eq!(host.check(&host.request(&link), &[]), [4016]);
}

#[test]
fn users_of_partitions_and_of_what_is_built_on_them_count() {
    let host = Host::new();
    host.put("sys/dev/block/8:16/dev", "8:16\n");
    host.put("sys/dev/block/8:16/vdb1/dev", "8:17\n");
    host.put("sys/dev/block/8:16/vdb1/partition", "1\n");
    host.put("sys/dev/block/8:16/vdb1/holders/dm-0/dev", "253:0\n");
    host.put("sys/dev/block/8:17/holders/dm-0/dev", "253:0\n");
    host.put("sys/dev/block/253:0/dev", "253:0\n");
    host.put(
        "proc/thread-self/mountinfo",
        "1 0 8:99 / /other rw - ext4 /dev/nothing rw\n2 0 253:0 / /srv rw - xfs /dev/none rw\n",
    );
    let problems = host.users("8:16", &nowhere());
    assert_eq!(codes(&problems), [4012, 4015]);
    assert!(problems[0].what.contains("/srv") && problems[1].what.contains("dm-0"));
    assert_eq!(codes(&host.users("8:32", &nowhere())), [0u16; 0]);
}

#[test]
fn the_disk_of_the_running_system_is_not_told_to_be_unmounted() {
    let next = |at| problem::mounted(Path::new("/dev/vda"), &name("x"), at).next;
    for at in ["/", "/boot", "/usr"] {
        assert!(next(at).contains("boot disk") && !next(at).contains("umount"), "{at}");
    }
    assert!(next("/srv").contains("umount /srv"));
}

#[test]
fn own_files_on_the_device_are_refused_even_before_they_exist() {
    let host = Host::new();
    let number = fs::metadata(host.dir.path()).unwrap().dev();
    let dev = backing::sysfs_name(backing::device_numbers(number));
    let places = OwnPlaces { state: host.dir.path().join("not/yet"), run: "/proc".into() };
    let problems = host.users(&dev, &places);
    assert_eq!(codes(&problems), [4023]);
    assert!(problems[0].what.contains("state directory"));
}

#[test]
fn read_only_and_zoned_devices_are_refused() {
    let host = Host::new();
    host.put("sys/dev/block/8:16/ro", "1\n");
    host.put("sys/dev/block/8:16/queue/zoned", "host-managed\n");
    host.put("sys/dev/block/8:32/ro", "0\n");
    host.put("sys/dev/block/8:32/queue/zoned", "none\n");
    let image = host.image(4 << 20);
    for (dev, expected) in [("8:16", &[4017, 4018][..]), ("8:32", &[])] {
        let subject = Subject::device(&host.roots, &image, dev.into());
        assert_eq!(codes(&subject.nature(&host.roots)), expected);
    }
}

/// A loop device on `image`, detached at the end.
struct Loop(String);

impl Loop {
    fn on(image: &Path) -> Self {
        Self(run("losetup", &["--find", "--show", image.to_str().unwrap()]).trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run("losetup", &["--detach", &self.0]);
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = std::process::Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_real_block_device_is_claimed_written_and_examined() {
    let free = std::process::Command::new("losetup").arg("--find").output();
    if !nix::unistd::geteuid().is_root() || !free.is_ok_and(|o| o.status.success()) {
        println!("skipped: needs root and a free loop device");
        return;
    }
    let host = Host::new();
    let image = host.image(16 << 20);
    let device = Loop::on(&image);
    let path = Path::new(&device.0);
    let places = OwnPlaces { state: "/dev/shm/x".into(), run: "/dev/shm/y".into() };
    let roots = HostRoots::default();
    let check = |path: &Path| codes(&preflight(&roots, &host.request(path), &places, &[]));
    assert_eq!(check(path), [0u16; 0]);
    assert_eq!(check(&image), [4025]);

    let noted = || hints(&HostRoots::default(), &name("pgdata"), path);
    assert_eq!(noted(), []);
    let label = [&[0; 512][..], b"LABELONE", &[0; 16], b"LVM2 001", &[0; 480]].concat();
    fs::write(path, &label).unwrap();
    assert!(noted()[0].what.contains("LVM"), "{:?}", noted());
    assert!(noted()[0].next.contains("/dev/farshore/pgdata"));

    let backing = Backing::open(path, Mode::ReadWrite).unwrap();
    assert_eq!(check(path), [4016]);
    assert_eq!(backing.size().get(), 16 << 20);
    assert!(backing.direct() && backing.zeroes());
    let before = backing.identity().unwrap();
    assert_eq!(before, backing.identity().unwrap());
    let mut ring = backing.ring(4, Engine::Auto, Vec::new()).unwrap();
    let mut buf = crate::sys::aligned::AlignedBuf::zeroed(8192);
    buf.fill(7);
    let extent = farshore_extent::Extent::new(4096, 4096).unwrap();
    finish(&mut ring, Op::Write { offset: 0, buf: IoBuf::Own(buf), durable: true });
    finish(&mut ring, Op::Zero { extent, may_unmap: true, durable: true });
    assert_ne!(before, backing.identity().unwrap());
    drop(ring);
    drop(backing);
    let bytes = fs::read(path).unwrap();
    assert!(bytes[..4096].iter().all(|&b| b == 7) && bytes[4096..8192].iter().all(|&b| b == 0));

    run("mkfs.ext4", &["-q", &device.0]);
    let at = host.dir.path().join("at");
    fs::create_dir(&at).unwrap();
    run("mount", &[&device.0, at.to_str().unwrap()]);
    let found = check(path);
    let own = OwnPlaces { state: at.join("state"), run: "/dev/shm/y".into() };
    let with_own = codes(&preflight(&roots, &host.request(path), &own, &[]));
    run("umount", &[at.to_str().unwrap()]);
    assert_eq!(found, [4012]);
    assert_eq!(with_own, [4012, 4023]);
    assert_eq!(check(path), [0u16; 0]);
    run("mkswap", &[&device.0]);
    run("blockdev", &["--setro", &device.0]);
    assert_eq!(check(path), [4017]);
    run("blockdev", &["--setrw", &device.0]);
}

fn finish(ring: &mut crate::sys::ring::Ring, op: Op) -> Option<Done> {
    ring.push(op, 0);
    let mut last = None;
    while ring.in_flight() > 0 {
        ring.wait(None).unwrap();
        ring.completions(|done| {
            done.result.unwrap();
            last = Some(done);
        });
    }
    last
}
