//! What happened on this host, for people: every change of what status shows is an entry, with its code.
//!
//! The newest entries are in memory and in a file of JSON lines. The file outlives the agent; it is
//! written by a thread of its own, so that a state disk which is full or hangs holds up nothing. What
//! cannot be written is in memory only.

use std::collections::{BTreeMap, VecDeque};
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farshore_blkfilter::control::{CopyWait, VolumeStatus};
use farshore_extent::{CaptureOrder, Problem, VolumeId, VolumeName, WallTime};
use farshore_protocol::admin::{AgentVolume, EventInfo, SpoolLevel};

use crate::durable_fs;
use crate::session::LinkState;

/// Entries that are kept.
const KEPT: usize = 1000;
/// A larger file is written anew with what is kept.
const LARGEST: u64 = 1 << 20;
/// Entries on their way to the file; more are not written.
const WAITING: usize = 256;

/// The entries. Clones share them.
#[derive(Debug, Clone)]
pub struct EventLog {
    newest: Arc<Mutex<VecDeque<EventInfo>>>,
    writer: SyncSender<EventInfo>,
}

impl EventLog {
    /// Reads what `file` has and goes on there. A file that cannot be read is an empty one; lines
    /// that are damaged are left out.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn open(file: PathBuf) -> io::Result<Self> {
        let newest = Arc::new(Mutex::new(read(&file)));
        let (writer, entries) = sync_channel(WAITING);
        let thread = std::thread::Builder::new().name("event log".into());
        thread.spawn(move || write(&file, &entries))?;
        Ok(Self { newest, writer })
    }

    /// Adds an entry. Never waits.
    pub fn add(&self, event: EventInfo) {
        let mut newest = lock(&self.newest);
        newest.push_back(event.clone());
        trim(&mut newest);
        drop(newest);
        // Full: the state disk hangs, and the writer with it.
        self.writer.try_send(event).ok();
    }

    /// The newest `limit` entries, newest first; 0 is all.
    #[must_use]
    pub fn newest(&self, limit: u32) -> Vec<EventInfo> {
        let limit = usize::try_from(limit).ok().filter(|n| *n > 0).unwrap_or(KEPT);
        lock(&self.newest).iter().rev().take(limit).cloned().collect()
    }
}

fn lock(newest: &Mutex<VecDeque<EventInfo>>) -> MutexGuard<'_, VecDeque<EventInfo>> {
    newest.lock().unwrap_or_else(PoisonError::into_inner)
}

fn trim(newest: &mut VecDeque<EventInfo>) {
    newest.drain(..newest.len().saturating_sub(KEPT));
}

/// Until the last clone of the log is gone.
fn write(file: &Path, entries: &Receiver<EventInfo>) {
    let mut told = false;
    for event in entries {
        match append(file, &event) {
            Ok(()) => told = false,
            Err(error) if !std::mem::replace(&mut told, true) => {
                let file = file.display();
                tracing::warn!(%file, %error, "events are kept in memory only");
            }
            Err(_) => {}
        }
    }
}

fn append(file: &Path, event: &EventInfo) -> io::Result<()> {
    if let Some(dir) = file.parent() {
        durable_fs::create_private_dir(dir)?;
    }
    let mut open =
        OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(file)?;
    let len = open.metadata()?.len();
    if len > LARGEST {
        let mut kept = read(file);
        kept.push_back(event.clone());
        trim(&mut kept);
        return durable_fs::replace(file, &lines(&kept)?, 0o600);
    }
    let mut text = lines([event])?;
    // In one write: a line is there or not, except in a power cut, whose half line ends here.
    let mut last = *b"\n";
    if let Some(end) = len.checked_sub(1) {
        open.read_exact_at(&mut last, end)?;
    }
    if last != *b"\n" {
        text.insert(0, b'\n');
    }
    open.write_all(&text)
}

/// What the file has of entries, the newest last.
fn read(file: &Path) -> VecDeque<EventInfo> {
    let text = std::fs::read(file).unwrap_or_default();
    let lines = text.split(|byte| *byte == b'\n');
    let mut kept = lines.filter_map(|line| serde_json::from_slice(line).ok()).collect();
    trim(&mut kept);
    kept
}

fn lines<'a>(events: impl IntoIterator<Item = &'a EventInfo>) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    for event in events {
        serde_json::to_writer(&mut text, event)?;
        text.push(b'\n');
    }
    Ok(text)
}

/// What a state is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Topic {
    Attached,
    Link,
    Filterd,
    Problem,
    Order,
    CopyWait,
    Spool,
    IntentMap,
    Verify,
    Disk,
}

/// What is the case.
#[derive(Debug, Clone, PartialEq, Eq)]
struct State {
    volume: Option<VolumeName>,
    /// 0: all is well.
    code: u16,
    text: String,
    /// No news when it is what is found first.
    usual: bool,
}

