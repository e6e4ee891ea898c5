//! `farshore scrub`: read and verify everything that a replica keeps, now.

use std::time::Duration;

use clap::Args;
use farshore_extent::{Problem, VolumeName};
use farshore_protocol::admin::{ReplicaStatus, TargetReply, TargetRequest};
use farshore_protocol::paths::Paths;

use crate::args::{Global, volume_name};
use crate::exit::{Exit, Failure};
use crate::output::Out;
use crate::rpc::{self, Role};
use crate::units;

/// Between two looks while waiting.
const LOOK: Duration = Duration::from_millis(500);

/// Options of `scrub`.
#[derive(Debug, Args)]
pub struct ScrubArgs {
    /// Which volume
    #[arg(value_parser = volume_name)]
    name: VolumeName,
    /// Wait for the end; fails when anything is damaged
    #[arg(long)]
    wait: bool,
}

/// `farshore scrub`.
pub fn run(args: &ScrubArgs, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let (name, paths) = (&args.name, global.paths());
    let before = look(&paths, name)?;
    if global.dry_run {
        out.line(format!("would read and verify what the replica of {name} keeps"));
        return Ok(Exit::Ok);
    }
    let TargetReply::Done = rpc::target(&paths, &TargetRequest::Scrub { volume: name.clone() })?
    else {
        return Err(rpc::unexpected(Role::Target).into());
    };
    if !args.wait {
        out.line(format!("what the replica of {name} keeps is being read and verified"));
        out.hint("farshore status shows how far it is, farshore event list what it finds");
        return Ok(Exit::Ok);
    }
    let now = loop {
        let now = look(&paths, name)?;
        if now.last_scrub > before.last_scrub {
            break now;
        }
        #[allow(clippy::disallowed_methods)] // between two looks; nobody tells us of the end
        std::thread::sleep(LOOK);
    };
    if now.scrub_found > 0 {
        return Err(damaged(name, now.scrub_found).into());
    }
    match now.last_scrub {
        _ if out.json => out.document("farshore.scrub/1", "scrubbed", name),
        Some(at) => {
            let at = units::instant(at);
            out.line(format!("the replica of {name} was read until {at}: nothing is damaged"));
        }
        None => {}
    }
    Ok(Exit::Ok)
}

fn look(paths: &Paths, name: &VolumeName) -> Result<ReplicaStatus, Problem> {
    let TargetReply::Status(all) = rpc::target(paths, &TargetRequest::Status)? else {
        return Err(rpc::unexpected(Role::Target));
    };
    let found = all.into_iter().find(|replica| replica.name == *name);
    found.ok_or_else(|| {
        Problem::harmless(
            6530,
            format!("there is no volume {name} on this target"),
            "no source has opened a volume of that name",
            "farshore status lists the volumes",
        )
    })
}

fn damaged(name: &VolumeName, found: u64) -> Problem {
    Problem::harmless(
        6016,
        format!("a scrub found {found} damaged places in the replica of {name}"),
        "bytes read back do not match their checksums",
        format!(
            "farshore event list names them; on the source: farshore resync {name}; check the disk \
             under the store"
        ),
    )
    .with_risk("what is damaged is never served; points that need it lack it")
}
