//! `farshore target init`: the data directory, the CA, the catalogue and the configuration.

use std::path::PathBuf;

use farshore_extent::Problem;
use farshore_protocol::paths::Paths;
use farshore_protocol::token::CaFingerprint;

use crate::authority::Authority;
use crate::catalogue::SqliteCatalogue;
use crate::config::{Config, DataDir};
use crate::{durable_fs, problem};

/// What a person may choose.
#[derive(Debug, Clone, Default)]
pub struct InitOptions {
    /// Where everything is kept; none: `target` below the state directory.
    pub data: Option<PathBuf>,
    /// Where agents connect; none: `:9443`.
    pub listen: Option<String>,
    /// Further names or addresses for the server's certificate.
    pub names: Vec<String>,
}

/// What [`init`] found or made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitReport {
    /// False: everything was there already and nothing was changed.
    pub created: bool,
    /// Where everything is kept.
    pub data: PathBuf,
    /// The configuration file.
    pub config: PathBuf,
    /// Where agents will connect.
    pub listen: String,
    /// What tokens will pin.
    pub fingerprint: CaFingerprint,
}

/// Sets a target up. Safe to repeat: what exists is kept, options of a repetition included.
///
/// # Errors
/// FS-6502, FS-6503, FS-6505, or FS-11xx for options or an existing configuration that cannot be
/// used.
pub fn init(paths: &Paths, options: &InitOptions) -> Result<InitReport, Problem> {
    let file = Config::file(paths);
    let (config, mut created) =
        if file.exists() { (Config::load(paths)?, false) } else { (new_config(options)?, true) };
    let data = config.data_dir(paths);
    for dir in [data.path().to_owned(), data.volumes(), data.views()] {
        durable_fs::create_private_dir(&dir).map_err(|e| problem::file("create", &dir, &e))?;
    }
    let (authority, made) = Authority::init(&data.ca(), &certificate_names(&config))?;
    created |= made;
    created |= make_catalogue(&data)?;
    // The configuration last: with it the daemon starts.
    if !file.exists() {
        write_config(&config, paths)?;
    }
    Ok(InitReport {
        created,
        data: data.path().to_owned(),
        config: file,
        listen: config.listen,
        fingerprint: authority.fingerprint(),
    })
}

fn new_config(options: &InitOptions) -> Result<Config, Problem> {
    let mut config = Config { names: options.names.clone(), ..Config::default() };
    if let Some(listen) = &options.listen {
        config.listen.clone_from(listen);
    }
    if let Some(data) = &options.data {
        let data = std::path::absolute(data).map_err(|e| problem::file("find", data, &e))?;
        config.data = Some(data);
    }
    // Through the text, so that the daemon cannot refuse what init accepted.
    Config::parse(&render(&config)?, "the options of target init")
}

fn render(config: &Config) -> Result<String, Problem> {
    toml::to_string(config).map_err(|e| problem::file("write", &PathBuf::from("target.toml"), &e))
}

fn write_config(config: &Config, paths: &Paths) -> Result<(), Problem> {
    let file = Config::file(paths);
    let made = durable_fs::create_private_dir(&paths.etc)
        .and_then(|()| durable_fs::replace(&file, render_bytes(config)?.as_bytes(), 0o644));
    made.map_err(|e| problem::file("write", &file, &e))
}

fn render_bytes(config: &Config) -> std::io::Result<String> {
    let head = "# Settings of the Farshore target daemon. Unknown keys are refused.\n\n";
    toml::to_string(config).map(|text| format!("{head}{text}")).map_err(std::io::Error::other)
}

fn make_catalogue(data: &DataDir) -> Result<bool, Problem> {
    let file = data.catalogue();
    let missing = !file.exists();
    SqliteCatalogue::open(&file)?;
    durable_fs::sync_dir(data.path()).map_err(|e| problem::file("sync", data.path(), &e))?;
    Ok(missing)
}

/// Names in the server's certificate besides the fixed one: for people with `openssl s_client`.
pub(crate) fn certificate_names(config: &Config) -> Vec<String> {
    let mut names = config.names.clone();
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    names.extend(host.filter(|name| !name.is_empty()));
    let addresses = config.listen_addresses().unwrap_or_default();
    let specific = addresses.iter().map(std::net::SocketAddr::ip).filter(|ip| !ip.is_unspecified());
    names.extend(specific.map(|ip| ip.to_string()));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_is_repeatable_and_keeps_the_first_choices() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::under(root.path());
        let options = InitOptions {
            data: Some(root.path().join("srv")),
            listen: Some("127.0.0.1:7001".into()),
            names: vec!["backup.example".into()],
        };
        let first = init(&paths, &options).unwrap();
        assert!(first.created);
        assert!(first.data.join("catalogue.sqlite").exists());
        let again = init(&paths, &InitOptions::default()).unwrap();
        assert_eq!(again, InitReport { created: false, ..first });
        assert_eq!(Config::load(&paths).unwrap().listen, "127.0.0.1:7001");
    }

    #[test]
    fn options_that_the_daemon_would_refuse_are_refused_and_leave_nothing() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::under(root.path());
        let options = InitOptions { listen: Some("nonsense".into()), ..InitOptions::default() };
        assert!(init(&paths, &options).is_err());
        assert!(!paths.etc.exists() && !paths.state.exists());
    }
}
