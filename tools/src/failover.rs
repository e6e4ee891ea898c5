//! `farshore failover`: a point as a disk to try it, to go on from it, or to make it an image of its
//! own.

mod live;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use farshore_extent::{Problem, ViewId, VolumeName, WallTime};
use farshore_protocol::admin::{
    FlattenState, FlattenView, OpenView, TargetReply, TargetRequest, ViewInfo,
};
use farshore_protocol::paths::Paths;

use crate::args::{Global, bytes, volume_name};
use crate::exit::{Exit, Failure};
use crate::output::{Out, table};
use crate::rpc::{self, Role};
use crate::{choose, units};

/// Between two looks at what is waited for.
pub(crate) const LOOK: Duration = Duration::from_millis(100);

/// Version of the document.
const SCHEMA: &str = "farshore.views/1";

/// `failover …`
#[derive(Debug, Subcommand)]
pub enum FailoverCommand {
    /// Open a point as a writable disk; replication is not touched
    Test {
        /// Which volume
        #[arg(value_parser = volume_name)]
        volume: VolumeName,
        /// latest, app, p-12, tag:NAME, lsn:EPOCH.SEQ, or a time such as '2026-11-21 10:14'
        #[arg(long, default_value = "latest")]
        point: String,
        /// Make it also a block device of this host, ready to be mounted
        #[arg(long)]
        device: bool,
        /// Let nothing be written; a file system is then mounted without replaying its journal
        #[arg(long)]
        read_only: bool,
        /// Serve it also over the network, with TLS, on this address
        #[arg(long, value_name = "HOST:PORT")]
        tls: Option<String>,
        /// Most bytes of writes it may take; the volume's size if not given
        #[arg(long, value_name = "SIZE", value_parser = bytes)]
        scratch: Option<u64>,
    },
    /// Close what a test opened and drop what was written to it
    Cleanup {
        /// The view or its volume; may be left out when only one is open
        view: Option<String>,
        /// What was learnt; kept as evidence in the event log
        #[arg(long, default_value = "")]
        note: String,
    },
    /// Copy what a view shows into an image of its own, verify it, and let the view go on in it:
    /// nothing of the replica is needed for it then
    Flatten {
        /// The view or its volume; may be left out when only one is open
        view: Option<String>,
        /// A file that does not exist yet, or a block device that nobody uses, on the target host
        #[arg(long, value_name = "FILE|DEVICE", required_unless_present = "stop")]
        to: Option<PathBuf>,
        /// Replace what lies there
        #[arg(long)]
        force: bool,
        /// At most so many bytes a second; as the target's configuration says if not given
        #[arg(long, value_name = "SIZE", value_parser = bytes)]
        rate: Option<u64>,
        /// Wait for its end
        #[arg(long)]
        wait: bool,
        /// Stop it; started again with the same --to it goes on
        #[arg(long, conflicts_with_all = ["to", "wait", "force", "rate"])]
        stop: bool,
    },
    /// Points that are open
    List,
    /// The source is gone: go on from a point of its replica, here; or choose another point
    Unplanned(live::UnplannedArgs),
    /// Take the source back: close what a failover has opened, and drop what was written to it
    Cancel {
        /// Which volume
        #[arg(value_parser = volume_name)]
        volume: VolumeName,
        /// Return when the job is recorded; it goes on by itself
        #[arg(long)]
        no_wait: bool,
    },
    /// Where a volume is, what a failover to its newest point would cost, and how to use what is open
    Show {
        /// Which volume
        #[arg(value_parser = volume_name)]
        volume: VolumeName,
    },
}

/// `farshore failover …`
pub fn run(command: &FailoverCommand, global: &Global, out: &Out) -> Result<Exit, Failure> {
    match command {
        FailoverCommand::Test { volume, point, device, read_only, tls, scratch } => {
            let request = OpenView {
                scratch_bytes: scratch.unwrap_or(0),
                tls_listen: tls.clone(),
                device: *device,
                read_only: *read_only,
                ..OpenView::new(volume.clone(), choose::point(point)?)
            };
            test(request, global, out)
        }
        FailoverCommand::Unplanned(args) => live::unplanned(args, global, out),
        FailoverCommand::Cancel { volume, no_wait } => live::cancel(volume, *no_wait, global, out),
        FailoverCommand::Show { volume } => live::show(volume, global, out),
        FailoverCommand::Cleanup { view, note } => cleanup(view.as_deref(), note, global, out),
        FailoverCommand::Flatten { view, to, force, rate, wait, stop } => {
            let paths = global.paths();
            let view = one(views(&paths)?, view.as_deref())?;
            if *stop {
                return stop_flatten(&view, global, out);
            }
            let to = std::path::absolute(to.as_deref().unwrap_or(Path::new("")));
            let to =
                to.map_err(|e| Problem::harmless(6621, "--to is no path", e.to_string(), ""))?;
            let bytes_per_second = rate.unwrap_or(0);
            let request = FlattenView { view: view.view, to, force: *force, bytes_per_second };
            flatten(&view, request, *wait, global, out)
        }
        FailoverCommand::List => {
            let views = views(&global.paths())?;
            if out.json {
                out.document(SCHEMA, "views", &views);
            } else {
                out.text(&text(&views, WallTime::now()));
            }
            Ok(Exit::Ok)
        }
    }
}

