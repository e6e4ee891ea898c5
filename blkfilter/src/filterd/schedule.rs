//! When the copy loop of a volume may run: a start time for its first copy, and a window for what
//! the change log had no room for. `docs/adr/0013` says which copies wait and why.

use farshore_extent::{CaptureOrder, Problem, WallTime};
use serde::{Deserialize, Serialize};

use super::attached::{Attached, lock};
use super::config::Config;
use super::problem;
use crate::control::{CopyWait, CopyWaits};
use crate::core::CoreStatus;

/// What a volume waits for, as on its record: a restart does not forget it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Wait {
    /// Its first copy starts then.
    Until(WallTime),
    /// The window of the configuration.
    Window,
}

impl Wait {
    /// For people and programs.
    pub(super) fn told(self, config: &Config, now: WallTime) -> CopyWaits {
        match self {
            Self::Until(starts) => CopyWaits { wait: CopyWait::StartTime, starts },
            Self::Window => {
                CopyWaits { wait: CopyWait::Window, starts: config.resync_window.opens(now) }
            }
        }
    }
}

/// When the copy of a volume may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Plan {
    pub(super) wait: Option<Wait>,
    /// The loss of order whose copy was let go: it goes on to its end.
    pub(super) going: Option<u64>,
}

impl Plan {
    fn step(&mut self, core: &CoreStatus, config: &Config, now: WallTime) {
        if core.order == CaptureOrder::Ordered {
            self.wait = None;
            return;
        }
        let open = config.resync_window.is_open(now);
        let going = self.going == Some(core.losses);
        let marked = core.overrun && !going && core.dirty_bytes > config.resync_at_once;
        self.wait = match self.wait {
            Some(Wait::Until(start)) => self.wait.filter(|_| now < start),
            Some(Wait::Window) => self.wait.filter(|_| !open),
            None => (marked && !open).then_some(Wait::Window),
        };
        // While it has no room it has not begun, and how much there will be is not known.
        if self.wait.is_none() && (!core.copy_stuck || core.held) {
            self.going = Some(core.losses);
        }
    }
}

impl Attached {
    /// What its copy waits for.
    pub(super) fn copy_waits(&self, order: CaptureOrder) -> Option<CopyWaits> {
        let wait = lock(&self.plan).wait.filter(|_| order == CaptureOrder::CatchUp)?;
        Some(wait.told(&self.ground.config, WallTime::now()))
    }

    /// Looks whether the copy loop has to wait, or need not any more.
    pub(super) fn schedule(&self, now: WallTime) {
        let mut plan = lock(&self.plan);
        let Some(core) = self.ground.host.status(self.id()) else { return };
        let was = plan.wait;
        plan.step(&core, &self.ground.config, now);
        if plan.wait == was && plan.wait.is_some() == core.held {
            return;
        }
        let changed = self.obey(*plan);
        drop(plan);
        if let Err(problem) = changed.and_then(|()| self.keep_plan()) {
            let why = &problem.why;
            tracing::error!(volume = %self.info.name, %problem, why, "a restart may forget it");
        }
    }

    /// Starts the copy that waits.
    pub(super) fn start_copy(&self) -> Result<(), Problem> {
        let mut plan = lock(&self.plan);
        let going = self.ground.host.status(self.id()).map(|core| core.losses);
        *plan = Plan { wait: None, going };
        self.obey(*plan)?;
        drop(plan);
        self.keep_plan()
    }

    /// Everything is compared, now.
    pub(super) fn resync(&self, reason: String) -> Result<(), Problem> {
        tracing::info!(volume = %self.info.name, reason, "everything is compared with the replica");
        self.ground.host.resync(self.id(), reason).map_err(|e| problem::refused(&e))?;
        self.start_copy()
    }

    /// The same for a reader that cannot follow the log. A replica in doubt waits for no window.
    pub(super) fn recopy(&self, reason: String) -> Result<(), Problem> {
        tracing::warn!(volume = %self.info.name, reason, "the agent asks for a new copy");
        self.ground.host.recopy(self.id(), reason).map_err(|e| problem::refused(&e))?;
        let wait = lock(&self.plan).wait;
        if wait == Some(Wait::Window) { self.start_copy() } else { Ok(()) }
    }

    fn obey(&self, plan: Plan) -> Result<(), Problem> {
        tracing::info!(volume = %self.info.name, wait = ?plan.wait, "what its copy waits for");
        let held = self.ground.host.hold_copy(self.id(), plan.wait.is_some());
        held.map_err(|e| problem::refused(&e))
    }

