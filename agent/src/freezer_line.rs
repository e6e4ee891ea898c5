//! The agent's line to the freezer: one blocking thread that asks now and then what can be made quiet,
//! and has the talk of one time of quiet.

use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use farshore_blkfilter::freezer::{self, ApplicationInfo, Client, Quiet};
use farshore_extent::Problem;

/// How often the freezer is asked what it can make quiet.
const LOOK: Duration = Duration::from_secs(10);

/// What the thread is asked for.
#[derive(Debug)]
enum Ask {
    Quiet(Quiet),
    Thaw,
    Finish,
}

/// What the thread reports.
#[derive(Debug)]
pub enum FromFreezer {
    /// What can be made quiet; nothing on a host without a freezer.
    Applications(Result<Vec<ApplicationInfo>, Problem>),
    /// The outcome of [`FreezerLine::quiet`].
    Quiet(Result<(), Problem>),
    /// The outcome of [`FreezerLine::thaw`].
    Thawed(Result<(), Problem>),
    /// The outcome of [`FreezerLine::finish`].
    Finished(Vec<Problem>),
}

/// Takes reports.
pub type Sink = Box<dyn Fn(FromFreezer) + Send>;

/// The handle of the thread. Dropping it ends the thread when its present call is answered.
#[derive(Debug)]
pub struct FreezerLine(Sender<Ask>);

impl FreezerLine {
    /// Starts the thread. Without `configuration` and without a socket there is nothing to be quiet.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn spawn(socket: PathBuf, configuration: PathBuf, sink: Sink) -> io::Result<Self> {
        let (asks, asked) = channel();
        let worker = Worker { socket, configuration, sink, talk: None };
        std::thread::Builder::new()
            .name("freezer-line".into())
            .spawn(move || worker.run(&asked))?;
        Ok(Self(asks))
    }

    /// Makes it quiet.
    pub fn quiet(&self, quiet: Quiet) {
        self.ask(Ask::Quiet(quiet));
    }

    /// Ends the quiet.
    pub fn thaw(&self) {
        self.ask(Ask::Thaw);
    }

    /// Waits for the post hooks.
    pub fn finish(&self) {
        self.ask(Ask::Finish);
    }

    fn ask(&self, ask: Ask) {
        // The thread ends only after this handle.
        let _ = self.0.send(ask);
    }
}

struct Worker {
    socket: PathBuf,
    configuration: PathBuf,
    sink: Sink,
    /// The connection that it is quiet on, and how long its hooks may take.
    talk: Option<(Client, Duration)>,
}

impl Worker {
    fn run(mut self, asked: &Receiver<Ask>) {
        self.look();
        loop {
            match asked.recv_timeout(LOOK) {
                Ok(Ask::Quiet(quiet)) => {
                    let outcome = self.quiet(quiet);
                    (self.sink)(FromFreezer::Quiet(outcome));
                }
                Ok(Ask::Thaw) => {
                    let lost = || Err(freezer::lost(&self.socket, &"it was not asked for quiet"));
                    let outcome = self.talk.as_mut().map_or_else(lost, |(talk, _)| talk.thaw());
                    (self.sink)(FromFreezer::Thawed(outcome));
                }
                Ok(Ask::Finish) => {
                    let talk = self.talk.take();
                    let outcome = talk.map(|(mut talk, limit)| talk.finish(limit));
                    let problems = outcome.unwrap_or(Ok(Vec::new())).unwrap_or_else(|p| vec![p]);
                    (self.sink)(FromFreezer::Finished(problems));
                }
                Err(RecvTimeoutError::Timeout) if self.talk.is_none() => self.look(),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn look(&self) {
        let absent = !self.socket.exists() && !self.configuration.exists();
        let applications = if absent {
            Ok(Vec::new())
        } else {
            Client::connect(&self.socket).and_then(|mut client| client.applications())
        };
        (self.sink)(FromFreezer::Applications(applications));
    }

    fn quiet(&mut self, quiet: Quiet) -> Result<(), Problem> {
        if !self.socket.exists() && !self.configuration.exists() {
            let names: Vec<&str> = quiet.volumes.iter().map(|v| v.as_str()).collect();
            return Err(freezer::none_covers(&names.join(", ")));
        }
        let mut client = Client::connect(&self.socket)?;
        let all = client.applications()?;
        let has = |app: &&ApplicationInfo| app.volumes.iter().any(|v| quiet.volumes.contains(v));
        let hooks = all.iter().filter(has).map(|app| app.hook_limit_ms).sum();
        let freeze = all.iter().map(|app| app.quiet_limit_ms).max().unwrap_or(0);
        let limit = Duration::from_millis(freeze.saturating_add(hooks));
        let (talk, limit) = self.talk.insert((client, limit));
        talk.quiet(quiet, *limit).map(drop)
    }
}
