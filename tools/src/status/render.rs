//! The table for people and the document for programs.

use std::time::Duration;

use farshore_blkfilter::control::{CopyWait, CopyWaits};
use farshore_extent::PairState;
use farshore_protocol::admin::SpoolLevel;

use super::merge::{Row, StatusReport, Trouble};
use crate::output::{Out, Tone, table};
use crate::units;

const HEAD: [&str; 10] = [
    "VOLUME",
    "HOST",
    "GROUP",
    "STATE",
    "RPO",
    "TARGET",
    "LAG",
    "OLDEST POINT",
    "POINTS",
    "LAST DRILL",
];

/// The document of `status --json`.
pub fn json(report: &StatusReport) -> String {
    serde_json::to_string_pretty(&document(report)).unwrap_or_default()
}

fn document(report: &StatusReport) -> serde_json::Value {
    let mut document = crate::output::document(super::SCHEMA, "status", report);
    // One level: `volumes` and `problems` stand beside `schema`.
    let map = document.as_object_mut();
    if let Some((map, serde_json::Value::Object(inner))) =
        map.and_then(|m| m.remove("status").map(|inner| (m, inner)))
    {
        map.extend(inner);
    }
    document
}

/// The table, and the problems below it.
pub fn text(report: &StatusReport, out: &Out) -> String {
    let mut rows = vec![HEAD.map(str::to_owned).to_vec()];
    rows.extend(report.volumes.iter().map(|row| cells(row, report)));
    let mut lines: Vec<String> = table(&rows).lines().map(str::to_owned).collect();
    for (line, row) in lines.iter_mut().skip(1).zip(&report.volumes) {
        let word = state(row);
        *line = line.replacen(&word, &out.paint(tone(row.state), &word), 1);
    }
    let mut text = lines.join("\n");
    text.push('\n');
    text.push_str(&copies(&report.volumes));
    text.push_str(&verifies(&report.volumes));
    text.push_str(&scrubs(&report.volumes));
    text.push_str(&spools(report));
    text.push_str(&throttles(&report.volumes));
    text.push_str(&failovers(&report.volumes));
    text.push_str(&problems(&report.problems));
    text
}

/// What is being copied: how much is left, how fast it goes, and when it will be done.
fn copies(rows: &[Row]) -> String {
    let line = |row: &Row| {
        if let Some(waits) = &row.copy_waits {
            return Some(waiting(row, waits));
        }
        let percent = row.copy_percent?;
        let left = units::bytes(row.copy_remaining);
        let end = row.copy_remaining.checked_div(row.copy_rate).map_or_else(
            || "waiting".to_owned(),
            |seconds| {
                let eta = units::span(Duration::from_secs(seconds));
                format!("at {}/s, done in about {eta}", units::bytes(row.copy_rate))
            },
        );
        Some(format!("copying {}: {percent}% done, {left} left, {end}\n", row.volume))
    };
    let lines: String = rows.iter().filter_map(line).collect();
    if lines.is_empty() { lines } else { format!("\n{lines}") }
}

/// What could be copied and waits, why, and what starts it earlier.
fn waiting(row: &Row, waits: &CopyWaits) -> String {
    let why = match waits.wait {
        CopyWait::StartTime => "as asked for",
        CopyWait::Window => "the change log was full, and resync-window is not open",
    };
    let (name, left) = (&row.volume, units::bytes(row.copy_remaining));
    let starts = units::instant_minute(waits.starts);
    format!(
        "copy of {name} starts at {starts}: {why}; {left} left, no points until then; now: \
         farshore resync {name}\n"
    )
}

/// What is being compared.
fn verifies(rows: &[Row]) -> String {
    let line = |row: &Row| {
        let verify = row.verify.as_ref().filter(|verify| verify.running)?;
        let (done, all) = (units::bytes(verify.checked_bytes), units::bytes(verify.total_bytes));
        Some(format!("verifying {}: {done} of {all} compared\n", row.volume))
    };
    let lines: String = rows.iter().filter_map(line).collect();
    if lines.is_empty() { lines } else { format!("\n{lines}") }
}

