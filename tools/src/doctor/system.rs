//! Around the daemons: udev, systemd, the clock.

use std::io;
use std::time::Duration;

use farshore_blkfilter::sys::clock::Discipline;
use farshore_extent::WallTime;

use super::finding::Finding;
use super::host::Host;
use super::shipped::{self, Installed, RULE};
use crate::units;

/// Start of 2025: an earlier clock was never set.
const NEVER_SET: WallTime = WallTime::from_nanos(1_735_689_600_000_000_000);

/// Files may be dated so far in the future: clocks are slewed.
const SLACK: Duration = Duration::from_secs(60);

const RULES: [&str; 4] =
    ["/etc/udev/rules.d", "/run/udev/rules.d", "/usr/lib/udev/rules.d", "/lib/udev/rules.d"];
const UNITS: [&str; 4] = [
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];

/// udev, and our rules for stable names and hidden origins.
pub fn udev(host: &Host) -> Finding {
    let check = "udev";
    if !host.has("/run/udev/control") {
        return Finding::warning(
            check,
            "does not run: filterd makes /dev/farshore/NAME itself, and nothing hides the origin",
            "systemctl start systemd-udevd   # none in a container: nothing to do there",
        );
    }
    let again = "udevadm control --reload && udevadm trigger --subsystem-match=block";
    let install =
        || format!("# install {} of this release into /etc/udev/rules.d, then: {again}", RULE.name);
    if let Some(old) = other_rules(host) {
        return Finding::warning(
            check,
            format!("{old} is not a rule of this release, and works beside or against it"),
            format!("rm {old} && {again}"),
        );
    }
    match RULE.installed(host, &RULES) {
        Installed::Same(rule) => Finding::ok(check, rule),
        Installed::Other(rule) => Finding::warning(
            check,
            format!("{rule} is not the one of this release: the origin may stay visible"),
            install(),
        ),
        Installed::Masked(rule) => Finding::warning(
            check,
            format!("our rule is switched off: the origin of a volume stays visible ({rule})"),
            format!("rm {rule} && {again}"),
        ),
        Installed::Missing => Finding::warning(
            check,
            "runs without our rules: the origin of a volume stays visible under its UUID",
            install(),
        ),
    }
}

/// A rule of ours by another name, as other releases had it.
fn other_rules(host: &Host) -> Option<String> {
    RULES.into_iter().find_map(|dir| {
        let entries = std::fs::read_dir(host.path(dir)).ok()?;
        let names = entries.flatten().filter_map(|e| e.file_name().into_string().ok());
        let ours = |n: &String| n.contains("farshore") && n.ends_with(".rules") && n != RULE.name;
        names.filter(ours).min().map(|name| format!("{dir}/{name}"))
    })
}

/// A unit of systemd: installed, and started at boot.
pub fn unit(host: &Host, unit: &str) -> Finding {
    let check = "service";
    if !host.has("/run/systemd/system") {
        return Finding::warning(
            check,
            format!("no systemd here: something else must start {unit} and start it again at once"),
            "# make the supervisor of this host run it, restarted without limit after 100 ms",
        );
    }
    let shipped = shipped::UNITS.into_iter().find(|shipped| shipped.name == unit);
    let installed = shipped.map_or(Installed::Missing, |unit| unit.installed(host, &UNITS));
    match installed {
        Installed::Same(_) => {}
        Installed::Other(path) => {
            return Finding::warning(
                check,
                format!("{path} is not the one of this release"),
                format!(
                    "# install {unit} of this release over it (own settings: systemctl edit {unit}), \
                     then: systemctl daemon-reload && systemctl restart {unit}"
                ),
            );
        }
        Installed::Masked(path) => {
            return Finding::warning(
                check,
                format!("{unit} is masked ({path}): the daemon is not started at boot"),
                format!("systemctl unmask {unit} && systemctl enable --now {unit}"),
            );
        }
        Installed::Missing => {
            return Finding::warning(
                check,
                format!("{unit} is not installed: the daemon is not started at boot"),
                format!(
                    "# install {unit} of this release into /etc/systemd/system, then: systemctl \
                     enable --now {unit}"
                ),
            );
        }
    }
    let wanted = |dir: &str| {
        let entries = std::fs::read_dir(host.path(dir)).ok();
        let parents = entries.into_iter().flatten().flatten().map(|e| e.path());
        let links = |path: &std::path::PathBuf| {
            let name = path.to_string_lossy();
            name.ends_with(".wants") || name.ends_with(".requires")
        };
        parents.filter(links).any(|path| path.join(unit).symlink_metadata().is_ok())
    };
    if UNITS.iter().any(|dir| wanted(dir)) {
        Finding::ok(check, format!("{unit} is started at boot"))
    } else {
        Finding::warning(
            check,
            format!("{unit} is installed and not started at boot"),
            format!("systemctl enable --now {unit}"),
        )
    }
}

