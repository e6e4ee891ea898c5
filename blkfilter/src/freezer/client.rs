//! The asking side of the freezer's socket, for the agent. Blocking; every call has a time limit.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use farshore_changelog::codec::{read_message, write_message};
use farshore_extent::Problem;

use super::message::{ApplicationInfo, Quiet, Reply, Request};
use super::problem;

/// Time that an answer takes which waits for nothing.
const CALL: Duration = Duration::from_secs(10);

/// A connection to the freezer. Dropping it ends what is quiet.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    stream: UnixStream,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// FS-3402.
    pub fn connect(socket: &Path) -> Result<Self, Problem> {
        let stream = UnixStream::connect(socket).map_err(|e| problem::lost(socket, &e))?;
        Ok(Self { socket: socket.to_owned(), stream })
    }

    /// What can be made quiet.
    ///
    /// # Errors
    /// FS-3402, FS-3409.
    pub fn applications(&mut self) -> Result<Vec<ApplicationInfo>, Problem> {
        match self.call(&Request::Applications, CALL)? {
            Reply::Applications(all) => Ok(all),
            other => Err(self.nonsense(&other)),
        }
    }

    /// Makes it quiet; `limit` is how long all pre hooks may take. Returns how long it stays so.
    ///
    /// # Errors
    /// FS-34xx: it is not quiet.
    pub fn quiet(&mut self, quiet: Quiet, limit: Duration) -> Result<Duration, Problem> {
        match self.call(&Request::Quiet(quiet), limit + CALL)? {
            Reply::Quiet { limit_ms } => Ok(Duration::from_millis(limit_ms)),
            other => Err(self.nonsense(&other)),
        }
    }

    /// Ends the quiet.
    ///
    /// # Errors
    /// FS-3402 and FS-3407: it was not quiet until now.
    pub fn thaw(&mut self) -> Result<(), Problem> {
        match self.call(&Request::Thaw, CALL)? {
            Reply::Thawed => Ok(()),
            other => Err(self.nonsense(&other)),
        }
    }

    /// Waits for the post hooks, which may take `limit`; what went wrong in them.
    ///
    /// # Errors
    /// FS-3402.
    pub fn finish(&mut self, limit: Duration) -> Result<Vec<Problem>, Problem> {
        match self.call(&Request::Finish, limit + CALL)? {
            Reply::Finished(problems) => Ok(problems),
            other => Err(self.nonsense(&other)),
        }
    }

    fn call(&mut self, request: &Request, limit: Duration) -> Result<Reply, Problem> {
        let talk = || -> io::Result<Result<Reply, Problem>> {
            self.stream.set_write_timeout(Some(CALL))?;
            self.stream.set_read_timeout(Some(limit))?;
            let mut stream = &self.stream;
            write_message(&mut stream, request)?;
            read_message(&mut stream)
        };
        talk().unwrap_or_else(|error| Err(problem::lost(&self.socket, &error)))
    }

    fn nonsense(&self, reply: &Reply) -> Problem {
        problem::lost(&self.socket, &format!("an answer of another kind: {reply:?}"))
    }
}
