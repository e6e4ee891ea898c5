//! The NBD server against the clients people use: libnbd's tools, QEMU, fio, and the protocol
//! project's own test client. A missing tool is a failure that names the package.

#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use farshore_blkfilter::device::{Device, DeviceInfo};
use farshore_blkfilter::frontend::memory::MemoryDevice;
use farshore_blkfilter::frontend::nbd::{Config, Export, Exports, Server};
use farshore_extent::VolumeSize;

const MIB: u64 = 1 << 20;

/// A server on a RAM disk named `disk`.
struct Served {
    dir: tempfile::TempDir,
    disk: Arc<MemoryDevice>,
    exports: Exports,
    server: Server,
}

impl Served {
    fn new(bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(MemoryDevice::new(VolumeSize::new(bytes).unwrap()));
        let exports = Exports::new();
        let description = "a disk of the tests".to_owned();
        let export = Export { name: "disk".into(), description, device: disk.clone() };
        exports.add(export).unwrap();
        let path = dir.path().join("nbd.sock");
        let server = Server::bind_unix(&path, exports.clone(), Config::default()).unwrap();
        Self { dir, disk, exports, server }
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.server.path().display())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Everything on the disk.
    fn content(&self) -> Vec<u8> {
        let size = usize::try_from(self.disk.info().size.get()).unwrap();
        let mut bytes = vec![0; size];
        self.disk.read_at(0, &mut bytes);
        bytes
    }
}

/// Runs a client to its end and expects success. `package` is named when it is missing.
fn run(package: &str, command: &mut Command) -> Output {
    // nbdsh starts whatever `python3` comes first; only the system's has the module.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("/usr/bin:/bin:{path}")).stdin(Stdio::null());
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => panic!("{command:?}: {error}; install the package `{package}`"),
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?} ended with {}\n{}\n{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    output
}

/// An image with data, zeroes and repeating parts, all different.
fn image(bytes: u64) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut image = vec![0; usize::try_from(bytes).unwrap()];
    for (number, block) in image.chunks_mut(64 << 10).enumerate() {
        if number % 3 == 1 {
            continue;
        }
        for word in block.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
    image
}

#[test]
fn nbdinfo_sees_what_is_true() {
    let served = Served::new(8 * MIB);
    let out = run("libnbd-bin", Command::new("nbdinfo").args(["--json", &served.uri()]));
    let info: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["export-name"], "disk");
    assert_eq!(export["description"], "a disk of the tests");
    assert_eq!(export["export-size"], 8 * MIB);
    assert_eq!(export["contexts"][0], "base:allocation");
    for can in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df"] {
        assert_eq!(export[can], true, "{can}");
    }
    for cannot in ["is_read_only", "can_cache", "can_fast_zero", "is_rotational"] {
        assert_eq!(export[cannot], false, "{cannot}");
    }
    assert_eq!(export["block_size_minimum"], 512);
    assert_eq!(export["block_size_maximum"], 32 * MIB);
}

#[test]
fn nbdinfo_lists_exports_and_maps_holes() {
    let served = Served::new(8 * MIB);
    let device = Arc::new(MemoryDevice::new(VolumeSize::new(MIB).unwrap()));
    let second = Export { name: "another".into(), description: String::new(), device };
    served.exports.add(second).unwrap();
    let out = run("libnbd-bin", Command::new("nbdinfo").args(["--list", "--json", &served.uri()]));
    let list: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let names: Vec<_> =
        list["exports"].as_array().unwrap().iter().map(|e| e["export-name"].clone()).collect();
    assert_eq!(names, ["another", "disk"]);

    served.disk.write_at(MIB, &vec![1; 1 << 20]);
    let out = run("libnbd-bin", Command::new("nbdinfo").args(["--map", "--json", &served.uri()]));
    let map: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let seen: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|e| (e["offset"].as_u64().unwrap(), e["length"].as_u64().unwrap(), &e["type"]))
        .map(|(offset, length, kind)| (offset / MIB, length / MIB, kind.as_u64().unwrap()))
        .collect();
    assert_eq!(seen, [(0, 1, 3), (1, 1, 0), (2, 6, 3)]);
}

#[test]
fn nbdcopy_carries_an_image_both_ways() {
    let served = Served::new(96 * MIB);
    let image = image(96 * MIB);
    let (from, to) = (served.file("from"), served.file("to"));
    std::fs::write(&from, &image).unwrap();
    run("libnbd-bin", Command::new("nbdcopy").arg(&from).arg(served.uri()));
    assert!(served.content() == image);
    assert!(served.disk.counts().unmaps > 0, "zeroes travel as zeroes");
    let mut back = Command::new("nbdcopy");
    run("libnbd-bin", back.args(["--connections=4", "--requests=64"]).arg(served.uri()).arg(&to));
    assert!(std::fs::read(&to).unwrap() == image);
    // Large requests in both directions: cut at the seam, one answer each.
    let mut back = Command::new("nbdcopy");
    back.args(["--connections=1", "--request-size=33554432"]).arg(served.uri()).arg(&to);
    run("libnbd-bin", &mut back);
    assert!(std::fs::read(&to).unwrap() == image);
}

