//! What an administrator does with the device of a protected volume: partitions, and any load at all.

use crate::harness::{Site, run};
use crate::image::Disk;
use crate::volume::{Attached, Volume, Way, fio};
use crate::{Group, case_list, guest};

pub const GROUP: Group = Group {
    name: "device",
    disks: &[Disk::new("disk", 64)],
    cases: case_list![
        partitions_appear_on_the_device_and_on_the_opened_point,
        a_driver_that_comes_late_is_used_without_being_asked,
        the_same_load_leaves_the_same_content_as_on_a_loop_device,
    ],
    ..Group::DEFAULT
};

fn partitions_appear_on_the_device_and_on_the_opened_point() {
    let site = Site::new();
    let _daemons = site.start_all();
    let volume = Volume::protect(&site, Way::Ublk, "disk", "1s");
    let table = "printf 'label: gpt\\nsize=24MiB\\nsize=24MiB\\n' | sfdisk --quiet \"$0\"";
    run("bash", &["-c", table, volume.path()]);
    let node = std::fs::canonicalize(&volume.device).expect("device");
    let second = guest::wait_block_device(format!("{}p2", node.display()).as_ref());
    run("mkfs.ext4", &["-q", second.to_str().expect("UTF-8")]);
    let at = "/mnt/second";
    std::fs::create_dir_all(at).expect("mount point");
    run("mount", &[second.to_str().expect("UTF-8"), at]);
    std::fs::write("/mnt/second/file", b"kept").expect("write");
    run("umount", &[at]);
    volume.wait_protected();
    let point = volume.assert_point_equals_disk("partitioned");

    let view = site.open("disk", farshore_protocol::admin::PointChoice::Id(point.point));
    let opened = Attached::view(&view);
    let second = guest::wait_block_device(format!("{}p2", opened.device.display()).as_ref());
    run("fsck.ext4", &["-f", "-n", second.to_str().expect("UTF-8")]);
    run("mount", &[second.to_str().expect("UTF-8"), at]);
    assert_eq!(std::fs::read("/mnt/second/file").expect("read"), b"kept");
    run("umount", &[at]);
    drop(opened);
    site.close(&view);
    volume.unprotect();
}

fn a_driver_that_comes_late_is_used_without_being_asked() {
    let site = Site::new();
    let filterd = site.start_filterd();
    let volume = Volume::protect(&site, Way::Ublk, "disk", "off");
    assert!(filterd.stop().success());
    run("rmmod", &["ublk_drv"]);
    let _filterd = site.start_filterd();
    assert!(!volume.device.exists());
    Way::Ublk.load_driver();
    guest::wait_block_device(&volume.device);
    fio(&volume.device, &["--rw=write", "--bs=64k", "--size=1m"]);
    volume.unprotect();
}

/// The kernel's own loop device is the independent judge.
fn the_same_load_leaves_the_same_content_as_on_a_loop_device() {
    let site = Site::new();
    let _daemons = site.start_all();
    let image = site.root().join("judge.img");
    let image = image.to_str().expect("UTF-8");
    run("truncate", &["-s", "64M", image]);
    guest::load("loop");
    let judge = run("losetup", &["--find", "--show", "--direct-io=on", image]);
    let judge = String::from_utf8(judge.stdout).expect("UTF-8").trim().to_owned();
    let volume = Volume::protect(&site, Way::Ublk, "disk", "1s");
    let device = volume.path();
    for target in [device, &judge] {
        run("blkdiscard", &["--zeroout", target]);
        // Without verification: its headers hold the time. One request at a time: with more, which
        // of two overlapping writes wins is chance.
        let target = format!("--filename={target}");
        let common = ["--name=load", &target, "--ioengine=libaio", "--direct=1", "--minimal"];
        let load = ["--rw=randrw", "--bsrange=512-64k", "--blockalign=512", "--size=60m"];
        let seed = ["--norandommap", "--io_size=24m", "--randseed=11", "--refill_buffers"];
        run("fio", &[&common[..], &load, &seed].concat());
        run(
            "blkdiscard",
            &["--offset=1MiB", "--length=2MiB", target.trim_start_matches("--filename=")],
        );
    }
    run("cmp", &["--bytes=67108864", device, &judge]);
    run("losetup", &["-d", &judge]);
    volume.wait_protected();
    volume.assert_point_equals_disk("same-load");
    fio(&volume.device, &["--rw=randwrite", "--bs=4k", "--size=4m", "--iodepth=4"]);
    volume.unprotect();
}
