//! Rules of order and room: pool, catch-up, copy loop, release, readers.

use farshore_extent::{CaptureOrder, Epoch, Lsn, Seq};

use super::super::*;
use super::rig::{Rig, continues, copy_start, limits, sectors};
use crate::device::DeviceError;

fn words(rig: &Rig, volume: VolumeKey) -> Vec<String> {
    rig.story(volume)
}

#[test]
fn a_full_pool_loses_order_and_never_stalls_or_fails_the_guest() {
    let (mut rig, v) = Rig::ordered(64, 16);
    for i in 0..4 {
        let write = rig.write(v, sectors(i * 4, 4));
        rig.finish(write);
    }
    assert_eq!(rig.status(v).pool_used, rig.status(v).pool_bytes);
    let over = rig.write(v, sectors(40, 2));
    rig.finish(over);
    assert_eq!(rig.answers[&over], Ok(()));
    assert_eq!(words(&rig, v).last().map(String::as_str), Some("lost"));
    let more = rig.write(v, sectors(50, 1));
    rig.finish(more);
    assert_eq!(words(&rig, v).iter().filter(|w| *w == "lost").count(), 1);
    assert_eq!(rig.status(v).order, CaptureOrder::CatchUp);
    assert_eq!(rig.status(v).reason, "the capture pool was full");
    assert!(!rig.copy_wanted, "the pool is more than half full");
    rig.read_and_release(v);
    assert!(rig.copy_wanted, "room again wakes the copy loop");
    rig.drain();
    assert_eq!(rig.replicas[0].image, rig.disks[0]);
    let restored = rig.replicas[0].records.last().unwrap();
    assert!(matches!(restored.body, crate::control::DescriptorBody::OrderRestored));
}

#[test]
fn too_many_retained_records_lose_order_like_a_full_pool() {
    let mut rig = Rig::new(Limits { max_records: 8, ..limits() });
    let v = rig.attach(64, 64, continues());
    for i in 0..8 {
        let zero = rig.zero(v, sectors(i, 1));
        rig.finish(zero);
    }
    assert_eq!(words(&rig, v).last().map(String::as_str), Some("lost"));
    for i in 0..20 {
        let bad = rig.write(v, sectors(i, 1));
        let index = rig.running(bad).unwrap();
        rig.complete(index, Some(DeviceError::Io));
    }
    assert!(rig.status(v).records <= 9, "failures do not grow the list either");
    rig.drain();
    assert_eq!(rig.replicas[0].image, rig.disks[0]);
}

#[test]
fn in_catch_up_only_the_pieces_in_clean_chunks_are_recorded() {
    let mut rig = Rig::new(limits());
    let v = rig.attach(16, 32, copy_start());
    let copy = rig.copy(v, None);
    rig.finish(copy);
    let straddling = rig.write(v, sectors(2, 4));
    rig.finish(straddling);
    let dirty = rig.write(v, sectors(8, 4));
    rig.finish(dirty);
    assert_eq!(words(&rig, v), ["hole 0+4", "write 2+2"].map(String::from));
    let zero = rig.zero(v, sectors(0, 16));
    rig.finish(zero);
    assert_eq!(words(&rig, v).last().map(String::as_str), Some("zero 0+4"));
    rig.drain();
    assert_eq!(rig.replicas[0].image, rig.disks[0]);
}

#[test]
fn a_write_across_dirty_and_clean_chunks_without_checksums_of_its_pieces_is_copied() {
    let mut rig = Rig::new(limits());
    let v = rig.attach(16, 32, copy_start());
    let copy = rig.copy(v, None);
    rig.finish(copy);
    let slot = rig.core.reserve(v, 4 * 512).unwrap();
    let token = rig.token(v);
    rig.step(Event::Write {
        queue: QueueId(0),
        token,
        volume: v,
        extent: sectors(2, 4),
        buffer: Buffer::Pool(slot),
        crc: 0,
        pieces: vec![],
        fua: false,
    });
    rig.finish(token);
    assert_eq!(words(&rig, v), ["hole 0+4"]);
    assert_eq!(rig.status(v).dirty_bytes, 16 * 512);
    assert_eq!(rig.status(v).pool_used, 0);
}

