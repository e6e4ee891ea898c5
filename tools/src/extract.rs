//! `farshore extract`: a point out of a store's folder, when there is nothing else left.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use farshore_extent::{Extent, Problem, WallTime};
use farshore_protocol::admin::PointChoice;
use farshore_target::extract::{
    Chosen, Destination, Extracted, Options, Wanted, choose, extract, open,
};
use farshore_target::store::{CommittedPoint, OfflineStore};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::args::Global;
use crate::ask::confirm;
use crate::exit::{Exit, Failure};
use crate::output::{Out, table};
use crate::{signals, units};

/// Between two lines of progress.
const TELL: Duration = Duration::from_secs(5);

/// Options of `extract`.
#[derive(Debug, Args)]
pub struct ExtractArgs {
    /// The folder of a replica: it has a file `super`
    store: PathBuf,
    /// newest, oldest, app, a name, lsn:EPOCH.SEQ, or a time such as '2026-11-21 10:14'
    #[arg(long, value_name = "P", required_unless_present = "list")]
    point: Option<String>,
    /// A file, or a block device that nobody uses
    #[arg(long, value_name = "FILE|DEV", required_unless_present = "list")]
    to: Option<PathBuf>,
    /// Show the points that the journal has
    #[arg(long, conflicts_with_all = ["point", "to", "verify", "damaged"])]
    list: bool,
    /// Read the image again from its disk and compare
    #[arg(long)]
    verify: bool,
    /// What to do when a part of the point cannot be read
    #[arg(long, value_enum, default_value_t = Damaged::Refuse)]
    damaged: Damaged,
}

/// What to do with what cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Damaged {
    /// Give up, and name it
    Refuse,
    /// Fill it with zeroes, and name it
    Zero,
}

/// `farshore extract`.
pub fn run(args: &ExtractArgs, global: &Global, out: &Out) -> Result<Exit, Failure> {
    raise_file_limit();
    let store = open(&args.store)?;
    if args.list {
        list(&store, out);
        return Ok(Exit::Ok);
    }
    let (Some(point), Some(to)) = (&args.point, &args.to) else { return Ok(Exit::Usage) };
    tell_damage(&store, out);
    let chosen = choose(&store, &args.store, &wanted(point, &store)?)?;
    let destination = Destination::find(to, &args.store, chosen.bytes())?;
    let what = format!("{} of {}", units::bytes(chosen.bytes()), moment(&chosen));
    if global.dry_run {
        out.line(format!("would copy {what} to {}; nothing was changed", to.display()));
        return Ok(Exit::Ok);
    }
    match &destination {
        Destination::File { replaces: false, .. } => {}
        Destination::File { path, .. } => {
            confirm(&format!("replace the file {}?", path.display()), global)?;
        }
        Destination::Device { path, bytes, .. } => {
            let size = units::bytes(*bytes);
            confirm(&format!("overwrite the device {} ({size})?", path.display()), global)?;
        }
    }
    out.hint(format!("copying {what} to {}", to.display()));
    let options = Options { zero_damaged: args.damaged == Damaged::Zero, read_back: args.verify };
    let stop = signals::interrupt();
    let mut progress = Progress::new(out);
    let done = extract(&chosen, destination, options, |at| {
        progress.at(at, chosen.bytes());
        !stop.is_set()
    });
    match done {
        Ok(done) => Ok(told(&store, &chosen, to, options, &done, out)),
        Err(problem) if stop.is_set() => {
            out.failure(&problem.into());
            Ok(Exit::Interrupted)
        }
        Err(problem) => Err(problem.into()),
    }
}

/// A store may have thousands of segments, each an open file.
pub fn raise_file_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // Too few files are an error of their own, if it comes to that.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Reads `--point`. A word that is nothing else is the name of a point.
fn wanted(text: &str, store: &OfflineStore) -> Result<Wanted, Problem> {
    match text {
        "newest" => return Ok(Wanted::Newest),
        "oldest" => return Ok(Wanted::Oldest),
        _ => {}
    }
    match crate::choose::point(text) {
        Ok(PointChoice::Latest) => Ok(Wanted::Newest),
        Ok(PointChoice::LatestApp) => Ok(Wanted::NewestApp),
        Ok(PointChoice::Name(name)) => Ok(Wanted::Name(name)),
        Ok(PointChoice::Time(time)) => Ok(Wanted::Time(time)),
        Ok(PointChoice::At(lsn)) => Ok(Wanted::At(lsn)),
        Ok(PointChoice::Id(id)) => Err(Problem::harmless(
            1905,
            format!("`{id}` does not name a point here"),
            "numbers of points are in the target's catalogue, which is not asked",
            "use newest, oldest, a name, lsn:EPOCH.SEQ or a time; --list shows them",
        )),
        Err(problem) => {
            let named = store.points().iter().any(|p| p.name == text);
            if named { Ok(Wanted::Name(text.to_owned())) } else { Err(problem) }
        }
    }
}

fn moment(chosen: &Chosen) -> String {
    let time = units::instant(chosen.time);
    match &chosen.point {
        Some(p) if !p.name.is_empty() => format!("point \"{}\" ({}, {time})", p.name, chosen.at),
        Some(_) => format!("the point at {} ({time})", chosen.at),
        None => format!("the moment {} ({time})", chosen.at),
    }
}

