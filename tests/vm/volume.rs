//! Protected volumes and opened points as block devices of the machine.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use farshore_protocol::admin::{PointInfo, ViewInfo};

use crate::guest;
use crate::harness::{Site, run, said, wait_for};

/// How the machine reaches a protected volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A ublk device of ours.
    Ublk,
    /// A device of the kernel's NBD client that filterd attaches.
    Nbd,
    /// A socket, and nbd-client as a person would use it.
    Socket,
}

impl Way {
    /// Before the daemons start again after a boot; on a host, modules-load.d does it.
    pub fn load_driver(self) {
        guest::load(if self == Self::Ublk { "ublk_drv" } else { "nbd" });
    }
}

/// A protected volume; its device goes away with it, the daemons must still run then.
pub struct Volume<'a> {
    site: &'a Site,
    pub name: String,
    /// The disk that is protected.
    pub backing: PathBuf,
    pub device: PathBuf,
    client: Option<Attached>,
}

impl<'a> Volume<'a> {
    /// Protects a disk of the group under its own name, points by `policy`.
    pub fn protect(site: &'a Site, way: Way, disk: &str, policy: &str) -> Self {
        Self::protect_path(site, way, disk, &guest::disk(disk), policy)
    }

    /// Protects a block device under a name of its own.
    pub fn protect_path(
        site: &'a Site,
        way: Way,
        name: &str,
        backing: &Path,
        policy: &str,
    ) -> Self {
        let path = backing.to_str().expect("UTF-8");
        let attach = match way {
            Way::Ublk => "ublk",
            Way::Nbd => "nbd",
            Way::Socket => "socket",
        };
        way.load_driver();
        let mut args = vec!["protect", path, "--name", name, "--policy", policy, "--yes"];
        args.extend(["--attach", attach]);
        site.cli(&args);
        Self::reach(site, way, name, backing)
    }

    /// One that is protected already.
    pub fn again(site: &'a Site, way: Way, disk: &str) -> Self {
        Self::reach(site, way, disk, &guest::disk(disk))
    }

    fn reach(site: &'a Site, way: Way, name: &str, backing: &Path) -> Self {
        let client =
            (way == Way::Socket).then(|| Attached::new(&site.nbd_uri(name), &block_size(backing)));
        let device = match &client {
            Some(client) => client.device.clone(),
            None => guest::wait_block_device(&Path::new("/dev/farshore").join(name)),
        };
        Self { site, name: name.to_owned(), backing: backing.to_owned(), device, client }
    }

    /// The device as programs take it.
    pub fn path(&self) -> &str {
        self.device.to_str().expect("UTF-8")
    }

    /// Waits for the first point after which nothing is still to be copied.
    pub fn wait_protected(&self) {
        self.site.wait_protected(&self.name);
    }

    /// Cuts a point as soon as one can be cut; it must be equal to the disk, which nobody writes to.
    pub fn assert_point_equals_disk(&self, tag: &str) -> PointInfo {
        self.site.assert_point_equals(&self.name, tag, &self.backing)
    }

    /// Detaches; the disk keeps its content.
    pub fn unprotect(mut self) {
        self.client = None;
        self.site.cli(&["unprotect", &self.name, "--yes"]);
    }
}

/// An NBD export as a block device of the machine, by nbd-client; gone when dropped.
pub struct Attached {
    pub device: PathBuf,
}

impl Attached {
    /// nbd-client does not ask the server for the block size: it must be told.
    pub fn new(uri: &str, block_size: &str) -> Self {
        guest::load("nbd");
        let (export, socket) = uri
            .strip_prefix("nbd+unix:///")
            .and_then(|rest| rest.split_once("?socket="))
            .expect("an address of ours");
        let free = |n: &u32| !Path::new(&format!("/sys/block/nbd{n}/pid")).exists();
        let number = (0..16).find(free).expect("a free device");
        let device = PathBuf::from(format!("/dev/nbd{number}"));
        let path = device.to_str().expect("UTF-8");
        run("nbd-client", &["-unix", socket, path, "-N", export, "-b", block_size]);
        let size = format!("/sys/block/nbd{number}/size");
        wait_for("the size of the device", Duration::from_secs(30), || {
            std::fs::read_to_string(&size).ok().filter(|s| s.trim() != "0")
        });
        // The kernel looks for partitions when the device is opened.
        std::fs::File::open(&device).expect("open");
        Self { device: guest::block_device(&device) }
    }

    /// A point opened at the target.
    pub fn view(view: &ViewInfo) -> Self {
        Self::new(&crate::harness::view_uri(view), "512")
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // A case that has failed may have left it mounted; its machine is thrown away.
        let out = Command::new("nbd-client").arg("-d").arg(&self.device).output();
        if !out.as_ref().is_ok_and(|o| o.status.success()) {
            eprintln!("nbd-client -d {}: {:?}", self.device.display(), out.map(|o| said(&o)));
        }
    }
}

fn block_size(device: &Path) -> String {
    queue_limit(device, "logical_block_size")
}

/// What the kernel says of a device: a file of `/sys/block/NAME/queue`.
pub fn queue_limit(device: &Path, what: &str) -> String {
    let device = std::fs::canonicalize(device).expect("device");
    let name = device.file_name().and_then(|n| n.to_str()).expect("name");
    let value = std::fs::read_to_string(format!("/sys/block/{name}/queue/{what}"));
    value.expect("sysfs").trim().to_owned()
}

/// fio on a device with verification of all it wrote; more arguments as fio takes them.
pub fn fio(device: &Path, extra: &[&str]) {
    let args = fio_arguments(device, extra);
    run("fio", &args.iter().map(String::as_str).collect::<Vec<_>>());
}

/// What `fio` would call fio with.
pub fn fio_arguments(device: &Path, extra: &[&str]) -> Vec<String> {
    let device = guest::block_device(device);
    let mut args: Vec<String> = [
        "--name=load",
        "--ioengine=libaio",
        "--direct=1",
        "--thread=1",
        "--group_reporting=1",
        "--verify=crc32c",
        "--verify_state_save=0",
        "--verify_fatal=1",
        "--do_verify=1",
        "--minimal",
    ]
    .map(str::to_owned)
    .to_vec();
    args.push(format!("--filename={}", device.display()));
    args.extend(extra.iter().map(|a| (*a).to_owned()));
    args
}
