//! Rules of the write path: numbers, range lock, failures, gate, markers.

use farshore_extent::{Lsn, Seq};

use super::super::*;
use super::rig::{Rig, attach, continues, limits, sectors};
use crate::control::DescriptorBody;
use crate::device::DeviceError;

fn seqs(rig: &Rig, volume: VolumeKey) -> Vec<u64> {
    let mut records = vec![];
    rig.core.fetch(volume, Lsn::ZERO, usize::MAX, u64::MAX, &mut records).unwrap();
    records.iter().map(|r| r.seq.get()).collect()
}

#[test]
fn one_counter_numbers_the_writes_of_all_volumes_at_their_completion() {
    let mut rig = Rig::new(limits());
    let a = rig.attach(16, 16, continues());
    let b = rig.attach(16, 16, continues());
    let first = rig.write(a, sectors(0, 1));
    let second = rig.write(b, sectors(0, 1));
    let third = rig.write(a, sectors(4, 1));
    assert_eq!(rig.core.last().seq, Seq::new(2), "only the two epoch starts have numbers");
    assert!(!rig.answered(first), "no answer before the number");
    rig.finish(second);
    assert!(rig.answered(second));
    rig.finish(third);
    rig.finish(first);
    assert_eq!(seqs(&rig, a), [1, 4, 5]);
    assert_eq!(seqs(&rig, b), [2, 3]);
}

#[test]
fn overlapping_writes_reach_the_backing_one_after_the_other() {
    let (mut rig, v) = Rig::ordered(16, 16);
    let first = rig.write(v, sectors(0, 4));
    let second = rig.write(v, sectors(2, 4));
    let apart = rig.write(v, sectors(8, 1));
    assert!(rig.running(second).is_none() && rig.running(apart).is_some());
    rig.finish(first);
    assert!(rig.running(second).is_some());
    rig.finish_all();
    assert_eq!(rig.story(v), ["write 0+4", "write 8+1", "write 2+4"].map(String::from));
    rig.read_and_release(v);
    assert_eq!(rig.replicas[0].image, rig.disks[0]);
}

#[test]
fn a_failed_write_is_unknown_with_its_own_number_and_is_read_again() {
    let (mut rig, v) = Rig::ordered(16, 16);
    let bad = rig.write(v, sectors(5, 1));
    let index = rig.running(bad).unwrap();
    rig.take_effect(index);
    rig.complete(index, Some(DeviceError::NoSpace));
    assert_eq!(rig.answers[&bad], Err(DeviceError::NoSpace));
    assert_eq!(rig.story(v), ["lost", "unknown 5+1"].map(String::from));
    assert_eq!(rig.status(v).backing_errors, 1);
    assert_eq!(rig.status(v).pool_used, 0);
    rig.drain();
    assert_eq!(rig.replicas[0].image, rig.disks[0]);
    assert!(rig.replicas[0].ordered);
}

#[test]
fn a_flush_needs_no_record_and_no_lock() {
    let (mut rig, v) = Rig::ordered(16, 16);
    let write = rig.write(v, sectors(0, 4));
    let flush = rig.flush(v);
    rig.finish(flush);
    assert!(rig.answered(flush) && !rig.answered(write));
    assert!(rig.story(v).is_empty());
}

#[test]
fn zeroes_are_recorded_without_data() {
    let (mut rig, v) = Rig::ordered(16, 16);
    let zero = rig.zero(v, sectors(0, 8));
    let behind = rig.write(v, sectors(7, 1));
    assert!(rig.running(behind).is_none(), "a zero holds its range alone");
    rig.finish(zero);
    assert_eq!(rig.story(v), ["zero 0+8"]);
    assert_eq!(rig.status(v).payload, 0);
    rig.finish(behind);
}

#[test]
fn a_marker_takes_one_number_for_all_volumes_and_skips_those_catching_up() {
    let mut rig = Rig::new(limits());
    let a = rig.attach(16, 16, continues());
    let b = rig.attach(16, 16, continues());
    let c = rig.attach(16, 16, super::rig::copy_start());
    let spec = rig.spec(&[a, b, c]);
    let placed = rig.command(|core, now, out| core.marker(now, &spec, out)).unwrap();
    assert_eq!(placed.volumes.len(), 2);
    assert_eq!(placed.not_ordered, [rig.status(c).volume]);
    assert_eq!(rig.story(a), ["marker"]);
    assert_eq!(rig.story(b), ["marker"]);
    assert!(rig.story(c).is_empty());
    assert_eq!(seqs(&rig, a).last(), seqs(&rig, b).last());
    assert_eq!(placed.lsn, rig.core.last());
    let long = MarkerSpec { name: "x".repeat(256), ..rig.spec(&[a]) };
    assert_eq!(
        rig.command(|core, now, out| core.marker(now, &long, out)),
        Err(Refused::NameTooLong)
    );
}

#[test]
fn a_pending_marker_is_resolved_once_in_every_stream_that_carries_it() {
    let mut rig = Rig::new(limits());
    let a = rig.attach(16, 16, continues());
    let b = rig.attach(16, 16, continues());
    let spec = MarkerSpec { pending: true, ..rig.spec(&[a, b]) };
    rig.command(|core, now, out| core.marker(now, &spec, out)).unwrap();
    rig.command(|core, now, out| core.resolve_marker(now, spec.marker, true, out)).unwrap();
    assert_eq!(rig.story(a), ["marker", "commit"].map(String::from));
    assert_eq!(rig.story(b), ["marker", "commit"].map(String::from));
    let again = rig.command(|core, now, out| core.resolve_marker(now, spec.marker, false, out));
    assert_eq!(again, Err(Refused::NoSuchMarker));
}