/// What is being read on the target to be verified, and what cannot be yet.
fn scrubs(rows: &[Row]) -> String {
    let line = |row: &Row| {
        let scrub = row.scrub.as_ref()?;
        let name = &row.volume;
        if scrub.unverified_bytes > 0 {
            let left = units::bytes(scrub.unverified_bytes);
            return Some(format!("{name}: {left} of its base image have no checksums yet\n"));
        }
        let done = units::bytes(scrub.verified_bytes?);
        Some(format!("scrubbing {name}: {done} verified\n"))
    };
    let lines: String = rows.iter().filter_map(line).collect();
    if lines.is_empty() { lines } else { format!("\n{lines}") }
}

/// What waits on the source's disk, and why.
fn spools(report: &StatusReport) -> String {
    let line = |row: &Row| {
        let spool = row.spool.as_ref()?;
        let doing = match spool.level {
            SpoolLevel::Direct => return None,
            SpoolLevel::Spooling => "spooling",
            SpoolLevel::Draining => "spool is being sent",
            SpoolLevel::Full => "spool is full",
            SpoolLevel::Failed => "spool cannot be written",
        };
        let age = |since| units::span(report.now.since(since));
        let since =
            spool.since.map_or(String::new(), |t| format!(", oldest change {} ago", age(t)));
        let merged = spool.merged.map_or(String::new(), |m| {
            let (from, to) = (units::instant(m.from), units::instant(m.to));
            format!("; {} points merged between {from} and {to}", m.points)
        });
        Some(format!("{}: {doing}, {}{since}{merged}\n", row.volume, units::bytes(spool.bytes)))
    };
    let lines: String = report.volumes.iter().filter_map(line).collect();
    if lines.is_empty() { lines } else { format!("\n{lines}") }
}

/// Whose writes are slowed down now.
fn throttles(rows: &[Row]) -> String {
    let line = |row: &Row| {
        let throttle = row.throttle.as_ref().filter(|throttle| throttle.delay_ms > 0)?;
        let (now, most) = (throttle.delay_ms, throttle.longest_ms);
        Some(format!(
            "{}: each write waits {now} ms (at most {most}): the pool is nearly full\n",
            row.volume
        ))
    };
    let lines: String = rows.iter().filter_map(line).collect();
    if lines.is_empty() { lines } else { format!("\n{lines}") }
}

/// What was failed over, and what its old source does.
fn failovers(rows: &[Row]) -> String {
    let line = |row: &Row| {
        let name = &row.volume;
        let here = row.failover.as_ref().map(|f| {
            let (phase, time) = (f.phase.as_str(), units::instant(f.time));
            let since = units::instant(f.fenced_since);
            format!("{name}: failed over to {time}, {phase}; its source is fenced since {since}\n")
        });
        let there = row
            .read_only
            .then(|| format!("{name}: takes no writes on this host, because it was failed over\n"));
        here.unwrap_or_default() + &there.unwrap_or_default()
    };
    let lines: String = rows.iter().map(line).collect();
    if lines.is_empty() { lines } else { format!("\n{lines}") }
}

fn tone(state: PairState) -> Tone {
    match state {
        PairState::Protected => Tone::Good,
        PairState::InitialSync
        | PairState::Lagging
        | PairState::CatchUp
        | PairState::Resync
        | PairState::Paused
        | PairState::Reversing
        | PairState::FailedOverPending => Tone::Warn,
        PairState::Unprotected | PairState::Broken | PairState::FailedOverCommitted => Tone::Bad,
    }
}

fn state(row: &Row) -> String {
    row.copy_percent
        .map_or_else(|| row.state.as_str().to_owned(), |p| format!("{}  {p}%", row.state.as_str()))
}

fn cells(row: &Row, report: &StatusReport) -> Vec<String> {
    let ms = |ms: u64| Duration::from_millis(ms);
    let missed = row.rpo_ms.zip(row.rpo_target_ms).is_some_and(|(is, wanted)| {
        // The source alone knows only the interval: just before the next point the newest may be
        // one interval old, and the way to the target comes on top.
        let slack = if row.journal_bytes.is_some() { 1 } else { 2 };
        is > wanted.saturating_mul(slack)
    });
    let rpo = row.rpo_ms.map_or("-".into(), |v| units::span(ms(v)));
    vec![
        row.volume.to_string(),
        row.host.clone().unwrap_or_else(|| "-".into()),
        row.group.clone().unwrap_or_else(|| "-".into()),
        state(row),
        if missed { format!("{rpo} !") } else { rpo },
        row.rpo_target_ms.map_or("-".into(), |v| units::Interval(ms(v)).to_string()),
        units::bytes(row.lag_bytes),
        row.oldest_point.map_or("-".into(), |t| units::span(report.now.since(t))),
        row.points.to_string(),
        row.last_drill.map_or("never".into(), |t| units::ago(report.now, t)),
    ]
}

