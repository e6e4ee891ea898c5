//! The intent map: what waits for a bit, and what may clear one.

use farshore_extent::{ChunkSize, Lsn, VolumeSize};

use super::super::*;
use super::rig::{CHUNK, Rig, UNIT, continues, limits, sectors};
use crate::device::DeviceError;

/// Two chunks.
const REGION: u64 = 2 * CHUNK;

fn rig(regions: u64, cap: u64, start: Start) -> (Rig, VolumeKey) {
    let mut rig = Rig::new(limits());
    let size = VolumeSize::new(regions * REGION * UNIT).unwrap();
    let set = match start {
        Start::Copy { .. } | Start::Compare { .. } => RegionMap::full(size, REGION * UNIT),
        Start::Continues { .. } | Start::CopyPart { .. } => RegionMap::new(size, REGION * UNIT),
    };
    rig.intent = Some(IntentStart { set, cap });
    assert_eq!(ChunkSize::tiny(CHUNK * UNIT).get(), CHUNK * UNIT);
    let key = rig.attach(regions * REGION, 64, start);
    (rig, key)
}

fn region(index: u64) -> farshore_extent::Extent {
    sectors(index * REGION, 1)
}

fn set_on(commit: &IntentCommit) -> Vec<u64> {
    let bits = commit.blocks[0].words[0];
    (0..64).filter(|bit| bits >> bit & 1 != 0).collect()
}

fn take(rig: &mut Rig, key: VolumeKey) -> Option<IntentCommit> {
    rig.intent_wanted = false;
    rig.core.take_intent(key)
}

fn done(rig: &mut Rig, volume: VolumeKey) {
    rig.step(Event::IntentDone { volume, end: IntentEnd::Durable });
}

fn keep(rig: &mut Rig, key: VolumeKey) -> Vec<u64> {
    let commit = take(rig, key).expect("something changed");
    done(rig, key);
    set_on(&commit)
}

#[test]
fn a_write_to_a_clean_region_waits_until_its_bit_is_durable_and_many_wait_for_one_commit() {
    let (mut rig, v) = rig(8, 100, continues());
    let first = rig.write(v, region(0));
    assert!(rig.running(first).is_none() && rig.intent_wanted);
    let commit = take(&mut rig, v).unwrap();
    assert_eq!(set_on(&commit), [0]);
    let (second, third) = (rig.write(v, region(1)), rig.write(v, region(2)));
    let again = rig.write(v, sectors(1, 1));
    assert!(rig.core.take_intent(v).is_none(), "one commit at a time");
    done(&mut rig, v);
    assert!(rig.running(first).is_some() && rig.running(again).is_some());
    assert!(rig.running(second).is_none() && rig.running(third).is_none());
    assert_eq!(keep(&mut rig, v), [0, 1, 2], "a group");
    assert!(rig.running(second).is_some() && rig.running(third).is_some());
    rig.finish_all();
    let warm = rig.write(v, sectors(REGION + 3, 2));
    assert!(rig.running(warm).is_some() && !rig.intent_wanted, "a set region costs nothing");
}

#[test]
fn over_the_cap_the_oldest_goes_only_when_released_and_flushed() {
    let (mut rig, v) = rig(8, 2, continues());
    for index in 0..3 {
        rig.write(v, region(index));
        keep(&mut rig, v);
        rig.finish_all();
    }
    assert_eq!(rig.status(v).intent.unwrap().set, 3);
    assert!(rig.own_flush.is_none(), "a flush would be of no use before the release");
    rig.read_and_release(v);
    assert_eq!(rig.status(v).intent.unwrap().set, 3, "not flushed yet");
    let io = rig.own_flush.take().expect("a flush is asked for");
    rig.step(Event::BackingDone { io, outcome: Outcome::Done });
    assert_eq!(rig.status(v).intent.unwrap().set, 2);
    assert_eq!(keep(&mut rig, v), [1, 2], "the one written longest ago has gone");
    let cold = rig.write(v, region(0));
    assert!(rig.running(cold).is_none(), "it has to be marked again");
}