impl State {
    fn well(text: impl Into<String>) -> Self {
        Self { volume: None, code: 0, text: text.into(), usual: true }
    }

    fn news(text: impl Into<String>) -> Self {
        Self { usual: false, ..Self::well(text) }
    }

    fn trouble(code: u16, text: impl Into<String>) -> Self {
        Self { code, ..Self::news(text) }
    }

    fn of(problem: &Problem) -> Self {
        Self::trouble(problem.code.0, problem.what.clone())
    }
}

/// Finds out what has changed since it last looked.
#[derive(Debug, Default)]
pub struct Changes {
    before: BTreeMap<(Option<VolumeId>, Topic), State>,
}

/// What there is to look at.
#[derive(Debug)]
pub struct Sight<'a> {
    /// Of the target.
    pub address: &'a str,
    /// The connection to it.
    pub link: &'a LinkState,
    /// Why filterd does not answer.
    pub filterd: Option<&'a Problem>,
    /// What filterd says of its volumes.
    pub volumes: &'a BTreeMap<VolumeId, VolumeStatus>,
    /// What the agent says of them.
    pub shipped: &'a [AgentVolume],
}

impl Changes {
    /// The entries for what has changed.
    pub fn look(&mut self, sight: &Sight<'_>, now: WallTime) -> Vec<EventInfo> {
        let mut present = BTreeMap::new();
        match sight.link {
            LinkState::Up { .. } => {
                let text = format!("connected to the target {}", sight.address);
                present.insert((None, Topic::Link), State::news(text));
            }
            LinkState::Halted { problem }
            | LinkState::Down { problem: Some(problem), .. }
            | LinkState::Connecting { problem: Some(problem) } => {
                present.insert((None, Topic::Link), State::of(problem));
            }
            // Nobody knows yet: what was known before holds.
            LinkState::Down { problem: None, .. } | LinkState::Connecting { problem: None } => {
                let before = self.before.get(&(None, Topic::Link)).cloned();
                present.extend(before.map(|state| ((None, Topic::Link), state)));
            }
        }
        let filterd = sight.filterd.map_or(State::well("filterd answers again"), State::of);
        present.insert((None, Topic::Filterd), filterd);
        for (id, volume) in sight.volumes {
            let shipped = sight.shipped.iter().find(|v| v.volume == *id);
            for (topic, state) in of_volume(volume, shipped) {
                let state = State { volume: Some(volume.info.name.clone()), ..state };
                present.insert((Some(*id), topic), state);
            }
        }
        let before = std::mem::replace(&mut self.before, present);
        let entry = |state: &State, text: String| {
            let (code, volume) = (state.code, state.volume.clone());
            EventInfo { time: now, code, volume, text }
        };
        let gone = before.iter().filter(|(key, _)| !self.before.contains_key(key));
        let gone = gone.filter(|((_, topic), _)| *topic == Topic::Attached);
        let gone = gone.map(|(_, state)| entry(state, "not attached here any more".to_owned()));
        let changed = self.before.iter().filter_map(|(key, state)| {
            let news = before.get(key).map_or(!state.usual, |old| old != state);
            news.then(|| entry(state, state.text.clone()))
        });
        gone.chain(changed).collect()
    }
}

fn of_volume(volume: &VolumeStatus, shipped: Option<&AgentVolume>) -> Vec<(Topic, State)> {
    let attached = State::news(format!("protected here: {}", volume.info.backing.display()));
    let order = match volume.order {
        CaptureOrder::Ordered => State::well("in order: points are cut"),
        CaptureOrder::CatchUp => State::trouble(3103, format!("no points: {}", volume.reason)),
    };
    let wait = match volume.copy_waits.as_ref().map(|waits| waits.wait) {
        None => State::well("no copy waits"),
        Some(CopyWait::StartTime) => State::news("the first copy waits for its start time"),
        Some(CopyWait::Window) => State::news("the copy waits for the resync window"),
    };
    let kept = volume.intent.as_ref().is_none_or(|map| map.kept);
    let map = if kept {
        State::well("the intent map is kept again")
    } else {
        State::trouble(2052, "the intent map cannot be kept")
    };
    let verify = &volume.verify;
    let verify = match (verify.differing_bytes > 0, verify.running) {
        (true, _) => State::trouble(3120, "verification found content that differs"),
        (false, true) => State::news("a verify is under way"),
        (false, false) if (1..=verify.checked_bytes).contains(&verify.total_bytes) => {
            State::well("a verify has ended: the replica is equal")
        }
        (false, false) => State::well("no verify is under way"),
    };
    let disk = match volume.backing_errors {
        0 => State::well("the disk fails no requests"),
        // Not each of a storm of errors.
        n => {
            State::news(format!("requests to the disk failed: at least {}", 10_u64.pow(n.ilog10())))
        }
    };
    let mut states = vec![
        (Topic::Attached, attached),
        (Topic::Order, order),
        (Topic::CopyWait, wait),
        (Topic::IntentMap, map),
        (Topic::Verify, verify),
        (Topic::Disk, disk),
    ];
    if let Some(shipped) = shipped {
        states.push((Topic::Spool, of_spool(shipped)));
        let other = shipped.problem.as_ref().filter(|p| Some(*p) != shipped.spool.problem.as_ref());
        let problem = other.map_or(State::well("shipped again"), State::of);
        states.push((Topic::Problem, problem));
    }
    states
}

