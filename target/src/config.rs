//! `target.toml`: the settings of the target daemon. Unknown keys are refused.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use farshore_extent::Problem;
use farshore_protocol::config::{ByteRate, ByteSize, Millis, parse_toml};
use farshore_protocol::paths::Paths;
use serde::{Deserialize, Serialize};

use crate::problem;
use crate::retention::policy::{self, Policy};

/// Port when none is given.
pub const DEFAULT_PORT: u16 = 9443;

/// Everything that can be set. Every field has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where agents connect: `ADDRESS:PORT`, or `:PORT` for every address.
    pub listen: String,
    /// Directory of CA, catalogue and replicas; none: `target` below the state directory.
    pub data: Option<PathBuf>,
    /// Further names or addresses under which sources reach this machine.
    pub names: Vec<String>,
    /// Interval of recovery points of new volumes; 0 cuts none.
    pub point_interval: Millis,
    /// Which points are kept: the name of a policy, its tiers, or one time.
    pub retention: String,
    /// A volume whose newest point is older than this is shown as lagging.
    pub rpo_target: Millis,
    /// How often everything that is kept is read and verified.
    pub scrub_every: Millis,
    /// How fast, for each volume, while it has nothing else to do; 0 is never.
    pub scrub_rate: ByteRate,
    /// How fast a view is copied when it is flattened; 0 is no limit.
    pub flatten_rate: ByteRate,
    /// Limits of everything a peer can make grow.
    pub limits: Limits,
    /// Retention policies by name, besides the built-in ones.
    pub policies: BTreeMap<String, String>,
}

/// Limits. Memory of the daemon is at most `connections` x (one frame, 2.3 MiB, + 1 MiB of
/// messages) + volumes x `queue_batches` x 2.3 MiB + the stores.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Connections at a time, enrolling ones included.
    pub connections: usize,
    /// From the TCP accept to the first message.
    pub handshake_timeout: Millis,
    /// A connection on which nothing arrives for so long is closed.
    pub idle_timeout: Millis,
    /// Volumes of one host.
    pub volumes_per_host: usize,
    /// Batches waiting for the disk, for one volume; when full, the source is slowed down.
    pub queue_batches: usize,
    /// Views open at a time.
    pub views: usize,
    /// How long a view whose block device was taken away stays while nobody uses its export.
    pub view_without_device: Millis,
    /// Free space on the target's disk that writes to views leave to the journals; at most a tenth
    /// of the file system.
    pub view_reserve: ByteSize,
    /// An alarm tells that a view keeps more journal than this from expiring.
    pub view_hold: ByteSize,
    /// An alarm tells that a view has kept journal from expiring for longer than this.
    pub view_hold_time: Millis,
    /// Longest wait for a tagged point to become durable.
    pub tag_timeout: Millis,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: format!(":{DEFAULT_PORT}"),
            data: None,
            names: Vec::new(),
            point_interval: Millis::from_secs(5),
            retention: policy::STANDARD.to_owned(),
            rpo_target: Millis::from_secs(30),
            scrub_every: "7d".parse().unwrap_or_default(),
            scrub_rate: "32MiB/s".parse().unwrap_or_default(),
            flatten_rate: "128MiB/s".parse().unwrap_or_default(),
            limits: Limits::default(),
            policies: BTreeMap::new(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            handshake_timeout: Millis::from_secs(10),
            idle_timeout: Millis::from_secs(60),
            volumes_per_host: 64,
            queue_batches: 16,
            views: 32,
            view_without_device: Millis::from_secs(3600),
            view_reserve: ByteSize::from_bytes(4 << 30),
            view_hold: ByteSize::from_bytes(64 << 30),
            view_hold_time: Millis::from_secs(24 * 3600),
            tag_timeout: Millis::from_secs(30),
        }
    }
}

impl Config {
    /// The file of this configuration.
    #[must_use]
    pub fn file(paths: &Paths) -> PathBuf {
        paths.etc.join("target.toml")
    }

    /// Reads `target.toml`.
    ///
    /// # Errors
    /// FS-11xx when it cannot be understood, FS-6501 when there is none.
    pub fn load(paths: &Paths) -> Result<Self, Problem> {
        let file = Self::file(paths);
        match std::fs::read_to_string(&file) {
            Ok(text) => Self::parse(&text, &file.display().to_string()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                Err(problem::not_initialised(&file))
            }
            Err(e) => Err(problem::file("read", &file, &e)),
        }
    }

    /// Understands the text of the file `name`.
    ///
    /// # Errors
    /// FS-1101 to FS-1103 with line, column and what was probably meant.
    pub fn parse(text: &str, name: &str) -> Result<Self, Problem> {
        let config: Self = parse_toml(text, name)?;
        config.check().map_err(|why| {
            Problem::harmless(
                farshore_protocol::config::CODE_VALUE,
                format!("{name}: the configuration cannot be used"),
                why,
                "correct the value and start again",
            )
        })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        self.listen_addresses()?;
        let at_least = |name: &str, value: u64, least: u64| {
            if value >= least { Ok(()) } else { Err(format!("{name} must be at least {least}")) }
        };
        let size = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        at_least("limits.connections", size(self.limits.connections), 2)?;
        at_least("limits.volumes_per_host", size(self.limits.volumes_per_host), 1)?;
        at_least("limits.queue_batches", size(self.limits.queue_batches), 1)?;
        at_least("limits.handshake_timeout (ms)", self.limits.handshake_timeout.millis(), 100)?;
        at_least("limits.idle_timeout (ms)", self.limits.idle_timeout.millis(), 1_000)?;
        at_least("scrub_every (ms)", self.scrub_every.millis(), 60_000)?;
        let interval = self.point_interval.millis();
        if interval != 0 {
            at_least("point_interval (ms)", interval, 100)?;
        }
        for (name, text) in &self.policies {
            policy::check_name(name)?;
            text.parse::<Policy>().map_err(|why| format!("policies.{name}: {why}"))?;
        }
        self.policy(&self.retention).map_err(|why| format!("retention: {why}"))?;
        Ok(())
    }

