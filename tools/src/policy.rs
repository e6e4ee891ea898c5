//! `farshore policy …`: which points stay, and what another rule would keep.

use clap::Subcommand;
use farshore_extent::{Problem, VolumeName, WallTime};
use farshore_protocol::admin::{PolicyInfo, PolicyReport, SetPolicy, TargetReply, TargetRequest};
use farshore_protocol::paths::Paths;

use crate::args::{Global, interval, volume_name};
use crate::ask::confirm;
use crate::exit::{Exit, Failure};
use crate::output::{Out, table};
use crate::rpc::{self, Role};
use crate::units::{self, Interval};

/// Version of the documents.
const SCHEMA: &str = "farshore.policy/1";

/// `policy …`
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Policies that have a name
    List,
    /// The policy of a volume, and what it keeps now
    Show {
        /// Which volume
        #[arg(value_parser = volume_name)]
        volume: VolumeName,
    },
    /// Give a volume another policy
    Set {
        /// Which volume
        #[arg(value_parser = volume_name)]
        volume: VolumeName,
        /// A name (see `policy list`), tiers such as all:1h,1m:24h,1h:7d, one time such as 24h, or
        /// `default`
        policy: String,
        /// Cut points so often from now on
        #[arg(long, value_name = "TIME", value_parser = interval)]
        every: Option<Interval>,
        /// Show what would stay and go, and what it costs in space; change nothing
        #[arg(long)]
        preview: bool,
    },
}

/// `farshore policy …`
pub fn run(command: &PolicyCommand, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let paths = global.paths();
    match command {
        PolicyCommand::List => list(&paths, out)?,
        PolicyCommand::Show { volume } => {
            let report = ask(&paths, &TargetRequest::Policy { volume: volume.clone() })?;
            if out.json {
                out.document(SCHEMA, "policy", &report);
            } else {
                out.text(&text(&report, WallTime::now()));
            }
        }
        PolicyCommand::Set { volume, policy, every, preview } => {
            let set = SetPolicy {
                volume: volume.clone(),
                policy: policy.trim().to_owned(),
                interval_ms: every.map(Interval::millis),
                preview: *preview || global.dry_run,
            };
            change(set, global, out)?;
        }
    }
    Ok(Exit::Ok)
}

fn ask(paths: &Paths, request: &TargetRequest) -> Result<PolicyReport, Problem> {
    match rpc::target(paths, request)? {
        TargetReply::Policy(report) => Ok(*report),
        _ => Err(rpc::unexpected(Role::Target)),
    }
}

fn list(paths: &Paths, out: &Out) -> Result<(), Problem> {
    let TargetReply::Policies(policies) = rpc::target(paths, &TargetRequest::Policies)? else {
        return Err(rpc::unexpected(Role::Target));
    };
    if out.json {
        out.document(SCHEMA, "policies", &policies);
        return Ok(());
    }
    let head = ["POLICY", "FROM", "POINTS EVERY", "VOLUMES", "TIERS"].map(str::to_owned).to_vec();
    let row = |p: &PolicyInfo| {
        let from = if p.built_in { "built in" } else { "target.toml" };
        let default = if p.default { " (default)" } else { "" };
        let every = p.interval_ms.map_or("-".to_owned(), every);
        let volumes = p.volumes.len().to_string();
        vec![format!("{}{default}", p.name), from.into(), every, volumes, p.tiers.clone()]
    };
    out.text(&table(&std::iter::once(head).chain(policies.iter().map(row)).collect::<Vec<_>>()));
    out.hint("presets take 0 to 24 hours too (every-30s-4h); tiers can be given without a name");
    Ok(())
}

fn change(set: SetPolicy, global: &Global, out: &Out) -> Result<(), Problem> {
    let preview = SetPolicy { preview: true, ..set.clone() };
    let told = ask(&global.paths(), &TargetRequest::SetPolicy(preview))?;
    if set.preview {
        if out.json {
            out.document(SCHEMA, "preview", &told);
        } else {
            out.text(&text(&told, WallTime::now()));
            out.line("nothing was changed");
        }
        return Ok(());
    }
    if told.go > 0 {
        let question =
            format!("{} of {} points of {} go for good", told.go, told.go + told.stay, told.volume);
        confirm(&question, global)?;
    }
    let done = ask(&global.paths(), &TargetRequest::SetPolicy(set))?;
    if out.json {
        out.document(SCHEMA, "policy", &done);
    } else {
        out.text(&text(&done, WallTime::now()));
        let every = every(done.interval_ms);
        out.line(format!("{} is kept by {} from now on", done.volume, done.policy));
        out.hint(format!("points are cut every {every}; another interval: --every TIME"));
    }
    Ok(())
}