#[test]
fn a_flush_that_began_before_the_last_completion_clears_nothing() {
    let (mut rig, v) = rig(8, 1, continues());
    for index in [0, 1] {
        rig.write(v, region(index));
        keep(&mut rig, v);
    }
    let flush = rig.flush(v);
    rig.finish_all();
    assert!(rig.answered(flush));
    rig.read_and_release(v);
    assert_eq!(rig.status(v).intent.unwrap().set, 2);
    assert!(rig.own_flush.is_some());
}

#[test]
fn a_write_in_flight_keeps_its_bit_and_so_does_a_dirty_chunk() {
    let (mut rig, v) = rig(8, 1, continues());
    rig.write(v, region(0));
    keep(&mut rig, v);
    rig.finish_all();
    let bad = rig.write(v, sectors(REGION, 1));
    keep(&mut rig, v);
    let held = rig.write(v, region(0));
    let index = rig.running(bad).unwrap();
    rig.complete(index, Some(DeviceError::Io));
    rig.read_and_release(v);
    let flush = rig.flush(v);
    rig.finish(flush);
    assert_eq!(rig.status(v).intent.unwrap().set, 2, "one is being written, one is dirty");
    rig.finish(held);
}

#[test]
fn regions_that_were_only_copied_are_cleared_when_the_target_has_them() {
    let (mut rig, v) = rig(8, 100, super::rig::copy_start());
    assert_eq!(rig.status(v).intent.unwrap().set, 8);
    let write = rig.write(v, region(3));
    assert!(rig.running(write).is_some(), "everything is set");
    rig.drain();
    let io = rig.own_flush.take().expect("a flush is asked for");
    rig.step(Event::BackingDone { io, outcome: Outcome::Done });
    assert_eq!(keep(&mut rig, v), [3], "the guest may write there again");
}

#[test]
fn a_failed_flush_ends_all_clearing() {
    let (mut rig, v) = rig(8, 1, continues());
    for index in 0..3 {
        rig.write(v, region(index));
        keep(&mut rig, v);
        rig.finish_all();
    }
    let flush = rig.flush(v);
    let index = rig.running(flush).unwrap();
    rig.complete(index, Some(DeviceError::Io));
    rig.read_and_release(v);
    let flush = rig.flush(v);
    rig.finish(flush);
    assert_eq!(rig.status(v).intent.unwrap().set, 3);
}

#[test]
fn a_stream_finds_the_next_region_set() {
    let (mut rig, v) = rig(4, 100, continues());
    rig.write(v, sectors(0, 1));
    keep(&mut rig, v);
    for sector in 1..REGION {
        rig.write(v, sectors(sector, 1));
    }
    assert!(rig.intent_wanted, "the next region is marked before the stream gets there");
    assert_eq!(keep(&mut rig, v), [0, 1]);
    rig.finish_all();
    let next = rig.write(v, sectors(REGION, 1));
    assert!(rig.running(next).is_some());
}

#[test]
fn a_map_that_cannot_be_kept_stops_nobody_and_is_written_whole_when_it_can_be_again() {
    let (mut rig, v) = rig(8, 1, continues());
    let write = rig.write(v, region(0));
    take(&mut rig, v).unwrap();
    let end = IntentEnd::Lost(IntentLoss::AllMayDiffer);
    rig.step(Event::IntentDone { volume: v, end });
    assert!(rig.running(write).is_some());
    let other = rig.write(v, region(5));
    assert!(rig.running(other).is_some());
    assert_eq!(rig.status(v).intent.unwrap().loss, Some(IntentLoss::AllMayDiffer));
    rig.finish_all();
    rig.read_and_release(v);
    assert!(rig.core.take_intent(v).is_none() && rig.own_flush.is_none(), "nothing is cleared");
    rig.command(|core, now, out| core.resume_intent(now, v, out));
    let late = rig.write(v, region(2));
    assert!(rig.running(late).is_none());
    let commit = take(&mut rig, v).unwrap();
    assert_eq!(set_on(&commit), [0, 2, 5]);
    done(&mut rig, v);
    assert!(rig.running(late).is_some());
    assert_eq!(rig.status(v).intent.unwrap().loss, None);
}

