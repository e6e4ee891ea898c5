//! The bytes of every message, pinned. A changed line is a changed protocol: give it a new
//! version, or undo the change. Fields and variants are appended, never moved.
//!
//! `FARSHORE_BLESS=1 cargo test -p farshore-protocol --test golden` writes the files anew.
#![allow(clippy::unwrap_used)] // in a test a panic is the report

#[path = "golden/failover.rs"]
mod failover;

use std::collections::BTreeSet;
use std::fmt::{Debug, Write};
use std::path::PathBuf;

use farshore_changelog::codec;
use farshore_extent::{
    BlockSizes, CaptureOrder, Chain, Epoch, Extent, Generation, HostId, Lsn, PairState, PointId,
    PointKind, Problem, Seq, ViewId, VolumeId, VolumeName, VolumeSize, WallTime,
};
use farshore_protocol::admin::{
    AgentReply, AgentRequest, AgentStatus, AgentVolume, CutPoint, EventInfo, FlattenInfo,
    FlattenState, FlattenView, HostInfo, MergedPoints, OpenView, PointChoice, PointInfo,
    PolicyInfo, PolicyReport, ReplicaStatus, SetPolicy, SpoolInfo, SpoolLevel, TargetReply,
    TargetRequest, TierReport, ViewInfo,
};
use farshore_protocol::message::{
    FromAgent, FromTarget, OpenVolume, Opened, Verdict, VolumeReport,
};
use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

fn volume() -> VolumeId {
    VolumeId::from_bytes([0x11; 16])
}

fn host() -> HostId {
    HostId::from_bytes([0x22; 16])
}

fn view() -> ViewId {
    ViewId::from_bytes([0x33; 16])
}

fn name() -> VolumeName {
    VolumeName::new("pgdata").unwrap()
}

fn lsn() -> Lsn {
    Lsn::new(Epoch::new(3), Seq::new(1042))
}

fn chain() -> Chain {
    Chain::from_bytes([0x44; 32])
}

fn time() -> WallTime {
    WallTime::from_nanos(1_763_700_000_123_456_789)
}

fn size() -> VolumeSize {
    VolumeSize::new(10 << 30).unwrap()
}

fn problem() -> Problem {
    Problem::harmless(5002, "what", "why", "next")
}

fn from_agent() -> Vec<FromAgent> {
    vec![
        FromAgent::Hello {
            versions: vec![2, 1],
            host: host(),
            host_name: "db1".into(),
            software: "0.1.0".into(),
        },
        FromAgent::Enroll {
            secret: "secret".into(),
            host: host(),
            host_name: "db1".into(),
            csr: vec![0x30, 0x82],
        },
        FromAgent::Renew { csr: vec![0x30] },
        FromAgent::Open(OpenVolume {
            volume: volume(),
            name: name(),
            size: size(),
            blocks: BlockSizes::E512,
            generation: Generation::new(1),
            acked: lsn(),
            acked_chain: chain(),
            point_interval_ms: Some(30_000),
        }),
        FromAgent::Close { volume: volume(), unprotected: true },
        FromAgent::Report(VolumeReport {
            volume: volume(),
            captured: lsn(),
            backlog_bytes: 1,
            copy_remaining: 2,
            copy_total: 3,
            copy_rate: 4,
            reason: "initial sync".into(),
            now: time(),
        }),
        FromAgent::Tagged { request: 7, result: Ok(lsn()) },
        FromAgent::Tagged { request: 8, result: Err(problem()) },
        FromAgent::Ping(9),
        FromAgent::PointNote { volumes: vec![volume()], lsn: lsn(), problem: problem() },
    ]
}

const fn from_agent_name(message: &FromAgent) -> &'static str {
    match message {
        FromAgent::Hello { .. } => "hello",
        FromAgent::Enroll { .. } => "enroll",
        FromAgent::Renew { .. } => "renew",
        FromAgent::Open(_) => "open",
        FromAgent::Close { .. } => "close",
        FromAgent::Report(_) => "report",
        FromAgent::Tagged { result: Ok(_), .. } => "tagged",
        FromAgent::Tagged { result: Err(_), .. } => "not-tagged",
        FromAgent::Ping(_) => "ping",
        FromAgent::PointNote { .. } => "point-note",
    }
}

