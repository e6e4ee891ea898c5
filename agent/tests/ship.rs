//! The whole agent, as the binary runs it, between a hand-made `filterd` and a hand-made target
//! over real sockets and real TLS.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // a test that cannot go on fails

mod support;

use std::path::Path;
use std::sync::Arc;

use farshore_agent::config::Config;
use farshore_agent::{EnrollOptions, enroll, run};
use farshore_changelog::RecordBody;
use farshore_changelog::codec::{read_message, write_message};
use farshore_extent::{PointKind, Problem, VolumeId, WallTime};
use farshore_protocol::admin::{AgentReply, AgentRequest, AgentStatus};
use farshore_protocol::message::FromTarget;
use farshore_protocol::paths::Paths;
use farshore_protocol::token::SERVER_NAME;
use support::filterd::FakeFilterd;
use support::target::{Ca, FakeTarget, Mood};
use support::{block_on, until};
use tokio::sync::oneshot;

/// An enrolled, running agent.
struct Agent {
    paths: Paths,
    stop: Option<oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<Result<(), Problem>>,
}

impl Agent {
    async fn enrolled(root: &Path, target: &FakeTarget) -> Self {
        let paths = Paths::under(root);
        enroll(&target.token(), &paths, &EnrollOptions::default()).await.unwrap();
        Self::start(paths, Config::default())
    }

    fn start(paths: Paths, config: Config) -> Self {
        let (stop, stopped) = oneshot::channel();
        let shutdown = async { drop(stopped.await) };
        let task = tokio::spawn(run(config, paths.clone(), shutdown));
        Self { paths, stop: Some(stop), task }
    }

    fn status(&self) -> Option<AgentStatus> {
        let mut stream = std::os::unix::net::UnixStream::connect(self.paths.agent_socket()).ok()?;
        write_message(&mut stream, &AgentRequest::Status).ok()?;
        let reply: Result<AgentReply, Problem> = read_message(&mut stream).ok()?;
        match reply.unwrap() {
            AgentReply::Status(status) => Some(status),
            AgentReply::Events(_) | AgentReply::Tagged(_) => panic!("asked for the status"),
        }
    }

    fn problem(&self) -> Option<u16> {
        self.status()?.problem.map(|p| p.code.0)
    }

    async fn stop(mut self) {
        drop(self.stop.take());
        (&mut self.task).await.unwrap().unwrap();
    }
}

fn data(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| seed.wrapping_add(u8::try_from(i % 251).unwrap())).collect()
}

fn released(filterd: &FakeFilterd, volume: VolumeId) -> u64 {
    filterd.with(|s| s.volumes[&volume].released.seq.get())
}

#[test]
fn changes_of_two_volumes_arrive_and_are_released_over_restarts_of_everything() {
    let dir = tempfile::tempdir().unwrap();
    block_on(async {
        let filterd = FakeFilterd::serve(&Paths::under(dir.path()).filterd_socket());
        let (a, b) = (filterd.protect("a"), filterd.protect("b"));
        let target = FakeTarget::serve().await;
        let agent = Agent::enrolled(dir.path(), &target).await;

        let first = filterd.write(a, 4096, &data(1, 8192));
        filterd.write(b, 0, &data(2, 1 << 20));
        until("both are released", || released(&filterd, a) > 0 && released(&filterd, b) > 0).await;
        assert_eq!(target.replica(a).payloads[&first.get()], data(1, 8192));

        // The connection breaks, with changes on both sides of it.
        target.disconnect_all();
        for i in 0..40u8 {
            filterd.write(a, u64::from(i) * 4096, &data(i, 4096));
        }
        let last = filterd.write(a, 0, &[0; 65536]);
        until("a is released", || released(&filterd, a) == last.get()).await;
        let zero = target.replica(a).records.last().cloned().unwrap();
        assert!(matches!(zero.body, RecordBody::Zero { extent, .. } if extent.len() == 65536));

        // filterd is restarted: another epoch, another pool.
        filterd.restart();
        let last = filterd.write(b, 512, &data(9, 512));
        until("b is released", || released(&filterd, b) == last.get()).await;
        assert_eq!(target.replica(b).payloads[&last.get()], data(9, 512));

        // The agent is restarted, and goes on where the target is.
        let paths = agent.paths.clone();
        agent.stop().await;
        let last = filterd.write(a, 512, &data(8, 512));
        let agent = Agent::start(paths, Config::default());
        until("a is released again", || released(&filterd, a) == last.get()).await;

        let well = |s: AgentStatus| s.connected && s.problem.is_none();
        until("status says so", || agent.status().is_some_and(well)).await;
        let status = agent.status().unwrap();
        assert_eq!(status.volumes.len(), 2);
        until("reports arrive", || target.with(|s| s.reports > 0)).await;
        for volume in [a, b] {
            assert_eq!(target.replica(volume).reopens, 0, "a batch did not fit");
            assert_eq!(filterd.with(|s| s.volumes[&volume].recopies), 0);
        }
        // A volume that is no longer protected leaves; one that is new comes.
        filterd.with(|s| s.volumes.remove(&b));
        let c = filterd.protect("c");
        let last = filterd.write(c, 0, &data(3, 4096));
        until("c is released", || released(&filterd, c) == last.get()).await;
        until("b has left", || agent.status().is_some_and(|s| s.volumes.len() == 2)).await;
        agent.stop().await;
    });
}

