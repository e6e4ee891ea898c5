//! What can be done, what is being done and what is done.

use std::ptr::NonNull;

use farshore_extent::Extent;
use nix::errno::Errno;
use nix::fcntl::FallocateFlags;

use super::errno;
use crate::sys::aligned::AlignedBuf;
use crate::sys::pool::PoolSlice;

/// A buffer an operation can own.
#[derive(Debug)]
pub enum IoBuf {
    /// Part of a pool or arena; uses the registered buffer when its memory is registered.
    Pool(PoolSlice),
    /// Memory of its own.
    Own(AlignedBuf),
}

impl IoBuf {
    /// Length in bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // no use for empty buffers
    pub fn len(&self) -> usize {
        match self {
            Self::Pool(slice) => slice.len(),
            Self::Own(buf) => buf.len(),
        }
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Pool(slice) => slice.bytes(),
            Self::Own(buf) => buf,
        }
    }

    /// The bytes, to fill.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Pool(slice) => slice.bytes_mut(),
            Self::Own(buf) => buf,
        }
    }

    /// Address of the first byte; does not change when the value moves.
    pub(super) fn address(&self) -> NonNull<u8> {
        match self {
            Self::Pool(slice) => slice.address(),
            Self::Own(buf) => buf.address(),
        }
    }
}

/// One operation. Offsets and lengths are bytes of the file.
#[derive(Debug)]
pub enum Op {
    /// Fills the whole buffer from `offset`. Reading beyond the end is an error (EIO).
    Read {
        /// First byte.
        offset: u64,
        /// Filled.
        buf: IoBuf,
    },
    /// Writes the whole buffer at `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// Written.
        buf: IoBuf,
        /// Durable at completion.
        durable: bool,
    },
    /// Everything completed before this was submitted is durable at completion (fdatasync).
    Sync,
    /// The range reads as zero at completion.
    Zero {
        /// Which.
        extent: Extent,
        /// The space may be given back.
        may_unmap: bool,
        /// Durable at completion.
        durable: bool,
    },
}

impl Op {
    /// A read or write without a promise of durability.
    pub(super) fn is_plain_transfer(&self) -> bool {
        match self {
            Self::Read { .. } | Self::Write { durable: false, .. } => true,
            Self::Write { durable: true, .. } | Self::Sync | Self::Zero { .. } => false,
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Read { buf, .. } | Self::Write { buf, .. } => buf.len(),
            Self::Sync | Self::Zero { .. } => 0,
        }
    }

    fn zero_len(&self) -> u64 {
        match self {
            Self::Zero { extent, .. } => extent.len(),
            Self::Read { .. } | Self::Write { .. } | Self::Sync => 0,
        }
    }

    /// The completion of this operation.
    pub(super) fn done(self, user_data: u64, result: Result<(), Errno>) -> Done {
        let buf = match self {
            Self::Read { buf, .. } | Self::Write { buf, .. } => Some(buf),
            Self::Sync | Self::Zero { .. } => None,
        };
        Done { user_data, result, buf }
    }
}

/// A finished operation.
#[derive(Debug)]
pub struct Done {
    /// As pushed.
    pub user_data: u64,
    /// All of it was done, or the error. After an error any part of it may have been done.
    pub result: Result<(), Errno>,
    /// The buffer of a read or write.
    pub buf: Option<IoBuf>,
}

/// Zeroes are written in pieces of this many bytes where the kernel cannot zero a range.
pub(super) const ZERO_PIECE: usize = 256 << 10;

/// The ways to have a range zeroed. Not every device or file system knows both; either leaves
/// zeroes.
pub(super) fn zero_modes(may_unmap: bool) -> [FallocateFlags; 2] {
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE.union(keep);
    let zero = FallocateFlags::FALLOC_FL_ZERO_RANGE.union(keep);
    if may_unmap { [punch, zero] } else { [zero, punch] }
}

/// What has to be done next for an operation the kernel reported on.
pub(super) enum Next {
    /// Submit it again: the rest of a transfer, another way to zero, the sync after a zero.
    Again,
    /// Report it.
    Finished(Result<(), Errno>),
}

/// Where an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Transferring from this byte of the buffer on.
    Transfer(usize),
    /// Having it zeroed this way.
    Zeroing(usize),
    /// Writing zeroes ourselves, from this byte of the extent on: no way worked.
    WritingZeroes(u64),
    /// Syncing.
    Syncing,
}