fn opened(verdict: Verdict) -> FromTarget {
    FromTarget::Opened(Opened {
        volume: volume(),
        generation: Generation::new(1),
        durable: lsn(),
        chain: chain(),
        verdict,
        point_interval_ms: 5_000,
    })
}

fn from_target() -> Vec<FromTarget> {
    vec![
        FromTarget::Welcome { version: 1, now: time() },
        FromTarget::Certificate { certificate: vec![1, 2], ca: vec![3] },
        opened(Verdict::Continue),
        opened(Verdict::Recopy),
        FromTarget::Refused { volume: Some(volume()), problem: problem(), retry: true },
        FromTarget::Refused { volume: None, problem: problem(), retry: false },
        FromTarget::Ack { volume: volume(), durable: lsn(), chain: chain() },
        FromTarget::Reopen { volume: volume(), reason: "gap".into() },
        FromTarget::Compared {
            volume: volume(),
            upto: lsn(),
            differing: vec![Extent::new(4096, 8192).unwrap()],
        },
        FromTarget::Policy { volume: volume(), point_interval_ms: 1_000 },
        FromTarget::Tag {
            request: 7,
            volumes: vec![volume()],
            kind: PointKind::App,
            name: "before-upgrade".into(),
        },
        FromTarget::Replica {
            volume: volume(),
            points: 288,
            newest_point: time(),
            oldest_point: WallTime::from_nanos(0),
        },
        FromTarget::Pong(9),
    ]
}

const fn from_target_name(message: &FromTarget) -> &'static str {
    match message {
        FromTarget::Welcome { .. } => "welcome",
        FromTarget::Certificate { .. } => "certificate",
        FromTarget::Opened(opened) => match opened.verdict {
            Verdict::Continue => "opened-continue",
            Verdict::Recopy => "opened-recopy",
        },
        FromTarget::Refused { volume: Some(_), .. } => "refused-volume",
        FromTarget::Refused { volume: None, .. } => "refused-connection",
        FromTarget::Ack { .. } => "ack",
        FromTarget::Reopen { .. } => "reopen",
        FromTarget::Compared { .. } => "compared",
        FromTarget::Policy { .. } => "policy",
        FromTarget::Tag { .. } => "tag",
        FromTarget::Replica { .. } => "replica",
        FromTarget::Pong(_) => "pong",
    }
}

fn open_view(point: PointChoice) -> TargetRequest {
    let tls_listen = Some(":10809".into());
    let plain = OpenView::new(name(), point);
    TargetRequest::OpenView(OpenView { scratch_bytes: 1 << 30, tls_listen, device: true, ..plain })
}

fn target_request() -> Vec<TargetRequest> {
    vec![
        TargetRequest::Status,
        TargetRequest::Points { volume: name(), limit: 10 },
        TargetRequest::Tag { volumes: vec![name()], name: "x".into(), kind: PointKind::App },
        TargetRequest::NewToken {
            host_name: "db1".into(),
            valid_seconds: 900,
            address: "backup:9443".into(),
        },
        TargetRequest::Hosts,
        open_view(PointChoice::Latest),
        open_view(PointChoice::LatestApp),
        open_view(PointChoice::Id(PointId::new(312))),
        open_view(PointChoice::Name("x".into())),
        open_view(PointChoice::Time(time())),
        open_view(PointChoice::At(lsn())),
        TargetRequest::Views,
        TargetRequest::CloseView { view: view(), note: "equal".into() },
        TargetRequest::SetInterval { volume: name(), interval_ms: 1_000 },
        TargetRequest::Events { limit: 5 },
        TargetRequest::PointsBefore { volume: name(), before: lsn(), limit: 5 },
        TargetRequest::Policies,
        TargetRequest::Policy { volume: name() },
        TargetRequest::SetPolicy(SetPolicy {
            volume: name(),
            policy: "all:1h,1m:24h".into(),
            interval_ms: Some(5_000),
            preview: true,
        }),
        TargetRequest::Scrub { volume: name() },
        TargetRequest::FlattenView(FlattenView {
            view: view(),
            to: "/srv/shop.img".into(),
            force: true,
            bytes_per_second: 1 << 20,
        }),
        TargetRequest::StopFlatten { view: view() },
    ]
}