fn problems(problems: &[Trouble]) -> String {
    let Some(count) = std::num::NonZeroUsize::new(problems.len()) else {
        return String::new();
    };
    let word = if count.get() == 1 { "1 problem:" } else { &format!("{count} problems:") };
    let indent = " ".repeat(word.len());
    let row = |(i, t): (usize, &Trouble)| {
        vec![
            if i == 0 { word.to_owned() } else { indent.clone() },
            t.volume.as_ref().map_or("-".into(), ToString::to_string),
            format!("{} {}", t.problem.code, t.problem.what),
            format!("farshore explain {}", t.problem.code),
        ]
    };
    format!("\n{}", table(&problems.iter().enumerate().map(row).collect::<Vec<_>>()))
}

#[cfg(test)]
pub mod tests_data {
    //! Three volumes: well, slow, and being copied.
    use farshore_blkfilter::control::{
        Attachment, BackendKind, CopyProgress, IntentInfo, ThrottleInfo, VerifyProgress,
        VolumeInfo, VolumeStatus,
    };
    use farshore_extent::{
        BlockSizes, CaptureOrder, Epoch, Lsn, PairState, Problem, Seq, VolumeId, VolumeName,
        VolumeSize, WallTime,
    };
    use farshore_protocol::admin::{AgentStatus, AgentVolume, ReplicaStatus};

    use crate::status::collect::Sides;

    /// The instant at which the tests look.
    pub const NOW: WallTime = WallTime::from_nanos(1_795_252_440_000_000_000);

    fn back(seconds: i64) -> WallTime {
        WallTime::from_nanos(NOW.nanos() - seconds * 1_000_000_000)
    }

    fn replica(n: u8, name: &str, host: &str) -> ReplicaStatus {
        let at = |seq| Lsn::new(Epoch::new(3), Seq::new(seq));
        ReplicaStatus {
            volume: VolumeId::from_bytes([n; 16]),
            name: VolumeName::new(name).unwrap(),
            host_name: host.into(),
            size: VolumeSize::new(10 << 30).unwrap(),
            state: PairState::Protected,
            order: CaptureOrder::Ordered,
            connected: true,
            rpo_ms: Some(3120),
            rpo_target_ms: 30_000,
            lag_bytes: 2_202_000,
            copy_remaining: 0,
            copy_total: 0,
            copy_rate: 0,
            journaled: at(1042),
            floor: at(7),
            points: 288,
            newest_point: Some(back(3)),
            oldest_point: Some(back(86_280)),
            views: 1,
            journal_bytes: 7 << 30,
            held_bytes: 0,
            digests: 0,
            differing: 0,
            last_scrub: Some(back(86_400)),
            scrub_found: 0,
            scrub_bytes: None,
            unverified_bytes: 0,
            last_drill: Some(back(180_000)),
            problems: Vec::new(),
            failover: None,
        }
    }

