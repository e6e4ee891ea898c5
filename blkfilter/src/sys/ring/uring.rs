//! The kernel's ring: building entries, entering, taking completions.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use farshore_extent::Extent;
use io_uring::squeue::Entry;
use io_uring::types::{Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};

use super::op::{Active, IoBuf, Op, Step, ZERO_PIECE, zero_modes};
use crate::sys::aligned::AlignedBuf;
use crate::sys::pool::PoolMemory;

/// Index of our one file in the table of registered files.
const FILE: Fixed = Fixed(0);

/// Largest registered buffer Linux accepts, in bytes.
const MAX_REGISTERED: usize = 1 << 30;

/// How long drop waits for the device before it gives up on the buffers.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// One io_uring with one registered file.
pub(super) struct Uring {
    ring: IoUring,
    /// Entries handed to the kernel (or to the submission queue) and not completed.
    in_kernel: u32,
    depth: u32,
    /// Memories registered, in the order of their index. Kept alive as long as the ring.
    fixed: Vec<Arc<PoolMemory>>,
    /// A piece of zeroes, made when first needed; only ever read.
    zeroes: OnceLock<AlignedBuf>,
    /// Keeps the registered file open.
    _file: Arc<File>,
}

impl Uring {
    /// A ring for `depth` operations at once.
    pub(super) fn new(
        file: &Arc<File>,
        depth: u32,
        fixed: Vec<Arc<PoolMemory>>,
    ) -> io::Result<Self> {
        let depth = depth.next_power_of_two().min(4096);
        // One thread submits and waits: no need to interrupt it for a completion.
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .build(depth)
            .or_else(|_| IoUring::new(depth))?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let fixed = register(&ring, fixed);
        Ok(Self {
            ring,
            in_kernel: 0,
            depth,
            fixed,
            zeroes: OnceLock::new(),
            _file: Arc::clone(file),
        })
    }

    pub(super) fn registered(&self) -> usize {
        self.fixed.len()
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's own descriptor, open as long as the borrow of self.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    pub(super) fn has_room(&self) -> bool {
        self.in_kernel < self.depth
    }

    /// Puts the next step of `active` into the submission queue; `false` when there is no room.
    ///
    /// The caller keeps `active` where it is (in its table, untouched) until the completion with
    /// `index` was taken.
    pub(super) fn prepare(&mut self, index: u32, active: &Active) -> bool {
        if !self.has_room() {
            return false;
        }
        let entry = self.entry(active).user_data(u64::from(index));
        let mut queue = self.ring.submission();
        // SAFETY: the buffer's address is stable and the buffer belongs to the operation, which
        // stays in the table of `Ring` until its completion was taken; `Ring`'s drop waits for that
        // or leaks it. Registered memory is kept alive by `fixed`.
        let pushed = unsafe { queue.push(&entry) }.is_ok();
        drop(queue);
        if pushed {
            self.in_kernel += 1;
        }
        pushed
    }

    fn entry(&self, active: &Active) -> Entry {
        match (active.step, &active.op) {
            (Step::Transfer(from), Op::Read { offset, buf }) => {
                let (address, len, at, index) = self.transfer(buf, *offset, from);
                match index {
                    Some(i) => opcode::ReadFixed::new(FILE, address, len, i).offset(at).build(),
                    None => opcode::Read::new(FILE, address, len).offset(at).build(),
                }
            }
            (Step::Transfer(from), Op::Write { offset, buf, durable }) => {
                let (address, len, at, index) = self.transfer(buf, *offset, from);
                let flags = if *durable { libc::RWF_DSYNC } else { 0 };
                match index {
                    Some(i) => opcode::WriteFixed::new(FILE, address, len, i)
                        .offset(at)
                        .rw_flags(flags)
                        .build(),
                    None => {
                        opcode::Write::new(FILE, address, len).offset(at).rw_flags(flags).build()
                    }
                }
            }
            (Step::Zeroing(way), Op::Zero { extent, may_unmap, .. }) => {
                fallocate(*extent, *may_unmap, way)
            }
            (Step::WritingZeroes(from), Op::Zero { extent, .. }) => {
                let zeroes = self.zeroes.get_or_init(|| AlignedBuf::zeroed(ZERO_PIECE));
                let rest = u32::try_from(extent.len() - from).unwrap_or(u32::MAX);
                let len = u32::try_from(zeroes.len()).unwrap_or(0).min(rest);
                let at = extent.offset() + from;
                opcode::Write::new(FILE, zeroes.address().as_ptr(), len).offset(at).build()
            }
            // Everything else there is: a sync, alone or after a zero.
            (
                Step::Syncing | Step::Transfer(_) | Step::Zeroing(_) | Step::WritingZeroes(_),
                Op::Sync | Op::Zero { .. } | Op::Read { .. } | Op::Write { .. },
            ) => opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
        }
    }