const fn target_request_name(request: &TargetRequest) -> &'static str {
    match request {
        TargetRequest::Status => "status",
        TargetRequest::Points { .. } => "points",
        TargetRequest::Tag { .. } => "tag",
        TargetRequest::NewToken { .. } => "new-token",
        TargetRequest::Hosts => "hosts",
        TargetRequest::OpenView(open) => match open.point {
            PointChoice::Latest => "open-latest",
            PointChoice::LatestApp => "open-latest-app",
            PointChoice::Id(_) => "open-id",
            PointChoice::Name(_) => "open-name",
            PointChoice::Time(_) => "open-time",
            PointChoice::At(_) => "open-at",
        },
        TargetRequest::Views => "views",
        TargetRequest::CloseView { .. } => "close-view",
        TargetRequest::SetInterval { .. } => "set-interval",
        TargetRequest::Events { .. } => "events",
        TargetRequest::PointsBefore { .. } => "points-before",
        TargetRequest::Policies => "policies",
        TargetRequest::Policy { .. } => "policy",
        TargetRequest::SetPolicy(_) => "set-policy",
        TargetRequest::Scrub { .. } => "scrub",
        TargetRequest::FlattenView(_) => "flatten-view",
        TargetRequest::StopFlatten { .. } => "stop-flatten",
        TargetRequest::PreviewFailover(_) => "preview-failover",
        TargetRequest::Failover(_) => "failover",
        TargetRequest::CancelFailover { .. } => "cancel-failover",
        TargetRequest::Jobs { .. } => "jobs",
        TargetRequest::Job { .. } => "job",
    }
}

fn point_info() -> PointInfo {
    PointInfo {
        point: PointId::new(312),
        volume: name(),
        lsn: lsn(),
        time: time(),
        kind: PointKind::Crash,
        name: String::new(),
        pinned: true,
        note: Some(problem()),
    }
}

fn view_info() -> ViewInfo {
    ViewInfo {
        view: view(),
        volume: name(),
        size: size(),
        lsn: lsn(),
        time: time(),
        point: Some(PointId::new(312)),
        nbd_socket: "/run/farshore/views/pgdata-33333333.sock".into(),
        export: "pgdata".into(),
        tls_address: Some("10.0.0.1:10809".into()),
        opened: time(),
        open_micros: 812,
        scratch_used: 4096,
        scratch_bytes: 1 << 30,
        device: Some("/dev/ublkb3".into()),
        device_lost: Some("another program stopped the device".into()),
        read_only: false,
        image: Some("/srv/shop.img".into()),
        flatten: Some(FlattenInfo {
            to: "/srv/other.img".into(),
            state: FlattenState::Stopped,
            total_bytes: 1 << 30,
            to_copy_bytes: 1 << 20,
            to_verify_bytes: 4096,
        }),
        problems: vec![problem()],
    }
}

fn replica_status() -> ReplicaStatus {
    ReplicaStatus {
        volume: volume(),
        name: name(),
        host_name: "db1".into(),
        size: size(),
        state: PairState::Protected,
        order: CaptureOrder::Ordered,
        connected: true,
        rpo_ms: Some(3_100),
        rpo_target_ms: 30_000,
        lag_bytes: 1,
        copy_remaining: 2,
        copy_total: 3,
        copy_rate: 4,
        journaled: lsn(),
        floor: Lsn::ZERO,
        points: 288,
        newest_point: Some(time()),
        oldest_point: None,
        last_drill: Some(time()),
        views: 1,
        journal_bytes: 64 << 20,
        held_bytes: 1 << 20,
        digests: 5,
        differing: 6,
        last_scrub: Some(time()),
        scrub_found: 7,
        scrub_bytes: Some(8),
        unverified_bytes: 9,
        problems: vec![problem()],
        failover: Some(failover::info()),
    }
}