#[test]
fn a_copy_read_waits_for_writes_and_writes_wait_for_it() {
    let mut rig = Rig::new(limits());
    let v = rig.attach(16, 32, copy_start());
    let write = rig.write(v, sectors(1, 1));
    let copy = rig.copy(v, None);
    let behind = rig.write(v, sectors(3, 1));
    assert!(rig.running(copy).is_none() && rig.running(behind).is_none());
    rig.finish(write);
    assert!(rig.running(copy).is_some() && rig.running(behind).is_none());
    rig.finish(copy);
    rig.finish(behind);
    assert_eq!(words(&rig, v), ["copy 0+4", "write 3+1"].map(String::from));
}

#[test]
fn chunks_that_guests_write_to_are_copied_last_and_their_writes_cost_one_copy() {
    let mut rig = Rig::new(limits());
    let v = rig.attach(24, 64, copy_start());
    rig.disks[0].fill(9);
    for round in 0..5 {
        for sector in [1, 13] {
            let write = rig.write(v, sectors(sector, 1));
            rig.finish(write);
        }
        if round < 4 {
            let copy = rig.copy(v, None);
            rig.finish(copy);
        }
    }
    let cold = ["copy 4+4", "copy 8+4", "copy 16+4", "copy 20+4"].map(String::from);
    assert_eq!(words(&rig, v), cold, "and none of the ten writes");
    rig.drain();
    let story = rig.replicas[0].records.iter().map(|r| r.body.payload_len()).sum::<u64>();
    assert_eq!(story, 24 * 512, "each sector was sent once");
    assert_eq!(rig.replicas[0].image, rig.disks[0]);
}

#[test]
fn a_copy_ends_after_one_turn_a_chunk_under_a_guest_that_never_pauses() {
    const CHUNKS: u64 = 100;
    for stride in [1, 3, 37, 99] {
        let mut rig = Rig::new(limits());
        let v = rig.attach(CHUNKS * 4, 64, copy_start());
        rig.disks[0].fill(9);
        let (mut turns, mut at) = (0, 0);
        while rig.status(v).order == CaptureOrder::CatchUp {
            // Before each turn a write that goes on while the copy is under way.
            at = (at + stride * 4 + 1) % (CHUNKS * 4);
            let write = rig.write(v, sectors(at, 1));
            let copy = rig.copy(v, None);
            rig.finish(write);
            rig.finish(copy);
            rig.read_and_release(v);
            turns += 1;
            assert!(turns <= CHUNKS, "stride {stride}: more turns than chunks");
        }
        assert_eq!(rig.status(v).dirty_bytes, 0);
        assert_eq!(rig.replicas[0].image, rig.disks[0]);
    }
}

#[test]
fn a_held_copy_sends_nothing_keeps_what_guests_change_and_goes_on_when_it_is_let_go() {
    let mut rig = Rig::new(limits());
    let v = rig.attach(16, 32, copy_start());
    rig.command(|core, now, out| core.hold_copy(now, v, true, out)).unwrap();
    let write = rig.write(v, sectors(2, 4));
    rig.finish(write);
    rig.copy(v, None);
    assert_eq!(rig.copy_ends.pop(), Some(CopyEnd::PoolBusy));
    assert_eq!(words(&rig, v), [""; 0]);
    assert_eq!((rig.status(v).held, rig.status(v).dirty_bytes), (true, 16 * 512));
    rig.copy_wanted = false;
    rig.command(|core, now, out| core.hold_copy(now, v, false, out)).unwrap();
    assert!(rig.copy_wanted, "the copy loop is woken");
    rig.drain();
    assert_eq!(rig.replicas[0].image, rig.disks[0]);
    rig.command(|core, now, out| core.hold_copy(now, v, true, out)).unwrap();
    assert!(!rig.status(v).held, "there is nothing to hold while the volume is ordered");
}