fn test(request: OpenView, global: &Global, out: &Out) -> Result<Exit, Failure> {
    if global.dry_run {
        let (volume, point) = (&request.volume, choose::shown(&request.point));
        let kind = if request.read_only { "read-only" } else { "writable" };
        let device = if request.device { " and block device" } else { "" };
        out.line(format!("would open {volume} at {point} as a {kind} view{device}"));
        return Ok(Exit::Ok);
    }
    let volume = request.volume.clone();
    let TargetReply::View(view) = rpc::target(&global.paths(), &TargetRequest::OpenView(request))?
    else {
        return Err(rpc::unexpected(Role::Target).into());
    };
    if out.json {
        out.document(SCHEMA, "views", &[view]);
        return Ok(Exit::Ok);
    }
    out.text(&opened(&view, WallTime::now()));
    match &view.device {
        Some(device) if view.read_only => out.hint(format!(
            "mount it:   mount -o ro,noload {} /mnt   (xfs: -o ro,norecovery,nouuid)",
            device.display()
        )),
        Some(device) => out.hint(format!("mount it:   mount {} /mnt", device.display())),
        None => out.hint(format!("look at it: nbdinfo '{}'", uri(&view))),
    }
    out.hint(format!("when done:  farshore failover cleanup {volume} --note 'what was learnt'"));
    Ok(Exit::Ok)
}

/// Where a client finds the view.
pub fn uri(view: &ViewInfo) -> String {
    format!("nbd+unix:///{}?socket={}", view.export, view.nbd_socket.display())
}

fn place(view: &ViewInfo) -> String {
    view.point.map_or_else(|| format!("lsn:{}", view.lsn), |p| p.to_string())
}

fn opened(view: &ViewInfo, now: WallTime) -> String {
    let micros = view.open_micros;
    let mut text = format!(
        "opened {} at {}, {} ({}), in {}.{} ms\n  {}\n",
        view.volume,
        place(view),
        units::instant(view.time),
        units::ago(now, view.time),
        micros / 1000,
        micros % 1000 / 100,
        uri(view),
    );
    if let Some(device) = &view.device {
        text.push_str(&format!("  {}\n", device.display()));
    }
    if let Some(address) = &view.tls_address {
        text.push_str(&format!("  nbds://{address}/{}\n", view.export));
    }
    if view.read_only {
        text.push_str("  read-only; replication goes on\n");
        return text;
    }
    let limit = units::bytes(view.scratch_bytes);
    text.push_str(&format!(
        "  writable: up to {limit} of writes go to its own scratch and are gone after cleanup; \
         replication goes on\n"
    ));
    text
}

/// Every open view.
pub fn views(paths: &Paths) -> Result<Vec<ViewInfo>, Problem> {
    match rpc::target(paths, &TargetRequest::Views)? {
        TargetReply::Views(views) => Ok(views),
        _ => Err(rpc::unexpected(Role::Target)),
    }
}

fn text(views: &[ViewInfo], now: WallTime) -> String {
    let head = ["VOLUME", "POINT", "TIME", "OPEN FOR", "WRITTEN", "WHERE", "VIEW"];
    let row = |v: &ViewInfo| {
        vec![
            v.volume.to_string(),
            place(v),
            units::instant(v.time),
            units::span(now.since(v.opened)),
            units::bytes(v.scratch_used),
            location(v),
            v.view.to_string(),
        ]
    };
    let head = head.map(str::to_owned).to_vec();
    let mut text = table(&std::iter::once(head).chain(views.iter().map(row)).collect::<Vec<_>>());
    let remarks: Vec<String> = views.iter().flat_map(remarks).collect();
    if !remarks.is_empty() {
        text.push_str(&format!("\n{}\n", remarks.join("\n")));
    }
    text
}

