use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;

use farshore_extent::{BlockSizes, Extent, Lsn, VolumeId, VolumeSize};

use super::*;
use crate::store::SimDisk;
use crate::views::device::{Backing, PointBytes, PointReadError};
use crate::views::scratch::{Identity, Scratch};
use farshore_blkfilter::device::{Device, Queue, Request, SlotUse, Tag};

const SIZE: u64 = 8 << 20;

/// A point of which the second half is zero, and a part cannot be read if so wished.
struct Point {
    bad: bool,
}

impl Point {
    fn byte(offset: u64) -> u8 {
        if offset < SIZE / 2 { u8::try_from(offset / 4096 % 250 + 1).unwrap() } else { 0 }
    }
}

impl PointBytes for Point {
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), PointReadError> {
        if self.bad && offset < 2 << 20 && offset + out.len() as u64 > 1 << 20 {
            return Err(PointReadError("planted".into()));
        }
        for (at, byte) in (offset..).zip(out) {
            *byte = Self::byte(at);
        }
        Ok(())
    }

    fn zeroes(&self, extent: Extent, _: usize) -> Vec<(Extent, bool)> {
        let middle = (SIZE / 2).clamp(extent.offset(), extent.end());
        let data = Extent::between(extent.offset(), middle).map(|e| (e, false));
        let zero = Extent::between(middle, extent.end()).map(|e| (e, true));
        data.into_iter().chain(zero).collect()
    }
}

fn ext(offset: u64, len: u64) -> Extent {
    Extent::new(offset, len).unwrap()
}

fn view(bad: bool) -> Arc<ViewDevice> {
    let size = VolumeSize::new(SIZE).unwrap();
    let view = ViewId::from_bytes([1; 16]);
    let volume = VolumeId::from_bytes([2; 16]);
    let identity = Identity { view, volume, at: Lsn::ZERO, size };
    let limits = Limits { quota: SIZE, reserve: None };
    let scratch = Scratch::create(Arc::new(SimDisk::new(1)), identity, limits);
    let scratch = Box::new(scratch.unwrap());
    let backing = Backing::Layers { point: Box::new(Point { bad }), scratch };
    Arc::new(ViewDevice::new("v".into(), (size, BlockSizes::E512), backing, false))
}

fn write(queue: &mut dyn Queue, extent: Extent, value: u8) {
    let slot = queue.reserve(u32::try_from(extent.len()).unwrap(), SlotUse::Write).unwrap();
    queue.bytes(&slot).fill(value);
    queue.submit(Tag(1), Request::Write { extent, slot, fua: false });
    let mut done = Vec::new();
    queue.reap(&mut done);
    assert_eq!(done[0].result, Ok(()));
}

fn content(view: &ViewDevice) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
    Source::read(view, 0, &mut bytes).unwrap();
    bytes
}

/// A copy into a file of a folder of its own.
struct Bench {
    dir: tempfile::TempDir,
    view: Arc<ViewDevice>,
    mirror: Arc<Mirror>,
}

impl Bench {
    fn new(view: Arc<ViewDevice>) -> Self {
        let mirror = Arc::new(Mirror::new(ext(0, SIZE)));
        view.set_mirror(Some(Arc::clone(&mirror)));
        Self { dir: tempfile::tempdir().unwrap(), view, mirror }
    }

    fn to(&self) -> PathBuf {
        self.dir.path().join("v.img")
    }

    fn begin(&self, how: Begin) -> Result<Arc<Image>, Problem> {
        let identity = (ViewId::from_bytes([1; 16]), SIZE);
        Image::begin(&self.to(), Path::new("/nowhere"), identity, how).map(Arc::new)
    }

    fn run(
        &self,
        image: &Arc<Image>,
        stop: &dyn Fn() -> bool,
        room: &dyn Fn(u64) -> bool,
    ) -> Result<(), CopyError> {
        let source = self.view.as_ref();
        let copy = Copy { source, mirror: &self.mirror, image, rate: 0, stop, room };
        copy.run(|| {
            image.finish()?;
            self.view.become_image(Arc::clone(image));
            Ok(())
        })
    }
}

