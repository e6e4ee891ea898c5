use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

use farshore_changelog::codec::encode;
use farshore_extent::Code;

use super::*;
use crate::sys::fdpass::send_with_fd;
use crate::sys::pool::PoolMemory;

type Server = Box<dyn FnMut(Request, &UnixStream) + Send>;

/// A daemon that answers each request of each connection by `answer`, until `connections` ended.
fn serve(path: &Path, connections: usize, mut answer: Server) -> JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for _ in 0..connections {
            let (mut stream, _) = listener.accept().unwrap();
            while let Ok(request) = read_message(&mut stream) {
                answer(request, &stream);
            }
        }
    })
}

fn send(mut stream: &UnixStream, reply: Result<Reply, Problem>) {
    write_message(&mut stream, &reply).unwrap();
}

fn socket() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("filterd.sock");
    (dir, path)
}

#[test]
fn a_daemon_that_does_not_run_is_named_with_the_way_to_start_it() {
    let (_dir, path) = socket();
    let problem = Client::connect(&path).unwrap_err();
    assert_eq!(problem.code, Code(5901));
    assert!(problem.what.contains("filterd.sock") && problem.next.contains("farshore filterd"));
}

#[test]
fn answers_and_problems_of_the_daemon_arrive_unchanged() {
    let (_dir, path) = socket();
    let refused = Problem::harmless(4012, "mounted", "why", "next");
    let said = refused.clone();
    let server = serve(
        &path,
        1,
        Box::new(move |request, stream| {
            send(
                stream,
                match request {
                    Request::List => Ok(Reply::Volumes(Vec::new())),
                    Request::Drain { timeout_ms, .. } => Ok(Reply::Drained(timeout_ms == 1500)),
                    Request::Release { .. } => Ok(Reply::Done),
                    _ => Err(said.clone()),
                },
            );
        }),
    );
    let mut client = Client::connect(&path).unwrap();
    assert!(client.list().unwrap().is_empty());
    assert!(client.drain(VolumeId::NIL, Duration::from_millis(1500)).unwrap());
    client.release(VolumeId::NIL, Lsn::ZERO).unwrap();
    assert_eq!(client.recopy(VolumeId::NIL, "lost").unwrap_err(), refused);
    // A refusal is an answer: the connection is still in step.
    assert!(client.list().is_ok());
    drop(client);
    server.join().unwrap();
}

#[test]
fn the_pool_arrives_by_descriptor_and_is_mapped() {
    let (_dir, path) = socket();
    let pool = PoolMemory::shared(1 << 16).unwrap();
    let mut slice = pool.reserve(4096).unwrap();
    slice.bytes_mut().fill(0x5a);
    let place = slice.offset();
    let mut honest = true;
    let server = serve(
        &path,
        2,
        Box::new(move |_, stream| {
            let len = if honest { 1 << 16 } else { 1 << 20 };
            honest = false;
            let reply: Result<Reply, Problem> = Ok(Reply::Pool { len });
            let body = encode(&reply).unwrap();
            let mut framed = u32::try_from(body.len()).unwrap().to_le_bytes().to_vec();
            framed.extend(body);
            let fd = pool.read_only_fd().unwrap();
            send_with_fd(stream, &framed, fd.as_fd()).unwrap();
        }),
    );
    let mut client = Client::connect(&path).unwrap();
    let mapped = client.open_pool(VolumeId::NIL).unwrap();
    assert!(mapped.bytes(place, 4096).unwrap().iter().all(|&b| b == 0x5a));
    assert_eq!(client.open_pool(VolumeId::NIL).unwrap_err().code, Code(5907));
    drop(client);
    drop(UnixStream::connect(&path).unwrap());
    server.join().unwrap();
}

#[test]
fn a_lost_connection_is_reported_once_and_made_again() {
    let (_dir, path) = socket();
    let mut first = true;
    let server = serve(
        &path,
        2,
        Box::new(move |_, stream| {
            if std::mem::take(&mut first) {
                stream.shutdown(std::net::Shutdown::Both).unwrap();
            } else {
                send(stream, Ok(Reply::Volumes(Vec::new())));
            }
        }),
    );
    let mut client = Client::connect(&path).unwrap();
    assert_eq!(client.list().unwrap_err().code, Code(5904));
    assert!(client.list().unwrap().is_empty());
    drop(client);
    server.join().unwrap();
}

#[test]
fn an_answer_of_another_kind_or_garbage_is_not_trusted() {
    let (_dir, path) = socket();
    let mut round = 0;
    let server = serve(
        &path,
        3,
        Box::new(move |_, mut stream| {
            round += 1;
            match round {
                1 => send(stream, Ok(Reply::Done)),
                2 => std::io::Write::write_all(&mut stream, &[0xff; 8]).unwrap(),
                _ => send(stream, Ok(Reply::Volumes(Vec::new()))),
            }
        }),
    );
    let mut client = Client::connect(&path).unwrap();
    assert_eq!(client.list().unwrap_err().code, Code(5907));
    assert_eq!(client.list().unwrap_err().code, Code(5907));
    assert!(client.list().is_ok());
    drop(client);
    server.join().unwrap();
}

#[test]
fn a_daemon_that_hangs_does_not_hang_its_callers() {
    let (_dir, path) = socket();
    let _listener = UnixListener::bind(&path).unwrap();
    let mut client = Client::connect(&path).unwrap();
    let stream = client.stream.as_ref().unwrap();
    let error = talk(stream, &Request::List, Duration::from_millis(30)).unwrap_err();
    let problem = client.lost(&error, Duration::from_millis(30));
    assert_eq!(problem.code, Code(5904));
    assert!(problem.what.contains("did not answer"));
    client.stream = None;
}

#[test]
fn a_request_that_a_restarted_daemon_never_read_is_sent_again() {
    let (_dir, path) = socket();
    let listener = UnixListener::bind(&path).unwrap();
    let mut client = Client::connect(&path).unwrap();
    // The daemon ends: its end of the connection is closed, and another one listens.
    drop(listener.accept().unwrap());
    drop(listener);
    std::fs::remove_file(&path).unwrap();
    let server =
        serve(&path, 1, Box::new(|_, stream| send(stream, Ok(Reply::Volumes(Vec::new())))));
    assert_eq!(client.list().unwrap(), Vec::new());
    drop(client);
    server.join().unwrap();
}
