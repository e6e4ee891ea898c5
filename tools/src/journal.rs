//! `farshore journal inspect`: what a replica's journal holds and whether it is whole, read from
//! its files, with or without the daemon. Never writes.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use farshore_changelog::{Record, RecordBody};
use farshore_extent::{Chain, Lsn, Problem};
use farshore_protocol::admin::{TargetReply, TargetRequest};
use farshore_target::config::Config;
use farshore_target::store::{
    Disk, InspectedBatch, InspectedSegment, ReadOnlyDisk, StoreError, Super, inspect,
    inspect_segment,
};
use serde::Serialize;

use crate::args::Global;
use crate::exit::{Exit, Failure};
use crate::output::{Out, table};
use crate::rpc::{self, Role};
use crate::units;

/// `journal …`
#[derive(Debug, Subcommand)]
pub enum JournalCommand {
    /// Read every batch of a journal, check it, and say what is in it
    Inspect {
        /// A replica's directory, or the name of a volume of this target
        replica: String,
        /// Show every batch
        #[arg(long)]
        batches: bool,
        /// Show every record
        #[arg(long)]
        records: bool,
    },
}

/// `farshore journal …`
pub fn run(command: &JournalCommand, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let JournalCommand::Inspect { replica, batches, records } = command;
    let dir = directory(replica, global)?;
    let show = Show { batches: *batches || *records, records: *records };
    let failed = |e: StoreError| Failure::caused(e.problem(&dir.display().to_string()), &e);
    let disk = ReadOnlyDisk::open(&dir).map_err(|e| no_store(&dir, &e.to_string()))?;
    let (sb, segments) = inspect(&disk).map_err(failed)?;
    if !out.json {
        out.text(&head(&dir, &sb));
    }
    let mut walk = Walk { show, out, at: None, summaries: Vec::new(), damage: Vec::new() };
    for segment in &segments {
        walk.segment(&disk, segment).map_err(failed)?;
    }
    walk.finish(&dir, &sb)
}

fn no_store(dir: &Path, why: &str) -> Problem {
    Problem::harmless(
        6994,
        format!("there is no replica in {}", dir.display()),
        why,
        "give the directory of a replica (it has a file `super`) or the name of a volume",
    )
}

/// The directory a word means: itself, or that of a volume of this target.
fn directory(word: &str, global: &Global) -> Result<PathBuf, Problem> {
    let path = Path::new(word);
    if path.is_dir() {
        return Ok(path.to_path_buf());
    }
    if word.contains('/') {
        return Err(no_store(path, "it is no directory"));
    }
    let paths = global.paths();
    let TargetReply::Status(replicas) = rpc::target(&paths, &TargetRequest::Status)? else {
        return Err(rpc::unexpected(Role::Target));
    };
    let found = replicas.into_iter().find(|r| r.name.as_str() == word);
    let volume = found.ok_or_else(|| no_store(path, "no volume of this target has the name"))?;
    let data = Config::load(&paths)?.data_dir(&paths);
    Ok(data.volumes().join(volume.volume.to_string()))
}

fn head(dir: &Path, sb: &Super) -> String {
    let row = |a: &str, b: String| vec![a.to_owned(), b];
    let unknown = sb.unknown.extents();
    table(&[
        row("replica", dir.display().to_string()),
        row("volume", format!("{}, {}", sb.volume, units::bytes(sb.size.get()))),
        row("generation", sb.generation.to_string()),
        row("base", format!("{}  ({})", sb.base, units::instant(sb.base_time))),
        row("floor", sb.floor.to_string()),
        row("unknown", if unknown == 0 { "nothing".into() } else { format!("{unknown} ranges") }),
    ])
}

#[derive(Debug, Clone, Copy)]
struct Show {
    batches: bool,
    records: bool,
}

/// What a segment holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Summary {
    segment: String,
    bytes: u64,
    sealed: bool,
    prev: Option<Lsn>,
    last: Option<Lsn>,
    batches: u64,
    records: u64,
    markers: u64,
    payload_bytes: u64,
    stored_bytes: u64,
    problem: Option<String>,
}

/// Goes over all batches in order and checks that each follows the one before.
struct Walk<'a> {
    show: Show,
    out: &'a Out,
    at: Option<(Lsn, Chain)>,
    summaries: Vec<Summary>,
    damage: Vec<String>,
}

