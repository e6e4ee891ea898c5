//! `farshore host list`, `event list` and `token create`: the books of the target, and of the agent.

use clap::Subcommand;
use farshore_extent::{Code, Problem, VolumeName};
use farshore_protocol::admin::{
    AgentReply, AgentRequest, EventInfo, HostInfo, TargetReply, TargetRequest,
};
use farshore_protocol::paths::Paths;

use crate::args::{Global, interval, volume_name};
use crate::exit::{Exit, Failure};
use crate::output::{Out, table};
use crate::rpc::{self, Role};
use crate::units::{self, Interval};

/// `host …`
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Hosts that are enrolled
    List,
}

/// `event …`
#[derive(Debug, Subcommand)]
pub enum EventCommand {
    /// What happened, newest first
    List {
        /// At most so many; 0 is all
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
}

/// `token …`
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// A token with which one host can enrol once
    Create {
        /// Name of the source host
        #[arg(long = "for", value_name = "NAME", value_parser = volume_name)]
        host: VolumeName,
        /// How the source reaches this target; this machine's name and port 9443 if not given
        #[arg(long, value_name = "HOST:PORT")]
        address: Option<String>,
        /// How long it can be used
        #[arg(long, value_name = "TIME", default_value = "15m", value_parser = interval)]
        valid: Interval,
    },
}

/// `farshore host …`
pub fn hosts(command: &HostCommand, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let HostCommand::List = command;
    let TargetReply::Hosts(hosts) = rpc::target(&global.paths(), &TargetRequest::Hosts)? else {
        return Err(rpc::unexpected(Role::Target).into());
    };
    if out.json {
        out.document("farshore.hosts/1", "hosts", &hosts);
        return Ok(Exit::Ok);
    }
    let head = ["HOST", "CONNECTED", "ENROLLED", "IDENTITY"].map(str::to_owned).to_vec();
    let row = |h: &HostInfo| {
        let connected = if h.connected { "yes" } else { "no" };
        vec![h.name.clone(), connected.into(), units::instant(h.enrolled), h.host.to_string()]
    };
    out.text(&table(&std::iter::once(head).chain(hosts.iter().map(row)).collect::<Vec<_>>()));
    if hosts.is_empty() {
        out.hint("no host yet: farshore token create --for NAME");
    }
    Ok(Exit::Ok)
}

/// `farshore event …`
pub fn events(command: &EventCommand, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let EventCommand::List { limit } = command;
    let events = all_events(&global.paths(), *limit)?;
    if out.json {
        out.document("farshore.events/1", "events", &events);
        return Ok(Exit::Ok);
    }
    let row = |e: &EventInfo| {
        vec![
            units::instant(e.time),
            if e.code == 0 { "-".into() } else { Code(e.code).to_string() },
            e.volume.as_ref().map_or("-".into(), ToString::to_string),
            e.text.clone(),
        ]
    };
    out.text(&table(&events.iter().map(row).collect::<Vec<_>>()));
    Ok(Exit::Ok)
}

/// Of the roles that run here, newest first.
fn all_events(paths: &Paths, limit: u32) -> Result<Vec<EventInfo>, Problem> {
    let target =
        rpc::target(paths, &TargetRequest::Events { limit }).and_then(|reply| match reply {
            TargetReply::Events(events) => Ok(events),
            _ => Err(rpc::unexpected(Role::Target)),
        });
    let agent = rpc::agent(paths, &AgentRequest::Events { limit }).and_then(|reply| match reply {
        AgentReply::Events(events) => Ok(events),
        AgentReply::Status(_) | AgentReply::Tagged(_) => Err(rpc::unexpected(Role::Agent)),
    });
    let mut events = match (target, agent) {
        (Ok(target), Ok(agent)) => [target, agent].concat(),
        (Ok(events), Err(_)) | (Err(_), Ok(events)) => events,
        (Err(target), Err(agent)) => {
            return Err(if paths.state.join("agent").exists() { agent } else { target });
        }
    };
    events.sort_by_key(|event| std::cmp::Reverse(event.time));
    events.truncate(usize::try_from(limit).ok().filter(|n| *n > 0).unwrap_or(usize::MAX));
    Ok(events)
}