    /// Address, length, position and registered index for the rest of a transfer.
    fn transfer(&self, buf: &IoBuf, offset: u64, from: usize) -> (*mut u8, u32, u64, Option<u16>) {
        let start = buf.address().as_ptr();
        let rest = buf.len().saturating_sub(from);
        let index = self.fixed.iter().position(|memory| {
            let (base, len) = memory.mapping();
            let begin = base.as_ptr().addr();
            (begin..begin + len).contains(&start.addr())
        });
        (
            start.wrapping_add(from),
            u32::try_from(rest).unwrap_or(u32::MAX),
            offset.saturating_add(from as u64),
            index.and_then(|i| u16::try_from(i).ok()),
        )
    }

    /// Hands the submission queue to the kernel; no system call when it is empty.
    pub(super) fn enter(&mut self) -> io::Result<()> {
        loop {
            let queue = self.ring.submission();
            if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
                return Ok(());
            }
            drop(queue);
            match self.ring.submit() {
                Ok(_) => {
                    if self.ring.submission().is_empty() {
                        return Ok(());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The next completion: index of the operation and the kernel's result.
    pub(super) fn next_completion(&mut self) -> Option<(u32, i32)> {
        let entry = self.ring.completion().next()?;
        self.in_kernel = self.in_kernel.saturating_sub(1);
        // We only ever submit u32 indices.
        let index = u32::try_from(entry.user_data()).ok()?;
        Some((index, entry.result()))
    }

    /// Waits until the kernel has let go of everything. `false` when it has not after [`DRAIN_LIMIT`]
    /// without any completion.
    pub(super) fn drain(&mut self) -> bool {
        let second = Timespec::new().sec(1);
        let mut last = Instant::now();
        while last.elapsed() < DRAIN_LIMIT {
            while self.next_completion().is_some() {
                last = Instant::now();
            }
            if self.in_kernel == 0 {
                return true;
            }
            let args = SubmitArgs::new().timespec(&second);
            // A timeout or interruption shows in the count above.
            let _ = self.ring.submitter().submit_with_args(1, &args);
        }
        // Registered memory must outlive what the kernel may still do to it.
        std::mem::forget(std::mem::take(&mut self.fixed));
        std::mem::forget(self.zeroes.take());
        false
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel takes a ring apart later, in the background; without this the backing would
        // stay open, and claimed, for a moment after we are gone. A failure only means that delay.
        let _ = self.ring.submitter().unregister_files();
        let _ = self.ring.submitter().unregister_buffers();
    }
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring")
            .field("depth", &self.depth)
            .field("in_kernel", &self.in_kernel)
            .field("registered", &self.fixed.len())
            .finish_non_exhaustive()
    }
}

fn fallocate(extent: Extent, may_unmap: bool, way: usize) -> Entry {
    let [first, second] = zero_modes(may_unmap);
    let mode = if way == 0 { first } else { second };
    opcode::Fallocate::new(FILE, extent.len()).offset(extent.offset()).mode(mode.bits()).build()
}

/// Registers the memories that the limit on locked memory allows: the largest is left out first,
/// because the small arenas of reads gain as much.
fn register(ring: &IoUring, wanted: Vec<Arc<PoolMemory>>) -> Vec<Arc<PoolMemory>> {
    let mut memories: Vec<_> =
        wanted.into_iter().filter(|memory| memory.mapping().1 <= MAX_REGISTERED).collect();
    while !memories.is_empty() {
        let vectors: Vec<_> = memories
            .iter()
            .map(|memory| {
                let (base, len) = memory.mapping();
                libc::iovec { iov_base: base.as_ptr().cast(), iov_len: len }
            })
            .collect();
        // SAFETY: mappings that live as long as their Arcs, which the ring keeps.
        match unsafe { ring.submitter().register_buffers(&vectors) } {
            Ok(()) => break,
            Err(error) => {
                tracing::debug!(%error, count = memories.len(), "cannot register that much memory");
                let largest = (0..memories.len()).max_by_key(|&i| memories[i].mapping().1);
                largest.map(|i| memories.remove(i));
            }
        }
    }
    memories
}
