//! `filterd.toml`: the settings of the source daemon. Unknown keys are refused.

use std::path::PathBuf;

use farshore_blkfilter::filterd::Config;
use farshore_extent::Problem;
use farshore_protocol::config::{ByteRate, ByteSize, CODE_VALUE, Millis, parse_toml};
use farshore_protocol::paths::Paths;
use serde::Deserialize;

/// The throttle is a brake, not a wall.
const MAX_THROTTLE_MS: u64 = 100;

/// Everything that can be set; what is left out keeps its default.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    /// Memory that holds the writes of a volume until they are safe at the target.
    pool: Option<ByteSize>,
    /// Limit of the copy loop.
    copy_rate: Option<ByteRate>,
    /// When a copy may start of what the change log had no room for.
    resync_window: Option<String>,
    /// So much never waits for the window.
    resync_at_once: Option<ByteSize>,
    /// How much of a volume may be marked as written lately; so much is compared after a crash.
    intent_max: Option<ByteSize>,
    /// Longest time for which a write waits while its pool is nearly full.
    throttle: Option<Millis>,
    /// Queues of a block device.
    queues: Option<u16>,
    /// At a stop: how long clients may take to finish.
    client_grace: Option<Millis>,
    /// At a stop: how long to wait until everything is durable at the target.
    release_grace: Option<Millis>,
    /// Lock the daemon's memory and be an I/O flusher.
    harden: Option<bool>,
    /// Users, by name or number, who may use the control socket besides the daemon's own.
    users: Vec<String>,
    /// Groups, by name or number, whose members may use the control socket.
    groups: Vec<String>,
}

/// The usual file.
pub fn path(paths: &Paths) -> PathBuf {
    paths.etc.join("filterd.toml")
}

/// The settings in `text`, the content of the file `name`.
///
/// # Errors
/// FS-11xx with line, column and what was probably meant.
pub fn parse(text: &str, name: &str, paths: &Paths) -> Result<Config, Problem> {
    let file: File = parse_toml(text, name)?;
    let mut config = Config::new(paths.state.join("filterd"), paths.run.clone());
    config.control_socket = paths.filterd_socket();
    config.marker = Some(paths.etc.join("protected"));
    file.pool.into_iter().for_each(|v| config.pool_bytes = v.bytes());
    file.copy_rate.into_iter().for_each(|v| config.copy_rate = v.bytes_per_second());
    file.resync_at_once.into_iter().for_each(|v| config.resync_at_once = v.bytes());
    if let Some(longest) = file.throttle {
        config.limits.throttle_ms = longest.millis();
        if longest.millis() > MAX_THROTTLE_MS {
            let what = format!("{name}: throttle cannot be used");
            let why = format!("{longest} is more than {MAX_THROTTLE_MS}ms for one write");
            let next = "correct the value and start again";
            return Err(Problem::harmless(CODE_VALUE, what, why, next));
        }
    }
    if let Some(text) = &file.resync_window {
        config.resync_window = text.parse().map_err(|why: String| {
            let what = format!("{name}: resync_window cannot be used");
            Problem::harmless(CODE_VALUE, what, why, "correct the value and start again")
        })?;
    }
    let regions = |v: ByteSize| v.bytes().div_ceil(config.region).max(1);
    file.intent_max.map(regions).into_iter().for_each(|v| config.max_regions = v);
    file.queues.into_iter().for_each(|v| config.queues = v);
    file.client_grace.into_iter().for_each(|v| config.client_grace = v.duration());
    file.release_grace.into_iter().for_each(|v| config.release_grace = v.duration());
    file.harden.into_iter().for_each(|v| config.harden = v);
    let unknown = |kind: &str, word: &str| {
        Problem::harmless(
            CODE_VALUE,
            format!("{name}: the configuration cannot be used"),
            format!("there is no {kind} `{word}` on this host"),
            "correct the value and start again",
        )
    };
    for word in &file.users {
        let named = || nix::unistd::User::from_name(word).ok().flatten().map(|u| u.uid.as_raw());
        let uid = word.parse().ok().or_else(named).ok_or_else(|| unknown("user", word))?;
        config.access.uids.push(uid);
    }
    for word in &file.groups {
        let named = || nix::unistd::Group::from_name(word).ok().flatten().map(|g| g.gid.as_raw());
        let gid = word.parse().ok().or_else(named).ok_or_else(|| unknown("group", word))?;
        config.access.gids.push(gid);
    }
    Ok(config)
}

/// Reads the usual file; without one, the defaults.
///
/// # Errors
/// FS-11xx, or FS-1902 when it may not be read.
pub fn load(paths: &Paths) -> Result<Config, Problem> {
    let file = path(paths);
    let name = file.display().to_string();
    match std::fs::read_to_string(&file) {
        Ok(text) => parse(&text, &name, paths),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => parse("", &name, paths),
        Err(e) => Err(crate::roles::cannot_read(&name, &e)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn settings_are_read_and_unknown_ones_refused() {
        let paths = Paths::under(Path::new("/x"));
        let text = "pool = \"64MiB\"\ncopy_rate = \"40MiB/s\"\nusers = [\"root\", \"1000\"]\n";
        let config = parse(text, "filterd.toml", &paths).unwrap();
        assert_eq!((config.pool_bytes, config.copy_rate), (64 << 20, 40 << 20));
        assert_eq!(config.access.uids, [0, 1000]);
        assert_eq!(config.max_regions, 1024);
        let few = parse("intent_max = \"50MiB\"", "filterd.toml", &paths).unwrap();
        assert_eq!(few.max_regions, 4);
        assert_eq!(config.control_socket, paths.filterd_socket());
        let wrong = parse("poool = \"64MiB\"", "filterd.toml", &paths).unwrap_err();
        assert!(wrong.next.contains("pool"), "{}", wrong.next);
        let text = "resync_window = \"mon-fri 20:00-06:00, sun\"\nresync_at_once = \"0\"\n";
        let config = parse(text, "filterd.toml", &paths).unwrap();
        assert_eq!(config.resync_window.to_string(), "mon-fri 20:00-06:00, sun");
        assert_eq!(config.resync_at_once, 0);
        let wrong = parse("resync_window = \"at night\"", "filterd.toml", &paths).unwrap_err();
        assert!(wrong.code.0 == CODE_VALUE && wrong.why.contains("18:00-08:00"), "{}", wrong.why);
        let config = parse("throttle = \"20ms\"", "filterd.toml", &paths).unwrap();
        assert_eq!(config.limits.throttle_ms, 20);
        let wrong = parse("throttle = \"1s\"", "filterd.toml", &paths).unwrap_err();
        assert_eq!(wrong.code.0, CODE_VALUE);
        let nobody = parse("users = [\"no-such-user-here\"]", "filterd.toml", &paths);
        assert_eq!(nobody.unwrap_err().code.0, CODE_VALUE);
    }
}
