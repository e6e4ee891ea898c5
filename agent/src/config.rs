//! `agent.toml`: the settings of the agent. Unknown keys are refused.

use std::path::{Path, PathBuf};

use farshore_extent::Problem;
use farshore_protocol::config::{ByteSize, parse_toml};
use farshore_protocol::paths::Paths;
use serde::{Deserialize, Serialize};

use crate::limits::{DEFAULT_WINDOW_BYTES, MIN_WINDOW_BYTES, SPOOL_PERCENT};
use crate::problem;
use crate::session::RetryPreset;

/// What enrolment writes when there is no `agent.toml`: every key with its default, commented out.
pub const DEFAULT_FILE: &str = "\
# Settings of the Farshore agent. Every key has a default; unknown keys are refused.

# Address of the target, host:port. Default: the address in the token this host was enrolled with.
#target = \"backup:9443\"

# HTTP proxy that supports CONNECT, host:port.
#proxy = \"proxy:3128\"

# Compression of changes: 1 (fast) to 3, or 0 for none.
#zstd_level = 1

# Memory for changes that were sent and not yet acknowledged, for all volumes together.
#window = \"64MiB\"

# After a failure: \"fast\" (1 s, doubled up to 30 s) or \"literal\" (1, 2, 4, 8, 10, then every 30
# minutes). Never after an authentication error or a refusal: correct the cause, then reload (SIGHUP).
#retry = \"fast\"

# While the target is away and the capture pool is half full, changes are kept on this host's disk:
# in this folder (default: spool in the agent's state directory; never on a protected volume),
#spool_dir = \"/var/lib/farshore/agent/spool\"
# up to this share of that disk in percent, for all volumes together (0: no spool),
#spool_percent = 50
# and up to so many bytes. Default: no limit but the share.
#spool_max = \"100GiB\"

# Control socket of filterd. Default: filterd.sock in the run directory.
#filterd_socket = \"/run/farshore/filterd.sock\"
";

/// Everything that can be set. Every field has a default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address of the target, `host:port`; none: the one in the token used at enrolment.
    pub target: Option<String>,
    /// HTTP proxy that supports CONNECT, `host:port`.
    pub proxy: Option<String>,
    /// Level of zstd, 1 to 3; 0 is none.
    pub zstd_level: u8,
    /// Bytes of batches built and not acknowledged, over all volumes.
    pub window: ByteSize,
    /// How patiently failures are tried again.
    pub retry: RetryPreset,
    /// Folder of the spool; none: in the state directory.
    pub spool_dir: Option<PathBuf>,
    /// Share of its disk that the spool may take, in percent; 0 is no spool.
    pub spool_percent: u8,
    /// Bytes that the spools of all volumes may take together; none: only the share.
    pub spool_max: Option<ByteSize>,
    /// Control socket of `filterd`; none: in the run directory.
    pub filterd_socket: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            target: None,
            proxy: None,
            zstd_level: 1,
            window: ByteSize::from_bytes(DEFAULT_WINDOW_BYTES),
            retry: RetryPreset::default(),
            spool_dir: None,
            spool_percent: SPOOL_PERCENT,
            spool_max: None,
            filterd_socket: None,
        }
    }
}

impl Config {
    /// The file of this configuration.
    #[must_use]
    pub fn file(paths: &Paths) -> PathBuf {
        paths.etc.join("agent.toml")
    }