#[test]
fn nothing_of_a_new_copy_is_handed_out_before_the_disk_says_that_all_may_differ() {
    let (mut rig, v) = rig(8, 100, continues());
    rig.read_and_release(v);
    rig.command(|core, now, out| core.recopy(now, v, "asked for".into(), out)).unwrap();
    let mut records = vec![];
    let after = rig.replicas[0].after;
    rig.core.fetch(v, after, 9, u64::MAX, &mut records).unwrap();
    assert!(records.is_empty());
    assert_eq!(rig.core.waiting(v, after), Ok(Waiting::default()));
    assert_eq!(keep(&mut rig, v), [0, 1, 2, 3, 4, 5, 6, 7]);
    rig.core.fetch(v, after, 9, u64::MAX, &mut records).unwrap();
    assert_eq!(records.len(), 2);
}

#[test]
fn a_start_in_part_serves_who_has_the_rest_and_refuses_everybody_else() {
    let mut rig = Rig::new(limits());
    let released = Lsn::new(farshore_extent::Epoch::new(5), farshore_extent::Seq::new(9));
    let before = Lsn::new(farshore_extent::Epoch::new(5), farshore_extent::Seq::new(8));
    let ranges = vec![sectors(CHUNK + 1, 1)];
    let start = Start::CopyPart { ranges, released, compare: false, reason: "killed".into() };
    let v = rig.attach(4 * CHUNK, 64, start);
    assert_eq!(rig.status(v).dirty_bytes, CHUNK * UNIT);
    let mut records = vec![];
    let refused = rig.core.fetch(v, before, 9, u64::MAX, &mut records);
    assert_eq!(refused, Err(Refused::AlreadyReleased { asked: before, released }));
    rig.core.fetch(v, released, 9, u64::MAX, &mut records).unwrap();
    assert_eq!(records.len(), 1);

    let start =
        Start::CopyPart { ranges: vec![], released, compare: false, reason: "killed".into() };
    let v = rig.attach(4 * CHUNK, 64, start);
    assert!(!rig.core.is_catching_up(v), "nothing is to be sent");
}

#[test]
fn a_new_part_is_marked_on_disk_before_its_size_is_and_stays_so_until_the_target_has_it() {
    for part in [NewPart::Zero, NewPart::Unknown] {
        let (mut rig, v) = rig(8, 100, continues());
        rig.read_and_release(v);
        rig.grow(v, 9 * REGION + 1, part).unwrap();
        let intent = |rig: &Rig| rig.status(v).intent.unwrap();
        let old = intent(&rig).durable_size;
        let commit = take(&mut rig, v).expect("the new part is marked at once");
        assert_eq!(set_on(&commit), [8, 9]);
        assert!(commit.size > old && intent(&rig).durable_size == old);
        done(&mut rig, v);
        assert_eq!(intent(&rig).durable_size, commit.size);
        let write = rig.write(v, sectors(8 * REGION, 1));
        assert!(rig.running(write).is_some(), "it is marked already");
        rig.drain();
        if let Some(io) = rig.own_flush.take() {
            rig.step(Event::BackingDone { io, outcome: Outcome::Done });
        }
        assert_eq!(keep(&mut rig, v), [8], "the guest wrote there");
    }
}

#[test]
fn a_region_that_becomes_dirty_at_rest_is_not_cleared() {
    // The last region is short; with the new part its only chunk is dirty again.
    let mut rig = Rig::new(limits());
    let size = VolumeSize::new((2 * REGION + 1) * UNIT).unwrap();
    rig.intent = Some(IntentStart { set: RegionMap::new(size, REGION * UNIT), cap: 1 });
    let v = rig.attach(2 * REGION + 1, 64, continues());
    for region in [2, 0] {
        rig.write(v, self::region(region));
        keep(&mut rig, v);
    }
    rig.finish_all();
    rig.read_and_release(v);
    rig.grow(v, 2 * REGION + 3, NewPart::Unknown).unwrap();
    keep(&mut rig, v);
    let flush = rig.flush(v);
    rig.finish(flush);
    rig.read_and_release(v);
    assert!(rig.core.intent_map(v).unwrap().has(2), "its new part was not copied yet");
}
