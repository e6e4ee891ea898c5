//! `farshore failover unplanned|cancel|show`: go on from a replica, and go back.
//!
//! Works with the source gone: everything is asked of the target daemon of this host. What would be
//! lost is shown before anything is asked, and what a person decides on is what was shown: the
//! generation that goes along is refused when somebody else was faster.

use farshore_extent::{Problem, VolumeName, WallTime};
use farshore_protocol::admin::{PointChoice, TargetReply, TargetRequest, ViewInfo};
use farshore_protocol::failover::{
    Failover, FailoverPhase, FailoverPreview, JobInfo, PreviewFailover,
};
use farshore_protocol::paths::Paths;

use super::uri;
use crate::args::Global;
use crate::exit::{Exit, Failure};
use crate::output::Out;
use crate::rpc::{self, Role};
use crate::{ask, choose, jobs, units};

/// Version of the document of a preview.
const SCHEMA: &str = "farshore.failover/1";

/// How a point is to be opened.
#[derive(Debug, Clone, clap::Args)]
pub struct UnplannedArgs {
    /// Which volume
    #[arg(value_parser = crate::args::volume_name)]
    volume: VolumeName,
    /// latest, app, p-12, tag:NAME, lsn:EPOCH.SEQ, or a time such as '2026-11-21 10:14'
    #[arg(long, default_value = "latest")]
    point: String,
    /// Make it also a block device of this host
    #[arg(long)]
    device: bool,
    /// Serve it also over the network, with TLS, on this address
    #[arg(long, value_name = "HOST:PORT")]
    tls: Option<String>,
    /// Return when the job is recorded; it goes on by itself
    #[arg(long)]
    no_wait: bool,
}

/// `farshore failover unplanned`.
pub(super) fn unplanned(args: &UnplannedArgs, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let paths = global.paths();
    let seen = preview(&paths, &args.volume, choose::point(&args.point)?)?;
    let now = WallTime::now();
    if global.dry_run {
        shown(&seen, now, out);
        return Ok(Exit::Ok);
    }
    if !out.json {
        out.text(&text(&seen, now));
    }
    let name = &args.volume;
    let question = match seen.phase {
        FailoverPhase::Source => format!("Fence the source of {name} and open this point?"),
        _ => format!("Close what is open of {name}, with what was written to it, and open this?"),
    };
    ask::confirm(&question, global)?;
    let wish = Failover {
        volume: args.volume.clone(),
        lsn: seen.lsn,
        seen: seen.seen(),
        device: args.device,
        tls_listen: args.tls.clone(),
    };
    let job = begun(rpc::target(&paths, &TargetRequest::Failover(wish))?)?;
    finish(job, args.no_wait, global, out)
}

/// `farshore failover cancel`.
pub(super) fn cancel(
    volume: &VolumeName,
    no_wait: bool,
    global: &Global,
    out: &Out,
) -> Result<Exit, Failure> {
    let paths = global.paths();
    let seen = preview(&paths, volume, PointChoice::Latest)?;
    let dropped = seen.view.as_deref().map_or(0, |view| view.scratch_used);
    let loss = match dropped {
        0 => "nothing was written to it".to_owned(),
        bytes => format!("{} that were written to it are dropped", units::bytes(bytes)),
    };
    if global.dry_run || !out.json {
        let text = match seen.phase {
            FailoverPhase::Source => format!("{volume} is not failed over"),
            _ => {
                format!("what is open of {volume} is closed: {loss}; then its source is taken back")
            }
        };
        if out.json {
            out.document(SCHEMA, "preview", &seen);
        } else {
            out.line(text);
        }
    }
    if global.dry_run {
        return Ok(Exit::Ok);
    }
    if seen.phase != FailoverPhase::Source {
        ask::confirm(&format!("Take the source of {volume} back ({loss})?"), global)?;
    }
    let request = TargetRequest::CancelFailover { volume: volume.clone(), seen: seen.seen() };
    let job = begun(rpc::target(&paths, &request)?)?;
    finish(job, no_wait, global, out)
}

