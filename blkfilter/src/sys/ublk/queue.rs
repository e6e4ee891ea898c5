//! One queue of a ublk device: its ring, its descriptors, the payloads of its requests.
//!
//! Belongs to one thread for life, as the driver demands. A tag is *home* from the completion of
//! its fetch until its commit is pushed: only then are its descriptor and its payload ours.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{SysconfVar, sysconf};

use super::uapi::{
    Descriptor, IO_COMMIT_AND_FETCH, IO_FETCH, IoCommand, MAX_DEPTH, descriptors_len,
    payload_position,
};
use crate::sys::aligned::AlignedBuf;

/// The character device in the ring's table of files.
const DEVICE: Fixed = Fixed(0);

/// Marks the completion of a poll in its user data; tags are below.
const WATCH: u64 = 1 << 32;

/// How long to leave the kernel alone when it is out of memory for entries.
const PAUSE: Duration = Duration::from_millis(10);

/// How payloads travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payloads {
    /// By reading and writing the character device.
    UserCopy,
    /// The driver copies them to and from a buffer per tag of this many bytes.
    Buffers(usize),
}

/// Something to deal with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The tag has come home with a request.
    Request(u16),
    /// The driver wants no more fetches of this tag: the device is stopped.
    Ended(u16),
    /// The driver did not take the tag's last command.
    Broken(u16, Errno),
    /// The watched descriptor of this index is readable. It is watched again from the next
    /// [`QueueRing::enter`] on.
    Readable(usize),
}

/// The pages into which the driver writes what it wants of us.
#[derive(Debug)]
struct Descriptors {
    base: NonNull<u64>,
    len: NonZeroUsize,
    depth: u16,
}

// SAFETY: a mapping that only its owner reads, by volatile loads; nothing about it is tied to a
// thread.
unsafe impl Send for Descriptors {}

impl Descriptors {
    fn map(device: &File, queue: u16, depth: u16) -> io::Result<Self> {
        let page = sysconf(SysconfVar::PAGE_SIZE)?.and_then(|page| u64::try_from(page).ok());
        let page = page.filter(|page| page.is_power_of_two()).unwrap_or(4096);
        let len = usize::try_from(descriptors_len(depth, page)).ok().and_then(NonZeroUsize::new);
        let len = len.ok_or(io::ErrorKind::InvalidInput)?;
        let offset = i64::try_from(u64::from(queue) * descriptors_len(MAX_DEPTH, page))
            .map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing.
        let base =
            unsafe { mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, device, offset) }?;
        Ok(Self { base: base.cast(), len, depth })
    }

    fn get(&self, tag: u16) -> Descriptor {
        if tag >= self.depth {
            return Descriptor::default();
        }
        let words = usize::from(tag) * (Descriptor::LEN / 8);
        // SAFETY: inside the mapping, which holds `depth` descriptors, is aligned to pages and
        // lives as long as self. The driver may write at the same time, hence volatile; it does not
        // while the tag is home.
        unsafe {
            let first = self.base.add(words);
            Descriptor::from_words(first.read_volatile(), first.add(1).read_volatile())
        }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, unmapped only here; no reference into it was ever given out.
        let unmapped = unsafe { munmap(self.base.cast(), self.len.get()) };
        debug_assert!(unmapped.is_ok(), "a whole mapping of our own can be unmapped");
    }
}

/// Buffers that the driver copies payloads to and from, where it cannot [`Payloads::UserCopy`].
#[derive(Debug)]
struct Buffers {
    memory: AlignedBuf,
    each: usize,
}

impl Buffers {
    fn address(&self, tag: u16) -> u64 {
        let base = self.memory.address().as_ptr();
        base.wrapping_add(usize::from(tag) * self.each).expose_provenance() as u64
    }

    /// `len` bytes from `offset` on of a tag's buffer. The tag has to be home.
    fn part(&mut self, tag: u16, offset: usize, len: usize) -> io::Result<&mut [u8]> {
        if offset.checked_add(len).is_none_or(|end| end > self.each) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let start = usize::from(tag) * self.each + offset;
        Ok(&mut self.memory[start..start + len])
    }
}

/// Everything a queue needs that can be had before the device: so little is left to do between
/// taking a device over and serving it.
#[derive(Debug)]
pub struct Prepared {
    queue: u16,
    depth: u16,
    ring: Ring,
    buffers: Option<Buffers>,
    watched: Vec<Watch>,
}

/// A descriptor to be told about.
#[derive(Debug)]
struct Watch {
    fd: OwnedFd,
    armed: bool,
}

/// For its Debug.
struct Ring(IoUring);

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ring")
    }
}