#[test]
fn qemu_img_converts_and_compares() {
    let served = Served::new(48 * MIB);
    let image = image(48 * MIB);
    let (from, to) = (served.file("from"), served.file("to.qcow2"));
    std::fs::write(&from, &image).unwrap();
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-n", "-f", "raw", "-O", "raw"]).arg(&from).arg(served.uri());
    run("qemu-utils", &mut convert);
    assert!(served.content() == image);
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-f", "raw", "-F", "raw"]).arg(&from).arg(served.uri());
    run("qemu-utils", &mut compare);
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(served.uri()).arg(&to);
    run("qemu-utils", &mut convert);
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-f", "qcow2", "-F", "raw"]).arg(&to).arg(served.uri());
    run("qemu-utils", &mut compare);
}

/// Runs a fio job with verification against the disk.
fn fio(served: &Served, more: &[&str]) {
    let mut fio = Command::new("fio");
    fio.current_dir(served.dir.path()).args(["--name=verify", "--ioengine=nbd"]);
    fio.arg(format!("--uri={}", served.uri()));
    fio.args(["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0"]);
    run("fio", fio.args(more));
}

#[test]
fn fio_verifies_what_it_wrote_at_depth() {
    let served = Served::new(64 * MIB);
    fio(&served, &["--rw=randwrite", "--bsrange=512-256k", "--iodepth=16", "--size=64m"]);
    fio(&served, &["--rw=write", "--bs=4k", "--iodepth=64", "--size=64m"]);
    fio(&served, &["--rw=randwrite", "--bs=4k", "--iodepth=1", "--size=8m", "--fsync=16"]);
    fio(&served, &["--rw=randwrite", "--bs=1m", "--iodepth=8", "--size=64m"]);
    assert!(served.disk.counts().flushes > 0);
}

#[test]
fn fio_verifies_on_several_connections_at_once() {
    let served = Served::new(64 * MIB);
    let parts = ["--numjobs=4", "--size=16m", "--offset_increment=16m", "--group_reporting"];
    let mut more = vec!["--rw=randwrite", "--bsrange=512-64k", "--iodepth=16"];
    more.extend(parts);
    fio(&served, &more);
}

/// Runs a script in nbdsh; `h` is a fresh handle, `uri` the export's address.
fn nbdsh(served: &Served, script: &str) {
    let mut whole = String::new();
    writeln!(whole, "import nbd, errno\nuri = {:?}", served.uri()).unwrap();
    whole.push_str(
        "def refused(what, number):\n\
        \x20   try:\n\
        \x20       what()\n\
        \x20   except nbd.Error as e:\n\
        \x20       assert e.errnum == number, (e.errnum, number, str(e))\n\
        \x20   else:\n\
        \x20       assert False, 'not refused'\n",
    );
    whole.push_str(script);
    let file = served.file("script.py");
    std::fs::write(&file, &whole).unwrap();
    let source = format!("exec(open({:?}).read())", file.display().to_string());
    run("python3-libnbd", Command::new("nbdsh").args(["-c", &source]));
}

#[test]
fn nbdsh_writes_with_fua_flushes_trims_and_zeroes() {
    let served = Served::new(8 * MIB);
    nbdsh(
        &served,
        "
h.add_meta_context('base:allocation')
h.connect_uri(uri)
assert h.get_size() == 8 << 20 and h.get_structured_replies_negotiated()
h.pwrite(b'a' * 4096, 0, nbd.CMD_FLAG_FUA)
h.pwrite(b'b' * (1 << 20), 1 << 20)
h.flush()
assert h.pread(4096, 0) == b'a' * 4096
chunks = []
whole = h.pread_structured(4096, 0, lambda data, offset, kind, error: chunks.append(offset), nbd.CMD_FLAG_DF)
assert whole == b'a' * 4096 and chunks == [0]
h.trim(512 << 10, 1 << 20, nbd.CMD_FLAG_FUA)
h.zero(256 << 10, (1 << 20) + (512 << 10), nbd.CMD_FLAG_NO_HOLE)
assert h.pread(768 << 10, 1 << 20) == b'\\0' * (768 << 10)
assert h.pread(512, (1 << 20) + (768 << 10)) == b'b' * 512
seen = []
h.block_status(8 << 20, 0, lambda name, offset, entries, error: seen.extend(entries))
flags = list(zip(seen[::2], seen[1::2]))
assert sum(length for length, _ in flags) == 8 << 20, flags
assert flags[0][1] == 0 and flags[-1][1] == 3, flags
one = []
h.block_status(8 << 20, 0, lambda name, offset, entries, error: one.extend(entries), nbd.CMD_FLAG_REQ_ONE)
assert one == seen[:2], one
h.shutdown()
",
    );
    let counts = served.disk.counts();
    assert_eq!((counts.fua, counts.flushes), (2, 1));
}

