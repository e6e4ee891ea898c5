//! `farshore protect` and `unprotect`. The preflight always runs first and names everything that
//! stands in the way.

use std::path::{Path, PathBuf};

use clap::Args;
use clap::ValueEnum;
use farshore_blkfilter::control::{
    AttachChoice, AttachKind, Attachment, Hint, ProtectRequest, VolumeInfo,
};
use farshore_extent::{Problem, VolumeName, WallTime};
use jiff::tz::TimeZone;
use serde::Serialize;

use crate::args::{Global, bytes, interval, volume_name};
use crate::ask::confirm;
use crate::exit::{Exit, Failure};
use crate::output::Out;
use crate::units::{self, Interval};
use crate::{rpc, start_at};

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
    /// The target has an image of this disk (farshore target seed): send only what differs
    #[arg(long)]
    seeded: bool,
    /// When the first copy starts, in steps of 30 minutes: 22:30, "2026-12-31 22:30" or now
    #[arg(long, value_name = "TIME", default_value = "now")]
    start_at: String,
    /// How this host reaches it; the best way it has if not given
    #[arg(long, value_name = "WAY")]
    attach: Option<Way>,
    /// Unix socket on which clients find it, instead of one in the run directory; means
    /// `--attach socket`
    #[arg(long, value_name = "PATH")]
    nbd_socket: Option<PathBuf>,
}

/// Ways of `--attach`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// A block device of the kernel's ublk driver
    Ublk,
    /// A block device of the kernel's NBD client
    Nbd,
    /// A unix socket for NBD clients, no block device
    Socket,
}

impl Way {
    /// As it is typed.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Ublk => "ublk",
            Self::Nbd => "nbd",
            Self::Socket => "socket",
        }
    }
}

impl From<Way> for AttachKind {
    fn from(way: Way) -> Self {
        match way {
            Way::Ublk => Self::Ublk,
            Way::Nbd => Self::Nbd,
            Way::Socket => Self::Socket,
        }
    }
}

/// Options of `unprotect`.
#[derive(Debug, Args)]
pub struct UnprotectArgs {
    /// Which volume
    #[arg(value_parser = volume_name)]
    name: VolumeName,
    /// Disconnect the clients of a socket first; a block device in use is never taken away
    #[arg(long)]
    force: bool,
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

/// `farshore protect`.
pub fn protect(args: &ProtectArgs, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let paths = global.paths();
    if args.nbd_socket.is_some() && args.attach.is_some_and(|way| way != Way::Socket) {
        let why = "a socket is no block device";
        let next = "leave out one of --nbd-socket and --attach";
        return Err(Problem::harmless(1901, "--nbd-socket means --attach socket", why, next).into());
    }
    let copy_at = start_at::parse(&args.start_at, WallTime::now(), &TimeZone::system())?;
    let mut request = ProtectRequest {
        name: args.name.clone(),
        // The daemon has another working directory.
        backing: absolute(&args.path),
        attach: args.attach.map(AttachKind::from),
        nbd_socket: args.nbd_socket.as_deref().map(absolute),
        pool_bytes: args.pool,
        point_interval_ms: args.policy.map(Interval::millis),
        seeded: args.seeded,
        copy_at,
    };
    let mut filterd = rpc::filterd(&paths)?;
    let found = filterd.preflight(request.clone())?;
    if let Some(failure) = Failure::from_list(found.problems) {
        return Err(failure);
    }
    // What is told is what is done.
    request.attach = found.attach.as_ref().map(|choice| choice.kind);
    if global.dry_run {
        let (path, name) = (request.backing.display(), &request.name);
        if out.json {
            let would = WouldProtect { request: &request, hints: &found.hints };
            out.document(SCHEMA, "would_protect", &would);
        } else {
            out.line(format!("ready: {path} can be protected as {name}; nothing was changed"));
            found.attach.iter().for_each(|choice| out.line(reason(choice)));
            found.hints.iter().for_each(|hint| out.line(note(hint)));
        }
        return Ok(Exit::Ok);
    }
    let info = filterd.protect(request)?;
    if out.json {
        out.document(SCHEMA, "volume", &info);
    } else {
        out.line(protected(&info));
        found.attach.iter().for_each(|choice| out.line(reason(choice)));
        found.hints.iter().for_each(|hint| out.line(note(hint)));
        out.hint("from now on open the disk only here; writes that bypass it are not replicated");
        if let Some(start) = copy_at {
            let name = &args.name;
            out.line(format!("  its first copy starts at {}", units::instant_minute(start)));
            out.hint(format!(
                "nothing is protected before; to start it earlier: farshore resync {name}"
            ));
        }
        out.hint("how far it is: farshore status --watch");
    }
    Ok(Exit::Ok)
}

/// Where guests find the protected volume: a device, or an address for NBD clients.
fn place(info: &VolumeInfo) -> String {
    match (&info.attachment, &info.link) {
        (Attachment::Socket { path }, _) => {
            format!("nbd+unix:///{}?socket={}", info.name, path.display())
        }
        (Attachment::Ublk { device, .. } | Attachment::Nbd { device, .. }, Some(link)) => {
            format!("{} ({})", link.display(), device.display())
        }
        (Attachment::Ublk { device, .. } | Attachment::Nbd { device, .. }, None) => {
            device.display().to_string()
        }
    }
}

/// The answer to `--dry-run`.
#[derive(Debug, Serialize)]
struct WouldProtect<'a> {
    #[serde(flatten)]
    request: &'a ProtectRequest,
    hints: &'a [Hint],
}

fn note(hint: &Hint) -> String {
    format!("  note   {}\n  do     {}", hint.what, hint.next)
}

fn reason(choice: &AttachChoice) -> String {
    format!("  attached by {}: {}", choice.kind, choice.why)
}

fn protected(info: &VolumeInfo) -> String {
    format!(
        "protecting {} as {} ({})\n  {}",
        info.backing.display(),
        info.name,
        units::bytes(info.size.get()),
        place(info),
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