#[test]
fn a_held_gate_keeps_answers_to_writes_and_flushes_but_not_their_numbers() {
    let mut rig = Rig::new(limits());
    let a = rig.attach(16, 16, continues());
    let other = rig.attach(16, 16, continues());
    let before = rig.write(a, sectors(0, 1));
    let spec = rig.spec(&[a]);
    let placed = rig.command(|core, now, out| core.hold(now, &spec, 100, out)).unwrap();
    let flush = rig.flush(a);
    let free = rig.write(other, sectors(0, 1));
    let late = rig.write(a, sectors(4, 1));
    rig.finish_all();
    assert!(!rig.answered(before) && !rig.answered(flush) && !rig.answered(late));
    assert!(rig.answered(free), "a volume outside the group goes on");
    assert_eq!(rig.story(a), ["marker", "write 0+1", "write 4+1"].map(String::from));
    assert!(rig.core.last() > placed.lsn);
    let end = rig.command(|core, now, out| core.release_hold(now, spec.marker, out));
    assert_eq!(end, HoldEnd::Held);
    assert!(rig.answered(before) && rig.answered(flush) && rig.answered(late));
}

#[test]
fn a_gate_opens_alone_at_its_deadline_and_the_hold_is_broken() {
    let (mut rig, v) = Rig::ordered(16, 16);
    let spec = rig.spec(&[v]);
    rig.command(|core, now, out| core.hold(now, &spec, 10_000, out)).unwrap();
    assert_eq!(rig.core.next_deadline(), Some(1 + 300), "cut to the longest hold");
    let busy = rig.spec(&[v]);
    let second = rig.command(|core, now, out| core.hold(now, &busy, 10, out));
    assert_eq!(second, Err(Refused::HoldBusy));
    let write = rig.write(v, sectors(0, 1));
    rig.finish_all();
    rig.now.mono_ms = 300;
    rig.step(Event::Tick);
    assert!(!rig.answered(write));
    rig.now.mono_ms = 301;
    rig.step(Event::Tick);
    assert!(rig.answered(write));
    assert_eq!(rig.broken, [spec.marker]);
    let end = rig.command(|core, now, out| core.release_hold(now, spec.marker, out));
    assert_eq!(end, HoldEnd::Broken);
}

#[test]
fn a_release_after_the_deadline_is_broken_even_when_no_timer_ran() {
    let (mut rig, v) = Rig::ordered(16, 16);
    let spec = rig.spec(&[v]);
    rig.command(|core, now, out| core.hold(now, &spec, 100, out)).unwrap();
    rig.now.mono_ms = 101;
    let end = rig.command(|core, now, out| core.release_hold(now, spec.marker, out));
    assert_eq!(end, HoldEnd::Broken);
}

#[test]
fn a_volume_catching_up_refuses_a_hold() {
    let mut rig = Rig::new(limits());
    let v = rig.attach(16, 16, super::rig::copy_start());
    let spec = rig.spec(&[v]);
    let refused = rig.command(|core, now, out| core.hold(now, &spec, 100, out));
    assert_eq!(refused, Err(Refused::NotOrdered(vec![rig.status(v).volume])));
    assert_eq!(rig.core.next_deadline(), None);
}

#[test]
fn a_volume_with_requests_in_flight_is_not_detached() {
    let (mut rig, v) = Rig::ordered(16, 16);
    let write = rig.write(v, sectors(0, 1));
    assert_eq!(rig.core.detach(v), Err(Refused::Busy(1)));
    rig.finish(write);
    assert_eq!(rig.core.detach(v), Ok(()));
    let late = rig.flush(v);
    assert_eq!(rig.answers[&late], Err(DeviceError::Shutdown));
}

#[test]
fn who_still_has_the_key_of_a_detached_volume_does_not_reach_the_one_in_its_place() {
    let (mut rig, old) = Rig::ordered(16, 16);
    assert_eq!(rig.core.detach(old), Ok(()));
    let new = rig.core.attach(rig.now, attach(16, 16, continues()), &mut vec![]).unwrap();
    assert_eq!(new.index(), old.index(), "the place is used again");
    let late = rig.flush(old);
    assert_eq!(rig.answers[&late], Err(DeviceError::Shutdown));
    assert_eq!(rig.core.reserve(old, 512), None);
    assert_eq!(rig.core.detach(old), Err(Refused::NoSuchVolume));
    assert_eq!(rig.core.keys(), [new]);
}

#[test]
fn an_epoch_starts_with_its_first_record_and_says_whether_history_continues() {
    let mut rig = Rig::new(limits());
    let a = rig.attach(16, 16, continues());
    let b = rig.attach(16, 16, super::rig::copy_start());
    let continues = |rig: &Rig, v| matches!(rig.bodies(v)[0], DescriptorBody::EpochStart { continues, .. } if continues);
    assert!(continues(&rig, a) && !continues(&rig, b));
}
