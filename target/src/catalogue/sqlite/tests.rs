use super::*;

fn at(epoch: u64, seq: u64) -> Lsn {
    Lsn::new(Epoch::new(epoch), Seq::new(seq))
}

fn volume(name: &str) -> VolumeRow {
    VolumeRow {
        volume: VolumeId::random(),
        name: VolumeName::new(name).unwrap(),
        host: HostId::random(),
        size: VolumeSize::new(1 << 20).unwrap(),
        blocks: BlockSizes::E512,
        point_interval_ms: 5_000,
        unprotected: false,
        policy: "all:2h".into(),
        points_upto: Lsn::ZERO,
    }
}

fn point(lsn: Lsn, name: &str) -> NewPoint {
    NewPoint {
        lsn,
        time: WallTime::from_nanos(7),
        kind: PointKind::App,
        name: name.into(),
        marker: MarkerId::random(),
    }
}

fn fresh() -> (tempfile::TempDir, SqliteCatalogue) {
    let dir = tempfile::tempdir().unwrap();
    let catalogue = SqliteCatalogue::open(&dir.path().join("c.sqlite")).unwrap();
    (dir, catalogue)
}

#[test]
fn everything_is_there_after_reopening() {
    let (dir, mut catalogue) = fresh();
    let host = HostRow {
        host: HostId::random(),
        name: "db1".into(),
        enrolled: WallTime::from_nanos(9),
        removed: false,
    };
    let volume = volume("pgdata");
    catalogue.put_host(&host).unwrap();
    catalogue.put_volume(&volume).unwrap();
    let points = [point(at(2, 1), ""), point(at(1, u64::MAX), "first")];
    catalogue.add_points(volume.volume, &points, at(2, 1), Age(3)).unwrap();
    catalogue.set_age(Age(42)).unwrap();
    drop(catalogue);
    let catalogue = SqliteCatalogue::open(&dir.path().join("c.sqlite")).unwrap();
    assert_eq!(catalogue.host(host.host).unwrap(), Some(host.clone()));
    assert_eq!(catalogue.hosts().unwrap(), [host]);
    let kept = catalogue.points(volume.volume, None, 0).unwrap();
    let places: Vec<Lsn> = kept.iter().map(|p| p.at.lsn).collect();
    assert_eq!(places, [at(2, 1), at(1, u64::MAX)], "newest first, in the order of places");
    assert_eq!(kept[1].at, points[1]);
    let kept = &catalogue.volumes().unwrap()[0];
    assert_eq!((kept.points_upto, kept.policy.as_str()), (at(2, 1), "all:2h"));
    assert_eq!(catalogue.age().unwrap(), Age(42));
}

#[test]
fn a_point_is_recorded_once_and_numbers_are_never_reused() {
    let (_dir, mut catalogue) = fresh();
    let id = volume("v").volume;
    catalogue.add_points(id, &[point(at(1, 1), "a")], at(1, 1), Age(0)).unwrap();
    catalogue.add_points(id, &[point(at(1, 1), "again")], at(1, 1), Age(0)).unwrap();
    let kept = catalogue.points(id, None, 0).unwrap();
    assert_eq!(kept.len(), 1);
    assert_eq!(kept[0].at.name, "a");
    catalogue.drop_points(&[kept[0].point]).unwrap();
    catalogue.add_points(id, &[point(at(1, 2), "b")], at(1, 2), Age(0)).unwrap();
    assert!(catalogue.points(id, None, 1).unwrap()[0].point > kept[0].point);
    assert_eq!(catalogue.point_summary(id).unwrap().count, 1);
}

#[test]
fn points_are_found_by_what_people_say_and_listed_in_pieces() {
    let (_dir, mut catalogue) = fresh();
    let id = volume("v").volume;
    let crash = |n| NewPoint { kind: PointKind::Crash, ..point(at(1, n), "") };
    let points = [crash(1), point(at(1, 2), "x"), point(at(1, 3), "x"), crash(4)];
    catalogue.add_points(id, &points, at(1, 4), Age(0)).unwrap();
    let seq = |wanted| {
        let found = catalogue.find_point(id, &wanted).unwrap();
        found.map(|row| row.at.lsn.seq.get())
    };
    assert_eq!(seq(Wanted::Newest), Some(4));
    assert_eq!(seq(Wanted::OfKind(PointKind::App)), Some(3));
    assert_eq!(seq(Wanted::OfKind(PointKind::Group)), None);
    assert_eq!(seq(Wanted::Named("x".into())), Some(3));
    assert_eq!(seq(Wanted::Named("y".into())), None);
    assert_eq!(seq(Wanted::At(at(1, 1))), Some(1));
    let first = catalogue.points(id, None, 0).unwrap()[3].point;
    assert_eq!(seq(Wanted::Numbered(first)), Some(1));
    let piece = catalogue.points(id, Some(at(1, 4)), 2).unwrap();
    let seqs: Vec<u64> = piece.iter().map(|row| row.at.lsn.seq.get()).collect();
    assert_eq!(seqs, [3, 2]);
    assert_eq!(catalogue.find_point(VolumeId::random(), &Wanted::Newest).unwrap(), None);
}