impl Prepared {
    /// For queue `queue` with `depth` tags. On the thread that will serve it.
    ///
    /// # Errors
    /// No ring, for want of permission, descriptors or memory.
    pub fn new(
        queue: u16,
        depth: u16,
        payloads: Payloads,
        watched: Vec<OwnedFd>,
    ) -> io::Result<Self> {
        // Room for a command of every tag and for all polls: a push never fails.
        let entries = (u32::from(depth) + 8).next_power_of_two();
        // The thread is never interrupted: what the driver has for it is taken where it waits.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(entries)
            .or_else(|_| IoUring::builder().setup_coop_taskrun().build(entries))
            .or_else(|_| IoUring::new(entries))?;
        let buffers = match payloads {
            Payloads::UserCopy => None,
            Payloads::Buffers(each) => {
                Some(Buffers { memory: AlignedBuf::zeroed(each * usize::from(depth)), each })
            }
        };
        let watched = watched.into_iter().map(|fd| Watch { fd, armed: false }).collect();
        Ok(Self { queue, depth, ring: Ring(ring), buffers, watched })
    }

    /// Fetches every tag of the queue of the open character device.
    ///
    /// # Errors
    /// Of the mapping or the ring. That the driver does not take a fetch shows as
    /// [`Event::Broken`].
    pub fn fetch(self, device: Arc<File>) -> io::Result<QueueRing> {
        let Self { queue, depth, ring: Ring(ring), buffers, watched } = self;
        let descriptors = Descriptors::map(&device, queue, depth)?;
        ring.submitter().register_files(&[device.as_raw_fd()])?;
        let mut all = QueueRing {
            ring,
            queue,
            home: vec![true; usize::from(depth)],
            away: 0,
            buffers,
            watched,
            descriptors,
            device,
        };
        for tag in 0..depth {
            all.push(IO_FETCH, tag, 0);
        }
        all.ring.submit()?;
        Ok(all)
    }
}

/// A queue being served.
///
/// Drop it only after its thread has ended, unless every tag has [`Event::Ended`]. The end of the
/// thread cancels the fetches in the thread's own context; when the ring is closed before, a worker
/// of the kernel cancels them at the same time as the thread may still be handed a request, which
/// Linux 6.12 then forgets: the device never comes to rest and no other server can have it.
pub struct QueueRing {
    ring: IoUring,
    queue: u16,
    /// By tag; see the module.
    home: Vec<bool>,
    /// Tags that are not home.
    away: usize,
    buffers: Option<Buffers>,
    watched: Vec<Watch>,
    descriptors: Descriptors,
    device: Arc<File>,
}

impl QueueRing {
    /// Tags.
    #[must_use]
    pub fn depth(&self) -> u16 {
        self.descriptors.depth
    }

    /// The request of a tag that is home.
    #[must_use]
    pub fn descriptor(&self, tag: u16) -> Descriptor {
        self.descriptors.get(tag)
    }

    /// Copies `into.len()` bytes of the payload of a tag's write, from its beginning on.
    ///
    /// # Errors
    /// The driver does not have them.
    pub fn take_payload(&mut self, tag: u16, into: &mut [u8]) -> io::Result<()> {
        self.must_be_home(tag)?;
        match &mut self.buffers {
            None => self.device.read_exact_at(into, payload_position(self.queue, tag)),
            Some(buffers) => {
                into.copy_from_slice(buffers.part(tag, 0, into.len())?);
                Ok(())
            }
        }
    }

    /// Fills the payload of a tag's read, from its beginning on.
    ///
    /// # Errors
    /// The driver does not take it.
    pub fn give_payload(&mut self, tag: u16, from: &[u8]) -> io::Result<()> {
        self.must_be_home(tag)?;
        match &mut self.buffers {
            None => self.device.write_all_at(from, payload_position(self.queue, tag)),
            Some(buffers) => {
                buffers.part(tag, 0, from.len())?.copy_from_slice(from);
                Ok(())
            }
        }
    }

    /// Ends the request of a tag that is home and fetches its next. The driver hears of it at the
    /// next [`Self::enter`].
    pub fn commit(&mut self, tag: u16, result: i32) {
        self.push(IO_COMMIT_AND_FETCH, tag, result);
    }

