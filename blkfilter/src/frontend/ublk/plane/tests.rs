use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;

use farshore_extent::{BlockSizes, VolumeSize};
use proptest::prelude::*;

use super::*;
use crate::device::MAX_PAYLOAD;
use crate::frontend::memory::MemoryDevice;
use crate::sys::ublk::uapi::{flag, op};

const SIZE: u64 = 4 << 20;
const BLOCK: u64 = 512;
const OK: i32 = 0;

/// The how manieth request, what it was answered with, and its payload.
type Answer = (usize, i32, Vec<u8>);

/// A request with its number among all.
type Numbered = (usize, Descriptor, Vec<u8>);

/// A driver that hands out requests in batches: tags to requests, as many at a time as told.
#[derive(Default)]
struct Fake {
    depth: u16,
    batch: usize,
    waiting: VecDeque<Numbered>,
    free: VecDeque<u16>,
    /// By tag: the request that is with the plane, and its payload.
    home: Vec<Option<Numbered>>,
    answers: Arc<Mutex<Vec<Answer>>>,
    /// What to do once no request is left: tell all tags that the device has stopped, or set stop.
    then: Then,
    stop: Option<Arc<wake::Event>>,
    over: bool,
    limits: Vec<Option<Duration>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Then {
    #[default]
    Stop,
    /// Tell the plane to leave together with the last batch.
    Leave,
    Break,
}

impl Kernel for Fake {
    fn depth(&self) -> u16 {
        self.depth
    }

    fn descriptor(&self, tag: u16) -> Descriptor {
        self.home[usize::from(tag)].as_ref().expect("only tags that are home are asked for").1
    }