fn policy_info() -> PolicyInfo {
    PolicyInfo {
        name: "every-30s".into(),
        tiers: "30s:1h,1h:24h".into(),
        built_in: true,
        default: false,
        interval_ms: Some(30_000),
        volumes: vec![name()],
    }
}

fn policy_report() -> PolicyReport {
    let tier = TierReport { tier: "1m:24h".into(), points: 1440, oldest_point: Some(time()) };
    PolicyReport {
        volume: name(),
        policy: "standard".into(),
        default: true,
        tiers: vec![tier],
        interval_ms: 5_000,
        stay: 2_000,
        go: 3,
        oldest_point: None,
        floor: Lsn::ZERO,
        floor_then: lsn(),
        journal_bytes: 64 << 20,
        freed_bytes: Some(1 << 20),
        full_bytes: None,
    }
}

fn target_reply() -> Vec<Result<TargetReply, Problem>> {
    let host = HostInfo { host: host(), name: "db1".into(), enrolled: time(), connected: true };
    vec![
        Ok(TargetReply::Status(vec![replica_status()])),
        Ok(TargetReply::Points(vec![point_info()])),
        Ok(TargetReply::Tagged(vec![point_info()])),
        Ok(TargetReply::Token("fs1.x".into())),
        Ok(TargetReply::Hosts(vec![host])),
        Ok(TargetReply::View(Box::new(view_info()))),
        Ok(TargetReply::Views(vec![view_info()])),
        Ok(TargetReply::Events(vec![event()])),
        Ok(TargetReply::Done),
        Ok(TargetReply::Policies(vec![policy_info()])),
        Ok(TargetReply::Policy(Box::new(policy_report()))),
        Ok(TargetReply::FailoverPreview(Box::new(failover::preview()))),
        Ok(TargetReply::Job(Box::new(failover::job()))),
        Ok(TargetReply::Jobs(vec![failover::job()])),
        Err(problem()),
    ]
}

fn event() -> EventInfo {
    EventInfo { time: time(), code: 5002, volume: Some(name()), text: "refused".into() }
}

const fn target_reply_name(reply: &Result<TargetReply, Problem>) -> &'static str {
    match reply {
        Ok(TargetReply::Status(_)) => "status",
        Ok(TargetReply::Points(_)) => "points",
        Ok(TargetReply::Tagged(_)) => "tagged",
        Ok(TargetReply::Token(_)) => "token",
        Ok(TargetReply::Hosts(_)) => "hosts",
        Ok(TargetReply::View(_)) => "view",
        Ok(TargetReply::Views(_)) => "views",
        Ok(TargetReply::Events(_)) => "events",
        Ok(TargetReply::Done) => "done",
        Ok(TargetReply::Policies(_)) => "policies",
        Ok(TargetReply::Policy(_)) => "policy",
        Ok(TargetReply::FailoverPreview(_)) => "failover-preview",
        Ok(TargetReply::Job(_)) => "job",
        Ok(TargetReply::Jobs(_)) => "jobs",
        Err(_) => "problem",
    }
}

fn agent_reply() -> Vec<Result<AgentReply, Problem>> {
    let volume = AgentVolume {
        volume: volume(),
        name: name(),
        problem: Some(problem()),
        sent: lsn(),
        journaled: lsn(),
        journaled_time: time(),
        points: 288,
        newest_point: Some(time()),
        oldest_point: None,
        raw_bytes: 1,
        wire_bytes: 2,
        spool: SpoolInfo {
            level: SpoolLevel::Spooling,
            bytes: 3,
            since: Some(time()),
            problem: None,
            merged: Some(MergedPoints { points: 4, from: time(), to: time() }),
        },
    };
    let status = AgentStatus {
        target: "backup:9443".into(),
        connected: false,
        problem: Some(problem()),
        retry_in_ms: Some(1_000),
        volumes: vec![volume],
    };
    let cut = CutPoint {
        volumes: vec![name()],
        lsn: lsn(),
        time: time(),
        kind: PointKind::Crash,
        name: "before-upgrade".into(),
        note: Some(problem()),
    };
    vec![
        Ok(AgentReply::Status(status)),
        Ok(AgentReply::Events(vec![event()])),
        Err(problem()),
        Ok(AgentReply::Tagged(cut)),
    ]
}

