//! `farshore policy` on a whole site: preview, confirmation, and points that are really thinned.
#![allow(clippy::unwrap_used)] // a test that cannot go on fails

mod harness;

use std::time::Duration;

use harness::{Site, assert_same_bytes, run, said, wait_for};

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn a_policy_is_previewed_confirmed_and_then_thins_the_points() {
    let site = Site::new();
    let _daemons = site.start_all();
    let (image, uri) = site.protect("disk", 16 << 20, "100ms");
    site.wait_protected("disk");
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'1' * 65536, 0)"]);
    let named = site.tag("disk", "named");
    let before = site.root().join("before.img");
    std::fs::copy(&image, &before).unwrap();
    run("nbdsh", &["-u", &uri, "-c", "h.pwrite(b'2' * 65536, 0)"]);
    wait_for("points", Duration::from_secs(60), || (site.points("disk").len() > 30).then_some(()));

    let shown = json(&site.cli(&["policy", "show", "disk", "--json"]));
    assert_eq!(shown["policy"]["policy"], "standard");
    let set = ["policy", "set", "disk", "10s:1h", "--every", "1h"];
    for how in ["--preview", "--dry-run"] {
        let told = json(&site.cli(&[&set[..], &[how, "--json"]].concat()));
        assert_eq!(told["schema"], "farshore.policy/1");
        assert!(told["preview"]["go"].as_u64().unwrap() > 10, "{told}");
    }
    let text = site.cli(&[&set[..], &["--preview"]].concat());
    assert!(text.contains("free no space") && text.ends_with("nothing was changed\n"), "{text}");
    let asked = site.try_cli(&set);
    assert_eq!(asked.status.code(), Some(4), "{}", said(&asked));
    assert!(said(&asked).contains("FS-4902") && said(&asked).contains("go for good"));
    let shown = json(&site.cli(&["policy", "show", "disk", "--json"]));
    assert_eq!(shown["policy"]["policy"], "standard", "nothing was changed until now");

    site.cli(&[&set[..], &["--yes"]].concat());
    let most = 12; // a slot of 10 s each in about a minute, the named one and the newest
    wait_for("points to be thinned", Duration::from_secs(60), || {
        (site.points("disk").len() <= most).then_some(())
    });
    let listed = json(&site.cli(&["policy", "show", "disk", "--json"]));
    assert_eq!(listed["policy"]["policy"], "10s:1h");
    assert_eq!(listed["policy"]["interval_ms"], 3_600_000);
    let choice = farshore_protocol::admin::PointChoice::Id(named.point);
    let copy = site.fetch_view(&site.open("disk", choice), "named.img");
    assert_same_bytes(&before, &copy, "the named point stays and is right");

    let wrong = site.try_cli(&["policy", "set", "disk", "1d:1h", "--yes"]);
    assert_eq!(wrong.status.code(), Some(2), "{}", said(&wrong));
    assert!(said(&wrong).contains("FS-6540"));
    let unknown = site.try_cli(&["policy", "show", "nothing"]);
    assert_eq!(unknown.status.code(), Some(3), "{}", said(&unknown));
    assert!(site.cli(&["policy", "list"]).contains("every-15m"));
}