#[test]
fn a_view_in_use_becomes_an_image_with_every_write_and_goes_on_in_it() {
    let bench = Bench::new(view(false));
    let image = bench.begin(Begin::Empty).unwrap();
    let stopped = AtomicBool::new(false);
    let written = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut queue = bench.view.clone().open_queue().unwrap();
            while !stopped.load(Ordering::Relaxed) {
                let n = written.fetch_add(1, Ordering::Relaxed);
                let extent = ext(n * 7 % 2000 * 4096, 4096);
                write(queue.as_mut(), extent, u8::try_from(n % 251).unwrap());
            }
        });
        while written.load(Ordering::Relaxed) < 100 {
            std::thread::yield_now();
        }
        bench.run(&image, &|| false, &|_| true).unwrap();
        let then = written.load(Ordering::Relaxed);
        // It goes on in the image.
        while written.load(Ordering::Relaxed) < then + 100 {
            std::thread::yield_now();
        }
        stopped.store(true, Ordering::Relaxed);
    });
    bench.view.set_mirror(None);
    assert_eq!(bench.view.used(), 0, "nothing is in the scratch");
    let shown = content(&bench.view);
    assert!(std::fs::read(bench.to()).unwrap() == shown);
    let n = written.load(Ordering::Relaxed) - 1;
    let at = usize::try_from(n * 7 % 2000 * 4096).unwrap();
    assert_eq!(u64::from(shown[at]), n % 251, "the last write is there");
    assert_eq!(bench.view.flush(), Ok(()));
    let names = std::fs::read_dir(bench.dir.path()).unwrap().count();
    assert_eq!(names, 1, "only the image is left");
}

#[test]
fn what_is_stopped_goes_on_where_it_was_and_copies_what_has_changed() {
    let bench = Bench::new(view(false));
    let image = bench.begin(Begin::Empty).unwrap();
    let asked = AtomicU64::new(0);
    let soon = || asked.fetch_add(1, Ordering::Relaxed) >= 2;
    assert!(matches!(bench.run(&image, &soon, &|_| true), Err(CopyError::Stopped)));
    assert!(!bench.to().exists(), "it has no name before it is whole");
    drop(image);
    // As after a restart: nothing is known but what the image holds.
    let mut queue = bench.view.clone().open_queue().unwrap();
    write(queue.as_mut(), ext(0, 4096), 0xCC);
    let again = Bench { mirror: Arc::new(Mirror::new(ext(0, SIZE))), ..bench };
    again.view.set_mirror(Some(Arc::clone(&again.mirror)));
    let image = again.begin(Begin::Resume).unwrap();
    let most = AtomicU64::new(0);
    let counted = |bytes| {
        most.fetch_add(bytes, Ordering::Relaxed);
        true
    };
    let before = content(&again.view);
    again.run(&image, &|| false, &counted).unwrap();
    assert!(most.load(Ordering::Relaxed) < SIZE / 2, "what was there was not written again");
    assert!(std::fs::read(again.to()).unwrap() == before && content(&again.view) == before);
}

#[test]
fn a_bit_that_the_disk_of_the_image_has_changed_is_found_and_the_view_stays_as_it_is() {
    let bench = Bench::new(view(false));
    let before = content(&bench.view);
    let image = bench.begin(Begin::Empty).unwrap();
    let aside = std::fs::read_dir(bench.dir.path()).unwrap().next().unwrap().unwrap().path();
    // When half is copied, a bit of what is copied changes.
    let flip = |_| {
        if bench.mirror.progress().to_copy == 0 && bench.mirror.progress().to_verify > 0 {
            let file = std::fs::File::options().write(true).open(&aside).unwrap();
            file.write_all_at(&[0xFF], 5000).unwrap();
        }
        true
    };
    // The second window of a view this small is none: the flip comes with the last piece.
    let ended = bench.run(&image, &|| false, &flip);
    let Err(CopyError::Differs(extent)) = ended else { panic!("{ended:?}") };
    assert!(extent.contains(ext(5000, 1)), "{extent}");
    assert!(!bench.to().exists());
    assert!(content(&bench.view) == before);
}

#[test]
fn a_view_that_cannot_be_read_or_an_image_without_room_end_it_with_their_reason() {
    let bench = Bench::new(view(true));
    let image = bench.begin(Begin::Empty).unwrap();
    let ended = bench.run(&image, &|| false, &|_| true);
    assert!(matches!(ended, Err(CopyError::View { at, .. }) if at == 1 << 20), "{ended:?}");
    let bench = Bench::new(view(false));
    let image = bench.begin(Begin::Empty).unwrap();
    let ended = bench.run(&image, &|| false, &|_| false);
    assert!(matches!(ended, Err(CopyError::NoRoom)), "{ended:?}");
    assert!(!bench.to().exists());
    assert_eq!(bench.mirror.progress().to_copy, SIZE, "all of it is still to be done");
}

#[test]
fn what_lies_where_the_image_is_to_go_is_replaced_only_by_force() {
    let bench = Bench::new(view(false));
    std::fs::write(bench.to(), b"something").unwrap();
    for how in [Begin::Empty, Begin::Resume] {
        assert_eq!(bench.begin(how).unwrap_err().code.0, 6621);
    }
    let image = bench.begin(Begin::Force).unwrap();
    assert_eq!(std::fs::read(bench.to()).unwrap(), b"something", "until it is whole");
    bench.run(&image, &|| false, &|_| true).unwrap();
    assert_eq!(std::fs::metadata(bench.to()).unwrap().len(), SIZE);
}