fn of_spool(volume: &AgentVolume) -> State {
    if let Some(problem) = &volume.spool.problem {
        return State::of(problem);
    }
    match volume.spool.level {
        SpoolLevel::Direct => State::well("the spool is empty: changes go to the target"),
        SpoolLevel::Spooling => State::news("changes go to the spool"),
        SpoolLevel::Draining => State::news("the spool was sent: changes go to the target"),
        SpoolLevel::Full => State::trouble(5212, "the spool is full"),
        SpoolLevel::Failed => State::trouble(5211, "the spool cannot be written"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: u16) -> EventInfo {
        let text = format!("event {number}");
        EventInfo {
            time: WallTime::from_nanos(i64::from(number)),
            code: number,
            volume: None,
            text,
        }
    }

    fn wait_for_lines(file: &Path, count: usize) {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while std::fs::read_to_string(file).unwrap_or_default().lines().count() < count {
            assert!(std::time::Instant::now() < end, "the writer is late");
            std::thread::yield_now();
        }
    }

    #[test]
    fn events_are_there_after_a_restart_newest_first_without_what_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("agent/events.json");
        let log = EventLog::open(file.clone()).unwrap();
        (1..=3).for_each(|n| log.add(event(n)));
        assert_eq!(log.newest(2), [event(3), event(2)]);
        wait_for_lines(&file, 3);
        drop(log);
        let half = b"{\"time\": 5, \"co";
        std::fs::File::options().append(true).open(&file).unwrap().write_all(half).unwrap();
        let log = EventLog::open(file.clone()).unwrap();
        assert_eq!(log.newest(0), [event(3), event(2), event(1)]);
        log.add(event(4));
        wait_for_lines(&file, 5);
        drop(log);
        assert_eq!(read(&file), [event(1), event(2), event(3), event(4)]);
    }

    #[test]
    fn neither_memory_nor_the_file_grows_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("events.json");
        std::fs::write(&file, vec![b'x'; usize::try_from(LARGEST).unwrap() + 1]).unwrap();
        let log = EventLog::open(file.clone()).unwrap();
        for number in 0..=u16::try_from(KEPT).unwrap() {
            log.add(event(number));
        }
        assert_eq!(log.newest(0).len(), KEPT);
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while std::fs::metadata(&file).unwrap().len() > LARGEST {
            assert!(std::time::Instant::now() < end, "the file was not written anew");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_costs_nothing_but_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let nowhere = dir.path().join("a file");
        std::fs::write(&nowhere, "").unwrap();
        let log = EventLog::open(nowhere.join("events.json")).unwrap();
        log.add(event(1));
        assert_eq!(log.newest(0), [event(1)]);
    }

    fn look(changes: &mut Changes, link: &LinkState, filterd: Option<&Problem>) -> Vec<String> {
        let (volumes, shipped) = (BTreeMap::new(), []);
        let sight = Sight { address: "t:1", link, filterd, volumes: &volumes, shipped: &shipped };
        let told = |e: EventInfo| format!("{} {}", e.code, e.text);
        changes.look(&sight, WallTime::default()).into_iter().map(told).collect()
    }

    #[test]
    fn a_change_is_told_once_and_the_usual_is_no_news() {
        let mut changes = Changes::default();
        let problem = Problem::harmless(5904, "no connection", "refused", "wait");
        let quiet = LinkState::Connecting { problem: None };
        let failed = LinkState::Connecting { problem: Some(problem.clone()) };
        assert_eq!(look(&mut changes, &quiet, None), Vec::<String>::new());
        assert_eq!(look(&mut changes, &failed, None), ["5904 no connection"]);
        assert_eq!(look(&mut changes, &failed, None), Vec::<String>::new());
        assert_eq!(look(&mut changes, &quiet, None), Vec::<String>::new());
        assert_eq!(look(&mut changes, &failed, Some(&problem)), ["5904 no connection"]);
        assert_eq!(look(&mut changes, &failed, None), ["0 filterd answers again"]);
    }
}