#[test]
fn only_a_log_without_room_marks_the_volume_as_overrun_and_a_wish_to_compare_takes_it_away() {
    let (mut rig, v) = Rig::ordered(64, 16);
    let bad = rig.write(v, sectors(0, 1));
    let index = rig.running(bad).unwrap();
    rig.complete(index, Some(DeviceError::Io));
    assert!(!rig.status(v).overrun, "a failed write is another reason");
    rig.drain();
    for i in 0..5 {
        let write = rig.write(v, sectors(i * 4, 4));
        rig.finish(write);
    }
    assert!(rig.status(v).overrun);
    rig.command(|core, now, out| core.resync(now, v, "asked for".into(), out)).unwrap();
    assert!(!rig.status(v).overrun);
    rig.drain();
    assert!(!rig.status(v).overrun);
}

#[test]
fn the_throttle_holds_answers_back_for_a_bounded_time_and_only_while_order_is_at_stake() {
    let mut rig = Rig::new(Limits { throttle_ms: 20, ..limits() });
    let v = rig.attach(64, 16, continues());
    let mut writes = vec![];
    for i in 0..4 {
        let write = rig.write(v, sectors(i * 4, 4));
        rig.finish(write);
        writes.push(write);
    }
    assert!(rig.answered(writes[0]) && rig.answered(writes[1]), "there is room");
    assert!(!rig.answered(writes[2]) && !rig.answered(writes[3]), "nearly full, and full");
    assert_eq!(rig.core.next_deadline(), Some(1 + 1), "from three quarters on it grows");
    assert_eq!((rig.status(v).throttle_ms, rig.status(v).throttled), (20, 2));
    rig.now.mono_ms = 2;
    rig.step(Event::Tick);
    assert!(rig.answered(writes[2]) && !rig.answered(writes[3]));
    let flush = rig.flush(v);
    rig.finish(flush);
    assert!(rig.answered(flush), "a flush needs no room");
    rig.now.mono_ms = 1 + 20;
    rig.step(Event::Tick);
    assert!(rig.answered(writes[3]));
    assert_eq!(rig.core.next_deadline(), None);

    let over = rig.write(v, sectors(40, 2));
    rig.finish(over);
    assert_eq!(rig.status(v).order, CaptureOrder::CatchUp);
    assert!(rig.answered(over), "order is lost: nothing is gained by waiting");
    rig.drain();
    assert_eq!(rig.replicas[0].image, rig.disks[0]);
}

#[test]
fn without_a_throttle_no_answer_waits_for_room() {
    let (mut rig, v) = Rig::ordered(64, 16);
    for i in 0..6 {
        let write = rig.write(v, sectors(i * 4, 4));
        rig.finish(write);
        assert!(rig.answered(write));
    }
    assert_eq!((rig.core.next_deadline(), rig.status(v).throttled), (None, 0));
}

#[test]
fn the_last_clean_chunk_restores_order_at_its_own_number() {
    let mut rig = Rig::new(limits());
    let v = rig.attach(8, 32, copy_start());
    rig.disks[0].fill(9);
    for _ in 0..2 {
        let copy = rig.copy(v, None);
        rig.finish(copy);
    }
    assert_eq!(words(&rig, v), ["copy 0+4", "copy 4+4", "restored"].map(String::from));
    assert_eq!(rig.status(v).order, CaptureOrder::Ordered);
    rig.copy(v, None);
    assert_eq!(rig.copy_ends.last(), Some(&CopyEnd::Clean));
}

#[test]
fn order_is_not_restored_while_a_write_that_cannot_be_recorded_is_in_flight() {
    let (mut rig, v) = Rig::ordered(64, 16);
    let fill: Vec<_> = (0..4).map(|i| rig.write(v, sectors(i * 4, 4))).collect();
    let first = rig.write(v, sectors(40, 1));
    let second = rig.write(v, sectors(50, 1));
    fill.into_iter().for_each(|t| rig.finish(t));
    rig.finish(first);
    rig.read_and_release(v);
    let copy = rig.copy(v, None);
    rig.finish(copy);
    assert_eq!(rig.status(v).dirty_bytes, 0);
    assert_eq!(rig.status(v).order, CaptureOrder::CatchUp);
    rig.finish(second);
    rig.drain();
    assert_eq!(rig.status(v).order, CaptureOrder::Ordered);
    assert_eq!(rig.replicas[0].image, rig.disks[0]);
}

