//! Which point a person means: `latest`, `app`, `p-12`, `tag:NAME`, `lsn:E.S`, or a time.

use farshore_extent::{Problem, WallTime};
use farshore_protocol::admin::PointChoice;
use jiff::tz::TimeZone;

/// Reads `--point`.
pub fn point(text: &str) -> Result<PointChoice, Problem> {
    point_at(text, WallTime::now(), &TimeZone::system())
}

fn point_at(text: &str, now: WallTime, zone: &TimeZone) -> Result<PointChoice, Problem> {
    let wrong = |why: String| {
        Problem::harmless(
            1905,
            format!("`{text}` does not name a point"),
            why,
            "use latest, app, p-12, tag:NAME, lsn:EPOCH.SEQ or a time such as '2026-11-21 10:14'",
        )
    };
    if let Some(name) = text.strip_prefix("tag:") {
        let named = !name.is_empty();
        return named
            .then(|| PointChoice::Name(name.to_owned()))
            .ok_or_else(|| wrong("the name after tag: is missing".into()));
    }
    if let Some(place) = text.strip_prefix("lsn:") {
        return place.parse().map(PointChoice::At).map_err(wrong);
    }
    match text {
        "latest" => return Ok(PointChoice::Latest),
        "app" => return Ok(PointChoice::LatestApp),
        _ => {}
    }
    if let Ok(id) = text.parse() {
        return Ok(PointChoice::Id(id));
    }
    crate::units::parse_instant(text, now, zone)
        .map(PointChoice::Time)
        .ok_or_else(|| wrong("it is neither a point's number nor a time".into()))
}

/// A choice as a person would type it.
pub fn shown(choice: &PointChoice) -> String {
    match choice {
        PointChoice::Latest => "latest".into(),
        PointChoice::LatestApp => "app".into(),
        PointChoice::Id(id) => id.to_string(),
        PointChoice::Name(name) => format!("tag:{name}"),
        PointChoice::Time(time) => crate::units::instant(*time),
        PointChoice::At(lsn) => format!("lsn:{lsn}"),
    }
}

#[cfg(test)]
mod tests {
    use farshore_extent::{Epoch, Lsn, PointId, Seq};

    use super::*;

    #[test]
    fn every_way_to_name_a_point_is_understood() {
        let now = WallTime::from_nanos(1_795_252_500_000_000_000);
        let at = |text| point_at(text, now, &TimeZone::UTC);
        let lsn = Lsn::new(Epoch::new(3), Seq::new(1042));
        for (text, choice) in [
            ("latest", PointChoice::Latest),
            ("app", PointChoice::LatestApp),
            ("p-312", PointChoice::Id(PointId::new(312))),
            ("p-0312", PointChoice::Id(PointId::new(312))),
            ("tag:before-upgrade", PointChoice::Name("before-upgrade".into())),
            ("lsn:3.1042", PointChoice::At(lsn)),
            (
                "2026-11-21 09:14",
                PointChoice::Time(WallTime::from_nanos(1_795_252_440_000_000_000)),
            ),
            ("1m ago", PointChoice::Time(WallTime::from_nanos(1_795_252_440_000_000_000))),
        ] {
            assert_eq!(at(text), Ok(choice), "{text}");
        }
        for bad in ["", "p-", "tag:", "lsn:7", "noon"] {
            assert_eq!(at(bad).unwrap_err().code.0, 1905, "{bad}");
        }
    }
}
