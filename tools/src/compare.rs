//! `farshore verify` and `farshore resync`: is the replica what the source is, and make it so.

use std::time::{Duration, Instant};

use clap::Args;
use farshore_blkfilter::control::{Client, CopyProgress, VerifyProgress, VolumeStatus};
use farshore_extent::{CaptureOrder, Extent, Problem, VolumeName};

use crate::args::{Global, bytes, volume_name};
use crate::ask::confirm;
use crate::exit::{Exit, Failure};
use crate::output::Out;
use crate::{rpc, units};

/// Version of the documents.
const SCHEMA: &str = "farshore.compare/1";

/// Between two looks while waiting.
const LOOK: Duration = Duration::from_millis(200);

/// Between two lines of progress.
const TELL: Duration = Duration::from_secs(10);

/// Options of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Which volume
    #[arg(value_parser = volume_name)]
    name: VolumeName,
    /// Read at most so much of the disk in a second; 0 is no limit
    #[arg(long, value_name = "SIZE", default_value = "20MiB", value_parser = bytes)]
    rate: u64,
    /// Wait for the end; fails when anything differs
    #[arg(long)]
    wait: bool,
    /// End the one under way
    #[arg(long, conflicts_with_all = ["wait", "rate"])]
    stop: bool,
}

/// Options of `resync`.
#[derive(Debug, Args)]
pub struct ResyncArgs {
    /// Which volume
    #[arg(value_parser = volume_name)]
    name: VolumeName,
    /// Wait until the replica is equal again
    #[arg(long)]
    wait: bool,
}

/// `farshore verify`.
pub fn verify(args: &VerifyArgs, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let name = &args.name;
    let mut filterd = rpc::filterd(&global.paths())?;
    let volume = find(&mut filterd, name)?;
    if global.dry_run {
        let size = units::bytes(volume.info.size.get());
        out.line(format!("would compare {size} of {name} with its replica; nothing is repaired"));
        return Ok(Exit::Ok);
    }
    filterd.verify(volume.info.volume, !args.stop, args.rate)?;
    if args.stop {
        out.line(format!("the verify of {name} has ended"));
        return Ok(Exit::Ok);
    }
    if !args.wait {
        out.line(format!("{name} is being compared with its replica"));
        out.hint(format!("what it finds: farshore verify {name} --wait, farshore status"));
        return Ok(Exit::Ok);
    }
    let done = |v: &VolumeStatus| !v.verify.running;
    let tell = |v: &VolumeStatus| match v.order {
        CaptureOrder::Ordered => {
            let (done, all) = (v.verify.checked_bytes, v.verify.total_bytes);
            format!("{} of {} compared", units::bytes(done), units::bytes(all))
        }
        CaptureOrder::CatchUp => "waits: the volume is being copied".to_owned(),
    };
    let found = wait(&mut filterd, name, done, tell, out)?.verify;
    if found.differing_bytes > 0 {
        return Err(differs(name, &found).into());
    }
    if out.json {
        out.document(SCHEMA, "verified", &found);
    } else if found.checked_bytes < found.total_bytes {
        let (done, all) = (units::bytes(found.checked_bytes), units::bytes(found.total_bytes));
        out.line(format!("ended early: {done} of {all} of {name} compared, all equal"));
        return Ok(Exit::Partial);
    } else {
        let all = units::bytes(found.total_bytes);
        out.line(format!("the replica of {name} is equal to it: {all} compared"));
    }
    Ok(Exit::Ok)
}

/// `farshore resync`.
pub fn resync(args: &ResyncArgs, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let name = &args.name;
    let mut filterd = rpc::filterd(&global.paths())?;
    let volume = find(&mut filterd, name)?;
    let size = units::bytes(volume.info.size.get());
    if global.dry_run && volume.copy_waits.is_some() {
        out.line(format!("would start the copy of {name} that waits"));
        return Ok(Exit::Ok);
    }
    if global.dry_run {
        out.line(format!("would compare {size} of {name} and send what differs; points pause"));
        return Ok(Exit::Ok);
    }
    if volume.copy_waits.is_some() {
        confirm(&format!("start the copy of {name} now, that waits?"), global)?;
        filterd.start_copy(volume.info.volume)?;
        return going(&mut filterd, args, "its copy has started", out);
    }
    confirm(&format!("compare {size} of {name} now? No points are cut until it is done."), global)?;
    filterd.resync(volume.info.volume, "asked for by hand")?;
    going(&mut filterd, args, "it is being compared; what differs is sent", out)
}

/// A copy runs: says so, or waits for its end.
fn going(filterd: &mut Client, args: &ResyncArgs, what: &str, out: &Out) -> Result<Exit, Failure> {
    let name = &args.name;
    if !args.wait {
        out.line(format!("{name}: {what}"));
        out.hint("points are cut again when it is done: farshore status --watch");
        return Ok(Exit::Ok);
    }
    let done = |v: &VolumeStatus| v.order == CaptureOrder::Ordered;
    let tell = |v: &VolumeStatus| {
        let CopyProgress { remaining_bytes, bytes_per_second, .. } = v.copy;
        format!("{} left, {}/s", units::bytes(remaining_bytes), units::bytes(bytes_per_second))
    };
    wait(filterd, name, done, tell, out)?;
    if out.json {
        out.document(SCHEMA, "resynced", name);
    } else {
        out.line(format!("the replica of {name} is equal to it again; points are cut"));
    }
    Ok(Exit::Ok)
}

fn find(filterd: &mut Client, name: &VolumeName) -> Result<VolumeStatus, Problem> {
    let found = filterd.list()?.into_iter().find(|volume| volume.info.name == *name);
    found.ok_or_else(|| {
        Problem::harmless(
            2035,
            format!("no protected volume {name}"),
            "it is not protected on this host, or its disk is missing",
            "farshore status",
        )
    })
}

fn wait(
    filterd: &mut Client,
    name: &VolumeName,
    done: impl Fn(&VolumeStatus) -> bool,
    tell: impl Fn(&VolumeStatus) -> String,
    out: &Out,
) -> Result<VolumeStatus, Problem> {
    let mut told = Instant::now();
    loop {
        let volume = find(filterd, name)?;
        if done(&volume) {
            return Ok(volume);
        }
        if told.elapsed() >= TELL {
            told = Instant::now();
            out.hint(tell(&volume));
        }
        #[allow(clippy::disallowed_methods)] // between two looks; nobody tells us of the end
        std::thread::sleep(LOOK);
    }
}

/// A defect: the replica has other bytes than it must.
pub fn differs(name: &VolumeName, found: &VerifyProgress) -> Problem {
    let bytes = units::bytes(found.differing_bytes);
    let place = |extent: &Extent| format!("{}+{}", extent.offset(), extent.len());
    let places: Vec<String> = found.differing.iter().take(8).map(place).collect();
    Problem {
        risk: "points of this volume may hold wrong bytes at these places".into(),
        ..Problem::harmless(
            3120,
            format!("the replica of {name} differs from it in chunks of {bytes}"),
            format!("at bytes {}", places.join(", ")),
            format!("farshore resync {name}"),
        )
    }
}
