//! The power-cut disk does what the tests that use it rely on: flushed data survives, the rest is
//! gone. Without this every test of a power cut could pass for nothing.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::harness::run;
use crate::image::Disk;
use crate::runner::{Lab, STABLE};
use crate::{Case, Scenario, case_list, guest};

pub const SCENARIO: Scenario = Scenario {
    name: "power::a_cut_keeps_what_was_flushed_and_destroys_what_was_not",
    kernel: STABLE,
    soak: false,
    run: a_cut_keeps_what_was_flushed_and_destroys_what_was_not,
};

pub const STEPS: &[Case] = case_list![write_and_wait, look_after_the_cut];

const DISK: Disk = Disk::new("fickle", 64).volatile();
const LENGTH: usize = 1 << 20;
const FLUSHED_MIB: u64 = 0;
const UNFLUSHED_MIB: u64 = 32;
const PATTERN: &str = "/vm/scratch/pattern";
const LIMIT: Duration = Duration::from_secs(60);

fn a_cut_keeps_what_was_flushed_and_destroys_what_was_not(lab: &Lab) -> Result<(), String> {
    let mut machine = lab.boot("machine", &[DISK])?;
    let step = machine.start_case("power::write_and_wait", LIMIT);
    machine.wait_signal("cut", &step)?;
    machine.cut();
    let mut machine = lab.boot("machine", &[DISK])?;
    machine.run_case("power::look_after_the_cut", LIMIT).map(drop)
}

fn write_and_wait() {
    let disk = guest::disk("fickle");
    let device = disk.to_str().expect("UTF-8");
    let cache = disk.file_name().expect("name").to_str().expect("UTF-8");
    let cache = std::fs::read_to_string(format!("/sys/block/{cache}/queue/write_cache"));
    assert_eq!(cache.expect("sysfs").trim(), "write back", "the disk must have a volatile cache");
    std::fs::write(PATTERN, vec![0xa5; LENGTH]).expect("pattern");
    let write = |at_mib: u64, flush: &str| {
        let (of, seek) = (format!("of={device}"), format!("seek={at_mib}"));
        let from = format!("if={PATTERN}");
        run("dd", &[&from, &of, &seek, "bs=1M", "oflag=direct", flush, "status=none"]);
    };
    write(FLUSHED_MIB, "conv=notrunc,fsync");
    write(UNFLUSHED_MIB, "conv=notrunc");
    guest::wait_for_the_cut();
}

fn look_after_the_cut() {
    let disk = std::fs::File::open(guest::disk("fickle")).expect("disk");
    let mut found = vec![0; LENGTH];
    disk.read_exact_at(&mut found, FLUSHED_MIB << 20).expect("read");
    assert!(found.iter().all(|b| *b == 0xa5), "flushed data was lost");
    disk.read_exact_at(&mut found, UNFLUSHED_MIB << 20).expect("read");
    assert!(found.iter().all(|b| *b == 0), "the cut destroyed nothing: it proves nothing");
}
