//! Daemons die by SIGKILL under load through a kernel device: the load sees no error, all it wrote
//! verifies, and when order is restored a point equals the disk. `FARSHORE_KILLS` sets how often.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::harness::{Site, chance, kills, pause, said};
use crate::image::Disk;
use crate::volume::{Volume, Way, fio_arguments};
use crate::{Group, case_list};

pub const GROUP: Group = Group {
    name: "kills",
    disks: &[Disk::new("disk", 64), Disk::new("other", 64)],
    limit: Duration::from_secs(420),
    cases: case_list![
        filterd_killed_under_load_on_ublk_is_not_noticed,
        filterd_killed_under_load_on_kernel_nbd_is_not_noticed,
        an_agent_killed_under_load_is_not_noticed,
        two_volumes_under_load_survive_a_killed_filterd,
    ],
    ..Group::DEFAULT
};

/// A queue of a device belongs to a CPU.
pub const TWO_QUEUES_GROUP: Group = Group {
    name: "kills_two_queues",
    disks: &[Disk::new("disk", 64)],
    cpus: 2,
    limit: Duration::from_secs(420),
    cases: case_list![a_device_with_two_queues_keeps_what_its_jobs_wrote_over_kills],
    ..Group::DEFAULT
};

/// Verified writes that last as long as the kills do.
struct Load(Child);

impl Load {
    fn start(volume: &Volume<'_>, kills: u64) -> Self {
        let rounds = format!("--loops={}", kills.div_ceil(10));
        let mixed = ["--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--iodepth=8"];
        let rest = ["--size=60m", "--rate=800k", "--randseed=3", &rounds];
        Self::with(volume, &[&mixed[..], &rest].concat())
    }

    fn with(volume: &Volume<'_>, arguments: &[&str]) -> Self {
        let args = fio_arguments(&volume.device, arguments);
        let mut fio = Command::new("fio");
        fio.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(fio.spawn().expect("fio"))
    }

    fn assert_running(&mut self, round: u64, site: &Site) {
        if self.0.try_wait().expect("wait").is_none() {
            return;
        }
        let mut text = String::new();
        for pipe in [
            self.0.stdout.take().map(|p| Box::new(p) as Box<dyn std::io::Read>),
            self.0.stderr.take().map(|p| Box::new(p) as Box<dyn std::io::Read>),
        ] {
            pipe.expect("piped").read_to_string(&mut text).expect("what fio said");
        }
        panic!("fio ended before kill {round}\n{text}\n{}", site.logs());
    }

    fn finish(self, site: &Site) {
        let out = self.0.wait_with_output().expect("fio");
        assert!(out.status.success(), "fio: {}\n{}\n{}", out.status, said(&out), site.logs());
    }
}

fn kill_filterd_under_load(way: Way, disks: &[&str]) {
    let site = Site::new();
    let mut daemons = site.start_all();
    let volumes: Vec<Volume<'_>> =
        disks.iter().map(|disk| Volume::protect(&site, way, disk, "1s")).collect();
    volumes.iter().for_each(Volume::wait_protected);
    let mut loads: Vec<Load> = volumes.iter().map(|v| Load::start(v, kills())).collect();
    let mut dice = 0x5eed;
    for round in 0..kills() {
        pause(Duration::from_millis(200 + chance(&mut dice, 1500)));
        loads.iter_mut().for_each(|load| load.assert_running(round, &site));
        daemons.filterd.kill();
        pause(Duration::from_millis(chance(&mut dice, 400)));
        daemons.filterd = site.start_filterd();
    }
    loads.into_iter().for_each(|load| load.finish(&site));
    for volume in &volumes {
        volume.wait_protected();
        volume.assert_point_equals_disk("after-kills");
    }
    volumes.into_iter().for_each(Volume::unprotect);
}

fn filterd_killed_under_load_on_ublk_is_not_noticed() {
    kill_filterd_under_load(Way::Ublk, &["disk"]);
}

fn filterd_killed_under_load_on_kernel_nbd_is_not_noticed() {
    kill_filterd_under_load(Way::Nbd, &["disk"]);
}

fn two_volumes_under_load_survive_a_killed_filterd() {
    kill_filterd_under_load(Way::Ublk, &["disk", "other"]);
}

fn a_device_with_two_queues_keeps_what_its_jobs_wrote_over_kills() {
    let site = Site::new();
    let mut daemons = site.start_all();
    let volume = Volume::protect(&site, Way::Ublk, "disk", "1s");
    let node = std::fs::canonicalize(&volume.device).expect("device");
    let queues = Path::new("/sys/block").join(node.file_name().expect("name")).join("mq");
    assert_eq!(std::fs::read_dir(queues).expect("queues").count(), 2);
    volume.wait_protected();
    let jobs = ["--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k", "--iodepth=4"];
    let each = ["--numjobs=2", "--size=28m", "--offset_increment=32m", "--cpus_allowed=0-1"];
    let rest = ["--cpus_allowed_policy=split", "--rate=600k", "--randseed=5"];
    let mut load = Load::with(&volume, &[&jobs[..], &each, &rest].concat());
    for round in 0..3 {
        pause(Duration::from_secs(2));
        load.assert_running(round, &site);
        daemons.filterd.kill();
        daemons.filterd = site.start_filterd();
    }
    load.finish(&site);
    volume.wait_protected();
    volume.assert_point_equals_disk("two-queues");
    volume.unprotect();
}

fn an_agent_killed_under_load_is_not_noticed() {
    let site = Site::new();
    let mut daemons = site.start_all();
    let volume = Volume::protect(&site, Way::Ublk, "disk", "1s");
    volume.wait_protected();
    let mut load = Load::start(&volume, kills());
    let mut dice = 0xa9e7;
    for round in 0..kills() {
        pause(Duration::from_millis(200 + chance(&mut dice, 1500)));
        load.assert_running(round, &site);
        daemons.agent.kill();
        pause(Duration::from_millis(chance(&mut dice, 400)));
        daemons.agent = site.start_agent();
    }
    load.finish(&site);
    volume.wait_protected();
    volume.assert_point_equals_disk("after-kills");
    volume.unprotect();
}
