//! The units and the udev rule of this release, and whether the installed ones are these.

use super::host::Host;

/// The udev rule.
pub const RULE: Shipped =
    Shipped { name: "61-farshore.rules", text: include_str!("../../udev/61-farshore.rules") };

/// The units of systemd.
pub const UNITS: [Shipped; 3] = [
    Shipped {
        name: "farshore-filterd.service",
        text: include_str!("../../systemd/farshore-filterd.service"),
    },
    Shipped {
        name: "farshore-agent.service",
        text: include_str!("../../systemd/farshore-agent.service"),
    },
    Shipped {
        name: "farshore-target.service",
        text: include_str!("../../systemd/farshore-target.service"),
    },
];

/// A file that is installed beside the executable.
#[derive(Debug, Clone, Copy)]
pub struct Shipped {
    /// Its name.
    pub name: &'static str,
    text: &'static str,
}

/// What is installed in place of a shipped file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Installed {
    /// The very file, here.
    Same(String),
    /// A file with another text, here: an old one, or an edited one.
    Other(String),
    /// Switched off by a link to `/dev/null`, or by an empty file, here.
    Masked(String),
    /// None.
    Missing,
}

impl Shipped {
    /// Looks in `places`, of which the first that has the file counts.
    pub fn installed(&self, host: &Host, places: &[&str]) -> Installed {
        for place in places {
            let path = format!("{place}/{}", self.name);
            let is_null = std::fs::read_link(host.path(&path));
            if is_null.is_ok_and(|to| to.as_os_str() == "/dev/null") {
                return Installed::Masked(path);
            }
            match host.read(&path) {
                Ok(text) if text == self.text.trim() => return Installed::Same(path),
                Ok(text) if text.is_empty() => return Installed::Masked(path),
                Ok(_) => return Installed::Other(path),
                Err(_) => {}
            }
        }
        Installed::Missing
    }
}
