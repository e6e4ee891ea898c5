//! `farshore store check`: everything of a replica's store read and verified, from its folder alone.

use std::path::PathBuf;

use clap::Subcommand;
use farshore_extent::Problem;
use farshore_target::extract::check_store;
use farshore_target::store::{CheckReport, Finding};

use crate::args::Global;
use crate::exit::{Exit, Failure};
use crate::extract::{Progress, raise_file_limit};
use crate::output::{Out, table};
use crate::units;

/// Version of the document.
const SCHEMA: &str = "farshore.store-check/1";

/// Ranges shown of one finding.
const SHOWN: usize = 8;

/// `store …`
#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Read and verify every byte of a store; say which points what is wrong spoils
    Check {
        /// The folder of a replica: it has a file `super`
        store: PathBuf,
    },
}

/// `farshore store …`: 0 all is well, 1 something is wrong, anything else: it cannot be checked.
pub fn run(command: &StoreCommand, _: &Global, out: &Out) -> Result<Exit, Failure> {
    let StoreCommand::Check { store } = command;
    raise_file_limit();
    let mut progress = Progress::new(out);
    let report = match check_store(store, &mut |done, all| progress.at(done, all)) {
        Ok(report) => report,
        Err(problem) => {
            let failure = Failure::from(problem);
            out.failure(&failure);
            return Ok(not_checked(&failure));
        }
    };
    if out.json {
        out.document(SCHEMA, "check", &report);
        return Ok(if report.findings.is_empty() { Exit::Ok } else { Exit::Failed });
    }
    out.text(&head(&report));
    for note in &report.notes {
        out.line(format!("note: {note}"));
    }
    for finding in &report.findings {
        out.text(&told(finding));
    }
    if report.findings.is_empty() {
        out.line("everything is as it was written");
        return Ok(Exit::Ok);
    }
    let count = report.findings.len() as u64 + report.more;
    let problem = Problem::harmless(
        6709,
        format!("{count} findings in the store {}", store.display()),
        "what the files hold is not what was written to them",
        "check the disk; points that are not named are whole (farshore extract --list)",
    );
    Err(problem
        .with_risk("what is named above cannot be read; it is never given out as good")
        .into())
}

/// A damaged super block is something wrong; whatever else kept it from being opened says nothing
/// about the store.
fn not_checked(failure: &Failure) -> Exit {
    let damaged = failure.problems().iter().any(|problem| problem.code.0 == 6004);
    match failure.exit() {
        Exit::Failed if !damaged => Exit::Unreachable,
        exit => exit,
    }
}

fn head(report: &CheckReport) -> String {
    let row = |a: &str, b: String| vec![a.to_owned(), b];
    table(&[
        row("volume", format!("{}, {}", report.volume, units::bytes(report.size.get()))),
        row("history", format!("{} to {}, base at {}", report.floor, report.end, report.base)),
        row("points", report.points.to_string()),
        row(
            "read",
            format!(
                "{}: {} segments, {} batches, {} frames",
                units::bytes(report.bytes),
                report.segments,
                report.batches,
                report.frames
            ),
        ),
    ])
}

fn told(finding: &Finding) -> String {
    let place = finding.place.map_or(String::new(), |place| format!(" at {place}"));
    let mut text = format!("{}{place}: {}\n", finding.file, finding.what);
    if finding.range_bytes > 0 {
        let named: Vec<String> =
            finding.ranges.iter().take(SHOWN).map(ToString::to_string).collect();
        let bytes = units::bytes(finding.range_bytes);
        text.push_str(&format!("  ranges  {bytes}: {}\n", named.join(", ")));
    }
    let points = match (finding.first_point, finding.last_point) {
        (Some(first), Some(last)) if finding.points > 1 => {
            format!("{}: {first} to {last}", finding.points)
        }
        (Some(one), _) => format!("1: {one}"),
        (None, _) => "none".to_owned(),
    };
    text.push_str(&format!("  points  {points}\n"));
    text
}

#[cfg(test)]
mod tests {
    use farshore_extent::{Epoch, Extent, Lsn, Seq, VolumeId, VolumeSize};

    use super::*;

    fn report() -> CheckReport {
        let lsn = |seq| Lsn::new(Epoch::new(3), Seq::new(seq));
        CheckReport {
            volume: VolumeId::from_bytes([7; 16]),
            size: VolumeSize::new(1 << 30).unwrap(),
            floor: lsn(10),
            base: lsn(10),
            end: lsn(900),
            points: 12,
            segments: 2,
            batches: 40,
            frames: 160,
            bytes: 70 << 20,
            findings: vec![Finding {
                file: "seg-0000000000000002".into(),
                place: Some(8192),
                what: "batch: the content of the batch does not match its chain".into(),
                ranges: vec![Extent::new(4096, 8192).unwrap()],
                range_bytes: 8192,
                points: 3,
                first_point: Some(lsn(100)),
                last_point: Some(lsn(300)),
            }],
            more: 0,
            notes: vec!["lost-seg-1 was put aside by recovery and is never read".into()],
        }
    }

    #[test]
    fn a_check_as_json_is_a_contract() {
        let document = crate::output::document(SCHEMA, "check", &report());
        crate::status::golden::same("store_check.json", &document);
    }

    #[test]
    fn a_finding_names_file_place_ranges_and_points() {
        let text = told(&report().findings[0]);
        for part in ["seg-0000000000000002 at 8192", "8 KiB", "3: 3.100 to 3.300"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