#[test]
fn the_copy_loop_takes_no_more_than_half_of_the_pool() {
    let mut rig = Rig::new(limits());
    let v = rig.attach(64, 32, copy_start());
    rig.disks[0].fill(9);
    loop {
        let copy = rig.copy(v, None);
        let Some(index) = rig.running(copy) else { break };
        rig.complete(index, None);
    }
    assert_eq!(rig.copy_ends.last(), Some(&CopyEnd::PoolBusy));
    assert_eq!(rig.status(v).pool_used, 16 * 512);
    rig.copy_wanted = false;
    rig.read_and_release(v);
    assert!(rig.copy_wanted);
}

#[test]
fn a_large_hole_is_one_record_and_is_looked_at_under_the_lock() {
    let mut rig = Rig::new(limits());
    let v = rig.attach(64, 32, copy_start());
    let write = rig.write(v, sectors(30, 1));
    let copy = rig.copy(v, Some(sectors(0, 64)));
    assert!(rig.running(copy).is_none(), "the write goes first");
    rig.finish(write);
    rig.finish(copy);
    assert_eq!(rig.copy_ends, [CopyEnd::NotHole], "the hole was filled meanwhile");
    assert!(words(&rig, v).is_empty());
    let copy = rig.copy(v, Some(sectors(0, 30)));
    rig.finish(copy);
    assert_eq!(words(&rig, v), ["hole 0+28"], "whole chunks only");
    rig.drain();
    assert_eq!(rig.replicas[0].image, rig.disks[0]);
}

#[test]
fn an_unreadable_chunk_stays_dirty_and_the_next_one_is_tried() {
    let mut rig = Rig::new(limits());
    let v = rig.attach(8, 32, copy_start());
    rig.disks[0].fill(9);
    let copy = rig.copy(v, None);
    let index = rig.running(copy).unwrap();
    rig.complete(index, Some(DeviceError::Io));
    assert_eq!(rig.copy_ends, [CopyEnd::Failed]);
    let copy = rig.copy(v, None);
    rig.finish(copy);
    assert_eq!(words(&rig, v), ["copy 4+4"]);
    assert_eq!(rig.status(v).order, CaptureOrder::CatchUp);
    rig.drain();
    assert_eq!(rig.replicas[0].image, rig.disks[0]);
}

#[test]
fn release_frees_room_in_order_and_never_beyond_what_was_captured() {
    let (mut rig, v) = Rig::ordered(64, 16);
    let held = rig.write(v, sectors(0, 4));
    let done = rig.write(v, sectors(8, 4));
    rig.finish(done);
    let ahead = Lsn::new(Epoch::new(7), Seq::new(99));
    let refused = rig.command(|core, now, out| core.release(now, v, ahead, out));
    assert_eq!(refused, Err(Refused::AheadOfCaptured { asked: ahead, captured: rig.core.last() }));
    rig.read_and_release(v);
    assert_eq!(rig.status(v).pool_used, 8 * 512, "the older room is still in use");
    rig.finish(held);
    rig.read_and_release(v);
    assert_eq!(rig.status(v).pool_used, 0);
    let marks = rig.core.watermarks(v).unwrap();
    assert_eq!(marks.captured(), marks.journaled());
}

#[test]
fn a_reader_goes_on_from_any_place_that_is_still_retained() {
    let (mut rig, v) = Rig::ordered(64, 64);
    for i in 0..6 {
        let write = rig.write(v, sectors(i, 1));
        rig.finish(write);
    }
    let epoch = Epoch::new(7);
    let mut out = vec![];
    let more = rig.core.fetch(v, Lsn::new(epoch, Seq::new(3)), 2, u64::MAX, &mut out).unwrap();
    assert_eq!(out.iter().map(|d| d.seq.get()).collect::<Vec<_>>(), [4, 5]);
    assert!(more);
    out.clear();
    assert!(rig.core.fetch(v, Lsn::ZERO, 100, 1024, &mut out).unwrap());
    assert_eq!(out.len(), 3, "the epoch's start and two sectors");
    let waiting = rig.core.waiting(v, Lsn::new(epoch, Seq::new(5))).unwrap();
    assert_eq!(waiting, Waiting { records: 2, payload: 1024, urgent: false });
    assert!(rig.core.waiting(v, Lsn::ZERO).unwrap().urgent, "an epoch's start is urgent");
    let upto = Lsn::new(epoch, Seq::new(4));
    rig.command(|core, now, out| core.release(now, v, upto, out)).unwrap();
    let gone = rig.core.fetch(v, Lsn::new(epoch, Seq::new(2)), 9, 9, &mut out);
    assert!(matches!(gone, Err(Refused::AlreadyReleased { .. })), "a gap is refused: {gone:?}");
}