fn location(view: &ViewInfo) -> String {
    match (&view.device, &view.device_lost) {
        (Some(device), _) => device.display().to_string(),
        (None, None) => uri(view),
        (None, Some(why)) => format!("{} (its device is gone: {why})", uri(view)),
    }
}

/// The views that a word means: an identity, a volume, or the only one that is open.
fn chosen(views: Vec<ViewInfo>, word: Option<&str>) -> Result<Vec<ViewInfo>, Problem> {
    let Some(word) = word else {
        if views.len() == 1 {
            return Ok(views);
        }
        return Err(Problem::harmless(
            1909,
            format!("{} views are open; say which one", views.len()),
            "a view is left out only when exactly one is open",
            "farshore failover list",
        ));
    };
    let id = word.parse::<ViewId>().ok();
    let found: Vec<_> =
        views.into_iter().filter(|v| id == Some(v.view) || v.volume.as_str() == word).collect();
    if found.is_empty() {
        return Err(Problem::harmless(
            6990,
            format!("no open view of `{word}`"),
            "it is neither an open view nor a volume with one",
            "farshore failover list",
        ));
    }
    Ok(found)
}

/// The one view that a word means.
fn one(views: Vec<ViewInfo>, word: Option<&str>) -> Result<ViewInfo, Problem> {
    let found = chosen(views, word)?;
    let count = found.len();
    let [view] = <[ViewInfo; 1]>::try_from(found).map_err(|_| {
        Problem::harmless(
            1909,
            format!("{count} views are meant; say which one"),
            "only one view is flattened at a time",
            "farshore failover list",
        )
    })?;
    Ok(view)
}

fn flatten(
    view: &ViewInfo,
    request: FlattenView,
    wait: bool,
    global: &Global,
    out: &Out,
) -> Result<Exit, Failure> {
    let (volume, point, to) = (&view.volume, place(view), request.to.display().to_string());
    if global.dry_run {
        out.line(format!("would copy the view of {volume} at {point} into {to}, and verify it"));
        return Ok(Exit::Ok);
    }
    let paths = global.paths();
    rpc::target(&paths, &TargetRequest::FlattenView(request))?;
    if !wait {
        out.line(format!("the view of {volume} at {point} is being copied into {to}"));
        out.hint("how far it is:  farshore failover list");
        return Ok(Exit::Ok);
    }
    let of_it = |views: Vec<ViewInfo>| views.into_iter().find(|found| found.view == view.view);
    loop {
        let Some(now) = of_it(views(&paths)?) else {
            return Err(Problem::harmless(
                6602,
                format!("the view of {volume} was closed"),
                "somebody has closed it while it was copied",
                "farshore failover list",
            )
            .into());
        };
        if let Some(image) = &now.image {
            if out.json {
                out.document(SCHEMA, "views", &[&now]);
            } else {
                out.line(format!("copied and verified: {}", image.display()));
            }
            return Ok(Exit::Ok);
        }
        let running = now.flatten.as_ref().is_some_and(|f| f.state == FlattenState::Running);
        if !running {
            let failed = now.problems.into_iter().find(|p| (6620..6630).contains(&p.code.0));
            return Err(failed.unwrap_or_else(|| stopped(volume)).into());
        }
        #[allow(clippy::disallowed_methods)] // between two looks; nobody tells us of the end
        std::thread::sleep(LOOK);
    }
}

fn stopped(volume: &VolumeName) -> Problem {
    Problem::harmless(
        6625,
        format!("the view of {volume} is not flattened: that was stopped"),
        "somebody has stopped it",
        "the same command again goes on",
    )
}

fn stop_flatten(view: &ViewInfo, global: &Global, out: &Out) -> Result<Exit, Failure> {
    if global.dry_run {
        out.line(format!("would stop to flatten the view of {}", view.volume));
        return Ok(Exit::Ok);
    }
    rpc::target(&global.paths(), &TargetRequest::StopFlatten { view: view.view })?;
    out.line(format!("stopped to flatten the view of {}; it is as it was", view.volume));
    Ok(Exit::Ok)
}