    /// The retention policy that `text` names or writes out.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub fn policy(&self, text: &str) -> Result<Policy, String> {
        policy::resolve(text, &self.policies)
    }

    /// The addresses to listen on, the first that works is taken.
    ///
    /// # Errors
    /// A sentence when `listen` is not `ADDRESS:PORT` or `:PORT`.
    pub fn listen_addresses(&self) -> Result<Vec<SocketAddr>, String> {
        let bad = || {
            format!(
                "listen = \"{}\" is not `ADDRESS:PORT` with a numeric address, nor `:PORT`",
                self.listen
            )
        };
        if let Some(port) = self.listen.strip_prefix(':') {
            let port: u16 = port.parse().map_err(|_| bad())?;
            return Ok(vec![
                (Ipv6Addr::UNSPECIFIED, port).into(),
                (Ipv4Addr::UNSPECIFIED, port).into(),
            ]);
        }
        self.listen.parse().map(|address| vec![address]).map_err(|_| bad())
    }

    /// The directory of CA, catalogue and replicas.
    #[must_use]
    pub fn data_dir(&self, paths: &Paths) -> DataDir {
        DataDir(self.data.clone().unwrap_or_else(|| paths.state.join("target")))
    }
}

/// The data directory and the places in it.
///
/// `ca/` keys and certificates · `catalogue.sqlite` · `volumes/UUID/` one replica each ·
/// `seeds/HOST/NAME.img` images for replicas to come ·
/// `views/UUID/` scratch of one open view each · `lock` held by the running daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataDir(PathBuf);

impl DataDir {
    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Keys and certificates.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.0.join("ca")
    }

    /// The catalogue.
    #[must_use]
    pub fn catalogue(&self) -> PathBuf {
        self.0.join("catalogue.sqlite")
    }

    /// One directory a replica.
    #[must_use]
    pub fn volumes(&self) -> PathBuf {
        self.0.join("volumes")
    }

    /// Images that wait for their volumes.
    #[must_use]
    pub fn seeds(&self) -> PathBuf {
        self.0.join("seeds")
    }

    /// One directory with its scratch a view that is open.
    #[must_use]
    pub fn views(&self) -> PathBuf {
        self.0.join("views")
    }

    /// Locked while a daemon runs.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }
}

/// Most bytes a view may take when neither the request nor the volume says less.
pub const LARGEST_SCRATCH: ByteSize = ByteSize::from_bytes(i64::MAX as u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_by_init_reads_back() {
        let config = Config { data: Some("/srv/x".into()), ..Config::default() };
        let text = toml::to_string(&config).unwrap();
        assert_eq!(Config::parse(&text, "target.toml").unwrap(), config);
        assert_eq!(Config::parse("", "target.toml").unwrap(), Config::default());
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        let p = Config::parse("[limits]\nqueue_batchs = 3\n", "target.toml").unwrap_err();
        assert_eq!(p.what, "target.toml, line 2, column 1: unknown key `queue_batchs`");
        assert_eq!(p.next, "did you mean `queue_batches`?");
        for bad in [
            "listen = \"9443\"",
            "listen = \"host:1\"",
            "limits = { queue_batches = 0 }",
            "point_interval = \"5ms\"",
            "retention = \"24\"",
            "retention = \"long\"",
            "[policies]\nlong = \"all:2h,1m:1h\"",
            "[policies]\nstandard = \"24h\"",
        ] {
            assert!(Config::parse(bad, "target.toml").is_err(), "{bad}");
        }
    }

    #[test]
    fn retention_is_a_time_a_policy_or_the_name_of_one() {
        let policy = |text: &str| {
            let config = Config::parse(text, "target.toml").unwrap();
            config.policy(&config.retention).unwrap().to_string()
        };
        assert_eq!(policy("retention = \"24h\""), "all:24h");
        assert_eq!(policy("retention = \"all:2h,1h:7d\""), "all:2h,1h:7d");
        let own = "retention = \"long\"\n[policies]\nlong = \"all:2h\"";
        assert_eq!(policy(own), "all:2h");
        assert!(policy("").starts_with("all:1h,1m:24h,1h:7d,1d:30d"));
    }

    #[test]
    fn a_bare_port_means_every_address() {
        let config = Config { listen: ":9443".into(), ..Config::default() };
        let all = config.listen_addresses().unwrap();
        assert_eq!(all.len(), 2);
        assert!(all.iter().all(|a| a.port() == 9443 && a.ip().is_unspecified()));
    }
}
