//! What the daemons may use: privileges, locked memory, open files, memory for the pools.

use super::finding::Finding;
use super::host::{Capability, Host};
use crate::units;

/// Open files that suffice for a source.
const SOURCE_FILES: u64 = 1024;
/// Open files that suffice for a target: two a segment, and connections.
const TARGET_FILES: u64 = 8192;

/// Whose limits are looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Name in `/proc`.
    pub id: String,
    /// Systemd unit that would start it.
    pub unit: &'static str,
    /// The daemon itself; otherwise this program, whose limits a daemon started here would get.
    pub daemon: bool,
}

impl Process {
    fn words(&self) -> String {
        if self.daemon { format!("process {}", self.id) } else { "started from here".to_owned() }
    }

    fn raise(&self, unit_setting: &str, shell: &str) -> String {
        let unit = self.unit;
        format!(
            "mkdir -p /etc/systemd/system/{unit}.d && printf '[Service]\\n{unit_setting}\\n' > \
             /etc/systemd/system/{unit}.d/limits.conf && systemctl daemon-reload && systemctl \
             restart {unit}   # in a shell: {shell}"
        )
    }
}

/// Soft limit in the kernel's table; `u64::MAX` is none.
fn soft_limit(table: &str, name: &str) -> Option<u64> {
    let rest = table.lines().find_map(|line| line.strip_prefix(name))?;
    match rest.split_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

fn limit(host: &Host, process: &Process, name: &str) -> Option<u64> {
    soft_limit(&host.read(&format!("/proc/{}/limits", process.id)).ok()?, name)
}

fn hidden(check: &str, process: &Process) -> Finding {
    Finding::unseen(check, format!("{} does not show it", process.words()), "sudo farshore doctor")
}

/// Privileges that filterd needs to make block devices.
pub fn privileges(host: &Host, filterd: &Process) -> Finding {
    let check = "privileges";
    let needed = [
        (Capability::SysAdmin, "CAP_SYS_ADMIN (block devices)"),
        (Capability::IpcLock, "CAP_IPC_LOCK (memory that is never swapped)"),
        (Capability::SysResource, "CAP_SYS_RESOURCE (I/O flusher)"),
    ];
    let mut lacking = Vec::new();
    for (capability, words) in needed {
        match host.capable(&filterd.id, capability) {
            Some(true) => {}
            Some(false) => lacking.push(words),
            None => return hidden(check, filterd),
        }
    }
    let who = filterd.words();
    if lacking.is_empty() {
        return Finding::ok(check, format!("filterd ({who}) may make block devices"));
    }
    let lacking = lacking.join(", ");
    if filterd.daemon {
        let text = format!("filterd ({who}) lacks {lacking}: it serves NBD sockets only");
        Finding::warning(check, text, "systemctl enable --now farshore-filterd   # as root")
    } else {
        let text = format!("filterd does not run; {who} it would lack {lacking}");
        Finding::unseen(check, text, "sudo farshore doctor   # in a container: allow these")
    }
}

/// Whether the memory of filterd stays in RAM: it is in the way of writing dirty pages.
pub fn locked_memory(host: &Host, filterd: &Process) -> Finding {
    let check = "locked memory";
    let fix = filterd.raise("LimitMEMLOCK=infinity", "ulimit -l unlimited");
    let lost = "under memory pressure its pages may be swapped to a disk that waits for it";
    if filterd.daemon {
        let locked = host.status_line(&filterd.id, "VmLck");
        let none = |text: &String| text.split_whitespace().next() == Some("0");
        return match locked {
            Some(text) if none(&text) => {
                Finding::warning(check, format!("filterd could not lock its memory: {lost}"), fix)
            }
            Some(_) => Finding::ok(check, "filterd has locked its memory"),
            None => hidden(check, filterd),
        };
    }
    let capable = host.capable(&filterd.id, Capability::IpcLock);
    match (capable, limit(host, filterd, "Max locked memory")) {
        (Some(true), _) | (_, Some(u64::MAX)) => Finding::ok(check, "not limited"),
        (_, Some(bytes)) => {
            let bytes = units::bytes(bytes);
            let text = format!("limited to {bytes} when filterd is {}: {lost}", filterd.words());
            Finding::warning(check, text, fix)
        }
        (_, None) => hidden(check, filterd),
    }
}

/// Descriptors of filterd.
pub fn source_files(host: &Host, process: &Process) -> Finding {
    open_files(host, process, SOURCE_FILES)
}

/// Descriptors of the target daemon.
pub fn target_files(host: &Host, process: &Process) -> Finding {
    open_files(host, process, TARGET_FILES)
}

fn open_files(host: &Host, process: &Process, wanted: u64) -> Finding {
    let check = "open files";
    match limit(host, process, "Max open files") {
        Some(u64::MAX) => Finding::ok(check, "not limited"),
        Some(n) if n >= wanted => Finding::ok(check, format!("{n} ({})", process.words())),
        Some(n) => Finding::warning(
            check,
            format!(
                "{n} ({}): fewer than {wanted} may not suffice for many volumes and segments",
                process.words()
            ),
            process.raise("LimitNOFILE=65536", "ulimit -n 65536"),
        ),
        None => hidden(check, process),
    }
}

/// Memory for the pools: `pools` bytes are promised to volumes.
pub fn memory(host: &Host, pools: u64) -> Finding {
    let check = "memory";
    let info = host.read("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
    };
    let (Some(total), Some(free)) = (field("MemTotal"), field("MemAvailable")) else {
        return Finding::unseen(check, "/proc/meminfo says nothing", "free -h");
    };
    let (need, all) = (units::bytes(pools), units::bytes(total));
    let smaller = "# set a smaller `pool` in filterd.toml, or protect with --pool 64MiB";
    if pools > total / 4 * 3 {
        let text = format!("the pools of the volumes take {need} of {all}: too much");
        Finding::problem(check, text, smaller)
    } else if pools > total / 2 {
        Finding::warning(check, format!("the pools of the volumes take {need} of {all}"), smaller)
    } else if free < total / 20 {
        let text = format!("{} of {all} left; the pools take {need}", units::bytes(free));
        Finding::warning(check, text, "ps -eo rss,pid,comm --sort=-rss | head")
    } else {
        Finding::ok(check, format!("{need} for pools, {} of {all} left", units::bytes(free)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::super::host::fake::Machine;
    use super::*;

    const LIMITS: &str = "Limit                     Soft Limit           Hard Limit           Units\n\
                          Max open files            1024                 524288               files\n\
                          Max locked memory         8388608              unlimited            bytes\n";

    fn process(daemon: bool) -> Process {
        Process { id: "7".into(), unit: "farshore-filterd.service", daemon }
    }

    #[test]
    fn limits_are_those_of_the_daemon_when_it_runs() {
        let machine = Machine::with_kernel("6.12.1");
        let host = &machine.host;
        assert_eq!(source_files(host, &process(true)).state, State::Unseen);
        machine.put("/proc/7/limits", LIMITS);
        assert_eq!(source_files(host, &process(true)).state, State::Ok);
        let few = target_files(host, &process(true));
        assert_eq!(few.state, State::Warning);
        assert!(few.fix.unwrap().contains("LimitNOFILE=65536"));
    }

    #[test]
    fn memory_that_is_not_locked_is_a_warning_whoever_would_start_filterd() {
        let machine = Machine::with_kernel("6.12.1");
        let host = &machine.host;
        machine.put("/proc/7/limits", LIMITS);
        machine.put("/proc/7/status", "VmLck:\t       0 kB\nCapEff:\t0000000000000000\n");
        assert_eq!(locked_memory(host, &process(true)).state, State::Warning);
        let here = locked_memory(host, &process(false));
        assert!(here.text.contains("8 MiB"), "{}", here.text);
        machine.put("/proc/7/status", "VmLck:\t  262144 kB\nCapEff:\t000001ffffffffff\n");
        assert_eq!(locked_memory(host, &process(true)).state, State::Ok);
        assert_eq!(locked_memory(host, &process(false)).state, State::Ok);
        assert_eq!(privileges(host, &process(true)).state, State::Ok);
        machine.put("/proc/7/status", "CapEff:\t0000000000004000\n");
        let lacking = privileges(host, &process(true));
        assert!(lacking.text.contains("CAP_SYS_ADMIN") && !lacking.text.contains("IPC_LOCK"));
        assert_eq!(privileges(host, &process(false)).state, State::Unseen);
    }

    #[test]
    fn pools_must_fit_the_memory() {
        let machine = Machine::with_kernel("6.12.1");
        assert_eq!(memory(&machine.host, 1).state, State::Unseen);
        machine.put("/proc/meminfo", "MemTotal:  1048576 kB\nMemAvailable:  524288 kB\n");
        let look = |mib: u64| memory(&machine.host, mib << 20).state;
        assert_eq!((look(256), look(600), look(900)), (State::Ok, State::Warning, State::Problem));
        machine.put("/proc/meminfo", "MemTotal:  1048576 kB\nMemAvailable:  1024 kB\n");
        assert_eq!(look(256), State::Warning);
    }
}