#[test]
fn a_target_that_lost_what_it_acknowledged_gets_everything_copied_again() {
    let dir = tempfile::tempdir().unwrap();
    block_on(async {
        let filterd = FakeFilterd::serve(&Paths::under(dir.path()).filterd_socket());
        let volume = filterd.protect("a");
        let target = FakeTarget::serve().await;
        let agent = Agent::enrolled(dir.path(), &target).await;
        filterd.write(volume, 0, &data(1, 4096));
        until("released", || released(&filterd, volume) > 0).await;
        target.with(|s| s.replicas.clear());
        target.disconnect_all();
        until("copied again", || filterd.with(|s| s.volumes[&volume].recopies) == 1).await;
        let last = filterd.write(volume, 0, &data(2, 4096));
        until("released again", || released(&filterd, volume) == last.get()).await;
        let bodies: Vec<RecordBody> =
            target.replica(volume).records.into_iter().map(|r| r.body).collect();
        assert!(matches!(bodies[0], RecordBody::OrderLost), "{bodies:?}");
        agent.stop().await;
    });
}

#[test]
fn changes_damaged_in_memory_are_never_shipped() {
    let dir = tempfile::tempdir().unwrap();
    block_on(async {
        let filterd = FakeFilterd::serve(&Paths::under(dir.path()).filterd_socket());
        let volume = filterd.protect("a");
        let target = FakeTarget::serve().await;
        let bad = filterd.write(volume, 0, &data(1, 4096));
        filterd.damage_newest(volume);
        let agent = Agent::enrolled(dir.path(), &target).await;
        until("copied again", || filterd.with(|s| s.volumes[&volume].recopies) > 0).await;
        let last = filterd.write(volume, 0, &data(2, 4096));
        until("released", || released(&filterd, volume) == last.get()).await;
        let replica = target.replica(volume);
        assert!(!replica.payloads.contains_key(&bad.get()));
        assert!(matches!(replica.records[0].body, RecordBody::OrderLost));
        agent.stop().await;
    });
}

