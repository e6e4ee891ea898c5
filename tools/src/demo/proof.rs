//! Opening the past and proving it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use farshore_extent::WallTime;
use farshore_protocol::admin::{
    OpenView, PointChoice, PointInfo, TargetReply, TargetRequest, ViewInfo,
};

use super::load::{Load, Named};
use super::stage::Stage;
use super::story::{Story, count};
use super::{End, cannot, disproved};
use crate::choose;
use crate::ledger::{self, Bounds};
use crate::nbd_client::NbdClient;
use crate::rpc::{self, Role};

/// Wall clock labels of source and ledger are of one machine; this allows for the clock being read
/// a little before or after the cut.
const SLACK: Duration = Duration::from_millis(20);
/// Bytes compared at a time.
const CHUNK: usize = 1 << 20;

/// Figures of the proofs.
#[derive(Debug, Default)]
pub struct Proof {
    /// Time to open each view, in microseconds.
    pub open_micros: Vec<u64>,
    /// Writes checked, over all points.
    pub writes: u64,
    /// Points kept at the end.
    pub points: u64,
    /// Bytes compared at the end.
    pub compared: u64,
}

/// Opens a point; the view, with the time it took as seen from here.
fn open(stage: &Stage, point: PointChoice) -> Result<(ViewInfo, Duration), End> {
    let begun = Instant::now();
    let request = OpenView::new(stage.name.clone(), point);
    match rpc::target(stage.paths(), &TargetRequest::OpenView(request))? {
        TargetReply::View(view) => Ok((*view, begun.elapsed())),
        _ => Err(rpc::unexpected(Role::Target).into()),
    }
}

fn close(stage: &Stage, view: &ViewInfo, note: &str) -> Result<(), End> {
    let request = TargetRequest::CloseView { view: view.view, note: note.to_owned() };
    rpc::target(stage.paths(), &request).map(drop).map_err(End::from)
}

fn client(view: &ViewInfo) -> Result<NbdClient, End> {
    let client = NbdClient::connect(&view.nbd_socket, &view.export);
    client.map_err(|e| cannot(format!("cannot read the view {}", view.view), e))
}

/// Reads the whole view and checks it against the ledger.
fn check(stage: &Stage, view: &ViewInfo, bounds: Bounds) -> Result<ledger::CutReport, End> {
    stage.check_interrupt()?;
    let mut client = client(view)?;
    let checked = stage.ledger.check(|offset, to| client.read_at(offset, to), bounds);
    checked.map_err(|why| disproved(format!("the view at {} is wrong", view.lsn), why))
}

fn sentence(stage: &Stage, report: &ledger::CutReport) -> String {
    // What filled the disk before the load is no news.
    let writes = count(report.writes.saturating_sub(stage.primed));
    let in_flight = match report.left_out {
        0 => String::new(),
        1 => ", 1 in flight left out".to_owned(),
        n => format!(", {n} in flight left out"),
    };
    format!("a consistent cut: the first {writes} writes{in_flight}")
}

/// One view, opened and proven while the writers go on.
pub fn while_running(stage: &Stage, named: &Named, story: &Story) -> Result<(), End> {
    let choice = PointChoice::Name(named.point.name.clone());
    let (view, took) = open(stage, choice)?;
    let report = check(stage, &view, named.bounds)?;
    close(stage, &view, "demo, under load")?;
    story.proven(&format!(
        "opened under load in {} ms: {}",
        millis(took),
        sentence(stage, &report)
    ));
    Ok(())
}

fn millis(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64() * 1000.0)
}

fn points(stage: &Stage) -> Result<Vec<PointInfo>, End> {
    let request = TargetRequest::Points { volume: stage.name.clone(), limit: 0 };
    match rpc::target(stage.paths(), &request)? {
        TargetReply::Points(points) => Ok(points),
        _ => Err(rpc::unexpected(Role::Target).into()),
    }
}

fn around(stage: &Stage, time: WallTime) -> Bounds {
    let at = stage.ledger.at_wall(time).0;
    let slack = u64::try_from(SLACK.as_nanos()).unwrap_or(0);
    Bounds {
        not_before: ledger::Instant(at.saturating_sub(slack)),
        not_after: ledger::Instant(at.saturating_add(slack)),
    }
}

/// The moment half-way between two points a second apart, in the middle of the load: a place that
/// nobody marked.
fn unmarked_moment(points: &[PointInfo], load: &Load) -> Option<WallTime> {
    let mut times: Vec<i64> = points.iter().map(|p| p.time.nanos()).collect();
    times.sort_unstable();
    let (from, to) = (load.span.0.nanos(), load.span.1.nanos());
    let middle = from + (to - from) / 2;
    let close = |w: &&[i64]| w[0] > from && w[1] < to && w[1] - w[0] < 1_500_000_000;
    let moments = times.windows(2).filter(close).map(|w| w[0] + (w[1] - w[0]) / 2);
    moments.min_by_key(|t| (t - middle).abs()).map(WallTime::from_nanos)
}

