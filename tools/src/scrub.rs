//! `farshore scrub`: read and verify everything that a replica keeps, now.

use std::time::{Duration, Instant};

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

/// A scrub that has read nothing for so long is not waited for: its volume may have no store that
/// works, or a merge that cannot end.
const STILL: Duration = Duration::from_secs(120);

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
    let mut progress = (reached(&before), Instant::now());
    let now = loop {
        let now = look(&paths, name)?;
        if now.last_scrub > before.last_scrub {
            break now;
        }
        if stands_still(&mut progress, &now, Instant::now()) {
            return Err(still(name).into());
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

/// What grows or shrinks while a scrub, or the making of checksums before it, goes on.
fn reached(status: &ReplicaStatus) -> (Option<u64>, u64) {
    (status.scrub_bytes, status.unverified_bytes)
}

fn stands_still(
    progress: &mut ((Option<u64>, u64), Instant),
    now: &ReplicaStatus,
    at: Instant,
) -> bool {
    if reached(now) != progress.0 {
        *progress = (reached(now), at);
    }
    at.saturating_duration_since(progress.1) >= STILL
}

fn still(name: &VolumeName) -> Problem {
    Problem::harmless(
        6017,
        format!("the scrub of {name} does not go on"),
        format!("nothing was read for {} s", STILL.as_secs()),
        "farshore status shows what is wrong with the volume; the scrub goes on when it can",
    )
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests_data::sides;

    #[test]
    fn a_scrub_is_waited_for_while_it_reads_and_not_when_it_stands_still() {
        let mut status = sides().target.unwrap().remove(0);
        let start = Instant::now();
        let mut progress = (reached(&status), start);
        for minute in 1..10 {
            status.scrub_bytes = Some(u64::from(minute));
            assert!(!stands_still(
                &mut progress,
                &status,
                start + minute * Duration::from_secs(60)
            ));
        }
        let last = start + Duration::from_secs(9 * 60);
        assert!(!stands_still(&mut progress, &status, last + STILL - LOOK));
        assert!(stands_still(&mut progress, &status, last + STILL));
    }
}
