//! Peers that lie: arbitrary bytes and broken sessions against the real daemons. Nobody else is
//! disturbed and nothing grows.

mod harness;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use harness::{Site, run};

/// Repeatable noise.
struct Noise(u64);

impl Noise {
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut next = || {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0.to_le_bytes()
        };
        (0..len.div_ceil(8)).flat_map(|_| next()).take(len).collect()
    }
}

/// Writes what it can and reads until the peer closes or goes quiet.
fn throw(mut stream: impl Read + Write, bytes: &[u8]) {
    // A peer that hangs up in the middle of our rubbish is right.
    stream.write_all(bytes).ok();
    let mut sink = [0; 4096];
    while matches!(stream.read(&mut sink), Ok(n) if n > 0) {}
}

fn resident_kib(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("alive");
    let line = text.lines().find(|l| l.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

#[test]
fn rubbish_on_every_socket_disturbs_nobody() {
    let site = Site::new();
    let mut daemons = site.start_all();
    let (_, uri) = site.protect("disk", 16 << 20, "1s");
    site.wait_protected("disk");
    let before = [daemons.target.pid(), daemons.filterd.pid()].map(resident_kib);

    let mut noise = Noise(0x5eed);
    let quiet = Some(Duration::from_millis(100));
    let nbd = site.paths.run.join("nbd/disk.sock");
    for round in 0..40 {
        let mut bytes = noise.bytes(64 + round * 37);
        for socket in [&nbd, &site.paths.filterd_socket(), &site.paths.target_socket()] {
            let stream = UnixStream::connect(socket).expect("the daemon still listens");
            stream.set_read_timeout(quiet).expect("timeout");
            throw(stream, &bytes);
        }
        // A plausible start: NBD client flags, then an option with a monstrous length.
        bytes.splice(
            ..0,
            [0, 0, 0, 3]
                .into_iter()
                .chain(*b"IHAVEOPT")
                .chain([0, 0, 0, 7, 0xff, 0xff, 0xff, 0xff]),
        );
        let stream = UnixStream::connect(&nbd).expect("the front end still listens");
        stream.set_read_timeout(quiet).expect("timeout");
        throw(stream, &bytes);
        // Rubbish instead of TLS.
        let stream =
            TcpStream::connect(("127.0.0.1", site.port)).expect("the target still listens");
        stream.set_read_timeout(quiet).expect("timeout");
        throw(stream, &bytes);
    }

    assert!(
        daemons.target.is_alive() && daemons.filterd.is_alive() && daemons.agent.is_alive(),
        "{}",
        site.logs()
    );
    let after = [daemons.target.pid(), daemons.filterd.pid()].map(resident_kib);
    for (now, then) in after.iter().zip(before) {
        assert!(*now < then + 64 * 1024, "memory grew from {then} to {now} KiB");
    }
    // Everybody else still works.
    run(
        "nbdsh",
        &["-u", &uri, "-c", "h.pwrite(b'k' * 4096, 0)\nassert h.pread(4096, 0) == b'k' * 4096"],
    );
    site.tag("disk", "still-fine");
}

#[test]
fn an_agent_with_a_foreign_certificate_gets_nowhere() {
    let site = Site::new();
    let _daemons = site.start_all();
    // Another target's enrolment, pointed at this one.
    let other = Site::new();
    let address = format!("127.0.0.1:{}", other.port);
    other.cli(&["target", "init", "--listen", &address, "--name", "127.0.0.1"]);
    let target = other.start_target();
    let token = other.cli(&["token", "create", "--for", "stranger", "--address", &address]);
    let token =
        token.split_whitespace().find(|w| w.starts_with("fs1.")).expect("a token").to_owned();
    other.cli(&["enroll", &token]);
    target.kill();
    let config = other.paths.etc.join("agent.toml");
    let text = std::fs::read_to_string(&config).expect("agent.toml was written by enroll");
    let text = text.replace(&other.port.to_string(), &site.port.to_string());
    std::fs::write(&config, text).expect("agent.toml");
    let _filterd = other.start_filterd();
    let _agent = other.start_agent();
    let status = harness::wait_for("a reported problem", Duration::from_secs(20), || {
        other.agent_status().filter(|s| s.problem.is_some())
    });
    assert!(!status.connected, "{status:?}");
    let hosts = site.cli(&["host", "list"]);
    assert!(!hosts.contains("stranger"), "{hosts}");
}
