//! The figures at the end of the demo.

use std::time::Duration;

use serde_json::json;

use super::load::Load;
use super::proof::Proof;
use super::stage::FirstCopy;
use super::story::{Story, count};
use crate::output::table;
use crate::units;

fn per_second(bytes: u64, time: Duration) -> u64 {
    let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1);
    u64::try_from(u128::from(bytes) * 1_000_000 / u128::from(micros)).unwrap_or(u64::MAX)
}

fn median(values: &[u64]) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

/// Prints them; with `--json` as a document.
// long because the document and the table must tell the same figures, side by side
pub fn show(copy: &FirstCopy, load: &Load, proof: &Proof, story: &Story) {
    let (fio_bytes, fio_writes) = load.fio.unwrap_or((0, 0));
    let bytes = load.stats.bytes + fio_bytes;
    let rate = per_second(bytes, load.took);
    let copy_rate = per_second(copy.size, copy.took);
    let slowest = proof.open_micros.iter().copied().max().unwrap_or(0);
    if story.out.json {
        let figures = json!({
            "first_copy": {"bytes": copy.size, "seconds": copy.took.as_secs_f64()},
            "writes": load.stats.writes + fio_writes,
            "ledger_writes": load.stats.writes,
            "fio_writes": fio_writes,
            "written_bytes": bytes,
            "bytes_per_second": rate,
            "write_micros": {"p50": load.stats.percentile(50), "p99": load.stats.percentile(99)},
            "lag_bytes": {"p50": median(&load.lags), "max": load.worst_lag},
            "drained_seconds": load.drained_in.as_secs_f64(),
            "points": proof.points,
            "proven_points": proof.open_micros.len() + 2,
            "open_micros": {"p50": median(&proof.open_micros), "max": slowest},
            "compared_bytes": proof.compared,
        });
        story.out.document("farshore.demo/1", "figures", &figures);
        return;
    }
    story.chapter("In figures");
    let row = |a: &str, b: String| vec!["  ".to_owned(), a.to_owned(), b];
    let text = table(&[
        row("first copy", format!("{} at {}/s", units::bytes(copy.size), units::bytes(copy_rate))),
        row(
            "written",
            format!(
                "{} writes, {} in {} ({}/s){}",
                count(load.stats.writes + fio_writes),
                units::bytes(bytes),
                units::span(load.took),
                units::bytes(rate),
                if fio_writes > 0 {
                    format!(", {} of the writes by fio", count(fio_writes))
                } else {
                    String::new()
                }
            ),
        ),
        row(
            "a write took",
            format!(
                "{} us in the middle, {} us at the 99th percentile, no error",
                count(load.stats.percentile(50).into()),
                count(load.stats.percentile(99).into())
            ),
        ),
        row(
            "lag",
            format!(
                "{} in the middle, {} at worst (while a daemon was dead)",
                units::bytes(median(&load.lags)),
                units::bytes(load.worst_lag)
            ),
        ),
        row(
            "points",
            format!("{} kept, {} opened and proven", proof.points, proof.open_micros.len() + 2),
        ),
        row(
            "opening one",
            format!(
                "{}.{} ms in the middle, {}.{} ms at worst",
                median(&proof.open_micros) / 1000,
                median(&proof.open_micros) % 1000 / 100,
                slowest / 1000,
                slowest % 1000 / 100
            ),
        ),
    ]);
    story.out.text(&text);
}
