//! `farshore demo` where a kernel has ublk: its disk is a block device, and filterd is killed too.

use std::path::Path;
use std::time::Duration;

use crate::harness::{farshore_bin, run, said};
use crate::{Group, case_list, guest};

pub const GROUP: Group = Group {
    name: "demo",
    limit: Duration::from_secs(420),
    cases: case_list![the_demo_uses_ublk_kills_filterd_too_and_leaves_nothing_behind],
    ..Group::DEFAULT
};

fn the_demo_uses_ublk_kills_filterd_too_and_leaves_nothing_behind() {
    guest::load("ublk_drv");
    let farshore = farshore_bin();
    let gentle = ["--size", "32MiB", "--rate", "1MiB", "--seconds", "12"];
    let out = run(
        farshore.to_str().expect("UTF-8"),
        &[&["demo", "--keep", "/vm/scratch/demo"][..], &gentle].concat(),
    );
    let story = said(&out);
    println!("{story}");
    assert!(story.contains("--attach ublk"), "{story}");
    assert!(story.contains("The disk is /dev/farshore/demo, a block device"), "{story}");
    assert!(story.contains("kill -9 filterd") && story.contains("none failed"), "{story}");
    assert!(story.contains("the latest point is the source, byte for byte"), "{story}");
    assert!(story.trim_end().ends_with("demo: ok"), "{story}");
    assert!(!Path::new("/dev/farshore/demo").exists(), "the name is left behind");
    let left = std::fs::read_dir("/sys/block").expect("sysfs").flatten();
    let left: Vec<_> = left.map(|e| e.file_name()).collect();
    let ublk = left.iter().find(|n| n.to_string_lossy().starts_with("ublkb"));
    assert_eq!(ublk, None, "a device is left behind");
}