#[test]
fn nbdsh_gets_the_protocols_errors_and_the_stream_stays_in_step() {
    for structured in ["True", "False"] {
        let served = Served::new(8 * MIB);
        let script = format!(
            "
h.set_request_structured_replies({structured})
h.connect_uri(uri)
h.set_strict_mode(0)
end = h.get_size()
for turn in range(3):
    refused(lambda: h.pread(512, end), errno.EINVAL)
    refused(lambda: h.pwrite(b'x' * 4096, end - 512), errno.ENOSPC)
    refused(lambda: h.zero(4096, end - 512), errno.ENOSPC)
    refused(lambda: h.trim(4096, end - 512), errno.EINVAL)
    refused(lambda: h.pwrite(b'x' * 512, 1), errno.EINVAL)
    refused(lambda: h.pread(100, 0), errno.EINVAL)
    refused(lambda: h.cache(512, 0), errno.EINVAL)
    refused(lambda: h.pwrite(b'x' * 512, 0, 1 << 14), errno.EINVAL)
    refused(lambda: h.pwrite(b'x' * ((32 << 20) + 512), 0), errno.EINVAL)
    refused(lambda: h.zero(512, 0, nbd.CMD_FLAG_FAST_ZERO), errno.EINVAL)
    h.pwrite(bytes([turn]) * 512, 512)
    assert h.pread(512, 512) == bytes([turn]) * 512
h.shutdown()
"
        );
        nbdsh(&served, &script);
    }
}

#[test]
fn a_flush_on_one_connection_is_answered_after_writes_on_another() {
    let served = Served::new(8 * MIB);
    nbdsh(
        &served,
        "
handles = [nbd.NBD() for _ in range(4)]
for one in handles:
    one.connect_uri(uri)
    assert one.can_multi_conn()
for turn, one in enumerate(handles):
    one.pwrite(bytes([turn + 1]) * 4096, turn * 4096)
handles[0].flush()
for one in handles:
    for turn in range(4):
        assert one.pread(4096, turn * 4096) == bytes([turn + 1]) * 4096
for one in handles:
    one.shutdown()
",
    );
    assert_eq!(served.disk.counts().flushes, 1);
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let served = Served::new(MIB);
    let info = DeviceInfo { read_only: true, ..served.disk.info() };
    let device = Arc::new(MemoryDevice::with_info(info));
    served.exports.add(Export { name: "ro".into(), description: String::new(), device }).unwrap();
    nbdsh(
        &served,
        "
h.connect_uri(uri.replace('/disk?', '/ro?'))
assert h.is_read_only() and not h.can_trim() and not h.can_zero()
h.set_strict_mode(0)
refused(lambda: h.pwrite(b'x' * 512, 0), errno.EPERM)
refused(lambda: h.trim(512, 0), errno.EPERM)
refused(lambda: h.zero(512, 0), errno.EPERM)
assert h.pread(512, 0) == b'\\0' * 512
h.shutdown()
",
    );
}

/// The protocol project's test client; built from its source when it is not there yet.
fn tester() -> (PathBuf, PathBuf) {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = here.join("../.build/tools/nbd-tester");
    let built = dir.join("nbd-tester-client");
    if !built.exists() {
        let mut build = Command::new(here.join("tests/nbd_tester/build"));
        run("gcc, pkg-config, libglib2.0-dev (and a Debian mirror)", &mut build);
    }
    (built, dir)
}

#[test]
fn the_protocols_own_test_client_passes_in_every_mode() {
    let (tester, dir) = tester();
    let modes: [&[&str]; 9] = [
        &[],
        &["-w"],
        &["-w", "-f"],
        &["-o"],
        &["-h"],
        &["-l"],
        &["-i", "-t", "integrity-test.tr"],
        &["-i", "-w", "-f", "-t", "integrity-test.tr"],
        &["-i", "-t", "integrityhuge-test.tr"],
    ];
    for mode in modes {
        let served = Served::new(50 * MIB); // the integrity modes need an empty disk
        let mut client = Command::new("timeout");
        client.arg("120").arg(&tester).args(["-N", "disk", "-u"]).arg(served.server.path());
        run("coreutils", client.args(mode).current_dir(&dir));
    }
}

#[test]
fn a_stopped_server_leaves_no_socket_and_no_client() {
    let mut served = Served::new(MIB);
    nbdsh(&served, "h.connect_uri(uri)\nh.pread(512, 0)\nh.shutdown()\n");
    assert!(served.server.stop(Duration::from_secs(10)));
    assert_eq!(served.server.clients(), 0);
    assert!(!served.server.path().exists());
}
