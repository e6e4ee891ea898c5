//! `farshore point …`: what can be opened, and naming a moment.

use clap::Subcommand;
use farshore_extent::{PointKind, Problem, VolumeName, WallTime};
use farshore_protocol::admin::{AgentReply, AgentRequest, PointInfo, TargetReply, TargetRequest};

use crate::args::{Global, volume_name};
use crate::exit::{Exit, Failure};
use crate::output::{Out, table};
use crate::rpc::{self, Role};
use crate::units;

/// `point …`
#[derive(Debug, Subcommand)]
pub enum PointCommand {
    /// Points of a volume, newest first
    List {
        /// Which volume
        #[arg(value_parser = volume_name)]
        volume: VolumeName,
        /// At most so many; 0 is all
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
    /// Cut a named point now and wait until it is durable at the target
    Tag {
        /// Volumes of one host; the point is one instant over all of them
        #[arg(required = true, value_parser = volume_name)]
        volumes: Vec<VolumeName>,
        /// Name of the point, to be used as `--point tag:NAME`
        #[arg(long)]
        name: String,
        /// Make the applications quiet for it: hooks and freeze, as freezer.toml on the source says
        #[arg(long)]
        app: bool,
    },
}

/// `farshore point …`
pub fn run(command: &PointCommand, global: &Global, out: &Out) -> Result<Exit, Failure> {
    match command {
        PointCommand::List { volume, limit } => {
            let request = TargetRequest::Points { volume: volume.clone(), limit: *limit };
            let TargetReply::Points(points) = rpc::target(&global.paths(), &request)? else {
                return Err(rpc::unexpected(Role::Target).into());
            };
            list(&points, *limit, out);
        }
        PointCommand::Tag { volumes, name, app } => return tag(volumes, name, *app, global, out),
    }
    Ok(Exit::Ok)
}

fn list(points: &[PointInfo], limit: u32, out: &Out) {
    if out.json {
        out.document("farshore.points/1", "points", &points);
        return;
    }
    out.text(&text(points, WallTime::now()));
    for point in points {
        if let Some(note) = &point.note {
            out.line(format!("{} {note}: {}", point.point, note.why));
        }
    }
    if points.is_empty() {
        out.hint("no point yet: the first is cut when the first copy is complete");
    } else if u32::try_from(points.len()) == Ok(limit) {
        out.hint(format!("the newest {limit}; --limit 0 shows all"));
    }
}

fn text(points: &[PointInfo], now: WallTime) -> String {
    let head = ["POINT", "TIME", "AGE", "KIND", "NAME", "KEPT", "LSN"].map(str::to_owned).to_vec();
    let row = |p: &PointInfo| {
        vec![
            p.point.to_string(),
            units::instant(p.time),
            units::span(now.since(p.time)),
            p.kind.as_str().to_owned(),
            if p.name.is_empty() { "-".into() } else { p.name.clone() },
            if p.pinned { "pinned" } else { "policy" }.to_owned(),
            p.lsn.to_string(),
        ]
    };
    table(&std::iter::once(head).chain(points.iter().map(row)).collect::<Vec<_>>())
}

fn tag(
    volumes: &[VolumeName],
    name: &str,
    app: bool,
    global: &Global,
    out: &Out,
) -> Result<Exit, Failure> {
    let allowed = 1..=farshore_changelog::limits::MAX_MARKER_NAME;
    if !allowed.contains(&name.len()) || name.chars().any(char::is_control) {
        let problem = Problem::harmless(
            1908,
            format!("`{}` cannot be the name of a point", name.escape_debug()),
            "a name has 1 to 255 bytes and no control characters",
            "choose another name",
        );
        return Err(problem.into());
    }
    let shown: Vec<_> = volumes.iter().map(ToString::to_string).collect();
    let shown = shown.join(", ");
    if global.dry_run {
        out.line(format!("would cut a point named \"{name}\" of {shown}"));
        return Ok(Exit::Ok);
    }
    let request = TargetRequest::Tag {
        volumes: volumes.to_vec(),
        name: name.to_owned(),
        kind: if app { PointKind::App } else { PointKind::Crash },
    };
    let paths = global.paths();
    if !paths.target_socket().exists() && paths.agent_socket().exists() {
        return tag_here(volumes, name, app, global, out);
    }
    let TargetReply::Tagged(points) = rpc::target(&paths, &request)? else {
        return Err(rpc::unexpected(Role::Target).into());
    };
    if out.json {
        out.document("farshore.points/1", "points", &points);
    } else {
        for p in &points {
            let time = units::instant(p.time);
            out.line(format!("{} is {} at {time}, durable at the target", p.point, p.volume));
        }
        out.hint(format!("open it: farshore failover test {} --point 'tag:{name}'", volumes[0]));
    }
    let less = points.iter().find(|p| app && p.kind != PointKind::App);
    if let (Some(point), false) = (less, out.json) {
        tell_kind(point.kind, point.note.as_ref(), out);
    }
    Ok(if points.len() == volumes.len() && less.is_none() { Exit::Ok } else { Exit::Partial })
}

/// On a source host: the agent cuts it, and it arrives at the target with the changes before it.
fn tag_here(
    volumes: &[VolumeName],
    name: &str,
    app: bool,
    global: &Global,
    out: &Out,
) -> Result<Exit, Failure> {
    let request = AgentRequest::Tag { volumes: volumes.to_vec(), name: name.to_owned(), app };
    let AgentReply::Tagged(cut) = rpc::agent(&global.paths(), &request)? else {
        return Err(rpc::unexpected(Role::Agent).into());
    };
    let less = app && cut.kind != PointKind::App;
    if out.json {
        out.document("farshore.cut-point/1", "point", &cut);
    } else {
        let time = units::instant(cut.time);
        out.line(format!("\"{name}\" was cut at {time}, place {}; it is on its way", cut.lsn));
        if less {
            tell_kind(cut.kind, cut.note.as_ref(), out);
        }
    }
    Ok(if less { Exit::Partial } else { Exit::Ok })
}

/// Says what a point is instead of application-consistent, and why.
fn tell_kind(kind: PointKind, note: Option<&Problem>, out: &Out) {
    out.line(format!("not application-consistent: its kind is {}", kind.as_str()));
    match note {
        Some(note) => {
            out.line(format!("  {note}"));
            out.line(format!("  why    {}", note.why));
            out.line(format!("  next   {}", note.next));
        }
        None => out.line("  the agent's log on the source says why (farshore event list there)"),
    }
}

#[cfg(test)]
mod tests {
    use farshore_extent::{Epoch, Lsn, PointId, Seq};

    use super::*;

    fn point() -> PointInfo {
        PointInfo {
            point: PointId::new(312),
            volume: VolumeName::new("pgdata").unwrap(),
            lsn: Lsn::new(Epoch::new(3), Seq::new(1042)),
            time: WallTime::from_nanos(1_795_252_440_123_000_000),
            kind: PointKind::App,
            name: "before-upgrade".into(),
            pinned: true,
            note: None,
        }
    }

    #[test]
    fn points_as_json_are_a_contract() {
        let document = crate::output::document("farshore.points/1", "points", &[point()]);
        crate::status::golden::same("points.json", &document);
    }

    #[test]
    fn a_point_is_one_line() {
        let text = text(&[point()], WallTime::from_nanos(1_795_252_500_123_000_000));
        let line = text.lines().nth(1).unwrap();
        for part in ["p-312", "1m00s", "app", "before-upgrade", "pinned", "3.1042"] {
            assert!(line.contains(part), "{part} in {line}");
        }
    }
}
