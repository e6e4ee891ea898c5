//! Views over restarts of the daemon: what was written to them, the places that they hold, and what
//! is said when one cannot be served.

use std::path::PathBuf;
use std::time::Duration;

use farshore_extent::{Lsn, PointKind, ViewId, VolumeName};
use farshore_protocol::admin::{OpenView, PointChoice, TargetReply, TargetRequest, ViewInfo};
use farshore_protocol::config::ByteSize;

use crate::bed::{Bed, Host, LONG};
use crate::connection::Connection;
use crate::points_and_views::{copy, run};
use crate::source::Source;

fn name() -> VolumeName {
    VolumeName::new("pgdata").unwrap()
}

/// A source with one point, and a host to come back as.
async fn replicated(bed: &Bed) -> (Host, Source, Connection, Lsn) {
    let host = bed.enroll("db1").await;
    let mut source = Source::new("pgdata");
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.begin();
    source.write(0, 65_536, 1);
    let one = source.marker("", PointKind::Crash);
    source.ship(&mut connection).await;
    (host, source, connection, one)
}

async fn ask_until<T>(
    bed: &Bed,
    request: TargetRequest,
    done: impl Fn(TargetReply) -> Option<T>,
) -> T {
    let there = async {
        loop {
            if let Some(found) = bed.ask(request.clone()).await.ok().and_then(&done) {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LONG, there).await.expect("the daemon does not come to it")
}

async fn open(bed: &Bed, point: PointChoice) -> ViewInfo {
    let request = TargetRequest::OpenView(OpenView::new(name(), point));
    ask_until(bed, request, |reply| match reply {
        TargetReply::View(view) => Some(*view),
        _ => None,
    })
    .await
}

async fn views(bed: &Bed, done: impl Fn(&[ViewInfo]) -> bool) -> Vec<ViewInfo> {
    ask_until(bed, TargetRequest::Views, |reply| match reply {
        TargetReply::Views(views) => done(&views).then_some(views),
        _ => None,
    })
    .await
}

async fn all_served(bed: &Bed) -> Vec<ViewInfo> {
    views(bed, |views| views.iter().all(|view| view.problems.is_empty())).await
}

async fn write(view: &ViewInfo, script: &str) {
    let uri = format!("nbd+unix:///{}?socket={}", view.export, view.nbd_socket.display());
    let (ok, text) = run("nbdsh", vec!["-u".into(), uri, "-c".into(), script.into()]).await;
    assert!(ok, "{text}");
}

async fn close(bed: &Bed, view: ViewId) {
    let request = TargetRequest::CloseView { view, note: String::new() };
    assert_eq!(bed.ask(request).await, Ok(TargetReply::Done));
}

fn scratch(bed: &Bed, view: &ViewInfo) -> PathBuf {
    let views = bed.paths.state.join("target/views");
    assert!(views.is_dir(), "{}", views.display());
    views.join(view.view.to_string())
}

async fn floor(bed: &Bed, done: impl Fn(Lsn) -> bool) -> Lsn {
    ask_until(bed, TargetRequest::Status, |reply| match reply {
        TargetReply::Status(status) => Some(status[0].floor).filter(|floor| done(*floor)),
        _ => None,
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_view_is_served_again_with_its_writes_and_what_it_needs_does_not_expire() {
    let mut bed = Bed::start_with(|config| config.limits.views = 2).await;
    let (host, mut source, connection, one) = replicated(&bed).await;
    let (kept, other) =
        (open(&bed, PointChoice::At(one)).await, open(&bed, PointChoice::At(one)).await);
    write(&kept, "h.pwrite(b'\\x77' * 8192, 12288)\nh.zero(4096, 0)\nh.flush()").await;
    write(&other, "h.pwrite(b'\\x99' * 512, 40960, nbd.CMD_FLAG_FUA)").await;
    drop(connection);
    bed.stop().await;
    assert!(!kept.nbd_socket.exists());

    bed.resume_with(|config| config.retention = "200ms".into()).await;
    let again = all_served(&bed).await;
    assert_eq!(again.len(), 2);
    let same = again.iter().find(|view| view.view == kept.view).unwrap();
    assert_eq!(*same, ViewInfo { scratch_used: 8192, ..kept.clone() });
    // Everything at the point expires, but for the views.
    let mut connection = bed.connect(&host).await;
    source.open(&mut connection).await;
    source.write(0, 65_536, 0xEE);
    let two = source.marker("", PointKind::Crash);
    source.ship(&mut connection).await;
    let held = floor(&bed, |floor| floor >= one).await;
    assert_eq!(held, one, "the views hold it");
    let mut expected = source.history[&one].1.clone();
    let untouched = expected.clone();
    expected[12288..20480].fill(0x77);
    expected[..4096].fill(0);
    assert!(copy(same, &bed.root().join("kept.img")).await == expected);
    let mut expected = untouched;
    expected[40960..41472].fill(0x99);
    assert!(copy(&other, &bed.root().join("other.img")).await == expected);

    for view in again {
        let dir = scratch(&bed, &view);
        assert!(dir.join("data").exists() && dir.join("map").exists());
        close(&bed, view.view).await;
        assert!(!dir.exists(), "its scratch is gone");
    }
    floor(&bed, |floor| floor >= two).await;
    bed.stop().await;
    bed.resume().await;
    assert_eq!(views(&bed, |_| true).await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_view_with_a_damaged_scratch_is_told_and_kept_until_it_is_closed() {
    let mut bed = Bed::start().await;
    let (_host, _source, connection, one) = replicated(&bed).await;
    let broken = open(&bed, PointChoice::At(one)).await;
    let whole = open(&bed, PointChoice::At(one)).await;
    write(&broken, "h.pwrite(b'1' * 4096, 0)\nh.flush()\nh.pwrite(b'2' * 4096, 8192)\nh.flush()")
        .await;
    drop(connection);
    bed.stop().await;
    let map = scratch(&bed, &broken).join("map");
    let mut bytes = std::fs::read(&map).unwrap();
    let sound = bytes.clone();
    // In the first of two records.
    bytes[512 + 45] ^= 4;
    std::fs::write(&map, &bytes).unwrap();
    // A scratch that the catalogue does not know, and one that nobody has written to.
    let stray = scratch(&bed, &broken).with_file_name(ViewId::random().to_string());
    std::fs::create_dir(&stray).unwrap();
    std::fs::copy(&map, stray.join("map")).unwrap();
    let unused = stray.with_file_name(ViewId::random().to_string());
    std::fs::create_dir(&unused).unwrap();

    bed.resume().await;
    let told = |views: &[ViewInfo]| {
        let problem = |view: &ViewInfo| view.problems.first().cloned();
        let of = |id| views.iter().find(|view| view.view == id);
        of(whole.view).is_some_and(|view| view.problems.is_empty())
            && of(broken.view)
                .and_then(problem)
                .is_some_and(|p| p.code.0 == 6610 && p.why.contains("record 1 at 512"))
    };
    views(&bed, told).await;
    assert!(stray.join("map").exists() && !unused.exists());
    let Ok(TargetReply::Events(events)) = bed.ask(TargetRequest::Events { limit: 0 }).await else {
        panic!()
    };
    let codes: Vec<u16> = events.iter().map(|event| event.code).collect();
    assert!(codes.contains(&6610) && codes.contains(&6611), "{codes:?}");
    assert_eq!(std::fs::read(&map).unwrap(), bytes, "nothing was cut or thrown away");
    // Mended, it is served by itself.
    std::fs::write(&map, sound).unwrap();
    let again = all_served(&bed).await;
    assert_eq!(again.iter().find(|view| view.view == broken.view).unwrap().scratch_used, 8192);
    close(&bed, broken.view).await;
    assert!(!map.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn alarms_tell_of_a_full_scratch_and_of_journal_that_a_view_keeps() {
    let bed = Bed::start_with(|config| {
        config.retention = "200ms".into();
        config.limits.view_hold = ByteSize::from_bytes(0);
    })
    .await;
    let (_host, mut source, mut connection, one) = replicated(&bed).await;
    let request = OpenView { scratch_bytes: 8192, ..OpenView::new(name(), PointChoice::At(one)) };
    let view = ask_until(&bed, TargetRequest::OpenView(request), |reply| match reply {
        TargetReply::View(view) => Some(*view),
        _ => None,
    })
    .await;
    let alarm = async |code| {
        let told = |view: &ViewInfo| view.problems.iter().any(|p| p.code.0 == code);
        views(&bed, |views| views.iter().any(told)).await;
    };
    write(&view, "h.pwrite(b'1' * 7168, 0)").await;
    alarm(6614).await;
    let full = "try:\n  h.pwrite(b'2' * 4096, 65536)\n  raise SystemExit(1)\n\
                except nbd.Error as e:\n  assert e.errno == 'ENOSPC', e\n\
                h.pwrite(b'3' * 4096, 0)\nh.flush()\nassert h.pread(512, 65536)";
    write(&view, full).await;
    // Enough for a segment that is full.
    for n in 0..200u8 {
        source.write_noise(0, 65_536, n);
        if n % 20 == 0 {
            source.ship(&mut connection).await;
        }
    }
    let last = source.marker("", PointKind::Crash);
    source.ship(&mut connection).await;
    alarm(6617).await;
    let status = ask_until(&bed, TargetRequest::Status, |reply| match reply {
        TargetReply::Status(mut status) => status.pop().filter(|r| r.held_bytes > 0),
        _ => None,
    })
    .await;
    assert!(status.problems.iter().any(|p| p.code.0 == 6617), "{:?}", status.problems);
    let told = ask_until(&bed, TargetRequest::Events { limit: 0 }, |reply| match reply {
        TargetReply::Events(events) => {
            let codes: Vec<u16> = events.iter().map(|event| event.code).collect();
            (codes.contains(&6614) && codes.contains(&6617)).then_some(codes)
        }
        _ => None,
    })
    .await;
    assert_eq!(told.iter().filter(|code| **code == 6614).count(), 1, "told once");
    close(&bed, view.view).await;
    floor(&bed, |floor| floor >= last).await;
    ask_until(&bed, TargetRequest::Status, |reply| match reply {
        TargetReply::Status(mut status) => status.pop().filter(|r| r.held_bytes == 0),
        _ => None,
    })
    .await;
}
