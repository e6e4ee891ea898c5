//! Wall time as people write it. Orders nothing.

use farshore_extent::WallTime;

/// `2026-11-21 10:14:05.123 UTC`.
pub(crate) fn show(time: WallTime) -> String {
    match jiff::Timestamp::from_nanosecond(i128::from(time.nanos())) {
        Ok(stamp) => stamp.strftime("%Y-%m-%d %H:%M:%S%.3f UTC").to_string(),
        Err(_) => format!("{} ns", time.nanos()),
    }
}