/// The journal may end before what the target had acknowledged.
fn tell_damage(store: &OfflineStore, out: &Out) {
    for damage in &store.report().damage {
        out.hint(format!(
            "the journal is damaged: {}; what can be read ends at {}, up to {} was durable",
            damage.what, damage.after, damage.upto
        ));
    }
}

fn damage_json(store: &OfflineStore) -> Vec<serde_json::Value> {
    let damage = store.report().damage.iter();
    damage
        .map(|d| serde_json::json!({ "after": d.after, "upto": d.upto, "what": d.what }))
        .collect()
}

/// Lines about how far it is.
pub struct Progress<'a> {
    out: &'a Out,
    begun: Instant,
    told: Instant,
}

impl<'a> Progress<'a> {
    /// From now on.
    pub fn new(out: &'a Out) -> Self {
        Self { out, begun: Instant::now(), told: Instant::now() }
    }

    /// So many bytes of so many are done.
    pub fn at(&mut self, done: u64, all: u64) {
        if self.told.elapsed() < TELL {
            return;
        }
        self.told = Instant::now();
        let millis = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
        let speed = units::bytes(done.saturating_mul(1000) / millis);
        let percent = u128::from(done) * 100 / u128::from(all.max(1));
        let (done, all) = (units::bytes(done), units::bytes(all));
        self.out.hint(format!("{done} of {all} ({percent} %), {speed}/s"));
    }
}

fn told(
    store: &OfflineStore,
    chosen: &Chosen,
    to: &Path,
    options: Options,
    done: &Extracted,
    out: &Out,
) -> Exit {
    let whole = done.unreadable.is_empty();
    let exit = if whole { Exit::Ok } else { Exit::Partial };
    if out.json {
        let unreadable: Vec<Extent> = done.unreadable.iter().collect();
        let extracted = serde_json::json!({
            "volume": store.volume(),
            "lsn": chosen.at,
            "time": chosen.time,
            "name": chosen.point.as_ref().map(|p| p.name.clone()),
            "kind": chosen.point.as_ref().map(|p| p.kind),
            "to": to.display().to_string(),
            "bytes": done.bytes,
            "data_bytes": done.data_bytes,
            "blake3": done.digest,
            "read_back": options.read_back,
            "base_unverified_bytes": store.unverified_bytes(),
            "unreadable": unreadable,
            "reasons": done.reasons,
            "damage": damage_json(store),
        });
        out.document("farshore.extract/1", "extracted", &extracted);
        return exit;
    }
    let (all, data) = (units::bytes(done.bytes), units::bytes(done.data_bytes));
    out.line(format!("{} is in {}: {all}, {data} of it not zero", moment(chosen), to.display()));
    out.line(format!("  blake3    {}", done.digest));
    let read = "every checksum of what was read, all of it durable";
    let read_back = if options.read_back { "; read back and equal" } else { "" };
    out.line(format!("  verified  {read}{read_back}"));
    if store.unverified_bytes() > 0 {
        let bytes = units::bytes(store.unverified_bytes());
        out.line(format!("  but       {bytes} of the base image have no checksums yet"));
    }
    for (range, n) in done.unreadable.iter().zip(1..) {
        if n > 16 {
            out.line(format!("  zeroed    and {} more", done.unreadable.extents() - 16));
            break;
        }
        out.line(format!("  zeroed    {range}: it cannot be read"));
    }
    for reason in &done.reasons {
        out.line(format!("  why       {reason}"));
    }
    exit
}

fn list(store: &OfflineStore, out: &Out) {
    let (points, end) = (store.points(), store.position());
    let ordered = store.is_ordered_at(end.durable);
    if out.json {
        let points: Vec<_> = points.iter().map(point_json).collect();
        let listed = serde_json::json!({
            "volume": store.volume(),
            "size": end.size,
            "base": end.base,
            "floor": end.floor,
            "end": end.durable,
            "end_ordered": ordered,
            "points": points,
            "damage": damage_json(store),
        });
        out.document("farshore.extract-points/1", "store", &listed);
        return;
    }
    let head = ["LSN", "TIME", "AGE", "KIND", "NAME"].map(str::to_owned).to_vec();
    let now = WallTime::now();
    let row = |p: &CommittedPoint| {
        vec![
            p.lsn.to_string(),
            units::instant(p.time),
            units::span(now.since(p.time)),
            p.kind.as_str().to_owned(),
            if p.name.is_empty() { "-".into() } else { p.name.clone() },
        ]
    };
    out.text(&table(
        &std::iter::once(head).chain(points.iter().rev().map(row)).collect::<Vec<_>>(),
    ));
    let order = if ordered { "a state the volume had" } else { "not a state the volume had" };
    out.hint(format!("the journal ends at lsn:{}, {order}", end.durable));
    tell_damage(store, out);
}

fn point_json(p: &CommittedPoint) -> serde_json::Value {
    serde_json::json!({ "lsn": p.lsn, "time": p.time, "kind": p.kind, "name": p.name })
}