#[test]
fn a_catalogue_of_the_first_version_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.sqlite");
    let old = SCHEMA.replace(", policy TEXT NOT NULL DEFAULT ''", "");
    let (views, rest) = old.split_once(", time INTEGER, point INTEGER,\n").unwrap();
    let (_, rest) = rest.split_once("flatten_why TEXT").unwrap();
    let old = format!("{views}{rest}PRAGMA user_version = 1;");
    let db = Connection::open(&file).unwrap();
    db.execute_batch(&old).unwrap();
    let row = "INSERT INTO volumes VALUES (zeroblob(16), 'v', zeroblob(16), 1048576, 512,
               512, 5000, 0, zeroblob(16))";
    db.execute(row, []).unwrap();
    let row = "INSERT INTO views VALUES (zeroblob(16), zeroblob(16), zeroblob(16), 1, 2, NULL, '')";
    db.execute(row, []).unwrap();
    drop(db);
    for _ in 0..2 {
        let mut catalogue = SqliteCatalogue::open(&file).unwrap();
        let mut volume = catalogue.volumes().unwrap().remove(0);
        assert_eq!((volume.name.as_str(), volume.point_interval_ms), ("v", 5_000));
        assert_eq!(volume.policy, "", "as the configuration says");
        assert_eq!(catalogue.open_views().unwrap(), [], "views of then ended with their daemon");
        assert_eq!(catalogue.is_closed(ViewId::from_bytes([0; 16])).unwrap(), Some(true));
        volume.policy = String::new();
        catalogue.put_volume(&volume).unwrap();
    }
    Connection::open(&file).unwrap().pragma_update(None, "user_version", 99).unwrap();
    assert!(matches!(SqliteCatalogue::open(&file), Err(CatalogueError::Newer(99))));
}

#[test]
fn a_view_is_known_until_it_is_closed_and_may_lose_its_device() {
    let (dir, mut catalogue) = fresh();
    let mut view = ViewRow {
        view: ViewId::random(),
        volume: VolumeId::random(),
        lsn: at(3, 1042),
        opened: WallTime::from_nanos(9),
        open_micros: 3120,
        time: WallTime::from_nanos(7),
        point: Some(PointId::new(12)),
        size: VolumeSize::new(1 << 20).unwrap(),
        export: VolumeName::new("pgdata").unwrap(),
        read_only: true,
        scratch_bytes: 4096,
        tls_address: Some("192.0.2.7:10809".into()),
        device: Some("/dev/ublkb3".into()),
        device_lost: None,
        image: Some("/srv/shop.img".into()),
        flatten: None,
    };
    let other = ViewRow {
        view: ViewId::random(),
        opened: WallTime::from_nanos(10),
        point: None,
        tls_address: None,
        device: None,
        read_only: false,
        image: None,
        flatten: Some(FlattenRow {
            to: "/srv/other.img".into(),
            rate: 5,
            force: true,
            ended: Some((6623, "it differs".into())),
        }),
        ..view.clone()
    };
    for row in [&other, &view] {
        catalogue.put_view(row).unwrap();
    }
    (view.device, view.device_lost) = (None, Some("taken away".into()));
    catalogue.put_view(&view).unwrap();
    drop(catalogue);
    let mut catalogue = SqliteCatalogue::open(&dir.path().join("c.sqlite")).unwrap();
    assert_eq!(catalogue.open_views().unwrap(), [view.clone(), other.clone()]);
    assert_eq!(catalogue.is_closed(other.view).unwrap(), Some(false));
    assert_eq!(catalogue.is_closed(ViewId::random()).unwrap(), None);
    catalogue.close_view(other.view, WallTime::from_nanos(11), "fine").unwrap();
    assert_eq!(catalogue.is_closed(other.view).unwrap(), Some(true));
    assert_eq!(catalogue.open_views().unwrap(), [view]);
}

#[test]
fn what_is_said_of_a_point_is_there_with_it_and_may_come_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut catalogue = SqliteCatalogue::open(&dir.path().join("c.sqlite")).unwrap();
    let (volume, other) = (VolumeId::random(), VolumeId::random());
    let late = Problem::harmless(3404, "a hook was late", "30s", "raise it");
    let post = Problem::harmless(3403, "a post hook failed", "1", "mend it");
    for problem in [&late, &post] {
        catalogue.add_point_note(volume, at(1, 5), problem).unwrap();
    }
    assert_eq!(catalogue.point_note(volume, at(1, 5)).unwrap(), Some(late), "the first");
    assert_eq!(catalogue.point_note(volume, at(1, 6)).unwrap(), None);
    assert_eq!(catalogue.point_note(other, at(1, 5)).unwrap(), None);
}

#[test]
fn a_token_works_once_and_not_after_its_time() {
    let (_dir, mut catalogue) = fresh();
    let time = WallTime::from_nanos;
    catalogue.put_token([1; 32], "db1", time(100)).unwrap();
    catalogue.put_token([2; 32], "db2", time(100)).unwrap();
    assert_eq!(catalogue.take_token([9; 32], time(50)).unwrap(), None);
    assert_eq!(catalogue.take_token([1; 32], time(100)).unwrap(), Some("db1".into()));
    assert_eq!(catalogue.take_token([1; 32], time(100)).unwrap(), None);
    assert_eq!(catalogue.take_token([2; 32], time(101)).unwrap(), None);
    assert_eq!(catalogue.take_token([2; 32], time(50)).unwrap(), None, "swept when too old");
}

#[test]
fn the_event_log_is_newest_first_and_bounded() {
    let (_dir, mut catalogue) = fresh();
    for n in 0..3u16 {
        let event = EventRow {
            time: WallTime::from_nanos(i64::from(n)),
            code: n,
            volume: (n > 0).then(|| VolumeName::new("v").unwrap()),
            text: format!("event {n}"),
        };
        catalogue.add_event(&event).unwrap();
    }
    let events = catalogue.events(2).unwrap();
    assert_eq!(events.iter().map(|e| e.code).collect::<Vec<_>>(), [2, 1]);
    catalogue
        .db
        .execute("UPDATE sqlite_sequence SET seq = 10002 WHERE name = 'events'", [])
        .unwrap();
    let event = EventRow { code: 7, ..events[0].clone() };
    catalogue.add_event(&event).unwrap();
    assert_eq!(catalogue.events(0).unwrap(), [event]);
}
