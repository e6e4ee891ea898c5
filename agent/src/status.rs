//! The status socket: what people's tools ask of the agent. Owner-only; one request, one answer.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use farshore_changelog::codec;
use farshore_extent::{Problem, VolumeName};
use farshore_protocol::admin::{AgentReply, AgentRequest, AgentStatus, CutPoint};
use farshore_protocol::paths::Paths;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::driver::{Input, LocalTag};
use crate::event_log::EventLog;
use crate::problem;

/// Largest request in bytes.
const MAX_REQUEST: usize = 4096;
/// Longest pause of a client.
const IDLE: Duration = Duration::from_secs(60);

/// The newest state, written by the session and read by the socket.
#[derive(Debug, Clone)]
pub struct Board(Arc<Mutex<AgentStatus>>);

impl Board {
    /// A board that shows `status`.
    #[must_use]
    pub fn new(status: AgentStatus) -> Self {
        Self(Arc::new(Mutex::new(status)))
    }

    /// Replaces what is shown.
    pub fn show(&self, status: AgentStatus) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }

    /// What is shown.
    #[must_use]
    pub fn read(&self) -> AgentStatus {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Listens on the agent's socket. The caller holds the lock of the state directory, so whatever
/// lies there is a left-over.
///
/// # Errors
/// FS-5205.
pub fn listen(paths: &Paths) -> Result<UnixListener, Problem> {
    let socket = paths.agent_socket();
    let bind = || {
        std::fs::create_dir_all(&paths.run)?;
        match std::fs::remove_file(&socket) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&socket)?;
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    bind().map_err(|e| problem::file("listen on", &socket, &e))
}

/// Answers until dropped.
pub(crate) async fn serve(
    listener: UnixListener,
    (board, events): (Board, EventLog),
    inputs: mpsc::Sender<Input>,
) {
    let own = nix::unistd::geteuid().as_raw();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors: let others finish.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        // The mode of the socket is set after it exists; this closes the gap.
        let allowed = stream.peer_cred().is_ok_and(|c| c.uid() == own || c.uid() == 0);
        if allowed {
            let (board, events, inputs) = (board.clone(), events.clone(), inputs.clone());
            tokio::spawn(async move {
                if let Err(error) = answer(stream, (&board, &events), &inputs).await {
                    tracing::debug!(%error, "a status client left");
                }
            });
        }
    }
}

async fn answer(
    mut stream: UnixStream,
    (board, events): (&Board, &EventLog),
    inputs: &mpsc::Sender<Input>,
) -> io::Result<()> {
    let invalid = |e: String| io::Error::new(io::ErrorKind::InvalidData, e);
    loop {
        let len = match timeout(IDLE, stream.read_u32_le()).await? {
            Ok(len) => usize::try_from(len).unwrap_or(usize::MAX),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e),
        };
        if len > MAX_REQUEST {
            return Err(invalid(format!("request of {len} bytes")));
        }
        let mut body = vec![0; len];
        timeout(IDLE, stream.read_exact(&mut body)).await??;
        let reply: Result<AgentReply, Problem> =
            match codec::decode(&body).map_err(|e| invalid(e.to_string()))? {
                AgentRequest::Status => Ok(AgentReply::Status(board.read())),
                AgentRequest::Events { limit } => Ok(AgentReply::Events(events.newest(limit))),
                AgentRequest::Tag { volumes, name, app } => {
                    tag(inputs, volumes, name, app).await.map(AgentReply::Tagged)
                }
            };
        let mut framed = Vec::new();
        codec::write_message(&mut framed, &reply)?;
        timeout(IDLE, stream.write_all(&framed)).await??;
    }
}

/// Has the driver cut a point, and waits for that.
async fn tag(
    inputs: &mpsc::Sender<Input>,
    volumes: Vec<VolumeName>,
    name: String,
    app: bool,
) -> Result<CutPoint, Problem> {
    let (reply, answer) = oneshot::channel();
    let wanted = inputs.send(Input::Local(LocalTag { volumes, name, app, reply })).await;
    wanted.map_err(|_| problem::stopping())?;
    answer.await.map_err(|_| problem::stopping())?
}