    /// What the roles would answer.
    // long because it is the data of one example, field by field
    pub fn sides() -> Sides {
        let slow = Problem::harmless(
            3107,
            "link slower than change rate for 4 min (18 vs 26 MiB/s)",
            "the change rate is above what the link carries",
            "wait, or widen the link",
        );
        let files = ReplicaStatus {
            state: PairState::Lagging,
            rpo_ms: Some(252_000),
            rpo_target_ms: 60_000,
            lag_bytes: 3_650_722_202,
            last_drill: None,
            points: 271,
            problems: vec![slow],
            ..replica(2, "files", "nas2")
        };
        let mail = ReplicaStatus {
            state: PairState::Resync,
            copy_remaining: 36 << 28,
            copy_total: 100 << 28,
            copy_rate: 40 << 20,
            ..replica(3, "mail", "mx1")
        };
        let pgdata = replica(1, "pgdata", "db1");
        let known = AgentVolume {
            volume: pgdata.volume,
            name: pgdata.name.clone(),
            problem: None,
            sent: pgdata.journaled,
            journaled: pgdata.journaled,
            journaled_time: back(1),
            points: 280,
            newest_point: pgdata.newest_point,
            oldest_point: pgdata.oldest_point,
            raw_bytes: 1 << 30,
            wire_bytes: 1 << 29,
            spool: farshore_protocol::admin::SpoolInfo::default(),
        };
        let source = VolumeStatus {
            info: VolumeInfo {
                volume: pgdata.volume,
                name: pgdata.name.clone(),
                backing: "/dev/vdb".into(),
                backend: BackendKind::Block,
                size: pgdata.size,
                blocks: BlockSizes::new(512, 4096).unwrap(),
                attachment: Attachment::Ublk { number: 0, device: "/dev/ublkb0".into() },
                link: Some("/dev/farshore/pgdata".into()),
                epoch: Epoch::new(3),
                point_interval_ms: Some(30_000),
            },
            order: CaptureOrder::Ordered,
            reason: String::new(),
            copy: CopyProgress::default(),
            copy_waits: None,
            verify: VerifyProgress::default(),
            captured: pgdata.journaled,
            released: pgdata.journaled,
            durable: pgdata.journaled,
            oldest_unreleased: back(1),
            pool_used: 2_202_010,
            pool_bytes: 64 << 20,
            clients: 1,
            writes: 1000,
            written_bytes: 4 << 20,
            reads: 10,
            backing_errors: 0,
            intent: Some(IntentInfo { marked: 7, cap: 1024, region_bytes: 16 << 20, kept: true }),
            throttle: Some(ThrottleInfo { longest_ms: 20, delay_ms: 5, writes: 31 }),
            fenced: None,
            read_only: false,
        };
        let agent = AgentStatus {
            target: "backup:9443".into(),
            connected: true,
            problem: None,
            retry_in_ms: None,
            volumes: vec![known],
        };
        Sides {
            filterd: Some(vec![source]),
            agent: Some(agent),
            target: Some(vec![pgdata, files, mail]),
            silent: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use farshore_extent::CaptureOrder;

    use super::tests_data::{NOW, sides};
    use super::*;
    use crate::args::Global;
    use crate::status::merge::merge;

    #[test]
    fn the_table_reads_as_in_the_design() {
        let out = Out::new(&Global::default());
        let expected = "\
VOLUME  HOST  GROUP  STATE        RPO      TARGET  LAG      OLDEST POINT  POINTS  LAST DRILL
files   nas2  -      lagging      4m12s !  1m      3.4 GiB  23h58m        271     never
mail    mx1   -      resync  64%  3.1s     30s     2.0 MiB  23h58m        288     2d ago
pgdata  db1   -      protected    3.1s     30s     2.1 MiB  23h58m        288     2d ago

copying mail: 64% done, 9 GiB left, at 40 MiB/s, done in about 3m50s

pgdata: each write waits 5 ms (at most 20): the pool is nearly full

1 problem:  files  FS-3107 link slower than change rate for 4 min (18 vs 26 MiB/s)  farshore explain FS-3107
";
        assert_eq!(text(&merge(&sides(), NOW), &out), expected);
    }

    #[test]
    fn a_copy_that_waits_says_why_until_when_and_what_starts_it() {
        let mut sides = sides();
        let source = sides.filterd.iter_mut().flatten().next().unwrap();
        source.order = CaptureOrder::CatchUp;
        source.copy.remaining_bytes = 100 << 30;
        for (wait, why) in [(CopyWait::StartTime, "as asked for"), (CopyWait::Window, "was full")] {
            source_waits(&mut sides, wait);
            let told = text(&merge(&sides, NOW), &Out::new(&Global::default()));
            let starts = crate::units::instant_minute(NOW);
            assert!(told.contains(&format!("copy of pgdata starts at {starts}: ")), "{told}");
            assert!(told.contains(why) && told.contains("now: farshore resync pgdata"), "{told}");
        }
    }

    fn source_waits(sides: &mut crate::status::collect::Sides, wait: CopyWait) {
        for source in sides.filterd.iter_mut().flatten() {
            source.copy_waits = Some(CopyWaits { wait, starts: NOW });
        }
    }

    #[test]
    fn the_document_is_a_contract() {
        crate::status::golden::same("status.json", &document(&merge(&sides(), NOW)));
    }
}