/// An operation on its way, with its buffer.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) op: Op,
    pub(super) step: Step,
    /// Interruptions still tolerated; a device that never stops asking again has failed.
    patience: u8,
    user_data: u64,
}

impl Active {
    pub(super) fn new(op: Op, user_data: u64) -> Self {
        let step = match op {
            Op::Read { .. } | Op::Write { .. } => Step::Transfer(0),
            Op::Zero { .. } => Step::Zeroing(0),
            Op::Sync => Step::Syncing,
        };
        Self { op, step, patience: 16, user_data }
    }

    /// Takes the kernel's result for the step under way.
    pub(super) fn advance(&mut self, result: i32) -> Next {
        if result < 0 {
            let error = errno(result);
            if matches!(error, Errno::EINTR | Errno::EAGAIN) && self.patience > 0 {
                self.patience -= 1;
                return Next::Again;
            }
            return match (self.step, error) {
                (Step::Zeroing(way), Errno::EOPNOTSUPP) => {
                    self.step = if way == 0 { Step::Zeroing(1) } else { Step::WritingZeroes(0) };
                    Next::Again
                }
                _ => Next::Finished(Err(error)),
            };
        }
        match self.step {
            Step::Transfer(before) => {
                let moved = usize::try_from(result).unwrap_or(0);
                let now = before.saturating_add(moved);
                if now >= self.op.len() {
                    return Next::Finished(Ok(()));
                }
                if moved == 0 {
                    return Next::Finished(Err(Errno::EIO));
                }
                self.step = Step::Transfer(now);
                Next::Again
            }
            Step::Zeroing(_) => self.zeroed(),
            Step::WritingZeroes(before) => {
                let moved = u64::try_from(result).unwrap_or(0);
                let now = before.saturating_add(moved);
                if self.op.zero_len() <= now {
                    return self.zeroed();
                }
                if moved == 0 {
                    return Next::Finished(Err(Errno::EIO));
                }
                self.step = Step::WritingZeroes(now);
                Next::Again
            }
            Step::Syncing => Next::Finished(Ok(())),
        }
    }

    /// The range is zero now; perhaps it has to be durable too.
    fn zeroed(&mut self) -> Next {
        if let Op::Zero { durable: true, .. } = self.op {
            self.step = Step::Syncing;
            return Next::Again;
        }
        Next::Finished(Ok(()))
    }

    pub(super) fn into_done(self, result: Result<(), Errno>) -> Done {
        self.op.done(self.user_data, result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(next: Next) -> Option<Result<(), Errno>> {
        match next {
            Next::Again => None,
            Next::Finished(result) => Some(result),
        }
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_stopped_and_no_progress_is_an_error() {
        let buf = IoBuf::Own(AlignedBuf::zeroed(8192));
        let mut active = Active::new(Op::Read { offset: 0, buf }, 1);
        assert_eq!(finished(active.advance(4096)), None);
        assert_eq!(active.step, Step::Transfer(4096));
        assert_eq!(finished(active.advance(-libc::EINTR)), None);
        assert_eq!(active.step, Step::Transfer(4096));
        assert_eq!(finished(active.advance(0)), Some(Err(Errno::EIO)));
        assert_eq!(finished(active.advance(4096)), Some(Ok(())));
        let given_up = (0..100).find_map(|_| finished(active.advance(-libc::EAGAIN)));
        assert_eq!(given_up, Some(Err(Errno::EAGAIN)));
    }

    #[test]
    fn zeroing_tries_all_ways_and_syncs_when_it_must_last() {
        let extent = Extent::new(0, 4096).unwrap();
        let mut active = Active::new(Op::Zero { extent, may_unmap: true, durable: true }, 1);
        assert_eq!(finished(active.advance(-libc::EOPNOTSUPP)), None);
        assert_eq!(active.step, Step::Zeroing(1));
        assert_eq!(finished(active.advance(0)), None);
        assert_eq!(active.step, Step::Syncing);
        assert_eq!(finished(active.advance(0)), Some(Ok(())));
        let mut active = Active::new(Op::Zero { extent, may_unmap: false, durable: false }, 1);
        assert_eq!(finished(active.advance(-libc::EOPNOTSUPP)), None);
        assert_eq!(finished(active.advance(-libc::EOPNOTSUPP)), None);
        assert_eq!(active.step, Step::WritingZeroes(0));
        assert_eq!(finished(active.advance(1024)), None);
        assert_eq!(active.step, Step::WritingZeroes(1024));
        assert_eq!(finished(active.advance(3072)), Some(Ok(())));
    }
}
