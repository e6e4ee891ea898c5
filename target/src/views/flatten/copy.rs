//! A view copied while it is in use: what is written to it meanwhile is copied again, every byte is
//! read back and compared, and only the last bit is done while writes wait.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLockWriteGuard};
use std::time::{Duration, Instant};

use farshore_extent::{Extent, ExtentSet};

use super::image::Image;

/// Looked at together, in bytes: zeroes of so many bytes cost one question.
const WINDOW: u64 = 64 << 20;
/// Copied or compared at once, in bytes.
const PIECE: u64 = 1 << 20;
/// The rest that is done while writes wait, in bytes: well below a second.
const REST: u64 = 16 << 20;
/// After so many rounds the rest is done however much it is: its writer is faster than the copy.
const ROUNDS: u32 = 16;
/// Longest pause before somebody who wants it to stop is heard.
const NAP: Duration = Duration::from_millis(50);

/// What is copied: a view, or a test's.
pub(in crate::views) trait Source {
    /// Fills `out` with what the view shows now.
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), String>;
    /// Which parts of `extent` are zero without being stored, in pieces that cover a beginning of it.
    fn zeroes(&self, extent: Extent) -> Vec<(Extent, bool)>;
    /// Lets no write begin, and waits for those under way, until what is returned is dropped.
    fn freeze(&self) -> RwLockWriteGuard<'_, ()>;
}

/// Why a copy has ended early. The view is as it was.
#[derive(Debug)]
pub(in crate::views) enum CopyError {
    /// The view cannot be read there.
    View { at: u64, why: String },
    /// The image cannot be written or read.
    Image(io::Error),
    /// It does not give back what was written to it.
    Differs(Extent),
    /// Writing on would take what the journals need.
    NoRoom,
    /// It was told to.
    Stopped,
}

impl From<io::Error> for CopyError {
    fn from(error: io::Error) -> Self {
        Self::Image(error)
    }
}

/// How far a copy has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::views) struct Progress {
    /// Bytes that are not in the image as the view shows them.
    pub(in crate::views) to_copy: u64,
    /// Bytes that were not read back since they were written.
    pub(in crate::views) to_verify: u64,
}

/// What is still to be done, by address. A write to the view makes its range dirty.
#[derive(Debug)]
pub(in crate::views) struct Mirror {
    todo: Mutex<Todo>,
}

#[derive(Debug, Default)]
struct Todo {
    dirty: ExtentSet,
    unverified: ExtentSet,
}

impl Mirror {
    pub(in crate::views) fn new(all: Extent) -> Self {
        let mut todo = Todo::default();
        todo.dirty.insert(all);
        Self { todo: Mutex::new(todo) }
    }

    fn todo(&self) -> MutexGuard<'_, Todo> {
        self.todo.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The range of the view has just changed.
    pub(in crate::views) fn touch(&self, extent: Extent) {
        let mut todo = self.todo();
        todo.dirty.insert(extent);
        todo.unverified.remove(extent);
    }

    pub(in crate::views) fn progress(&self) -> Progress {
        let todo = self.todo();
        Progress { to_copy: todo.dirty.bytes(), to_verify: todo.unverified.bytes() }
    }

    /// The next range to copy; from now on it counts as copied, unless it is touched.
    fn next_dirty(&self) -> Option<Extent> {
        let mut todo = self.todo();
        let next = first_window(&todo.dirty)?;
        todo.dirty.remove(next);
        todo.unverified.insert(next);
        Some(next)
    }

    /// The next range to verify; from now on it counts as verified, unless it is touched.
    fn next_unverified(&self) -> Option<Extent> {
        let mut todo = self.todo();
        let next = first_window(&todo.unverified)?;
        todo.unverified.remove(next);
        Some(next)
    }

    fn is_dirty(&self, extent: Extent) -> bool {
        self.todo().dirty.overlaps(extent)
    }
}

fn first_window(set: &ExtentSet) -> Option<Extent> {
    let first = set.iter().next()?;
    Extent::between(first.offset(), first.end().min(first.offset() + WINDOW))
}

/// One copy.
pub(in crate::views) struct Copy<'a> {
    pub(in crate::views) source: &'a dyn Source,
    pub(in crate::views) mirror: &'a Mirror,
    pub(in crate::views) image: &'a Image,
    /// Bytes a second; 0 is no limit.
    pub(in crate::views) rate: u64,
    /// Whether to end.
    pub(in crate::views) stop: &'a dyn Fn() -> bool,
    /// Whether so many bytes more may be written.
    pub(in crate::views) room: &'a dyn Fn(u64) -> bool,
}