#[test]
fn points_are_cut_at_the_targets_interval_and_tags_on_demand_with_one_number_for_all() {
    let dir = tempfile::tempdir().unwrap();
    block_on(async {
        let filterd = FakeFilterd::serve(&Paths::under(dir.path()).filterd_socket());
        let (a, b) = (filterd.protect("a"), filterd.protect("b"));
        let target = FakeTarget::serve().await;
        target.with(|s| s.point_interval_ms = 100);
        let agent = Agent::enrolled(dir.path(), &target).await;
        let markers = |volume| {
            let is_marker = |r: &&_| {
                matches!(r, &&farshore_changelog::Record { body: RecordBody::Marker(_), .. })
            };
            target.replica(volume).records.iter().filter(is_marker).count()
        };
        until("points arrive", || markers(a) >= 3 && markers(b) >= 3).await;
        let shared = filterd.with(|s| s.markers.iter().filter(|m| m.volumes.len() == 2).count());
        assert!(shared >= 2, "volumes with one interval share a marker");

        let message = FromTarget::Tag {
            request: 77,
            volumes: vec![a],
            kind: PointKind::App,
            name: "before-upgrade".into(),
        };
        target.say(&message);
        until("the tag is answered", || target.with(|s| !s.tagged.is_empty())).await;
        let (request, result) = target.with(|s| s.tagged[0].clone());
        assert_eq!(request, 77);
        let lsn = result.unwrap();
        until("the tag arrives", || target.replica(a).durable >= lsn).await;
        let records = target.replica(a).records;
        let tag = records.iter().find(|r| r.seq == lsn.seq).unwrap();
        let RecordBody::Marker(marker) = &tag.body else { panic!("{tag:?}") };
        // There is no freezer on this host: a point all the same, and the reason before the answer.
        assert_eq!((marker.name.as_str(), marker.kind), ("before-upgrade", PointKind::Crash));
        assert_eq!(target.with(|s| s.notes.clone()), [3401]);

        // No points while the order is lost, and a tag is refused.
        filterd.with(|s| {
            for v in s.volumes.values_mut() {
                v.order = farshore_extent::CaptureOrder::CatchUp;
            }
        });
        target.say(&FromTarget::Policy { volume: b, point_interval_ms: 0 });
        let seen = filterd.with(|s| s.markers.len());
        until("a tag is refused", || {
            let volumes = vec![a];
            let (kind, name) = (PointKind::Crash, String::new());
            target.say(&FromTarget::Tag { request: 78, volumes, kind, name });
            target.with(|s| s.tagged.iter().any(|(n, r)| *n == 78 && r.is_err()))
        })
        .await;
        let settled = filterd.with(|s| s.markers.len());
        assert!(settled >= seen);
        tokio::time::sleep(std::time::Duration::from_millis(350)).await;
        assert_eq!(filterd.with(|s| s.markers.len()), settled, "a point while catching up");

        target.say(&FromTarget::Replica {
            volume: a,
            points: 5,
            newest_point: WallTime::from_nanos(50),
            oldest_point: WallTime::from_nanos(10),
        });
        until("status shows the points", || {
            agent.status().is_some_and(|s| s.volumes.iter().any(|v| v.points == 5))
        })
        .await;
        agent.stop().await;
    });
}

#[test]
fn hostile_answers_are_survived_and_named() {
    let dir = tempfile::tempdir().unwrap();
    block_on(async {
        let filterd = FakeFilterd::serve(&Paths::under(dir.path()).filterd_socket());
        let volume = filterd.protect("a");
        let target = FakeTarget::serve().await;
        target.with(|s| s.mood = Mood::Garbage);
        let agent = Agent::enrolled(dir.path(), &target).await;
        for mood in [Mood::Garbage, Mood::HugeFrame, Mood::StrangeVersion] {
            target.with(|s| s.mood = mood);
            let hellos = target.with(|s| s.hellos);
            until("it tries again", || target.with(|s| s.hellos) >= hellos + 2).await;
            until("it is named", || agent.problem() == Some(5105)).await;
        }
        // Acknowledgements of the future release nothing.
        target.with(|s| s.mood = Mood::AcksTheFuture);
        let last = filterd.write(volume, 0, &data(1, 4096));
        until("it was opened again", || target.replica(volume).opens >= 2).await;
        target.with(|s| s.mood = Mood::Honest);
        until("all is well in the end", || released(&filterd, volume) == last.get()).await;
        agent.stop().await;
    });
}

#[test]
fn a_refusal_or_a_foreign_target_is_not_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    block_on(async {
        let _filterd = FakeFilterd::serve(&Paths::under(dir.path()).filterd_socket());
        let target = FakeTarget::serve().await;
        target.with(|s| s.mood = Mood::Refuses);
        let agent = Agent::enrolled(dir.path(), &target).await;
        until("the refusal is shown", || agent.problem() == Some(5004)).await;
        assert_eq!(target.with(|s| s.hellos), 1);
        assert_eq!(agent.status().unwrap().retry_in_ms, None);
        let paths = agent.paths.clone();
        agent.stop().await;

        // Another target at another address, with a CA of its own; and one with our CA whose
        // certificate is not the target's.
        let foreign = FakeTarget::serve().await;
        let any = "127.0.0.1:0".parse().unwrap();
        let other_name = FakeTarget::start(target.ca.clone(), any, "some-host").await;
        for impostor in [&foreign, &other_name] {
            let address = Some(impostor.address.to_string());
            let config = Config { target: address, ..Config::default() };
            let agent = Agent::start(paths.clone(), config);
            until("the impostor is named", || agent.problem() == Some(5103)).await;
            tokio::time::sleep(std::time::Duration::from_millis(400)).await;
            assert_eq!(impostor.with(|s| (s.hellos, s.accepts)), (0, 1));
            agent.stop().await;
        }
    });
}