    /// Reads `agent.toml`; without one everything has its default.
    ///
    /// # Errors
    /// FS-1101 to FS-1103 when it cannot be understood, FS-5205 when it cannot be read, FS-5207
    /// for values out of range.
    pub fn load(paths: &Paths) -> Result<Self, Problem> {
        let file = Self::file(paths);
        match std::fs::read_to_string(&file) {
            Ok(text) => Self::parse(&text, &file.display().to_string()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(problem::file("read", &file, &e)),
        }
    }

    /// Understands the text of the file `name`.
    ///
    /// # Errors
    /// As for [`Self::load`].
    pub fn parse(text: &str, name: &str) -> Result<Self, Problem> {
        let config: Self = parse_toml(text, name)?;
        if config.zstd_level > 3 {
            return Err(problem::setting(name, "zstd_level must be 0, 1, 2 or 3"));
        }
        if config.spool_percent > 90 {
            return Err(problem::setting(name, "spool_percent must be 0 to 90"));
        }
        if config.window.bytes() < MIN_WINDOW_BYTES {
            let least = ByteSize::from_bytes(MIN_WINDOW_BYTES);
            return Err(problem::setting(name, format!("window must be at least {least}")));
        }
        for (key, value) in [("target", &config.target), ("proxy", &config.proxy)] {
            if value.as_deref().is_some_and(|v| split_address(v).is_none()) {
                return Err(problem::setting(name, format!("{key} must be HOST:PORT")));
            }
        }
        Ok(config)
    }

    /// One line for each setting that is another one in `new`.
    #[must_use]
    pub fn changes(&self, new: &Self) -> Vec<String> {
        let lines = |config: &Self| -> Vec<String> {
            let text = toml::to_string(config).unwrap_or_default();
            text.lines().map(str::to_owned).collect()
        };
        let (old, new) = (lines(self), lines(new));
        let gone = old.iter().filter(|l| !new.contains(l)).map(|l| format!("was: {l}"));
        let came = new.iter().filter(|l| !old.contains(l)).map(|l| format!("now: {l}"));
        gone.chain(came).collect()
    }

    /// Level for the batch builder.
    #[must_use]
    pub fn zstd(&self) -> Option<i32> {
        (self.zstd_level > 0).then(|| i32::from(self.zstd_level))
    }

    /// Folder of the spools of all volumes.
    #[must_use]
    pub fn spool_dir(&self, paths: &Paths) -> PathBuf {
        self.spool_dir.clone().unwrap_or_else(|| paths.state.join("agent").join("spool"))
    }

    /// Control socket of `filterd`.
    #[must_use]
    pub fn filterd_socket(&self, paths: &Paths) -> PathBuf {
        self.filterd_socket.as_deref().map_or_else(|| paths.filterd_socket(), Path::to_path_buf)
    }
}

/// Host and port of `host:port`, `10.0.0.1:9443` or `[::1]:9443`.
#[must_use]
pub fn split_address(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    let plain = bare.len() == host.len() && host.contains(':');
    let port = port.parse().ok().filter(|p| *p != 0)?;
    (!bare.is_empty() && !plain).then_some((bare, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_file_says_what_the_defaults_are() {
        assert_eq!(Config::parse(DEFAULT_FILE, "x").unwrap(), Config::default());
        let set: String = DEFAULT_FILE
            .lines()
            .filter_map(|l| {
                l.strip_prefix('#').filter(|l| l.contains(" = ") && !l.starts_with(' '))
            })
            .map(|l| format!("{l}\n"))
            .collect();
        let given = Config::parse(&set, "x").unwrap();
        assert_eq!(given.target.as_deref(), Some("backup:9443"));
        let defaults = Config {
            target: given.target.clone(),
            proxy: given.proxy.clone(),
            spool_dir: given.spool_dir.clone(),
            spool_max: given.spool_max,
            filterd_socket: given.filterd_socket.clone(),
            ..Config::default()
        };
        assert_eq!(given, defaults);
    }

    #[test]
    fn unknown_keys_and_impossible_values_are_refused() {
        assert_eq!(Config::parse("windw = \"64MiB\"", "x").unwrap_err().code.0, 1102);
        for bad in [
            "zstd_level = 4",
            "spool_percent = 91",
            "window = \"1MiB\"",
            "target = \"backup\"",
            "proxy = \":1\"",
        ] {
            assert_eq!(Config::parse(bad, "x").unwrap_err().code.0, 5207, "{bad}");
        }
    }

    #[test]
    fn a_reload_names_every_setting_that_differs() {
        let new = Config::parse("retry = \"literal\"\nspool_max = \"1GiB\"", "x").unwrap();
        let changes = Config::default().changes(&new);
        assert!(changes.contains(&"was: retry = \"fast\"".to_owned()), "{changes:?}");
        assert!(changes.contains(&"now: retry = \"literal\"".to_owned()), "{changes:?}");
        assert!(changes.iter().any(|c| c.starts_with("now: spool_max")), "{changes:?}");
        assert_eq!(new.changes(&new), Vec::<String>::new());
    }

    #[test]
    fn addresses_are_split_at_the_port() {
        assert_eq!(split_address("backup:9443"), Some(("backup", 9443)));
        assert_eq!(split_address("[::1]:9443"), Some(("::1", 9443)));
        for bad in ["backup", "::1:9443", ":9443", "backup:0", "backup:99999", "[]:1"] {
            assert_eq!(split_address(bad), None, "{bad}");
        }
    }
}