    fn take_payload(&mut self, tag: u16, into: &mut [u8]) -> io::Result<()> {
        let (.., payload) = self.home[usize::from(tag)].as_ref().expect("the tag is home");
        into.copy_from_slice(payload.get(..into.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn give_payload(&mut self, tag: u16, from: &[u8]) -> io::Result<()> {
        let (.., payload) = self.home[usize::from(tag)].as_mut().expect("the tag is home");
        *payload = from.to_vec();
        Ok(())
    }

    fn commit(&mut self, tag: u16, result: i32) {
        let (number, _, payload) =
            self.home[usize::from(tag)].take().expect("a request is answered once");
        self.answers.lock().unwrap().push((number, result, payload));
        self.free.push_back(tag);
    }

    fn enter(&mut self, limit: Option<Duration>, out: &mut Vec<Event>) -> io::Result<()> {
        self.limits.push(limit);
        assert!(self.limits.len() < 100_000, "the plane spins");
        for _ in 0..self.batch {
            if self.waiting.is_empty() || self.free.is_empty() {
                break;
            }
            let tag = self.free.pop_front().unwrap();
            self.home[usize::from(tag)] = self.waiting.pop_front();
            out.push(Event::Request(tag));
        }
        if self.waiting.is_empty() && !self.over {
            match self.then {
                Then::Leave => {
                    self.over = true;
                    self.stop.as_ref().unwrap().set();
                    out.insert(0, Event::Readable(STOP));
                }
                Then::Break => {
                    self.over = true;
                    out.push(Event::Broken(0, Errno::EINVAL));
                }
                Then::Stop => {}
            }
        }
        if out.is_empty() && self.then == Then::Stop {
            // The driver ends a tag when its last request was answered.
            out.extend(self.free.drain(..).map(Event::Ended));
        }
        if out.is_empty() {
            out.push(Event::Readable(0));
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn fake(depth: u16, batch: usize, requests: Vec<(Descriptor, Vec<u8>)>) -> Fake {
    let numbered =
        requests.into_iter().enumerate().map(|(number, (what, with))| (number, what, with));
    Fake {
        depth,
        batch,
        waiting: numbered.collect(),
        free: (0..depth).collect(),
        home: (0..depth).map(|_| None).collect(),
        ..Fake::default()
    }
}

/// Runs a plane over `fake` to its end. Returns the answers in the order of the requests.
fn run(mut fake: Fake, device: Arc<dyn Device>) -> (Exit, Vec<Answer>) {
    let stop = Arc::new(wake::Event::new().unwrap());
    fake.stop = Some(Arc::clone(&stop));
    let answers = Arc::clone(&fake.answers);
    let queue = Arc::clone(&device).open_queue().unwrap();
    let (exit, _) = Plane::new(fake, device, queue, stop).run();
    let mut answers = std::mem::take(&mut *answers.lock().unwrap());
    answers.sort_unstable_by_key(|(number, ..)| *number);
    (exit, answers)
}

fn ask(operation: u8, flags: u32, block: u64, blocks: u32) -> Descriptor {
    Descriptor { op_flags: u32::from(operation) | flags, sectors: blocks, start: block }
}

fn write(block: u64, blocks: u32, fill: u8) -> (Descriptor, Vec<u8>) {
    (ask(op::WRITE, 0, block, blocks), vec![fill; blocks as usize * 512])
}

fn read(block: u64, blocks: u32) -> (Descriptor, Vec<u8>) {
    (ask(op::READ, 0, block, blocks), Vec::new())
}

fn disk() -> Arc<MemoryDevice> {
    Arc::new(MemoryDevice::new(VolumeSize::new(SIZE).unwrap()))
}

/// A device whose queues lend a few buffers only and finish requests some reaps later.
struct Slow {
    disk: Arc<MemoryDevice>,
    slots: usize,
    delay: usize,
    /// Requests that were in flight when their queue was dropped.
    dropped: Arc<Mutex<usize>>,
}

struct SlowQueue {
    device: Arc<Slow>,
    queue: Box<dyn Queue>,
    lent: usize,
    late: VecDeque<(usize, Completion)>,
    reaps: usize,
}

impl Device for Slow {
    fn info(&self) -> DeviceInfo {
        self.disk.info()
    }

    fn open_queue(self: Arc<Self>) -> Result<Box<dyn Queue>, DeviceError> {
        let queue = Arc::clone(&self.disk).open_queue()?;
        Ok(Box::new(SlowQueue { device: self, queue, lent: 0, late: VecDeque::new(), reaps: 0 }))
    }
}

impl Queue for SlowQueue {
    fn reserve(&mut self, len: u32, purpose: SlotUse) -> Result<Slot, DeviceError> {
        if self.lent == self.device.slots {
            return Err(DeviceError::NoMemory);
        }
        self.lent += 1;
        self.queue.reserve(len, purpose)
    }
    fn bytes(&mut self, slot: &Slot) -> &mut [u8] {
        self.queue.bytes(slot)
    }
    fn release(&mut self, slot: Slot) {
        self.lent -= 1;
        self.queue.release(slot);
    }
    fn submit(&mut self, tag: Tag, request: Request) {
        let writes = matches!(request, Request::Write { .. });
        self.queue.submit(tag, request);
        let mut done = Vec::new();
        self.queue.reap(&mut done);
        let due = self.reaps + self.device.delay;
        self.late.extend(done.into_iter().map(|one| (due, one)));
        self.lent -= usize::from(writes);
    }
    fn reap(&mut self, out: &mut Vec<Completion>) {
        self.reaps += 1;
        while self.late.front().is_some_and(|(due, _)| *due < self.reaps) {
            out.extend(self.late.pop_front().map(|(_, one)| one));
        }
    }
    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.queue.wake_fd()
    }
    fn in_flight(&self) -> usize {
        self.late.len()
    }
}

impl Drop for SlowQueue {
    fn drop(&mut self) {
        *self.device.dropped.lock().unwrap() += self.in_flight();
    }
}

fn slow(slots: usize, delay: usize) -> Arc<Slow> {
    Arc::new(Slow { disk: disk(), slots, delay, dropped: Arc::default() })
}

#[test]
fn every_operation_reaches_the_device_with_its_flags() {
    let disk = disk();
    let fua = |(mut descriptor, payload): (Descriptor, Vec<u8>)| {
        descriptor.op_flags |= flag::FUA;
        (descriptor, payload)
    };
    let plain = |descriptor| (descriptor, Vec::new());
    let requests = vec![
        write(0, 8, 1),
        fua(write(8, 8, 2)),
        plain(ask(op::FLUSH, 0, 0, 0)),
        plain(ask(op::DISCARD, 0, 0, 2)),
        fua(plain(ask(op::WRITE_ZEROES, flag::NOUNMAP, 8, 2))),
        read(0, 16),
    ];
    let (exit, answers) = run(fake(4, 1, requests), disk.clone());
    assert_eq!(exit, Exit::Stopped);
    let results: Vec<i32> = answers.iter().map(|(_, result, _)| *result).collect();
    assert_eq!(results, [4096, 4096, OK, OK, OK, 8192]);
    let mut expected = vec![0; 1024];
    expected.extend([1; 3072]);
    expected.extend([0; 1024]);
    expected.extend([2; 3072]);
    assert!(answers[5].2 == expected);
    let counts = disk.counts();
    assert_eq!((counts.writes, counts.zeroes, counts.unmaps, counts.flushes), (2, 2, 1, 1));
    assert_eq!(counts.fua, 2);
}

#[test]
fn errors_of_the_device_and_of_requests_are_answered_with_their_number() {
    let disk = disk();
    disk.fail_next(1);
    let plain = |descriptor| (descriptor, Vec::new());
    let requests = vec![
        read(0, 8),
        read(SIZE / 512, 8),
        plain(ask(4, 0, 0, 8)),
        (ask(op::WRITE, 0, 0, 8), vec![1; 100]), // the payload cannot be had
        write(0, 8, 1),
    ];
    let (_, answers) = run(fake(4, 1, requests), disk);
    let results: Vec<i32> = answers.iter().map(|(_, result, _)| *result).collect();
    assert_eq!(results, [-libc::EIO, -libc::EINVAL, -libc::EOPNOTSUPP, -libc::EIO, 4096]);
    let info = DeviceInfo {
        size: VolumeSize::new(SIZE).unwrap(),
        blocks: BlockSizes::E512,
        read_only: true,
        zeroes: true,
        volatile_cache: false,
    };
    let (_, answers) =
        run(fake(1, 1, vec![write(0, 8, 1)]), Arc::new(MemoryDevice::with_info(info)));
    assert_eq!(answers[0].1, -libc::EPERM);
}

#[test]
fn requests_without_a_buffer_wait_for_one_and_none_is_lost() {
    for (slots, delay) in [(1, 0), (1, 3), (3, 1), (8, 2)] {
        let device = slow(slots, delay);
        let mut requests: Vec<_> =
            (0..64).map(|n| write(n * 8, 8, u8::try_from(n).unwrap())).collect();
        requests.extend((0..64).map(|n| read(n * 8, 8)));
        // Reads must not overtake the writes they look for: the first batch takes all the writes.
        let (exit, answers) = run(fake(64, 64, requests), device.clone());
        assert_eq!(exit, Exit::Stopped);
        assert_eq!(answers.len(), 128, "{slots} slots");
        assert!(answers.iter().all(|(_, result, _)| *result == 4096));
        assert_eq!(*device.dropped.lock().unwrap(), 0);
    }
}

#[test]
fn a_leaving_server_ends_what_it_has_begun_and_answers_nothing_else() {
    let device = slow(64, 5);
    let requests: Vec<_> = (0..40).map(|n| write(n * 8, 8, 7)).collect();
    let mut fake = fake(16, 10, requests);
    fake.then = Then::Leave;
    let (exit, answers) = run(fake, device.clone());
    assert_eq!(exit, Exit::Left);
    assert_eq!(*device.dropped.lock().unwrap(), 0, "nothing was in flight any more");
    // The last batch came with the order to leave: it was not begun.
    assert!((30..40).contains(&answers.len()), "{} answers", answers.len());
    assert_eq!(device.disk.counts().writes, answers.len() as u64);
    assert!(answers.iter().all(|(_, result, _)| *result == 4096));
}

#[test]
fn a_driver_that_refuses_an_answer_ends_the_thread() {
    let mut fake = fake(4, 4, vec![write(0, 8, 1)]);
    fake.then = Then::Break;
    let (exit, _) = run(fake, slow(4, 2));
    assert!(matches!(exit, Exit::Failed(why) if why.contains("refused")));
}

#[test]
fn waiting_without_limit_unless_a_buffer_is_awaited_that_nobody_frees() {
    let mut fake = fake(4, 4, vec![write(0, 8, 1), write(8, 8, 2)]);
    fake.then = Then::Leave;
    let device = slow(0, 0);
    let stop = Arc::new(wake::Event::new().unwrap());
    let queue = device.clone().open_queue().unwrap();
    // No slot at all, and not yet told to leave.
    fake.over = true;
    fake.stop = Some(Arc::clone(&stop));
    let mut plane = Plane::new(fake, device, queue, stop);
    let mut events = Vec::new();
    plane.kernel.enter(None, &mut events).unwrap();
    plane.events = events;
    assert!(plane.turn().is_ok());
    assert!(plane.is_starved() && plane.held.len() == 2 && plane.starved_since.is_some());
    assert!(plane.kernel.answers.lock().unwrap().is_empty());
    // A very long time later it is an error.
    plane.starved_since = Instant::now().checked_sub(STARVED_LIMIT);
    assert!(plane.starved_since.is_some() && plane.turn().is_ok());
    let answers: Vec<i32> = plane.kernel.answers.lock().unwrap().iter().map(|a| a.1).collect();
    assert_eq!(answers, [-libc::ENOMEM]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is asked, in batches of any size, a RAM disk behind the plane is a plain array.
    #[test]
    fn a_plane_over_a_ram_disk_is_an_array(
        asked in prop::collection::vec((0..6u8, 0..SIZE / BLOCK, 1..256u32, any::<u8>()), 1..120),
        depth in 1..40u16,
        batch in 1..40usize,
    ) {
        let mut model = vec![0u8; usize::try_from(SIZE).unwrap()];
        let mut requests = Vec::new();
        let mut expected = Vec::new();
        for (operation, block, blocks, fill) in asked {
            let range = usize::try_from(block * BLOCK).unwrap()
                ..usize::try_from((block + u64::from(blocks)) * BLOCK).unwrap();
            let inside = range.end <= model.len();
            let len = i32::try_from(range.len()).unwrap();
            let (payload, result, seen) = match operation {
                op::FLUSH => (vec![], 0, None),
                4 => (vec![], -libc::EOPNOTSUPP, None),
                _ if !inside => (vec![], -libc::EINVAL, None),
                op::READ => (vec![], len, Some(model[range].to_vec())),
                op::WRITE => {
                    model[range.clone()].fill(fill);
                    (vec![fill; range.len()], len, None)
                }
                _ => {
                    model[range].fill(0);
                    (vec![], 0, None)
                }
            };
            requests.push((ask(operation, 0, block, blocks), payload));
            expected.push((result, seen));
        }
        let disk = disk();
        let (exit, answers) = run(fake(depth, batch, requests.clone()), disk.clone());
        prop_assert_eq!(exit, Exit::Stopped);
        prop_assert_eq!(answers.len(), expected.len());
        for ((result, seen), (_, answered, bytes)) in expected.iter().zip(&answers) {
            prop_assert_eq!(result, answered);
            prop_assert!(seen.as_ref().is_none_or(|seen| seen == bytes));
        }
        let mut found = vec![0; model.len()];
        disk.read_at(0, &mut found);
        prop_assert!(found == model);
    }
}

#[test]
fn the_longest_request_is_one_slot() {
    let blocks = u32::try_from(MAX_PAYLOAD / 512).unwrap();
    let (_, answers) = run(fake(2, 1, vec![write(0, blocks, 3), read(0, blocks)]), disk());
    assert!(answers[1].2.len() == MAX_PAYLOAD && answers[1].2.iter().all(|b| *b == 3));
}