/// `farshore token …`
pub fn tokens(command: &TokenCommand, global: &Global, out: &Out) -> Result<Exit, Failure> {
    let TokenCommand::Create { host, address, valid } = command;
    let address = address.as_deref().map_or_else(this_machine, with_port)?;
    let seconds = u32::try_from(valid.0.as_secs()).unwrap_or(u32::MAX);
    if global.dry_run {
        out.line(format!("would make a token for {host}, for {address}, good for {valid}"));
        return Ok(Exit::Ok);
    }
    let token = create(host, &address, seconds, global)?;
    if out.json {
        let expires = valid.0.as_secs();
        let token = serde_json::json!({
            "host": host, "address": address, "token": token, "valid_seconds": expires,
        });
        out.document("farshore.token/1", "token", &token);
    } else {
        out.line(token);
        out.hint(format!(
            "on {host}: farshore enroll TOKEN   (one use, within {valid}; {address})"
        ));
    }
    Ok(Exit::Ok)
}

fn create(
    host: &VolumeName,
    address: &str,
    valid_seconds: u32,
    global: &Global,
) -> Result<String, Problem> {
    let request = TargetRequest::NewToken {
        host_name: host.to_string(),
        valid_seconds,
        address: address.to_owned(),
    };
    match rpc::target(&global.paths(), &request)? {
        TargetReply::Token(token) => Ok(token),
        _ => Err(rpc::unexpected(Role::Target)),
    }
}

const PORT: u16 = 9443;

fn with_port(address: &str) -> Result<String, Problem> {
    let bare_v6 = address.matches(':').count() > 1 && !address.starts_with('[');
    let (host, port) = match address.rsplit_once(':') {
        Some((host, port)) if !bare_v6 && !port.ends_with(']') => (host, port.parse::<u16>().ok()),
        _ => (address, Some(PORT)),
    };
    match port.filter(|p| *p != 0 && !host.is_empty()) {
        Some(port) if bare_v6 => Ok(format!("[{host}]:{port}")),
        Some(port) => Ok(format!("{host}:{port}")),
        None => Err(Problem::harmless(
            1910,
            format!("`{address}` is not an address"),
            "a source needs HOST:PORT to dial",
            "such as backup.example:9443; the port may be left out",
        )),
    }
}

fn this_machine() -> Result<String, Problem> {
    let name = nix::unistd::gethostname().ok().and_then(|n| n.into_string().ok());
    with_port(&name.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use farshore_extent::{HostId, WallTime};

    use super::*;

    #[test]
    fn an_address_gets_the_usual_port() {
        for (text, whole) in [
            ("backup", "backup:9443"),
            ("backup:7000", "backup:7000"),
            ("192.0.2.7", "192.0.2.7:9443"),
            ("2001:db8::7", "[2001:db8::7]:9443"),
            ("[2001:db8::7]:7000", "[2001:db8::7]:7000"),
            ("[2001:db8::7]", "[2001:db8::7]:9443"),
        ] {
            assert_eq!(with_port(text).unwrap(), whole);
        }
        for bad in ["", ":9443", "backup:", "backup:99999", "backup:0"] {
            assert_eq!(with_port(bad).unwrap_err().code.0, 1910, "{bad}");
        }
    }

    #[test]
    fn hosts_and_events_as_json_are_a_contract() {
        let time = WallTime::from_nanos(1_795_252_440_123_000_000);
        let host = HostInfo {
            host: HostId::from_bytes([9; 16]),
            name: "db1".into(),
            enrolled: time,
            connected: true,
        };
        let document = crate::output::document("farshore.hosts/1", "hosts", &[host]);
        crate::status::golden::same("hosts.json", &document);
        let event = EventInfo {
            time,
            code: 3107,
            volume: VolumeName::new("files").ok(),
            text: "link slower than change rate".into(),
        };
        let plain = EventInfo { code: 0, volume: None, ..event.clone() };
        let document = crate::output::document("farshore.events/1", "events", &[event, plain]);
        crate::status::golden::same("events.json", &document);
    }
}