const fn agent_reply_name(reply: &Result<AgentReply, Problem>) -> &'static str {
    match reply {
        Ok(AgentReply::Status(_)) => "status",
        Ok(AgentReply::Events(_)) => "events",
        Ok(AgentReply::Tagged(_)) => "tagged",
        Err(_) => "problem",
    }
}

const fn agent_request_name(request: &AgentRequest) -> &'static str {
    match request {
        AgentRequest::Status => "status",
        AgentRequest::Events { .. } => "events",
        AgentRequest::Tag { .. } => "tag",
    }
}

/// Compares with `golden/FILE`, one line a message, and reads the golden bytes back.
fn pin<M>(file: &str, messages: &[M], name: fn(&M) -> &'static str)
where
    M: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let names: BTreeSet<&str> = messages.iter().map(name).collect();
    assert_eq!(names.len(), messages.len(), "each form of a message once");
    let mut lines = String::new();
    for message in messages {
        let bytes = codec::encode(message).unwrap();
        let hex = bytes.iter().fold(String::new(), |mut hex, b| {
            write!(hex, "{b:02x}").unwrap();
            hex
        });
        writeln!(lines, "{} {hex}", name(message)).unwrap();
    }
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(file);
    if std::env::var_os("FARSHORE_BLESS").is_some() {
        std::fs::write(&path, &lines).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap();
    for (golden, message) in golden.lines().zip(messages) {
        let (_, hex) = golden.split_once(' ').unwrap();
        let bytes: Vec<u8> = hex
            .as_bytes()
            .chunks(2)
            .map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap())
            .collect();
        let decoded: M = codec::decode(&bytes).unwrap();
        assert_eq!(&decoded, message, "{file}");
    }
    assert_eq!(golden, lines, "{file} does not hold these messages: the protocol has changed");
}

#[test]
fn messages_of_the_agent_keep_their_bytes() {
    pin("from-agent.txt", &from_agent(), from_agent_name);
}

#[test]
fn messages_of_the_target_keep_their_bytes() {
    pin("from-target.txt", &from_target(), from_target_name);
}

#[test]
fn requests_and_replies_of_the_admin_sockets_keep_their_bytes() {
    let requests = [target_request(), failover::requests()].concat();
    pin("target-request.txt", &requests, target_request_name);
    pin("target-reply.txt", &target_reply(), target_reply_name);
    let agent_request = [
        AgentRequest::Status,
        AgentRequest::Events { limit: 50 },
        AgentRequest::Tag { volumes: vec![name()], name: "before-upgrade".into(), app: true },
    ];
    pin("agent-request.txt", &agent_request, agent_request_name);
    pin("agent-reply.txt", &agent_reply(), agent_reply_name);
}

fn any_form(bytes: &[u8]) {
    let _ = codec::decode::<FromAgent>(bytes);
    let _ = codec::decode::<FromTarget>(bytes);
    let _ = codec::decode::<TargetRequest>(bytes);
    let _ = codec::decode::<Result<TargetReply, Problem>>(bytes);
}

proptest! {
    #[test]
    fn any_bytes_are_a_message_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        any_form(&bytes);
    }

    #[test]
    fn a_damaged_message_is_a_message_or_an_error(
        which in any::<prop::sample::Index>(), place in any::<prop::sample::Index>(), value: u8,
    ) {
        let messages = from_agent();
        let mut bytes = codec::encode(&messages[which.index(messages.len())]).unwrap();
        let at = place.index(bytes.len());
        bytes[at] = value;
        any_form(&bytes);
        any_form(&bytes[..at]);
    }
}