/// All proofs after the load.
pub fn run(stage: &Stage, load: &Load, story: &Story) -> Result<Proof, End> {
    story.chapter("Any moment of the past is a disk: several at once, each proven");
    story.say(
        "Each block says which write it is, so a point can be proven: all that was answered before",
    );
    story.say(
        "it is there, nothing begun after it is, and no write without those it could build on.",
    );
    let kept = points(stage)?;
    let mut chosen: Vec<(PointChoice, Bounds)> = Vec::new();
    let during = |p: &&PointInfo| p.name.is_empty() && p.time > load.span.0 && p.time < load.span.1;
    let by_policy: Vec<_> = kept.iter().filter(during).collect();
    let part = |n: usize| by_policy.get(by_policy.len() * n / 10);
    for point in [part(8), part(3)].into_iter().flatten() {
        chosen.push((PointChoice::Id(point.point), around(stage, point.time)));
    }
    for named in load.named.iter().filter(|n| n.point.name != "the-end") {
        chosen.push((PointChoice::Name(named.point.name.clone()), named.bounds));
    }
    if let Some(moment) = unmarked_moment(&kept, load) {
        chosen.push((PointChoice::Time(moment), around(stage, moment)));
    }
    let mut proof = Proof { points: u64::try_from(kept.len()).unwrap_or(0), ..Proof::default() };
    let mut views = Vec::new();
    for (choice, bounds) in chosen {
        let (view, took) = open(stage, choice.clone())?;
        proof.open_micros.push(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        views.push((choice, bounds, view, took));
    }
    for (choice, bounds, view, took) in &views {
        let report = check(stage, view, *bounds)?;
        proof.writes += report.writes;
        story.command(&format!("failover test demo --point '{}'", choose::shown(choice)));
        story.proven(&format!("open in {} ms: {}", millis(*took), sentence(stage, &report)));
    }
    if let Some((_, bounds, view, _)) = views.first() {
        scratch_is_private(stage, view, *bounds, story)?;
    }
    for (_, _, view, _) in &views {
        close(stage, view, "demo")?;
    }
    proof.compared = compare(stage, load.fio.is_some(), story)?;
    Ok(proof)
}

/// Writes to a view are seen in it and nowhere else.
fn scratch_is_private(
    stage: &Stage,
    view: &ViewInfo,
    bounds: Bounds,
    story: &Story,
) -> Result<(), End> {
    let wrong = |e: io::Error| cannot("cannot write to a view", e);
    let mut client = client(view)?;
    let mine = vec![0xd5; 256 << 10];
    client.write_at(64 << 10, &mine).map_err(wrong)?;
    let mut back = vec![0; mine.len()];
    client.read_at(64 << 10, &mut back).map_err(wrong)?;
    if back != mine {
        return Err(disproved(
            "a view does not keep what was written to it",
            "it read other bytes",
        ));
    }
    let (again, _) = open(stage, PointChoice::At(view.lsn))?;
    check(stage, &again, bounds)?;
    close(stage, &again, "demo")?;
    story.proven("a view can be written; the same point opened again does not show it");
    Ok(())
}

/// The latest point, the protected disk and the raw file behind it: the same bytes.
fn compare(stage: &Stage, with_fio: bool, story: &Story) -> Result<u64, End> {
    let (view, _) = open(stage, PointChoice::Latest)?;
    let mut replica = client(&view)?;
    let source = Stage::place_of(&stage.volume()?)?.open();
    let mut source = source.map_err(|e| cannot("cannot read the protected disk", e))?;
    let raw = File::open(&stage.disk).map_err(|e| cannot("cannot read the raw disk", e))?;
    let wrong = |e: io::Error| cannot("cannot read for the comparison", e);
    let (mut a, mut b, mut c) = (vec![0; CHUNK], vec![0; CHUNK], vec![0; CHUNK]);
    let mut offset = 0;
    while offset < stage.size {
        stage.check_interrupt()?;
        replica.read_at(offset, &mut a).map_err(wrong)?;
        source.read_at(offset, &mut b).map_err(wrong)?;
        raw.read_exact_at(&mut c, offset).map_err(wrong)?;
        if a != b || b != c {
            let at = a.iter().zip(&b).zip(&c).position(|((a, b), c)| a != b || b != c);
            let at = offset + u64::try_from(at.unwrap_or(0)).unwrap_or(0);
            return Err(disproved(
                "the latest point is not the source",
                format!("byte {at} differs"),
            ));
        }
        offset += CHUNK as u64;
    }
    close(stage, &view, "demo, compared")?;
    let part = if with_fio { ", fio's part included" } else { "" };
    story.proven(&format!(
        "the latest point is the source, byte for byte ({} bytes{part})",
        count(stage.size)
    ));
    Ok(stage.size)
}
