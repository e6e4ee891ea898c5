//! Comparing instead of sending, and verifying.

use super::super::*;
use super::rig::{CHUNK, NEVER, Rig, compare_start, limits, sectors};
use crate::control::{CompareAnswer, DescriptorBody};
use farshore_extent::{CaptureOrder, Lsn};

/// A volume of `chunks` chunks, all written, whose replica has all but the chunks `stale`.
fn replica_with_stale_chunks(chunks: u64, stale: &[u64]) -> (Rig, VolumeKey) {
    let mut rig = Rig::new(limits());
    let v = rig.attach(chunks * CHUNK, 64, compare_start());
    let content: Vec<u64> = (1..=chunks * CHUNK).collect();
    rig.disks[0].clone_from(&content);
    rig.replicas[0].image = content;
    for chunk in stale {
        let at = usize::try_from(chunk * CHUNK).unwrap();
        rig.replicas[0].image[at] = NEVER;
    }
    (rig, v)
}

fn copied(rig: &Rig) -> Vec<u64> {
    let copies = rig.replicas[0].records.iter().filter_map(|record| match record.body {
        DescriptorBody::Copy { extent, .. } => Some(extent.offset() / (CHUNK * super::rig::UNIT)),
        _ => None,
    });
    copies.collect()
}

#[test]
fn only_what_differs_is_sent() {
    let (mut rig, v) = replica_with_stale_chunks(40, &[3, 17]);
    rig.drain();
    assert_eq!(copied(&rig), [3, 17]);
    assert_eq!(rig.replicas[0].image, rig.disks[0]);
    assert_eq!(rig.status(v).order, CaptureOrder::Ordered);
}

#[test]
fn order_is_restored_by_the_last_answer_and_not_before() {
    let (mut rig, v) = replica_with_stale_chunks(1, &[]);
    let copy = rig.copy(v, None);
    rig.finish(copy);
    assert_eq!(rig.story(v), ["hash 0+4"]);
    assert!(rig.read(v, 9));
    let upto = rig.replicas[0].after;
    rig.command(|core, now, out| core.release(now, v, upto, out)).unwrap();
    assert_eq!(rig.status(v).order, CaptureOrder::CatchUp, "durable is not yet equal");
    rig.copy(v, None);
    assert_eq!(rig.copy_ends.pop(), Some(CopyEnd::Clean), "it waits for the answer");
    rig.release(v);
    assert_eq!(rig.status(v).order, CaptureOrder::Ordered);
}

#[test]
fn a_write_to_an_asked_chunk_makes_it_data_whatever_the_answer() {
    let (mut rig, v) = replica_with_stale_chunks(2, &[]);
    let copy = rig.copy(v, None);
    rig.finish(copy);
    let write = rig.write(v, sectors(1, 1));
    rig.finish(write);
    rig.drain();
    assert_eq!(copied(&rig), [0]);
    assert_eq!(rig.replicas[0].image, rig.disks[0]);
}

#[test]
fn a_lost_answer_is_asked_for_again() {
    let (mut rig, v) = replica_with_stale_chunks(1, &[0]);
    let copy = rig.copy(v, None);
    rig.finish(copy);
    rig.copy(v, None);
    assert_eq!(rig.copy_ends.pop(), Some(CopyEnd::Clean), "it waits for the answer");
    assert!(rig.read(v, 9));
    rig.release_and_lose_answers(v);
    assert!(rig.copy_wanted, "the copy loop is woken");
    rig.drain();
    let asked = |body: &DescriptorBody| matches!(body, DescriptorBody::Hash { .. });
    let questions = rig.replicas[0].records.iter().filter(|r| asked(&r.body)).count();
    assert_eq!((questions, copied(&rig)), (2, vec![0]));
}

#[test]
fn when_most_differ_the_rest_is_sent_without_being_asked_about() {
    let all: Vec<u64> = (0..200).collect();
    let (mut rig, _) = replica_with_stale_chunks(200, &all);
    rig.drain();
    assert_eq!(copied(&rig).len(), 200);
    let asked = |body: &DescriptorBody| matches!(body, DescriptorBody::Hash { .. });
    let questions = rig.replicas[0].records.iter().filter(|r| asked(&r.body)).count();
    assert!(questions < 100, "{questions} digests for 200 chunks that differ");
    assert_eq!(rig.replicas[0].image, rig.disks[0]);
}

#[test]
fn zeroes_are_sent_as_zeroes_at_once() {
    let (mut rig, v) = replica_with_stale_chunks(1, &[0]);
    rig.disks[0].fill(0);
    let copy = rig.copy(v, None);
    rig.finish(copy);
    assert_eq!(rig.story(v), ["hole 0+4", "restored"]);
}

#[test]
fn a_verify_finds_what_differs_and_repairs_nothing() {
    let (mut rig, v) = replica_with_stale_chunks(30, &[]);
    rig.drain();
    rig.copy(v, None);
    assert_eq!(rig.copy_ends.pop(), Some(CopyEnd::Clean));
    rig.replicas[0].image[9 * 4] = NEVER;
    rig.command(|core, now, out| core.verify(now, v, true, out)).unwrap();
    assert!(rig.copy_wanted);
    rig.drain();
    let verify = rig.status(v).verify;
    assert!(!verify.running);
    assert_eq!(verify.checked_bytes, verify.total_bytes);
    assert_eq!(verify.differing, [sectors(9 * CHUNK, CHUNK)]);
    assert_eq!(rig.replicas[0].image[9 * 4], NEVER);
    assert_eq!(rig.status(v).order, CaptureOrder::Ordered, "points go on");

    rig.command(|core, now, out| core.resync(now, v, "asked for".into(), out)).unwrap();
    rig.drain();
    assert_eq!(rig.replicas[0].image, rig.disks[0], "a resync repairs it");
}

#[test]
fn answers_of_another_epoch_or_about_the_future_are_not_believed() {
    let (mut rig, v) = replica_with_stale_chunks(1, &[0]);
    let copy = rig.copy(v, None);
    rig.finish(copy);
    let last = rig.core.last();
    let equal = CompareAnswer::Differing(vec![]);
    let ahead = Lsn::new(last.epoch, last.seq.next());
    let refused = rig.command(|core, now, out| core.compared(now, v, ahead, &equal, out));
    assert!(matches!(refused, Err(Refused::AheadOfCaptured { .. })));
    let old = Lsn::new(farshore_extent::Epoch::new(6), last.seq);
    rig.command(|core, now, out| core.compared(now, v, old, &equal, out)).unwrap();
    assert_eq!(rig.status(v).order, CaptureOrder::CatchUp);
}

/// A verify of a volume of two chunks has begun.
fn verify_of_two_chunks() -> (Rig, VolumeKey) {
    let (mut rig, v) = replica_with_stale_chunks(2, &[]);
    rig.drain();
    rig.command(|core, now, out| core.verify(now, v, true, out)).unwrap();
    (rig, v)
}

#[test]
fn a_verify_does_not_end_while_a_chunk_is_being_read() {
    let (mut rig, v) = verify_of_two_chunks();
    let (first, second) = (rig.copy(v, None), rig.copy(v, None));
    rig.finish(first);
    rig.read_and_release(v);
    assert!(rig.status(v).verify.running, "one chunk is neither asked about nor answered");
    rig.finish(second);
    rig.drain();
    let verify = rig.status(v).verify;
    assert_eq!((verify.running, verify.checked_bytes), (false, verify.total_bytes));
}