impl Walk<'_> {
    fn segment(&mut self, disk: &dyn Disk, segment: &InspectedSegment) -> Result<(), StoreError> {
        let mut summary = Summary {
            segment: segment.name.clone(),
            bytes: segment.bytes,
            sealed: segment.trailer.is_some(),
            prev: segment.header.as_ref().map(|h| h.prev),
            last: None,
            batches: 0,
            records: 0,
            markers: 0,
            payload_bytes: 0,
            stored_bytes: 0,
            problem: segment.problem.clone(),
        };
        if let Some(header) = &segment.header {
            self.follow(&mut summary, header.prev, header.prev_chain);
            for batch in inspect_segment(disk, &segment.name)? {
                if !self.batch(&mut summary, &batch) {
                    break;
                }
            }
        }
        let promised = segment.trailer.as_ref().map(|t| (t.last, t.chain));
        if promised.is_some_and(|promised| self.at != Some(promised)) {
            summary.problem.get_or_insert("it ends before the place its trailer promises".into());
        }
        if let Some(problem) = &summary.problem {
            self.damage.push(format!("{}: {problem}", segment.name));
        }
        self.summaries.push(summary);
        Ok(())
    }

    fn follow(&mut self, summary: &mut Summary, prev: Lsn, chain: Chain) {
        if self.at.is_some_and(|at| at != (prev, chain)) {
            summary.problem.get_or_insert("it does not follow the segment before it".into());
        }
        self.at = Some((prev, chain));
    }

    /// Whether to go on behind it.
    fn batch(&mut self, summary: &mut Summary, batch: &InspectedBatch) -> bool {
        let header = &batch.header;
        if self.at != Some((header.prev, header.prev_chain)) {
            // Behind the last batch of an open segment lie left-overs of the file's earlier life.
            return false;
        }
        if let Some(problem) = &batch.problem {
            summary.problem.get_or_insert(format!("batch at {}: {problem}", batch.place));
            return false;
        }
        let last = Lsn::new(header.epoch, header.last_seq);
        self.at = Some((last, header.chain));
        summary.last = Some(last);
        summary.batches += 1;
        summary.records += u64::from(header.record_count);
        summary.payload_bytes += u64::from(header.raw_len);
        summary.stored_bytes += u64::from(header.stored_len);
        let marker = |r: &&Record| matches!(r.body, RecordBody::Marker(_));
        let markers = batch.records.iter().filter(marker).count();
        summary.markers += u64::try_from(markers).unwrap_or(0);
        if !self.out.json {
            self.tell(batch, last);
        }
        true
    }

    fn tell(&self, batch: &InspectedBatch, last: Lsn) {
        let header = &batch.header;
        if self.show.batches {
            self.out.line(format!(
                "batch at {:>10}  ({}, {last}]  {}  {} records, {} as {}",
                batch.place,
                header.prev,
                units::instant(header.first_time),
                header.record_count,
                units::bytes(header.raw_len.into()),
                units::bytes(header.stored_len.into()),
            ));
        }
        if self.show.records {
            for record in &batch.records {
                let lsn = Lsn::new(header.epoch, record.seq);
                let time = units::instant(record.time);
                self.out.line(format!("    {lsn:>12}  {time}  {}", body(&record.body)));
            }
        }
    }

    fn finish(self, dir: &Path, sb: &Super) -> Result<Exit, Failure> {
        if self.out.json {
            let journal = serde_json::json!({
                "volume": sb.volume,
                "generation": sb.generation,
                "base": sb.base,
                "floor": sb.floor,
                "segments": self.summaries,
                "damage": self.damage,
            });
            self.out.document("farshore.journal/1", "journal", &journal);
        } else {
            self.out.text(&format!("\n{}", segments(&self.summaries)));
        }
        if self.damage.is_empty() {
            return Ok(Exit::Ok);
        }
        let problem = Problem::harmless(
            6995,
            format!("the journal in {} is damaged", dir.display()),
            self.damage.join("; "),
            "check the disk; points before the damage, and after the next full copy, can be used",
        );
        Err(problem.with_risk("points that need the damaged place cannot be opened").into())
    }
}

fn segments(summaries: &[Summary]) -> String {
    let head =
        ["SEGMENT", "FROM", "TO", "BATCHES", "RECORDS", "POINTS", "PAYLOAD", "STORED", "STATE"];
    let place = |lsn: Option<Lsn>| lsn.map_or("-".into(), |l| l.to_string());
    let row = |s: &Summary| {
        let state = match (&s.problem, s.sealed) {
            (Some(problem), _) => problem.as_str(),
            (None, true) => "sealed, whole",
            (None, false) => "open, whole so far",
        };
        vec![
            s.segment.clone(),
            place(s.prev),
            place(s.last),
            s.batches.to_string(),
            s.records.to_string(),
            s.markers.to_string(),
            units::bytes(s.payload_bytes),
            units::bytes(s.stored_bytes),
            state.to_owned(),
        ]
    };
    let head = head.map(str::to_owned).to_vec();
    table(&std::iter::once(head).chain(summaries.iter().map(row)).collect::<Vec<_>>())
}

fn body(body: &RecordBody) -> String {
    match body {
        RecordBody::Write { extent, .. } => format!("write {extent}"),
        RecordBody::Copy { extent, .. } => format!("copy {extent}"),
        RecordBody::Zero { extent, copied: false } => format!("zero {extent}"),
        RecordBody::Zero { extent, copied: true } => format!("zero {extent} (copied)"),
        RecordBody::Unknown { extent } => format!("unknown {extent}"),
        RecordBody::Hash { extent, purpose, .. } => format!("hash {extent} ({purpose:?})"),
        RecordBody::Marker(m) => {
            let name = if m.name.is_empty() { String::new() } else { format!(" \"{}\"", m.name) };
            format!("marker {} {:?}{name}", m.kind.as_str(), m.state).to_lowercase()
        }
        RecordBody::MarkerCommit(id) => format!("marker commit {id}"),
        RecordBody::MarkerAbort(id) => format!("marker abort {id}"),
        RecordBody::OrderLost => "order lost".into(),
        RecordBody::OrderRestored => "order restored".into(),
        RecordBody::Resize(size) => format!("resize to {}", units::bytes(size.get())),
        RecordBody::EpochStart(e) => {
            let how = if e.continues { "continues" } else { "order lost" };
            format!("epoch start, {how}, {}", units::bytes(e.size.get()))
        }
    }
}