/// `farshore failover show`.
pub(super) fn show(volume: &VolumeName, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let seen = preview(&global.paths(), volume, PointChoice::Latest)?;
    shown(&seen, WallTime::now(), out);
    if let (false, Some(view)) = (out.json, &seen.view) {
        out.text(&attach(view));
    }
    Ok(Exit::Ok)
}

fn shown(seen: &FailoverPreview, now: WallTime, out: &Out) {
    if out.json {
        out.document(SCHEMA, "preview", seen);
    } else {
        out.text(&text(seen, now));
    }
}

fn preview(
    paths: &Paths,
    volume: &VolumeName,
    point: PointChoice,
) -> Result<FailoverPreview, Problem> {
    let wish = PreviewFailover { volume: volume.clone(), point };
    match rpc::target(paths, &TargetRequest::PreviewFailover(wish))? {
        TargetReply::FailoverPreview(seen) => Ok(*seen),
        _ => Err(rpc::unexpected(Role::Target)),
    }
}

fn begun(reply: TargetReply) -> Result<JobInfo, Problem> {
    match reply {
        TargetReply::Job(job) => Ok(*job),
        _ => Err(rpc::unexpected(Role::Target)),
    }
}

fn finish(job: JobInfo, no_wait: bool, global: &Global, out: &Out) -> Result<Exit, Failure> {
    if no_wait {
        jobs::print(&job, out);
        return Ok(Exit::Ok);
    }
    let job = jobs::wait(&global.paths(), job.job)?;
    jobs::print(&job, out);
    if let Some(problem) = job.problem {
        return Err(problem.into());
    }
    if let (false, Some(view)) = (out.json, &job.view) {
        out.text(&attach(view));
        let volume = &job.volume;
        out.hint(format!("another point: farshore failover unplanned {volume} --point P"));
        out.hint(format!("back to the source: farshore failover cancel {volume}"));
    }
    Ok(Exit::Ok)
}

/// What is, what would be opened, and what that costs.
fn text(seen: &FailoverPreview, now: WallTime) -> String {
    let point = seen.point.map_or_else(|| format!("lsn:{}", seen.lsn), |p| p.to_string());
    let (time, ago) = (units::instant(seen.time), units::ago(now, seen.time));
    let mut text = format!("{}: {}\n", seen.volume, phase(seen));
    let mut line = |label: &str, body: String| text.push_str(&format!("  {label:<6} {body}\n"));
    line("point", format!("{point}, {time} ({ago})"));
    let span = units::span(seen.journaled_time.since(seen.time));
    let (writes, bytes) = (seen.lost_writes, units::bytes(seen.lost_bytes));
    if writes == 0 {
        line("lost", "nothing of what the replica has".to_owned());
    } else {
        line("lost", format!("{writes} writes, {bytes}, {span}: what the replica has behind it"));
    }
    line("", unsent(seen, now));
    if writes > 0 && seen.ordered {
        line("", format!("--point lsn:{} opens all that the replica has", seen.journaled));
    }
    if let Some(view) = &seen.view {
        let used = units::bytes(view.scratch_used);
        line("open", format!("{}, {used} written to it", units::instant(view.time)));
    }
    text
}

fn phase(seen: &FailoverPreview) -> &'static str {
    match (seen.phase, seen.connected) {
        (FailoverPhase::Source, true) => {
            "not failed over; its source is CONNECTED and may be in use"
        }
        (FailoverPhase::Source, false) => "not failed over; its source is not connected",
        (FailoverPhase::Pending, _) => "failed over, commit pending",
        (FailoverPhase::Opening, _) => "its source is fenced, and nothing is open",
        (FailoverPhase::Fencing | FailoverPhase::Changing | FailoverPhase::Cancelling, _) => {
            "being changed by a job: farshore job list"
        }
    }
}

