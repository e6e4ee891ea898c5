//! `farshore protect` and `unprotect`. The preflight always runs first and names everything that
//! stands in the way.

use std::path::{Path, PathBuf};

use clap::Args;
use farshore_blkfilter::control::{ProtectRequest, VolumeInfo};
use farshore_extent::VolumeName;

use crate::args::{Global, bytes, interval, volume_name};
use crate::ask::confirm;
use crate::exit::{Exit, Failure};
use crate::output::Out;
use crate::rpc;
use crate::units::{self, Interval};

/// Version of the document.
const SCHEMA: &str = "farshore.protect/1";

/// Options of `protect`.
#[derive(Debug, Args)]
pub struct ProtectArgs {
    /// Block device or raw image file
    path: PathBuf,
    /// Its name: 1 to 63 letters, digits and hyphens
    #[arg(long, value_parser = volume_name)]
    name: VolumeName,
    /// Time between points: 30s, 5m, 15m or any other, or off
    #[arg(long, value_name = "TIME", value_parser = interval)]
    policy: Option<Interval>,
    /// Memory that holds writes until they are safe at the target
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pool: Option<u64>,
    /// Unix socket on which clients find it, instead of one in the run directory
    #[arg(long, value_name = "PATH")]
    nbd_socket: Option<PathBuf>,
}

/// Options of `unprotect`.
#[derive(Debug, Args)]
pub struct UnprotectArgs {
    /// Which volume
    #[arg(value_parser = volume_name)]
    name: VolumeName,
    /// Disconnect its clients first
    #[arg(long)]
    force: bool,
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

/// `farshore protect`.
pub fn protect(args: &ProtectArgs, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let paths = global.paths();
    let request = ProtectRequest {
        name: args.name.clone(),
        // The daemon has another working directory.
        backing: absolute(&args.path),
        nbd_socket: args.nbd_socket.as_deref().map(absolute),
        pool_bytes: args.pool,
        point_interval_ms: args.policy.map(Interval::millis),
    };
    let mut filterd = rpc::filterd(&paths)?;
    let found = filterd.preflight(request.clone())?;
    if let Some(failure) = Failure::from_list(found) {
        return Err(failure);
    }
    if global.dry_run {
        let (path, name) = (request.backing.display(), &request.name);
        if out.json {
            out.document(SCHEMA, "would_protect", &request);
        } else {
            out.line(format!("ready: {path} can be protected as {name}; nothing was changed"));
        }
        return Ok(Exit::Ok);
    }
    let info = filterd.protect(request)?;
    if out.json {
        out.document(SCHEMA, "volume", &info);
    } else {
        out.line(protected(&info));
        out.hint("from now on open the disk only here; writes that bypass it are not replicated");
        out.hint("how far it is: farshore status --watch");
    }
    Ok(Exit::Ok)
}

/// Where clients of the protected volume connect.
pub fn uri(info: &VolumeInfo) -> String {
    format!("nbd+unix:///{}?socket={}", info.name, info.nbd_socket.display())
}

fn protected(info: &VolumeInfo) -> String {
    format!(
        "protecting {} as {} ({})\n  {}",
        info.backing.display(),
        info.name,
        units::bytes(info.size.get()),
        uri(info),
    )
}

/// `farshore unprotect`.
pub fn unprotect(args: &UnprotectArgs, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let name = &args.name;
    if global.dry_run {
        out.line(format!("would stop protecting {name}; disk and replica keep what they have"));
        return Ok(Exit::Ok);
    }
    confirm(&format!("stop protecting {name}? Later writes will not be replicated."), global)?;
    rpc::filterd(&global.paths())?.unprotect(name.clone(), args.force)?;
    if out.json {
        out.document(SCHEMA, "unprotected", name);
    } else {
        out.line(format!("{name} is no longer protected; its points can still be opened"));
    }
    Ok(Exit::Ok)
}