#[test]
fn what_the_agent_has_spooled_leaves_the_pool_and_is_not_durable_at_the_target() {
    let (mut rig, v) = Rig::ordered(16, 32);
    rig.release(v);
    let before = rig.status(v).durable;
    let write = rig.write(v, sectors(0, 4));
    rig.finish(write);
    let last = rig.core.last();
    rig.command(|core, now, out| core.spooled(now, v, last, out)).unwrap();
    let status = rig.status(v);
    assert_eq!((status.pool_used, status.records), (0, 0));
    assert_eq!((status.captured, status.released, status.durable), (last, last, before));
    rig.command(|core, now, out| core.release(now, v, last, out)).unwrap();
    assert_eq!(rig.status(v).durable, last);
    let ahead = Lsn::new(last.epoch, last.seq.next());
    let refused = rig.command(|core, now, out| core.spooled(now, v, ahead, out));
    assert!(matches!(refused, Err(Refused::AheadOfCaptured { .. })));
}

#[test]
fn a_recopy_drops_what_is_retained_and_lets_the_reader_go_on_from_anywhere() {
    let (mut rig, v) = Rig::ordered(16, 32);
    for i in 0..4 {
        let write = rig.write(v, sectors(i * 4, 2));
        rig.finish(write);
    }
    let spec = MarkerSpec { pending: true, ..rig.spec(&[v]) };
    rig.command(|core, now, out| core.marker(now, &spec, out)).unwrap();
    rig.command(|core, now, out| core.recopy(now, v, "the target lost data".into(), out)).unwrap();
    assert_eq!(rig.status(v).pool_used, 0);
    let resolve = rig.command(|core, now, out| core.resolve_marker(now, spec.marker, true, out));
    assert_eq!(resolve, Err(Refused::NoSuchMarker), "its marker is gone with the records");
    rig.replicas[0].after = Lsn::new(Epoch::new(7), Seq::new(2));
    rig.drain();
    assert_eq!(rig.replicas[0].image, rig.disks[0]);
    assert!(rig.replicas[0].ordered);
    assert_eq!(rig.status(v).reason, "");
}

#[test]
fn a_start_that_continues_refuses_a_reader_that_lost_something() {
    let mut rig = Rig::new(limits());
    let last = Lsn::new(Epoch::new(6), Seq::new(40));
    let v = rig.attach(16, 16, Start::Continues { last });
    let mut out = vec![];
    assert!(rig.core.fetch(v, last, 9, 9, &mut out).is_ok());
    let behind = Lsn::new(Epoch::new(6), Seq::new(39));
    let gap = rig.core.fetch(v, behind, 9, 9, &mut out);
    assert_eq!(gap, Err(Refused::AlreadyReleased { asked: behind, released: last }));
    let future = Lsn::new(Epoch::new(8), Seq::new(1));
    let ahead = rig.core.fetch(v, future, 9, 9, &mut out);
    assert!(matches!(ahead, Err(Refused::AheadOfCaptured { .. })));
}

#[test]
fn a_pool_that_cannot_hold_four_chunks_is_refused() {
    let mut rig = Rig::new(limits());
    let small = super::rig::attach(64, 15, continues());
    let refused = rig.command(|core, now, out| core.attach(now, small, out));
    assert!(matches!(refused, Err(Refused::PoolTooSmall { .. })));
}

#[test]
fn room_that_was_never_used_comes_back() {
    let (mut rig, v) = Rig::ordered(64, 16);
    let slot = rig.core.reserve(v, 700).unwrap();
    assert_eq!(rig.status(v).pool_used, 1024);
    rig.command(|core, now, out| core.unreserve(now, v, slot, out));
    assert_eq!(rig.status(v).pool_used, 0);
}