impl Copy<'_> {
    /// Copies and verifies everything. At the end, while no write can begin, `switch` makes the image
    /// what the view consists of.
    ///
    /// # Errors
    /// [`CopyError`]; the image is not whole then, and can be gone on with.
    pub(in crate::views) fn run(
        &self,
        switch: impl FnOnce() -> Result<(), CopyError>,
    ) -> Result<(), CopyError> {
        let mut pace = Pace::new(self.rate);
        for _ in 0..ROUNDS {
            self.copy_all(&mut pace, true)?;
            self.image.sync()?;
            self.image.forget_cached();
            self.verify_all(&mut pace, true)?;
            let rest = self.mirror.progress();
            if rest.to_copy + rest.to_verify <= REST {
                break;
            }
        }
        let _frozen = self.source.freeze();
        let mut pace = Pace::new(0);
        self.copy_all(&mut pace, false)?;
        self.image.sync()?;
        self.image.forget_cached();
        self.verify_all(&mut pace, false)?;
        switch()
    }

    fn copy_all(&self, pace: &mut Pace, may_stop: bool) -> Result<(), CopyError> {
        while let Some(window) = self.mirror.next_dirty() {
            let copied = self.parts(window, |part, zero| {
                if zero {
                    return Ok(self.image.zero(part)?);
                }
                let bytes = self.read(part)?;
                // What is there already from a copy before is not written again.
                let there = self.read_image(part)?;
                if there != bytes {
                    if !(self.room)(part.len()) {
                        return Err(CopyError::NoRoom);
                    }
                    self.write(part, &bytes)?;
                }
                self.pause(pace, part.len(), may_stop)
            });
            if let Err(error) = copied {
                self.mirror.touch(window);
                return Err(error);
            }
        }
        Ok(())
    }

    fn verify_all(&self, pace: &mut Pace, may_stop: bool) -> Result<(), CopyError> {
        while let Some(window) = self.mirror.next_unverified() {
            let verified = self.parts(window, |part, zero| {
                let equal = || -> Result<bool, CopyError> {
                    Ok(match zero {
                        true => self.image.is_zero(part)?,
                        false => self.read(part)? == self.read_image(part)?,
                    })
                };
                if !equal()? && !self.mirror.is_dirty(part) {
                    // Or a write has ended and not said so yet.
                    let frozen = may_stop.then(|| self.source.freeze());
                    let bytes = self.read(part)?;
                    let same = bytes == self.read_image(part)? || self.mirror.is_dirty(part);
                    drop(frozen);
                    if !same {
                        return Err(CopyError::Differs(part));
                    }
                }
                if zero { Ok(()) } else { self.pause(pace, part.len(), may_stop) }
            });
            if let Err(error) = verified {
                self.mirror.touch(window);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Every part of `window`, at most [`PIECE`] long unless it is zero.
    fn parts(
        &self,
        window: Extent,
        mut each: impl FnMut(Extent, bool) -> Result<(), CopyError>,
    ) -> Result<(), CopyError> {
        let mut at = window.offset();
        while let Some(rest) = Extent::between(at, window.end()) {
            let mut pieces = self.source.zeroes(rest);
            if pieces.is_empty() {
                pieces.push((rest, false));
            }
            for (piece, zero) in pieces {
                match zero {
                    true => each(piece, true)?,
                    false => piece.split_at_multiples_of(PIECE).try_for_each(|p| each(p, false))?,
                }
                at = piece.end();
            }
        }
        Ok(())
    }

    fn read(&self, extent: Extent) -> Result<Vec<u8>, CopyError> {
        let mut bytes = vec![0; usize::try_from(extent.len()).unwrap_or(0)];
        let read = self.source.read(extent.offset(), &mut bytes);
        read.map_err(|why| CopyError::View { at: extent.offset(), why }).map(|()| bytes)
    }

    fn read_image(&self, extent: Extent) -> Result<Vec<u8>, CopyError> {
        let mut bytes = vec![0; usize::try_from(extent.len()).unwrap_or(0)];
        self.image.read(extent.offset(), &mut bytes)?;
        Ok(bytes)
    }

    /// Pages of zeroes stay holes.
    fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), CopyError> {
        const PAGE: usize = 4096;
        let mut at = 0;
        for run in bytes.chunks(PAGE).collect::<Vec<_>>().chunk_by(|a, b| is_zero(a) == is_zero(b))
        {
            let len: usize = run.iter().map(|page| page.len()).sum();
            let offset = extent.offset() + at as u64;
            if is_zero(run[0]) {
                Extent::between(offset, offset + len as u64)
                    .map_or(Ok(()), |e| self.image.zero(e))?;
            } else {
                self.image.write(offset, &bytes[at..at + len])?;
            }
            at += len;
        }
        Ok(())
    }

    #[allow(clippy::disallowed_methods)] // the pause is the point: it is a limit of the speed
    fn pause(&self, pace: &mut Pace, bytes: u64, may_stop: bool) -> Result<(), CopyError> {
        loop {
            if may_stop && (self.stop)() {
                return Err(CopyError::Stopped);
            }
            match pace.wait(bytes) {
                None => break,
                Some(pause) => std::thread::sleep(pause.min(NAP)),
            }
        }
        pace.done += bytes;
        Ok(())
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// How fast a copy may be.
struct Pace {
    rate: u64,
    begun: Instant,
    done: u64,
}

impl Pace {
    fn new(rate: u64) -> Self {
        Self { rate, begun: Instant::now(), done: 0 }
    }

    /// How long to wait before `bytes` more are in time.
    fn wait(&self, bytes: u64) -> Option<Duration> {
        if self.rate == 0 {
            return None;
        }
        let nanos = u128::from(self.done + bytes) * 1_000_000_000 / u128::from(self.rate);
        let due = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        due.checked_sub(self.begun.elapsed()).filter(|wait| !wait.is_zero())
    }
}
