//! The front end of one volume: the only way to it, so that there is one writer.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use farshore_extent::Problem;

use super::problem;
use super::state::{Front, VolumeRecord};
use crate::control::{AttachKind, Attachment};
use crate::device::Device;
use crate::durable_fs;
use crate::frontend::nbd::{self, Export, Exports};

/// A running front end.
#[derive(Debug)]
pub(super) enum Serving {
    Socket { server: nbd::Server, path: PathBuf },
}

impl Serving {
    /// Starts to serve `device` in the way on record.
    pub(super) fn start(device: Arc<dyn Device>, record: &VolumeRecord) -> Result<Self, Problem> {
        match &record.front {
            Front::Socket { path } => Self::socket(device, record, path.clone()),
            Front::Ublk { .. } | Front::Nbd { .. } => {
                Err(problem::impossible(&record.backing, record.front.kind(), "not in this build"))
            }
        }
    }

    fn socket(
        device: Arc<dyn Device>,
        record: &VolumeRecord,
        path: PathBuf,
    ) -> Result<Self, Problem> {
        let failed = |e: io::Error| problem::socket(&path, &e);
        if let Some(directory) = path.parent() {
            durable_fs::create_directory(directory, 0o700).map_err(failed)?;
        }
        let exports = Exports::new();
        let export = Export {
            name: record.name.as_str().to_owned(),
            description: format!("protected volume on {}", record.backing.display()),
            device,
        };
        exports.add(export).map_err(|e| problem::resources("an export", e))?;
        let server = nbd::Server::bind_unix(&path, exports, nbd::Config::default());
        Ok(Self::Socket { server: server.map_err(failed)?, path })
    }

    pub(super) fn attachment(&self) -> Attachment {
        match self {
            Self::Socket { path, .. } => Attachment::Socket { path: path.clone() },
        }
    }

    /// Connections of a socket.
    pub(super) fn clients(&self) -> u32 {
        match self {
            Self::Socket { server, .. } => server.clients(),
        }
    }

    /// Takes no more requests; those under way are answered. Returns whether all were within
    /// `grace`.
    pub(super) fn stop(&mut self, grace: Duration) -> bool {
        match self {
            Self::Socket { server, .. } => server.stop(grace),
        }
    }
}

impl Front {
    pub(super) const fn kind(&self) -> AttachKind {
        match self {
            Self::Ublk { .. } => AttachKind::Ublk,
            Self::Nbd { .. } => AttachKind::Nbd,
            Self::Socket { .. } => AttachKind::Socket,
        }
    }

    pub(super) fn socket(&self) -> Option<PathBuf> {
        match self {
            Self::Socket { path } => Some(path.clone()),
            Self::Ublk { .. } | Self::Nbd { .. } => None,
        }
    }
}
