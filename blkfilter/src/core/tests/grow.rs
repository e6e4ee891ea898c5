//! Growing while in use.

use super::super::*;
use super::rig::{Rig, continues, copy_start, limits, sectors};
use crate::device::DeviceError;

fn same(rig: &Rig) {
    assert_eq!(rig.replicas[0].image, rig.disks[0]);
    assert!(rig.replicas[0].ordered);
}

#[test]
fn the_new_part_of_a_grown_volume_is_sent_without_order_and_then_followed() {
    let (mut rig, v) = Rig::ordered(16, 64);
    assert_eq!(rig.grow(v, 32, NewPart::Unknown), Ok(true));
    assert_eq!(rig.story(v), ["lost", "resize"].map(String::from));
    assert!(rig.core.is_catching_up(v));
    assert!(rig.status(v).reason.contains("grown"));
    assert_eq!(rig.status(v).dirty_bytes, sectors(16, 16).len(), "nothing old is sent again");
    assert!(rig.copy_wanted, "the copy loop is woken");
    rig.drain();
    same(&rig);
    assert_eq!(rig.disks[0][31], 0xDEAD, "what the disk held there arrived");
    rig.write(v, sectors(30, 2));
    rig.drain();
    same(&rig);
}

#[test]
fn a_new_part_of_zeroes_costs_no_order() {
    let (mut rig, v) = Rig::ordered(15, 64);
    let flying = rig.write(v, sectors(12, 3));
    assert_eq!(rig.grow(v, 33, NewPart::Zero), Ok(true));
    rig.finish(flying);
    rig.write(v, sectors(14, 4));
    rig.finish_all();
    assert_eq!(rig.story(v).len(), 3, "{:?}", rig.story(v));
    assert_eq!(rig.story(v)[0], "resize", "nothing but the new size was recorded");
    assert!(!rig.core.is_catching_up(v));
    rig.drain();
    assert_eq!(rig.replicas[0].image.len(), 33);
    same(&rig);
}

#[test]
fn zeroes_behind_a_short_chunk_that_waits_for_its_copy_arrive_too() {
    let mut rig = Rig::new(limits());
    let v = rig.attach(6, 64, copy_start());
    rig.copy(v, None);
    let tail = rig.copy(v, None);
    assert_eq!(rig.grow(v, 11, NewPart::Zero), Ok(true));
    rig.finish(tail);
    rig.write(v, sectors(5, 4));
    rig.drain();
    same(&rig);
}

#[test]
fn the_same_size_is_no_growth_and_a_smaller_one_is_refused() {
    let (mut rig, v) = Rig::ordered(16, 16);
    assert_eq!(rig.grow(v, 16, NewPart::Unknown), Ok(false));
    assert!(matches!(rig.grow(v, 8, NewPart::Unknown), Err(Refused::Shrinks { .. })));
    assert!(rig.story(v).is_empty() && !rig.core.is_catching_up(v), "nothing has changed");
}

#[test]
fn a_short_last_chunk_that_grows_under_its_copy_is_sent_whole() {
    let mut rig = Rig::new(limits());
    let v = rig.attach(5, 64, copy_start());
    rig.copy(v, None);
    let tail = rig.copy(v, None);
    let index = rig.running(tail).unwrap();
    rig.take_effect(index);
    assert_eq!(rig.grow(v, 11, NewPart::Unknown), Ok(true));
    rig.drain();
    same(&rig);
}

#[test]
fn writes_in_flight_and_markers_that_wait_outlive_the_growth() {
    let (mut rig, v) = Rig::ordered(6, 64);
    let spec = MarkerSpec { pending: true, ..rig.spec(&[v]) };
    let placed = rig.command(|core, now, out| core.marker(now, &spec, out)).unwrap();
    assert_eq!(placed.volumes.len(), 1);
    let tail = rig.write(v, sectors(4, 2));
    let bad = rig.write(v, sectors(0, 1));
    assert_eq!(rig.grow(v, 16, NewPart::Unknown), Ok(true));
    let index = rig.running(bad).unwrap();
    rig.complete(index, Some(DeviceError::Io));
    rig.finish(tail);
    rig.command(|core, now, out| core.resolve_marker(now, spec.marker, true, out)).unwrap();
    assert!(rig.story(v).contains(&"commit".into()));
    rig.drain();
    same(&rig);
}

#[test]
fn a_new_copy_tells_the_grown_size_again() {
    let (mut rig, v) = Rig::ordered(16, 64);
    rig.grow(v, 24, NewPart::Unknown).unwrap();
    rig.command(|core, now, out| core.recopy(now, v, "asked".into(), out)).unwrap();
    rig.drain();
    same(&rig);
}

#[test]
fn a_volume_that_is_not_there_cannot_grow() {
    let mut rig = Rig::new(limits());
    let v = rig.attach(16, 16, continues());
    rig.core.detach(v).unwrap();
    assert_eq!(rig.grow(v, 32, NewPart::Unknown), Err(Refused::NoSuchVolume));
}