    fn keep_plan(&self) -> Result<(), Problem> {
        let mut record = lock(&self.record);
        let wait = lock(&self.plan).wait;
        if record.wait == wait {
            return Ok(());
        }
        record.wait = wait;
        self.ground.state.save(&record)
    }
}

#[cfg(test)]
mod tests {
    use farshore_extent::{Lsn, VolumeId, VolumeSize};

    use super::*;
    use crate::control::VerifyProgress;

    const MINUTE: i64 = 60_000_000_000;

    fn at(minute: i64) -> WallTime {
        WallTime::from_nanos(1_795_000_000_000_000_000 + minute * MINUTE)
    }

    /// A volume that catches up; by default one whose log had no more room.
    fn core() -> CoreStatus {
        CoreStatus {
            volume: VolumeId::from_bytes([1; 16]),
            size: VolumeSize::new(1 << 40).unwrap(),
            order: CaptureOrder::CatchUp,
            reason: String::new(),
            losses: 3,
            overrun: true,
            dirty_bytes: 100 << 30,
            held: false,
            copy_stuck: false,
            verify: VerifyProgress::default(),
            catch_up_total: 100 << 30,
            captured: Lsn::ZERO,
            released: Lsn::ZERO,
            durable: Lsn::ZERO,
            oldest: WallTime::default(),
            records: 0,
            payload: 0,
            pool_used: 0,
            pool_bytes: 1 << 28,
            writes: 0,
            written_bytes: 0,
            backing_errors: 0,
            throttle_ms: 0,
            throttled: 0,
            in_flight: 0,
            intent: None,
        }
    }

    fn config(open: bool) -> Config {
        let mut config = Config::new("/state".into(), "/run".into());
        // Every hour of the week, or one minute that `at` is never in.
        let window = if open { "always".to_owned() } else { closed() };
        config.resync_window = window.parse().unwrap();
        config
    }

    /// A window of one minute, eleven hours and more from what the tests call now.
    fn closed() -> String {
        let zoned = jiff::Timestamp::from_nanosecond(at(0).nanos().into()).unwrap();
        let zoned = zoned.to_zoned(jiff::tz::TimeZone::system());
        let hour = (zoned.hour() + 12) % 24;
        format!("{hour:02}:00-{hour:02}:01")
    }

    fn after(mut plan: Plan, core: &CoreStatus, open: bool, minute: i64) -> Plan {
        plan.step(core, &config(open), at(minute));
        plan
    }

    #[test]
    fn what_the_log_had_no_room_for_waits_for_the_window_when_it_is_much() {
        let none = Plan::default();
        let much = after(none, &core(), false, 0);
        assert_eq!(much, Plan { wait: Some(Wait::Window), going: None });
        assert_eq!(after(much, &core(), false, 1), much);
        assert_eq!(after(much, &core(), true, 1), Plan { wait: None, going: Some(3) });
        assert_eq!(after(none, &core(), true, 0).wait, None, "the window is open");
        let little = CoreStatus { dirty_bytes: 64 << 30, ..core() };
        assert_eq!(after(none, &little, false, 0).wait, None);
        let mut literal = config(false);
        literal.resync_at_once = 0;
        let mut plan = none;
        plan.step(&CoreStatus { dirty_bytes: 4096, ..core() }, &literal, at(0));
        assert_eq!(plan.wait, Some(Wait::Window));
    }

    #[test]
    fn other_reasons_do_not_wait() {
        let crash = CoreStatus { overrun: false, ..core() };
        assert_eq!(after(Plan::default(), &crash, false, 0).wait, None);
    }

    #[test]
    fn a_copy_that_has_begun_goes_on_when_the_window_closes_and_until_order_is_back() {
        let going = after(Plan::default(), &core(), true, 0);
        assert_eq!(going.going, Some(3));
        assert_eq!(after(going, &core(), false, 1), going);
        let ordered = CoreStatus { order: CaptureOrder::Ordered, ..core() };
        assert_eq!(after(going, &ordered, false, 2), going);
        let again = CoreStatus { losses: 4, ..core() };
        assert_eq!(after(going, &again, false, 3).wait, Some(Wait::Window), "another loss");
        let stuck = CoreStatus { copy_stuck: true, ..core() };
        assert_eq!(after(Plan::default(), &stuck, true, 0).going, None, "nothing is sent yet");
    }

    #[test]
    fn a_start_time_is_waited_for_whatever_the_window_says() {
        let first = CoreStatus { overrun: false, ..core() };
        let set = Plan { wait: Some(Wait::Until(at(30))), going: None };
        for open in [true, false] {
            assert_eq!(after(set, &first, open, 29), set);
            assert_eq!(after(set, &first, open, 30).wait, None);
        }
    }
}