/// The wall clock: it labels points. `newest` is the date of the newest file of a daemon.
pub fn clock(kept: io::Result<Discipline>, now: WallTime, newest: Option<WallTime>) -> Finding {
    let check = "clock";
    let keep = "timedatectl set-ntp true   # or install chrony";
    if now < NEVER_SET {
        let text = format!("not set: it says {}", units::instant(now));
        return Finding::problem(check, text, keep);
    }
    if let Some(ahead) = newest.map(|newest| newest.since(now)).filter(|ahead| *ahead > SLACK) {
        let text = format!(
            "it was set back: files of the daemons are from {} in the future, and points carry \
             wrong times",
            units::span(ahead)
        );
        return Finding::warning(check, text, keep);
    }
    match kept {
        Ok(Discipline { synchronised: true, max_error }) => {
            Finding::ok(check, format!("synchronised within {}", units::moment(max_error)))
        }
        Ok(_) => Finding::warning(
            check,
            "no time service keeps it: points are found by time, certificates checked by it",
            keep,
        ),
        Err(e) => Finding::unseen(check, format!("the kernel does not say: {e}"), "timedatectl"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::super::host::fake::Machine;
    use super::*;

    #[test]
    fn rules_must_be_there_when_udev_runs() {
        let machine = Machine::with_kernel("6.12.1");
        assert!(udev(&machine.host).text.contains("does not run"));
        machine.put("/run/udev/control", "").put("/etc/udev/rules.d/70-other.rules", "");
        assert!(udev(&machine.host).text.contains("without our rules"));
        let shipped = include_str!("../../udev/61-farshore.rules");
        machine.put("/usr/lib/udev/rules.d/61-farshore.rules", shipped);
        assert_eq!(udev(&machine.host).state, State::Ok);
        machine.put("/etc/udev/rules.d/61-farshore.rules", "# of an older release\n");
        assert!(udev(&machine.host).text.contains("not the one of this release"), "/etc counts");
        machine.put("/etc/udev/rules.d/61-farshore.rules", "");
        assert!(udev(&machine.host).text.contains("switched off"));
        machine.put("/etc/udev/rules.d/60-farshore.rules", "");
        let fix = udev(&machine.host).fix.unwrap();
        assert!(fix.starts_with("rm /etc/udev/rules.d/60-farshore.rules &&"), "{fix}");
    }

    #[test]
    fn a_unit_must_be_installed_and_started_at_boot() {
        let machine = Machine::with_kernel("6.12.1");
        let name = "farshore-agent.service";
        let look = || unit(&machine.host, name);
        assert!(look().text.contains("no systemd"));
        machine.put("/run/systemd/system/.keep", "");
        assert!(look().text.contains("not installed"));
        let shipped = include_str!("../../systemd/farshore-agent.service");
        machine.put("/lib/systemd/system/farshore-agent.service", shipped);
        assert_eq!(look().fix.unwrap(), format!("systemctl enable --now {name}"));
        machine.put("/etc/systemd/system/multi-user.target.wants/farshore-agent.service", "");
        assert_eq!(look().state, State::Ok);
        let own = "/etc/systemd/system/farshore-agent.service";
        machine.put(own, "[Service]\nExecStart=/usr/bin/farshore agent --old\n");
        assert!(look().text.contains(own) && look().fix.unwrap().contains("systemctl edit"));
        std::fs::remove_file(machine.host.path(own)).unwrap();
        std::os::unix::fs::symlink("/dev/null", machine.host.path(own)).unwrap();
        assert!(look().fix.unwrap().starts_with("systemctl unmask"));
    }

    #[test]
    fn a_clock_that_is_wrong_is_told_from_one_that_nobody_keeps() {
        let now = WallTime::from_nanos(1_795_252_440_000_000_000);
        let later = WallTime::from_nanos(now.nanos() + 3_600_000_000_000);
        let kept =
            |synchronised| Ok(Discipline { synchronised, max_error: Duration::from_millis(12) });
        let fine = clock(kept(true), now, Some(now));
        assert_eq!((fine.state, fine.text.as_str()), (State::Ok, "synchronised within 12 ms"));
        assert_eq!(clock(kept(false), now, None).state, State::Warning);
        assert!(clock(kept(true), now, Some(later)).text.contains("set back"));
        assert_eq!(clock(kept(true), WallTime::from_nanos(1), None).state, State::Problem);
        let denied = Err(io::ErrorKind::PermissionDenied.into());
        assert_eq!(clock(denied, now, None).state, State::Unseen);
    }
}
