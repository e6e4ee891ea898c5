//! The admin socket from the side of the command line.

use farshore_changelog::codec;
use farshore_extent::Problem;
use farshore_protocol::admin::{TargetReply, TargetRequest};
use farshore_protocol::paths::Paths;

/// None when nobody listens.
pub async fn ask(paths: &Paths, request: TargetRequest) -> Option<Result<TargetReply, Problem>> {
    let path = paths.target_socket();
    let asked = tokio::task::spawn_blocking(move || {
        let mut stream = std::os::unix::net::UnixStream::connect(path).ok()?;
        codec::write_message(&mut stream, &request).ok()?;
        codec::read_message(&mut stream).ok()
    });
    asked.await.unwrap()
}