/// What nobody here can know.
fn unsent(seen: &FailoverPreview, now: WallTime) -> String {
    let Some(contact) = seen.last_contact else {
        return "and all that the source wrote and never sent: it was not heard since the target \
                daemon started"
            .to_owned();
    };
    let (at, ago) = (units::instant(contact), units::ago(now, contact));
    let unsent = units::bytes(seen.unsent_bytes);
    format!(
        "and all that the source wrote and never sent: {unsent} when it was last heard, {at} \
         ({ago}), and whatever came after"
    )
}

/// How a machine gets the disk: for QEMU, and for libvirt.
fn attach(view: &ViewInfo) -> String {
    format!(
        "  {}\n  qemu     {}\n  libvirt  virsh attach-device MACHINE disk.xml --config, with disk.xml:\n{}",
        view.device.as_ref().map_or_else(|| uri(view), |device| device.display().to_string()),
        qemu(view),
        libvirt(view),
    )
}

fn qemu(view: &ViewInfo) -> String {
    let file = match &view.device {
        Some(device) => device.display().to_string(),
        None => uri(view),
    };
    // A comma would end the value.
    let file = file.replace(',', ",,");
    format!("-drive 'file={file},format=raw,if=virtio,cache=none'")
}

/// As libvirt's domain schema has it (element `disk`).
fn libvirt(view: &ViewInfo) -> String {
    let source = match &view.device {
        Some(device) => format!("<source dev='{}'/>", escaped(&device.display().to_string())),
        None => format!(
            "<source protocol='nbd' name='{}'><host transport='unix' socket='{}'/></source>",
            escaped(&view.export),
            escaped(&view.nbd_socket.display().to_string())
        ),
    };
    let kind = if view.device.is_some() { "block" } else { "network" };
    format!(
        "<disk type='{kind}' device='disk'>\n  <driver name='qemu' type='raw' cache='none'/>\n  \
         {source}\n  <target dev='vdb' bus='virtio'/>\n</disk>\n"
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use farshore_extent::{Epoch, Generation, Lsn, PointId, Seq};

    use super::*;

    fn seen() -> FailoverPreview {
        let at = |seconds: i64| {
            WallTime::from_nanos(1_795_252_440_000_000_000 + seconds * 1_000_000_000)
        };
        FailoverPreview {
            volume: VolumeName::new("pgdata").unwrap(),
            phase: FailoverPhase::Source,
            generation: Generation::new(1),
            lsn: Lsn::new(Epoch::new(3), Seq::new(1042)),
            time: at(0),
            point: Some(PointId::new(312)),
            journaled: Lsn::new(Epoch::new(3), Seq::new(1045)),
            journaled_time: at(4),
            ordered: true,
            lost_writes: 3,
            lost_bytes: 12 << 10,
            connected: false,
            last_contact: Some(at(5)),
            unsent_bytes: 2 << 20,
            view: None,
        }
    }

    #[test]
    fn the_loss_is_told_in_seconds_writes_and_bytes_and_what_cannot_be_known_is_told_too() {
        let text = text(&seen(), WallTime::from_nanos(1_795_252_460_000_000_000));
        for part in
            ["3 writes, 12 KiB, 4.0s", "2 MiB when it was last heard", "lsn:3.1045", "20s ago"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        let never = FailoverPreview { last_contact: None, lost_writes: 0, ..seen() };
        let text = super::text(&never, WallTime::now());
        assert!(text.contains("not heard since") && text.contains("nothing of what"), "{text}");
    }

    #[test]
    fn a_preview_as_json_is_a_contract() {
        let document = crate::output::document(SCHEMA, "preview", &seen());
        crate::status::golden::same("failover.json", &document);
    }

    #[test]
    fn names_cannot_break_out_of_the_machine_description() {
        assert_eq!(escaped("a'b<c&d"), "a&apos;b&lt;c&amp;d");
    }
}
