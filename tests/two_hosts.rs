//! The steps of the README's example on two hosts: two network namespaces that this test makes, joined
//! by a virtual cable that is also pulled. tests/vm types the example itself, on two machines.

mod harness;

use std::time::Duration;

use harness::{Site, assert_same_bytes, run, said, wait_for};

/// Two namespaces joined by a cable; gone when dropped.
struct Hosts {
    tag: u32,
}

impl Hosts {
    fn new() -> Self {
        let hosts = Self { tag: std::process::id() };
        let (source, target) = (hosts.source(), hosts.target());
        run("ip", &["netns", "add", &source]);
        run("ip", &["netns", "add", &target]);
        let (a, b) = (format!("fsa{}", hosts.tag), format!("fsb{}", hosts.tag));
        run(
            "ip",
            &[
                "link", "add", &a, "netns", &source, "type", "veth", "peer", "name", &b, "netns",
                &target,
            ],
        );
        for (ns, link, address) in [(&source, &a, "192.0.2.1/24"), (&target, &b, "192.0.2.10/24")] {
            run("ip", &["-n", ns, "address", "add", address, "dev", link]);
            run("ip", &["-n", ns, "link", "set", link, "up"]);
            run("ip", &["-n", ns, "link", "set", "lo", "up"]);
        }
        hosts
    }

    fn source(&self) -> String {
        format!("fs-source-{}", self.tag)
    }

    fn target(&self) -> String {
        format!("fs-target-{}", self.tag)
    }

    fn cable(&self, state: &str) {
        run("ip", &["-n", &self.source(), "link", "set", &format!("fsa{}", self.tag), state]);
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for ns in [self.source(), self.target()] {
            std::process::Command::new("ip").args(["netns", "del", &ns]).status().ok();
        }
    }
}

#[test]
fn the_two_host_example_of_the_readme_works_and_survives_a_pulled_cable() {
    let hosts = Hosts::new();
    let backup = Site::in_namespace(&hosts.target());
    let db1 = Site::in_namespace(&hosts.source());

    // backup#
    backup.cli(&["target", "init", "--listen", "0.0.0.0:9443", "--name", "192.0.2.10"]);
    let _target = backup.start_target();
    let token = backup.cli(&["token", "create", "--for", "db1", "--address", "192.0.2.10:9443"]);
    let token =
        token.split_whitespace().find(|w| w.starts_with("fs1.")).expect("a token").to_owned();

    // db1#
    db1.cli(&["enroll", &token]);
    let used = db1.try_cli(&["enroll", &token]);
    assert!(!used.status.success(), "a token must work once only:\n{}", said(&used));
    let _filterd = db1.start_filterd();
    let _agent = db1.start_agent();
    let image = db1.root().join("pgdata.img");
    run("truncate", &["-s", "64M", image.to_str().expect("path")]);
    let path = image.to_str().expect("path");
    db1.cli(&["protect", path, "--name", "pgdata", "--policy", "1s", "--dry-run"]);
    db1.protect_image("pgdata", &image, "1s");
    let uri = db1.nbd_uri("pgdata");
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'one' + bytes(4093), 0)\nh.flush()"]);
    backup.wait_protected("pgdata");

    let status = db1.cli(&["status"]);
    assert!(status.contains("pgdata"), "{status}");
    let status = backup.cli(&["status"]);
    assert!(status.contains("pgdata") && status.contains("protected"), "{status}");
    backup.tag("pgdata", "one");
    let list = backup.cli(&["point", "list", "pgdata"]);
    assert!(list.contains("one"), "{list}");

    // The cable is pulled: the guest goes on, nothing is lost, and it catches up by itself.
    hosts.cable("down");
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'two' + bytes(4093), 0)\nh.flush()"]);
    let before = backup.replica("pgdata").expect("replica").journaled;
    wait_for("a growing RPO", Duration::from_secs(20), || {
        backup.replica("pgdata").filter(|r| r.rpo_ms.is_some_and(|ms| ms > 3000))
    });
    hosts.cable("up");
    wait_for("replication after the cable is back", Duration::from_secs(90), || {
        backup.replica("pgdata").filter(|r| r.connected && r.journaled > before)
    });
    backup.tag("pgdata", "two");

    let opened = backup.cli(&["failover", "test", "pgdata", "--point", "tag:one"]);
    assert!(opened.contains("nbd+unix://"), "{opened}");
    let address = |text: &str| {
        let start = text.find("nbd+unix://").expect("an address");
        text[start..]
            .split_whitespace()
            .next()
            .expect("a word")
            .trim_matches(['\'', '"'])
            .to_owned()
    };
    run("nbdsh", &["-u", &address(&opened), "-c", "assert h.pread(4096, 0)[:3] == b'one'"]);
    let opened = backup.cli(&["failover", "test", "pgdata", "--point", "tag:two"]);
    let copy = backup.root().join("two.img");
    run("nbdcopy", &[&address(&opened), copy.to_str().expect("path")]);
    assert_same_bytes(&image, &copy, "source and point differ");
    backup.cli(&["failover", "cleanup", "pgdata"]);
    let gone =
        std::process::Command::new("nbdinfo").arg(address(&opened)).output().expect("nbdinfo");
    assert!(!gone.status.success(), "the view is still there after cleanup");
}