#[test]
fn enrolment_tells_what_is_wrong_and_changes_nothing_then() {
    let dir = tempfile::tempdir().unwrap();
    block_on(async {
        let paths = Paths::under(dir.path());
        let options = EnrollOptions::default();
        let code = async |token: &str| enroll(token, &paths, &options).await.unwrap_err().code.0;
        assert_eq!(code("fs1.nonsense").await, 5202);

        let target = FakeTarget::serve().await;
        let used = target.token();
        target.with(|s| s.secret = None);
        assert_eq!(code(&used).await, 5002, "the target's own words");

        let foreign = FakeTarget::serve().await;
        let swapped = foreign.token().parse::<farshore_protocol::token::Token>().unwrap();
        let swapped =
            farshore_protocol::token::Token { address: target.address.to_string(), ..swapped };
        assert_eq!(code(&swapped.to_string()).await, 5203);
        let any = "127.0.0.1:0".parse().unwrap();
        let ca = Arc::new(Ca::new());
        let other_name = FakeTarget::start(ca, any, "some-host").await;
        assert_eq!(code(&other_name.token()).await, 5203);
        let gone = target.token();
        let address = target.address;
        let ca = target.ca.clone();
        drop(target);
        until("it is gone", || std::net::TcpStream::connect(address).is_err()).await;
        assert_eq!(code(&gone).await, 5101);
        assert!(!paths.state.join("agent").join("identity.json").exists());
        let missing = run(Config::default(), paths.clone(), std::future::pending()).await;
        assert_eq!(missing.unwrap_err().code.0, 5201);

        // And a good one: private, with a default configuration, again with the same identity.
        let target = FakeTarget::start(ca, address, SERVER_NAME).await;
        let first = enroll(&target.token(), &paths, &options).await.unwrap();
        let file = paths.state.join("agent").join("identity.json");
        let mode = std::os::unix::fs::PermissionsExt::mode(&file.metadata().unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(Config::load(&paths).unwrap(), Config::default());
        assert!(paths.etc.join("agent.toml").exists());
        let second = enroll(&target.token(), &paths, &options).await.unwrap();
        assert_eq!((second.host, second.again), (first.host, true));
    });
}

#[test]
fn a_certificate_with_a_third_of_its_life_left_renews_itself() {
    let dir = tempfile::tempdir().unwrap();
    block_on(async {
        let _filterd = FakeFilterd::serve(&Paths::under(dir.path()).filterd_socket());
        let target = FakeTarget::serve().await;
        target.with(|s| s.certificate_days = 10); // 30 days old
        let agent = Agent::enrolled(dir.path(), &target).await;
        let file = agent.paths.state.join("agent").join("identity.json");
        let before = std::fs::read(&file).unwrap();
        until("it is renewed", || target.with(|s| s.renewals == 1)).await;
        until("it is kept", || std::fs::read(&file).unwrap() != before).await;
        let hellos = target.with(|s| s.hellos);
        target.disconnect_all();
        until("it connects with the new one", || target.with(|s| s.hellos) > hellos).await;
        until("no more is asked", || agent.status().is_some_and(|s| s.connected)).await;
        tokio::time::sleep(std::time::Duration::from_millis(1200)).await;
        assert_eq!(target.with(|s| s.renewals), 1);
        agent.stop().await;
    });
}

#[test]
fn a_second_agent_on_the_same_state_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    block_on(async {
        let target = FakeTarget::serve().await;
        let agent = Agent::enrolled(dir.path(), &target).await;
        until("it runs", || agent.status().is_some()).await;
        let second = run(Config::default(), agent.paths.clone(), std::future::pending()).await;
        assert_eq!(second.unwrap_err().code.0, 5206);
        agent.stop().await;
    });
}