    fn must_be_home(&self, tag: u16) -> io::Result<()> {
        let home = self.home.get(usize::from(tag)).copied().unwrap_or(false);
        if home { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    fn push(&mut self, command: u32, tag: u16, result: i32) {
        let Some(home) = self.home.get_mut(usize::from(tag)).filter(|home| **home) else {
            debug_assert!(false, "a tag is answered once");
            return;
        };
        *home = false;
        self.away += 1;
        let address = self.buffers.as_ref().map_or(0, |buffers| buffers.address(tag));
        let command_bytes = IoCommand { queue: self.queue, tag, result, address }.encode();
        let entry = opcode::UringCmd16::new(DEVICE, command)
            .cmd(command_bytes)
            .build()
            .user_data(u64::from(tag));
        self.push_entry(&entry);
    }

    fn push_entry(&mut self, entry: &squeue::Entry) {
        // SAFETY: commands carry their bytes in the entry; the buffer whose address one may carry
        // is not touched until the tag is home again, and outlives the ring or is leaked (see
        // drop). Polls carry no memory.
        let pushed = unsafe { self.ring.submission().push(entry) };
        debug_assert!(pushed.is_ok(), "there is room for one command of every tag, and all polls");
    }

    /// Hands everything to the driver, waits until there is an event or the time has passed
    /// (`None`: for ever), and appends the events to `out`. One system call.
    ///
    /// # Errors
    /// The ring is unusable. Interruptions and want of memory only lead to no events.
    pub fn enter(&mut self, limit: Option<Duration>, out: &mut Vec<Event>) -> io::Result<()> {
        self.watch();
        let entered = match limit {
            None => self.ring.submit_and_wait(1),
            Some(limit) => {
                let time = Timespec::from(limit);
                let args = SubmitArgs::new().timespec(&time);
                self.ring.submitter().submit_with_args(1, &args)
            }
        };
        match entered.map_err(|error| (error.raw_os_error().map(Errno::from_raw), error)) {
            Ok(_) | Err((Some(Errno::EINTR | Errno::ETIME), _)) => {}
            Err((Some(Errno::EAGAIN | Errno::EBUSY | Errno::ENOMEM), error)) => {
                tracing::warn!(%error, "ublk: the kernel takes no commands for the moment");
                // The pause is the point: there is nothing that would tell when memory is there.
                #[allow(clippy::disallowed_methods)]
                std::thread::sleep(PAUSE);
            }
            Err((_, error)) => return Err(error),
        }
        for entry in self.ring.completion() {
            let (data, result) = (entry.user_data(), entry.result());
            if data >= WATCH {
                let index = usize::try_from(data - WATCH).unwrap_or(usize::MAX);
                if let Some(watch) = self.watched.get_mut(index) {
                    watch.armed = false;
                    out.push(Event::Readable(index));
                }
                continue;
            }
            let Ok(tag) = u16::try_from(data) else { continue };
            if let Some(home) = self.home.get_mut(usize::from(tag)).filter(|home| !**home) {
                *home = true;
                self.away -= 1;
                out.push(event(tag, result));
            }
        }
        Ok(())
    }

    /// Hands everything to the driver without waiting for anything.
    ///
    /// # Errors
    /// Of the ring.
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn watch(&mut self) {
        for index in 0..self.watched.len() {
            let watch = &mut self.watched[index];
            if !std::mem::replace(&mut watch.armed, true) {
                let events = u32::from(libc::POLLIN.unsigned_abs());
                let poll = opcode::PollAdd::new(Fd(watch.fd.as_raw_fd()), events).build();
                self.push_entry(&poll.user_data(WATCH + index as u64));
            }
        }
    }
}

fn event(tag: u16, result: i32) -> Event {
    match result {
        0.. => Event::Request(tag),
        _ => match Errno::from_raw(result.wrapping_neg()) {
            Errno::ENODEV => Event::Ended(tag),
            errno => Event::Broken(tag, errno),
        },
    }
}

impl Drop for QueueRing {
    fn drop(&mut self) {
        // The kernel takes the ring apart in the background, and only then lets go of the device.
        // Unregistering its file here would wait for ever for the tags that are away.
        // While a tag is away the driver may still copy a payload to its buffer: it does so on this
        // very thread, at any later system call.
        if self.away > 0
            && let Some(buffers) = self.buffers.take()
        {
            std::mem::forget(buffers);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_fetches_are_requests_the_end_or_a_refusal() {
        assert_eq!(event(3, 0), Event::Request(3));
        assert_eq!(event(3, -libc::ENODEV), Event::Ended(3));
        assert_eq!(event(3, -libc::EINVAL), Event::Broken(3, Errno::EINVAL));
    }

    #[test]
    fn buffers_of_tags_lie_apart_and_end_where_they_end() {
        let mut buffers = Buffers { memory: AlignedBuf::zeroed(4 * 8192), each: 8192 };
        assert_eq!(buffers.address(3) - buffers.address(0), 3 * 8192);
        buffers.part(1, 0, 8192).unwrap().fill(1);
        assert!(buffers.part(0, 0, 8192).unwrap().iter().all(|b| *b == 0));
        assert!(buffers.part(2, 0, 8192).unwrap().iter().all(|b| *b == 0));
        assert!(buffers.part(1, 1, 8192).is_err());
    }
}
