//! `freezer.toml`: what is made quiet for application-consistent points. Unknown keys are refused, and
//! so is a file that others than root can write.

use std::path::{Path, PathBuf};
use std::time::Duration;

use farshore_blkfilter::control::server::Access;
use farshore_blkfilter::freezer::{Application, Config, RunAs, trusted_file};
use farshore_extent::{Problem, VolumeName};
use farshore_protocol::config::{CODE_VALUE, Millis, parse_toml};
use farshore_protocol::paths::Paths;
use nix::unistd::{Group, User, geteuid};
use serde::Deserialize;

/// Longest time that a hook may take, unless the file says otherwise.
const HOOK_LIMIT: Millis = Millis::from_secs(30);
/// Longest time that anything stays frozen, unless the file says otherwise.
const QUIET_LIMIT: Millis = Millis::from_secs(10);

/// Everything that can be set.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    /// Users, by name or number, who may ask for quiet besides root: that of the agent.
    users: Vec<String>,
    /// Groups, by name or number, whose members may.
    groups: Vec<String>,
    /// What is made quiet.
    application: Vec<App>,
}

/// One `[[application]]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct App {
    /// Its name.
    name: String,
    /// Volumes whose points it belongs to.
    volumes: Vec<String>,
    /// Time between points; 0: only by hand.
    #[serde(default)]
    every: Millis,
    /// Program and arguments before the freeze.
    #[serde(default)]
    pre: Vec<String>,
    /// Program and arguments after the thaw.
    #[serde(default)]
    post: Vec<String>,
    /// User, by name, as whom hooks run.
    user: Option<String>,
    /// Longest time of a hook.
    #[serde(default = "hook_limit")]
    hook_limit: Millis,
    /// Mount points.
    #[serde(default)]
    freeze: Vec<PathBuf>,
    /// Longest time from the last pre hook to the thaw.
    #[serde(default = "quiet_limit")]
    quiet_limit: Millis,
}

const fn hook_limit() -> Millis {
    HOOK_LIMIT
}

const fn quiet_limit() -> Millis {
    QUIET_LIMIT
}

/// The usual file.
pub fn path(paths: &Paths) -> PathBuf {
    paths.etc.join("freezer.toml")
}

/// The settings in `text`, the content of the file `name`.
///
/// # Errors
/// FS-11xx with line, column and what was probably meant; FS-3409.
pub fn parse(text: &str, name: &str) -> Result<Config, Problem> {
    let file: File = parse_toml(text, name)?;
    let bad = |why: String| {
        let what = format!("{name}: the configuration cannot be used");
        Problem::harmless(CODE_VALUE, what, why, "correct the value; it is read again by itself")
    };
    let mut access = Access::default();
    for word in &file.users {
        let named = || User::from_name(word).ok().flatten().map(|u| u.uid.as_raw());
        let uid = word.parse().ok().or_else(named);
        access.uids.push(uid.ok_or_else(|| bad(format!("there is no user `{word}`")))?);
    }
    for word in &file.groups {
        let named = || Group::from_name(word).ok().flatten().map(|g| g.gid.as_raw());
        let gid = word.parse().ok().or_else(named);
        access.gids.push(gid.ok_or_else(|| bad(format!("there is no group `{word}`")))?);
    }
    let applications = file.application.iter().map(|app| application(app).map_err(bad));
    let config = Config { applications: applications.collect::<Result<_, _>>()?, access };
    config.check(name)?;
    Ok(config)
}

fn application(app: &App) -> Result<Application, String> {
    let name = |text: &String| VolumeName::new(text).map_err(|e| format!("`{text}`: {e}"));
    let user = |word: &String| {
        let found = User::from_name(word).ok().flatten();
        let found = found.ok_or_else(|| format!("there is no user `{word}` on this host"))?;
        let (uid, gid) = (found.uid.as_raw(), found.gid.as_raw());
        Ok::<_, String>(RunAs { name: found.name, uid, gid, home: found.dir })
    };
    let time = |limit: Millis| Duration::from_millis(limit.millis());
    Ok(Application {
        name: name(&app.name)?,
        volumes: app.volumes.iter().map(name).collect::<Result<_, _>>()?,
        every: time(app.every),
        pre: app.pre.clone(),
        post: app.post.clone(),
        user: app.user.as_ref().map(user).transpose()?,
        hook_limit: time(app.hook_limit),
        freeze: app.freeze.clone(),
        quiet_limit: time(app.quiet_limit),
    })
}

/// Reads a file; without one, nothing is made quiet.
///
/// # Errors
/// As for [`parse`]; FS-1902 when it may not be read, FS-3409 when others can write it.
pub fn load(file: &Path) -> Result<Config, Problem> {
    let name = file.display().to_string();
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return parse("", &name),
        Err(e) => return Err(crate::roles::cannot_read(&name, &e)),
    };
    trusted_file(file, &[0, geteuid().as_raw()]).map_err(|why| {
        let next = "give the file and its folders to root (chown root, chmod go-w): who can write it \
                    decides which programs run";
        Problem::harmless(3409, format!("{name} is not used"), why, next)
    })?;
    parse(&text, &name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn applications_are_read_and_what_makes_no_sense_is_refused() {
        let text = "users = [\"root\"]\n[[application]]\nname = \"shop\"\nvolumes = [\"pgdata\", \
                    \"pgwal\"]\nevery = \"4h\"\npre = [\"/bin/true\", \"x\"]\nuser = \"root\"\n\
                    freeze = [\"/srv\"]\nquiet_limit = \"5s\"\n";
        let config = parse(text, "freezer.toml").unwrap();
        let app = &config.applications[0];
        assert_eq!(config.access.uids, [0]);
        assert_eq!((app.every.as_secs(), app.hook_limit.as_secs()), (14_400, 30));
        assert_eq!((app.volumes.len(), app.quiet_limit.as_secs()), (2, 5));
        assert_eq!(app.user.as_ref().map(|u| u.uid), Some(0));
        assert!(parse("", "x").unwrap().applications.is_empty());

        let with = |line: &str| {
            format!("[[application]]\nname = \"a\"\nvolumes = [\"v\"]\npre = [\"/x\"]\n{line}")
        };
        parse(&with(""), "x").unwrap();
        for (code, line) in [
            (1102, "prre = [\"/x\"]"),
            (1103, "user = \"no-such-user-here\""),
            (1103, "every = \"often\""),
            (3409, "every = \"1s\""),
            (3409, "quiet_limit = \"5min\""),
            (3409, "hook_limit = \"0\""),
            (3409, "post = [\"relative\"]"),
            (3409, "freeze = [\"srv\"]"),
            (3409, "[[application]]\nname = \"a\"\nvolumes = [\"v\"]\npre = [\"/x\"]"),
            (3409, "[[application]]\nname = \"b\"\nvolumes = []\npre = [\"/x\"]"),
            (3409, "[[application]]\nname = \"b\"\nvolumes = [\"v\"]"),
            (1103, "[[application]]\nname = \"b_c\"\nvolumes = [\"v\"]\npre = [\"/x\"]"),
        ] {
            assert_eq!(parse(&with(line), "x").unwrap_err().code.0, code, "{line}");
        }
    }

    #[test]
    fn a_file_that_others_can_write_decides_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("freezer.toml");
        assert!(load(&file).unwrap().applications.is_empty());
        std::fs::write(&file, "").unwrap();
        let mode = |mode| {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(0o644);
        load(&file).unwrap();
        mode(0o666);
        assert_eq!(load(&file).unwrap_err().code.0, 3409);
    }
}