fn every(ms: u64) -> String {
    Interval(std::time::Duration::from_millis(ms)).to_string()
}

/// What stays by which tier, and what it costs.
fn text(report: &PolicyReport, now: WallTime) -> String {
    let whose = if report.default { "of the target's configuration" } else { "of its own" };
    let mut text = format!("{}: {} ({whose})\n", report.volume, report.policy);
    let age = |time: Option<WallTime>| time.map_or("-".to_owned(), |t| units::ago(now, t));
    let head = ["TIER", "KEEPS", "OLDEST"].map(str::to_owned).to_vec();
    let rows = report
        .tiers
        .iter()
        .map(|tier| vec![tier.tier.clone(), tier.points.to_string(), age(tier.oldest_point)]);
    text.push_str(&table(&std::iter::once(head).chain(rows).collect::<Vec<_>>()));
    let oldest = report.oldest_point.map_or("-".to_owned(), units::instant);
    let (stay, go) = (report.stay, report.go);
    text.push_str(&format!(
        "points   {stay} stay, {go} go; the oldest that stays is of {oldest}\n"
    ));
    text.push_str(&format!("floor    {}", report.floor));
    if report.floor_then > report.floor {
        text.push_str(&format!(" -> {}", report.floor_then));
    }
    text.push_str(&format!("\njournal  {}, ", units::bytes(report.journal_bytes)));
    text.push_str(&match report.freed_bytes {
        Some(0) => "none of it is freed".to_owned(),
        Some(freed) => format!("about {} before the new floor is freed", units::bytes(freed)),
        None => "how much is freed is not known: the replica is not open".to_owned(),
    });
    if let Some(full) = report.full_bytes {
        let full = units::bytes(full);
        text.push_str(&format!("; about {full} at this rate when the policy is full"));
    }
    text.push_str(
        "\n         Points that go between others free no space: the journal is kept whole from \
         the floor on,\n         and every moment since then can be opened.\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use farshore_extent::{Epoch, Lsn, Seq};
    use farshore_protocol::admin::TierReport;

    use super::*;

    const NOW: WallTime = WallTime::from_nanos(1_795_252_500_123_000_000);

    fn report() -> PolicyReport {
        let time = WallTime::from_nanos(1_795_252_440_123_000_000);
        let at = |n| Lsn::new(Epoch::new(3), Seq::new(n));
        let tier = |tier: &str, points, oldest_point| TierReport {
            tier: tier.into(),
            points,
            oldest_point,
        };
        PolicyReport {
            volume: VolumeName::new("pgdata").unwrap(),
            policy: "all:1h,1m:24h".into(),
            default: false,
            tiers: vec![
                tier("all:1h", 720, Some(time)),
                tier("1m:24h", 1440, Some(time)),
                tier("named", 0, None),
                tier("newest", 1, Some(time)),
            ],
            interval_ms: 5_000,
            stay: 2_100,
            go: 900,
            oldest_point: Some(time),
            floor: at(5),
            floor_then: at(1042),
            journal_bytes: 12 << 30,
            freed_bytes: Some(10 << 30),
            full_bytes: Some(14 << 30),
        }
    }

    #[test]
    fn policies_as_json_are_a_contract() {
        let info = PolicyInfo {
            name: "every-30s".into(),
            tiers: "30s:1h,1h:24h,app-all:24h".into(),
            built_in: true,
            default: false,
            interval_ms: Some(30_000),
            volumes: vec![VolumeName::new("pgdata").unwrap()],
        };
        let document = crate::output::document(SCHEMA, "policies", &[info]);
        crate::status::golden::same("policies.json", &document);
        let document = crate::output::document(SCHEMA, "preview", &report());
        crate::status::golden::same("policy.json", &document);
    }

    #[test]
    fn a_preview_says_what_goes_and_what_it_frees() {
        let told = text(&report(), NOW);
        for part in [
            "pgdata: all:1h,1m:24h (of its own)",
            "1m:24h  1440   1m00s ago",
            "2100 stay, 900 go",
            "3.5 -> 3.1042",
            "12 GiB, about 10 GiB before the new floor is freed; about 14 GiB at this rate",
            "free no space",
        ] {
            assert!(told.contains(part), "{part} in {told}");
        }
        let longer = PolicyReport { floor_then: report().floor, freed_bytes: Some(0), ..report() };
        assert!(text(&longer, NOW).contains("none of it is freed"));
    }
}