/// What a person should know of a view besides its line.
fn remarks(view: &ViewInfo) -> Vec<String> {
    let name = format!("{} at {}", view.volume, place(view));
    let mut all = Vec::new();
    if let Some(image) = &view.image {
        all.push(format!("{name}: flattened, in {}", image.display()));
    }
    if let Some(flatten) = &view.flatten {
        let left = flatten.to_copy_bytes;
        let done = units::bytes(flatten.total_bytes.saturating_sub(left));
        let all_bytes = units::bytes(flatten.total_bytes);
        let doing = match flatten.state {
            FlattenState::Running if left == 0 => "is verified:",
            FlattenState::Running => "is flattened:",
            FlattenState::Stopped => "is not flattened, that was stopped:",
            FlattenState::Failed => "is not flattened:",
        };
        let to = flatten.to.display();
        all.push(format!("{name} {doing} {done} of {all_bytes} in {to}"));
    }
    let problem = |p: &Problem| format!("{} {}: {}\n  {}", p.code, p.what, p.why, p.next);
    all.extend(view.problems.iter().map(problem));
    all
}

fn cleanup(word: Option<&str>, note: &str, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let paths = global.paths();
    let closing = chosen(views(&paths)?, word)?;
    if global.dry_run {
        for view in &closing {
            out.line(format!("would close {} at {}", view.volume, place(view)));
        }
        return Ok(Exit::Ok);
    }
    for view in &closing {
        let request = TargetRequest::CloseView { view: view.view, note: note.to_owned() };
        rpc::target(&paths, &request)?;
        if !out.json {
            let written = units::bytes(view.scratch_used);
            let point = place(view);
            out.line(format!("closed {} at {point}; {written} of scratch dropped", view.volume));
        }
    }
    if out.json {
        out.document(SCHEMA, "views", &closing);
    }
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use farshore_extent::{Epoch, Lsn, PointId, Seq, VolumeSize};

    use super::*;

    fn view(n: u8, volume: &str) -> ViewInfo {
        ViewInfo {
            view: ViewId::from_bytes([n; 16]),
            volume: VolumeName::new(volume).unwrap(),
            size: VolumeSize::new(256 << 20).unwrap(),
            lsn: Lsn::new(Epoch::new(3), Seq::new(1042)),
            time: WallTime::from_nanos(1_795_252_440_123_000_000),
            point: Some(PointId::new(312)),
            nbd_socket: "/run/farshore/views/1.sock".into(),
            export: "shop".into(),
            tls_address: Some("192.0.2.7:10809".into()),
            opened: WallTime::from_nanos(1_795_252_441_000_000_000),
            open_micros: 3120,
            scratch_used: 4096,
            scratch_bytes: 256 << 20,
            device: Some("/dev/ublkb3".into()),
            device_lost: None,
            read_only: false,
            image: None,
            flatten: None,
            problems: Vec::new(),
        }
    }

    #[test]
    fn a_view_as_json_is_a_contract() {
        let document = crate::output::document(SCHEMA, "views", &[view(1, "shop")]);
        crate::status::golden::same("views.json", &document);
    }

    #[test]
    fn cleanup_without_a_name_needs_exactly_one_view() {
        assert_eq!(chosen(vec![view(1, "a")], None).unwrap().len(), 1);
        assert_eq!(chosen(vec![], None).unwrap_err().code.0, 1909);
        let two = vec![view(1, "a"), view(2, "a"), view(3, "b")];
        assert_eq!(chosen(two.clone(), None).unwrap_err().code.0, 1909);
        assert_eq!(chosen(two.clone(), Some("a")).unwrap().len(), 2);
        assert_eq!(chosen(two.clone(), Some(&two[2].view.to_string())).unwrap().len(), 1);
        assert_eq!(chosen(two, Some("c")).unwrap_err().code.0, 6990);
    }

    #[test]
    fn a_view_whose_device_is_gone_is_shown_where_it_can_still_be_reached() {
        let lost = Some("another program stopped the device".to_owned());
        let shown = location(&ViewInfo { device: None, device_lost: lost, ..view(1, "shop") });
        assert!(shown.starts_with("nbd+unix:///shop?socket="), "{shown}");
        assert!(shown.ends_with("(its device is gone: another program stopped the device)"));
        assert_eq!(location(&view(1, "shop")), "/dev/ublkb3");
    }

    #[test]
    fn an_opened_view_says_where_it_is_and_how_long_it_took() {
        let text = opened(&view(1, "shop"), WallTime::from_nanos(1_795_252_740_123_000_000));
        assert!(text.contains("p-312") && text.contains("in 3.1 ms") && text.contains("5m00s ago"));
        assert!(text.contains("nbd+unix:///shop?socket=/run/farshore/views/1.sock"));
        assert!(text.contains("nbds://192.0.2.7:10809/shop") && text.contains("  /dev/ublkb3\n"));
        let read_only = ViewInfo { read_only: true, ..view(1, "shop") };
        assert!(opened(&read_only, WallTime::now()).ends_with("read-only; replication goes on\n"));
    }
}
